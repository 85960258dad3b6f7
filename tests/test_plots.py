"""The figures are written, show what they are given, and refuse what they cannot draw."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from dopsd.plots import (
    BAR,
    COMMITTED,
    DPI,
    INCHES,
    KNOWN,
    SHOWN,
    TrajectoryTrace,
    Width,
    plot_curves,
    plot_trajectory,
    running_mean,
)
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


def draw(trace: TrajectoryTrace, path: Path, width: Width = "page") -> np.ndarray:
    """(height, width, 3) pixels of the figure; anything matplotlib warns about is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_trajectory(trace, path, width)
    return np.asarray(imread(path))[..., :3]


def inside(image: np.ndarray) -> bool:
    """Whether the picture's edges are white: nothing reaches beyond them."""
    return all(bool((edge == 1).all()) for edge in (image[0], image[-1], image[:, 0], image[:, -1]))


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


def curves(history: list[dict[str, float]], path: Path, *, width: Width = "page", **held_out: float) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_curves(history, path, width=width, **held_out)
    return np.asarray(imread(path))[..., :3]


SIZES = {
    "tiny": {"length": 48, "block": 8},
    "masked scope, stopped early": {"length": 48, "block": 8, "decoded": 32, "scope": "masked"},
    "long": {"length": 256, "block": 32},
    "long, stopped early": {"length": 256, "block": 32, "decoded": 160},
    "one step": {"length": 4, "block": 4, "per_step": 4},
}


@pytest.mark.parametrize(
    "size, width", [*((size, "page") for size in SIZES), ("masked scope, stopped early", "column"), ("long", "column")]
)
def test_trajectory_is_drawn_at_every_size(size: str, width: Width, tmp_path: Path) -> None:
    path = tmp_path / "trajectory.png"
    image = draw(make_trace(**SIZES[size]), path, width)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    assert image.shape[1] == int(INCHES[width] * DPI) and 400 < image.shape[0] < 2400, "a figure has to fit on a page"
    assert area(image, COMMITTED) > 0
    assert inside(image), "something is cut off"


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


@pytest.mark.parametrize("scope", ["future_blocks", "masked"])
def test_the_legend_names_what_is_there(scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells of two colours and positions that were never decoded have an entry where there are any."""
    drawn: list[Any] = []
    monkeypatch.setattr("dopsd.plots._save", lambda figure, *_, **__: drawn.append(figure))
    trace = make_trace(decoded=32 if scope == "masked" else None, scope=scope)
    assert bool((trace.trajectory.commits(trace.steps) & trace.reveal).any()) == (scope == "masked")
    plot_trajectory(trace, tmp_path / "a.png")
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert ("both: upper and lower half" in names) == ("never decoded" in names) == (scope == "masked")
    assert len(names) == 6 + 2 * (scope == "masked")


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
    high = round(8.7 / 72 * DPI)
    distance = abs(int(shown) - int(hidden))
    wide = (np.ptp(columns) + 1) / (distance + 1)
    assert wide == pytest.approx(round(wide), abs=4 / (distance + 1))  # whole pixels, but for the lines between cells
    assert len(rows) == pytest.approx(2 * high * wide, rel=0.2)
    assert np.ptp(rows) <= high


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


@pytest.mark.parametrize("updates, width", [(1, "page"), (15, "column"), (200, "page")])
def test_curves_are_drawn_at_every_length(updates: int, width: Width, tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    held_out = {"before": 0.5, "after": 0.6, "before_error": 0.02, "after_error": 0.02}
    image = curves(make_history(updates), path, width=width, **held_out)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    assert image.shape[1] == int(INCHES[width] * DPI) and 1000 < image.shape[0] < 3200
    assert area(image, "#0072B2") > 300 and inside(image)


def test_curves_show_their_values(tmp_path: Path) -> None:
    history = make_history(40)
    image = curves(history, tmp_path / "a.png")
    assert np.array_equal(image, curves(history, tmp_path / "b.png"))
    assert (tmp_path / "a.pdf").read_bytes() == (tmp_path / "b.pdf").read_bytes()
    history[20]["tries"] += 0.5
    assert not np.array_equal(image, curves(history, tmp_path / "c.png"))


def test_missing_series_lose_their_panel(tmp_path: Path) -> None:
    rows = [{"step": i, "loss": 1.0 / i, "tries": math.nan, "clip_fraction": 0.0} for i in range(1, 10)]
    assert panels(rows, tmp_path) == ["nats"]
    assert panels(rows, tmp_path, before=0.5) == ["nats", "accuracy (%)"]
    assert len(panels(make_history(30), tmp_path)) == 6


def panels(history: list[dict[str, float]], folder: Path, **held_out: float) -> list[str]:
    """The units of the panels that are drawn."""
    with pytest.MonkeyPatch.context() as patch:
        drawn: list[Any] = []
        patch.setattr("dopsd.plots._save", lambda figure, *_, **__: drawn.append(figure))
        plot_curves(history, folder / "a.png", **held_out)
    return [axes.get_ylabel() for axes in drawn[0].axes if axes.get_ylabel()]


def test_axes_say_all_that_they_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No factor stands above an axis, shares stay within 0 and 100, and what marks a collapse has its legend."""
    drawn: list[Any] = []
    monkeypatch.setattr("dopsd.plots._save", lambda figure, *_, **__: drawn.append(figure))
    rows: list[dict[str, Any]] = [{"step": i, "loss": 1e-7 * i, "kl": 1e6 + i, "pass_rate": 1.0} for i in range(1, 9)]
    rows.append({"step": 5, "collapse": "validation accuracy"})
    plot_curves(rows, tmp_path / "a.png", before=0.01, before_error=0.05, after=0.99, after_error=0.05)
    (figure,) = drawn
    figure.canvas.draw()
    for axes in figure.axes:
        assert not axes.yaxis.get_offset_text().get_text() and not axes.xaxis.get_offset_text().get_text()
        if "%" in axes.get_ylabel():
            assert 0 <= axes.get_ylim()[0] < axes.get_ylim()[1] <= 100
    legends = [text.get_text() for axes in figure.axes if axes.get_legend() for text in axes.get_legend().get_texts()]
    assert legends == ["loss", "raw KL (right axis)", "collapse", *legends[3:]] and "collapse" not in legends[3:]


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
