"""Tasks as such: which can be loaded, what rows they have, what they ask, and that their golds are checked."""

from __future__ import annotations

import json
import random
import re
import resource
import signal
import time
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from importlib.metadata import EntryPoint
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

from dopsd import cli, limits, tasks
from dopsd.config import TaskArguments
from dopsd.errors import RunError, UsageError
from dopsd.rollout import Decoder
from dopsd.tasks import Task, check_golds, draw, load_task
from dopsd.tasks.countdown import solve
from dopsd.tasks.rows import read_rows
from dopsd.tasks.sudoku import all_grids
from dopsd.tasks.task import split_of

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
BENCHMARKS = ("gsm8k", "math", "countdown", "sudoku4x4")


def load(name: str, grading: Any = "lenient") -> Task:
    """The task, unless it needs what is not installed."""
    if name == "math":
        pytest.importorskip("math_verify")
    return load_task(name, grading)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- loading ----


@pytest.mark.parametrize("name", tasks.SHIPPED)
@pytest.mark.parametrize("grading", ["strict", "lenient"])
def test_shipped_tasks(name: str, grading: str) -> None:
    task = load(name, grading)
    assert isinstance(task, Task) and task.grading == grading


MINE = """
from dataclasses import dataclass


@dataclass
class Mine:
    size: int = 3

    def problems(self, split, count, seed=0):
        return [{"n": f"{split}{seed}{number}"} for number in range(min(count, self.size))]

    def read(self, path):
        return [{"n": line} for line in path.read_text().split()]

    def prompt(self, row):
        return row["n"]

    def reference_prompt(self, row):
        return row["n"]

    def score(self, row, response):
        return 1.0


class Half:
    def prompt(self, row):
        return ""

    score = problems = prompt


class Demanding(Mine):
    def __init__(self, size):
        raise RuntimeError("never\\nso")


value = 3
"""


def test_a_class_in_a_file(tmp_path: Path) -> None:
    """The five methods are enough: the rest comes from Task."""
    (tmp_path / "mine.py").write_text(MINE)
    task = load_task(f"{tmp_path}/mine.py:Mine", "strict")
    assert isinstance(task, Task) and task.grading == "strict" and task.prompt({"n": "x"}) == "x"
    assert cli.problems(task, "train", None, 2) == [{"n": "train00"}, {"n": "train01"}]
    assert draw(task, "train", 3, 0, [{"n": "train01"}]) == [{"n": "train00"}, {"n": "train02"}]
    (tmp_path / "rows.txt").write_text("a b")
    assert cli.problems(task, "train", str(tmp_path / "rows.txt"), 2) == [{"n": "a"}, {"n": "b"}]
    check_golds(task, [{"n": "1"}])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("absent.py:Mine", r"there is no file .*absent\.py"),
        ("mine.py:Yours", r"mine\.py has no class Yours"),
        ("mine.py:", r"mine\.py has no class $"),
        ("mine.py:value", r"3 is no class"),
        ("mine.py:Half", r"Half has no read, reference_prompt$"),
        ("mine.py:Demanding", r"loading it failed with TypeError: .*size"),
        ("broken.py:Mine", r"loading it failed with SyntaxError"),
        ("failing.py:Mine", r"loading it failed with ZeroDivisionError"),
        ("mine.py", r"known are .*sudoku.*, and path/to/file\.py:ClassName"),
        ("", r"known are "),
    ],
)
def test_what_is_no_task_is_said_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    Path("broken.py").write_text("class Mine(:")
    Path("failing.py").write_text("1 / 0")
    with pytest.raises(UsageError, match=rf"^task='{name}' can't be used: {sentence}"):
        load_task(name)


def test_registered_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the entry-point group are known by their names, are offered, and don't hide those that ship."""
    (tmp_path / "plugin_of_a_test.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    values = {"mine": "plugin_of_a_test:Mine", "gone": "plugin_of_a_test:Gone", "sudoku": "plugin_of_a_test:Mine"}
    entries = [EntryPoint(name, value, "dopsd.tasks") for name, value in values.items()]
    monkeypatch.setattr(tasks, "entry_points", lambda group: entries if group == "dopsd.tasks" else [])
    assert type(load_task("mine")).__name__ == "Mine"
    assert type(load_task("sudoku")).__name__ == "Sudoku"
    with pytest.raises(UsageError, match=r"^task='gone' can't be used: loading it failed with AttributeError"):
        load_task("gone")
    with pytest.raises(UsageError, match=r"^task='chess' can't be used: known are .*mine"):
        load_task("chess")


# ---- prompts ----

EXAMPLES: dict[str, dict[str, str]] = {
    "gsm8k": {"question": "How many is 6 x 7?", "answer": "6 x 7 = <<6*7=42>>42.\n#### 42"},
    "math": {"problem": "Halve $1$.", "solution": r"It is $\boxed{\frac{1}{2}}$."},
    "countdown": {"input": "30,100,93", "output": "23"},
    "sudoku4x4": {"puzzle": "3102200002100320", "solution": "3142243142131324"},
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_prompts(name: str) -> None:
    """The same problem and instructions for both; only the teacher's prompt has the solution."""
    task, row = load(name), EXAMPLES[name]
    prompt, reference = task.prompt(row), task.reference_prompt(row)
    problem, instructions = prompt.rsplit("\n\n", 1)
    assert reference.startswith(problem) and reference.endswith(instructions)
    assert "<answer>" in instructions and "<reasoning>" in instructions
    shown = {"gsm8k": "6 x 7 = 42.", "math": r"\frac{1}{2}", "countdown": "93 - (100 - 30) = 23"}
    solution = shown.get(name, row.get("solution", ""))
    assert solution in reference and solution not in prompt


@pytest.mark.parametrize("grading", ["strict", "lenient"])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_solutions(name: str, grading: Any) -> None:
    """They are right, and in the form that is asked for, with steps and answer in the place of the words for them."""
    task, row = load(name, grading), EXAMPLES[name]
    solution = task.solution(row)
    assert solution is not None and task.score(row, solution) == 1
    form = "Keep to this form:\n" + re.sub("(?<=\n)[^<]+(?=\n<)", "your steps", solution, count=1)
    form = re.sub("(?<=<answer>\n).+(?=\n</answer>)", lambda match: "your answer", form)
    assert task.prompt(row).endswith(form)
    shown = {
        "gsm8k": ("6 x 7 = 42.", "42"),
        "math": (EXAMPLES["math"]["solution"], r"\boxed{\frac{1}{2}}"),
        "countdown": ("93 - (100 - 30) = 23", "93 - (100 - 30)"),
        "sudoku4x4": ("3142\n2431\n4213\n1324", "3142243142131324"),
    }
    assert [part.strip() for part in re.split("</?(?:reasoning|answer)>", solution)[1::2]] == [*shown[name]]


class ChatTokenizer:
    """A tokenizer of single characters with a chat template."""

    chat_template = "yes"

    def apply_chat_template(self, turns: Any, *, add_generation_prompt: bool, tokenize: bool) -> str:
        assert add_generation_prompt and not tokenize
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in turns) + "<assistant>"

    def __call__(self, text: str, *, add_special_tokens: bool, return_tensors: str) -> dict[str, torch.Tensor]:
        assert not add_special_tokens
        return {"input_ids": torch.tensor([[ord(character) for character in text]])}


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (LOOP, "takes more than 0.2 seconds"),
        ("{{ 'x' * 20000000000 }}", "takes more than 768 MiB"),
        ("{{ raise_exception('no') }}", "fails: TemplateError: no"),
        ("{{ messages[7].content + 1 }}", "fails: UndefinedError"),
        ("{% for %}", "fails: TemplateSyntaxError"),
    ],
    ids=["loop", "memory", "raise", "undefined", "syntax"],
)
def test_a_chat_template_that_does_not_end_or_work(
    template: str, said: str, shipped: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence; afterwards there is neither a timer nor a limit."""
    monkeypatch.setattr(limits, "SECONDS", 0.2)
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    shipped.tokenizer.chat_template = template
    with pytest.raises(RunError, match=f"the tokenizer's chat template {said}"):
        shipped.encode("1")
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_prompts_are_a_users_turn_where_there_is_a_chat_template() -> None:
    class Model:
        lm_head_weight = torch.zeros(1)

    tokenizer: Any = ChatTokenizer()
    decoder = Decoder(Model(), tokenizer, load_task("sudoku"), 0, 1, 1)
    assert "".join(map(chr, decoder.encode("hello"))) == "<user>hello<assistant>"
    tokenizer.chat_template = None
    assert "".join(map(chr, decoder.encode("hello"))) == "hello"


# ---- generated rows ----


@pytest.mark.parametrize("name", ["countdown", "sudoku4x4"])
def test_generated_rows(name: str) -> None:
    """They are a function of split and seed, distinct, right, and in one split each, whatever the seed."""
    task = load_task(name)
    rows = task.problems("train", 300, 1)
    assert rows == load_task(name).problems("train", 300, 1) and rows[:20] == task.problems("train", 20, 1)
    assert rows != task.problems("train", 300, 2)
    check_golds(task, rows)
    keys = {
        split: {task.key(row) for seed in range(3) for row in task.problems(split, 100, seed)}
        for split in ("train", "validation", "test")
    }
    assert len({task.key(row) for row in rows}) == 300
    assert not keys["train"] & keys["validation"] | keys["train"] & keys["test"] | keys["validation"] & keys["test"]
    drawn = draw(task, "train", 300, 1, rows[10:20])
    assert drawn == [*rows[:10], *rows[20:], *task.problems("train", 310, 1)[300:]]


@pytest.mark.parametrize("name", ["countdown", "gsm8k"])
def test_an_unknown_split_is_an_error(name: str) -> None:
    with pytest.raises(UsageError, match="split must be one of train, validation, test, but is 'dev'"):
        load_task(name).problems("dev", 1)


def test_generated_sudokus_have_one_solution() -> None:
    for row in load_task("sudoku4x4").problems("test", 200):
        agreeing = [g for g in all_grids() if all(a in ("0", b) for a, b in zip(row["puzzle"], g, strict=True))]
        assert agreeing == [row["solution"]] and row["puzzle"].count("0") == 8


def brute_force(numbers: list[int], target: int) -> bool:
    """Whether (a . b) . c or a . (b . c) is the target for some order and operators, by Python's arithmetic."""
    for a, b, c in permutations(map(Fraction, numbers)):
        for first in "+-*/":
            for second in "+-*/":
                for text in (f"(a {first} b) {second} c", f"a {first} (b {second} c)"):
                    try:
                        if eval(text, {"a": a, "b": b, "c": c}) == target:
                            return True
                    except ZeroDivisionError:
                        pass
    return False


def test_solve_finds_an_expression_if_there_is_one() -> None:
    rng = random.Random(0)
    task = load_task("countdown", "strict")
    found = 0
    for _ in range(150):
        numbers, target = [rng.randint(0, 12) for _ in range(3)], rng.randint(0, 30)
        expression = solve(numbers, target)
        assert (expression is not None) == brute_force(numbers, target)
        if expression is not None:
            found += 1
            row = {"input": ",".join(map(str, numbers)), "output": str(target)}
            assert task.score(row, f"<answer>{expression}</answer>") == 1
            assert eval(expression.replace("/", "* Fraction(1) /")) == target
    assert 20 < found < 140
    assert solve([7], 7) == "7" and solve([7], 8) is None
    assert solve([1, 5, 5, 5], 24) is not None


def test_countdowns_are_the_same_in_any_order() -> None:
    task = load_task("countdown")
    assert task.key({"input": "3,1,2", "output": "5"}) == task.key({"input": "1,2,3", "output": "5"})


# ---- files ----


@pytest.mark.skipif(not DATA.is_dir(), reason="the published problems are not there")
@pytest.mark.parametrize("grading", ["strict", "lenient"])
@pytest.mark.parametrize(
    ("name", "file", "count"),
    [
        ("gsm8k", "gsm8k/train.jsonl", 7473),
        ("countdown", "countdown3/test.jsonl", 256),
        ("sudoku4x4", "sudoku4x4/test.csv", 500),
    ],
)
def test_the_published_problems(name: str, file: str, count: int, grading: Any) -> None:
    """All rows are read and all golds are right; a drawn training row is none of them."""
    task = load_task(name, grading)
    rows = task.read(DATA / file)
    assert len(rows) == count and all(task.gold(row) for row in rows)
    if task.generated:
        held_out = {task.key(row) for row in rows}
        drawn = draw(task, "train", 2000, 0, rows)
        assert len(drawn) == 2000 and not held_out & {task.key(row) for row in drawn}


@pytest.mark.skipif(not DATA.is_dir(), reason="the published problems are not there")
def test_generated_countdowns_are_like_the_published() -> None:
    task = load_task("countdown")
    published, own = task.read(DATA / "countdown3" / "test.jsonl"), task.problems("train", 1000)
    for rows in (published, own):
        values = [int(number) for row in rows for number in row["input"].split(",")]
        targets = [int(row["output"]) for row in rows]
        assert min(values) >= 1 and max(values) <= 100 and len(values) == 3 * len(rows)
        assert min(targets) >= 1 and max(targets) <= 100


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_files_of_any_kind(tmp_path: Path, name: str, kind: str) -> None:
    """Line ends, quotes and commas within a value are kept, and a column's case and company don't matter."""
    row, datasets = EXAMPLES[name], pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{"Id": 1, **{key.title(): value for key, value in row.items()}}] * 3)
    path = str(tmp_path / f"rows.{kind}")
    {"csv": table.to_csv, "jsonl": table.to_json, "parquet": table.to_parquet}[kind](path)
    assert load(name).read(Path(path)) == [row] * 3


def test_text_is_not_interpreted(tmp_path: Path) -> None:
    """What other readers take for a missing value, a number, a date, a line end or a mark of order is text as it is."""
    row = {"question": "NA 007 2020-01-01 \u2028 \x85", "answer": "nan\r\nnull #### 1"}
    line = json.dumps(row, ensure_ascii=False)
    texts = {"jsonl": f"{line}\n\n{line}", "json": f" [{line},\n{line}]\n"}
    texts["csv"] = (
        f'\ufeffQuestion,answer\n"{row["question"]}","{row["answer"]}"\n\n{row["question"]},"{row["answer"]}"\n'
    )
    for kind, text in texts.items():
        path = tmp_path / f"rows.{kind}"
        path.write_bytes(text.encode())
        assert read_rows(path, ("question", "answer")) == [row] * 2


@pytest.mark.parametrize("kind", ["one value a million times", "nothing ten million times", "one large value"])
def test_a_parquet_file_that_unpacks_to_gigabytes(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few kilobytes; refused with the file's name, in little time and memory."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("dopsd.tasks.rows.MOST", 1 << 24)
    path = tmp_path / "rows.parquet"
    if kind == "one large value":
        table = pyarrow.table({"puzzle": ["0" * (1 << 25)], "solution": ["1"]})
    else:
        value, count = ("0" * 10**6, 10**6) if kind == "one value a million times" else ("", 10**7)
        indices = pyarrow.nulls(count, pyarrow.int32()).fill_null(0)
        column = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array([value]))
        table = pyarrow.table({"puzzle": column, "solution": column})
    parquet.write_table(table, path, compression="zstd", store_schema=False)
    del table
    assert path.stat().st_size < 1 << 20
    start, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"rows\.parquet: can't be read as parquet: it unpacks to more than 16 MiB"):
        load_task("sudoku").read(path)
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1 << 20  # in KiB


@pytest.mark.parametrize("name", ["deep.json", "deep.jsonl"])
def test_a_nest_of_lists_is_an_error(tmp_path: Path, name: str) -> None:
    """A hundred thousand deep; the file is named."""
    path = tmp_path / name
    path.write_text(("" if name == "deep.json" else '{"puzzle": ') + "[" * 10**5)
    with pytest.raises(ValueError, match=rf"{name}: can't be read as"):
        load_task("sudoku").read(path)


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a sentence that says how to have it, and for the hub what else would do."""
    monkeypatch.setattr("dopsd.tasks.rows.find_spec", lambda name: None)
    (tmp_path / "rows.parquet").touch()
    with pytest.raises(RunError, match=r"rows\.parquet: .* not installed: pip install 'dopsd\[train\]'$"):
        read_rows(tmp_path / "rows.parquet", ())
    with pytest.raises(
        RunError, match=r"^openai/gsm8k, split test, .*: pip install 'dopsd\[train\]'; local files .*--test_file"
    ):
        load_task("gsm8k").problems("test", 1)


def test_a_countdown_with_numbers_for_columns(tmp_path: Path) -> None:
    task = load_task("countdown")
    rows = [{"input": "30, 100, 93", "output": 23}, {"input": "5,5", "output": 0}]
    read = task.read(write(tmp_path / "rows.jsonl", rows))
    assert read == [{"input": "30, 100, 93", "output": "23"}, {"input": "5,5", "output": "0"}]
    assert task.score(read[0], "<answer>30+93-100</answer>") == 1 and "30, 100, 93 into" in task.prompt(read[0])


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("countdown", {"input": "30,100,ninety"}, r"row 1: input '30,100,ninety' and output '23' are not 2 to 4 whole"),
        ("countdown", {"input": "1,2,3,4,5"}, "row 1: input"),
        ("countdown", {"output": "-3"}, "row 1: input"),
        ("countdown", {"output": "9" * 5000}, "row 1: input"),
        ("sudoku4x4", {"solution": "3142243142131321"}, "row 1: solution .* is no solved grid"),
        ("sudoku4x4", {"puzzle": "4102200002100320"}, "row 1: puzzle .* and solution .* disagree"),
        ("gsm8k", {"answer": ""}, "row 1 has no value for answer"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, name: str, changes: dict[str, str], sentence: str) -> None:
    path = write(tmp_path / "rows.jsonl", [EXAMPLES[name], EXAMPLES[name] | changes])
    with pytest.raises(ValueError, match=rf"rows\.jsonl: {sentence}"):
        load_task(name).read(path)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gsm8k", {"answer": "No mark, no number"}),
        ("gsm8k", {"answer": "#### many"}),
        ("gsm8k", {"answer": "#### 1/0"}),
        ("math", {"solution": "No box."}),
        ("math", {"solution": r"\boxed{}"}),
        ("countdown", {"output": "9999"}),
    ],
)
@pytest.mark.parametrize("grading", ["strict", "lenient"])
def test_a_gold_that_is_not_graded_as_correct_is_named(
    tmp_path: Path, name: str, changes: dict[str, str], grading: str
) -> None:
    row = EXAMPLES[name]
    path = write(tmp_path / "rows.jsonl", [row, row | changes, row, *[row | changes] * 6])
    with pytest.raises(RunError, match=r"rows\.jsonl: 7 of 9 rows .* correct: 1, 3, 4, 5, 6, \.\.\.$"):
        load(name, grading).read(path)


def test_a_row_without_a_gold_is_not_checked() -> None:
    class Never(type(load_task("countdown"))):  # type: ignore[misc]
        def gold(self, row: Mapping[str, str]) -> str | None:
            return None if row["output"] == "9999" else super().gold(row)

    rows = [{"input": "1,2", "output": "3"}, {"input": "1,2", "output": "9999"}]
    check_golds(Never(), rows)
    with pytest.raises(RunError, match=r"^rows: 1 of 2 .* correct: 1$"):
        check_golds(load_task("countdown"), rows)


# ---- the hub ----


def gsm8k_rows(count: int, first: int = 0) -> list[dict[str, str]]:
    return [{"question": f"What is {n} + 0?", "answer": f"It is {n}.\n#### {n:,}"} for n in range(first, first + count)]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[Any, ...]]:
    """A hub with small versions of the datasets; counts what is asked of it."""
    asked: Counter[tuple[Any, ...]] = Counter()
    math = [{"problem": f"{n}?", "level": "5", "solution": rf"\boxed{{{n}}}"} for n in range(400)]
    content = {
        ("openai/gsm8k", "main", "train"): gsm8k_rows(400),
        ("openai/gsm8k", "main", "test"): gsm8k_rows(50, 1000),
        ("DigitalLearningGmbH/MATH-lighteval", None, "train"): math,
        ("HuggingFaceH4/MATH-500", None, "test"): [row | {"problem": row["problem"] + "!"} for row in math[:50]],
    }
    datasets = pytest.importorskip("datasets")

    def load_dataset(path: str, name: str | None = None, *, split: str) -> Any:
        asked[path, name, split] += 1
        if (path, name, split) not in content:
            raise ConnectionError(f"no route\nto {path}")
        return datasets.Dataset.from_list(content[path, name, split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("name", ["gsm8k", "math"])
def test_datasets_of_the_hub(hub: Counter[tuple[Any, ...]], name: str) -> None:
    """Test rows are the dataset's own in order; the training set is shuffled, and a part of it kept for validation."""
    task = load(name)
    test, train, validation = (task.problems(split, 1000) for split in ("test", "train", "validation"))
    assert sum(hub.values()) == 3
    assert len(test) == 50 and task.problems("test", 7) == test[:7]
    assert len(train) + len(validation) == 400 and 10 < len(validation) < 60
    assert not {task.key(row) for row in train} & {task.key(row) for row in validation}
    again = task.problems("train", 1000, 1)
    assert again != train and sorted(map(task.key, again)) == sorted(map(task.key, train))
    assert task.problems("train", 20) == train[:20]
    assert draw(task, "train", 20, 0, train[:5]) == train[5:25]
    assert list(train[0]) == list(EXAMPLES[name])


def test_a_hub_that_can_not_be_reached_is_an_error(hub: Counter[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    task: Any = load_task("gsm8k")
    monkeypatch.setattr(type(task), "train_source", ("openai/gsm9k", "main", "train"))
    with pytest.raises(RunError, match=r"(?s)^openai/gsm9k, split train, can't be had .*ConnectionError.*--train_file"):
        task.problems("train", 1)


# ---- which rows a run has ----


def files(task: Task, **options: Any) -> dict[str, list[Mapping[str, str]]]:
    return cli.splits(task, TaskArguments(**options))


def test_without_files_rows_are_the_tasks_own(hub: Counter[Any]) -> None:
    task = load_task("gsm8k")
    rows = files(task, train_problems=100, validation_problems=10, eval_problems=20)
    for split, count in (("train", 100), ("validation", 10), ("test", 20)):
        assert rows[split] == task.problems(split, count)


def test_what_is_drawn_is_not_in_the_files(tmp_path: Path) -> None:
    """Rows of the test file and of the validation file are kept out of what is drawn, also those behind the cut."""
    task = load_task("countdown")
    train, validation = task.problems("train", 30), task.problems("validation", 20)
    test = str(write(tmp_path / "test.jsonl", [*train[:5], *validation[:5]]))
    rows = files(task, test_file=test, train_problems=20, validation_problems=10, eval_problems=2)
    assert rows == {"train": train[5:25], "validation": validation[5:15], "test": train[:2]}
    chosen = str(write(tmp_path / "validation.jsonl", train[10:12]))
    rows = files(task, test_file=test, validation_file=chosen, train_problems=10, eval_problems=20)
    assert rows["validation"] == train[10:12] and len(rows["test"]) == 10
    assert rows["train"] == [*train[5:10], *train[12:17]]


def test_a_training_file_gives_validation_rows_too(tmp_path: Path, hub: Counter[Any]) -> None:
    """Of a dataset, a part of the training file is set aside; rows of the test file are in neither part."""
    task = load_task("gsm8k")
    both = str(write(tmp_path / "train.jsonl", gsm8k_rows(200)))
    test = str(write(tmp_path / "test.jsonl", gsm8k_rows(20)))
    rows = files(task, train_file=both, test_file=test, validation_problems=5)
    assert not hub and len(rows["test"]) == 20 and len(rows["validation"]) == 5
    questions = {split: {row["question"] for row in part} for split, part in rows.items()}
    assert not questions["train"] & questions["validation"] | questions["test"] & (
        questions["train"] | questions["validation"]
    )
    assert {split_of(task.key(row), ("train", "validation")) for row in rows["train"]} == {"train"}
    few = str(write(tmp_path / "few.jsonl", rows["train"][:3]))
    with pytest.raises(RunError, match=r"few\.jsonl: 3 rows are too few to set some aside: give validation_file"):
        files(task, train_file=few, test_file=test)
    made = load_task("countdown")
    rows = files(made, train_file=str(write(tmp_path / "own.jsonl", [EXAMPLES["countdown"]])), validation_problems=3)
    assert rows["train"] == [EXAMPLES["countdown"]] and rows["validation"] == made.problems("validation", 3)


def test_the_grading_is_an_option_and_in_the_report() -> None:
    """Both commands have it, and both write down every option."""
    from dopsd.commands import parse_train
    from dopsd.evaluation.options import parse_evaluate

    assert parse_evaluate(["--grading", "strict"]).grading == "strict"
    assert parse_train(["--grading", "strict", "--output_dir", "x"])[1].grading == "strict"
    with pytest.raises(UsageError, match="grading"):
        parse_evaluate(["--grading", "kind"])
