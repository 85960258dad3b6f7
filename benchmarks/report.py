"""Renders the README's tables and the kernels' figures from the files under ``benchmarks/results``.

``python -m benchmarks.report`` rewrites them; ``--check`` changes nothing and exits with 1 if a table and its file
differ.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

from benchmarks import plots

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


# What the README shows of the result files: setting, rows' kind, and the variant of ours.
SHOWN = (
    ("reverse KL", "reverse_kl", "diffuse", ""),
    ("reverse KL, clipped", "clipped", "diffuse", ""),
    ("reverse KL, peaked rows", "reverse_kl", "peaked", "grad_threshold"),
    ("confidence", "confidence", "diffuse", ""),
    ("confidence, sampled", "confidence", "diffuse", "temperature"),
)
PEERS = ("floor", "eager", "compile", "liger", "liger chunked", "trl")


def kernels() -> str:
    """Time and memory of the ops, on every kind of machine that they were measured on."""
    return "\n\n".join(kernel_table(kind) for kind in ("cpu", "gpu"))


def kernel_table(kind: str) -> str:
    """One machine's table: ours (Triton where it ran) against every other provider."""
    results = load_kernels(kind)
    if results is None:
        return f"On a {kind.upper()}: not measured."
    timed = [row for row in results["rows"] if "ms" in row]
    ran = {row["provider"] for row in timed}
    peers = [peer for peer in PEERS if peer in ran]
    lines = [
        f"| op | rows | ms | {' | '.join(f'/ {peer}' for peer in peers)} | memory | / eager |",
        "|---" * (len(peers) + 5) + "|",
    ]
    for name, setting, data, variant in SHOWN:
        # A loss is timed forward and backward.
        phase = "forward" if setting == "confidence" else "both"
        rows = [row for row in timed if (row["setting"], row["data"], row["phase"]) == (setting, data, phase)]
        for count in sorted({row["rows"] for row in rows}):
            here = {label(row): row for row in rows if row["rows"] == count}
            ours = best_of_ours(here, variant)
            if ours is None:
                continue
            option = f", {ours['variant']}" if variant == "grad_threshold" else ""
            ratios = [f"{ours['over'][peer]:.2f}" if peer in ours["over"] else "" for peer in peers]
            cells = [f"{name}{option}", f"{count}", f"{ours['ms']:.3g}", *ratios, mebibytes(ours)]
            peaks = [row["peak_bytes"] for row in (ours, here.get("eager")) if row and row["peak_bytes"]]
            saved = f"{peaks[0] / peaks[1]:.3f}" if len(peaks) == 2 else ""
            lines.append(f"| {' | '.join([*cells, saved])} |")
    return "\n".join([*lines, "", kernel_footnote(results)])


def best_of_ours(rows: dict[str, dict[str, Any]], variant: str) -> dict[str, Any] | None:
    """The Triton backend's row if there is one, else the PyTorch backend's, of the variant that starts so."""
    for backend in ("triton", "torch"):
        for row in rows.values():
            if row["provider"] == f"ours {backend}" and row["variant"].partition("=")[0] == variant:
                return row
    return None


def kernel_footnote(results: dict[str, Any]) -> str:
    """Where and how a table was measured, who is missing, and what the rounding of logits costs."""
    machine, rows = results["machine"], results["rows"]
    timed = [row for row in rows if "ms" in row]
    sizes = dict.fromkeys(f"{row['op']}: {row['dtype']}, d = {row['width']}, V = {row['vocab']}" for row in timed)
    sentences = [
        f"{machine['device']}, {machine['threads']} CPU thread(s)"
        + "".join(f", {name} {version}" for name, version in machine["versions"].items() if version)
        + f", {machine['date']}",
        f"Times are medians of interleaved rounds ({'; '.join(sizes)})",
    ]
    errors = {
        label(row): row["gradient_error"]
        for row in rows
        if (row["setting"], row["data"]) == ("reverse_kl", "peaked") and "gradient_error" in row
    }
    if errors:
        listed = ", ".join(f"{name} {error:.1g}" for name, error in errors.items())
        sentences.append(f"Relative error of the gradient of peaked rows: {listed}")
    peaks = {label(row): row for row in rows if "peak_bytes" in row and "ms" not in row}
    if peaks:
        size = next(iter(peaks.values()))
        listed = ", ".join(f"{name} {mebibytes(row)}" for name, row in peaks.items())
        sentences.append(f"Memory for N = {size['rows']}, V = {size['vocab']}: {listed}")
    reasons = {}
    for row in rows:
        kind, _, reason = row["status"].partition(": ")
        if kind == "skipped" and not row["variant"]:
            reasons[label(row)] = reason
        elif kind not in ("ok", "skipped"):
            reasons[f"{label(row)}, {row['setting']}, N = {row['rows']}"] = row["status"]
    if reasons:
        sentences.append("Not run: " + "; ".join(f"{name} ({reason.rstrip('.')})" for name, reason in reasons.items()))
    return ". ".join(sentences) + "."


def mebibytes(row: dict[str, Any]) -> str:
    """A row's peak memory beyond its inputs."""
    return "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f} MiB"


def label(row: dict[str, Any]) -> str:
    """A provider with its variant."""
    return f"{row['provider']} {row['variant']}".strip()


def load_kernels(kind: str) -> dict[str, Any] | None:
    """The kernel results of a kind of machine, "cpu" or "gpu"; None before they were measured."""
    path = RESULTS / f"kernels_{kind}.json"
    return json.loads(path.read_text()) if path.is_file() else None


SECTIONS = {"tiny_recipe": tiny_recipe, "kernels": kernels}


def render(text: str) -> str:
    """``text`` with every section between ``<!-- NAME -->`` and ``<!-- end -->`` made anew."""

    def section(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{SECTIONS[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", section, text, flags=re.DOTALL)


def main(argv: list[str] | None = None) -> Any:
    """Rewrite the README and draw the figures, or check the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a table and its file differ")
    args = parser.parse_args(argv)
    text = README.read_text()
    made = render(text)
    if args.check:
        return int(made != text)
    README.write_text(made)
    plots.draw({kind: results for kind in ("cpu", "gpu") if (results := load_kernels(kind))}, ROOT / "docs")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
