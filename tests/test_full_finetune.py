"""Full fine-tuning: the network that is trained is the network, and its adapter's files are as safe as LoRA's."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_two_processes
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dopsd
from dopsd.commands import parse_train
from dopsd.errors import UsageError
from dopsd.memory.command import read_architecture
from dopsd.memory.dry_run import meta_networks
from dopsd.memory.options import parse_plan
from dopsd.models import (
    SHIPPED,
    STUDENT,
    adapter_parameters,
    add_copies,
    add_lora,
    load_adapter,
    load_model,
    quantization,
    save_adapter,
)
from dopsd.models.adapter import adapter_tensors
from dopsd.models.bidirectional import DiffusionModel
from dopsd.models.copies import layers
from dopsd.models.llada import LLaDAModelLM
from dopsd.sharding import gathered, held, shard, whole
from dopsd.teacher import TEACHER, TeacherWeights
from dopsd.trainer import Trainer

Make = Callable[..., Trainer]
TOKENS = torch.arange(14).view(2, 7)


def moved(model: nn.Module, adapter: str = STUDENT, seed: int = 1) -> dict[str, Tensor]:
    """An adapter's parameters, each a small step away from where it was."""
    generator = torch.Generator().manual_seed(seed)
    parameters = adapter_parameters(model, adapter)
    with torch.no_grad():
        for value in parameters.values():
            value += 0.1 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
    return parameters


def plain_name(name: str) -> str:
    """Of a copy's parameter, that of the parameter it is a copy of."""
    return name.removeprefix("base_model.model.").replace(".ln_tuning_layers", "")


def test_what_is_trained_is_the_network(small_llada: Callable[..., DiffusionModel]) -> None:
    """States and gradients, in fp64, are those of a network that has the copies' values for its own weights; without
    the copies, those of the weights as they were; an averaged teacher's, those between."""
    base, other = small_llada(), small_llada()
    student = add_copies(base)
    teacher = TeacherWeights(student, "ema", 0.75, from_adapter=False)
    parameters = moved(student)
    assert {plain_name(name) for name in parameters} == {
        name for name, _ in other.named_parameters() if "wte" not in name and name != "model.transformer.ff_out.weight"
    }
    assert all(value.requires_grad == (f".{STUDENT}." in name) for name, value in student.named_parameters())
    with student.disable_adapter(), torch.no_grad():
        assert torch.equal(base.hidden_states(TOKENS), other.hidden_states(TOKENS))
    teacher.after_update()
    before = dict(other.named_parameters())
    with torch.no_grad():
        for name, value in adapter_parameters(student, TEACHER).items():
            was, now = before[plain_name(name)], parameters[name]
            torch.testing.assert_close(value, 0.75 * was + 0.25 * now, rtol=1e-14, atol=1e-14)
        for name, value in parameters.items():
            before[plain_name(name)].copy_(value)
    states = [network.hidden_states(TOKENS) for network in (base, other)]
    torch.testing.assert_close(*states, rtol=0, atol=1e-13)
    for network in states:
        network.square().sum().backward()
    for name, value in parameters.items():
        torch.testing.assert_close(value.grad, before[plain_name(name)].grad, rtol=1e-10, atol=1e-10)
    with torch.no_grad():  # fused, where nothing is trained
        torch.testing.assert_close(base.hidden_states(TOKENS), states[1].detach(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_keep_every_bit(small_llada: Callable[..., DiffusionModel], tmp_path: Path, dtype: torch.dtype) -> None:
    """Copies of 16-bit weights are trained and kept in fp32, and rounded only where nothing is trained."""
    student = add_copies(small_llada(dtype=dtype))
    moved(student)
    tensors = adapter_tensors(student)
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    save_adapter(student, tmp_path / "saved", "a base", tensors)
    again = load_adapter(small_llada(dtype=dtype), str(tmp_path / "saved"), trainable=True)
    assert all(torch.equal(value, tensors[name]) for name, value in adapter_tensors(again).items())
    assert sum(p.numel() for p in again.parameters() if p.requires_grad) == sum(p.numel() for p in tensors.values())
    used = load_adapter(small_llada(dtype=dtype), str(tmp_path / "saved"), trainable=False)
    assert not any(value.requires_grad for value in used.parameters())
    assert all(torch.equal(value, tensors[name].to(dtype)) for name, value in adapter_tensors(used).items())
    used.merge_adapter()  # PEFT's, by which a model without an adapter is made of it
    assert all(layer.merged for layer in layers(used))


@pytest.mark.parametrize("teacher", ["fixed", "ema"])
def test_a_run(make_trainer: Make, random_model: Path, tmp_path: Path, teacher: str) -> None:
    """An update changes all that is trained, and nothing else; what it left starts another run."""
    argv = ("--model", str(random_model), "--full_finetune", "true", "--teacher", teacher, "--correct_only", "false")
    trainer = make_trainer(*argv, "--max_steps", "1")
    before = {name: value.detach().clone() for name, value in trainer.student.named_parameters()}
    trainer.train()
    changed = {name for name, value in trainer.student.named_parameters() if not torch.equal(value, before[name])}
    own = {name for name in before if f".{STUDENT}." in name}
    assert own and own <= changed and changed - own <= {name for name in before if f".{TEACHER}." in name}
    trainer.save_adapter(tmp_path / "first")
    more = make_trainer(*argv, "--adapter", str(tmp_path / "first"), "--max_steps", "1")
    first = load_file(tmp_path / "first" / "adapter_model.safetensors")
    fixed = {plain_name(name): value for name, value in adapter_parameters(more.student, TEACHER).items()}
    assert all(torch.equal(value, fixed[plain_name(name)]) for name, value in first.items())


def test_what_does_not_go_together_is_said(
    make_trainer: Make, random_model: Path, tmp_path: Path, small_llada: Callable[..., DiffusionModel]
) -> None:
    def refused(*words: str, said: tuple[str, ...]) -> None:
        with pytest.raises(UsageError) as error:
            make_trainer("--model", str(random_model), *words)
        assert all(word in str(error.value) for word in said), error.value

    refused("--full_finetune", "true", "--lora_alpha", "8", said=("lora_alpha=8", "not with full_finetune"))
    refused("--full_finetune", "true", "--quantize", "nf4", said=("quantize='nf4'", "full_finetune"))
    base = load_model(str(random_model))[0]
    save_adapter(student := add_lora(base, None, 4, 4, 0.0), tmp_path / "lora", "x", adapter_tensors(student))
    refused("--full_finetune", "true", "--adapter", str(tmp_path / "lora"), said=("full_finetune=True", "is LoRA"))
    base = load_model(str(random_model))[0]
    save_adapter(student := add_copies(base), tmp_path / "full", "x", adapter_tensors(student))
    refused("--adapter", str(tmp_path / "full"), said=("full_finetune=False", "all weights"))
    narrow = narrow_copy(random_model, tmp_path / "narrow")
    with pytest.raises(UsageError, match=r"full_finetune=True .*--bf16 true"):
        make_trainer("--model", str(narrow), "--full_finetune", "true")


@pytest.mark.parametrize(
    ("config", "tensor", "said"),
    [
        ({"target_modules": "model"}, None, "more than one module"),
        ({"target_modules": "nothing"}, None, "no layer that this model has"),
        ({"modules_to_save": ["lm_head"]}, None, "modules_to_save"),
        ({}, torch.full((16,), torch.nan), "no finite numbers"),
        ({}, torch.ones(17), r"\(17,\)"),
        ({}, torch.ones(16, dtype=torch.int64), "no finite numbers"),
    ],
)
def test_an_adapter_of_copies_is_checked(
    random_model: Path, tmp_path: Path, config: dict[str, Any], tensor: Tensor | None, said: str
) -> None:
    student = add_copies(load_model(str(random_model))[0])
    folder = tmp_path / "adapter"
    save_adapter(student, folder, "x", adapter_tensors(student))
    (folder / "manifest.json").unlink()
    file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    if tensor is not None:
        tensors = load_file(weights)
        save_file({**tensors, next(name for name in tensors if "ln_f" in name): tensor}, weights)
    with pytest.raises(UsageError, match=said):
        load_adapter(load_model(str(random_model))[0], str(folder), trainable=False)


def test_the_plan_counts_copies(random_model: Path) -> None:
    """fp32 ones, whatever the weights are."""
    model = parse_plan(["--model-config", str(random_model), "--full_finetune", "true", "--dtype", "bfloat16"])[1]
    network, _ = meta_networks(read_architecture(str(random_model)), model)
    tensors = adapter_tensors(add_copies(load_model(str(random_model))[0]))
    trained = [value for value in network.parameters() if value.requires_grad]
    assert sum(value.nbytes for value in trained) == sum(value.nbytes for value in tensors.values())


def test_an_export_has_the_copies(random_model: Path, tmp_path: Path) -> None:
    """In place of the weights they are of, rounded once; and no other tensor is another."""
    base: Any = load_model(str(random_model))[0].to(torch.bfloat16)
    student = add_copies(base)
    moved(student)
    tensors = adapter_tensors(student)
    save_adapter(student, tmp_path / "adapter", "x", tensors)
    model = narrow_copy(random_model, tmp_path / "base")
    dopsd.export(str(tmp_path / "adapter"), tmp_path / "merged", model=str(model))
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "merged"))
    copies = {plain_name(name).replace(f".{STUDENT}", ""): value.bfloat16() for name, value in tensors.items()}
    assert copies.keys() < before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], copies.get(name, value)), name


def narrow_copy(model: Path, folder: Path) -> Path:
    """A folder with ``model`` in bf16."""
    small: Any = load_model(str(model))[0]
    small.to(torch.bfloat16).save_pretrained(folder)
    for file in model.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def _same_gradients(student: Callable[[], Any]) -> None:
    """Of half the loss on each of two processes the sum of gradients is to the bit that of one: halves are exact."""
    alone, shared = student(), student()
    shard(shared.get_base_model(), torch.device("cpu"), 2)
    for each, weight in ((alone, 1.0), (shared, 0.5)):
        network = each.get_base_model()

        def loss(network: Any = network, weight: float = weight) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return weight * network.hidden_states(TOKENS).float().square().mean()

        network.compute(loss).backward()
    for (name, value), part in zip(alone.named_parameters(), shared.parameters(), strict=True):
        assert part.requires_grad == value.requires_grad
        if value.requires_grad:
            assert torch.equal(whole(part.grad), value.grad), name
    states = []
    for network in (alone.get_base_model(), shared.get_base_model()):
        with torch.no_grad(), gathered(network), torch.autocast("cpu", torch.bfloat16):
            states.append(network.hidden_states(TOKENS))
    assert torch.equal(*states)
    everything, own = held(shared)
    assert everything == sum(value.numel() for value in alone.parameters()) and abs(own / everything - 0.5) < 0.01


def _shared(rank: int) -> None:
    def quantised() -> Any:
        options = {"quantization_config": quantization("nf4"), "dtype": torch.bfloat16, "device_map": {"": "cpu"}}
        torch.manual_seed(0)
        student = add_lora(LLaDAModelLM.from_pretrained(SHIPPED["tiny"], **options), None, 4, 8, 0.0)
        moved(student)
        return student

    _same_gradients(lambda: add_copies(load_model("tiny")[0].to(torch.bfloat16)))
    if find_spec("bitsandbytes") is not None:
        _same_gradients(quantised)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_processes_share_weights_of_two_precisions(tmp_path: Path) -> None:
    """fp32 copies of bf16 weights; and where bitsandbytes is installed, NF4 weights as they are loaded, with LoRA."""
    in_two_processes(_shared, tmp_path)


def test_by_default_nothing_of_lora_is_kept() -> None:
    model = parse_train(["--full_finetune", "true"])[0]
    assert (model.lora_r, model.lora_alpha) == (128, 64)
