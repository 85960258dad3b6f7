"""A model with an adapter in its weights: the files of its checkpoint, in which the adapted tensors are others."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dopsd.config import option
from dopsd.errors import RunError, UsageError, must_be, require
from dopsd.files import PART, replacing, sha256, write_text
from dopsd.model_card import CARD_FILE, base_line, base_model, short, table
from dopsd.models import SHIPPED, STUDENT, adapter_files, check_model, load_adapter, load_model
from dopsd.models.checkpoint import INDEX, WEIGHTS, tensors_of
from dopsd.parser import Parser
from dopsd.recorded import Recorded, recorded, some
from dopsd.run_folder import finished

log = logging.getLogger(__name__)

Change = Callable[[Tensor], Tensor]  # from a tensor of the base model to what it is with the adapter

# What a checkpoint has beside its weights: configurations, the tokenizer, the publisher's code, licenses.
COPIED = ("*.json", "*.jinja", "*.model", "*.py", "*.txt", "LICENSE*", "NOTICE*")
# Of how a run loaded its base model, what it can't be loaded without.
NEEDED = ("mask_token_id", "shift_logits", "block_size")
LENGTHS = ("gen_length", "block_length", "steps")
MERGEABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The share of an adapter that rounding keeps below which that is a warning.
KEPT = 0.95

CARD = """\
---
{base_line}library_name: transformers
pipeline_tag: text-generation
tags: [diffusion-language-model, d-opsd]
# license: to be filled in. It is that of the base model, of which these are the files.
---
# {title}, with an adapter merged in

These are the files of {base}. {weights} of its tensors are what an adapter
(`adapter_model.safetensors`, sha256 `{digest}`) makes of them, rounded once, to {dtype}, which leaves {kept:.1%} of
what it changed. Names, shapes and all other tensors and files are the base model's own, but for this page. If it comes
with code (`*.py`), that was copied and not run.
{results}
## How to load it

Wherever the base model is loaded, and in the same way. With d-OPSD (the Python package `dopsd`), beside this folder:

```python
import dopsd

model = dopsd.load({folder!r}{loading})
(sample,) = model.generate(["..."]{decoding})
print(sample.text)
```
"""
RESULTS = """
## Results

Of the base model with the adapter beside it, before they were merged:

{table}

Percent of {problems} held-out problems of the task `{task}`, decoded greedily, with 95% intervals.
"""


@dataclass
class ExportArguments:
    """What is merged, and where it goes."""

    output_dir: str | None = option(None, "A new folder, or an empty one; it has to be given.")
    model: str | None = option(
        None,
        "The base model into whose weights the adapter is merged: one that ships, a folder or a hub id; none: the one "
        "that it was trained over.",
    )


class Merged(NamedTuple):
    """What became of the adapted weights.

    ``kept`` is the share of the adapter that is in them, which rounding to few bits lowers: how far they have moved
    along it, over its own length.
    """

    weights: int
    dtype: str
    kept: float


def main(argv: Sequence[str]) -> None:
    """Parse, merge, say what came of it."""
    description = "A run's adapter merged into its base model: a checkpoint that takes the base's place."
    parser = Parser(ExportArguments, prog="python -m dopsd.export", description=description)
    parser.usage = "%(prog)s RUN [--OPTION VALUE ...]"
    parser.add_argument("run", metavar="RUN", help="The folder of a run, one of its checkpoints, or a PEFT adapter's.")
    args, named = parser.parse(argv)
    must_be(args.output_dir is not None, "output_dir", args.output_dir, "a new folder")
    export(named.run, Path(args.output_dir), args.model)


def export(source: str, output: Path, model: str | None) -> None:
    """Write the base model of the adapter in ``source``, with that merged into its weights, to ``output``.

    Raises:
        UsageError: no adapter, no base model, one that the adapter does not fit, or a folder that is not empty.
        RunError: files that can't be read or written.
    """
    weights = adapter_files(source)[1]
    said = recorded(Path(source)) or Recorded(Path(source))
    base = base_of(source, said, model)
    free = not output.exists() or (output.is_dir() and {path.name for path in output.iterdir()} <= {PART})
    must_be(free, "output_dir", str(output), "a new folder, or an empty one")
    check_model(base)
    tensors = tensors_of(base, str(SHIPPED.get(base, base)))
    files = sorted({name for name, _ in tensors.values()})
    folder = folder_of(base, files)
    others = [path for path in sorted(folder.iterdir()) if path.is_file() and copied(path.name, files)]
    check_room(output, [*others, *(folder / name for name in files)])
    network, _ = load_model(base, **some(said.model, *NEEDED))
    load_adapter(network, source, trainable=True)  # with all of its bits
    changes = changed(network, base, tensors)
    with replacing(output) as part:
        merged = merge_files(folder, part, files, changes)
        for path in others:
            shutil.copyfile(path, part / path.name)
        write_text(part / CARD_FILE, card(output.name, said, base, sha256(weights), merged, finished(Path(source))))
    log.info("%s: %s with an adapter merged into %d weights", output, base, len(changes))
    if merged.kept < KEPT:
        hint = "evaluate the folder before it is served"
        log.warning("rounding to %s has left %.0f %% of the adapter: %s", merged.dtype, 100 * merged.kept, hint)


def base_of(source: str, said: Recorded, model: str | None) -> str:
    """The base model: the one that is named, or else the one that the adapter was trained over.

    Raises:
        UsageError: nothing says which, or it was trained over weights that no file has.
    """
    if model is not None:
        return model
    base, quantize = said.model.get("model"), said.model.get("quantize", "none")
    if base is None:
        raise UsageError(f"model has to be given: {source} does not say which model its adapter is for")
    hint = f"{said.file} says that it was trained over such weights; --model {base} merges it into those of the files"
    require(quantize == "none", "quantize", quantize, f"{hint}, which are others, so evaluate what comes of it")
    return str(base)


def changed(network: Any, base: str, tensors: Collection[str]) -> dict[str, Change]:
    """What an adapter makes of the tensors that it is for, by their names among a checkpoint's ``tensors``.

    Raises:
        UsageError: one has none of its own there.
    """
    changes: dict[str, Change] = {}
    embedding = network.get_input_embeddings().weight
    for module, layer in network.named_modules():
        if isinstance(layer, LoraLayer):
            found: dict[str, Change] = {"weight": partial(with_lora, layer)}
        elif isinstance(layer, LNTuningLayer):
            copies = layer.ln_tuning_layers[STUDENT].named_parameters()
            found = {name: partial(with_copy, copy) for name, copy in copies}
        else:
            continue
        for parameter, change in found.items():
            name = f"{module}.{parameter}"
            own = name in tensors and layer.get_base_layer().weight is not embedding
            hint = f"{name}, which the adapter is for, is no tensor of its own in that model's files"
            require(own, "model", base, hint)
            changes[name] = change
    return changes


def with_lora(layer: Any, own: Tensor) -> Tensor:
    """A weight ``own`` (out, in) with an adapter's products added, in fp32 at least."""
    return own + layer.get_delta_weight(STUDENT)


def with_copy(copy: Tensor, own: Tensor) -> Tensor:
    """What a parameter ``own`` was trained to be, of its shape, in fp32 at least."""
    return copy


def folder_of(model: str, weights: Sequence[str]) -> Path:
    """The folder with all files of a model; RunError if some of its ``weights`` lie in folders within."""
    apart = [name for name in weights if Path(name).name != name]
    if apart:
        raise RunError(f"model={model!r}: {INDEX} names {apart[0]}, which is not in the same folder")
    path = Path(SHIPPED.get(model, model))
    if path.is_dir():
        return path
    return Path(snapshot_download(model, allow_patterns=[*COPIED, *weights], ignore_patterns="*/*"))


def copied(name: str, weights: Collection[str]) -> bool:
    """Whether a file of a checkpoint with these ``weights`` goes along as it is."""
    if name.endswith(".index.json"):
        return name == INDEX and WEIGHTS not in weights
    return any(fnmatch(name, pattern) for pattern in COPIED)


def check_room(output: Path, files: Sequence[Path]) -> None:
    """Raise RunError unless files as large as these can be written to ``output``."""
    needed = sum(path.stat().st_size for path in files)
    free = shutil.disk_usage(next(path for path in (output, *output.absolute().parents) if path.is_dir())).free
    if needed > free:
        raise RunError(f"{output} can't be written: it takes {needed >> 20} MiB, and {free >> 20} MiB are free there")


@torch.no_grad()
def merge_files(source: Path, target: Path, files: Sequence[str], changes: Mapping[str, Change]) -> Merged:
    """Write these ``files`` of tensors again, those with ``changes`` as these make them.

    Sums have fp32 at least, and are rounded once, to the dtype that the tensor has. At any time one file is in memory.

    Raises:
        RunError: a sum that is no finite number, or a dtype without sums.
    """
    lost = length = 0.0
    dtypes = set()
    for file in files:
        with safe_open(source / file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            metadata = opened.metadata()
        for name, own in tensors.items():  # (out, in), or of a norm or bias (d,), if an adapter is for it
            if name not in changes:
                continue
            if own.dtype not in MERGEABLE:
                raise RunError(f"{source / file}: {name} is {own.dtype}, to which nothing can be added")
            exact = changes[name](own)  # in fp32 at least
            tensors[name] = rounded = exact.to(own.dtype)
            if not rounded.isfinite().all():
                raise RunError(f"{source / file}: {name} with the adapter added has values that are no finite numbers")
            moved = exact - own
            lost += float(((exact - rounded) * moved).sum())
            length += float(moved.square().sum())
            dtypes.add(str(own.dtype).removeprefix("torch."))
        save_file(tensors, target / file, metadata)
        shutil.copymode(source / file, target / file)  # which may be one that a server's user can't read
    return Merged(len(changes), " and ".join(sorted(dtypes)), 1 - lost / length if length else 1.0)


def card(folder: str, said: Recorded, base: str, digest: str, merged: Merged, report: Mapping[str, Any] | None) -> str:
    """The card of a ``folder`` with a base model and an adapter, of which ``said`` and a run's ``report`` are known."""
    loading = {**some(said.model, *NEEDED), **some(said.task, "prefill")}
    results = ""
    if report is not None:
        task = short(report["config"]["task"]["task"])
        results = RESULTS.format(table=table(report["tokens_per_step"]), problems=report["eval_problems"], task=task)
    return CARD.format(
        base_line=base_line(base, "finetune"),
        title=short(base),
        base=base_model(base),
        **merged._asdict(),
        digest=digest,
        results=results,
        folder=folder,
        loading=arguments({name: value for name, value in loading.items() if value is not None and value is not False}),
        decoding=arguments(some(said.rollout, *LENGTHS)),
    )


def arguments(options: Mapping[str, Any]) -> str:
    """Further arguments of a call."""
    return "".join(f", {name}={value!r}" for name, value in options.items())
