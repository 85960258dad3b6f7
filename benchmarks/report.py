"""Renders the README's tables from the files under ``benchmarks/results``: ``python -m benchmarks.report``.

``--check`` changes nothing and exits with 1 if a table and its file differ.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"


def tiny_recipe() -> str:
    """Gain of the tiny recipe by seed, and of its variants."""
    rows = json.loads((RESULTS / "tiny_recipe.json").read_text())
    shipped = [row for row in rows if row["name"] == "tiny"]
    lines = ["| seed | tokens per step | before | after | gain | seconds |", "|---|---|---|---|---|---|"]
    for row in shipped:
        for rate, at_rate in row["tokens_per_step"].items():
            cells = [str(row["seed"]), rate, percent(at_rate, "before"), percent(at_rate, "after")]
            cells.append(f"{100 * at_rate['accuracy_gain']:+.1f} ± {100 * at_rate['standard_error_gain']:.1f}")
            lines.append(f"| {' | '.join(cells)} | {row['seconds']:.0f} |")
    gains = [100 * row["accuracy_gain"] for row in shipped]
    versions = shipped[0]["versions"]
    lines.append("")
    lines.append(
        f"{shipped[0]['eval_problems']} held-out problems, {shipped[0]['threads']} CPU threads, torch "
        f"{versions['torch']}, transformers {versions['transformers']}. Mean gain over {len(gains)} seeds: "
        f"{statistics.mean(gains):+.1f} points, between {min(gains):+.1f} and {max(gains):+.1f}."
    )
    return "\n".join(lines)


def percent(row: dict[str, float], moment: str) -> str:
    """An accuracy with its standard error, in percent."""
    return f"{100 * row[f'accuracy_{moment}']:.1f} ± {100 * row[f'standard_error_{moment}']:.1f}"


def cpu_kernels() -> str:
    """Time and memory of the ops on a CPU, against eager PyTorch and the bare products."""
    results = json.loads((RESULTS / "cpu_step_kl.json").read_text())
    lines = [
        "| op | rows | time / eager | time / bare products | extra memory | extra memory / eager |",
        "|---|---|---|---|---|---|",
    ]
    for name, case in results["cases"].items():
        lines.append(
            f"| {name.replace('_', ' ')} | {case['rows']} | {case['ours_over_eager']:.2f} | "
            f"{case['ours_over_floor']:.2f} | {case['peak_bytes']['ours'] / 2**20:.0f} MiB | "
            f"{case['peak_ours_over_eager']:.3f} |"
        )
    machine, problem = results["machine"], results["problem"]
    lines.append("")
    lines.append(
        f"d = {problem['d']}, V = {problem['V']}, {problem['dtype']}; {machine['cpu']}, "
        f"{machine['threads']} thread(s), torch {machine['torch']}, {machine['date']}; medians of "
        f"{problem['rounds']} interleaved rounds. On a GPU: not measured."
    )
    return "\n".join(lines)


SECTIONS = {"tiny_recipe": tiny_recipe, "cpu_kernels": cpu_kernels}


def render(text: str) -> str:
    """``text`` with every section between ``<!-- NAME -->`` and ``<!-- end -->`` made anew."""

    def section(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{SECTIONS[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", section, text, flags=re.DOTALL)


def main(argv: list[str] | None = None) -> Any:
    """Rewrite the README, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a table and its file differ")
    args = parser.parse_args(argv)
    text = README.read_text()
    made = render(text)
    if args.check:
        return int(made != text)
    README.write_text(made)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
