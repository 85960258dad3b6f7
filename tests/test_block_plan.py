"""Plans for block-causal models: what is counted, against what a real pass allocates, and what the command prints."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from costs import allocated_peak
from test_published_configs import CONFIGS

from dopsd.memory import command as plan
from dopsd.memory import dry_run as dry_runs
from dopsd.memory.dry_run import DryProbe, DryRun
from dopsd.memory.options import parse_plan
from dopsd.memory.probe import synthetic_trajectory
from dopsd.models import MODELS, add_lora, checkpoint_activations
from dopsd.sampler import Decoding
from dopsd.step_batch import Reuse, StepBatch

Command = Callable[..., tuple[int, str, str]]
SMALL: dict[str, Any] = {
    **{"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4},
    **{"vocab_size": 64, "num_key_value_heads": 2, "mask_token_id": 1, "max_position_embeddings": 512},
}
OPTIONS = [
    *("--block_length", "8", "--gen_length", "32", "--steps", "16", "--prompt_length", "37"),
    *("--lora_r", "8", "--lora_dropout", "0", "--bf16", "false", "--dtype", "float32", "--cache", "block"),
]


def dry_run(path: Path, *argv: str) -> DryRun:
    """The dry run of a config.json."""
    arguments, model, _, rollouts, teaching, args = parse_plan(["--model-config", str(path), *OPTIONS, *argv])
    config = plan.read_architecture(str(arguments.model_config))
    return DryRun(config, model, rollouts, teaching, args, arguments.prompt_length, 1)


def written(path: Path, family: str, layers: int) -> dict[str, Any]:
    """The fields of a small config.json of that family, in blocks of 8."""
    fields = {**SMALL, "num_hidden_layers": layers, "model_type": family, "architectures": [MODELS[family].__name__]}
    fields |= {"bd_size": 8} if family == "Fast_dLLM_Qwen" else {"block_size": 8, "head_dim": 48}
    path.write_text(json.dumps(fields))
    return fields


def forward_and_backward(network: Any, batch: StepBatch) -> None:
    """Of the student."""
    batch.student.hidden_states(network, batch.columns[:, :2]).square().sum().backward()


def test_the_bytes_are_those_that_a_forward_and_backward_allocates(tmp_path: Path) -> None:
    """On shapes alone, against the allocations that the profiler sees in a real pass, which with the exact reuse has
    the scores of prefix attention besides: on a GPU its kernels have none."""
    fields = written(tmp_path / "config.json", "Fast_dLLM_Qwen", 4)
    run = dry_run(tmp_path / "config.json", "--gen_length", "64", "--steps", "32")
    kind = MODELS["Fast_dLLM_Qwen"]
    network: Any = kind(kind.config_class(**fields))
    add_lora(network, None, 8, 64, 0.0)
    network.config._attn_implementation = dry_runs.ATTENTION
    checkpoint_activations(network, False)
    network.train()
    bounds: dict[Reuse, tuple[float, float]] = {"none": (0.9, 1.1), "block": (0.8, 1.1)}
    for reuse, (low, high) in bounds.items():
        batch = run.batch(reuse, 32)
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        peak = allocated_peak(partial(forward_and_backward, network, batch))
        counted = run.training(reuse, False).at(batch.student.tokens)
        assert peak > 10 << 20 and low * peak <= counted <= high * peak, (reuse, counted, peak)


def test_reuse_and_the_exact_cache_take_less(tmp_path: Path) -> None:
    """A batch of all states has one clean pass for each trajectory; decoding keeps keys, and computes blocks."""
    written(tmp_path / "config.json", "sdar", 2)
    run = dry_run(tmp_path / "config.json")
    states = run.states()
    assert run.batch("block", states).student.tokens < run.batch("none", states).student.tokens / 4
    exact, reused = (DryProbe(run, reuse, "none").training(states, True) for reuse in ("none", "block"))
    assert reused < exact
    # 37 = 4 * 8 + 5: the first block has 3 positions, and one of 5 is left at the end.
    steps = run.examples("block")[1].steps
    assert run.examples("block")[1].trajectory.lead == 5 and len(steps) == 2 + 3 * 4 + 3
    whole = dry_run(tmp_path / "config.json", "--cache", "none")
    assert 0 < run.decoding().at(8 * 69) < 3 * whole.decoding().at(8 * 69)


@pytest.mark.parametrize("threshold", [None, 0.9])
@pytest.mark.parametrize("lead", [0, 1, 2])
def test_a_synthetic_trajectory_has_the_steps_of_a_decoded_one(lead: int, threshold: float | None) -> None:
    """In blocks that begin in the prompt too; it checks itself."""
    decoding = Decoding(12, 4, 7, threshold=threshold)
    trajectory = synthetic_trajectory(torch.ones(5, dtype=torch.int64), decoding, 9, 0, lead=lead)
    expected = {0: 7, 1: 2 + 2 + 2 + 1, 2: 1 + 2 + 2 + 1}[lead] if threshold is None else 12
    assert trajectory.num_steps == expected and bool((trajectory.tokens != 0).all())


def test_a_published_config_is_planned(tmp_path: Path, command: Command) -> None:
    """With its own recipe, and blocks; without the reuse of prompts alone. Of a few layers, which take less time."""
    fields, _ = CONFIGS["SDAR-4B-Chat"]
    (tmp_path / "config.json").write_text(json.dumps({**fields, "num_hidden_layers": 2}))
    words = ["--model-config", str(tmp_path / "config.json"), "--gen_length", "16", "--steps", "8", "--gpu", "141GiB"]
    status, out, err = command(plan.main, *words)
    assert status == 0 and not err
    assert "predicted, not measured" in out and " block " in out and " prompt " not in out
    status, _, err = command(plan.main, *words, "--recipe", "paper", "--block_length", "4")
    assert status == 2 and "reveal_scope='masked'" in err
    status, _, err = command(plan.main, *words, "--block_size", "16")
    assert status == 2 and "its blocks have 16 tokens" in err
