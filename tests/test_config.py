"""The command line and the recipes: what is accepted, what overrides what, and what an error says."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from dopsd import config
from dopsd.commands import parse_train
from dopsd.errors import UsageError
from dopsd.evaluation.options import EvaluationArguments, parse_evaluate
from dopsd.models import SHIPPED
from dopsd.tasks.sudoku import Sudoku

RECIPES = sorted(Path(config.__file__).parent.glob("recipes/*.yaml"))
GROUPS = (
    config.ModelArguments,
    config.TaskArguments,
    config.RolloutArguments,
    config.TeachingArguments,
    config.TrainingArguments,
    EvaluationArguments,
)


def parsed(*argv: str) -> dict[str, Any]:
    """Every option of a training command by name."""
    return {f.name: getattr(group, f.name) for group in parse_train(argv) for f in fields(group) if f.init}


def own_fields(group: type) -> list[Any]:
    """The fields a dataclass declares itself, not those of transformers."""
    return [f for f in fields(group) if f.name in vars(group)["__annotations__"]]


# ---- recipes ----


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_line_of_a_shipped_recipe_takes_effect(recipe: Path) -> None:
    """Each option of the YAML file has that value after parsing, by the recipe's name."""
    values = parsed("--recipe", recipe.stem)
    written = yaml.safe_load(recipe.read_text())
    written.pop("recipe", None)  # what it starts from
    assert written
    written.pop("recipe", None)  # the one that it starts from
    for task, options in written.pop("tasks", {}).items():
        other, own = (parsed("--recipe", recipe.stem, "--output_dir", "a", *argv) for argv in ((), ("--task", task)))
        assert {name for name in own if own[name] != other[name]} == {"task", *options}
        assert {name: own[name] for name in options} == options
    for name, value in written.items():
        if value is None or value == "none":
            # transformers turns report_to's "none" into no reporters.
            assert values[name] in (None, []), name
        elif isinstance(values[name], transformers.utils.ExplicitEnum):
            assert values[name].value == value, name
        else:
            assert values[name] == value, name


def test_the_tiny_recipe_is_the_default_and_the_command_line_wins() -> None:
    """Without --recipe the tiny one is read; an option given beside it replaces the recipe's and leaves the others."""
    written = yaml.safe_load((Path(config.__file__).parent / "recipes" / "tiny.yaml").read_text())
    values = parsed("--steps", "12", "--clip", "0.04", "--weight_decay", "0.25")
    assert (values["steps"], values["clip"], values["weight_decay"]) == (12, 0.04, 0.25)
    assert (written["steps"], written["clip"], written["weight_decay"]) != (12, 0.04, 0.25)
    assert values["block_length"] == written["block_length"]
    assert values["learning_rate"] == written["learning_rate"]


def test_a_model_that_does_not_ship_is_trained_as_the_paper_does() -> None:
    """Naming another model, and no recipe, gives the paper's settings: the tiny model's would break it."""
    values = parsed("--model", "somebody/a-diffusion-model", "--task", "math")
    assert (values["recipe"], values["model"], values["task"]) == ("paper", "somebody/a-diffusion-model", "math")
    assert (values["learning_rate"], values["gen_length"], values["teacher"]) == (5e-6, 256, "fixed")
    assert parsed("--model", "somebody/a-diffusion-model", "--recipe", "reference")["recipe"] == "reference"
    assert all(parsed("--model", name)["recipe"] == name for name in SHIPPED)


def test_the_last_releases_names_still_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the command line, in either spelling, and in a recipe; one sentence on standard error says what is new."""
    (tmp_path / "mine.yaml").write_text("update_per_slice: 3\n")
    for argv in (["--update_per_slice", "3"], ["--update-per-slice=3"], ["--recipe", str(tmp_path / "mine.yaml")]):
        assert parsed(*argv)["updates_per_batch"] == 3
        assert capsys.readouterr().err.count("is called --updates_per_batch now") == 1
    assert parsed("--updates_per_batch", "3")["updates_per_batch"] == 3 and not capsys.readouterr().err


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    """Lists, dictionaries, booleans and nulls of a YAML file arrive as such; a list is overridden whole."""
    path = tmp_path / "mine.yaml"
    path.write_text(
        "gen_length: 64\nblock_length: 16\nclip: null\nlora_targets: [q_proj, v_proj]\neval_tokens_per_step: [1, 4]\n"
        "correct_only: false\nlearning_rate: 1e-3\nlr_scheduler_type: polynomial\n"
        "lr_scheduler_kwargs: {lr_end: 1.0e-5, power: 2.0}\nreport_to: none\nseed: 7\n"
    )
    values = parsed("--recipe", str(path))
    assert (values["gen_length"], values["block_length"]) == (64, 16)
    assert (values["clip"], values["correct_only"]) == (None, False)
    assert values["lora_targets"] == ["q_proj", "v_proj"]
    assert values["lr_scheduler_kwargs"] == {"lr_end": 1e-5, "power": 2.0}
    assert (values["learning_rate"], values["seed"], values["report_to"]) == (1e-3, 7, [])
    assert parsed("--recipe", str(path), "--eval_tokens_per_step", "2")["eval_tokens_per_step"] == [2]


@pytest.mark.parametrize(
    ("word", "kind"), [("none", "none"), ("prefix", "prefix"), ("block", "block"), ("off", "none"), ("dual", "block")]
)
def test_a_recipe_and_the_command_line_name_the_cache(
    tmp_path: Path, word: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also by the words of an earlier release, one of which YAML reads as false; these alone bring a warning."""
    path = tmp_path / "mine.yaml"
    path.write_text(f"gen_length: 64\nblock_length: 16\ncache: {word}\n")
    warning = "" if word == kind else f"cache={word} is called cache={kind} now; the next release forgets {word}\n"
    assert parse_train(["--recipe", str(path)])[2].decoding(2).cache == kind
    assert capsys.readouterr().out == warning
    assert parse_evaluate(["--cache", word]).decoding(Sudoku(), 48, 2).cache == kind
    assert capsys.readouterr().out == warning


def test_a_recipe_starts_from_another(tmp_path: Path) -> None:
    """From one that ships or a file beside it, whose lines its own replace; the command line comes last."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "base.yaml").write_text("recipe: tiny\nsteps: 12\nclip: 0.5\neval_tokens_per_step: [1, 2]\n")
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: lib/base.yaml\nclip: none\nteacher: fixed\neval_tokens_per_step: []\n")
    values, tiny = parsed("--recipe", str(path), "--seed", "5"), parsed()
    changed = {"recipe", "steps", "teacher", "eval_tokens_per_step", "seed", "output_dir", "logging_dir", "run_name"}
    assert {name for name in values if values[name] != tiny[name]} <= changed
    assert (values["steps"], values["clip"], values["teacher"], values["seed"]) == (12, None, "fixed", 5)
    assert (values["recipe"], values["eval_tokens_per_step"]) == (str(path), [])


@pytest.mark.parametrize("named", ["in it", "beside it", "below it"])
def test_a_recipe_that_names_none_starts_from_its_models(tmp_path: Path, named: str) -> None:
    """As a command line does: from the tiny model's, or the paper's if it, what it starts from or the command line
    names another model. One that ships starts from nothing, by its file's name too."""
    path, below = tmp_path / "mine.yaml", tmp_path / "below.yaml"
    line = "model: somebody/model\n"
    path.write_text("recipe: below.yaml\ntask: countdown\n" + line * (named == "in it"))
    below.write_text("gen_length: 64\nblock_length: 32\nsteps: 64\n" + line * (named == "below it"))
    argv = ["--recipe", str(path), "--output_dir", str(tmp_path)]
    values = parsed(*argv, *["--model", "somebody/model"] * (named == "beside it"))
    paper = parsed("--model", "somebody/model", "--output_dir", str(tmp_path))
    assert {name for name in values if values[name] != paper[name]} == {"recipe", "task", "gen_length", "steps"}
    values, tiny = parsed(*argv, "--model", "tiny"), parsed("--output_dir", str(tmp_path))
    changed = {"recipe", "task", "gen_length", "block_length", "steps"}
    assert {name for name in values if values[name] != tiny[name]} == changed
    shipped = parsed("--recipe", str(next(file for file in RECIPES if file.stem == "paper")), "--model", "tiny")
    assert shipped["learning_rate"] == paper["learning_rate"] != tiny["learning_rate"]


def test_a_recipe_has_options_by_task(tmp_path: Path) -> None:
    """Those of the chosen task go over the recipe's others, and under what starts from it and the command line; which
    task that is may be said on the command line, in the recipe, or in one that it starts from."""
    base, mine = tmp_path / "base.yaml", tmp_path / "mine.yaml"
    base.write_text("recipe: paper\ntask: math\nclip: 0.3\ntasks: {gsm8k: {clip: 0.2}, math: {clip: 0.1, top_k: 9}}\n")
    mine.write_text("recipe: base.yaml\ntop_k: 8\ntasks:\n  math: {beta: 0.25}\n  countdown: {top_k: 7}\n")

    def found(*argv: str) -> tuple[Any, ...]:
        values = parsed("--recipe", str(mine), *argv)
        return values["task"], values["clip"], values["top_k"], values["beta"]

    assert found() == ("math", 0.1, 8, 0.25)
    assert found("--clip", "0.5") == ("math", 0.5, 8, 0.25)
    assert found("--task", "gsm8k") == ("gsm8k", 0.2, 8, 0.5)
    assert found("--task", "countdown") == ("countdown", 0.3, 7, 0.5)
    assert found("--task", "sudoku4x4") == ("sudoku4x4", 0.3, 8, 0.5)
    mine.write_text("task: gsm8k\nrecipe: base.yaml\n")
    assert found() == ("gsm8k", 0.2, None, 0.5)


def test_recipes_in_a_circle_are_refused(tmp_path: Path) -> None:
    """Also one that starts from itself; and a recipe that is not there is named."""
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    two.write_text("recipe: ./one.yaml\n")
    for name in ("two.yaml", "one.yaml"):
        one.write_text(f"recipe: {name}\n")
        with pytest.raises(UsageError, match="in a circle"):
            parsed("--recipe", str(one))
    one.write_text("recipe: three.yaml\n")
    with pytest.raises(UsageError, match=r"recipe must be one of .*three\.yaml"):
        parsed("--recipe", str(one))


def test_options_of_a_function_are_those_of_a_command_line() -> None:
    """None, lists, dictionaries, paths and words that begin with a dash; what a recipe may not name, a caller may."""
    words = "--clip none --eval_tokens_per_step 1 4 --lora_targets none --bf16 false --report_to none --output_dir a"
    given = {"clip": None, "eval_tokens_per_step": [1, 4], "lora_targets": None, "bf16": False, "report_to": None}
    for one, two in zip(parse_train(words.split()), parse_train(**given, output_dir=Path("a")), strict=True):
        assert {f.name for f in fields(one) if f.init and getattr(one, f.name) != getattr(two, f.name)} == set()
    assert parse_train(lr_scheduler_kwargs={"power": 2.0}, lr_scheduler_type="polynomial")[4].lr_scheduler_kwargs == {
        "power": 2.0
    }
    assert parse_train(output_dir=Path("-there"), task="a.py:Chess")[4].output_dir == "-there"
    assert parse_evaluate(gen_length=None, reveal=[]).gen_length is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("retain_ration: 0.5\n", ["retain_ration", "retain_ratio", "recipe.yaml"]),
        ("clip: [\n", ["not valid YAML"]),
        ("just words\n", ["YAML file with one option a line"]),
        ("", ["YAML file with one option a line"]),
        ("pass_k: 0\n", ["pass_k must be", "but is 0", "at least 1"]),
        ("steps: many\n", ["--steps", "many"]),
        ("model: [a, b]\n", ["unknown option b"]),
        ("a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]\n", ["not valid YAML", "aliases (*a)"]),
        ("seed: " + "[" * 10**4, ["not valid YAML"]),
        ("tasks: math\n", ["recipe.yaml: tasks must be options by the name of a task, but is 'math'"]),
        (
            "tasks: {maths: {clip: 0.04}}\n",
            ["recipe.yaml: tasks must be one of sudoku, gsm8k, math,", "but is 'maths'"],
        ),
        ("tasks: {math: 0.04}\n", ["recipe.yaml: tasks: math must be an option a line, but is 0.04"]),
        ("tasks: {gsm8k: {clop: 0.04}}\n", ["recipe.yaml: tasks: gsm8k: unknown option 'clop'; did you mean clip?"]),
        ("tasks: {math: {model: tiny}}\n", ["recipe.yaml: tasks: math: model='tiny' can't be used: it can't depend"]),
        ("task: here/chess.py:Chess\n", ["recipe.yaml", "task='here/chess.py:Chess'", "command line alone"]),
    ],
)
def test_what_is_wrong_in_a_recipe_is_named(tmp_path: Path, text: str, said: list[str]) -> None:
    """A recipe's mistake is a usage error that names it, and for an unknown option the nearest known one."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        parse_train(["--recipe", str(path)])
    for word in said:
        assert word in str(error.value)


def test_an_unknown_recipe_lists_those_that_ship() -> None:
    """The error holds the name and every recipe there is."""
    with pytest.raises(UsageError) as error:
        parse_train(["--recipe", "nano"])
    for word in ("nano", *(path.stem for path in RECIPES)):
        assert word in str(error.value)


# ---- values ----


@pytest.mark.parametrize("word", ["none", "None"])
def test_none_is_a_value_of_every_optional_option(word: str) -> None:
    """Each of our options whose type allows for no value takes ``none``, also where its default is something else."""
    optional = {
        name
        for group in GROUPS[:-1]
        for owner in group.__mro__
        if owner.__module__ == config.__name__
        for name, hint in inspect.get_annotations(owner).items()
        if "None" in hint and name not in ("output_dir", "prompt_sha256")  # the one has a default, the other follows
    }
    assert {"clip", "top_k", "threshold", "steps", "adapter", "train_file", "lora_targets", "bf16"} <= optional
    values = parsed(*(token for name in sorted(optional) for token in (f"--{name}", word)))
    chosen = {"bf16", "load_best_model_at_end"}  # by what the machine has, and by what is saved when
    for name in optional - chosen:
        assert values[name] is None, name
    assert all(isinstance(values[name], bool) for name in chosen)
    assert parsed("--output_dir", word)["output_dir"].startswith("runs/")
    assert config.RolloutArguments(gen_length=48, block_length=8, steps=None).decoding().total_steps == 24


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--lora_r", "four"),
        ("--lora_r", "4.5"),
        ("--lora_r", "none"),
        ("--clip", "little"),
        ("--correct_only", "maybe"),
        ("--selection", "nobody"),
        ("--divergence", "KL"),
        ("--eval_tokens_per_step", "two"),
        ("--seed", "1.5"),
        ("--learning_rate", "fast"),
        ("--lr_scheduler_type", "spiral"),
        ("--bf16", "perhaps"),
    ],
)
def test_a_value_of_the_wrong_type_is_a_usage_error(option: str, value: str) -> None:
    """The sentence names the option and the value given."""
    with pytest.raises(UsageError) as error:
        parse_train([option, value])
    assert option in str(error.value) and value in str(error.value)


@pytest.mark.parametrize(
    ("option", "nearest"),
    [("--learning_rat", "--learning_rate"), ("--retain-ration", "--retain-ratio"), ("--pass_at_k=4", "--pass_k")],
)
def test_an_unknown_option_is_answered_with_the_nearest(option: str, nearest: str) -> None:
    """Neither dropped nor taken for an abbreviation."""
    with pytest.raises(UsageError, match=rf"unknown option {option.partition('=')[0]}; did you mean {nearest}\?"):
        parse_train([option, "1"])


def test_abbreviations_are_unknown_options() -> None:
    """``--learn`` is no option although it is the beginning of one."""
    with pytest.raises(UsageError, match="unknown option --learn"):
        parse_train(["--learn", "1"])


def test_transformers_options_keep_their_names() -> None:
    """What transformers.TrainingArguments names is given by its name and arrives there."""
    line = (
        "--learning_rate 3e-4 --seed 11 --max_steps 7 --report_to none --lr_scheduler_type cosine --adam_beta2 0.98 "
        "--eval_strategy steps --eval_steps 5 --save_total_limit 3 --output_dir there"
    )
    values = parsed(*line.split(), "--lr_scheduler_kwargs", '{"num_cycles": 2}')
    assert (values["learning_rate"], values["seed"], values["max_steps"], values["report_to"]) == (3e-4, 11, 7, [])
    assert (values["lr_scheduler_type"], values["lr_scheduler_kwargs"]) == ("cosine", {"num_cycles": 2})
    assert (values["adam_beta2"], values["eval_strategy"], values["eval_steps"]) == (0.98, "steps", 5)
    assert (values["save_total_limit"], values["output_dir"]) == (3, "there")


def test_transformers_own_checks_are_usage_errors() -> None:
    """Options that contradict each other by transformers' rules are the user's to mend, like ours."""
    with pytest.raises(UsageError, match="load_best_model_at_end"):
        parse_train(["--eval_strategy", "no", "--load_best_model_at_end", "true"])


GRPO = ["--method", "diffu_grpo"]
EXACT = [*GRPO, "--likelihood", "exact", "--remasking", "leftmost"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--gradient_accumulation_steps", "2"], ["gradient_accumulation_steps=2", "per_device_train_batch_size"]),
        (["--gen_length", "50", "--block_length", "8"], ["block_length must be", "gen_length=50, but is 8"]),
        (["--steps", "5"], ["steps must be", "but is 5", "between 6 and 48"]),
        (["--clip", "-0.1"], ["clip must be", "but is -0.1", "at least 0"]),
        (["--retain_ratio", "1.2"], ["retain_ratio must be", "but is 1.2", "[0, 1]"]),
        (["--retain_ratio", "-0.2"], ["retain_ratio must be", "but is -0.2", "[0, 1]"]),
        (["--pass_k", "0"], ["pass_k must be", "but is 0", "at least 1"]),
        (["--temperature", "0"], ["temperature must be", "but is 0.0", "pass_k=8"]),
        (["--first_temperature", "-1"], ["first_temperature must be at least 0, but is -1.0"]),
        (["--top_k", "0"], ["top_k must be", "but is 0", "at least 1, or none"]),
        (["--beta", "1"], ["beta must be", "but is 1.0"]),
        (["--ema_decay", "1"], ["ema_decay must be", "but is 1.0"]),
        (["--threshold", "1.5"], ["threshold must be", "but is 1.5"]),
        (["--threshold", "0.9", "--remasking", "margin"], ["threshold=0.9", "low_confidence", "margin"]),
        (["--score_threshold", "2"], ["score_threshold must be", "but is 2.0"]),
        (["--updates_per_batch", "0"], ["updates_per_batch must be", "but is 0"]),
        (["--states_per_forward", "0"], ["states_per_forward must be", "but is 0"]),
        (["--reuse", "all"], ["--reuse", "'all'", "'block'"]),
        (["--cache", "both"], ["--cache", "'both'", "'block'"]),
        (["--drift_samples", "-1"], ["drift_samples must be", "but is -1"]),
        (["--drift_limit", "0.1"], ["drift_limit=0.1", "reuse"]),
        (["--reuse", "block", "--drift_limit", "-1"], ["drift_limit must be", "but is -1.0"]),
        (["--reuse", "block", "--drift_limit", "0.1", "--drift_samples", "0"], ["drift_limit=0.1", "drift_samples"]),
        (["--sequences_per_forward", "0"], ["sequences_per_forward must be", "but is 0"]),
        (["--eval_tokens_per_step", "9"], ["eval_tokens_per_step must be", "but is 9", "block_length=8"]),
        (["--train_problems", "0"], ["train_problems must be", "but is 0"]),
        (["--lora_r", "0"], ["lora_r must be", "but is 0"]),
        (["--lora_dropout", "1"], ["lora_dropout must be", "but is 1.0"]),
        (["--per_device_train_batch_size", "0"], ["per_device_train_batch_size must be", "but is 0"]),
        (["--max_steps", "0"], ["max_steps must be", "but is 0"]),
        ([*GRPO, "--prompt_mask", "1"], ["prompt_mask must be", "but is 1.0", "[0, 1)"]),
        ([*GRPO, "--ratio_clip", "0"], ["ratio_clip must be", "but is 0.0", "positive"]),
        ([*GRPO, "--kl_weight", "-1"], ["kl_weight must be", "but is -1.0"]),
        ([*GRPO, "--pass_k", "1"], ["pass_k must be", "but is 1", "at least 2"]),
        ([*GRPO, "--clip", "0.1"], ["clip=0.1", "method=d_opsd", "not with diffu_grpo"]),
        (["--kl_weight", "0.1"], ["kl_weight=0.1", "method=diffu_grpo", "not with d_opsd"]),
        ([*EXACT, "--steps", "24"], ["likelihood='exact'", "steps=48", "remasking=leftmost", "cache=none"]),
        ([*EXACT, "--steps", "48", "--cache", "prefix"], ["likelihood='exact'", "cache=none"]),
        ([*EXACT, "--steps", "48", "--remasking", "margin"], ["likelihood='exact'", "remasking=leftmost"]),
        ([*EXACT, "--share_prompt_mask", "true"], ["share_prompt_mask=True", "exact"]),
    ],
    ids=lambda part: "-".join(part).replace("--", "") if isinstance(part, list) else None,
)
def test_a_value_out_of_range_names_the_option_and_what_is_accepted(argv: list[str], said: list[str]) -> None:
    """Checked while parsing, before anything is loaded."""
    with pytest.raises(UsageError) as error:
        parse_train(argv)
    for word in said:
        assert word in str(error.value)


MEANINGLESS = [
    *([f"--{name}", value] for name in ("learning_rate", "max_grad_norm", "weight_decay") for value in ("inf", "nan")),
    *(
        [f"--{name}", value]
        for name in ("temperature", "clip", "retain_ratio", "drift_limit")
        for value in ("inf", "nan")
    ),
    *([f"--{name}", "nan"] for name in ("ema_decay", "score_threshold", "beta", "threshold", "lora_dropout")),
    *([f"--{name}", "inf"] for name in ("save_steps", "logging_steps", "warmup_steps", "num_train_epochs")),
    ["--lr_scheduler_kwargs", '{"lr_end": NaN}'],
    *([f"--{name}", "0"] for name in ("save_steps", "eval_steps", "logging_steps")),
    ["--save_steps", "-5"],
    ["--seed", "-1"],
    ["--eval_tokens_per_step", "2", "1", "2"],
    ["--recipe", ""],
    ["--memory_budget", "9" * 400],
    *([f"--{name}", "999999999999"] for name in ("train_problems", "pass_k", "lora_r", "sequences_per_forward")),
    *([f"--{name}", "999999999999"] for name in ("per_device_train_batch_size", "max_steps", "seed", "top_k")),
]


@pytest.mark.parametrize("argv", MEANINGLESS, ids=lambda argv: "-".join(argv)[2:40])
def test_a_value_that_means_nothing_is_refused(argv: list[str]) -> None:
    """While parsing, in a sentence with the option's name."""
    reuse = ["--reuse", "block"] if argv[0] == "--drift_limit" else []
    with pytest.raises(UsageError, match=rf"^{argv[0].removeprefix('--')}(=| must be )"):
        parse_train([*argv, *reuse])


def test_a_value_out_of_range_reads_as_it_is_meant() -> None:
    """What is accepted is what it must be, and what was given is not."""
    with pytest.raises(UsageError, match=r"^pass_k must be at least 1, but is 0$"):
        parse_train(["--pass_k", "0"])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--tokens_per_step", "2", "2"], ["tokens_per_step=[2, 2]", "once"]),
        (["--reveal", "0.25", "0.250000001"], ["reveal=[0.25, 0.250000001]", "once"]),
        (["--reveal", "nan"], ["reveal must be", "but is nan"]),
        (["--temperature", "inf"], ["temperature must be finite, but is inf"]),
        (["--eval_problems", "999999999999"], ["eval_problems must be at most"]),
        (["--seed", "-1"], ["seed must be at least 0"]),
        (["--gen_length", "48", "50"], ["gen_length=50"]),
        (["--tokens_per_step", "9"], ["tokens_per_step must be", "but is 9", "block_length=8"]),
        (["--reveal", "1.5"], ["reveal must be", "but is 1.5"]),
        (["--eval_problems", "0"], ["eval_problems must be", "but is 0"]),
        (["--pass_k", "4", "--temperature", "0"], ["temperature must be", "but is 0.0", "pass_k=4"]),
        (["--adaptor", "x"], ["--adaptor", "--adapter"]),
        (["--adapter"], ["--adapter"]),
    ],
    ids=lambda part: "-".join(part).replace("--", "") if isinstance(part, list) else None,
)
def test_the_evaluation_command_checks_its_options_too(argv: list[str], said: list[str]) -> None:
    """The same kind of error, each of several lengths included."""
    with pytest.raises(UsageError) as error:
        parse_evaluate(argv)
    for word in said:
        assert word in str(error.value)


# ---- help ----


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_every_option_has_a_help_text(group: type) -> None:
    """A sentence of its own for each field that a dataclass of ours declares."""
    helps = [f.metadata.get("help", "") for f in own_fields(group)]
    assert helps and all(text.strip().endswith(".") for text in helps)
    assert len(set(helps)) == len(helps)


def test_help_is_short_and_help_all_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    """Within 190 lines what is ours and usual; transformers' others, and options' second names, are elsewhere."""
    text = {}
    for word in ("-h", "--help-all"):
        with pytest.raises(SystemExit):
            parse_train([word])
        text[word] = capsys.readouterr().out
    assert text["-h"].count("\n") < 190 and max(map(len, text["-h"].splitlines())) <= 120
    for name in ("--learning_rate", "--resume_from_checkpoint", "--clip_form", "--help-all"):
        assert f"  {name}" in text["-h"]
    assert "--adam_epsilon" in text["--help-all"] and "--adam_epsilon" not in text["-h"]
    assert "--no_correct_only" not in text["--help-all"] and "SUPPRESS" not in text["--help-all"]


@pytest.mark.parametrize("parse", [parse_train, parse_evaluate])
def test_help_says_that_a_tasks_file_is_run(parse: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "path/to/file.py:ClassName, whose code then runs (so a recipe can't name a file)" in text


@pytest.mark.parametrize(("parse", "groups"), [(parse_train, GROUPS[:-1]), (parse_evaluate, GROUPS[-1:])])
def test_help_lists_every_option_in_its_group(
    parse: Any, groups: tuple[Any, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--help exits with 0 and shows each option and its text below its group's title, or its methods'."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as done:
        parse(["--help"])
    assert not done.value.code
    text = capsys.readouterr().out
    sections = {part.partition(":\n")[0]: "".join(part.split()) for part in text.split("\n\n")}
    titles = [group._argument_group_name for group in groups]
    assert [title for title in sections if title in titles] == titles
    for group in groups:
        for f in own_fields(group):
            owners = config.OF_METHODS.get(f.name) if parse is parse_train else None
            section = sections[f"method={' or '.join(owners)}" if owners else group._argument_group_name]
            assert f"--{f.name}" in section, f.name
            assert "".join(f.metadata["help"].split()) in section, f.name
