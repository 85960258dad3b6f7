"""Reading what a checkpoint's files say before anything is loaded from them, so that errors name the file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, Qwen2Tokenizer
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file

from dopsd.errors import RunError, UsageError, require
from dopsd.files import first_line, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

# Tokenizer classes that checkpoints bring as code, and the transformers class that reads the same files.
TOKENIZERS = {"DreamTokenizer": Qwen2Tokenizer}


def read_config(model: str, path: str, shipped: Collection[str]) -> dict[str, Any]:
    """``config.json`` of a local folder or a hub model.

    Raises:
        UsageError: there is none.
        RunError: it is not JSON.
    """
    local = Path(path) / "config.json"
    if Path(path).exists() or path.startswith((".", "/", "~")):
        require(local.is_file(), "model", model, f"a model folder holds a config.json, and {Path(path)} does not")
    else:
        try:
            local = Path(str(cached_file(path, "config.json")))
        except OSError as error:
            raise UsageError(
                f"model={model!r} can't be used: it is neither {', '.join(shipped)}, nor a folder, nor a hub model "
                f"that can be read ({first_line(error)})"
            ) from error
    return read_json(local)


def tensors_of(model: str, path: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor of a checkpoint: the name of its file, and its shape.

    Args:
        model: as the user named it.
        path: a folder or hub id with ``model.safetensors``, or several such files and an index.

    Raises:
        RunError: no safetensors file, an index or a file that can't be read, or files other than the index says.
    """

    def found(name: str) -> Path | None:
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        return None if file is None else Path(file)

    def fail(problem: str) -> RunError:
        return RunError(f"model={model!r} can't be loaded: {problem}")

    weight_map: dict[str, str] = {}
    names = [WEIGHTS]
    if found(WEIGHTS) is None:
        index = found(INDEX)
        if index is None:
            pickled = [name for name in PICKLES if found(name) is not None]
            if pickled:
                raise fail(f"{pickled[0]} is a pickle, which can run code; only safetensors files are read")
            raise fail(f"it has neither {WEIGHTS} nor {INDEX}")
        content = read_json(index).get("weight_map")
        if not isinstance(content, dict) or not content:
            raise fail(f"{INDEX} has no weight_map")
        weight_map = content
        names = sorted(set(weight_map.values()))
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in names:
        file = found(name)
        if file is None:
            raise fail(f"{INDEX} names {name}, and there is no such file")
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (no mapping)
                    tensors[key] = (name, tuple(opened.get_slice(key).get_shape()))
        except SafetensorError as error:
            raise fail(f"{name} is no complete safetensors file: {first_line(error)}") from error
    for key, name in weight_map.items():
        if tensors.get(key, ("",))[0] != name:
            raise fail(f"{INDEX} says that {key} is in {name}, and it is not")
    return tensors


def check_layers(model: str, fields: Mapping[str, Any], tensors: Collection[str]) -> None:
    """Raise RunError if ``config.json`` has more layers than there are tensors: making them could take for ever."""
    for name in ("n_layers", "num_hidden_layers"):
        layers = fields.get(name)
        if isinstance(layers, int | float) and layers > len(tensors):
            raise RunError(
                f"model={model!r}: config.json says {name}={layers}, and its files have {len(tensors)} tensors"
            )


def check_loaded(
    model: str, info: Mapping[str, Collection[Any]], tensors: Mapping[str, tuple[str, tuple[int, ...]]]
) -> None:
    """Raise RunError unless a checkpoint's tensors are exactly those of the network that was made from its config.

    Args:
        model: as the user named it.
        info: transformers' ``output_loading_info``.
        tensors: from :func:`tensors_of`.
    """
    for problem in ("missing", "unexpected", "mismatched"):
        entries = sorted(info[f"{problem}_keys"])
        if not entries:
            continue
        descriptions = []
        for entry in entries[:3]:
            if problem == "mismatched":
                key, stored, wanted = entry
                file = tensors[key][0] if key in tensors else "its file"
                descriptions.append(f"{key} is {tuple(stored)} in {file}, and config.json makes it {tuple(wanted)}")
            else:
                descriptions.append(f"{entry} (in {tensors[entry][0]})" if entry in tensors else str(entry))
        shown = ", ".join(descriptions) + (", ..." if len(entries) > 3 else "")
        raise RunError(f"model={model!r}: its weights have {len(entries)} {problem} keys: {shown}")


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a checkpoint; no code that comes with one is run."""
    name = get_tokenizer_config(path, trust_remote_code=False).get("tokenizer_class")
    return TOKENIZERS.get(str(name), AutoTokenizer).from_pretrained(path, trust_remote_code=False)
