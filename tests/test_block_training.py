"""Training block-causal models: what their teacher sees, what is refused, and runs with reuse and without."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_block_causal import small_model
from test_block_decoding import LENGTHS
from test_sampler import make_prompts
from test_sampler import run as decode

from dopsd import run
from dopsd.assets.pretrain import character_tokenizer
from dopsd.commands import parse_train
from dopsd.config import TeachingArguments
from dopsd.errors import UsageError
from dopsd.generate import load
from dopsd.methods import METHODS
from dopsd.models import load_model
from dopsd.rollout import Decoder
from dopsd.sampler import Decoding
from dopsd.tasks.sudoku import Sudoku
from dopsd.teacher import TeacherView, self_future
from dopsd.trajectory import NEVER, Trajectory

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., str]:
    """Saves a small random model of a family with the character tokenizer; returns its folder."""

    def build(family: str, **changes: Any) -> str:
        tokenizer = character_tokenizer()
        ids = {"mask_token_id": tokenizer.mask_token_id, "eos_token_id": tokenizer.eos_token_id}
        model = small_model(family, 8, torch.float32, vocab_size=len(tokenizer), **ids, **changes)
        path = tmp_path / family
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return str(path)

    return build


# ---- what the teacher sees ----


def trajectories() -> list[Trajectory]:
    """Several tokens a step, blocks that begin in prompts, and a text that ends early."""
    model = small_model("sdar")
    with torch.no_grad():
        model.lm_head_weight[0] *= 1.6
    prompts = make_prompts(*LENGTHS)
    return decode(model, prompts, Decoding(12, 4, 5, temperature=0.7), torch.arange(len(prompts)))


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_a_reveal_in_the_block_leaves_as_many_to_compare_as_the_step_reveals(ratio: float, tail: bool) -> None:
    """It is the rounded share of the block's masked positions, or fewer, and nothing outside of the block."""
    shown = capped = 0
    for seed, trajectory in enumerate(trajectories()):
        steps, tokens = torch.arange(trajectory.num_steps), trajectory.tokens.tolist()
        generator = torch.Generator().manual_seed(seed)
        options: dict[str, Any] = {"retain_ratio": ratio, "tail": tail, "eos_id": 0, "generator": generator}
        reveal = self_future(trajectory, steps, scope="block", block_causal=True, **options)
        end = tokens.index(0) if 0 in tokens else len(tokens)
        for step, row in enumerate(reveal):
            commits = [i for i, at in enumerate(trajectory.reveal_step.tolist()) if at == step]
            block = (commits[0] + trajectory.lead) // 4
            masked = [
                i
                for i, at in enumerate(trajectory.reveal_step.tolist())
                if step <= at < NEVER and (i + trajectory.lead) // 4 == block
            ]
            candidates = [i for i in masked if tail or i <= end]
            revealed = row.nonzero().flatten().tolist()
            share, most = math.floor(ratio * len(candidates) + 0.5), len(masked) - len(commits)
            assert set(revealed) <= set(candidates) and len(revealed) == min(share, most)
            shown, capped = shown + len(revealed), capped + (share > most)
    assert shown and capped


def test_a_later_state_stays_in_the_block() -> None:
    """Of a model that sees nothing behind it; the last state of a block then shows nothing."""
    for trajectory in trajectories():
        steps = torch.arange(trajectory.num_steps)
        options: dict[str, Any] = {"retain_ratio": 1.0, "scope": "later_state", "tail": True, "eos_id": 0}
        draws = [
            self_future(trajectory, steps, block_causal=causal, generator=torch.Generator(), **options)
            for causal in (True, False)
        ]
        starts = trajectory.block_starts(steps)
        behind = torch.arange(12) >= starts[:, None] + 4
        later = trajectory.reveal_step > steps[:, None]
        decoded = trajectory.reveal_step != NEVER
        assert torch.equal(draws[1], later & decoded) and torch.equal(draws[0], later & decoded & ~behind)


def view(**changes: Any) -> TeacherView:
    fields = {"retain_ratio": 0.25, "reveal_tail": True, "skip_last_block": False, "teacher_context": "self_future"}
    return TeacherView(**{**fields, "block_causal": True, "reveal_scope": "block", "reuse": "block", **changes})


def test_what_a_block_causal_teacher_is_refused() -> None:
    """And what another one is: a draw for a whole block with its states' own; nothing while neither is known."""
    for scope in ("future_blocks", "masked"):
        with pytest.raises(UsageError, match=rf"reveal_scope='{scope}' .* sees nothing behind the current block"):
            view(reveal_scope=scope)
    with pytest.raises(UsageError, match=r"reuse='prompt' .* reuse=block, which is exact"):
        view(reuse="prompt")
    for scope in ("block", "later_state"):
        assert view(reveal_scope=scope) and view(reveal_scope=scope, block_causal=None)
        with pytest.raises(UsageError, match=rf"reveal_scope='{scope}' .* reuse=none or prompt"):
            view(reveal_scope=scope, block_causal=False)
    assert view(reveal_scope="future_blocks", teacher_context="reference")


def test_each_state_of_a_block_has_a_reveal_of_its_own() -> None:
    """Reuse is exact, so nothing has to be drawn once for a block."""
    drawn = []
    for reuse in ("none", "block"):
        examples = [
            view(reuse=reuse, retain_ratio=0.5).example(one, one.prompt_ids, eos_id=0, seed=1) for one in trajectories()
        ]
        drawn.append(torch.cat([example.reveal for example in examples]))
    assert torch.equal(*drawn) and drawn[0].any()


# ---- runs ----

SHORT = [
    *("--recipe", "block_causal", "--task", "sudoku", "--train_problems", "4", "--validation_problems", "2"),
    *("--eval_problems", "2", "--gen_length", "16", "--block_length", "8", "--steps", "8", "--max_steps", "2"),
    *("--per_device_train_batch_size", "2", "--pass_k", "1", "--correct_only", "false", "--clip", "none"),
    *("--lora_r", "4", "--lora_dropout", "0", "--learning_rate", "1e-3", "--states_per_forward", "5"),
    *("--bf16", "false", "--dtype", "float32", "--gradient_checkpointing", "false"),
    *("--eval_strategy", "no", "--save_strategy", "no"),
]


def trained(folder: str, output: Path, *words: str) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """The adapter that a run leaves, and its metrics."""
    run.main([*SHORT, "--model", folder, "--output_dir", str(output), *words])
    done = run.Run(output, json.loads((output / "report.json").read_text()))
    return load_file(output / "adapter_model.safetensors"), done.metrics


def test_runs_with_reuse_and_without_leave_one_adapter(
    folder: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Up to fp32's rounding, for fewer tokens, with a drift that says so and a warning that the blocks are short."""
    model = folder("Fast_dLLM_Qwen")
    exact, plain = trained(model, tmp_path / "none", "--reuse", "none", "--cache", "none")
    assert "blocks of 8 have few" in capsys.readouterr().out
    reused, metrics = trained(model, tmp_path / "block")
    assert exact.keys() == reused.keys()
    moved = torch.cat([value.flatten() for name, value in exact.items() if "lora_B" in name])
    apart = torch.cat([(reused[name] - value).flatten() for name, value in exact.items() if "lora_B" in name])
    assert float(moved.norm()) > 0 and float(apart.norm()) <= 1e-2 * float(moved.norm())
    drifts = [row["drift"] for row in metrics if "drift" in row]
    assert len(drifts) == 2 and max(drifts) < 1e-5
    assert metrics[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-4) != 0


def test_the_model_that_ships_has_something_to_learn() -> None:
    """It is right often enough to learn from that, and not more; the cache changes no response."""
    network, tokenizer = load_model("tiny-causal")
    decoder, rows = Decoder.of(network, tokenizer, Sudoku(), 32), Sudoku().problems("validation", 32)
    plain, cached = (
        decoder.once(rows, Decoding(48, 16, 24, cache=cache), torch.arange(32)) for cache in ("none", "block")
    )
    assert [one.response for one in plain] == [one.response for one in cached]
    assert 0.15 < sum(one.score for one in plain) / 32 < 0.7


def test_a_run_whose_teacher_sees_a_later_state(folder: Callable[..., str], tmp_path: Path) -> None:
    """Of its own block, with the reuse that is exact; blocks are counted from the prompt's end."""
    words = "--reveal_scope", "later_state", "--reveal_gap", "none", "--retain_ratio", "1"
    _, metrics = trained(folder("a2d-qwen3"), tmp_path / "run", *words)
    assert metrics[0]["loss"] > 0


def test_the_recipe_of_a_block_causal_folder(folder: Callable[..., str], tmp_path: Path) -> None:
    """Is the one that such a model needs, unless one is named."""
    model = folder("a2d-qwen2")
    groups = parse_train(["--model", model, "--output_dir", str(tmp_path / "run")])
    values = {name: value for group in groups for name, value in vars(group).items()}
    assert (values["recipe"], values["reveal_scope"], values["reuse"]) == ("block_causal", "block", "block")
    assert parse_train(["--model", model, "--recipe", "paper"])[0].recipe == "paper"
    (Path(model) / "config.json").write_text("{")
    assert parse_train(["--model", model])[0].recipe == "paper"


REFUSED: list[tuple[Sequence[str], Sequence[str]]] = [
    (["--reveal_scope", "masked"], ["reveal_scope='masked'", "--recipe block_causal"]),
    (["--reuse", "prompt"], ["reuse='prompt'", "reuse=block, which is exact"]),
    (["--cache", "prefix"], ["cache='prefix'", "cache=block, which is exact, or none"]),
    (["--block_length", "4"], ["block_length=4", "its blocks have 8 tokens"]),
    (
        ["--teacher_context", "reference"],
        ["teacher_context='reference'", "counts blocks from a sequence's first token"],
    ),
]


def test_what_is_refused(folder: Callable[..., str], tmp_path: Path, command: Command) -> None:
    """In a sentence and with status 2, before anything is written."""
    model = folder("sdar")
    for words, sentences in REFUSED:
        output = tmp_path / "refused"
        status, _, err = command(run.main, *SHORT, "--model", model, "--output_dir", str(output), *words)
        assert status == 2 and all(sentence in err for sentence in sentences), (words, err)
        assert len(err.splitlines()) == 1 and not output.exists()


def test_other_methods_are_refused() -> None:
    """They mask whole responses, and know nothing of finished blocks."""
    for name, method in METHODS.items():
        if name != "d_opsd":
            with pytest.raises(UsageError, match=rf"method='{name}' can't be used: only d_opsd"):
                method.check_model(small_model("sdar"), TeachingArguments(method=name))


def test_a_folder_generates(folder: Callable[..., str]) -> None:
    """Completions with the cache, the recipe's, and without, of prompts that end anywhere in a block."""
    model = load(folder("sdar"), dtype="float32")
    prompts = ["1", "12=", "0400002002101040:", "1:2:3"]
    cached, plain = (
        model.generate(prompts, gen_length=16, block_length=8, steps=8, cache=cache) for cache in ("block", "none")
    )
    assert model.decoding.cache == "block" and [one.text for one in cached] == [one.text for one in plain]
    assert {one.trajectory.lead for one in cached} == {1, 3, 5}
    with pytest.raises(UsageError, match="its blocks have 8 tokens"):
        model.generate(prompts, gen_length=16, block_length=4)
