"""The recipes for a model on a card: the plan that their comments say is what is planned."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest
from test_published_configs import CONFIGS

from dopsd.memory import command
from dopsd.memory.dry_run import DryProbe, DryRun
from dopsd.memory.options import parse_plan
from dopsd.memory.planner import workspace_for
from dopsd.parser import RECIPES
from dopsd.units import GIB, gib

SAID = re.compile(
    r"--recipe (\S+) --gpu ([\d.]+)GiB predicts.*\n# (\d+) states a forward (with|without) check.*: (.+) GiB"
)
NAMES = sorted(path.stem for path in RECIPES.glob("*gb.yaml"))


def test_there_are_such() -> None:
    assert len(NAMES) == 5


@cache
def dry_run(name: str, folder: Path) -> DryRun:
    """That of a published config.json, which the budgets and weights of recipes share."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(CONFIGS[name][0]))
    recipe = next(one for one in NAMES if name in (RECIPES / f"{one}.yaml").read_text())
    arguments, model, _, rollouts, teaching, args = parse_plan(["--recipe", recipe, "--model-config", str(path)])
    config = command.read_architecture(str(path))
    return DryRun(config, model, rollouts, teaching, args, arguments.prompt_length, workspace_for(21 * GIB, "cuda"))


@pytest.mark.parametrize("recipe", NAMES)
def test_the_plan_is_what_the_recipe_says(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """These sizes take what is said, which is within the budget; fewer micro-batches of an update would take more."""
    text = (RECIPES / f"{recipe}.yaml").read_text()
    (name, gpu, states, checkpointing, peak) = SAID.search(text).groups()  # type: ignore[union-attr]
    _, model, *_, teaching, _ = parse_plan(["--recipe", recipe, "--gpu", f"{gpu}GiB"])
    assert name == recipe and teaching.memory_budget == "0.9"
    assert float(gpu) == pytest.approx(0.9 * float(recipe.partition("-")[2].removesuffix("gb")))
    run = dry_run(Path(model.model).name, tmp_path_factory.getbasetemp())
    probe = DryProbe(run, teaching.reuse, model.quantize)
    on, limit = checkpointing == "with", float(gpu) * GIB
    taken = probe.training(int(states), on)
    assert gib(taken) == peak and taken <= limit
    batches = -(-run.states() // int(states))
    if batches > 1:
        assert probe.training(-(-run.states() // (batches - 1)), on) > limit
