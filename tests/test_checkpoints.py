"""Checkpoint files of every family: round trips, broken files, quantization options, and the method on top of them."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from dopsd import models, run
from dopsd.assets.pretrain import character_tokenizer
from dopsd.errors import RunError, UsageError
from dopsd.evaluation import command as evaluate
from dopsd.models import add_lora, load_adapter, load_model, quantization
from dopsd.models.bidirectional import DiffusionModel
from dopsd.models.dream import DreamConfig, DreamModel
from dopsd.models.llada import LLaDAConfig, LLaDAModelLM
from dopsd.objective import Objective
from dopsd.sampler import Decoding, decode
from dopsd.step_batch import step_batches
from dopsd.teacher import TeacherWeights

QWEN_NAMES = {
    "vocab_size": 25,
    "hidden_size": 24,
    "intermediate_size": 41,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 128,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def llada(**changes: Any) -> LLaDAModelLM:
    sizes = {"vocab_size": 25, "d_model": 24, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 41, "init_std": 0.3}
    ids = {"mask_token_id": 1, "eos_token_id": 0, "pad_token_id": 0, "max_sequence_length": 128, "weight_tying": False}
    return LLaDAModelLM(LLaDAConfig(**{**sizes, **ids, **changes}))


def dream(**changes: Any) -> DreamModel:
    return DreamModel(DreamConfig(**{**QWEN_NAMES, "mask_token_id": 1, **changes}))


# Multi-head, grouped and multi-query attention, tied and untied, in either family and in transformers' own.
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llada": llada,
    "llada, 2 key heads, tied": lambda: llada(n_kv_heads=2, weight_tying=True),
    "llada, more rows than tokens": lambda: llada(embedding_size=29),
    "dream": dream,
    "dream, 4 key heads, tied": lambda: dream(num_key_value_heads=4, tie_word_embeddings=True),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**QWEN_NAMES, bos_token_id=0)),
    "qwen2, tied": lambda: Qwen2ForCausalLM(Qwen2Config(**QWEN_NAMES, tie_word_embeddings=True)),
}


def folder_of(folder: Path, make: Callable[[], PreTrainedModel], **options: Any) -> PreTrainedModel:
    """Save a random model whose norms and biases are random too, with the character tokenizer; returns the model."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            assert parameter.abs().max() > 0, name
    model.to(options.pop("dtype", torch.float32)).save_pretrained(folder, **options)
    character_tokenizer().save_pretrained(folder)
    return model


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def stored(folder: Path) -> dict[str, Tensor]:
    """The tensors of all files of a checkpoint."""
    return {key: value for file in shards(folder) for key, value in load_file(file).items()}


# ---- round trips ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_saved_and_loaded_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Over several files with an index, and written again: the same names and bits in the files."""
    model = folder_of(tmp_path / "a", FAMILIES[name], dtype=dtype, max_shard_size="8KB")
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    loaded, _ = load_model(str(tmp_path / "a"))
    assert not loaded.training and loaded.dtype == dtype
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert loaded.state_dict()[key].dtype == dtype and torch.equal(loaded.state_dict()[key], value), key
    loaded.save_pretrained(tmp_path / "b", max_shard_size="8KB")
    first, second = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    narrow, _ = load_model(str(tmp_path / "a"), dtype="bfloat16")
    assert narrow.lm_head_weight.dtype == torch.bfloat16


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, "layer on disk"], ids=str)
@pytest.mark.parametrize("name", ["llada", "dream"])
def test_device_maps_place_whole_layers(name: str, device_map: Any, tmp_path: Path) -> None:
    """transformers may place the model, layer by layer; states are the same."""
    model = folder_of(tmp_path, FAMILIES[name])
    layers = next(key for key, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))
    if device_map == "layer on disk":
        device_map = {key: "cpu" for key, _ in model.named_parameters()}
        device_map = {key: place for key, place in device_map.items() if f"{layers}.1." not in key}
        device_map |= {f"{layers}.1": "disk"}
    placed = type(model).from_pretrained(tmp_path, device_map=device_map, offload_folder=str(tmp_path / "offload"))
    ids = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(placed.eval().hidden_states(ids), model.hidden_states(ids))


# ---- broken files ----


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None], key: str) -> str:
    """Change the tensors of the file that holds ``key``; returns its name."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = index["weight_map"][key]
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})
    return name


def break_folder(folder: Path, problem: str, key: str, embedding: str) -> list[str]:
    """Break a sharded checkpoint in one way; returns what its error has to name."""
    index_file = folder / "model.safetensors.index.json"
    index, config = json.loads(index_file.read_text()), json.loads((folder / "config.json").read_text())
    last = shards(folder)[-1]
    if problem == "missing":
        rewrite(folder, lambda tensors: tensors.__delitem__(key), key)
        del index["weight_map"][key]
        index_file.write_text(json.dumps(index))
        return ["missing", key]
    if problem == "missing in its file":
        return [rewrite(folder, lambda tensors: tensors.__delitem__(key), key), key, index_file.name]
    if problem == "extra":
        file = rewrite(folder, lambda tensors: tensors.update({"odd.weight": torch.zeros(3)}), key)
        return ["unexpected", "odd.weight", file]
    if problem == "shape":
        return [rewrite(folder, lambda tensors: tensors.update({key: torch.zeros(7, 5)}), key), key, "(7, 5)"]
    if problem == "vocabulary":
        config["vocab_size"] = 40
        config.pop("embedding_size", None)
        (folder / "config.json").write_text(json.dumps(config))
        return [index["weight_map"][embedding], embedding, "(25, 24)", "(40, 24)"]
    if problem == "truncated":
        last.write_bytes(last.read_bytes()[:-100])
        return [last.name, "no complete safetensors file"]
    if problem == "header":
        content = last.read_bytes()
        last.write_bytes(content[:8] + b"}" + content[9:])
        return [last.name, "no complete safetensors file"]
    if problem == "empty":
        last.write_bytes(b"")
        return [last.name, "no complete safetensors file"]
    if problem == "no file":
        last.unlink()
        return [last.name, index_file.name]
    if problem == "index":
        index_file.write_text("{")
        return [index_file.name, "not valid JSON"]
    if problem == "index of nothing":
        index_file.write_text("{}")
        return [index_file.name, "weight_map"]
    if problem == "pickle":
        index_file.rename(folder / "pytorch_model.bin.index.json")
        return ["pytorch_model.bin.index.json", "safetensors"]
    if problem == "no weights":
        index_file.unlink()
        return ["model.safetensors", index_file.name]
    assert problem == "tokenizer"
    tokenizer = character_tokenizer()
    tokenizer.add_tokens(["one", "two"])
    tokenizer.save_pretrained(folder)
    return ["tokenizer has 27 tokens", "25 rows"]


@pytest.mark.parametrize(
    "problem",
    [
        "missing",
        "missing in its file",
        "extra",
        "shape",
        "vocabulary",
        "truncated",
        "header",
        "empty",
        "no file",
        "index",
        "index of nothing",
        "pickle",
        "no weights",
        "tokenizer",
    ],
)
@pytest.mark.parametrize("name", ["llada", "dream", "llama"])
def test_a_broken_file_is_named_with_its_tensor(name: str, problem: str, tmp_path: Path) -> None:
    """One sentence, with the file where it is a file's fault and the tensor where it is a tensor's; nothing is made."""
    folder_of(tmp_path, FAMILIES[name], max_shard_size="8KB")
    llada_names = ("model.transformer.blocks.1.v_proj.weight", "model.transformer.wte.weight")
    key, embedding = (
        llada_names if name == "llada" else ("model.layers.1.self_attn.v_proj.weight", "model.embed_tokens.weight")
    )
    said = break_folder(tmp_path, problem, key, embedding)
    with pytest.raises(RunError) as error:
        load_model(str(tmp_path))
    sentence = str(error.value)
    assert "\n" not in sentence
    for word in said:
        assert word in sentence, sentence


# ---- options ----


def test_an_int8_or_nf4_base_needs_a_gpu_and_bitsandbytes(
    command: Callable[..., tuple[int, str, str]], small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both commands say what the option needs; attention kernels that are not installed likewise."""
    find = importlib.util.find_spec
    absent = ("bitsandbytes", "flash_attn")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else find(name, *rest))
    output = tmp_path / "output"
    for main, argv in ((run.main, [*small_run, "--output_dir", str(output)]), (evaluate.main, [])):
        for option, extra in (
            (("--quantize", "nf4"), "dopsd[quant]"),
            (("--quantize", "int8"), "dopsd[quant]"),
            (("--attn_implementation", "flash_attention_2"), "dopsd[flash]"),
        ):
            code, _, err = command(main, *argv, *option)
            assert code == 2 and f"{option[0][2:]}='{option[1]}'" in err and extra in err and "GPU" in err
        code, _, err = command(main, *argv, "--quantize", "int4")
        assert code == 2 and "nf4" in err
    assert not output.exists()


def test_the_quantization_that_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """nf4 with double quantization and bf16 products, or int8; load_model hands it to transformers."""
    four, eight = quantization("nf4"), quantization("int8")
    assert four.load_in_4bit and not four.load_in_8bit and four.bnb_4bit_quant_type == "nf4"
    assert four.bnb_4bit_use_double_quant and four.bnb_4bit_compute_dtype == torch.bfloat16
    assert eight.load_in_8bit and not eight.load_in_4bit
    assert four.llm_int8_skip_modules is None  # transformers then skips the head: see the next test

    folder_of(tmp_path, llada)
    seen: dict[str, Any] = {}

    class Enough(Exception):
        pass

    def stop(*args: Any, **kwargs: Any) -> None:
        seen.update(kwargs)
        raise Enough

    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(models.LLaDAModelLM, "from_pretrained", stop)
    with pytest.raises(Enough):
        load_model(str(tmp_path), quantize="nf4")
    assert seen["quantization_config"].bnb_4bit_quant_type == "nf4" and seen["use_safetensors"]


@pytest.mark.parametrize("name", FAMILIES)
def test_quantization_leaves_out_the_head_alone(name: str, tmp_path: Path) -> None:
    """Of the linear layers exactly those that LoRA adapts are quantized: LLaDA's two kinds of ff_out are told apart."""
    folder_of(tmp_path, FAMILIES[name])
    model, _ = load_model(str(tmp_path))
    skipped = get_keys_to_not_convert(model)
    linear = {key for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    converted = {key for key in linear if should_convert_module(key, skipped)}
    student = add_lora(model, None, 2, 4, 0.0)
    ending = ".base_layer"
    adapted = {key.removesuffix(ending) for key, _ in student.named_modules() if key.endswith(ending)}
    assert {f"base_model.model.{key}" for key in converted} == adapted and len(converted) == 2 * 7
    assert {model.get_submodule(key).weight.shape[0] for key in linear - converted} <= {25, 29}


@pytest.mark.parametrize("name", ["llada", "dream", "llama"])
def test_lora_presets_and_names(name: str, tmp_path: Path) -> None:
    """``reference`` is q, k, v and up; an unmatched name is an error with all that there are."""
    folder_of(tmp_path, FAMILIES[name])
    student = add_lora(load_model(str(tmp_path))[0], ["reference"], 2, 4, 0.0)
    adapted = {key.split(".")[-4] for key, value in student.named_parameters() if value.requires_grad}
    assert adapted == {"q_proj", "k_proj", "v_proj", "up_proj"}
    model, _ = load_model(str(tmp_path))
    with pytest.raises(UsageError, match=f"lora_targets='w1'.*{', '.join(model.lora_modules)}"):
        add_lora(model, ["w1"], 2, 4, 0.0)


@pytest.mark.parametrize(
    ("build", "parameters", "adapted", "preset"),
    [
        (
            lambda: LLaDAModelLM(LLaDAConfig(mlp_hidden_size=12288, weight_tying=False)),
            8_015_581_184,
            335_544_320,
            167_772_160,
        ),
        (lambda: DreamModel(DreamConfig()), 7_615_616_512, 322_961_408, 135_790_592),
    ],
    ids=["LLaDA-8B", "Dream-7B"],
)
def test_defaults_are_the_published_sizes(
    build: Callable[[], DiffusionModel], parameters: int, adapted: int, preset: int
) -> None:
    """Parameters in all, and of a LoRA of rank 128 on all linear layers and on the reference's four."""
    for targets, expected in ((None, adapted), (["reference"], preset)):
        with torch.device("meta"):
            model = build()
            assert sum(p.numel() for p in model.parameters()) == parameters
            student = add_lora(model, targets, 128, 64, 0.0)
        assert sum(p.numel() for p in student.parameters() if p.requires_grad) == expected


# ---- the method ----

OBJECTIVE = Objective(
    retain_ratio=0.25,
    reveal_scope="future_blocks",
    reveal_tail=True,
    teacher_context="self_future",
    selection="teacher",
    confidence="probability",
    divergence="reverse_kl",
    beta=0.5,
    clip=None,
    clip_form="plain",
    top_k=None,
    tail="renormalize",
    normalization="step_mean",
    skip_last_block=False,
)
MASK, EOS, LENGTH, BLOCK = 1, 0, 16, 4


def aligned_logits(model: Any, ids: Tensor, shift: int) -> Tensor:
    """Logits (T, V) that predict each position's own token, from the model's ordinary forward."""
    logits = model(input_ids=ids[None]).logits[0]
    return torch.cat([logits[:1], logits[:-1]]) if shift else logits


@pytest.mark.parametrize("name", ["llada", "dream", "llama", "shifted llama", "qwen2, tied"])
def test_decoding_and_distilling_with_every_family(name: str, tmp_path: Path) -> None:
    """Greedy decoding equals a loop over full forwards; every row's KL and the loss equal those of full logits; a few
    steps lower the loss; the adapter's file gives the same states.
    """
    folder_of(tmp_path, FAMILIES[name.removeprefix("shifted ")])
    shift_logits = name == "shifted llama"
    model, _ = load_model(str(tmp_path), shift_logits=shift_logits)
    shift = int(shift_logits or name == "dream")
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(2, 25, (length,), generator=generator) for length in (3, 7, 5)]
    decoding = Decoding(gen_length=LENGTH, block_length=BLOCK, stop_at_eos=False)
    trajectories = decode(model, prompts, decoding, mask_id=MASK, eos_id=EOS, seeds=torch.zeros(3, dtype=torch.int64))
    for prompt, trajectory in zip(prompts, trajectories, strict=True):
        assert trajectory.tokens.tolist() == greedy(model, prompt, shift)

    student = add_lora(model, None, 4, 8, 0.0)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    teacher = TeacherWeights(student, "fixed", 0.9, from_adapter=False)
    examples = [
        OBJECTIVE.example(trajectory, trajectory.prompt_ids, eos_id=EOS, seed=seed)
        for seed, trajectory in enumerate(trajectories)
    ]
    (batch,) = step_batches(examples, 1000, mask_id=MASK, pad_id=EOS, device=torch.device("cpu"))

    output = OBJECTIVE.forward(model, teacher, batch, MASK)
    expected_kl, expected_loss = [], 0.0
    row = 0
    for example in examples:
        prompt = example.trajectory.prompt_ids
        for state, reveal in zip(example.trajectory.states(example.steps, MASK), example.reveal, strict=True):
            shown = torch.where(reveal, example.trajectory.tokens, state)
            with torch.no_grad():
                s = aligned_logits(model, torch.cat((prompt, state)), shift)[len(prompt) :].double().log_softmax(-1)
                with teacher.active():
                    t = aligned_logits(model, torch.cat((prompt, shown)), shift)[len(prompt) :].double().log_softmax(-1)
            chosen = batch.columns[row][output.chosen[row]]
            kl = [float((s[i].exp() * (s[i] - t[i])).sum()) for i in chosen.tolist()]
            expected_kl += kl
            expected_loss += sum(kl) / len(kl) / len(example.steps)
            row += 1
    torch.testing.assert_close(output.divergence, torch.tensor(expected_kl), rtol=1e-3, atol=1e-5)
    assert float(output.loss.detach()) == pytest.approx(expected_loss, rel=1e-3)

    optimiser = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(4):
        optimiser.zero_grad()
        loss = OBJECTIVE.forward(model, teacher, batch, MASK).loss / 3
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert all(math.isfinite(loss) for loss in losses) and losses[-1] < losses[0]
    assert all(p.grad is None for p in student.parameters() if not p.requires_grad)

    student.save_pretrained(str(tmp_path / "adapter"))
    again, _ = load_model(str(tmp_path), shift_logits=shift_logits)
    load_adapter(again, str(tmp_path / "adapter"), trainable=False)
    with torch.no_grad():
        student.eval()
        assert torch.equal(again.eval().hidden_states(prompts[1][None]), model.hidden_states(prompts[1][None]))


def greedy(model: DiffusionModel, prompt: Tensor, shift: int) -> Sequence[int]:
    """Two tokens a step, the most confident of the block first, from the logits of one whole forward per step."""
    tokens = torch.cat((prompt, torch.full((LENGTH,), MASK)))
    revealed = torch.zeros(LENGTH, dtype=torch.bool)
    for start in range(0, LENGTH, BLOCK):
        for _ in range(BLOCK // 2):
            with torch.no_grad():
                logits = aligned_logits(model, tokens, shift)[len(prompt) :]
            logits[:, MASK] = -torch.inf
            probability, best = logits.softmax(-1).max(-1)
            block = [i for i in range(start, start + BLOCK) if not revealed[i]]
            for i in sorted(block, key=lambda i: -float(probability[i]))[:2]:
                tokens[len(prompt) + i], revealed[i] = best[i], True
    return tokens[len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["dream", "llama"])
def test_both_commands_with_every_family(
    name: str, command: Callable[..., tuple[int, str, str]], small_run: list[str], tmp_path: Path
) -> None:
    """Training from a folder and evaluating its adapter, with checkpointing, start to finish."""
    folder_of(tmp_path / "model", FAMILIES[name])
    output = tmp_path / "run"
    options = [*small_run, "--recipe", "tiny", "--model", str(tmp_path / "model"), "--correct_only", "false"]
    options += ["--gradient_checkpointing", "true", "--lora_targets", "reference", "--output_dir", str(output)]
    code, _, err = command(run.main, *options)
    assert code == 0, err
    report = json.loads((output / "report.json").read_text())
    assert report["config"]["model"]["quantize"] == "none"
    argv = ["--model", str(tmp_path / "model"), "--adapter", str(output), "--eval_problems", "2"]
    assert command(evaluate.main, *argv)[0] == 0
