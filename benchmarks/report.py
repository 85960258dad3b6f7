"""Renders the tables of README.md and docs/performance.md, and the plots, from the files under ``benchmarks/results``,
and each of these as comma-separated values too.

    python -m benchmarks.report                          # rewrites them
    python -m benchmarks.report --check                  # changes nothing; exit status 1 if a table and its file differ
    python -m benchmarks.report --against OLD.json [NEW.json]    # what became slower (NEW: the newest of its kind)

Of every part, the newest file of a kind of machine is shown. A rehearsal is refused.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import re
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import plots, results
from benchmarks.results import ROOT, Content, Row

RESULTS = results.FOLDER
# Written by `benchmarks.tiny_recipe` and `benchmarks.reuse`, in their own form.
RECIPE = "tiny_recipe.json"
REUSE = "reuse.json"
README = ROOT / "README.md"
PERFORMANCE = ROOT / "docs" / "performance.md"


def tiny_recipe() -> str:
    """Gain of the tiny recipe by seed, and of its variants."""
    rows = json.loads((RESULTS / RECIPE).read_text())
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


def reuse() -> str:
    """What the tiny recipe reaches with each kind of reuse, and what it computes for it."""
    rows = [row for row in json.loads((RESULTS / REUSE).read_text()) if "reuse" in row]
    exact = [row for row in rows if row["reuse"] == "none"]
    lines = []
    for kind in dict.fromkeys(row["reuse"] for row in rows):
        of_kind = [row for row in rows if row["reuse"] == kind]
        after = [100 * row["accuracy_after"] for row in of_kind]
        paired = {row["seed"]: 100 * row["accuracy_after"] for row in exact}
        differences = [value - paired[row["seed"]] for value, row in zip(after, of_kind, strict=True)]
        updates = [row["update_means"] for row in of_kind]
        means = {name: statistics.mean(update[name] for update in updates) for name in updates[0]}
        # What else a machine does makes runs slower, never faster.
        distil, roll_out = (
            statistics.median(update[f"{phase}_seconds"] for update in updates) for phase in ("distill", "rollout")
        )
        lines.append(
            [
                kind,
                ", ".join(f"{value:.1f}" for value in after),
                f"{statistics.mean(after):.1f} ± {deviation(after):.1f}",
                "" if kind == "none" else f"{statistics.mean(differences):+.1f} ± {deviation(differences):.1f}",
                f"{means['tokens'] / 1000:.1f}k",
                f"{distil:.1f}",
                f"{roll_out:.1f}",
                f"{statistics.median(row['seconds'] for row in of_kind):.0f}",
                f"{means['kl']:.3f}",
                f"{means['drift']:.3f}" if "drift" in means else "",
            ]
        )
    head = ["reuse", "accuracy after, by seed", "mean", "against none", "tokens", "distil (s)", "roll out (s)"]
    head += ["run (s)", "KL taught", "drift"]
    first = rows[0]
    about = (
        f"{first['eval_problems']} held-out problems, {100 * first['accuracy_before']:.1f} before; seeds "
        f"{', '.join(str(row['seed']) for row in exact)}; ± is the standard error over seeds. Tokens that the student "
        f"computes, and median seconds, are per update of 32 prompts, at {first['threads']} CPU thread(s), torch "
        f"{first['versions']['torch']}."
    )
    return "\n".join([table(head, lines), "", about, "", f"![{plots.CAPTIONS['reuse']}](reuse.png)"])


def deviation(values: list[float]) -> float:
    """Standard error of a mean over seeds; 0 for one."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def caches() -> str:
    """What the model as shipped reaches with each cache."""
    rows = [row for row in json.loads((RESULTS / REUSE).read_text()) if "cache" in row]
    lines = [
        [
            row["cache"],
            str(row["tokens_per_step"]),
            f"{100 * row['accuracy']:.1f} ± {100 * row['standard_error']:.1f}",
            f"{row['seconds']:.0f}",
        ]
        for row in sorted(rows, key=lambda row: -row["tokens_per_step"])
    ]
    about = f"{rows[0]['problems']} held-out problems, greedy."
    return "\n".join([table(["cache", "tokens per step", "accuracy", "seconds"], lines), "", about])


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
    content = newest(kind, "kernels")
    if content is None:
        return f"On a {kind.upper()}: not measured."
    timed = [row for row in content["rows"] if row["part"] == "kernels" and "ms" in row]
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
    return "\n".join([*lines, "", kernel_footnote(content)])


def best_of_ours(rows: dict[str, dict[str, Any]], variant: str) -> dict[str, Any] | None:
    """The Triton backend's row if there is one, else the PyTorch backend's, of the variant that starts so."""
    for backend in ("triton", "torch"):
        for row in rows.values():
            if row["provider"] == f"ours {backend}" and row["variant"].partition("=")[0] == variant:
                return row
    return None


def kernel_footnote(content: Content) -> str:
    """Where and how a table was measured, who is missing, and what the rounding of logits costs."""
    machine, rows = content["machine"], [row for row in content["rows"] if row["part"] == "kernels"]
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


# ------------------------------------------------------------------------------------------------------------
# What only a GPU shows
# ------------------------------------------------------------------------------------------------------------

NOT_MEASURED = "Not measured."


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def where(content: Content) -> str:
    """The machine of a run, in a sentence."""
    machine = content["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    driver = f", driver {machine['driver']}" if machine["driver"] else ""
    return f"{machine['device']}{driver}, {versions}, revision {machine['revision']}, {machine['date']}."


def ceilings() -> str:
    """What the GPU can do at most, as measured in the newest run."""
    content = newest("gpu", "ceilings")
    if content is None:
        return NOT_MEASURED
    lines = []
    for row in rows_of(content, "ceilings"):
        need, unit, scale = ("bytes", "GB/s", 1e6) if "bytes" in row else ("flops", "TFLOP/s", 1e9)
        rate = f"{row[need] / row['ms'] / scale:.4g} {unit}" if "ms" in row else row["status"]
        clock = row.get("clocks", {}).get("clocks.sm", "")
        lines.append([row["name"], row["dtype"], rate, clock])
    return "\n".join([table(["what", "dtype", "rate", "SM clock"], lines), "", where(content)])


def tests() -> str:
    """How many GPU tests passed, and the names of those that failed."""
    content = newest("gpu", "tests")
    if content is None:
        return NOT_MEASURED
    rows = rows_of(content, "tests")
    count = Counter(row["status"].partition(":")[0] for row in rows)
    lines = [", ".join(f"{number} {kind}" for kind, number in sorted(count.items())) + f". {where(content)}"]
    lines += [f"- `{row['name']}`: {row['status']}" for row in rows if row["status"].startswith("failed")]
    return "\n".join(lines)


def kernel_ceilings() -> str:
    """Every timed row of the ops on a GPU, as a share of the ceilings."""
    content = newest("gpu", "kernels")
    if content is None:
        return NOT_MEASURED
    lines = [
        [
            f"{row['setting']}, {row['data']}",
            str(row["rows"]),
            row["phase"],
            label(row),
            f"{row['ms']:.3g}",
            share(row),
            mebibytes(row),
        ]
        for row in rows_of(content, "kernels")
        if "ms" in row
    ]
    return table(["op", "rows", "phase", "provider", "ms", "of ceiling", "memory"], lines)


def attention() -> str:
    """Attention over shared prefixes on every kind of machine: time, memory, and ours relative to the others."""
    parts = []
    for kind in ("cpu", "gpu"):
        content = newest(kind, "attention")
        parts.append(f"On a {kind.upper()}: not measured." if content is None else attention_table(content))
    return "\n\n".join([*parts, f"![{plots.CAPTIONS['attention']}](attention.png)"])


def attention_table(content: Content) -> str:
    """One machine's table."""
    lines: list[list[str]] = []
    sizes: dict[str, None] = {}
    for row in rows_of(content, "attention"):
        size = f"G = {row['groups']}, S = {row['sequences']}, H = {row['heads']}"
        sizes[f"{size}, D = {row['width']}, {row['dtype']}"] = None
        about = [f"{row['length']}", f"{row['prefix']}", row["phase"], row["provider"]]
        measured = [row["status"], "", "", ""]
        if "ms" in row:
            ratio = row["over"].get("concatenated")
            measured = [spread(row), "" if ratio is None else f"{ratio:.2f}", share(row), mebibytes(row)]
        lines.append([*about, *measured])
    head = ["T", "P", "phase", "provider", "ms (20 to 80 %)", "/ concatenated", "of ceiling", "memory"]
    return "\n".join([table(head, lines), "", f"{'; '.join(sizes)}. {where(content)}"])


def step() -> str:
    """An update of a model of LLaDA-8B's shape and its rollout: seconds, utilisation and memory, and the targets."""
    content = newest("gpu", "step")
    if content is None:
        return "\n".join([NOT_MEASURED, "", targets([])])
    lines: list[list[str]] = []
    sizes: dict[str, None] = {}
    for row in rows_of(content, "step"):
        sizes[f"P = {row['prefix']}, L = {row['length']}, {row['states']} steps, {row['dtype']}"] = None
        about = [label(row), str(row["states_per_forward"]), row["phase"]]
        measured = [row["status"], "", "", ""]
        if "ms" in row:
            used, total = share(row) if "flops" in row else "", row["total_bytes"]
            memory = "" if total is None else f"{total / 2**30:.1f} GiB"
            measured = [spread(row, 1000), f"{row['tokens']}", used, memory]
        lines.append([*about, *measured])
    head = ["who", "states per forward", "phase", "seconds (20 to 80 %)", "tokens", "FLOP utilisation", "peak memory"]
    about_run = f"{'; '.join(sizes)}. {where(content)}"
    return "\n".join([table(head, lines), "", about_run, "", targets(rows_of(content, "step")), *picture("step")])


def targets(rows: list[Row]) -> str:
    """What is aimed at for the step, beside what its rows say, at the micro-batch that plain code has too."""
    size = min((row["states_per_forward"] for row in rows if row["phase"] == "update"), default=0)
    found = {(label(row), row["phase"]): row for row in rows if row["states_per_forward"] in (1, size)}

    def of(column: str, who: str, phase: str = "update") -> float:
        value = found.get((who, phase), {}).get(column)
        return math.nan if value is None else value

    def gibibytes(who: str) -> float:
        return of("total_bytes", who) / 2**30

    plain = of("ms", "plain", "rollout") + of("ms", "plain")
    ours = of("ms", "ours cache=dual", "rollout") + of("ms", "ours reuse=block")
    saved = of("peak_bytes", "ours") / of("peak_bytes", "plain")
    lines = []
    for sense, limit, unit, what, value in (
        ("at least", 2, "", "seconds: plain's update / exact update", of("ms", "plain") / of("ms", "ours")),
        ("at most", 0.25, "", "extra memory: exact update / plain's", saved),
        ("at least", 8, "", "seconds of rollout and update: plain / `cache=dual`, `reuse=block`", plain / ours),
        ("at most", 40, " GiB", "peak memory: exact update", gibibytes("ours")),
        ("at most", 24, " GiB", "peak memory: exact update, NF4", gibibytes("ours quantize=nf4")),
        ("at most", 16, " GiB", "peak memory: `reuse=block`, NF4", gibibytes("ours quantize=nf4, reuse=block")),
        ("at least", 45, " %", "FLOP utilisation: exact student", 100 * of("of_ceiling", "ours", "student")),
    ):
        met = value >= limit if sense == "at least" else value <= limit
        seen = ["not measured", ""] if math.isnan(value) else [f"{value:.3g}{unit}", "yes" if met else "no"]
        lines.append([what, f"{sense} {limit:g}{unit}", *seen])
    return table(["what", "target", "measured", "met"], lines)


def train() -> str:
    """The tiny recipe on a GPU against CPUs."""
    content = newest("gpu", "train")
    if content is None:
        return NOT_MEASURED
    lines = []
    for row in rows_of(content, "train"):
        cells = [row["status"], "", "", "", ""]
        if row["status"] == "ok":
            cells = [percent(row, "before"), percent(row, "after"), percent(row, "recorded")]
            cells += ["yes" if row["agrees"] else "no", f"{row['seconds']:.0f}"]
        lines.append([str(row["seed"]), *cells])
    head = ["seed", "before", "after", "after, on CPUs", "within two standard errors", "seconds"]
    return "\n".join([table(head, lines), "", where(content)])


def schema() -> str:
    """The columns of a run's rows."""
    lines = [[f"`{name}`", meaning] for name, (_, meaning) in results.COLUMNS.items()]
    about = [f"- {part}: {', '.join(f'`{name}`' for name in columns)}" for part, columns in results.ABOUT.items()]
    return "\n".join([table(["column", "meaning"], lines), "", "What names a row:", "", *about])


def share(row: Row) -> str:
    """A row's share of the ceilings, in percent."""
    return f"{100 * row['of_ceiling']:.0f} %" if "of_ceiling" in row else ""


def spread(row: Row, scale: float = 1) -> str:
    """A row's median time and its quantiles."""
    low, middle, high = (f"{row[name] / scale:.3g}" for name in ("ms_q20", "ms", "ms_q80"))
    return f"{middle} ({low} to {high})"


def picture(name: str) -> list[str]:
    """The line that shows a plot of this name."""
    return ["", f"![{plots.CAPTIONS[name]}]({name}.png)"]


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------


def runs(kind: str) -> list[tuple[Path, Content]]:
    """The files of a kind of machine, "cpu" or "gpu", oldest first; ValueError if one is no run, or a rehearsal."""
    files = [(path, results.load(path)) for path in sorted(RESULTS.glob("*.json")) if path.name not in (RECIPE, REUSE)]
    of_kind = [(path, content) for path, content in files if content["machine"]["kind"] == kind]
    # On one day, the second file's name ends in _2.
    return sorted(of_kind, key=lambda file: (file[1]["machine"]["date"], len(file[0].stem), file[0].stem))


def newest(kind: str, part: str) -> Content | None:
    """The newest file of a kind of machine in which anything of a part was run; None before there is one."""

    def ran(row: Row) -> bool:
        return row["status"] != "out of time" and not row["status"].startswith("skipped")

    found = [content for _, content in runs(kind) if any(ran(row) for row in rows_of(content, part))]
    return found[-1] if found else None


def rows_of(content: Content, part: str) -> list[Row]:
    """A part's rows."""
    return [row for row in content["rows"] if row["part"] == part]


SECTIONS = {
    section.__name__: section
    for section in (
        tiny_recipe,
        reuse,
        caches,
        kernels,
        ceilings,
        tests,
        kernel_ceilings,
        attention,
        step,
        train,
        schema,
    )
}
DOCUMENTS = (README, PERFORMANCE)


def render(text: str) -> str:
    """``text`` with every section between ``<!-- NAME -->`` and ``<!-- end -->`` made anew."""

    def section(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{SECTIONS[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", section, text, flags=re.DOTALL)


def compare(old: Content, new: Content) -> str:
    """Every time of two runs as a ratio, what became slower by more than its spread first, then what became faster.

    A time has changed by more than its spread if all between its 20 % and 80 % quantiles lies beyond all between the
    other's.
    """
    before = {results.identity(row): row for row in old["rows"] if "ms" in row}
    after = {results.identity(row): row for row in new["rows"] if "ms" in row}
    groups: dict[str, list[tuple[float, str]]] = {"Slower": [], "Faster": [], "Within the spread": []}
    for about in before.keys() & after.keys():
        a, b = before[about], after[about]
        group = "Within the spread"
        if b["ms_q20"] > a["ms_q80"]:
            group = "Slower"
        elif b["ms_q80"] < a["ms_q20"]:
            group = "Faster"
        name = " ".join(str(value) for value in about if value != "")
        ratio = b["ms"] / a["ms"]
        groups[group].append((ratio, f"{ratio:8.3f}  {spread(a)} -> {spread(b)} ms  {name}"))
    lines = []
    for machine in (old["machine"], new["machine"]):
        lines.append(f"{machine['device']}, {machine['date']}, {machine['revision']}")
    for group, found in groups.items():
        lines += ["", f"{group}: {len(found)}", *(line for _, line in sorted(found, reverse=group != "Faster"))]
    for name, missing in (("old", before.keys() - after.keys()), ("new", after.keys() - before.keys())):
        lines += ["", f"Only in the {name} file: {len(missing)}"]
    return "\n".join(lines)


def sheet(content: Content) -> str:
    """A run as comma-separated values: its rows, each with what it depends on beside the code."""
    machine = content["machine"]
    about = {name: machine[name] for name in ("date", "device", "driver", "cuda", "threads", "python", "revision")}
    about |= machine["versions"]
    rows = [
        {
            **{name: value for name, value in row.items() if not isinstance(value, dict)},
            **{
                f"{name} {key}": x for name, value in row.items() if isinstance(value, dict) for key, x in value.items()
            },
            **about,
        }
        for row in content["rows"]
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def main(argv: list[str] | None = None) -> int:
    """Rewrite the documents and draw the plots, or check the documents, or compare two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a table and its file differ")
    parser.add_argument("--against", type=Path, nargs="+", metavar="JSON", help="an older file, and a newer one")
    args = parser.parse_args(argv)
    if args.against:
        if len(args.against) > 2:
            parser.error("--against takes an older file and, if it is not the newest, a newer one")
        old, *rest = args.against
        before = results.load(old)
        others = [path for path, _ in runs(before["machine"]["kind"]) if path.resolve() != old.resolve()]
        if not rest and not others:
            parser.error(f"there is no file to compare {old.name} with")
        print(compare(before, results.load(rest[0] if rest else others[-1])))
        return 0
    stale = []
    wanted = {path: render(path.read_text()) for path in DOCUMENTS}
    wanted |= {path.with_suffix(".csv"): sheet(content) for kind in ("cpu", "gpu") for path, content in runs(kind)}
    for path, made in wanted.items():
        if not path.is_file() or path.read_text() != made:
            stale.append(path.relative_to(ROOT))
            if not args.check:
                path.write_text(made)
    if args.check:
        for name in stale:
            print(f"{name} is not what its files say: python -m benchmarks.report", file=sys.stderr)
        return int(bool(stale))
    measured = {kind: content for kind in ("cpu", "gpu") if (content := newest(kind, "kernels"))}
    plots.draw(measured, ROOT / "docs")
    plots.draw_reuse(json.loads((RESULTS / REUSE).read_text()), ROOT / "docs")
    attended = {kind: content for kind in ("cpu", "gpu") if (content := newest(kind, "attention"))}
    if attended:
        plots.draw_attention(attended, ROOT / "docs")
    if (content := newest("gpu", "step")) is not None:
        plots.draw_step(content, ROOT / "docs")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
