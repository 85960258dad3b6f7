"""Figures: how a training run went, and what one denoising trajectory looked like to student and teacher."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dopsd.files import write_bytes
from dopsd.trajectory import NEVER, Trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Okabe and Ito's colours, which stay apart under the common colour-vision deficiencies. Every figure is laid out at
# its print size, as wide as a page's text or one of its two columns, so FONT is what a reader sees.
BLUE, VERMILLION, ORANGE, GREEN, GRAY, BLACK = "#0072B2", "#D55E00", "#E69F00", "#009E73", "#767676", "#000000"
FONT, TITLE_FONT, DPI = 8.0, 9.0, 300
LEGEND: dict[str, Any] = {"fontsize": FONT, "frameon": False, "borderaxespad": 0.2, "handletextpad": 0.5}

Width = Literal["page", "column"]
INCHES: dict[Width, float] = {"page": 6.75, "column": 3.25}

Array = NDArray[np.float64]


def why_no_picture() -> str | None:
    """Why no figure can be drawn here; None if one can. Nothing else of a run needs what draws."""
    return None if find_spec("matplotlib") else "matplotlib is not installed: pip install 'dopsd[train]'"


def _save(figure: Figure, path: Path, **options: Any) -> None:
    """Write ``path``, and the same as a PDF beside it, whose text is text; the same figure gives the same bytes."""
    import matplotlib

    drawn = BytesIO(), BytesIO()  # what can't be written is then said by us, and not by what draws
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        figure.savefig(drawn[0], format=path.suffix[1:], **options)
        figure.savefig(drawn[1], format="pdf", metadata={"CreationDate": None}, **options)
    for file, content in zip((path, path.with_suffix(".pdf")), drawn, strict=True):
        write_bytes(file, content.getbuffer())


# Training curves. One panel per group of series that share a unit; shares are drawn as percentages. The two series of
# a group may still be orders of magnitude apart (a share of a whole vocabulary against a share of 20 entries): then
# the second has its own axis, in its colour, on the right.


@dataclass(frozen=True)
class _Panel:
    """Series drawn in one panel: (key in the history, name in the legend)."""

    unit: str
    series: tuple[tuple[str, str], ...]
    scale: float = 1.0
    may_split: bool = False
    integers: bool = False


_ACCURACY = _Panel("accuracy (%)", (("eval_accuracy", "validation"),), scale=100)
_PANELS = (
    _Panel("nats", (("loss", "loss"), ("kl", "raw KL")), may_split=True),
    _ACCURACY,
    _Panel("share (%)", (("pass_rate", "prompts with a correct try"), ("accepted", "rollouts trained on")), scale=100),
    _Panel("tries", (("tries", "tries to first correct"),)),
    _Panel(
        "share (%)",
        (("overlap_top20", "top-20 overlap"), ("clip_fraction", "clipped entries")),
        scale=100,
        may_split=True,
    ),
    _Panel("tokens", (("completion_length", "completion length"),), integers=True),
)
# A series with more points than this is drawn faint, with its running mean on top.
_SMOOTH_ABOVE = 15
# Ratio of typical sizes from which two series of a panel no longer share an axis.
_SPLIT_RATIO = 4.0
_NICE = [1, 2, 2.5, 5, 10]


def plot_curves(
    history: Sequence[Mapping[str, float]],
    path: Path,
    *,
    before: float | None = None,
    after: float | None = None,
    before_error: float | None = None,
    after_error: float | None = None,
    width: Width = "page",
) -> None:
    """Draw the training curves of a run as small multiples.

    A panel appears for whatever the history has: loss and unclipped KL, accuracy, solved prompts and rollouts that
    were trained on, tries, overlap and clip fraction (if anything was clipped), completion length. Series of more than
    15 points are drawn faint under their centred running mean. Values that are not finite are left out: a gap in the
    line, nothing in the mean. A dotted line marks a collapse.

    Args:
        history: rows as in ``TrainerState.log_history``, each with ``step``; accuracies and shares lie in [0, 1].
        path: PNG file to write, with a PDF beside it.
        before: accuracy on the held-out problems before training, in [0, 1].
        after: the same after training.
        before_error: standard error of ``before``.
        after_error: standard error of ``after``.
        width: of the figure on paper.

    Raises:
        ValueError: if no row has a finite value that could be drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    keys = [key for panel in _PANELS for key, _ in panel.series]
    curves = {key: curve for key in keys if (curve := _curve(history, key)) is not None}
    if "clip_fraction" in curves and not np.nan_to_num(curves["clip_fraction"][1]).any():
        del curves["clip_fraction"]  # nothing was clipped
    if not curves:
        raise ValueError(f"history has nothing to draw: it needs rows with step and any of {', '.join(keys)}")
    held_out = [
        (value, error or 0.0, name, color, style)
        for value, error, name, color, style in (
            (before, before_error, "before", GRAY, "--"),
            (after, after_error, "after", VERMILLION, "-"),
        )
        if value is not None
    ]
    panels = [p for p in _PANELS if any(key in curves for key, _ in p.series) or (p is _ACCURACY and held_out)]
    columns = 1 if width == "column" else len(panels) if len(panels) < 4 else -(-len(panels) // 2)
    rows = -(-len(panels) // columns)
    # One running mean for all, so that one note says what the strong lines are.
    longest = max(len(values) for _, values in curves.values())
    window = int(max(5, longest // 10)) | 1
    first = min(steps[0] for steps, _ in curves.values())
    last = max(steps[-1] for steps, _ in curves.values())
    margin = 0.03 * (last - first) or 1.0
    collapses = [row["step"] for row in history if "collapse" in row]

    layout = ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.05, wspace=0.04, hspace=0.02)
    figure = Figure(figsize=(INCHES[width], (2.3 if width == "page" else 1.7) * rows), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.set_xlim(first - margin, last + margin)
        lines = [axes.axvline(step, color=BLACK, linestyle=":", linewidth=1.0) for step in collapses]
        drawn = [(key, name) for key, name in panel.series if key in curves]
        right = axes.twinx() if panel.may_split and _apart([curves[key][1] for key, _ in drawn]) else None
        handles: list[Any] = []
        names: list[str] = []
        if panel is _ACCURACY:
            for value, error, name, color, style in held_out:
                axes.axhspan(100 * (value - error), 100 * (value + error), color=color, alpha=0.18, linewidth=0)
                line = axes.axhline(100 * value, color=color, linestyle=style, linewidth=1.2)
                handles.append((Patch(color=color, alpha=0.18, linewidth=0), line) if error else line)
                names.append(f"{name}, held-out" + (" (\u00b1 s.e.)" if error else ""))
            if drawn:
                points, has_errors = _validation(axes, history, curves["eval_accuracy"])
                handles.insert(0, points)
                names.insert(0, "validation" + (" (\u00b1 s.e.)" if has_errors else ""))
        else:
            for (key, name), color in zip(drawn, (BLUE, VERMILLION), strict=False):
                steps, values = curves[key]
                aside = right is not None and color == VERMILLION
                host = right if right is not None and aside else axes
                handles.append(_line(host, steps, panel.scale * values, color, window))
                names.append(f"{name} (right axis)" if aside else name)
        if lines and index == 0:
            handles.append(lines[0])
            names.append("collapse")
        axes.set_ylabel(panel.unit, fontsize=FONT)
        for host in [axes] if right is None else [axes, right]:
            host.tick_params(labelsize=FONT, width=0.6, length=2.5)
            host.yaxis.set_major_locator(MaxNLocator(5, steps=_NICE, integer=panel.integers))
            host.yaxis.set_major_formatter("{x:g}")  # whole numbers at every tick, and no factor above the axis
            if panel.scale == 100:
                low, high = host.get_ylim()
                host.set_ylim(max(low, 0), min(high, 100))
            host.spines[["top"] if host is right else ["top", "right"]].set_visible(False)
        if right is not None:
            axes.tick_params(axis="y", labelcolor=BLUE)
            right.tick_params(axis="y", labelcolor=VERMILLION)
            axes.spines["right"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=_NICE, integer=True))
        axes.xaxis.set_major_formatter("{x:.0f}")
        if index + columns < len(panels):
            axes.tick_params(axis="x", labelbottom=False)
        else:
            axes.set_xlabel("optimizer update", fontsize=FONT)
        axes.legend(
            handles,
            names,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            handlelength=1.4,
            labelspacing=0.2,
            handler_map={tuple: HandlerTuple(ndivide=1)},
            **LEGEND,
        )
    if any(key != "eval_accuracy" and _smoothed(values) for key, (_, values) in curves.items()):
        note = f"faint: as logged; strong: running mean of {window}"
        figure.supxlabel(note, fontsize=FONT, color=GRAY, x=0.99, horizontalalignment="right")
    _save(figure, path)


def _smoothed(values: Array) -> bool:
    return bool(np.isfinite(values).sum() > _SMOOTH_ABOVE)


def _curve(history: Sequence[Mapping[str, float]], key: str) -> tuple[Array, Array] | None:
    """Steps and values of one series, what is not finite as NaN; None if nothing is finite."""
    rows = [(float(row["step"]), float(row[key])) for row in history if key in row and "step" in row]
    steps, values = np.array(rows, dtype=np.float64).reshape(-1, 2).T
    values = np.where(np.isfinite(values), values, np.nan)
    return (steps, values) if np.isfinite(values).any() else None


def _apart(series: Sequence[Array]) -> bool:
    """Whether two series differ so much in size that one would look flat beside the other."""
    sizes = [float(np.nanmean(np.abs(values))) for values in series]
    return len(sizes) == 2 and 0 < _SPLIT_RATIO * min(sizes) < max(sizes)


def running_mean(values: Array, window: int) -> Array:
    """Mean of the finite values among the ``window`` around each position; NaN where there are none."""
    finite = np.isfinite(values)
    kernel = np.ones(window)
    pad = window // 2
    total = np.convolve(np.pad(np.where(finite, values, 0.0), pad), kernel, mode="valid")
    count = np.convolve(np.pad(finite.astype(np.float64), pad), kernel, mode="valid")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _line(axes: Axes, steps: Array, values: Array, color: str, window: int) -> Line2D:
    """Draw one series and return what stands for it in a legend."""
    if not _smoothed(values):
        return axes.plot(steps, values, color=color, linewidth=1.3, marker="o", markersize=2.5)[0]
    axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.3)
    return axes.plot(steps, running_mean(values, window), color=color, linewidth=1.5)[0]


def _validation(axes: Axes, history: Sequence[Mapping[str, float]], curve: tuple[Array, Array]) -> tuple[Any, bool]:
    """Draw validation accuracies; returns what stands for them in a legend, and whether they have error bars."""
    steps, values = curve
    rows = [row for row in history if "eval_accuracy" in row and "step" in row]
    errors = np.array([float(row.get("eval_standard_error", np.nan)) for row in rows])
    errors = np.where(np.isfinite(errors), errors, 0.0)
    points = axes.errorbar(
        steps,
        100 * values,
        yerr=100 * errors if errors.any() else None,
        color=BLUE,
        linewidth=1.0,
        elinewidth=0.8,
        marker="o",
        markersize=3,
    )
    return points, bool(errors.any())


# A trajectory. Every cell is one position at one step; its colour says what the student saw there and what happened.
# Student in blues (light: known, dark: decided now), teacher in orange, K as rings on top; lightness alone also keeps
# the four apart. Cells are a whole number of pixels wide, so that they all look the same.

MASKED, KNOWN, COMMITTED, SHOWN, BAR = "#F1F1F1", "#BCD5EA", BLUE, ORANGE, "#595959"
NEVER_STYLE: dict[str, Any] = {"facecolor": "white", "edgecolor": "#C8C8C8", "hatch": "/////", "linewidth": 0.0}
# Narrowest cells whose tokens are written out below them, in points, and the longest text written for one.
_LABELLED_FROM, _LABEL_LENGTH = 6.5, 10


@dataclass(frozen=True, eq=False)
class TrajectoryTrace:
    """One trajectory, and what an update made of it.

    Args:
        trajectory: the decoded response, of L positions.
        steps: (S,) int64, the denoising steps trained on, increasing.
        reveal: (S, L) bool, the masked positions whose final tokens the teacher was shown at each step.
        chosen: (S, L) bool, K of each step: the masked positions that were compared.
        step_kl: (S,) mean KL(student || teacher) over K of each step, in nats.
        labels: L token texts.
        title: heading of the figure.

    Raises:
        ValueError: if the parts do not fit together; the sentence says in what way.
    """

    trajectory: Trajectory
    steps: Tensor
    reveal: Tensor
    chosen: Tensor
    step_kl: Tensor
    labels: Sequence[str]
    title: str

    def __post_init__(self) -> None:
        length, count, total = len(self.trajectory.tokens), len(self.steps), self.trajectory.num_steps
        if count == 0:
            raise ValueError("steps is empty: there is nothing to draw")
        if bool((self.steps.diff() <= 0).any()) or not 0 <= int(self.steps[0]) <= int(self.steps[-1]) < total:
            raise ValueError(f"steps must be increasing and lie in [0, {total}), got {self.steps.tolist()}")
        for name, value in (("reveal", self.reveal), ("chosen", self.chosen)):
            if value.dtype != torch.bool or tuple(value.shape) != (count, length):
                raise ValueError(
                    f"{name} must be a bool tensor of shape {(count, length)}, got {value.dtype} {tuple(value.shape)}"
                )
            if bool((value & (self.trajectory.reveal_step < self.steps[:, None])).any()):
                raise ValueError(f"{name} has positions that were no longer masked at their step")
        if tuple(self.step_kl.shape) != (count,):
            raise ValueError(f"step_kl must have shape {(count,)}, got {tuple(self.step_kl.shape)}")
        if len(self.labels) != length:
            raise ValueError(f"labels has {len(self.labels)} texts for {length} positions")


def plot_trajectory(trace: TrajectoryTrace, path: Path, width: Width = "page") -> None:
    """Draw one trajectory: response positions from left to right, denoising steps from top to bottom.

    A position that is committed at a step and shown to the teacher at the same step is half and half. Positions that
    were never decoded are hatched. The bars beside a step are its mean KL over K; one that is not finite is left out.

    Args:
        trace: what to draw.
        path: PNG file to write, with a PDF beside it.
        width: of the figure on paper.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    from matplotlib.transforms import Bbox

    trajectory, steps = trace.trajectory, trace.steps.tolist()
    length, count, block = len(trajectory.tokens), len(steps), trajectory.block_length

    # Sizes in inches. What the axes leave of the width is shared among the cells, of whole pixels each.
    left, gap, right = 0.55, 0.1, 0.12
    side, space = (1.0, " ") if width == "page" else (0.55, "\n")
    cell_width = max(int((INCHES[width] - left - gap - side - right) / length * DPI), 1) / DPI
    cell_height = round(min(max(4.6 / count, 4 / DPI), 8.7 / 72) * DPI) / DPI
    labelled = 72 * cell_width >= _LABELLED_FROM
    cells, height = cell_width * length, max(cell_height * count, 0.8)
    bottom, top = 1.2, 1.0  # cut where nothing is drawn
    figure = Figure(figsize=(max(INCHES[width], left + cells + gap + side + right), bottom + height + top), dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    total_width, total_height = figure.get_size_inches()

    def place(x: float, w: float, **options: Any) -> Axes:
        return figure.add_axes(
            (x / total_width, bottom / total_height, w / total_width, height / total_height), **options
        )

    axes = place(left, cells)
    bars = place(left + cells + gap, side, sharey=axes)

    _cells(axes, trace, grid=min(cell_width, cell_height) > 4 / 72)
    ring = _ring(min(cell_width, cell_height) * 72)
    rows, positions = trace.chosen.cpu().nonzero(as_tuple=True)
    axes.plot(positions.numpy(), rows.numpy(), **ring)
    for boundary in range(block - trajectory.lead, length, block):
        axes.axvline(boundary - 0.5, color=BLACK, linewidth=0.7, zorder=3)
    axes.set_xlim(-0.5, length - 0.5)
    axes.set_ylim(count - 0.5, -0.5)
    axes.set_ylabel("denoising step", fontsize=FONT)
    stride = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, count) if -(-count // s) <= 13)
    axes.set_yticks(range(0, count, stride), [str(step) for step in steps[::stride]])
    axes.tick_params(labelsize=FONT, width=0.6, length=2.5)
    if labelled:
        texts = [_label(text) for text in trace.labels]
        upright = max(map(len, texts)) <= 1
        axes.set_xticks(range(length), texts, rotation=0 if upright else 90, parse_math=False)
        axes.tick_params(axis="x", length=0, pad=2, labelsize=min(FONT, 72 * cell_width))
        position = "token at each response position"
    else:
        every = block * max(1, -(-length // (block * int(4 * cells))))  # at most four numbers an inch
        axes.set_xticks(range(0, length, every))
        position = "response position"
    axes.set_xlabel(f"{position}{space}(blocks of {block})", fontsize=FONT)

    kl = trace.step_kl.detach().double().cpu().numpy()
    bars.barh(np.arange(count), np.where(np.isfinite(kl), kl, 0.0), height=0.8, color=BAR, linewidth=0)
    bars.set_xlabel(f"mean KL{space}over K\n(nats)", fontsize=FONT)
    bars.tick_params(labelsize=FONT, width=0.6, length=2.5)
    bars.tick_params(axis="y", labelleft=False, length=0)
    bars.xaxis.set_major_locator(MaxNLocator(3 if width == "page" else 2, steps=_NICE))
    bars.xaxis.set_major_formatter("{x:g}")
    bars.spines[["top", "right"]].set_visible(False)

    columns = 3 if width == "page" else 1
    _trajectory_legend(figure, trace, ring, columns, left / total_width, (bottom + height + 0.06) / total_height)
    drawn = figure.get_tightbbox(canvas.get_renderer())
    low, high = (round(edge * DPI) / DPI for edge in (drawn.y0 - 0.05, drawn.y1 + 0.05))
    _save(figure, path, bbox_inches=Bbox.from_extents(0, low, total_width, high))


def _cells(axes: Axes, trace: TrajectoryTrace, grid: bool) -> None:
    """Colour every cell. The image has two rows per step, for cells that are two things at once."""
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    reveal_step, count, length = trace.trajectory.reveal_step, len(trace.steps), len(trace.labels)
    committed, known = trace.trajectory.commits(trace.steps), reveal_step < trace.steps[:, None]
    never = reveal_step == NEVER
    upper = np.zeros((count, length, 4))  # transparent where nothing was ever decoded: the hatching shows through
    for where, color in (
        ((~never).expand(count, -1), MASKED),
        (known, KNOWN),
        (trace.reveal, SHOWN),
        (committed, COMMITTED),
    ):
        upper[where.cpu().numpy()] = to_rgba(color)
    lower = upper.copy()
    lower[trace.reveal.cpu().numpy()] = to_rgba(SHOWN)
    axes.imshow(
        np.stack([upper, lower], axis=1).reshape(2 * count, length, 4),
        extent=(-0.5, length - 0.5, count - 0.5, -0.5),
        interpolation="nearest",  # with "none", some readers of PDF files blur the cells
        aspect="auto",
        zorder=2,
    )
    edges = np.flatnonzero(np.diff(never.cpu().numpy().astype(int), prepend=0, append=0)).tolist()
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        axes.add_patch(Rectangle((start - 0.5, -0.5), stop - start, count, zorder=1, **NEVER_STYLE))
    if grid:
        style: dict[str, Any] = {"color": "white", "linewidth": 0.5, "zorder": 2.5}
        axes.vlines(np.arange(1, length) - 0.5, -0.5, count - 0.5, **style)
        axes.hlines(np.arange(1, count) - 0.5, -0.5, length - 0.5, **style)


def _ring(cell: float) -> dict[str, Any]:
    """Style of the marker of K for cells whose smaller side has ``cell`` points."""
    return {
        "marker": "o",
        "markersize": max(0.6 * cell, 2.2),
        "markerfacecolor": "none",
        "markeredgecolor": BLACK,
        "markeredgewidth": min(1.0, 0.25 + 0.1 * cell),
        "linestyle": "none",
        "zorder": 4,
    }


def _label(text: str) -> str:
    """A token's text on one line, with its spaces and line ends visible and cut if it is long."""
    text = text.replace(" ", "\u2423").replace("\n", "\u21b5").replace("\t", "\u21e5")
    return text if len(text) <= _LABEL_LENGTH else text[: _LABEL_LENGTH - 1] + "\u2026"


def _trajectory_legend(
    figure: Figure, trace: TrajectoryTrace, ring: dict[str, Any], columns: int, x: float, y: float
) -> None:
    """Put the legend above the panels, its lower left corner at (x, y) of the figure, and the title above it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries: list[tuple[Any, str]] = [
        (Patch(facecolor=MASKED, edgecolor=GRAY, linewidth=0.5), "masked"),
        (Patch(facecolor=KNOWN), "revealed earlier"),
        (Patch(facecolor=COMMITTED), "committed by the student now"),
        (Line2D([], [], **{**ring, "markersize": 5.0, "markeredgewidth": 1.0}), "compared (K)"),
    ]
    if bool(trace.reveal.any()):
        entries.insert(3, (Patch(facecolor=SHOWN), "shown to the teacher (self-future)"))
    if bool((trace.trajectory.commits(trace.steps) & trace.reveal).any()):
        entries.insert(4, ((Patch(facecolor=COMMITTED), Patch(facecolor=SHOWN)), "both: upper and lower half"))
    if trace.trajectory.block_length < len(trace.labels):
        entries.append((Line2D([], [], color=BLACK, linewidth=0.7), "end of a block"))
    if bool((trace.trajectory.reveal_step == NEVER).any()):
        entries.append((Patch(**{**NEVER_STYLE, "linewidth": 0.5}), "never decoded"))
    handles, names = zip(*entries, strict=True)
    legend = figure.legend(
        handles,
        names,
        loc="lower left",
        bbox_to_anchor=(x, y),
        ncols=columns,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        handlelength=1.2,
        handleheight=1.0,
        columnspacing=1.5,
        labelspacing=0.3,
        borderpad=0.0,
        **LEGEND,
    )
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    above = legend.get_window_extent(canvas.get_renderer()).y1 / figure.bbox.height
    figure.text(
        x,
        above + 0.06 / figure.get_figheight(),
        textwrap.fill(trace.title, int(figure.get_figwidth() * 72 / (0.56 * TITLE_FONT))),
        fontsize=TITLE_FONT,
        verticalalignment="bottom",
        parse_math=False,
    )
