"""``python -m dopsd.plan``: a plan without weights, on any machine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from costs import allocated_peak

import dopsd.assets
from dopsd.memory import command as plan
from dopsd.memory import dry_run as dry_runs
from dopsd.memory.dry_run import DryProbe, DryRun
from dopsd.memory.options import parse_plan
from dopsd.memory.planner import Planner, optimizer_bytes, remedies
from dopsd.models import add_lora, checkpoint_activations
from dopsd.models.llada import LLaDAConfig, LLaDAModelLM
from dopsd.units import GIB

Command = Callable[..., tuple[int, str, str]]
TINY = Path(dopsd.assets.__file__).parent / "tiny"

# What the published config.json of LLaDA-8B-Instruct says of its sizes.
LLADA_8B = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 32,
    "mlp_hidden_size": 12288,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "max_sequence_length": 4096,
    "torch_dtype": "bfloat16",
    "weight_tying": False,
}


def dry_run(path: Path, *argv: str) -> DryRun:
    """The dry run of a config.json."""
    arguments, model, _, rollouts, teaching, args = parse_plan(["--model-config", str(path), *argv])
    config = plan.read_architecture(str(arguments.model_config))
    return DryRun(config, model, rollouts, teaching, args, arguments.prompt_length, 16 << 20)


@pytest.fixture(scope="module")
def llada_8b(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DryRun]:
    """A config.json, and its dry run with the paper's recipe."""
    path = tmp_path_factory.mktemp("llada") / "config.json"
    path.write_text(json.dumps(LLADA_8B))
    return path, dry_run(path)


# ---- what is counted ----


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_bytes_are_those_that_a_forward_and_backward_allocates(checkpointing: bool) -> None:
    """The shipped model on shapes alone, against the allocations that the profiler sees in a real pass."""
    options = ["--recipe", "tiny", "--lora_r", "16", "--bf16", "false", "--prompt_length", "17"]
    run = dry_run(TINY / "config.json", *options)
    batch = run.batch("none", 64)
    network = LLaDAModelLM(LLaDAConfig.from_pretrained(TINY))
    add_lora(network, None, 16, 32, 0.0)
    network.config._attn_implementation = dry_runs.ATTENTION
    checkpoint_activations(network, checkpointing)
    network.train()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    peak = allocated_peak(lambda: batch.student.hidden_states(network, batch.columns[:, :2]).square().sum().backward())
    counted = run.training("none", checkpointing).at(batch.student.tokens)
    assert peak > (20 << 20)
    assert counted == pytest.approx(peak, rel=0.1)


def test_few_layers_say_what_many_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines through three and four layers, and through two numbers of states, against all layers and others."""
    config = {**LLADA_8B, "n_layers": 5, "d_model": 128, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 256}
    _, model, _, rollouts, teaching, args = parse_plan(
        ["--lora_r", "8", "--lora_targets", "q_proj", "up_proj", "--steps", "32"]
    )
    run = DryRun(LLaDAConfig(**config), model, rollouts, teaching, args, 50, 1 << 20)
    lines = {pair: run.training(*pair) for pair in (("none", False), ("block", True))}
    whole = DryRun(LLaDAConfig(**config), model, rollouts, teaching, args, 50, 1 << 20)
    whole.samples = [dry_runs.MetaNetwork(LLaDAConfig(**config), 5, model)]
    monkeypatch.setattr(dry_runs, "PROBED", (16, 48))
    for (reuse, on), line in lines.items():
        for states in (16, 48):
            tokens = run.batch(reuse, states).student.tokens
            assert line.at(tokens) == pytest.approx(whole.training(reuse, on).at(tokens), rel=0.05), (reuse, on)


def test_what_stands(llada_8b: tuple[Path, DryRun]) -> None:
    """8.0 billion parameters at 2 bytes, an adapter of 128 ranks at 4; less in nf4, and with an 8-bit optimiser."""
    _, run = llada_8b
    whole = sum(p.numel() for p in run.network.parameters() if not p.requires_grad)
    assert whole == 8_015_581_184
    adapter = 128 * 32 * (4 * 2 * 4096 + 3 * (4096 + 12288))
    stored, nf4 = run.persistent("none"), run.persistent("nf4")
    assert (stored.weights, stored.trained, stored.gradients) == (2 * whole, 4 * adapter, 4 * adapter)
    assert stored.optimizer == 8 * adapter and optimizer_bytes("paged_adamw_8bit") == 2
    assert (optimizer_bytes("paged_ademamix_32bit"), optimizer_bytes("ademamix_8bit")) == (12, 3)
    linear = 32 * (4 * 4096 * 4096 + 3 * 4096 * 12288)
    assert nf4.weights == pytest.approx(2 * (whole - linear) + 0.516 * linear, rel=1e-6)
    assert DryProbe(run, "none", "nf4").transient == 2 * 4096 * 12288


def test_more_memory_and_more_reuse_allow_more_states(llada_8b: tuple[Path, DryRun]) -> None:
    """For LLaDA-8B; and the prediction keeps to the budget."""
    _, run = llada_8b
    found: dict[str, list[int]] = {"none": [], "nf4": []}
    for quantize, sizes in found.items():
        for limit in (16, 24, 32, 48, 80, 141):
            planner = Planner(DryProbe(run, "none", quantize), limit * GIB, run.states(), 8, run.workspace_bytes)
            sizes.append(planner.most(checkpointing=True))
            made = planner.plan()
            assert (made is None) == (sizes[-1] == 0) and (made is None or made.peak <= limit * GIB)
        assert sizes == sorted(sizes) and sizes[1] < sizes[-1] <= 128
    assert found["none"][0] == 0 < found["nf4"][0]


# ---- the command ----


def test_the_command_prints_a_plan_and_a_table(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is predicted, that it is not measured, and a row for every option; fewer layers take less time."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads((TINY / "config.json").read_text()), "n_layers": 1}))
    monkeypatch.setattr(dry_runs, "PROBED", (2, 8))
    code, out, err = command(
        plan.main, "--model_config", str(tmp_path), "--gpu", "1.5", "--recipe", "tiny", "--prompt_length", "17"
    )
    assert code == 0, err
    parameters = LLaDAModelLM(LLaDAConfig.from_pretrained(tmp_path)).num_parameters()
    assert f"{parameters:,} parameters" in out
    assert out.count("predicted, not measured") == 3
    rows = [line for line in out.splitlines() if re.search(r"(none|prompt|block)\s+(as stored|nf4)", line)]
    assert len(rows) == 12 and len(set(rows)) > 6


def test_what_would_help() -> None:
    """Only what is not in use yet, and on a CPU no quantisation."""
    _, model, _, rollouts, teaching, args = parse_plan(["--reuse", "block", "--optim", "paged_adamw_8bit"])
    assert remedies(model, rollouts, teaching, args, "cuda") == (
        "less is taken by --quantize nf4, a --gen_length below 256, a --lora_r below 128"
    )
    assert "nf4" not in remedies(model, rollouts, teaching, args, "cpu")
    _, model, _, rollouts, teaching, args = parse_plan([])
    assert "--reuse block" in remedies(model, rollouts, teaching, args, "cuda")
    assert "--reuse" not in remedies(model, rollouts, teaching, args, "cuda", reusable=False)
    _, model, _, rollouts, teaching, args = parse_plan(["--reuse", "prompt", "--drift_limit", "1"])
    assert "--reuse" not in remedies(model, rollouts, teaching, args, "cuda")


def test_an_averaged_teacher_is_not_quantised() -> None:
    """Its adapter is fp32 beside nf4 weights too."""
    more = {}
    for quantize in ("none", "nf4"):
        weights = [
            dry_run(TINY / "config.json", "--lora_r", "32", "--teacher", kind).persistent(quantize).weights
            for kind in ("live", "ema")
        ]
        more[quantize] = weights[1] - weights[0]
    assert more["none"] == more["nf4"] > 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--gpu", "10GiB"], ["gpu='10GiB'", "weights 14.93", "takes 2", "--quantize nf4", "--reuse block"]),
        (["--model-config", "nowhere/config.json"], ["model_config='nowhere/config.json'", "no such file"]),
        (["--gpu", "80%"], ["gpu must be", "but is '80%'", "GiB"]),
        (["--gpu", "much"], ["gpu must be", "but is 'much'", "24GiB"]),
        (["--gpu", "0"], ["gpu must be", "but is '0'"]),
        (["--prompt_length", "0"], ["prompt_length must be at least 1, but is 0"]),
        (["--lora_targets", "qq"], ["lora_targets='qq'"]),
        (["--gen_lenth", "64"], ["--gen_length"]),
        (["--gen_length", "4000000000", "--steps", "none"], ["gen_length must be at most ", "but is 4000000000"]),
    ],
)
def test_bad_options(argv: list[str], said: list[str], llada_8b: tuple[Path, DryRun], command: Command) -> None:
    """Exit status 2 and one sentence."""
    code, _, err = command(plan.main, "--model-config", str(llada_8b[0]), *argv)
    assert code == 2
    for word in said:
        assert word in err


@pytest.mark.parametrize(
    ("fields", "status", "said"),
    [
        ({"model_type": "gpt9"}, 2, "model_type='gpt9'"),
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, 2, "--memory_budget"),
        ({**LLADA_8B, "alibi": True}, 1, "alibi=True"),
        (None, 1, "not valid JSON"),
    ],
)
def test_bad_configurations(
    fields: dict[str, Any] | None, status: int, said: str, command: Command, tmp_path: Path
) -> None:
    """Families that are not this project's say what can be done; what can't be read is named."""
    path = tmp_path / "config.json"
    path.write_text("{" if fields is None else json.dumps(fields))
    code, _, err = command(plan.main, "--model-config", str(path))
    assert code == status and said in err and str(path) in err
