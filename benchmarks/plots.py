"""The kernels' figures, from their result files: time relative to the bare products, and peak memory."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

# Okabe and Ito's colours, which stay apart under the common colour-vision deficiencies; ours are the saturated ones.
COLORS = {
    "eager": "#999999",
    "compile": "#56B4E9",
    "liger": "#F0E442",
    "liger chunked": "#E69F00",
    "trl": "#CC79A7",
    "ours torch": "#0072B2",
    "ours triton": "#D55E00",
}
HATCHES = {"": "", "grad_threshold": "////", "top_k": "....", "temperature": "xxxx"}
PANELS = (
    ("reverse KL, forward and backward", "reverse_kl", "diffuse", "both"),
    ("clipped, forward and backward", "clipped", "diffuse", "both"),
    ("peaked rows, forward and backward", "reverse_kl", "peaked", "both"),
    ("confidence", "confidence", "diffuse", "forward"),
)

_LEAST_MEBIBYTES = 0.5  # the foot of a logarithmic axis

CAPTIONS = {
    "reuse": "Accuracy after training with each kind of reuse, by seed, and what an update computes for it",
    "attention": "Time of attention over shared prefixes, by provider",
    "step": "Seconds of one update by phase",
}
PHASES = {"teacher": "#56B4E9", "student": "#0072B2", "optimiser": "#999999"}

Results = dict[str, Any]


def draw(machines: dict[str, Results], folder: Path) -> None:
    """Draw ``kernel_time.png`` and ``kernel_memory.png``, with a row of panels for each kind of machine."""
    folder.mkdir(exist_ok=True)
    for name, quantity, unit in (
        ("kernel_time.png", _relative_time, "time / bare products"),
        ("kernel_memory.png", _mebibytes, "peak extra memory (MiB)"),
    ):
        figure = Figure(figsize=(11, 2.9 * len(machines)), layout="constrained")
        grid = figure.subplots(len(machines), len(PANELS), squeeze=False)
        shown: dict[str, Any] = {}
        for axes_row, results in zip(grid, machines.values(), strict=True):
            for axes, (title, setting, data, phase) in zip(axes_row, PANELS, strict=True):
                rows = [
                    row
                    for row in results["rows"]
                    if row["part"] == "kernels"
                    and (row["setting"], row["data"], row["phase"]) == (setting, data, phase)
                    and "ms" in row
                    and row["provider"] in COLORS
                    and quantity(row) is not None
                ]
                shown |= _bars(axes, rows, quantity)
                axes.set_title(title, fontsize=9)
                if quantity is _relative_time:
                    axes.axhline(1, color="black", linewidth=0.8)
                else:
                    axes.set_yscale("log")
                    axes.set_ylim(bottom=_LEAST_MEBIBYTES)
                    axes.yaxis.set_major_formatter("{x:g}")
                    axes.yaxis.set_minor_formatter(NullFormatter())
            axes_row[0].set_ylabel(f"{results['machine']['device']}\n{unit}", fontsize=8)
        figure.legend(
            shown.values(), shown.keys(), loc="outside lower center", ncols=len(COLORS) + 1, fontsize=8, frameon=False
        )
        figure.savefig(folder / name, dpi=150)


def draw_attention(machines: dict[str, Results], folder: Path) -> None:
    """Draw ``attention.png``: a row of panels for each kind of machine, one for every length and phase."""
    figure = Figure(figsize=(11, 2.9 * len(machines)), layout="constrained")
    for part, content in zip(figure.subfigures(len(machines), squeeze=False)[:, 0], machines.values(), strict=True):
        rows = [row for row in content["rows"] if row["part"] == "attention" and "ms" in row]
        panels = list(dict.fromkeys((row["length"], row["prefix"], row["phase"]) for row in rows))
        for axes, panel in zip(part.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            shown = [row for row in rows if (row["length"], row["prefix"], row["phase"]) == panel]
            names = [row["provider"].replace(" ", "\n") for row in shown]
            axes.bar(names, [row["ms"] for row in shown], color="#0072B2")
            axes.set_title(f"T = {panel[0]}, P = {panel[1]}, {panel[2]}", fontsize=9)
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
        part.supylabel(f"{content['machine']['device']}\nms", fontsize=8)
    figure.savefig(folder / "attention.png", dpi=150)


def draw_step(content: Results, folder: Path) -> None:
    """Draw ``step.png``: a bar for every way to do an update, cut into its phases."""
    rows = [row for row in content["rows"] if row["part"] == "step" and "ms" in row]
    names = {
        (row["provider"], row["variant"], row["states_per_forward"]): None for row in rows if row["phase"] == "update"
    }
    figure = Figure(figsize=(7, 1 + 0.35 * len(names)), layout="constrained")
    axes = figure.subplots()
    labels = [f"{provider} {variant}, {size} states".replace(" ,", ",") for provider, variant, size in names]
    left = [0.0] * len(names)
    for phase, color in PHASES.items():
        seconds = {
            (row["provider"], row["variant"], row["states_per_forward"]): row["ms"] / 1000
            for row in rows
            if row["phase"] == phase
        }
        widths = [seconds[name] for name in names]
        axes.barh(labels, widths, left=left, color=color, label=phase)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(PHASES), fontsize=8, frameon=False)
    figure.savefig(folder / "step.png", dpi=150)


def draw_reuse(rows: list[dict[str, Any]], folder: Path) -> None:
    """Draw ``reuse.png``: accuracy after training by kind and seed, tokens and seconds of an update by kind."""
    rows = [row for row in rows if "reuse" in row]
    kinds = list(dict.fromkeys(row["reuse"] for row in rows))
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    accuracy, tokens, seconds = figure.subplots(1, 3)
    for seed in dict.fromkeys(row["seed"] for row in rows):
        of_seed = {row["reuse"]: 100 * row["accuracy_after"] for row in rows if row["seed"] == seed}
        accuracy.plot(list(of_seed), list(of_seed.values()), "o-", color="#0072B2", alpha=0.4, markersize=4)
    for axes, title, quantity in (
        (accuracy, "held-out accuracy (%)", lambda row: 100 * row["accuracy_after"]),
        (tokens, "student tokens per update (thousands)", lambda row: row["update_means"]["tokens"] / 1000),
        (seconds, "seconds per update to distil", lambda row: row["update_means"]["distill_seconds"]),
    ):
        middle = statistics.median if axes is seconds else statistics.mean
        means = [middle(quantity(row) for row in rows if row["reuse"] == kind) for kind in kinds]
        if axes is accuracy:
            axes.plot(kinds, means, "_", color="black", markersize=24, label="mean")
            before = 100 * rows[0]["accuracy_before"]
            axes.axhline(before, color="#999999", linewidth=0.8, label="before")
            axes.legend(fontsize=7, frameon=False)
        else:
            axes.bar(kinds, means, color="#0072B2", width=0.6)
        axes.set_title(title, fontsize=9)
        axes.margins(x=0.2)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "reuse.png", dpi=150)


def _bars(axes: Axes, rows: list[dict[str, Any]], quantity: Any) -> dict[str, Any]:
    """Draw a group of bars per number of rows; return the legend's entries."""
    counts = sorted({row["rows"] for row in rows})
    bars = list(dict.fromkeys((row["provider"], row["variant"]) for row in rows))
    width = 0.8 / max(len(bars), 1)
    shown = {}
    for place, (provider, variant) in enumerate(bars):
        of_bar = [row for row in rows if (row["provider"], row["variant"]) == (provider, variant)]
        drawn = axes.bar(
            [counts.index(row["rows"]) + (place - (len(bars) - 1) / 2) * width for row in of_bar],
            [quantity(row) for row in of_bar],
            width,
            color=COLORS[provider],
            hatch=HATCHES[variant.partition("=")[0]],
            edgecolor="white",
            linewidth=0.3,
        )
        shown[f"{provider} {variant}".strip()] = drawn
    axes.set_xticks(range(len(counts)), [f"N = {count}" for count in counts], fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return shown


def _relative_time(row: dict[str, Any]) -> float | None:
    return row["over"].get("floor")


def _mebibytes(row: dict[str, Any]) -> float | None:
    return None if row["peak_bytes"] is None else max(row["peak_bytes"] / 2**20, 1.1 * _LEAST_MEBIBYTES)
