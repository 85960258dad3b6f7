"""Files that others have written, to run code here or to take all of the time or memory that there is."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .harness import RESUME, Bench, Case, require, reseal, run

SECONDS, MEMORY = 10.0, 1 << 30
HUGE = 999_999_999_999
DEEP = "[" * 100_000
PATTERN = "(.+)+-"

# What a file is given for: the command and its options.
Command = tuple[str, list[Any]]
Make = Callable[[Bench, Path], Command]


class Pickle:
    """Makes the file ``ran`` when it is read."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ran"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.path}'",)


def pickled(path: Path) -> None:
    torch.save(Pickle(path.parent), path)
    torch.save({"state": Pickle(path.parent)}, path)


# ---- adapters ----


def adapter(change: Callable[[Path], object], bench: Bench, folder: Path) -> Command:
    """One that a run has left, with a change."""
    for path in (bench.folder / "dopsd.train" / "run").glob("adapter_*"):
        shutil.copy(path, folder)
    change(folder)
    return "dopsd.evaluate", [*bench.evaluate(folder / "result.json"), "--adapter", folder]


def setting(file: str, **changes: Any) -> Callable[[Path], object]:
    """Some fields of a JSON file."""

    def change(folder: Path) -> None:
        fields = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        (folder / file).write_text(json.dumps({**fields, **changes}))

    return change


def content(file: str, text: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())


def only_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    pickled(folder / "adapter_model.bin")


def header(fields: Any, length: int | None = None) -> bytes:
    """The beginning of a safetensors file."""
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


A = "base_model.model.model.transformer.blocks.0.q_proj.lora_A.weight"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTERS: dict[str, Callable[[Path], object]] = {
    "pickle": only_pickle,
    "pickle under another name": lambda folder: pickled(folder / WEIGHTS),
    "target_modules": setting(CONFIG, target_modules=PATTERN),
    "exclude_modules": setting(CONFIG, exclude_modules=PATTERN),
    "layers_pattern": setting(CONFIG, layers_to_transform=[0], layers_pattern=[PATTERN], target_modules=["q_proj"]),
    "rank_pattern": setting(CONFIG, rank_pattern={PATTERN: 4}),
    "alpha_pattern": setting(CONFIG, alpha_pattern={PATTERN: 4}),
    "100000 patterns": setting(CONFIG, rank_pattern={f"{n}(.+)+-": 4 for n in range(100_000)}),
    "rank": setting(CONFIG, r=HUGE),
    "alpha": content(CONFIG, '{"peft_type": "LORA", "lora_alpha": 1e400, "target_modules": ["q_proj"]}'),
    "deep config": content(CONFIG, DEEP),
    "deep manifest": content("manifest.json", DEEP),
    "code": setting(CONFIG, auto_mapping={"base_model_class": "system", "parent_library": "os"}),
    "long header": content(WEIGHTS, header({}, HUGE)),
    "deep header": content(WEIGHTS, struct.pack("<Q", len(DEEP)) + DEEP.encode()),
    "huge tensor": content(
        WEIGHTS, header({A: {"dtype": "F32", "shape": [HUGE, HUGE], "data_offsets": [0, 4 * HUGE]}})
    ),
}


# ---- models ----


def model(change: Callable[[Path], object], bench: Bench, folder: Path) -> Command:
    """A small one, with a change."""
    shutil.copytree(bench.model, folder / "model")
    change(folder / "model")
    return "dopsd.evaluate", [*bench.evaluate(folder / "result.json"), "--model", folder / "model"]


def with_code(folder: Path) -> None:
    """Code that comes with a model, in place of transformers' own."""
    (folder / "code.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w')\n")
    classes = {"AutoConfig": "code.Config", "AutoModel": "code.Model", "AutoTokenizer": ["code.Tokenizer", None]}
    for file in ("config.json", "tokenizer_config.json"):
        setting(file, auto_map=classes)(folder)


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(Pickle(folder.parent), folder / "pytorch_model.bin")


def template(text: str) -> Callable[[Path], object]:
    return content("chat_template.jinja", text)


def pattern_of_tokens(folder: Path) -> None:
    """A tokenizer that splits by a pattern."""
    file = folder / "tokenizer.json"
    fields = json.loads(file.read_text())
    split = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    fields["pre_tokenizer"] = split
    file.write_text(json.dumps(fields))
    template("{{ 'x' * 40 }}")(folder)


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
MODELS: dict[str, Callable[[Path], object]] = {
    "pickle": as_pickle,
    "code": with_code,
    "deep config": content("config.json", DEEP),
    "deep tokenizer": content("tokenizer.json", DEEP),
    "deep tokenizer config": content("tokenizer_config.json", DEEP),
    "deep index": lambda folder: (
        (folder / "model.safetensors").unlink(),
        content("model.safetensors.index.json", DEEP)(folder),
    ),
    "layers": setting("config.json", n_layers=HUGE),
    "width": setting("config.json", d_model=HUGE),
    "vocabulary": setting("config.json", vocab_size=HUGE),
    "context": setting("config.json", max_sequence_length=HUGE),
    "mask": setting("config.json", mask_token_id=HUGE),
    "endless template": template(LOOPS),
    "template of code": template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "template of methods": template("{{ messages.__init__.__globals__ }}{{ messages.clear.__self__ }}"),
    "large template": template(f"{{{{ 'x' * {HUGE} }}}}"),
    "long prompts": template("{{ 'x' * 50000000 }}"),
    "template of itself": template("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
    "deep template": template("{{ " + "(" * 100_000),
    "pattern of tokens": pattern_of_tokens,
}


# ---- rows and recipes ----


def rows(name: str, text: Callable[[], str | bytes], task: str, bench: Bench, folder: Path) -> Command:
    content(name, text())(folder)
    return "dopsd.evaluate", [*bench.evaluate(folder / "result.json"), "--task", task, "--test_file", folder / name]


def recipe(text: Callable[[], str], bench: Bench, folder: Path) -> Command:
    content("recipe.yaml", text())(folder)
    return "dopsd.train", [*bench.train(folder / "run"), "--recipe", folder / "recipe.yaml"]


def parquet(bench: Bench, folder: Path) -> Command:
    """A hundred million values in a few kilobytes."""
    import pyarrow
    import pyarrow.parquet

    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 100_000, pyarrow.int8()), ["1" * 1000])
    table = pyarrow.table({"puzzle": column, "solution": column})
    with pyarrow.parquet.ParquetWriter(folder / "rows.parquet", table.schema, compression="zstd") as writer:
        for _ in range(1000):
            writer.write_table(table)
    return "dopsd.evaluate", [*bench.evaluate(folder / "result.json"), "--test_file", folder / "rows.parquet"]


LONG = 50_000_000
ROWS: dict[str, tuple[str, Callable[[], str | bytes], str]] = {
    "deep json": ("rows.json", lambda: DEEP, "sudoku"),
    "deep jsonl": ("rows.jsonl", lambda: f'{{"puzzle": {DEEP}', "sudoku"),
    "many objects": ("rows.json", lambda: "[" + "{}," * (LONG // 3) + "{}]", "sudoku"),
    "many lines": ("rows.jsonl", lambda: "{}\n" * (LONG // 3), "sudoku"),
    "many csv lines": ("rows.csv", lambda: "puzzle,solution\n" + "1,\n" * (LONG // 3), "sudoku"),
    "many columns": ("rows.csv", lambda: "," * LONG, "sudoku"),
    "long number": ("rows.json", lambda: f'[{{"puzzle": {"9" * 1_000_000}, "solution": 1}}]', "sudoku"),
    **{
        f"50 MB {part} of {task}": (
            "rows.json",
            lambda columns=columns, part=part: json.dumps(
                [{**columns, part: columns[part] * (LONG // len(columns[part]))}]
            ),
            task,
        )
        for task, columns in {
            "sudoku": {"puzzle": "1200341221434321", "solution": "1234341221434321"},
            "sudoku4x4": {"puzzle": "1200341221434321", "solution": "1234341221434321"},
            "gsm8k": {"question": "What is 1 + 1? ", "answer": "It is 2. #### 2"},
            "math": {"problem": "What is $1 + 1$? ", "solution": "It is $\\boxed{2}$. "},
            "countdown": {"input": "1,2,3", "output": "6"},
        }.items()
        for part in columns
    },
}
RECIPES: dict[str, Callable[[], str]] = {
    "aliases": lambda: (
        "a: &a [x]\n" + "\n".join(f"{chr(98 + n)}: &{chr(98 + n)} [{f'*{chr(97 + n)},' * 9}]" for n in range(20))
    ),
    "deep": lambda: f"model: {DEEP}",
    "code": lambda: "model: !!python/object/apply:os.system ['touch ran']",
    "long": lambda: "model: " + "x" * LONG,
    "many": lambda: "".join(f"a{n}: 1\n" for n in range(20_000)),
    "number": lambda: "lora_r: " + "1:" * 100_000 + "1",
    "file of code": lambda: "task: folder/code.py:Task",
}


# ---- runs and results ----


def checkpoint(change: Callable[[Path], object], bench: Bench, folder: Path) -> Command:
    """A run to go on with, whose newest checkpoint has a change that its manifest knows of."""
    shutil.copytree(bench.two_checkpoints(), folder, dirs_exist_ok=True)
    change(folder / "run" / "checkpoint-2")
    if not (folder / "run" / "checkpoint-2" / "unsealed").exists():
        reseal(folder / "run" / "checkpoint-2")
    return "dopsd.train", [*bench.train(folder / "run"), *RESUME]


def deep_manifest(folder: Path) -> None:
    for name in ("unsealed", "manifest.json"):
        content(name, DEEP)(folder)


CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    **{
        f"pickle as {name}": lambda folder, name=name: torch.save(Pickle(folder.parent.parent), folder / name)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "adapter_model.bin")
    },
    "deep state": content("trainer_state.json", DEEP),
    "deep slices": content("pending.json", DEEP),
    "slices": content("pending.json", '{"batch_size": 1, "slices": [[{"steps": [999999999999]}]], "sizes": {}}'),
    "deep manifest": deep_manifest,
    "deep report": lambda folder: content("report.json", DEEP)(folder.parent),
    "deep scores": lambda folder: content("held_out_before.json", DEEP)(folder.parent),
    "pickle as tensors": lambda folder: torch.save(Pickle(folder.parent.parent), folder / "adapter_model.safetensors"),
}


def compared(text: str, bench: Bench, folder: Path) -> Command:
    content("a.json", text)(folder)
    return "dopsd.evaluate", ["--compare", folder / "a.json", folder / "a.json"]


def journal(name: str, text: str, bench: Bench, folder: Path) -> Command:
    (folder / "result.json.partial").mkdir()
    content(name, text)(folder / "result.json.partial")
    return "dopsd.evaluate", bench.evaluate(folder / "result.json")


OTHERS: dict[str, Make] = {
    "deep results": partial(compared, DEEP),
    "results with a huge number": partial(compared, '{"results": [' + "9" * 1_000_000 + "]}"),
    "deep settings": partial(journal, "settings.json", DEEP),
    "deep line": partial(journal, "process-0.jsonl", f"{DEEP}\n"),
    "parquet": parquet,
}


def hostile(bench: Bench) -> list[Case]:
    """Every file above, each read by one command."""
    bench.whole("dopsd.train")
    bench.two_checkpoints()
    made: dict[str, Make] = {
        **{f"adapter: {name}": partial(adapter, change) for name, change in ADAPTERS.items()},
        **{f"model: {name}": partial(model, change) for name, change in MODELS.items()},
        **{f"rows: {name}": partial(rows, *about) for name, about in ROWS.items()},
        **{f"recipe: {name}": partial(recipe, text) for name, text in RECIPES.items()},
        **{f"checkpoint: {name}": partial(checkpoint, change) for name, change in CHECKPOINTS.items()},
        **OTHERS,
    }
    return [Case(name, partial(harmless, bench, make)) for name, make in made.items()]


def confined(folder: Path) -> None:
    """What goes wrong must not take the machine along."""
    os.chdir(folder)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 4 * MEMORY,) * 2)


def harmless(bench: Bench, make: Make, folder: Path) -> None:
    module, argv = make(bench, folder)
    ended = run(module, *argv, fault=partial(confined, folder), limit=9 * SECONDS)
    require(not (folder / "ran").exists(), "code was run")
    require(ended.status == 0 or ended.error, "")
    require(ended.busy <= SECONDS, f"it took {ended.busy:.1f} seconds")
    require(ended.memory <= MEMORY, f"it took {ended.memory >> 20} MiB")
