"""A checkpoint with an adapter merged in: its files against the base's, its network against PEFT's merge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from test_block_causal import SIZES
from test_checkpoints import FAMILIES, dream, folder_of, llada
from test_model_card import result
from torch import Tensor
from transformers import PreTrainedModel

import dopsd
from dopsd import merging
from dopsd.errors import RunError, UsageError
from dopsd.files import PART
from dopsd.models import MODELS, adapter_tensors, add_lora, load_adapter, load_model, save_adapter
from dopsd.recorded import Recorded

Command = Callable[..., tuple[int, str, str]]
IDS = torch.arange(2, 24).reshape(2, 11)


def blocks(family: str, **changes: Any) -> PreTrainedModel:
    """A random block-causal model with the character tokenizer's ids."""
    kind: Any = MODELS[family]
    config = kind.config_class(**{**SIZES, "vocab_size": 25, "mask_token_id": 1, **changes})
    config.block_size = 4
    return kind(config)


# In each published layout, with one and with several tied tensors, in the dtypes that checkpoints have.
BASES: dict[str, tuple[Callable[[], PreTrainedModel], torch.dtype]] = {
    "llada": (llada, torch.bfloat16),
    "llada, tied": (FAMILIES["llada, 2 key heads, tied"], torch.float32),
    "dream": (dream, torch.bfloat16),
    "sdar": (lambda: blocks("sdar", head_dim=10), torch.bfloat16),
    "a2d-qwen2, tied": (lambda: blocks("a2d-qwen2", tie_word_embeddings=True), torch.float16),
    "a2d-qwen3, tied": (lambda: blocks("a2d-qwen3", head_dim=10, tie_word_embeddings=True), torch.float32),
    "Fast_dLLM_Qwen": (lambda: blocks("Fast_dLLM_Qwen"), torch.float32),
    "qwen2, tied": (FAMILIES["qwen2, tied"], torch.bfloat16),
}


def adapter_for(base: str, folder: Path, scale: float = 0.3, **said: Any) -> str:
    """A random adapter for all layers of ``base``, in a run's folder if something is ``said`` of the run."""
    network, _ = load_model(base)
    torch.manual_seed(1)
    student = add_lora(network, None, 4, 8, 0.0)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    folder.mkdir(parents=True)
    save_adapter(student, folder, base, adapter_tensors(student))
    if said:
        (folder / "run.json").write_text(json.dumps({"id": "0", "model": {"model": base}, **said}))
    return str(folder)


def stored(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint by file and name."""
    return {file.name: load_file(file) for file in sorted(folder.glob("*.safetensors"))}


def bits(tensor: Tensor) -> tuple[torch.dtype, list[int], bytes]:
    return tensor.dtype, list(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes()


def same(network: Any, other: Any) -> bool:
    """Whether two networks have the same tensors, bit for bit."""
    first, second = network.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(bits(value) == bits(second[key]) for key, value in first.items())


@torch.no_grad()
def logits(network: Any) -> Tensor:
    return network.hidden_states(IDS) @ network.lm_head_weight.mT


@pytest.mark.parametrize("name", BASES)
def test_it_takes_the_place_of_its_base(name: str, tmp_path: Path) -> None:
    """All files but the weights byte for byte, code that is not run among them; all tensors by file, name, shape and
    dtype, those without an adapter bit for bit; and the network that PEFT merges."""
    make, dtype = BASES[name]
    base, merged = tmp_path / "base", tmp_path / "merged"
    folder_of(base, make, dtype=dtype, max_shard_size="8KB")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling_it.It"}}, indent=7))
    (base / "modeling_it.py").write_text("raise AssertionError\n")
    for file in ("LICENSE", "generation_config.json", "special_tokens_map.json", "README.md", "pytorch_model.bin"):
        (base / file).write_text("{}\n")
    adapter = adapter_for(str(base), tmp_path / "adapter")
    dopsd.export(adapter, merged)

    assert {file.name for file in base.iterdir()} - {file.name for file in merged.iterdir()} == {"pytorch_model.bin"}
    for file in merged.iterdir():
        if file.suffix != ".safetensors" and file.name != "README.md":
            assert file.read_bytes() == (base / file.name).read_bytes(), file
    before, after = stored(base), stored(merged)
    assert len(before) > 2 and before.keys() == after.keys()
    with safe_open(merged / next(iter(after)), framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    network, _ = load_model(str(base))
    student = load_adapter(network, adapter, trainable=False)
    beside = logits(network)
    own = {f"{key}.weight" for key, module in network.named_modules() if hasattr(module, "lora_A")}
    assert len(own) == 14  # of both layers
    for file, tensors in before.items():
        assert tensors.keys() == after[file].keys()
        for key, tensor in tensors.items():
            assert (bits(tensor)[:2]) == bits(after[file][key])[:2]
            assert (bits(tensor) == bits(after[file][key])) == (key not in own), key

    network = student.merge_and_unload()
    loaded, _ = load_model(str(merged))
    assert same(loaded, network)
    assert bits(logits(loaded)) == bits(logits(network))
    # Sums of at most 48 products through two layers, some tens of roundings each way.
    assert (logits(loaded) - beside).abs().max() <= 64 * torch.finfo(dtype).eps * beside.abs().max()


def test_an_export_is_a_base(tmp_path: Path, command: Command) -> None:
    """The command merges a run over a model that ships, and a second adapter into what comes of it."""
    run = adapter_for(
        "tiny-causal", tmp_path / "run", task={"prefill": "<"}, rollout={"gen_length": 16, "block_length": 16}
    )
    first, second = tmp_path / "first", tmp_path / "second"
    status, out, err = command(merging.main, run, "--output_dir", str(first))
    assert (status, out, err) == (0, f"{first}: tiny-causal with an adapter merged into 42 weights\n", "")
    again = adapter_for(str(first), tmp_path / "again")
    dopsd.export(again, second)
    merged, _ = load_model("tiny-causal")
    for adapter in (run, again):
        merged = load_adapter(merged, adapter, trainable=False).merge_and_unload()
    loaded = dopsd.load(second)
    assert same(loaded.decoder.model, merged)
    assert len(loaded.generate(["0400002002101040:"], gen_length=16, block_length=16)) == 1

    text = (first / "README.md").read_text()
    assert "license" not in yaml.safe_load(text.split("---\n")[1]) and str(tmp_path) not in text
    assert "model = dopsd.load('first', prefill='<')\n" in text
    assert 'model.generate(["..."], gen_length=16, block_length=16)\n' in text
    assert "leaves 100.0%" in text and "in a local folder, `first`" in (second / "README.md").read_text()


def test_the_card_of_a_run_has_its_results() -> None:
    """And how it decodes; of a base model on the hub the id, and what it has to be loaded with."""
    said = Recorded(
        Path("run.json"), {"block_size": 0, "mask_token_id": None, "shift_logits": False}, {"prefill": None}
    )
    text = merging.card("merged", said, "somebody/base", "abc", merging.Merged(3, "bfloat16", 0.5), result())
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["base_model"] == "somebody/base" and head["base_model_relation"] == "finetune"
    assert "| 2 | 25.0 (4.6 to 69.9) | 75.0 (30.1 to 95.4) | +50.0 (-6.6 to +100.0) |" in text
    assert "Percent of 4 held-out problems of the task `sudoku`" in text and "sha256 `abc`" in text
    assert "dopsd.load('merged', block_size=0)\n(sample,) = model.generate([\"...\"])\n" in text


def test_what_rounding_leaves_of_an_adapter(tmp_path: Path, command: Command) -> None:
    """On bf16's own grid a small one is lost in part, and that is said."""
    folder_of(tmp_path / "base", llada, dtype=torch.bfloat16)
    adapter = adapter_for(str(tmp_path / "base"), tmp_path / "adapter", scale=1e-4)
    status, out, _ = command(merging.main, adapter, "--output_dir", str(tmp_path / "merged"))
    network, _ = load_model(str(tmp_path / "base"))
    student = load_adapter(network, adapter, trainable=False)
    deltas = {
        key: layer.get_delta_weight("default") for key, layer in network.named_modules() if hasattr(layer, "lora_A")
    }
    before, after = stored(tmp_path / "base"), stored(tmp_path / "merged")
    (old,), (new,) = before.values(), after.values()
    along = sum(
        float(((new[f"{key}.weight"].double() - old[f"{key}.weight"].double()) * delta).sum())
        for key, delta in deltas.items()
    )
    kept = along / sum(float(delta.double().square().sum()) for delta in deltas.values())
    assert status == 0 and kept < 0.9 and student is not None
    assert f"rounding to bfloat16 has left {100 * kept:.0f} % of the adapter" in out
    assert f"leaves {kept:.1%}" in (tmp_path / "merged" / "README.md").read_text()


def test_weights_that_a_run_did_not_have_are_asked_for(tmp_path: Path) -> None:
    """A run over quantised weights is merged into a checkpoint that is named; so is an adapter that names none."""
    adapter = adapter_for("tiny", tmp_path / "run", model={"model": "tiny", "quantize": "nf4"})
    with pytest.raises(UsageError, match=r"quantize='nf4' can't be used: .*--model tiny merges it"):
        dopsd.export(adapter, tmp_path / "merged")
    dopsd.export(adapter, tmp_path / "merged", model="tiny")
    student = load_adapter(load_model("tiny")[0], adapter, trainable=False)
    assert same(load_model(str(tmp_path / "merged"))[0], student.merge_and_unload())
    (tmp_path / "run" / "run.json").write_text(json.dumps({"id": "0"}))
    with pytest.raises(UsageError, match="model has to be given"):
        dopsd.export(adapter, tmp_path / "other")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tied base model and an adapter for it; not to be written to."""
    folder = tmp_path_factory.mktemp("given")
    folder_of(folder / "base", FAMILIES["dream, 4 key heads, tied"])
    adapter_for(str(folder / "base"), folder / "adapter")
    return folder


def test_errors_come_before_work(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sentence for each, and no folder where there was none."""
    adapter, output = str(given / "adapter"), tmp_path / "out"

    def refused(error: type[Exception], said: str, source: str = adapter, **options: Any) -> None:
        with pytest.raises(error, match=said):
            dopsd.export(source, output, **options)
        assert not output.exists()

    refused(UsageError, "adapter must be a folder with", str(given / "base"))
    refused(UsageError, "which is no linear layer of this model", model="tiny")
    refused(UsageError, "a model folder holds a config.json", model=str(tmp_path / "nothing"))

    broken = tmp_path / "broken"
    shutil.copytree(adapter, broken)
    (broken / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    refused(RunError, "as its manifest.json has it", str(broken))
    (broken / "manifest.json").unlink()
    refused(RunError, "can't be read", str(broken))
    config = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["norm"]}))
    refused(UsageError, "plain LoRA and copies of modules alone are read", str(broken))

    # Tied to the embedding, the head has no weight of its own, whether files have it twice or not.
    head, twice = tmp_path / "head", tmp_path / "twice"
    network, _ = load_model(str(given / "base"))
    get_peft_model(network, LoraConfig(target_modules=["lm_head"])).save_pretrained(head, save_embedding_layers=False)
    refused(UsageError, "is no tensor of its own", str(head), model=str(given / "base"))
    shutil.copytree(given / "base", twice)
    tensors = load_file(twice / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, twice / "model.safetensors", {"format": "pt"})
    refused(UsageError, "is no tensor of its own", str(head), model=str(twice))

    index = tmp_path / "index"
    folder_of(index, dream, max_shard_size="8KB")
    (index / "within").mkdir()
    table = json.loads((index / "model.safetensors.index.json").read_text())
    moved = next(iter(table["weight_map"].values()))
    (index / moved).rename(index / "within" / moved)
    names = {key: f"within/{name}" if name == moved else name for key, name in table["weight_map"].items()}
    (index / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    refused(RunError, "which is not in the same folder", model=str(index))

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1 << 14))
    refused(RunError, "0 MiB are free there")


def test_a_folder_is_whole_or_empty(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a write that fails has left is taken away again, what a killed one left is written over, and what else is
    in a folder stays."""
    adapter, output = str(given / "adapter"), tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(RunError, match="No space left"):
        patch.setattr(merging, "save_file", lambda *args: (_ for _ in ()).throw(SafetensorError("No space left")))
        dopsd.export(adapter, output)
    assert not list(output.iterdir())
    (output / PART).mkdir()
    (output / PART / "model.safetensors").write_bytes(b"half")
    dopsd.export(adapter, output)
    with pytest.raises(UsageError, match="output_dir must be a new folder, or an empty one"):
        dopsd.export(adapter, output)
    assert load_model(str(output)) and not (output / PART).exists()


def test_sums_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    """Beyond what the dtype holds, and in one that holds no sums."""
    folder_of(tmp_path / "base", dream, dtype=torch.float16)
    adapter = adapter_for(str(tmp_path / "base"), tmp_path / "adapter", scale=1e6)
    with pytest.raises(RunError, match="no finite numbers"):
        dopsd.export(adapter, tmp_path / "merged")
    layers = dict.fromkeys(stored(tmp_path / "base")["model.safetensors"])
    save_file({key: torch.zeros(1, dtype=torch.int8) for key in layers}, tmp_path / "a.safetensors")
    with pytest.raises(RunError, match="int8, to which nothing can be added"):
        merging.merge_files(tmp_path, tmp_path / "merged", ["a.safetensors"], layers)


def test_the_files_of_a_hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are copied, its weights, and nothing in folders or in other formats."""
    asked = {}
    monkeypatch.setattr(merging, "snapshot_download", lambda model, **options: asked.update(options) or str(tmp_path))
    assert merging.folder_of("a/b", ["model.safetensors"]) == tmp_path
    from huggingface_hub.utils import filter_repo_objects

    names = ["config.json", "modeling_it.py", "vocab.txt", "LICENSE.md", "chat_template.jinja", "model.safetensors"]
    others = ["consolidated.safetensors", "model.bin", "original/config.json", "original/model.safetensors", "a.gguf"]
    assert list(filter_repo_objects([*names, *others], **asked)) == names
    indices = ["model.safetensors.index.json", "model.fp16.safetensors.index.json"]
    assert [merging.copied(name, ["model-1.safetensors"]) for name in indices] == [True, False]
    assert not merging.copied(indices[0], ["model.safetensors"])
