"""The tables of docs/reproduction.md, from what `benchmarks.reproduce` has left: means, intervals, and what holds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, median
from typing import NamedTuple

import torch
import yaml
from torch import Tensor

from benchmarks import reproduce
from benchmarks.reproduce import (
    ABLATIONS,
    ANNEALED,
    AR_STYLE,
    CAUSAL,
    CAUSAL_BASE,
    CAUSAL_EXACT,
    CAUSALS,
    FIXED,
    METHODS,
    OURS,
    REUSES,
    STABILITY,
    TABLES,
    TOY,
    VARIANTS,
    Cell,
    cells,
    chosen,
    record,
    search,
)
from benchmarks.results import Row
from benchmarks.states import FILE
from dopsd.evaluation.published import PUBLISHED
from dopsd.evaluation.settings import revealed
from dopsd.parser import RECIPES
from dopsd.tables import markdown_table

TWO, ONE = "greedy, 2", "greedy, 1"
SEEDS = max(seeds for _, seeds in TABLES.values())
# LLaDA-8B-Instruct: percent on GSM8K with 256 tokens, and updates to the best on Sudoku with 256; from the same
# secondary summaries as `PUBLISHED`.
PAPER = {"rho 0.1": 80.5, FIXED: 81.0, "rho 0.5": 79.8, "K by student": 78.6, "1 try": 80.4, "live teacher": 79.7}
PAPERS_UPDATES = {"diffu-GRPO": "3800", FIXED: "425"}
UNITS = ("updates", "prompts", "responses", "computed tokens", "seconds")


class Estimate(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def signed(self) -> str:
        """Of a difference."""
        bounds = f"({self.low:+.1f} to {self.high:+.1f})" if math.isfinite(self.low) else "(one run)"
        return f"{self.mean:+.1f} {bounds}"

    def percent(self) -> str:
        """Of a share, which lies between 0 and 100."""
        return f"{self.mean:.1f} ({max(self.low, 0):.1f} to {min(self.high, 100):.1f})"


Claim = tuple[str, Estimate | None]


def student(freedom: float) -> float:
    """The 97.5 % quantile of Student's t: tan(a) sqrt(freedom), where a has a density like cos(a) ** (freedom - 1)."""
    cells = 50_000
    angles = (torch.arange(cells).double() + 0.5) * min(math.pi / 2, 10 / math.sqrt(freedom)) / cells
    mass = (angles.cos().log() * (freedom - 1)).exp().cumsum(0)
    return float(angles[torch.searchsorted(mass, 0.95 * mass[-1])].tan()) * math.sqrt(freedom)


def variance_of_mean(
    scores: Tensor,  # (S, P) fp64: a row for each seed, a column for each problem
) -> tuple[float, float]:
    """The variance of the mean over seeds and problems, and its degrees of freedom (Satterthwaite's).

    A score is taken as a mean, an effect of its seed, one of its problem and a residual, all independent. With the
    variances v_s of the seeds' means, v_p of the problems' means and r of the residuals, the variance of the mean is
    v_s / S + v_p / P - r / (S P), without bias: each of the first two has the residual's share. It is taken as no less
    than either of them. Of a single number it is infinite.
    """
    seeds, problems = scores.shape
    center = scores.mean()
    of_seeds, of_problems = scores.mean(1) - center, scores.mean(0) - center
    effects = (
        (of_seeds, seeds - 1, seeds),
        (of_problems, problems - 1, problems),
        (scores - center - of_seeds[:, None] - of_problems, (seeds - 1) * (problems - 1), seeds * problems),
    )
    parts = [(float(x.square().sum()) / freedom / count, freedom) for x, freedom, count in effects if freedom]
    values = [value for value, _ in parts]
    if not any(values):
        return 0.0 if values else math.inf, 1.0
    variance = max(*values[:2], values[0] + values[1] - values[2]) if len(values) == 3 else values[0]
    return variance, variance**2 / sum(value**2 / freedom for value, freedom in parts)


def estimate(
    scores: Tensor,  # (S, P) fp64
) -> Estimate:
    """The mean over seeds and problems and its interval, Student's t."""
    variance, freedom = variance_of_mean(scores)
    center, half = float(scores.mean()), student(min(max(freedom, 1), 1e4)) * math.sqrt(variance)
    return Estimate(center, center - half, center + half)


def verdict(difference: Estimate | None) -> str:
    """Whether a difference is positive: by its whole interval, not at all, or it can't be told."""
    if difference is None:
        return "not run"
    return "holds" if difference.low > 0 else "does not hold" if difference.high < 0 else "undecided"


# ---- what was measured ----


def runs(variant: str) -> dict[int, Row]:
    """A variant's runs at its learning rate, by seed."""
    found = {seed: record(Cell(variant, chosen(variant), seed)) for seed in range(SEEDS)}
    return {seed: row for seed, row in found.items() if row is not None}


def scores(variant: str, measure: str = TWO) -> dict[int, Tensor]:
    """(P,) grades in percent by seed."""
    return {seed: grades(row, measure) for seed, row in runs(variant).items() if measure in row["scores"]}


def grades(row: Row, measure: str) -> Tensor:
    """(P,) a run's grades in percent."""
    return torch.tensor([100.0 * int(bit) for bit in row["scores"][measure]]).double()


def accuracy(variant: str, measure: str = TWO) -> str:
    found = list(scores(variant, measure).values())
    return estimate(torch.stack(found)).percent() if found else ""


def difference(first: Mapping[int, Tensor], second: Mapping[int, Tensor]) -> Estimate | None:
    """First less second, paired by problem and by seed, over the seeds that both have."""
    pairs = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    return estimate(torch.stack(pairs)) if pairs else None


def against(first: str, second: str) -> Estimate | None:
    """By how many points one variant is more accurate than another."""
    ours, theirs = scores(first), scores(second)
    if theirs and not VARIANTS[second].rates:
        theirs = dict.fromkeys(ours, theirs[0])  # the model as it ships, for which nothing is drawn
    return difference(ours, theirs)


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown, without the columns in which nothing stands."""
    columns = [name for name in (rows[0] if rows else ()) if any(row[name] for row in rows)]
    return markdown_table([{name: row[name] for name in columns} for row in rows]) if rows else "Not run.\n"


def claims(said: Sequence[Claim], unit: str = "points") -> str:
    """What is said, by how much it is so here, and whether it holds."""
    lines = [
        {"claim": text, f"difference ({unit})": found.signed() if found else "", "here": verdict(found)}
        for text, found in said
    ]
    return f"\n{markdown_table(lines)}"


def recipe_runs() -> list[Row]:
    """The runs of the tiny recipe as it ships, by seed."""
    rate = yaml.safe_load((RECIPES / "tiny.yaml").read_text())["learning_rate"]
    return [row for seed in range(SEEDS) if (row := record(Cell(OURS, rate, seed))) is not None]


def gain() -> str:
    """What the tiny recipe reaches at its own rate."""
    trained, base = recipe_runs(), record(Cell("base", None, 0))
    if not trained or base is None:
        return "Not run.\n"
    before, *after = (grades(row, TWO) for row in (base, *trained))
    gained = estimate(torch.stack(after) - before)
    return (
        f"Accuracy on {len(before)} test problems goes from {float(before.mean()):.1f} % to "
        f"{float(torch.stack(after).mean()):.1f} %: {gained.signed()} points (95 % interval, {len(after)} "
        f"seed{'s' * (len(after) > 1)}), after {median(row['seconds']['train'] for row in trained):.0f} seconds of "
        "training on one CPU thread.\n"
    )


# ---- the tables ----


def methods() -> str:
    published = [PUBLISHED["sudoku4x4", 256], PUBLISHED["gsm8k", 512]]
    rows = [
        {
            "": name,
            "seeds": str(len(runs(name))),
            "two tokens a step (%)": accuracy(name),
            "one token a step (%)": accuracy(name, ONE),
            **{
                f"paper: LLaDA-8B, {task} (%)": str(figures.get("d-OPSD" if name == FIXED else name, ""))
                for task, figures in zip(("Sudoku@256", "GSM8K@512"), published, strict=True)
            },
        }
        for name in METHODS
        if runs(name)
    ]
    others = [name for name in METHODS if name not in (FIXED, OURS)]
    pairs = [(ours, other) for ours in (FIXED, OURS) for other in others]
    return table(rows) + claims([(f"{ours} is above {other}", against(ours, other)) for ours, other in pairs])


def annealed() -> str:
    return trained_from(*ANNEALED)


def causal() -> str:
    return trained_from(*CAUSALS) + claims([(f"{CAUSAL} is above {CAUSAL_BASE}", against(CAUSAL, CAUSAL_BASE))])


def trained_from(before: str, *others: str) -> str:
    """What methods make of a model, which is the first of these variants."""
    rows = [
        {
            "": name,
            "seeds": str(len(runs(name))),
            "two tokens a step (%)": accuracy(name),
            "one token a step (%)": accuracy(name, ONE),
            "against the first": found.signed() if name != before and (found := against(name, before)) else "",
        }
        for name in (before, *others)
        if runs(name)
    ]
    return table(rows)


def rates() -> str:
    rows = []
    for name in (*METHODS, *ANNEALED, *CAUSALS):
        tried = {rate: found for rate, found in search(name).items() if found is not None}
        if tried:
            best = chosen(name)
            edge = " (an end of what was tried)" if best in (min(tried), max(tried)) else ""
            shown = ", ".join(f"{rate:g}: {100 * found:.1f}" for rate, found in tried.items())
            rows.append({"": name, "best validation (%) by learning rate": shown, "chosen": f"{best or ''}{edge}"})
    return table(rows)


def spent(point: Row) -> dict[str, float]:
    """What a run had spent at a point; to compute forward and backward is three times a forward."""
    computed = point["decode_tokens"] + point["forward_tokens"] + 3 * point["tokens"]
    values = (point["update"], point["prompts"], point["rollouts"], computed, point["seconds"])
    return dict(zip(UNITS, values, strict=True))


def reached(curve: Sequence[Row]) -> dict[str, float]:
    """What a run had spent 95 % of the way from its first accuracy to its best; nothing if it gained nothing."""
    first, best = curve[0]["accuracy"], max(point["accuracy"] for point in curve)
    there = next(point for point in curve if point["accuracy"] >= first + 0.95 * (best - first))
    return spent(there) if best > first else {}


def curves() -> dict[str, list[list[Row]]]:
    """Every run of the methods, for a picture: what it had spent at its points, its accuracy and its overlap there."""
    shown = {"accuracy": "validation accuracy (%)", "overlap_top20": "overlap (%)"}
    return {
        name: [
            [{**spent(p), **{title: 100 * p[key] for key, title in shown.items() if key in p}} for p in row["curve"]]
            for row in runs(name).values()
        ]
        for name in METHODS
        if search(name) and runs(name)
    }


def costs() -> str:
    found = {
        name: {seed: reached(row["curve"]) for seed, row in runs(name).items()} for name in METHODS if search(name)
    }
    rows = []
    for name, by_seed in found.items():
        known = {unit: [costs[unit] for costs in by_seed.values() if unit in costs] for unit in UNITS}
        if by_seed:
            means = {unit: f"{mean(values):,.0f}" if any(values) else "" for unit, values in known.items()}
            gained = f"{len(known['updates'])} of {len(by_seed)}"
            rows.append({"": name, "seeds that gain": gained, **means, "paper: updates": PAPERS_UPDATES.get(name, "")})

    def saved(ours: str, unit: str) -> Estimate | None:
        """Over the seeds, the logarithm of what diffu-GRPO spends for each that ours does."""
        both = {seed: (theirs, found[ours].get(seed, {})) for seed, theirs in found["diffu-GRPO"].items()}
        ratios = [
            math.log10(theirs[unit] / own[unit]) for theirs, own in both.values() if theirs.get(unit) and own.get(unit)
        ]
        return estimate(torch.tensor(ratios).double()[:, None]) if ratios else None

    said = [
        (f"{ours} takes fewer {unit} than diffu-GRPO", saved(ours, unit)) for ours in (FIXED, OURS) for unit in UNITS
    ]
    picture = "\n![Validation accuracy against what was spent, and overlap](reproduction.png)\n" if rows else ""
    return table(rows) + picture + claims(said, "powers of ten")


def toy() -> str:
    names = {"greedy": TWO, "best of 8 tries": "pass@8, 2"}
    names |= {f"{100 * share:g} % revealed": f"{revealed(share)}, 2" for share in VARIANTS[TOY].options["reveal"]}
    measured = {name: scores(TOY, measure) for name, measure in names.items()}
    rows = []
    for name, by_seed in measured.items() if runs(TOY) else ():
        right, solved = (torch.stack(list(part.values())) for part in (by_seed, measured["best of 8 tries"]))
        # A ratio of two means varies as its linear part does.
        ratio = float((right * solved).sum() / solved.sum())
        part = estimate(solved * (right - ratio) / solved.mean())
        of_solved = Estimate(ratio, ratio + part.low, ratio + part.high)
        rows.append({"": name, "of all (%)": estimate(right).percent(), "of the solved (%)": of_solved.percent()})
    said = [(f"{name} is above greedy", difference(measured[name], measured["greedy"])) for name in list(names)[2:]]
    near = {seed: grades - 5 for seed, grades in measured["best of 8 tries"].items()}
    told = ("50 % revealed is less than 5 points below the best of 8", difference(measured["50 % revealed"], near))
    return table(rows) + claims([*said, told])


def overlaps(name: str) -> dict[int, Tensor]:
    """(1,) mean overlap of student and teacher over a run, in percent, by seed."""
    by_seed = {
        seed: [p["overlap_top20"] for p in row["curve"] if "overlap_top20" in p] for seed, row in runs(name).items()
    }
    return {seed: torch.tensor([100 * mean(values)]).double() for seed, values in by_seed.items() if values}


def ablations() -> str:
    rows = [
        {
            "": name,
            "seeds": str(len(runs(name))),
            "accuracy (%)": accuracy(name),
            "against the first": found.signed() if name != OURS and (found := against(name, OURS)) else "",
            "overlap (%)": f"{mean(map(float, overlaps(name).values())):.1f}" if overlaps(name) else "",
            "paper: LLaDA-8B, GSM8K@256 (%)": str(PAPER.get(name, "")),
        }
        for name in (OURS, FIXED, AR_STYLE, *ABLATIONS)
        if runs(name)
    ]
    said = {
        "The self-future teaches more than a reference in the prompt": (OURS, AR_STYLE),
        "Reverse KL is above forward KL": (OURS, "forward KL"),
        "rho 0.25 is above rho 0.1": (OURS, "rho 0.1"),
        "rho 0.1 is above rho 0.5": ("rho 0.1", "rho 0.5"),
        "K by teacher is above K by student": (OURS, "K by student"),
        "8 tries are above 1 try": (OURS, "1 try"),
        "Correct responses only are above all responses": (OURS, "all responses"),
        "A fixed teacher is above a live one": (FIXED, "live teacher"),
    }
    overlap = difference(overlaps(AR_STYLE), overlaps(OURS))
    told = ("Student and teacher overlap more with a reference than with the self-future", overlap)
    return table(rows) + claims([*((text, against(*pair)) for text, pair in said.items()), told])


def stability() -> str:
    rows = []
    for name in STABILITY:
        if found := list(runs(name).values()):
            ends = [str(row["updates"]) if row["collapse"] or row["ended"] else "none" for row in found]
            curves = [[point["accuracy"] for point in row["curve"]] for row in found]
            rows.append(
                {
                    "clip, learning rate": name,
                    "collapse at update, by seed": ", ".join(ends),
                    "best validation (%)": f"{100 * mean(map(max, curves)):.1f}",
                    "last validation (%)": f"{100 * mean(curve[-1] for curve in curves):.1f}",
                    "test, best adapter (%)": accuracy(name),
                }
            )

    def lasted(form: str) -> dict[int, Tensor]:
        """(1,) mean updates of a seed's runs at all learning rates."""
        by_rate = [runs(name) for name in STABILITY if name.startswith(form)]
        seeds = set.intersection(*map(set, by_rate))
        return {seed: torch.tensor([mean(found[seed]["updates"] for found in by_rate)]).double() for seed in seeds}

    pairs = (("plain", "no clip"), ("nonnegative", "no clip"), ("nonnegative", "plain"))
    said = [(f"Runs last longer: {a} rather than {b}", difference(lasted(a), lasted(b))) for a, b in pairs]
    return table(rows) + claims(said, "updates")


def over_curves(found: Sequence[Row], name: str) -> str:
    """The mean of a metric over the points of runs' curves; empty where it is not logged."""
    values = [point[name] for row in found for point in row.get("curve", ()) if name in point]
    if not values:
        return ""
    return "below 0.001" if abs(mean(values)) < 0.001 else f"{mean(values):.3f}"


def savings() -> str:
    rows = []
    for name in (OURS, CAUSAL, "base", *REUSES):
        trained = bool(VARIANTS[name].rates)
        exact = CAUSAL_EXACT if name in (CAUSAL, CAUSAL_EXACT) else OURS if trained else "base"
        if found := list(runs(name).values()):
            part = "train" if trained else TWO
            states = [row["curve"][-1]["states"] / row["curve"][-1]["prompts"] for row in found if "curve" in row]
            rows.append(
                {
                    "": name,
                    "accuracy (%)": accuracy(name),
                    "against none": gap.signed() if name != exact and (gap := against(name, exact)) else "",
                    "seconds to train, or to decode": f"{mean(row['seconds'][part] for row in found):.0f}",
                    "states a prompt": f"{mean(states):.1f}" if states else "",
                    **{what: over_curves(found, key) for what, key in (("KL taught", "kl"), ("drift", "drift"))},
                }
            )
    rows.sort(key=lambda row: not VARIANTS[row[""]].rates)
    return table(rows)


def fewer_states() -> str:
    """What `benchmarks.states` found."""
    path = reproduce.FOLDER / FILE
    if not path.is_file():
        return "Not run."
    found: Row = json.loads(path.read_text())
    rows = [
        {
            "states drawn": count,
            "uniformly": f"{100 * error['uniform']:.0f} %",
            "by doubt, with importance weights": f"{100 * error['by doubt']:.0f} %",
        }
        for count, error in found["errors"].items()
    ]
    said = (
        f"{found['trajectories']} trajectories of {found['states']} states. Divergence and doubt (1 - confidence): "
        f"rank correlation {found['rank_correlation']:.2f}, linear {found['correlation']:.2f}. The standard error of a "
        "trajectory's mean divergence, over the mean of all:"
    )
    of_step = [
        {"step": str(step), "mean divergence": f"{divergence:.4f}", "mean confidence": f"{confidence:.2f}"}
        for step, (divergence, confidence) in enumerate(zip(found["divergence"], found["confidence"], strict=True))
    ]
    return f"{said}\n\n{table(rows)}\n{table(of_step)}"


def missing() -> str:
    """Which runs there are not, and how the others were made."""
    everything = {cell: record(cell) for cell in cells(sorted(TABLES), SEEDS)}
    made = [row for row in everything.values() if row is not None]
    left = [cell.variant for cell, row in everything.items() if row is None]
    lines = [f"There are {len(made)} of {len(everything)} runs. Not run:", ""] if left else ["All runs are there."]
    for number, (variants, _) in sorted(TABLES.items()):
        counts = ", ".join(f"{name} {left.count(name)}" for name in variants if name in left)
        lines += [f"- table {number}: {counts}"] if counts and number != 2 else []
    lines += [f"- {row['name']} ended early: {row['ended']}" for row in made if row.get("ended")]
    machines = {
        f"{row['machine']['device']}, torch {row['machine']['versions']['torch']}, {'bf16' if row['bf16'] else 'fp32'}"
        for row in made
    }
    return "\n".join([*lines, "", *(f"Each on one thread: {machine}." for machine in sorted(machines))])


SECTIONS: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (gain, methods, rates, costs, toy, ablations, stability, savings, fewer_states, annealed, causal, missing)
}
