"""Which states of a trajectory are worth computing: how far the teacher is from the student, step by step.

    python -m benchmarks.states    # writes benchmarks/results/reproduction/states.json, in half a minute

The first update of the tiny recipe, before it changes anything. Of each state it takes the divergence that is trained
on and the student's confidence in what it committed there; and by arithmetic, how well fewer states would estimate the
mean over all: drawn uniformly, or by doubt in the commit with importance weights. `benchmarks.report` makes a section
of docs/reproduction.md of the file.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from statistics import mean

import torch
from torch import Tensor

from benchmarks import reproduce, results
from benchmarks.results import Row
from dopsd.commands import parse_train
from dopsd.console import console
from dopsd.files import write_json
from dopsd.look import Look, look
from dopsd.run import build

FILE = "states.json"
COUNTS = (2, 4, 8)  # states of a trajectory, of about twenty
# Added to each state's doubt, in units of the trajectory's mean: without it a sure state is never drawn.
FLOOR = 0.1


def confidence(found: Look) -> Tensor:  # (S,)
    """The student's mean probability of the tokens that it committed in each state.

    One that is not among its likeliest counts as 0.
    """
    trajectory, rows = found.example.trajectory, found.state
    committed = trajectory.reveal_step[found.position] == found.example.steps[rows]
    own = found.student.tokens == trajectory.tokens[found.position][:, None]
    share = (found.student.probabilities * own).sum(-1)[committed]
    total, count = torch.zeros(2, len(found.example.steps)).unbind()
    total.index_add_(0, rows[committed], share)
    return total / count.index_add_(0, rows[committed], torch.ones_like(share))


def uniform_variance(values: Tensor, count: int) -> float:
    """Of the mean of ``count`` of the ``values`` (S,), drawn without replacement, about the mean of all."""
    rest = (len(values) - count) / (len(values) - 1)
    return float(values.var(correction=0)) / count * rest


def weighted_variance(values: Tensor, doubt: Tensor, count: int) -> float:
    """Of the importance-weighted mean of ``count`` of the ``values`` (S,), drawn in proportion to ``doubt`` (S,)."""
    share = doubt / doubt.sum()
    second_moment = (values.square() / share).sum() / len(values) ** 2
    return float(second_moment - values.mean().square()) / count


def ranks(values: Tensor) -> Tensor:
    """(N,) -> (N,): the place of each in order."""
    return values.argsort().argsort().double()


def correlation(a: Tensor, b: Tensor) -> float:
    """Of two (N,) tensors (Pearson)."""
    return float(torch.corrcoef(torch.stack((a, b)))[0, 1])


def summarise(divergences: Sequence[Tensor], confidences: Sequence[Tensor]) -> Row:
    """What the file says of trajectories, (S,) of each in fp64; each has more states than the largest of `COUNTS`."""
    all_of, sure = torch.cat([*divergences]), torch.cat([*confidences])
    scale = mean(float(values.mean()) for values in divergences)
    doubts = [1 - one + FLOOR * (1 - one).mean() for one in confidences]

    def error(variances: Sequence[float]) -> float:
        return round(math.sqrt(mean(variances)) / scale, 3)

    steps: list[list[tuple[float, float]]] = [[] for _ in range(max(map(len, divergences)))]
    for values, one in zip(divergences, confidences, strict=True):
        for step, pair in enumerate(zip(values.tolist(), one.tolist(), strict=True)):
            steps[step].append(pair)
    return {
        "trajectories": len(divergences),
        "states": len(all_of),
        "rank_correlation": round(correlation(ranks(1 - sure), ranks(all_of)), 3),
        "correlation": round(correlation(1 - sure, all_of), 3),
        "errors": {
            str(count): {
                "uniform": error([uniform_variance(values, count) for values in divergences]),
                "by doubt": error(
                    [weighted_variance(values, doubt, count) for values, doubt in zip(divergences, doubts, strict=True)]
                ),
            }
            for count in COUNTS
        },
        "divergence": [round(mean(value for value, _ in pairs), 5) for pairs in steps],
        "confidence": [round(mean(value for _, value in pairs), 3) for pairs in steps],
    }


def main() -> None:
    """Roll out, look, write the file."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, console(sentences=False, bars=False):
        trainer, _ = build(*parse_train(recipe="tiny", output_dir=folder, inspect_samples=0))
        rows = trainer.train_dataset[: 2 * trainer.args.train_batch_size]
        examples = [example for part in trainer.roll_out(rows) for example in part]
        with trainer.method.free_passes():
            looks = [look(trainer.method, example) for example in examples]
    looks = [found for found in looks if len(found.example.steps) > max(COUNTS)]
    summary = summarise(
        [found.state_divergence().double() for found in looks], [confidence(found).double() for found in looks]
    )
    about = {"machine": results.machine(), "weights": reproduce.weights("tiny")}
    write_json(reproduce.FOLDER / FILE, {**about, **summary})


if __name__ == "__main__":
    main()
