"""Renders the tables of README.md, docs/performance.md and docs/reproduction.md, and the plots, from the files under
``benchmarks/results``, and what was timed as comma-separated values too.

    python -m benchmarks.report                          # rewrites them
    python -m benchmarks.report --check                  # changes nothing; exit status 1 if a table and its file differ
    python -m benchmarks.report --against OLD.json [NEW.json]    # what became slower (NEW: the newest of its kind)

Of every part, the newest file of a kind of machine is shown. A rehearsal is refused.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks import plots, reproduction, results
from benchmarks.results import ABOUT, COLUMNS, FOLDER, ROOT, Content, Row, cases, name_of
from dopsd.evaluation.results import percent
from dopsd.tables import markdown_table

DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "reproduction.md")
KINDS = ("cpu", "gpu")
NOT_MEASURED = "Not measured."

# How a row's cells are made, by the table's columns.
CELLS: dict[str, Callable[[Row], str]] = {
    "case": lambda row: name_of(row),
    "provider": lambda row: _who(row),
    "states per forward": lambda row: str(row["states_per_forward"]),
    "ms (20 to 80 %)": lambda row: _spread(row),
    "seconds (20 to 80 %)": lambda row: _spread(row, 1000),
    "host ms": lambda row: f"{row['host_ms']:.3g}",
    "TFLOP/s": lambda row: f"{row['flops'] / row['ms'] / 1e9:.3g}",
    "of ceiling": lambda row: f"{100 * row['of_ceiling']:.0f} %",
    "memory": lambda row: f"{row['peak_bytes'] / 2**20:.0f} MiB",
    "kept per token": lambda row: f"{row['kept_bytes'] / row['sequences'] / row['length'] / 1024:.1f} KiB",
    "peak memory": lambda row: f"{row['total_bytes'] / 2**30:.1f} GiB",
    "error": lambda row: f"{row['error']:.0e}",
    "tokens per step": lambda row: str(row["tokens_per_step"]),
    "before": lambda row: percent(row["accuracy_before"], row["standard_error_before"]),
    "after": lambda row: percent(row["accuracy_after"], row["standard_error_after"]),
    "after, on CPUs": lambda row: (
        percent(row["accuracy_recorded"], row["standard_error_recorded"]) if "accuracy_recorded" in row else ""
    ),
    "within two standard errors": lambda row: {True: "yes", False: "no", None: ""}[row["agrees"]],
    "accuracy": lambda row: percent(row["accuracy"], row["standard_error"]),
    "gain": lambda row: f"{100 * row['accuracy_gain']:+.1f} ± {100 * row['standard_error_gain']:.1f}",
    "seconds": lambda row: f"{row['seconds']:.0f}",
}


def _cell(row: Row, column: str) -> str:
    """Empty for what a row does not have; a column that `CELLS` lacks is the row's own."""
    try:
        return CELLS[column](row) if column in CELLS else str(row[column])
    except (KeyError, TypeError):  # not measured, or null
        return ""


def _shown(rows: Iterable[Row], *columns: str) -> str:
    return markdown_table([{column: _cell(row, column) for column in columns} for row in rows])


def _who(row: Row) -> str:
    return f"{row.get('provider', 'ours')} {row.get('variant', '')}".strip()


def _spread(row: Row, scale: float = 1) -> str:
    """A row's median time and its quantiles."""
    low, middle, high = (f"{row[name] / scale:.3g}" for name in ("ms_q20", "ms", "ms_q80"))
    return f"{middle} ({low} to {high})"


def _where(content: Content) -> str:
    """The machine of a run, in a sentence."""
    machine = content["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    driver = f", driver {machine['driver']}" if machine["driver"] else f", {machine['threads']} CPU thread(s)"
    return f"{machine['device']}{driver}, {versions}, revision {machine['revision']}, {machine['date']}."


def _ceilings(rows: Sequence[Row]) -> str:
    """The least and the most that the machine did at most, over the cases."""
    rates = [row["ceiling"] for row in rows if "ceiling" in row]
    ends = [(min(found), max(found)) for need in ("flops", "bytes") if (found := [rate[need] / 1e9 for rate in rates])]
    if not ends:
        return ""
    (low, high), (slow, fast) = ends
    return f"Ceilings, over the cases: {low:.4g} to {high:.4g} GFLOP/s, {slow:.4g} to {fast:.4g} GB/s."


# ------------------------------------------------------------------------------------------------------------
# Ops
# ------------------------------------------------------------------------------------------------------------


def ratios(rows: Sequence[Row]) -> list[dict[str, str]]:
    """A line for every case: our time, and the times of the others that it is a multiple of; memory and error.

    Ours is the Triton backend's row where it ran, else the PyTorch backend's.
    """
    ran = [{row["provider"]: row for row in case if "ms" in row} for case in cases(rows)]
    compared = [(case, ours) for case in ran if (ours := case.get("ours triton", case.get("ours torch")))]
    others = dict.fromkeys(name for _, ours in compared for name in ours.get("over", ()) if not name.startswith("ours"))
    lines = []
    for case, ours in compared:
        plain = case.get("eager", case.get("concatenated", {})).get("peak_bytes")
        line = {"op": name_of(ours), "ms": f"{ours['ms']:.3g}"}
        line |= {f"/ {name}": f"{ours['over'][name]:.2f}" if name in ours["over"] else "" for name in others}
        measured = plain and ours["peak_bytes"] is not None
        line |= {"memory": _cell(ours, "memory"), "/ plain": f"{ours['peak_bytes'] / plain:.2f}" if measured else ""}
        lines.append({**line, "error": _cell(ours, "error")})
    return lines


def absent(rows: Iterable[Row]) -> list[str]:
    """Who did not run and why, once each."""
    reasons: dict[str, None] = {}
    for row in rows:
        kind, _, reason = row["status"].partition(": ")
        if row["status"] != "ok":
            who = _who(row) if kind == "skipped" else f"{_who(row)}, {name_of(row)}"
            reasons[f"{who}: {reason or kind}"] = None
    return list(reasons)


def kernels() -> str:
    """Time and memory of the ops, on every kind of machine: ours (Triton where it ran) against all others."""

    def table(content: Content) -> str:
        rows = [row for row in content["rows"] if row["part"] in ("kernels", "attention")]
        timed = [row for row in rows if row["part"] == "kernels" and "ms" in row]
        sizes = dict.fromkeys(f"{row['op']}: {row['dtype']}, d = {row['width']}, V = {row['vocab']}" for row in timed)
        missing = f" Not run: {'; '.join(absent(rows))}." if absent(rows) else ""
        about = f"{_where(content)} Medians of interleaved rounds ({'; '.join(sizes)}).{missing}"
        return f"{markdown_table(ratios(rows))}\n{about}"

    return _by_machine(table)


def details() -> str:
    """Every timed row of the ops, by kind of machine: its spread, its share of the ceiling, its host time."""

    def table(content: Content) -> str:
        rows = [row for part in ("kernels", "attention") for row in rows_of(content, part) if "ms" in row]
        columns = ("case", "provider", "ms (20 to 80 %)", "host ms", "TFLOP/s", "of ceiling", "memory", "error")
        return f"{_shown(rows, *columns)}\n{_where(content)} {_ceilings(rows)}"

    return _by_machine(table)


def layer() -> str:
    """A layer with adapters, by kind of machine: every row, with what it keeps for the backward pass."""

    def table(content: Content) -> str:
        rows = rows_of(content, "layer")
        columns = ("case", "provider", "ms (20 to 80 %)", "TFLOP/s", "of ceiling", "memory", "kept per token", "error")
        names = ("sequences", "length", "width", "heads", "hidden", "rank")
        sizes = dict.fromkeys(", ".join(f"{name} {row[name]}" for name in names) for row in rows)
        missing = f" Not run: {'; '.join(absent(rows))}." if absent(rows) else ""
        timed = _shown((row for row in rows if "ms" in row), *columns)
        return f"{timed}\n{_where(content)} {'; '.join(sizes)}.{missing}"

    return _by_machine(table, "layer")


def _by_machine(table: Callable[[Content], str], part: str = "kernels") -> str:
    found = [(kind, newest(kind, part)) for kind in KINDS]
    return "\n\n".join(table(run) if run else f"On a {kind.upper()}: not measured." for kind, run in found)


# ------------------------------------------------------------------------------------------------------------
# Steps, tests and training
# ------------------------------------------------------------------------------------------------------------


def tests() -> str:
    """How many GPU tests passed, and the names of those that failed."""
    content = newest("gpu", "tests")
    if content is None:
        return NOT_MEASURED
    rows = rows_of(content, "tests")
    failed = [f"- `{row['name']}`: {row['status']}" for row in rows if row["status"].startswith("failed")]
    return "\n".join([f"{count(rows)}. {_where(content)}", *failed])


def count(rows: Iterable[Row]) -> str:
    """How many rows there are of each status."""
    found = Counter(row["status"].partition(":")[0] for row in rows)
    return ", ".join(f"{number} {kind}" for kind, number in sorted(found.items()))


def step() -> str:
    """An update of a model of LLaDA-8B's shape and its rollout: seconds, utilisation and memory, and the targets."""
    content = newest("gpu", "step")
    if content is None:
        return f"{NOT_MEASURED}\n\n{targets([])}"
    rows = rows_of(content, "step")
    columns = ("provider", "states per forward", "phase", "seconds (20 to 80 %)", "tokens", "of ceiling", "peak memory")
    sizes = (f"P = {row['prefix']}, L = {row['length']}, {row['states']} steps, {row['dtype']}" for row in rows)
    about = f"{'; '.join(dict.fromkeys(sizes))}. {_where(content)} {_ceilings(rows)}"
    return "\n".join([_shown(rows, *columns, "status"), about, "", targets(rows)])


def targets(rows: Sequence[Row]) -> str:
    """What is aimed at for the step, beside what its rows say, at the micro-batch that plain code has too."""
    size = min((row["states_per_forward"] for row in rows if row["phase"] == "update"), default=0)
    found = {(_who(row), row["phase"]): row for row in rows if row["states_per_forward"] in (1, size)}

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
        seen = ("not measured", "") if math.isnan(value) else (f"{value:.3g}{unit}", "yes" if met else "no")
        lines.append({"what": what, "target": f"{sense} {limit:g}{unit}", "measured": seen[0], "met": seen[1]})
    return markdown_table(lines)


def train() -> str:
    """The tiny recipe on a GPU against CPUs."""
    content = newest("gpu", "train")
    if content is None:
        return NOT_MEASURED
    columns = ("seed", "before", "after", "after, on CPUs", "within two standard errors", "seconds", "status")
    return "\n".join([_shown(rows_of(content, "train"), *columns), _where(content)])


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
    files = [(path, results.load(path)) for path in sorted(FOLDER.glob("*.json"))]
    of_kind = [(path, content) for path, content in files if content["machine"]["kind"] == kind]
    # On one day, the second file's name ends in _2.
    return sorted(of_kind, key=lambda file: (file[1]["machine"]["date"], len(file[0].stem), file[0].stem))


def newest(kind: str, part: str) -> Content | None:
    """The newest file of a kind of machine in which anything of a part was run; None before there is one."""
    idle = ("out of time", "skipped")
    found = [run for _, run in runs(kind) if not all(row["status"].startswith(idle) for row in rows_of(run, part))]
    return found[-1] if found else None


def rows_of(content: Content, part: str) -> list[Row]:
    """A part's rows."""
    return [row for row in content["rows"] if row["part"] == part]


SECTIONS = {f.__name__: f for f in (kernels, details, layer, tests, step, train, schema)}
SECTIONS |= reproduction.SECTIONS


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
    before, after = ({results.identity(row): row for row in run["rows"] if "ms" in row} for run in (old, new))
    groups: dict[str, list[tuple[float, str]]] = {"Slower": [], "Faster": [], "Within the spread": []}
    for about in before.keys() & after.keys():
        a, b = before[about], after[about]
        group = (
            "Slower" if b["ms_q20"] > a["ms_q80"] else "Faster" if b["ms_q80"] < a["ms_q20"] else "Within the spread"
        )
        name, ratio = " ".join(str(value) for value in about if value != ""), b["ms"] / a["ms"]
        groups[group].append((ratio, f"{ratio:8.3f}  {_spread(a)} -> {_spread(b)} ms  {name}"))
    lines = [
        f"{run['machine']['device']}, {run['machine']['date']}, {run['machine']['revision']}" for run in (old, new)
    ]
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
    wanted |= {path.with_suffix(".csv"): sheet(content) for kind in KINDS for path, content in runs(kind)}
    stale = [path for path, made in wanted.items() if not path.is_file() or path.read_text() != made]
    if args.check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what its files say: python -m benchmarks.report", file=sys.stderr)
        return int(bool(stale))
    for path in stale:
        path.write_text(wanted[path])
    plots.draw_ops([content for kind in KINDS if (content := newest(kind, "kernels"))], ROOT / "docs")
    if curves := reproduction.curves():
        plots.draw_reproduction(curves, reproduction.UNITS, ROOT / "docs")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
