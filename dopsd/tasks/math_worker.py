r"""Whether two answers in LaTeX are equal, asked of math-verify in a process that can be ended at any time.

math-verify's own time limit raises from a signal handler: it works in the main thread only, and does not interrupt what
runs in C. So it is off here, and each question is asked of a worker process that arms a timer whose signal nothing
handles: the kernel ends the process at the deadline, whatever it is doing, also if its parent is gone. The worker's
memory is limited as well. It outlives its questions; one that has ended is replaced at the next. POSIX only.

This file is both sides: the parent's :class:`MathWorker`, and the worker's loop. They exchange JSON lines. The worker
finds modules where Python and its packages are installed, and this package where it is: no script of the caller's.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from threading import Lock

from dopsd.errors import RunError

MEMORY = 4 * 2**30

# What the worker runs, with folders as arguments. Neither the current folder nor PYTHONPATH comes before the standard
# library, where a caller's ``copy.py`` would be taken for its copy.
START = (
    "import sys; sys.path[:] = [*filter(None, sys.path), *sys.argv[1:]]; "
    "from dopsd.tasks.math_worker import answer_questions; answer_questions()"
)


class MathWorker:
    """The parent's side: started at the first question; one question at a time, from any thread.

    Args:
        limit: seconds for one question.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.lock = Lock()
        self.process: subprocess.Popen[str] | None = None
        self.owner = 0

    def equal(self, gold: str, response: str) -> bool:
        r"""Whether the answer that math-verify finds in ``response`` equals ``gold``; False at the deadline.

        Raises:
            RunError: the worker does not start.
        """
        with self.lock:
            if self.process is None or self.owner != os.getpid():  # a fork may not share its parent's pipes
                self.start()
            answer = self.ask([self.limit, gold, response])
            if answer is None:
                self.close()
            return answer is True

    def start(self) -> None:
        """Start a worker and wait until it has imported what it needs."""
        self.owner = os.getpid()
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, *folders()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**environment, "PYTHONHASHSEED": "0"},
            start_new_session=True,  # an interrupt from the keyboard is for its parent, whose end it sees
            text=True,
        )
        greeting = self.ask(None)
        if greeting != "ready":
            self.close()
            raise RunError(f"math-verify can't be used to grade: {greeting or 'its process has ended'}")

    def ask(self, question: object) -> object:
        """The worker's answer; None if it has ended."""
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (OSError, ValueError):  # nothing, or a part of a line
            return None

    def close(self) -> None:
        """End the worker, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def folders() -> list[str]:
    """Where this package and math-verify with what it needs are, if not where packages are installed."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    callers = {"", os.getcwd(), *([] if script is None else [str(Path(script).resolve().parent)])}
    return [*(path for path in sys.path if path not in callers), str(Path(__file__).parents[2])]


def answer_questions() -> None:
    """The worker's side: a line in, a line out, until there are no more or a question's time is up."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply

    def reply(answer: object) -> None:
        replies.write(json.dumps(answer) + "\n")
        replies.flush()

    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most), most))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    sys.stdin.readline()
    try:
        from math_verify import parse, verify
    except ImportError as error:
        reply(str(error))
        return
    reply("ready")
    for line in sys.stdin:
        limit, gold, response = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, limit)
        try:
            right = parse(rf"\boxed{{{gold}}}", parsing_timeout=None)
            same = verify(right, parse(response, parsing_timeout=None), timeout_seconds=None)
        except MemoryError:
            return
        except Exception:  # whatever a parser makes of a model's text
            same = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply(same)
