"""PEFT adapters: which layers get a fresh one, and the checks before one is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LNTuningConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dopsd import checkpoints
from dopsd.errors import RunError, must_be, require
from dopsd.files import first_line, read_json, replacing, sha256, write_json
from dopsd.limits import limited
from dopsd.models.bidirectional import DiffusionModel
from dopsd.models.copies import PREFIX, attach
from dopsd.sharding import part_of, whole

# The name of the adapter that is trained: PEFT's default, so that what is saved loads anywhere.
STUDENT = "default"

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Sets of linear layers, by the name ``--lora_targets`` takes.
LORA_PRESETS = {"reference": ("q_proj", "k_proj", "v_proj", "up_proj")}

# By kind, fields of an adapter's config that say what it computes; and those of all that do not matter here.
READ = {
    "LORA": (
        *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    ),
    "LN_TUNING": ("target_modules", "exclude_modules"),
}
ABOUT = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config")
# Values of others, beside nothing and their defaults. Weights drawn in yet other ways go with a change of the model's.
ALSO = {"peft_type": tuple(READ), "task_type": ("CAUSAL_LM",), "init_lora_weights": ("gaussian", "orthogonal")}


def add_lora(model: DiffusionModel, targets: Sequence[str] | None, r: int, alpha: int, dropout: float) -> PeftModel:
    """``model`` with a fresh LoRA adapter on ``targets``: names of its linear layers or presets (None: all of them).

    Raises:
        UsageError: a target that the model does not have, or a rank above the width of its layers.
    """
    names: list[str] = []
    for target in model.lora_modules if targets is None else targets:
        names += LORA_PRESETS.get(target, (target,))
    for name in names:
        known = ", ".join((*model.lora_modules, *LORA_PRESETS))
        require(name in model.lora_modules, "lora_targets", name, f"this model has {known}")
    layers: list[Any] = [layer for layer in model.modules() if hasattr(layer, "in_features")]
    widest = max(max(layer.in_features, layer.out_features) for layer in layers)
    must_be(r <= widest, "lora_r", r, f"at most {widest}, the width of this model's widest layer")
    pattern = f"{model.lora_path}({'|'.join(map(re.escape, names))})"
    return get_peft_model(
        model, LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=pattern, bias="none")
    )


@contextmanager
def merged_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, a layer with an adapter computes one product in place of three: its weights are a copy with that added.

    The copy has the dtype in which products are computed. On the way out the layers' own weights are back, which no
    subtraction would give exactly. Layers of 16-bit or quantised weights compute as before: their sum with an adapter
    would be rounded to a grid on which they already are, and an adapter of less than half its spacing would be lost.
    """
    layers: list[Any] = [layer for layer in model.modules() if type(layer) is LoraLinear]
    own: list[tuple[Any, nn.Parameter]] = []
    try:
        for layer in layers:
            base, names = layer.get_base_layer(), [name for name in layer.active_adapters if name in layer.lora_A]
            weight, kind = base.weight, base.weight.device.type
            wide = weight.dtype in (torch.float32, torch.float64)
            if layer.disable_adapters or layer.merged or layer.lora_variant or not wide or not names:
                continue
            with torch.no_grad(), torch.autocast(kind, enabled=False):
                summed = sum((layer.get_delta_weight(name) for name in names), start=weight)
            if torch.is_autocast_enabled(kind) and weight.dtype == torch.float32:
                summed = summed.to(torch.get_autocast_dtype(kind))
            own.append((layer, weight))
            base.weight, layer.merged_adapters = nn.Parameter(summed, requires_grad=False), names
        yield
    finally:
        for layer, weight in own:
            layer.get_base_layer().weight, layer.merged_adapters = weight, []


def adapter_parameters(student: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """Those of one adapter, by their name without the adapter's."""
    everything = of_adapters(student).items()
    return {name.replace(f".{adapter}.", "."): value for name, value in everything if f".{adapter}." in name}


def of_adapters(student: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of all adapters of ``student``."""
    return {
        name: parameter for name, parameter in student.named_parameters() if ".lora_" in name or f".{PREFIX}." in name
    }


def adapter_tensors(student: PeftModel) -> dict[str, Tensor]:
    """All adapters of ``student`` by the names of its parameters, whole; all processes call it."""
    return {name: whole(parameter) for name, parameter in of_adapters(student).items()}


def save_adapter(student: PeftModel, folder: Path, base: str, tensors: Mapping[str, Tensor]) -> str:
    """Write the adapter of ``student`` to ``folder``, with a manifest; return the hash of its tensors' file.

    Its config names the ``base`` model as it was named, and not where that lies on this disk. ``tensors`` are
    :func:`adapter_tensors`.
    """
    with replacing(folder) as part:
        student.save_pretrained(str(part), selected_adapters=[STUDENT], state_dict=tensors)
        write_json(part / CONFIG, {**read_json(part / CONFIG), "base_model_name_or_path": base})
        checkpoints.seal(part)
    return sha256(folder / WEIGHTS)


def load_adapter(model: DiffusionModel, adapter: str, trainable: bool) -> PeftModel:
    """``model`` with the PEFT adapter in the folder ``adapter``, whose every tensor is there, fits and is finite.

    Raises:
        UsageError: no adapter there, one that is neither LoRA nor a full fine-tuning's copies, or tensors other than
            those that its config and the model make; the sentence names the file and the tensor.
        RunError: a file that can't be read, or a config that takes too long.
    """
    settings, weights = adapter_files(adapter)
    check_manifest(adapter)
    config = adapter_config(adapter, read_json(settings))
    with opened("adapter", adapter, weights) as tensors:
        check_tensors(model, adapter, config, tensors)
    if isinstance(config, LoraConfig):
        return PeftModel.from_pretrained(model, Path(adapter), STUDENT, is_trainable=trainable, config=config)
    config.inference_mode = not trainable
    student = attach(model, config)
    with opened("adapter", adapter, weights) as tensors:
        restore(student, STUDENT, tensors)
    return student


def check_saved(student: PeftModel, checkpoint: str) -> None:
    """Check the tensors of a checkpoint, all adapters of ``student`` included, as :func:`load_adapter` does.

    Raises:
        UsageError: they are not those of the ``student``, or not finite.
        RunError: a file that can't be read.
    """
    for name in student.peft_config:
        own = get_peft_model_state_dict(student, adapter_name=name)
        shapes = {key: tuple(value.shape) for key, value in own.items()}
        with opened("resume_from_checkpoint", checkpoint, weights_of(checkpoint, name)) as tensors:
            fit(shapes, "resume_from_checkpoint", checkpoint, tensors)


def restore_adapters(student: PeftModel, checkpoint: str) -> None:
    """Give all adapters of ``student`` the values of a checkpoint that :func:`check_saved` has passed."""
    for name in student.peft_config:
        with opened("resume_from_checkpoint", checkpoint, weights_of(checkpoint, name)) as tensors:
            restore(student, name, tensors)


@torch.no_grad()
def restore(student: PeftModel, name: str, tensors: Any) -> None:
    """Give the adapter ``name`` of ``student`` the values of an open file, whose tensors are its own."""
    parameters = dict(student.named_parameters())
    for key in tensors.keys():  # noqa: SIM118 (no mapping)
        module, _, last = key.rpartition(".")
        parameter = parameters[f"{module}.{name}.{last}"]
        parameter.copy_(part_of(tensors.get_tensor(key), parameter))


def weights_of(checkpoint: str, name: str) -> Path:
    """The file of the adapter ``name``: the student's in the folder itself, others' in one of their name."""
    return Path(checkpoint, "" if name == STUDENT else name, WEIGHTS)


@contextmanager
def opened(argument: str, given: str, weights: Path) -> Iterator[Any]:
    """An open file of tensors; RunError if it is none."""
    try:
        with safe_open(weights, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise RunError(f"{argument}={given!r}: {WEIGHTS} can't be read: {first_line(error)}") from error


def check_manifest(adapter: str) -> None:
    """Raise RunError if an adapter that was sealed is not what was saved; others are taken as they are."""
    folder = Path(adapter)
    if not (folder / checkpoints.MANIFEST).is_file():
        return
    files = checkpoints.read_manifest(folder).files
    missing = [name for name in (CONFIG, WEIGHTS) if name not in files]
    why = checkpoints.altered(folder, {name: files[name] for name in (CONFIG, WEIGHTS) if name in files})
    if missing or why is not None:
        why = why or f"it was saved without {missing[0]}"
        raise RunError(f"adapter={adapter!r}: {why}, as its {checkpoints.MANIFEST} has it")


def adapter_files(adapter: str) -> tuple[Path, Path]:
    """The two files that an adapter is read from; UsageError if they are not there."""
    settings, weights = Path(adapter) / CONFIG, Path(adapter) / WEIGHTS
    present = settings.is_file() and weights.is_file()
    must_be(present, "adapter", adapter, f"a folder with {CONFIG} and {WEIGHTS}")
    return settings, weights


def adapter_config(adapter: str, fields: Mapping[str, Any]) -> LoraConfig | LNTuningConfig:
    """That of a config's ``fields``; UsageError if LoRA is more than two products and a scale."""
    kind = "LN_TUNING" if fields.get("peft_type") == "LN_TUNING" else "LORA"
    made: type[LoraConfig | LNTuningConfig] = LNTuningConfig if kind == "LN_TUNING" else LoraConfig
    plain = made().to_dict()
    for name, value in fields.items():
        known = name in (*READ[kind], *ABOUT) or not value or value in (plain.get(name), *ALSO.get(name, ()))
        hint = f"its {CONFIG} says {name}={value!r}, and plain LoRA and copies of modules alone are read"
        require(known, "adapter", adapter, hint)
    try:
        config = made(**{name: fields[name] for name in READ[kind] if name in fields})
        fine = isinstance(config, LNTuningConfig) or sound(config)
    except (ValueError, TypeError, OverflowError) as error:
        raise RunError(f"adapter={adapter!r}: {CONFIG} can't be used: {first_line(error)}") from error
    require(fine, "adapter", adapter, f"{CONFIG} has a rank, alpha or dropout that is none")
    return config


def sound(config: LoraConfig) -> bool:
    """Whether ranks, scales and dropout are numbers that these can be."""
    ranks, scales = (
        [first, *dict(others or {}).values()]
        for first, others in ((config.r, config.rank_pattern), (config.lora_alpha, config.alpha_pattern))
    )
    fine = all(type(rank) is int and rank > 0 for rank in ranks)
    return fine and all(map(math.isfinite, scales)) and 0 <= config.lora_dropout < 1


def check_tensors(model: nn.Module, adapter: str, config: LoraConfig | LNTuningConfig, tensors: Any) -> None:
    """Raise UsageError unless an open file's ``tensors`` are those that ``config`` makes for ``model``, and finite."""
    modules = dict(model.named_modules())
    if isinstance(config, LoraConfig):
        for key in tensors.keys():  # noqa: SIM118 (no mapping)
            found = re.fullmatch(r"base_model\.model\.(.*)\.lora_([AB])\.weight", key)
            require(
                found is not None, "adapter", adapter, f"its tensors are lora_A and lora_B weights, and {key} is not"
            )
            name = found[1]  # type: ignore[index]
            known = hasattr(modules.get(name), "in_features")
            require(known, "adapter", adapter, f"it adapts {name}, which is no linear layer of this model")
    expected = adapted(modules, adapter, config)
    require(bool(expected), "adapter", adapter, f"{CONFIG} names no layer that this model has")
    fit(expected, "adapter", adapter, tensors)


def fit(expected: Mapping[str, tuple[int, ...]], argument: str, given: str, tensors: Any) -> None:
    """Raise UsageError unless an open file's ``tensors`` have the ``expected`` names and shapes, and are finite."""
    stored = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118 (no mapping)
    for key, shape in stored.items():
        require(key in expected, argument, given, f"{WEIGHTS} has {key}, which {CONFIG} does not name")
        hint = f"{WEIGHTS}: {key} is {shape}, and {CONFIG} and this model make it {expected[key]}"
        require(shape == expected[key], argument, given, hint)
    missing = [key for key in expected if key not in stored]
    more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
    require(not missing, argument, given, f"{WEIGHTS} has no {''.join(missing[:1])}{more}")
    for key in stored:
        tensor = tensors.get_tensor(key)
        finite = tensor.is_floating_point() and bool(tensor.float().isfinite().all())
        require(finite, argument, given, f"{WEIGHTS}: {key} has values that are no finite numbers")


def adapted(
    modules: Mapping[str, nn.Module], adapter: str, config: LoraConfig | LNTuningConfig
) -> dict[str, tuple[int, ...]]:
    """The tensors that ``config`` makes for a model of these ``modules``, with their shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        with limited(f"adapter={adapter!r}: finding the layers that {CONFIG} names"):
            names = [name for name in modules if check_target_module_exists(config, name)]
            ranks = ranks_of(config, names) if isinstance(config, LoraConfig) else dict.fromkeys(names, 0)
    except (re.error, TypeError, ValueError, RecursionError, OverflowError) as error:
        raise RunError(f"adapter={adapter!r}: {CONFIG} has names or patterns that are none: {error}") from error
    for name, rank in ranks.items():
        layer: Any = modules[name]
        if isinstance(config, LoraConfig):
            linear = hasattr(layer, "in_features")
            require(linear, "adapter", adapter, f"{CONFIG} names {name}, which is no linear layer")
            shapes[f"base_model.model.{name}.lora_A.weight"] = (rank, layer.in_features)
            shapes[f"base_model.model.{name}.lora_B.weight"] = (layer.out_features, rank)
        else:
            single = not list(layer.children())
            require(single, "adapter", adapter, f"{CONFIG} names {name}, which is more than one module")
            for key, parameter in layer.named_parameters():
                shapes[f"base_model.model.{name}.{PREFIX}.{key}"] = tuple(parameter.shape)
    return shapes


def ranks_of(config: LoraConfig, names: Sequence[str]) -> dict[str, int]:
    """The rank of each of these layers."""
    by_rank, by_alpha = config.rank_pattern or {}, list(config.alpha_pattern or {})
    for name in names:
        get_pattern_key(by_alpha, name)  # as PEFT will
    return {name: by_rank.get(get_pattern_key(list(by_rank), name), config.r) for name in names}
