"""Plots of the result files: time relative to the bare products and peak memory by op; reuse."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Content, Row, cases, name_of

# Okabe and Ito's colours, which stay apart under the common colour-vision deficiencies; ours are the saturated ones.
COLORS = {
    "floor": "#DDDDDD",
    "eager": "#999999",
    "concatenated": "#999999",
    "compile": "#56B4E9",
    "flex": "#56B4E9",
    "liger": "#F0E442",
    "liger kl": "#F0E442",
    "liger chunked": "#E69F00",
    "trl": "#CC79A7",
    "ours torch": "#0072B2",
    "ours triton": "#D55E00",
}
_LEAST_MEBIBYTES = 0.5  # the foot of a logarithmic axis


def draw_ops(machines: dict[str, Content], folder: Path) -> None:
    """Draw ``kernel_time.png`` and ``kernel_memory.png``, with a panel for each kind of machine."""
    from matplotlib.ticker import NullFormatter

    for name, unit in (("kernel_time.png", "time / the first provider's"), ("kernel_memory.png", "peak memory (MiB)")):
        figure = _figure(11, 4.2 * len(machines))
        shown = {}
        for axes, content in zip(figure.subplots(len(machines), squeeze=False)[:, 0], machines.values(), strict=True):
            compared = [rows for rows in cases(content["rows"]) if "op" not in rows[0] or rows[0]["op"] != "products"]
            timed = [[row for row in rows if row.get("provider") in COLORS and "ms" in row] for rows in compared]
            timed = [rows for rows in timed if rows]
            for place, rows in enumerate(timed):
                width = 0.85 / len(rows)
                for number, row in enumerate(rows):
                    height = row["ms"] / rows[0]["ms"]
                    if name == "kernel_memory.png":
                        height = max((row["peak_bytes"] or 0) / 2**20, 1.1 * _LEAST_MEBIBYTES)
                    at = place + (number - (len(rows) - 1) / 2) * width
                    shown[row["provider"]] = axes.bar(at, height, width, color=COLORS[row["provider"]])
            if name == "kernel_memory.png":
                axes.set_yscale("log")
                axes.set_ylim(bottom=_LEAST_MEBIBYTES)
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter(NullFormatter())
            else:
                axes.axhline(1, color="black", linewidth=0.8)
            labels = [name_of(rows[0]).replace(", ", "\n") for rows in timed]
            axes.set_xticks(range(len(timed)), labels, fontsize=7, rotation=60)
            axes.set_ylabel(f"{content['machine']['device']}\n{unit}", fontsize=8)
            _plain(axes)
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=11, fontsize=8, frameon=False)
        figure.savefig(folder / name, dpi=150)


def draw_reuse(rows: Sequence[Row], folder: Path) -> None:
    """Draw ``reuse.png``: accuracy after training by kind and seed, tokens and seconds of an update by kind."""
    rows = [row for row in rows if "reuse" in row]
    kinds = list(dict.fromkeys(row["reuse"] for row in rows))
    figure = _figure(9, 2.9)
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
        _plain(axes)
    figure.savefig(folder / "reuse.png", dpi=150)


def _figure(width: float, height: float) -> Any:
    # Imported where something is drawn: nothing else needs it.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _plain(axes: Any) -> None:
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
