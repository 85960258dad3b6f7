"""The processes of one run: where they meet, what they tell each other, and how all end when one does.

Each has two threads. One tells the others through the launcher's store, every ``BEAT``, that its process lives, or why
that ends the run, and hears the same of them. The other waits for nothing, whatever the process is stuck in, and ends
it once another has said why the run ends or has been silent for too long.

Work takes one process longer than another, as long as it likes: all meet before anything is exchanged, and only what
follows is bound by the process group's timeout.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import islice
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.distributed import DistError, PrefixStore, Store, TCPStore

from dopsd.errors import Interrupted, RunError, ending
from dopsd.out_of_memory import unless_out_of_memory

SIGNALS = (signal.SIGINT, signal.SIGTERM)
BEAT = 0.5  # seconds
# So long a process comes to its own end in, once another has said why the run ends.
GRACE = 2.0
# A process silent for so long is what ended the run, if something has ended it.
LOST = 5.0
# The same if a signal came: a launcher that has lost a process sends SIGTERM to the others, and half a minute later
# SIGKILL. Not less, because others may only be writing a large file, in which a process can be silent too.
HURRY = 20.0
# By so much the group's own timeout is longer than the silence that ends a run, so that it ends with a sentence.
MARGIN = timedelta(seconds=60)

S = TypeVar("S")
T = TypeVar("T")


class End(NamedTuple):
    """How a process ends.

    Args:
        status: what it exits with.
        sentence: why.
        doubt: 0, it is what ended the run; 1, a signal, or 2, a failed collective, which may follow from another's end;
            3, it does.
    """

    status: int
    sentence: str
    doubt: int


def join(cpu: bool, backend: str | None, silence: timedelta) -> PartialState:
    """Make the process group, if this is one of several processes; RunError if they don't meet."""
    try:
        return PartialState(cpu=cpu, backend=backend, timeout=silence + MARGIN)
    except RuntimeError as error:
        raise RunError(f"process {os.environ.get('RANK', 0)} can't join the others: {error}") from error


class Ranks:
    """This process among the others of its run, between entering and leaving this; nothing where there are none.

    Args:
        silence: after which another process is given up, counted while this one runs; at least ``LOST``.
        left: what is left for the user then, for the end of a sentence.
    """

    def __init__(self, silence: timedelta, left: Callable[[], str]) -> None:
        state = PartialState()
        self.rank, self.world = state.process_index, state.num_processes
        self.patience, self.left = silence.total_seconds(), left
        others = [rank for rank in range(self.world) if rank != self.rank]
        self.heard = dict.fromkeys(others, -1)  # the last beat of each
        self.silent = dict.fromkeys(others, 0.0)  # seconds since then
        self.ends: dict[int, End] = {}
        self.end: End | None = None  # this process's
        self.said, self.over = threading.Event(), threading.Event()  # that end is said; the threads are to stop
        self.closing = threading.Lock()  # of the thread that ends this process
        self.meetings = 0
        self.waited = 0.0  # seconds that this process had nothing to do but wait for others

    def __enter__(self) -> Ranks:
        global _ranks
        if self.world > 1:
            number = next(_numbers)
            self.store, mine = connect(number), connect(number)  # a call on one waits for others on the same
            self.woken, self.waker = socket.socketpair()
            self.waker.setblocking(False)
            # Python's handlers wait while the main thread is in a collective; this does not.
            self.before = signal.set_wakeup_fd(self.waker.fileno(), warn_on_full_buffer=False)
            self.threads = [
                threading.Thread(target=self.beat, args=(mine,), daemon=True),
                threading.Thread(target=self.watch, daemon=True),
            ]
            for thread in self.threads:
                thread.start()
            _ranks = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        global _ranks
        if self.world == 1:
            return
        self.closing.acquire()  # for good
        try:
            if error is not None:
                self.leave(error)
        finally:
            self.over.set()
            for thread in self.threads:
                thread.join(GRACE)
            signal.set_wakeup_fd(self.before)
            self.waker.close()
            self.woken.close()
            _ranks = None

    def leave(self, error: BaseException) -> None:
        """Tell the others, wait until each has come to its end too, and raise what this one follows from, if it does.

        A process that exits before could have its launcher end the others before they have said why.
        """
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # it won't be long
        collective = isinstance(error, DistError) or type(error) is RuntimeError  # gloo's
        self.end = own = End(*ending(error), doubt=1 if isinstance(error, KeyboardInterrupt) else 2 * collective)
        deadline = time.monotonic() + HURRY
        while time.monotonic() < deadline and any(
            other not in self.ends and seconds < LOST for other, seconds in self.silent.items()
        ):
            time.sleep(BEAT / 10)
        self.said.wait(GRACE)
        found = self.cause(own.doubt) if own.doubt else None
        if found is not None:
            self.end = cause = found[0]
            if cause.status >= 128:
                raise Interrupted(cause.sentence, cause.status) from error
            raise RunError(f"{cause.sentence}; {self.what_is_left()}") from error

    def beat(self, store: Store) -> None:
        """Tell the others of this process and hear of them, until this is over."""
        names = [str(rank) for rank in range(self.world)]
        for number in itertools.count():
            end, last = self.end, self.over.is_set()
            try:
                store.set(names[self.rank], json.dumps([number, end]))
                if store.check(names):
                    for rank, text in enumerate(store.multi_get(names)):
                        if rank != self.rank:
                            self.heard[rank], theirs = json.loads(text)
                            if theirs is not None:
                                self.ends[rank] = End(*theirs)
            except DistError:  # without the store nothing is heard of anyone
                pass
            if end is not None:
                self.said.set()
            if last:
                return
            self.over.wait(BEAT)

    def watch(self) -> None:
        """End this process if another has ended the run and this one does not end by itself."""
        before, known, ended = time.monotonic(), dict(self.heard), 0.0
        while not self.over.is_set():
            if select.select([self.woken], [], [], BEAT)[0] and set(self.woken.recv(100)) & set(SIGNALS):
                self.patience = min(self.patience, HURRY)
            # A process that was stopped itself has not waited for the others meanwhile.
            now = time.monotonic()
            before, passed = now, min(now - before, 2 * BEAT)
            for other, number in self.heard.items():
                self.silent[other] = self.silent[other] + passed if number == known[other] else 0.0
                known[other] = number
            ended = ended + passed if self.ends else 0.0
            cause = self.cause()
            if cause is not None and ended >= cause[1] and self.closing.acquire(blocking=False):
                self.close(cause[0])

    def cause(self, below: int = 4) -> tuple[End, float] | None:
        """What ended the run, and how long this process has to end by itself; None: the run goes on.

        Ends that are as much in doubt as ``below`` don't count.
        """
        ends = self.ends.copy()  # the other thread adds to it
        enough = LOST if ends or self.end is not None else self.patience
        lost = [other for other, seconds in self.silent.items() if seconds >= enough and other not in ends]
        if lost:
            who = f"process{'es' * (len(lost) > 1)} {', '.join(map(str, lost))} of {self.world}"
            seconds = min(self.silent[other] for other in lost)
            return End(1, f"nothing has been heard of {who} for {seconds:.0f} s", doubt=3), 0.0
        doubt, rank = min(((end.doubt, rank) for rank, end in ends.items()), default=(below, 0))
        if doubt >= below:
            return None
        end = ends[rank]
        status = end.status if end.status >= 128 else 1
        said = f"process {rank} of {self.world} ended the run: {end.sentence}"
        return End(status, said, doubt=3), GRACE + (LOST if doubt else 0.0)

    def close(self, cause: End) -> None:
        """End this process from a thread, wherever the others are."""
        self.end = cause
        self.said.wait(GRACE)
        text = cause.sentence if cause.status >= 128 else f"error: {cause.sentence}; {self.what_is_left()}"
        os.write(2, f"\n{text}\n".encode())
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)  # which waits if someone is in it
        flush.start()
        flush.join(GRACE)
        os._exit(cause.status)

    def what_is_left(self) -> str:
        """``left``, or why that can't be said."""
        try:
            return self.left()
        except (RunError, OSError) as error:
            return str(error)

    def meet(self) -> None:
        """Wait until all are here, however long that takes them. Python's signal handlers run meanwhile."""
        number, start = self.meetings + 1, time.monotonic()
        self.meetings = number
        met, pause = f"met {number}", 0.001
        if self.store.add(f"here {number}", 1) == self.world:
            self.store.set(met, "")
            if number > 1:
                for name in ("here", "met"):
                    self.store.delete_key(f"{name} {number - 1}")  # which all have left
        while not self.store.check([met]):
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        self.waited += time.monotonic() - start


_ranks: Ranks | None = None  # where this process is among others
_numbers = itertools.count()  # of runs in one process


def connect(number: int) -> Store:
    """A connection to the store by which the processes met, for the run of this number."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=MARGIN)
    return PrefixStore(f"dopsd {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)} {number}", store)


# ---- what all processes call at the same places; each meets the others first ----


def meet() -> None:
    """Wait for all."""
    if _ranks is not None:
        _ranks.meet()


def gather(thing: T) -> list[T]:
    """Every process's ``thing``, on all of them."""
    world = PartialState().num_processes
    if world == 1:
        return [thing]
    meet()
    things: list[Any] = [None] * world
    torch.distributed.all_gather_object(things, thing)
    return things


def turns(things: Iterable[T], everyone: bool) -> Iterator[tuple[int, T, bool]]:
    """This process's of ``things``, which are the same on all and which they take in turn.

    Args:
        things: anything, as many as there are.
        everyone: whether all processes take part in each round. Those for which the last has nothing left then get
            its first thing as well.

    Yields:
        The number of a thing, the thing, and whether it is this process's.
    """
    state = PartialState()
    numbered = enumerate(things)
    while group := list(islice(numbered, state.num_processes)):
        mine = state.process_index < len(group)
        if mine or everyone:
            yield *group[state.process_index if mine else 0], mine


def mine(things: Any) -> Any:
    """This process's of a sequence or tensor of ``things`` that are the same on all, and which they take in turn."""
    state = PartialState()
    return things[state.process_index :: state.num_processes]


def interleaved(parts: Sequence[Sequence[T]]) -> list[T]:
    """What the processes have made of the things that they took in turn, in the order of the things."""
    return [parts[number % len(parts)][number // len(parts)] for number in range(sum(map(len, parts)))]


def spread(things: Iterable[S], compute: Callable[[S], T]) -> list[T]:
    """``compute`` of each of ``things``, which are the same on all processes, in order; each computes its share.

    Raises:
        OutOfMemoryError: on all processes, if one had not enough memory for its share.
    """
    parts = gather(unless_out_of_memory(lambda: [compute(thing) for _, thing, _ in turns(things, False)]))
    short = ", ".join(str(rank) for rank, part in enumerate(parts) if part is None)
    if short:
        raise torch.OutOfMemoryError(f"out of memory on process {short}")
    return interleaved([part for part in parts if part is not None])


def waited() -> float:
    """Seconds that this process has waited for others to meet it, since the run began."""
    return 0.0 if _ranks is None else _ranks.waited


def add(*tensors: Tensor) -> None:
    """Replace each tensor, of one shape everywhere, by its sum over the processes."""
    if PartialState().num_processes > 1:
        meet()
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def add_gradients(model: nn.Module) -> None:
    """Replace the gradient of each trained parameter by its sum over the processes; none on some counts as zero."""
    if PartialState().num_processes > 1:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        add(*(parameter.grad for parameter in trained if parameter.grad is not None))


def on_first_process(do: Callable[[], T]) -> T:
    """What ``do`` returns or raises on the first process, on all of them."""
    answer: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            answer = [do()]
        except Exception as error:
            answer = [error]
    meet()
    broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]
