"""Plots of the result files: time relative to the bare products and peak memory by op; the methods' curves."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from benchmarks.results import Content, Row, cases, name_of
from dopsd.plots import BLACK, BLUE, FONT, GRAY, GREEN, LEGEND, ORANGE, VERMILLION

# By Okabe and Ito, as everywhere; ours are the saturated ones.
COLORS = {
    "floor": "#DDDDDD",
    "eager": GRAY,
    "concatenated": GRAY,
    "compile": "#56B4E9",
    "flex": "#56B4E9",
    "liger": "#F0E442",
    "liger kl": "#F0E442",
    "liger chunked": ORANGE,
    "trl": "#CC79A7",
    "torch ce": "#56B4E9",
    "torch ce chunked": ORANGE,
    "liger ce": "#F0E442",
    "cut ce": "#CC79A7",
    "ours torch": BLUE,
    "ours triton": VERMILLION,
}


def draw_ops(runs: Sequence[Content], folder: Path) -> None:
    """Draw ``kernel_time.png`` and ``kernel_memory.png``, with a panel for each kind of machine."""
    for name, unit in (("kernel_time.png", "time / the first provider's"), ("kernel_memory.png", "peak memory (MiB)")):
        figure = _figure(11, 4.2 * len(runs))
        shown = {}
        for axes, content in zip(figure.subplots(len(runs), squeeze=False)[:, 0], runs, strict=True):
            timed = [
                [row for row in rows if row.get("provider") in COLORS and "ms" in row]
                for rows in cases(content["rows"])
            ]
            timed = [rows for rows in timed if rows]
            for place, rows in enumerate(timed):
                width = 0.85 / len(rows)
                for number, row in enumerate(rows):
                    height = (row["peak_bytes"] or 0) / 2**20 if "memory" in name else row["ms"] / rows[0]["ms"]
                    at = place + (number - (len(rows) - 1) / 2) * width
                    shown[row["provider"]] = axes.bar(at, height, width, color=COLORS[row["provider"]])
            axes.set_yscale("log" if "memory" in name else "linear")
            labels = [name_of(rows[0]).replace(", ", "\n") for rows in timed]
            axes.set_xticks(range(len(timed)), labels, rotation=60)
            axes.set_ylabel(f"{content['machine']['device']}\n{unit}", fontsize=FONT)
            _plain(axes)
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown), **LEGEND)
        figure.savefig(folder / name)


def draw_reproduction(runs: Mapping[str, Sequence[Sequence[Row]]], units: Sequence[str], folder: Path) -> None:
    """Draw ``reproduction.png``: accuracy against each unit of cost, and overlap against updates, by method.

    Points of a method's runs that have the same number are one point, their mean. What is before the first update has
    no place on a logarithmic axis.
    """
    figure = _figure(11, 6)
    panels = [(unit, "validation accuracy (%)") for unit in units] + [("updates", "overlap (%)")]
    lines = {}
    colors = (BLUE, VERMILLION, ORANGE, GREEN, GRAY, BLACK, "#CC79A7", "#56B4E9")
    for axes, (x, y) in zip(figure.subplots(2, 3).flat, panels, strict=True):
        for (name, curves), color in zip(runs.items(), colors, strict=False):
            columns = [[point for point in column if point] for column in zip_longest(*curves)]
            known = [column for column in columns if all(x in point and y in point for point in column)]
            means = [[statistics.mean(point[axis] for point in column) for column in known] for axis in (x, y)]
            if known:
                (lines[name],) = axes.plot(*means, "o-", color=color, markersize=3, linewidth=1)
        axes.set_xlabel(x, fontsize=FONT)
        axes.set_ylabel(y, fontsize=FONT)
        axes.set_xscale("log", nonpositive="mask")
        axes.xaxis.set_minor_formatter("")
        _plain(axes)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), **LEGEND)
    figure.savefig(folder / "reproduction.png")


def _figure(width: float, height: float) -> Any:
    # Imported where something is drawn: nothing else needs it.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def _plain(axes: Any) -> None:
    axes.tick_params(labelsize=FONT)
    axes.spines[["top", "right"]].set_visible(False)
