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
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import plots, results
from benchmarks.results import ABOUT, COLUMNS, FOLDER, ROOT, Content, Row, cases, name_of
from dopsd.cache import todays
from dopsd.evaluation.results import percent
from dopsd.tables import markdown_table

# Written by `benchmarks.tiny_recipe` and `benchmarks.reuse`, in their own form.
RECIPE, REUSE = "tiny_recipe.json", "reuse.json"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "performance.md")
NOT_MEASURED = "Not measured."


# ------------------------------------------------------------------------------------------------------------
# Ops
# ------------------------------------------------------------------------------------------------------------


def ours_of(case: Sequence[Row]) -> Row | None:
    """The Triton backend's row where it ran, else the PyTorch backend's."""
    ran = {row["provider"]: row for row in case if "ms" in row}
    return ran.get("ours triton", ran.get("ours torch"))


def ratios(rows: Sequence[Row]) -> list[dict[str, str]]:
    """A line for every case: our time, and the times of the others that it is a multiple of; memory and error."""
    compared = [(case, ours) for case in cases(rows) if (ours := ours_of(case)) is not None]
    others = dict.fromkeys(name for _, ours in compared for name in ours.get("over", ()) if not name.startswith("ours"))
    lines = []
    for case, ours in compared:
        base = next((row for row in case if row["provider"] in ("eager", "concatenated") and "ms" in row), {})
        line = {"op": name_of(ours), "ms": f"{ours['ms']:.3g}"}
        line |= {f"/ {name}": f"{ours['over'][name]:.2f}" if name in ours["over"] else "" for name in others}
        line |= {"memory": mebibytes(ours), "/ plain": ""}
        if ours["peak_bytes"] is not None and base.get("peak_bytes"):
            line["/ plain"] = f"{ours['peak_bytes'] / base['peak_bytes']:.2f}"
        lines.append({**line, "error": f"{ours['error']:.0e}" if "error" in ours else ""})
    return lines


def absent(rows: Sequence[Row]) -> list[str]:
    """Who did not run and why, once each."""
    reasons: dict[str, None] = {}
    for row in rows:
        kind, _, reason = row["status"].partition(": ")
        if row["status"] != "ok":
            who = row["provider"] if kind == "skipped" else f"{row['provider']}, {name_of(row)}"
            reasons[f"{who}: {reason or kind}"] = None
    return list(reasons)


def kernels() -> str:
    """Time and memory of the ops, on every kind of machine that they were measured on."""
    return "\n\n".join(op_table(kind, "kernels", "attention") for kind in ("cpu", "gpu"))


def op_table(kind: str, *parts: str) -> str:
    """One machine's table: ours (Triton where it ran) against every other provider."""
    content = newest(kind, parts[0])
    if content is None:
        return f"On a {kind.upper()}: not measured."
    rows = [row for row in content["rows"] if row["part"] in parts]
    timed = [row for row in rows if row["part"] == "kernels" and "ms" in row]
    sizes = dict.fromkeys(f"{row['op']}: {row['dtype']}, d = {row['width']}, V = {row['vocab']}" for row in timed)
    about = [f"{where(content)} Medians of interleaved rounds ({'; '.join(sizes)})."]
    if missing := absent(rows):
        about.append(f"Not run: {'; '.join(missing)}.")
    return "\n".join([markdown_table(ratios(rows)), " ".join(about)])


# How a row's cells are made, by the table's columns.
CELLS: dict[str, Callable[[Row], str]] = {
    "case": lambda row: name_of(row),
    "provider": lambda row: who(row),
    "states per forward": lambda row: str(row["states_per_forward"]),
    "phase": lambda row: row["phase"],
    "ms (20 to 80 %)": lambda row: spread(row),
    "seconds (20 to 80 %)": lambda row: spread(row, 1000),
    "host ms": lambda row: f"{row['host_ms']:.3g}",
    "TFLOP/s": lambda row: f"{row['flops'] / row['ms'] / 1e9:.3g}",
    "of ceiling": lambda row: f"{100 * row['of_ceiling']:.0f} %",
    "memory": lambda row: mebibytes(row),
    "peak memory": lambda row: f"{row['total_bytes'] / 2**30:.1f} GiB",
    "error": lambda row: f"{row['error']:.0e}",
    "tokens": lambda row: str(row["tokens"]),
    "seed": lambda row: str(row["seed"]),
    "before": lambda row: percent(row["accuracy_before"], row["standard_error_before"]),
    "after": lambda row: percent(row["accuracy_after"], row["standard_error_after"]),
    "after, on CPUs": lambda row: percent(row["accuracy_recorded"], row["standard_error_recorded"]),
    "within two standard errors": lambda row: "yes" if row["agrees"] else "no",
    "seconds": lambda row: f"{row['seconds']:.0f}",
    "status": lambda row: row["status"],
}


def shown(rows: Sequence[Row], *columns: str) -> str:
    """Rows as a table of these columns; a cell of what a row does not have is empty."""

    def cell(row: Row, column: str) -> str:
        try:
            return CELLS[column](row)
        except (KeyError, TypeError):  # not measured, or null
            return ""

    return markdown_table([{column: cell(row, column) for column in columns} for row in rows])


def details() -> str:
    """Every timed row of the ops, by kind of machine: its spread, its share of the ceiling, its host time."""
    texts = []
    for kind in ("cpu", "gpu"):
        content = newest(kind, "kernels")
        if content is None:
            texts.append(f"On a {kind.upper()}: not measured.")
            continue
        rows = [row for part in ("kernels", "attention") for row in rows_of(content, part) if "ms" in row]
        columns = ("case", "provider", "ms (20 to 80 %)", "host ms", "TFLOP/s", "of ceiling", "memory", "error")
        texts.append("\n".join([shown(rows, *columns), f"{where(content)} {ceilings(rows)}"]))
    return "\n\n".join(texts)


def ceilings(rows: Sequence[Row]) -> str:
    """The least and the most that the machine did at most, over the cases."""
    rates = [row["ceiling"] for row in rows if "ceiling" in row]
    ends = [(min(found), max(found)) for need in ("flops", "bytes") if (found := [rate[need] / 1e9 for rate in rates])]
    if not ends:
        return ""
    (low, high), (slow, fast) = ends
    return f"Ceilings, over the cases: {low:.4g} to {high:.4g} GFLOP/s, {slow:.4g} to {fast:.4g} GB/s."


def who(row: Row) -> str:
    """A provider with its variant."""
    return f"{row['provider']} {row.get('variant', '')}".strip()


def mebibytes(row: Row) -> str:
    """A row's peak memory beyond its inputs."""
    return "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f} MiB"


def spread(row: Row, scale: float = 1) -> str:
    """A row's median time and its quantiles."""
    low, middle, high = (f"{row[name] / scale:.3g}" for name in ("ms_q20", "ms", "ms_q80"))
    return f"{middle} ({low} to {high})"


def where(content: Content) -> str:
    """The machine of a run, in a sentence."""
    machine = content["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    driver = f", driver {machine['driver']}" if machine["driver"] else f", {machine['threads']} CPU thread(s)"
    return f"{machine['device']}{driver}, {versions}, revision {machine['revision']}, {machine['date']}."


# ------------------------------------------------------------------------------------------------------------
# Steps, tests and training
# ------------------------------------------------------------------------------------------------------------


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


def step() -> str:
    """An update of a model of LLaDA-8B's shape and its rollout: seconds, utilisation and memory, and the targets."""
    content = newest("gpu", "step")
    if content is None:
        return "\n".join([NOT_MEASURED, "", targets([])])
    rows = rows_of(content, "step")
    columns = ("provider", "states per forward", "phase", "seconds (20 to 80 %)", "tokens", "of ceiling", "peak memory")
    sizes = dict.fromkeys(
        f"P = {row['prefix']}, L = {row['length']}, {row['states']} steps, {row['dtype']}" for row in rows
    )
    about = f"{'; '.join(sizes)}. {where(content)} {ceilings(rows)}"
    return "\n".join([shown(rows, *columns, "status"), about, "", targets(rows)])


def targets(rows: Sequence[Row]) -> str:
    """What is aimed at for the step, beside what its rows say, at the micro-batch that plain code has too."""
    size = min((row["states_per_forward"] for row in rows if row["phase"] == "update"), default=0)
    found = {(who(row), row["phase"]): row for row in rows if row["states_per_forward"] in (1, size)}

    def of(column: str, who: str, phase: str = "update") -> float:
        value = found.get((who, phase), {}).get(column)
        return math.nan if value is None else value

    def gibibytes(who: str) -> float:
        return of("total_bytes", who) / 2**30

    plain = of("ms", "plain", "rollout") + of("ms", "plain")
    ours = of("ms", "ours cache=block", "rollout") + of("ms", "ours reuse=block")
    saved = of("peak_bytes", "ours") / of("peak_bytes", "plain")
    lines = []
    for sense, limit, unit, what, value in (
        ("at least", 2, "", "seconds: plain's update / exact update", of("ms", "plain") / of("ms", "ours")),
        ("at most", 0.25, "", "extra memory: exact update / plain's", saved),
        ("at least", 8, "", "seconds of rollout and update: plain / `cache=block`, `reuse=block`", plain / ours),
        ("at most", 40, " GiB", "peak memory: exact update", gibibytes("ours")),
        ("at most", 24, " GiB", "peak memory: exact update, NF4", gibibytes("ours quantize=nf4")),
        ("at most", 16, " GiB", "peak memory: `reuse=block`, NF4", gibibytes("ours quantize=nf4, reuse=block")),
        ("at least", 45, " %", "FLOP utilisation: exact student", 100 * of("of_ceiling", "ours", "student")),
    ):
        met = value >= limit if sense == "at least" else value <= limit
        seen = ["not measured", ""] if math.isnan(value) else [f"{value:.3g}{unit}", "yes" if met else "no"]
        lines.append({"what": what, "target": f"{sense} {limit:g}{unit}", "measured": seen[0], "met": seen[1]})
    return markdown_table(lines)


def train() -> str:
    """The tiny recipe on a GPU against CPUs."""
    content = newest("gpu", "train")
    if content is None:
        return NOT_MEASURED
    columns = ("seed", "before", "after", "after, on CPUs", "within two standard errors", "seconds", "status")
    return "\n".join([shown(rows_of(content, "train"), *columns), where(content)])


def tiny_recipe() -> str:
    """Gain of the tiny recipe by seed."""
    rows = [row for row in json.loads((FOLDER / RECIPE).read_text()) if row["name"] == "tiny"]
    lines = [
        {
            "seed": str(row["seed"]),
            "tokens per step": rate,
            "before": percent(at_rate["accuracy_before"], at_rate["standard_error_before"]),
            "after": percent(at_rate["accuracy_after"], at_rate["standard_error_after"]),
            "gain": f"{100 * at_rate['accuracy_gain']:+.1f} ± {100 * at_rate['standard_error_gain']:.1f}",
            "seconds": f"{row['seconds']:.0f}",
        }
        for row in rows
        for rate, at_rate in row["tokens_per_step"].items()
    ]
    gains, first = [100 * row["accuracy_gain"] for row in rows], rows[0]
    about = (
        f"{first['eval_problems']} held-out problems, {first['threads']} CPU threads, torch "
        f"{first['versions']['torch']}, transformers {first['versions']['transformers']}. Mean gain over {len(gains)} "
        f"seeds: {statistics.mean(gains):+.1f} points, between {min(gains):+.1f} and {max(gains):+.1f}."
    )
    return "\n".join([markdown_table(lines), about])


def reuse() -> str:
    """What the tiny recipe reaches with each kind of reuse, and what it computes for it."""
    rows = [row for row in json.loads((FOLDER / REUSE).read_text()) if "reuse" in row]
    exact = [row for row in rows if row["reuse"] == "none"]
    paired = {row["seed"]: 100 * row["accuracy_after"] for row in exact}
    lines = []
    for kind in dict.fromkeys(row["reuse"] for row in rows):
        of_kind = [row for row in rows if row["reuse"] == kind]
        after = [100 * row["accuracy_after"] for row in of_kind]
        differences = [value - paired[row["seed"]] for value, row in zip(after, of_kind, strict=True)]
        updates = [row["update_means"] for row in of_kind]
        means = {name: statistics.mean(update[name] for update in updates) for name in updates[0]}
        # What else a machine does makes runs slower, never faster.
        distil, roll_out = (
            statistics.median(update[f"{phase}_seconds"] for update in updates) for phase in ("distill", "rollout")
        )
        lines.append(
            {
                "reuse": kind,
                "accuracy after, by seed": ", ".join(f"{value:.1f}" for value in after),
                "mean": f"{statistics.mean(after):.1f} ± {deviation(after):.1f}",
                "against none": ""
                if kind == "none"
                else f"{statistics.mean(differences):+.1f} ± {deviation(differences):.1f}",
                "tokens": f"{means['tokens'] / 1000:.1f}k",
                "distil (s)": f"{distil:.1f}",
                "roll out (s)": f"{roll_out:.1f}",
                "run (s)": f"{statistics.median(row['seconds'] for row in of_kind):.0f}",
                "KL taught": f"{means['kl']:.3f}",
                "drift": f"{means['drift']:.3f}" if "drift" in means else "",
            }
        )
    first = rows[0]
    about = (
        f"{first['eval_problems']} held-out problems, {100 * first['accuracy_before']:.1f} before; seeds "
        f"{', '.join(str(row['seed']) for row in exact)}; ± is the standard error over seeds. Tokens that the student "
        f"computes, and median seconds, are per update of 32 prompts, at {first['threads']} CPU thread(s), torch "
        f"{first['versions']['torch']}."
    )
    return "\n".join([markdown_table(lines), about])


def deviation(values: list[float]) -> float:
    """Standard error of a mean over seeds; 0 for one."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def caches() -> str:
    """What the model as shipped reaches with each cache."""
    rows = [row for row in json.loads((FOLDER / REUSE).read_text()) if "cache" in row]
    lines = [
        {
            "cache": todays(row["cache"]),
            "tokens per step": str(row["tokens_per_step"]),
            "accuracy": percent(row["accuracy"], row["standard_error"]),
            "seconds": f"{row['seconds']:.0f}",
        }
        for row in sorted(rows, key=lambda row: -row["tokens_per_step"])
    ]
    return "\n".join([markdown_table(lines), f"{rows[0]['problems']} held-out problems, greedy."])


def schema() -> str:
    """The columns of a run's rows."""
    lines = [{"column": f"`{name}`", "meaning": meaning} for name, meaning in COLUMNS.items()]
    about = [f"- {part}: {', '.join(f'`{name}`' for name in columns)}" for part, columns in ABOUT.items()]
    return "\n".join([markdown_table(lines), "What names a row:", "", *about])


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------


def runs(kind: str) -> list[tuple[Path, Content]]:
    """The files of a kind of machine, "cpu" or "gpu", oldest first; ValueError if one is no run, or a rehearsal."""
    files = [(path, results.load(path)) for path in sorted(FOLDER.glob("*.json")) if path.name not in (RECIPE, REUSE)]
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


SECTIONS = {f.__name__: f for f in (tiny_recipe, reuse, caches, kernels, details, tests, step, train, schema)}


def render(text: str) -> str:
    """``text`` with every section between ``<!-- NAME -->`` and ``<!-- end -->`` made anew."""

    def section(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{SECTIONS[match[1]]().rstrip()}\n<!-- end -->"

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
    rows = []
    for row in content["rows"]:
        nested = {name: value for name, value in row.items() if isinstance(value, dict)}
        flat = {f"{name} {key}": x for name, value in nested.items() for key, x in value.items()}
        rows.append({**{name: value for name, value in row.items() if name not in nested}, **flat, **about})
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
    wanted = {path: render(path.read_text()) for path in DOCUMENTS}
    wanted |= {path.with_suffix(".csv"): sheet(content) for kind in ("cpu", "gpu") for path, content in runs(kind)}
    stale = [path for path, made in wanted.items() if not path.is_file() or path.read_text() != made]
    if args.check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what its files say: python -m benchmarks.report", file=sys.stderr)
        return int(bool(stale))
    for path in stale:
        path.write_text(wanted[path])

    measured = {kind: content for kind in ("cpu", "gpu") if (content := newest(kind, "kernels"))}
    plots.draw_ops(measured, ROOT / "docs")
    plots.draw_reuse(json.loads((FOLDER / REUSE).read_text()), ROOT / "docs")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
