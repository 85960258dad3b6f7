"""The collapse of a run: how it is told from noise, and what is done about it.

What the guard knows is in the Trainer's log, which is the same on all processes and is saved with each checkpoint: a
resumed run comes to the same conclusions at the same updates.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers import TrainerCallback

from dopsd import checkpoints
from dopsd.ranks import on_first_process

log = logging.getLogger(__name__)

Log = Sequence[Mapping[str, Any]]

# Falls of validation accuracy that are not looked at, and in standard errors of a difference.
POINTS, ERRORS = 0.05, 3.0
# Columns of a collapse in a log that are no numbers.
WORDS = ("collapse", "collapse_action")
# First tries in a window, what they fall to, and how seldom chance may bring a given pair of windows so far apart.
WINDOW, SHARE, CHANCE = 128, 1 / 3, 1e-9
# Updates, and prompts, without a correct try before a run is told that it learns nothing.
UPDATES, PROMPTS = 3, 8


class Fall(NamedTuple):
    """A measure that was ``best`` behind update ``best_update`` and is ``now`` below it, or not."""

    measure: str
    best_update: int
    best: float
    now: float


class Tally(NamedTuple):
    """How many of so many first tries were right, and behind which update that was logged."""

    update: int
    right: int
    tries: int

    @property
    def share(self) -> float:
        """First-try accuracy."""
        return self.right / self.tries


def validation(log: Log, problems: int, threshold: float | None) -> tuple[Fall, float] | None:
    """The last validation accuracy with the best one before it, and by how much it may lie below that.

    That is ``threshold`` or, without one, five points or three standard errors of the difference, whichever is more.
    The error is that of two shares of ``problems`` problems with one true value, estimated from both. It is too large,
    because both are of the same problems and grades between 0 and 1 vary less than answers right or wrong; so noise is
    taken for a fall more rarely than three standard errors say.
    """
    rows = [(row["step"], row["eval_accuracy"]) for row in log if "eval_accuracy" in row]
    if len(rows) < 2 or not problems:
        return None
    update, best = max(rows[:-1], key=lambda row: row[1])
    now = rows[-1][1]
    if threshold is None:
        middle = (best + now) / 2
        threshold = max(POINTS, ERRORS * math.sqrt(2 * middle * (1 - middle) / problems))
    return Fall("validation accuracy", update, best, now), threshold


def validation_fall(log: Log, problems: int, threshold: float | None) -> Fall | None:
    """The last validation accuracy, if it lies further below the best one before it than it may."""
    found = validation(log, problems, threshold)
    if found is None:
        return None
    fall, limit = found
    return fall if fall.best - fall.now > limit else None


def best_and_last(tallies: Sequence[Tally]) -> tuple[Tally, int, Tally] | None:
    """The best window apart from the last one, the first update of the last one, and that one."""
    seen = list(windows(tallies))
    if not seen:
        return None
    first, now = seen[-1]
    before = [window for _, window in seen if window.update < first]
    return (max(before, key=lambda window: window.share), first, now) if before else None


def first_try_fall(tallies: Sequence[Tally], since: int) -> Fall | None:
    """First-try accuracy in the last window, if it is at most a third of that in the best window apart from it.

    A window is as few logged rows as have 128 tries, here of updates behind ``since``. Noise can do that as well: where
    3% are right, windows with 8 and with 2 are common. So Fisher's exact test of the two windows must give less than
    1e-9, which takes at least 28 right tries in the best window if the last one has none, and about 70 (55%) if it has
    a third. Among the n windows of a run whose accuracy stays what it was are n (n - 1) / 2 pairs, so that noise stops
    at most one run of 1000 logged rows in 2000, however the windows overlap.
    """
    found = best_and_last(tallies)
    if found is None or found[1] <= since:
        return None
    best, _, now = found
    fell = now.share <= SHARE * best.share and fisher(best, now) < CHANCE
    return Fall("first-try accuracy", best.update, best.share, now.share) if fell else None


def windows(tallies: Sequence[Tally]) -> Iterator[tuple[int, Tally]]:
    """Ending at each row, the shortest run of rows with at least WINDOW tries: its first row's update, and its sum."""
    first = right = tries = 0
    for row in tallies:
        right, tries = right + row.right, tries + row.tries
        while tries - tallies[first].tries >= WINDOW:
            right, tries, first = right - tallies[first].right, tries - tallies[first].tries, first + 1
        if tries >= WINDOW:
            yield tallies[first].update, Tally(row.update, right, tries)


def fisher(best: Tally, now: Tally) -> float:
    """Fisher's exact one-sided p: of ``now`` having so few of all that are right, or fewer, by chance."""
    right, tries = best.right + now.right, best.tries + now.tries
    ways = sum(math.comb(now.tries, few) * math.comb(best.tries, right - few) for few in range(now.right + 1))
    return ways / math.comb(tries, right)


def tallies_of(log: Log, prompts: int, slices: int, name: str = "first_try") -> list[Tally]:
    """The logged means ``name`` as counts; every ``slices`` updates begin with a rollout of ``prompts`` prompts."""
    tallies, logged = [], 0
    for row in log:
        if "loss" in row:
            tries = (-(-row["step"] // slices) - -(-logged // slices)) * prompts
            logged = row["step"]
            if name in row and tries:
                tallies.append(Tally(row["step"], round(row[name] * tries), tries))
    return tallies


def events(log: Log) -> list[dict[str, Any]]:
    """The collapses of a run, for its report."""
    return [
        {
            "update": row["step"],
            "measure": row["collapse"],
            "from": row["collapse_from"],
            "to": row["collapse_to"],
            "best_update": row["collapse_best_update"],
            "action": row["collapse_action"],
            "back_to": row.get("collapse_back_to"),
        }
        for row in log
        if "collapse" in row
    ]


def sentence(event: Mapping[str, Any]) -> str:
    """What happened at a collapse, and what was done."""
    back, action = event["back_to"], event["action"]
    if action == "ignore":
        done = "training goes on, because on_collapse=ignore"
    elif action == "rollback":
        done = f"training goes on from the adapter of update {back} at half the learning rate"
    elif back is None:
        done = "training stops, with nothing to go back to: the last adapter is what is left"
    else:
        done = f"training stops and goes back to the adapter of update {back}, the best by validation"
    return (
        f"collapse at update {event['update']}: {event['measure']} fell from {100 * event['from']:.1f}% (update "
        f"{event['best_update']}) to {100 * event['to']:.1f}%; {done}"
    )


class CollapseGuard(TrainerCallback):
    """Looks for a collapse whenever something was measured, and does what ``on_collapse`` says.

    The adapter that the run begins with is validated and saved too, so that there always is one to go back to.

    Args:
        trainer: whose log has ``first_try``, ``pass_rate`` and ``eval_accuracy``.
        updates_per_batch: how many updates one rollout is for.
    """

    def __init__(self, trainer: transformers.Trainer, updates_per_batch: int) -> None:
        self.trainer, self.updates_per_batch = trainer, updates_per_batch

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer: Any = self.trainer
        if not args.load_best_model_at_end:
            self.say("no checkpoint is chosen by validation (load_best_model_at_end): the last adapter will be left")
            return
        if not state.log_history and trainer.eval_dataset:
            trainer._determine_best_metric(trainer.evaluate(), None)
            trainer._save_checkpoint(trainer.model, None)
        # transformers does not take update 0 for the best.
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if best.is_dir():
            state.best_model_checkpoint = str(best)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "first_try" in logs:
            since = max((row["step"] for row in state.log_history if "collapse" in row), default=0)
            self.act(first_try_fall(self.tallies(state.log_history), since), args, state, control)
            self.warn_of_nothing(args, state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        log = state.log_history
        found = [row["eval_accuracy"] for row in log if "eval_accuracy" in row]
        if not found or not self.trainer.is_in_train:
            return
        if args.load_best_model_at_end and all(found[-1] > one for one in found[:-1]):
            control.should_save = True  # also between the checkpoints that save_steps asks for
        self.act(validation_fall(log, self.problems(), args.collapse_threshold), args, state, control)

    def problems(self) -> int:
        """How many are validated on."""
        return len(self.trainer.eval_dataset)  # type: ignore[arg-type]

    def figures(self, log: Log) -> dict[str, float]:
        """How far what the last row of ``log`` measured is from a collapse, for people to follow."""
        if "eval_accuracy" in log[-1]:
            found = validation(log, self.problems(), self.trainer.args.collapse_threshold)  # type: ignore[attr-defined]
            return {} if found is None else {"validation_fall": found[0].best - found[0].now, "fall_limit": found[1]}
        if "first_try" in log[-1]:
            pair = best_and_last(self.tallies(log))
            return {} if pair is None else {"first_try_best": pair[0].share, "first_try_last": pair[2].share}
        return {}

    def tallies(self, log: Log, name: str = "first_try") -> list[Tally]:
        """The log's counts of tries."""
        args = self.trainer.args
        prompts = min(args.train_batch_size * args.world_size, len(self.trainer.train_dataset))  # type: ignore[arg-type]
        return tallies_of(log, prompts, self.updates_per_batch, name)

    def act(self, fall: Fall | None, args: Any, state: Any, control: Any) -> None:
        """Log a collapse, say it, and stop, go back or go on."""
        action = args.on_collapse
        if fall is None or any(event["action"] != "rollback" for event in events(state.log_history)):
            return
        best = (
            Path(state.best_model_checkpoint) if args.load_best_model_at_end and state.best_model_checkpoint else None
        )
        if action == "rollback":
            why = "none is there" if best is None else on_first_process(lambda: self.fault(best))
            if why is not None or best is None:
                self.say(f"the best checkpoint by validation can't be gone back to: {why}")
                action = "stop"
            else:
                self.roll_back(best)
        row = {
            "collapse": fall.measure,
            "collapse_from": fall.best,
            "collapse_to": fall.now,
            "collapse_best_update": fall.best_update,
            "collapse_action": action,
        }
        if best is not None and action != "ignore":
            row["collapse_back_to"] = checkpoints.number(best)
        self.trainer.log(row)
        self.say(sentence(events(state.log_history)[-1]))
        if action == "stop":
            state.max_steps = state.global_step  # so that the run has ended, also for a resume
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"

    def fault(self, best: Path) -> str | None:
        """Why a checkpoint can't be gone back to."""
        return checkpoints.fault(best, checkpoints.run_id(best.parent))

    def roll_back(self, best: Path) -> None:
        """Adapters and optimiser as they were in ``best``; the schedule goes on, at half its learning rates."""
        trainer: Any = self.trainer
        scheduler: Any = trainer.lr_scheduler
        optimizer: Any = trainer.optimizer
        schedule, rates = scheduler.state_dict(), [group["lr"] / 2 for group in optimizer.param_groups]
        trainer.load_adapters(str(best))  # without its pending slices
        trainer._load_optimizer_and_scheduler(str(best))
        scheduler.load_state_dict(schedule)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates
        if hasattr(scheduler, "base_lrs"):  # not of those that scale what they find
            scheduler.base_lrs = [rate / 2 for rate in scheduler.base_lrs]

    def warn_of_nothing(self, args: Any, state: Any) -> None:
        """Say it, once, if no try at the first prompts was correct."""
        tallies = self.tallies(state.log_history, "pass_rate")

        def enough(rows: Sequence[Tally]) -> bool:
            last = rows[-1].update if rows else 0
            return last >= state.max_steps or (last >= UPDATES and sum(row.tries for row in rows) >= PROMPTS)

        if enough(tallies) and not enough(tallies[:-1]) and not any(row.right for row in tallies):
            prompts = sum(row.tries for row in tallies)
            self.say(
                f"no try at the first {prompts} prompts was correct: look at the responses in held_out_before.json; at "
                "the task, its prompt format and grading; at gen_length, steps, temperature and pass_k; and, for a "
                "model of another kind, at mask_token_id and shift_logits"
            )

    def say(self, text: str) -> None:
        """Log a sentence, once for all processes."""
        if self.trainer.is_world_process_zero():
            log.warning(text)
