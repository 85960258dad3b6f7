"""The figures are written, show what they are given, and refuse what they cannot draw."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from dopsd.plots import BAR, COMMITTED, KNOWN, SHOWN, TrajectoryTrace, plot_curves, plot_trajectory, running_mean
from dopsd.trajectory import NEVER, Trajectory


def make_trace(
    length: int = 48, block: int = 8, per_step: int = 2, decoded: int | None = None, scope: str = "future_blocks"
) -> TrajectoryTrace:
    """A block-by-block decoding, roughly left to right, with a teacher that agrees on the first commit of each step."""
    generator = torch.Generator().manual_seed(0)
    reveal_step = torch.full((length,), NEVER)
    step = 0
    for start in range(0, length if decoded is None else decoded, block):
        order = (torch.arange(block) + torch.rand(block, generator=generator) * block).argsort()
        for positions in (start + order).split(per_step):
            reveal_step[positions] = step
            step += 1
    trajectory = Trajectory(torch.arange(5), torch.arange(length), reveal_step, block)
    steps = torch.arange(step)
    block_end = trajectory.block_starts(steps)[:, None] + block
    candidates = reveal_step >= steps[:, None]
    if scope == "future_blocks":
        candidates &= torch.arange(length) >= block_end
    reveal = candidates & (torch.rand(step, length, generator=generator) < 0.25)
    chosen = torch.zeros(step, length, dtype=torch.bool)
    chosen[steps, trajectory.commits(steps).long().argmax(-1)] = True
    labels = [str(int(token) % 4 + 1) for token in trajectory.tokens]
    return TrajectoryTrace(
        trajectory, steps, reveal, chosen, torch.rand(step, generator=generator), labels, "4x4 Sudoku, problem 17"
    )


def draw(trace: TrajectoryTrace, path: Path) -> np.ndarray:
    """(height, width, 3) pixels of the figure; anything matplotlib warns about is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_trajectory(trace, path)
    return np.asarray(imread(path))[..., :3]


def area(image: np.ndarray, color: str) -> int:
    """Number of pixels of ``color``."""
    return int((np.abs(image - np.array(to_rgb(color))).max(-1) < 0.5 / 255).sum())


def make_history(updates: int) -> list[dict[str, float]]:
    generator = np.random.default_rng(0)
    history: list[dict[str, float]] = []
    for step in range(1, updates + 1):
        noise, trend = generator.normal(size=6), math.exp(-step / 50)
        history.append(
            {
                "step": step,
                "loss": 0.02 + 0.08 * trend + 0.01 * noise[0],
                "kl": 0.3 + 0.9 * trend + 0.1 * noise[1],
                "clip_fraction": 0.001 * trend,
                "overlap_top20": 0.85 - 0.2 * trend + 0.02 * noise[2],
                "tries": 1.2 + 1.5 * trend,
                "pass_rate": 0.8 + 0.05 * noise[3],
                "accepted": 0.6 + 0.05 * noise[4],
                "completion_length": 44 + noise[5],
                "grad_norm": 1.0,
                "learning_rate": 1e-3,
            }
        )
        if step % 25 == 0:
            history.append({"step": step, "eval_accuracy": 0.6 - 0.1 * trend, "eval_standard_error": 0.02})
    return history


def curves(history: list[dict[str, float]], path: Path, **held_out: float) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_curves(history, path, **held_out)
    return np.asarray(imread(path))[..., :3]


SIZES = {
    "tiny": {"length": 48, "block": 8},
    "masked scope, stopped early": {"length": 48, "block": 8, "decoded": 32, "scope": "masked"},
    "long": {"length": 256, "block": 32},
    "long, stopped early": {"length": 256, "block": 32, "decoded": 160},
    "one step": {"length": 4, "block": 4, "per_step": 4},
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_trajectory_is_drawn_at_every_size(size: dict, tmp_path: Path) -> None:
    path = tmp_path / "trajectory.png"
    image = draw(make_trace(**size), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert image.shape[1] > 1000 and image.shape[0] > 400
    assert image.shape[1] < 3000 and image.shape[0] < 2400, "a figure has to fit on a page"
    assert area(image, COMMITTED) > 0


def test_cells_have_the_colours_of_their_state(tmp_path: Path) -> None:
    """Areas in the picture are in proportion to the numbers of cells in the trace."""
    trace = make_trace()
    trace = replace(trace, chosen=torch.zeros_like(trace.chosen))
    image = draw(trace, tmp_path / "a.png")
    cells = {
        KNOWN: int((trace.trajectory.reveal_step < trace.steps[:, None]).sum()),
        COMMITTED: int(trace.trajectory.commits(trace.steps).sum()),
        SHOWN: int(trace.reveal.sum()),
    }
    per_cell = area(image, KNOWN) / cells[KNOWN]
    for color, count in cells.items():
        # A legend patch is about two cells; cells next to a block boundary lose a part to its line.
        assert area(image, color) == pytest.approx(count * per_cell, rel=0.05, abs=3 * per_cell)


def test_moving_one_reveal_moves_one_cell(tmp_path: Path) -> None:
    trace = make_trace()
    shown, hidden = trace.reveal[0].nonzero()[0], (~trace.reveal[0, 8:]).nonzero()[0] + 8
    reveal = trace.reveal.clone()
    reveal[0, shown], reveal[0, hidden] = False, True
    before, again, after = (
        draw(t, tmp_path / f"{name}.png")
        for t, name in ((trace, "a"), (trace, "b"), (replace(trace, reveal=reveal), "c"))
    )
    assert np.array_equal(before, again)
    assert before.shape == after.shape
    rows, columns = np.nonzero((before != after).any(-1))
    cell = 8.7 / 72 * 300
    assert len(rows) == pytest.approx(2 * cell**2, rel=0.2)
    assert np.ptp(rows) <= cell
    distance = abs(int(shown) - int(hidden))
    assert np.ptp(columns) == pytest.approx((distance + 1) * cell, abs=4)


@pytest.mark.parametrize("length, block", [(48, 8), (256, 32)])
def test_k_is_visible_on_and_off_the_commits(length: int, block: int, tmp_path: Path) -> None:
    trace = make_trace(length, block)
    nothing = torch.zeros_like(trace.chosen)
    committed, other = nothing.clone(), nothing.clone()
    positions = trace.trajectory.commits(trace.steps)[0].nonzero().flatten()
    committed[0, positions[0]] = True
    other[0, next(i for i in range(block) if i not in positions.tolist())] = True
    images = [draw(replace(trace, chosen=chosen), tmp_path / "a.png") for chosen in (nothing, committed, other)]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (np.abs(images[i] - images[j]).max(-1) > 0.3).sum() > 20


def test_kl_bars_follow_their_steps(tmp_path: Path) -> None:
    trace = make_trace()
    kl = torch.zeros(len(trace.steps))
    tops = []
    for row in (3, 20):
        kl.zero_()[row] = 1.0
        image = draw(replace(trace, step_kl=kl), tmp_path / "a.png")
        gray = np.abs(image - np.array(to_rgb(BAR))).max(-1) < 0.01
        tops.append(np.nonzero(gray.sum(1) > 100)[0][0])
    assert tops[1] - tops[0] == pytest.approx(17 * 8.7 / 72 * 300, abs=5)


def test_kl_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    trace = make_trace()
    kl = trace.step_kl.clone()
    kl[2], kl[5] = math.nan, math.inf
    image = draw(replace(trace, step_kl=kl), tmp_path / "a.png")
    kl[2], kl[5] = 0.0, 0.0
    assert np.array_equal(image, draw(replace(trace, step_kl=kl), tmp_path / "b.png"))


def test_some_of_the_steps_and_awkward_texts(tmp_path: Path) -> None:
    trace = make_trace()
    keep = torch.arange(2, 20, 3)
    labels = ["$x^$", "\n", " the", "<|endoftext|>", "_", "%d"] * 8
    part = TrajectoryTrace(
        trace.trajectory,
        trace.steps[keep],
        trace.reveal[keep],
        trace.chosen[keep],
        trace.step_kl[keep],
        labels,
        "$ a title that is not mathematics, and that goes on for " + "rather " * 20 + "long",
    )
    assert draw(part, tmp_path / "a.png").shape[1] < 3000


def test_trace_refuses_parts_that_do_not_fit() -> None:
    trace = make_trace()
    late = trace.reveal.clone()
    late[-1, 0] = True
    for change, sentence in (
        ({"steps": trace.steps[:0]}, "nothing to draw"),
        ({"steps": trace.steps.flip(0)}, "increasing"),
        ({"steps": trace.steps + 1}, r"lie in \[0, 24\)"),
        ({"reveal": trace.reveal[:, 1:]}, "reveal must be a bool tensor"),
        ({"chosen": trace.chosen.long()}, "chosen must be a bool tensor"),
        ({"reveal": late}, "reveal has positions that were no longer masked"),
        ({"chosen": late}, "chosen has positions that were no longer masked"),
        ({"step_kl": trace.step_kl[1:]}, "step_kl must have shape"),
        ({"labels": ["a"]}, "1 texts for 48 positions"),
    ):
        with pytest.raises(ValueError, match=sentence):
            replace(trace, **change)


@pytest.mark.parametrize("updates", [1, 15, 200])
def test_curves_are_drawn_at_every_length(updates: int, tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    image = curves(make_history(updates), path, before=0.5, after=0.6, before_error=0.02, after_error=0.02)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert image.shape[1] > 2000 and image.shape[0] > 1000
    assert area(image, "#0072B2") > 300


def test_curves_show_their_values(tmp_path: Path) -> None:
    history = make_history(40)
    image = curves(history, tmp_path / "a.png")
    assert np.array_equal(image, curves(history, tmp_path / "b.png"))
    history[20]["tries"] += 0.5
    assert not np.array_equal(image, curves(history, tmp_path / "c.png"))


def test_missing_series_lose_their_panel(tmp_path: Path) -> None:
    rows = [{"step": i, "loss": 1.0 / i, "tries": math.nan} for i in range(1, 10)]
    alone = curves(rows, tmp_path / "a.png")
    assert alone.shape == curves([{"step": 1, "loss": 1.0}], tmp_path / "b.png").shape
    assert curves(rows, tmp_path / "c.png", before=0.5).shape[1] == 2 * alone.shape[1]
    assert curves(make_history(30), tmp_path / "d.png").shape[1] == 3 * alone.shape[1]


def test_gaps_are_survived(tmp_path: Path) -> None:
    history = make_history(60)
    for row in history[10:30]:
        row.update(loss=math.nan, kl=math.inf)
    history.append({"step": 60, "eval_accuracy": 0.6})
    history.append({"step": 60, "train_runtime": 10.0})
    curves(history, tmp_path / "a.png")


@pytest.mark.parametrize("history", [[], [{"step": 1, "learning_rate": 1e-3}], [{"step": 1, "loss": math.nan}]])
def test_a_history_without_curves_is_refused(history: list[dict[str, float]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"history has nothing to draw.*loss, kl, eval_accuracy"):
        plot_curves(history, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_running_mean() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, 8.0])
    np.testing.assert_allclose(running_mean(values, 3), [1.5, 1.5, 3.0, 6.0, 6.0])
    assert np.isnan(running_mean(np.array([np.nan, np.nan, np.nan, np.nan, 5.0]), 3)[0])
    np.testing.assert_allclose(running_mean(values[:2], 5), [1.5, 1.5])
