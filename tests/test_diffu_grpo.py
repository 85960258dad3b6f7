"""diffu-GRPO: its update is the published one written out, however it is cut into passes and processes."""

from __future__ import annotations

import csv
import json
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dopsd import run
from dopsd.baselines.likelihood import Group, Likelihood, LikelihoodBatch, collate, likelihood_batches
from dopsd.memory import meter
from dopsd.memory.probe import RunProbe
from dopsd.models.llada import LLaDAModelLM
from dopsd.seeds import PROMPT_MASK, mix_seeds
from dopsd.tasks.sudoku import Sudoku
from dopsd.trainer import Trainer

Make = Callable[..., Trainer]

measurable = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="a CPU's peaks can't be measured here"
)

GROUP = 4
SHORT = ["--method", "diffu_grpo", "--gen_length", "16", "--block_length", "8", "--steps", "8", "--pass_k", str(GROUP)]
LEFT = [
    "--likelihood",
    "exact",
    "--remasking",
    "leftmost",
    "--gen_length",
    "8",
    "--temperature",
    "1",
    "--kl_weight",
    "0",
]
# Two updates each: one pass for a response, or for a group, or for a token; JustGRPO's objective with the last.
MODES = {
    "one mask a response": ["--ratio_clip", "0.02"],
    "one mask a group": ["--ratio_clip", "0.02", "--share_prompt_mask", "true", "--kl_weight", "0.3"],
    "no mask": ["--prompt_mask", "0", "--kl_weight", "0"],
    "exact": [*LEFT, "--advantage", "standardized"],
}


class Lottery(Sudoku):
    """Sudoku in which grades are quarters that depend on the response and say nothing about it."""

    def score(self, row: Mapping[str, str], response: str) -> float:
        return zlib.crc32((row["puzzle"] + response).encode()) % 5 / 4


class Ragged(Lottery):
    """With prompts of two lengths."""

    def prompt(self, row: Mapping[str, str]) -> str:
        return super().prompt(row) * (1 + zlib.crc32(row["puzzle"].encode()) % 2)


class Graded(Sudoku):
    """Sudoku in which every response gets the same grade."""

    def score(self, row: Mapping[str, str], response: str) -> float:
        return 1.0


def exact(make_trainer: Make, random_model: Path, *options: str) -> Trainer:
    """A trainer in fp64, without dropout, LoRA's B away from its zeros."""
    trainer = make_trainer(
        *("--model", str(random_model), *SHORT, "--lora_dropout", "0", "--updates_per_batch", "2", *options),
        task=Lottery(),
    )
    trainer.student.double()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainer.student.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
    return trainer


def adapter(trainer: Trainer) -> dict[str, torch.nn.Parameter]:
    """What is trained."""
    return {name: value for name, value in trainer.student.named_parameters() if value.requires_grad}


def gradients(trainer: Trainer, rows: Sequence[int] = (0, 1)) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of the update that is next."""
    trainer.student.zero_grad()
    loss = trainer.training_step(trainer.student, {"rows": [trainer.train_dataset[row] for row in rows]})
    return float(loss), {name: value.grad.clone() for name, value in adapter(trainer).items() if value.grad is not None}


def move(trainer: Trainer, grads: Mapping[str, Tensor]) -> None:
    """A step far enough for ratios to be clipped."""
    with torch.no_grad():
        for name, value in adapter(trainer).items():
            value -= 0.5 * grads[name] / grads[name].abs().max()


def token_log_probabilities(trainer: Trainer, ids: Tensor, tokens: Tensor, places: Sequence[int]) -> list[Tensor]:
    """Of ``tokens`` at these places of one sequence, from its whole logits."""
    logits = trainer.student(input_ids=ids[None]).logits[0].clone()
    logits[:, trainer.method.decoder.mask_id] = -math.inf
    return [logits[place].log_softmax(-1)[token] for place, token in zip(places, tokens, strict=True)]


def response_log_probabilities(
    trainer: Trainer, rollout: Any, count: int, seed: int, update: int, number: int
) -> list[Tensor]:
    """Of the first ``count`` tokens of the response with this ``number`` in its group, as the method is defined."""
    teaching, mask = trainer.teaching, trainer.method.decoder.mask_id
    prompt, tokens = rollout.trajectory.prompt_ids, rollout.trajectory.tokens
    start = len(prompt)
    if teaching.likelihood == "exact":
        found = []
        for t in range(count):
            ids = torch.cat((prompt, tokens[:t], torch.full((len(tokens) - t,), mask)))
            found += token_log_probabilities(trainer, ids, tokens[t : t + 1], [start + t])
        return found
    shown = prompt.clone()
    if teaching.prompt_mask:
        state = 0 if teaching.share_prompt_mask else number
        generator = torch.Generator().manual_seed(int(mix_seeds(seed, PROMPT_MASK, update, state)))
        shown[torch.rand(start, generator=generator) < teaching.prompt_mask] = mask
    ids = torch.cat((shown, torch.full((len(tokens),), mask)))
    return token_log_probabilities(trainer, ids, tokens[:count], range(start, start + count))


@pytest.mark.parametrize("options", MODES.values(), ids=MODES.keys())
def test_an_update_is_the_published_one_written_out(
    options: list[str], make_trainer: Make, random_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients of both updates of a batch, from full logits in loops, whatever the micro-batches are."""
    trainer = exact(make_trainer, random_model, *options)
    method, teaching, rows = trainer.method, trainer.teaching, (0, 1)
    seeds = mix_seeds(trainer.args.seed, 0, torch.tensor(rows))
    rollouts = method.rollouts(method.decoder, [trainer.train_dataset[row][1] for row in rows], seeds, lambda _: None)
    assert len(rollouts) == 2 * GROUP

    kept = []  # (rollout, seed of its row, number in its group, tokens that count, advantage)
    for row, seed in zip(rows, seeds.tolist(), strict=True):
        group = rollouts[row * GROUP : (row + 1) * GROUP]
        rewards = [rollout.score for rollout in group]
        mean = sum(rewards) / GROUP
        deviation = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / (GROUP - 1))
        assert deviation > 0
        for number, (rollout, reward) in enumerate(zip(group, rewards, strict=True)):
            words = rollout.trajectory.tokens.tolist()
            eos = method.decoder.eos_id
            count = words.index(eos) + 1 if eos in words else len(words)
            scale = 1 / (deviation + 1e-4) if teaching.advantage == "standardized" else 1
            kept.append((rollout, seed, number, count, (reward - mean) * scale))
    size = sum(count for *_, count, _ in kept)

    def all_log_probabilities(update: int) -> list[list[Tensor]]:
        return [
            response_log_probabilities(trainer, rollout, count, seed, update, number)
            for rollout, seed, number, count, _ in kept
        ]

    with torch.no_grad():
        old = [all_log_probabilities(update) for update in (0, 1)]
        with trainer.student.disable_adapter():
            reference = [all_log_probabilities(update) for update in (0, 1)] if teaching.kl_weight else old

    clipped = 0
    for update in (0, 1):
        loss = torch.zeros((), dtype=torch.float64)
        now = all_log_probabilities(update)
        for place, (*_, advantage) in enumerate(kept):
            for logprob, before, first in zip(now[place], old[update][place], reference[update][place], strict=True):
                ratio = torch.exp(logprob - before)
                bounded = torch.clamp(ratio, 1 - teaching.ratio_clip, 1 + teaching.ratio_clip)
                clipped += int(bounded * advantage < ratio * advantage)
                loss = loss - torch.min(ratio * advantage, bounded * advantage) / size
                kl = torch.exp(first - logprob) - (first - logprob) - 1
                loss = loss + teaching.kl_weight * kl / size
        named = adapter(trainer)
        expected = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
        slices = list(trainer.slices)
        for states in (3, 1000):
            method.resize(replace(method.sizes, states_per_forward=states))
            trainer.slices = list(slices)
            found, grads = gradients(trainer, rows)
            # Advantages are kept in fp32.
            assert found == pytest.approx(float(loss.detach()), rel=1e-6, abs=1e-7)
            for name, grad in expected.items():
                assert grad.abs().max() > 0
                assert float((grads[name] - grad).abs().max()) <= 1e-6 * float(grad.abs().max()), name
        move(trainer, grads)
    assert not trainer.slices
    assert clipped
    figures = {name for entry in trainer.update_metrics for name in entry.values}
    assert figures >= {"ratio", "clipped"} and ("kl" in figures) == bool(teaching.kl_weight)


def test_a_shared_mask_takes_one_pass_for_a_group(make_trainer: Make, random_model: Path) -> None:
    """A state for each group, and not for each response; without a mask there is one too."""
    tokens = {}
    for name in ("one mask a response", "one mask a group", "no mask"):
        trainer = exact(make_trainer, random_model, *MODES[name])
        (groups, _) = trainer.roll_out([trainer.train_dataset[row] for row in (0, 1)])
        batches = list(trainer.method.batches(groups, torch.tensor(0), lambda *_: None))
        assert sum(map(len, batches)) == sum(map(trainer.method.states, groups))
        tokens[name] = sum(batch.tokens for batch in batches)
    assert tokens["one mask a group"] == tokens["no mask"] == tokens["one mask a response"] // GROUP


def test_what_has_no_gradient_takes_no_pass(make_trainer: Make, random_model: Path) -> None:
    """Without a reference, groups with one reward are left out; with one they are held to it."""
    for weight, count in (("0", 0), ("0.1", 2)):
        trainer = make_trainer("--model", str(random_model), *SHORT, "--kl_weight", weight, task=Graded())
        (groups,) = trainer.roll_out([trainer.train_dataset[row] for row in (0, 1)])
        assert len(groups) == count and bool(trainer.batch_size) == bool(count)
        logged = {name: value for entry in trainer.update_metrics for name, value in entry.values.items()}
        assert ("forward_tokens" in logged) == bool(count)
        assert (logged["accepted"], logged["reward"], logged["reward_std"], logged["tries"]) == (count / 2, 1, 0, 1)
        assert logged["rollouts"] == 2 * GROUP
        assert all(not group.advantages.any() for group in groups)


def test_prompts_masks_are_drawn_for_the_row_the_response_and_the_update(
    make_trainer: Make, random_model: Path
) -> None:
    """Whatever is beside them; about the share that is asked for is masked, and nothing else is changed."""
    trainer = exact(make_trainer, random_model)
    first, second = trainer.roll_out([trainer.train_dataset[row] for row in (0, 1, 2)])
    alone, _ = trainer.roll_out([trainer.train_dataset[2]])
    likelihood, mask = replace(trainer.method.likelihood, prompt_mask=0.3), trainer.method.decoder.mask_id

    def prompts(group: Group) -> list[Tensor]:
        return [likelihood.prompt(group, state, mask) for state in range(GROUP)]

    assert all(torch.equal(one, other) for one, other in zip(prompts(first[2]), prompts(alone[0]), strict=True))
    different = [*prompts(first[0]), *prompts(second[0]), *prompts(first[2])]
    assert len({tuple(prompt.tolist()) for prompt in different}) == 3 * GROUP
    many = replace(first[0], prompt_ids=torch.full((10_000,), 5))
    shown = likelihood.prompt(many, 0, mask)
    share = float((shown == mask).float().mean())
    assert abs(share - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 10_000) and set(shown.tolist()) == {5, mask}


# ---- memory ----


@pytest.mark.parametrize("options", MODES.values(), ids=MODES.keys())
def test_no_micro_batch_is_larger_than_a_probe(options: list[str], make_trainer: Make, random_model: Path) -> None:
    """Every micro-batch of real groups computes at most the tokens, and has at most the rows, of the made-up one."""
    trainer = make_trainer(
        *("--model", str(random_model), *SHORT, "--updates_per_batch", "2", "--stop_at_eos", "false", *options),
        task=Ragged(),
    )
    method, rows = trainer.method, [row for _, row in trainer.train_dataset]
    probe = RunProbe(method, meter.ResidentMeter(), rows, trainer.rollouts, trainer.teaching, trainer.args)
    _, groups = trainer.roll_out([trainer.train_dataset[number] for number in range(4)])
    assert len({len(group.prompt_ids) for group in groups}) == 2
    assert max(2 * method.states(group) for group in groups) <= probe.states <= 2 * GROUP * 16
    for size in (1, 2, 5, 12):
        made_up = probe.batch(size)
        assert isinstance(made_up, LikelihoodBatch) and len(made_up) == size and made_up.old is not None
        for batch in likelihood_batches(groups, method.likelihood, size, **method.collation()):
            assert batch.tokens <= probe.tokens(size) and batch.targets.numel() <= made_up.targets.numel()
        method.loss(made_up).loss.backward()


@pytest.mark.parametrize("likelihood", [Likelihood(False, 0.2, True), Likelihood(True, 0.2, False)], ids=str)
def test_no_tensor_of_rows_by_vocabulary(small_llada: Callable[..., LLaDAModelLM], likelihood: Likelihood) -> None:
    """In a micro-batch's forward and backward no tensor with the vocabulary is larger than the op's workspace."""
    vocab, length, workspace = 1009, 24, 1 << 16
    model = small_llada(vocab_size=vocab, mask_token_id=vocab - 1, dtype=torch.float32)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for table in (model.model.transformer.ff_out, model.get_input_embeddings()):
        table.requires_grad_(False)
    tokens = torch.randint(1, vocab - 1, (3, length), generator=torch.Generator().manual_seed(0))
    group = Group(torch.arange(5), tokens, torch.full((3,), length), torch.ones(3), seed=0)
    index = [(0, state) for state in range(likelihood.states(group))]
    batch = collate([group], index, likelihood, mask_id=vocab - 1, pad_id=0, device=torch.device("cpu"))
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made = [one for one in tree_leaves(out) if isinstance(one, Tensor)]
            for tensor in (one for one in made if one.untyped_storage().data_ptr() not in weights):
                if any(size and size % vocab == 0 for size in tensor.shape):
                    largest[0] = max(largest[0], tensor.nbytes)
            return out

    with Watch():
        batch.log_probabilities(model, vocab - 1, workspace).sum().backward()
    assert 0 < largest[0] <= workspace < len(batch.targets) * vocab * 4


def test_passes_before_an_update_run_out_of_memory(
    make_trainer: Make, random_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the old policy and the reference too: done again with fewer states, to the same log-probabilities."""
    trainer = exact(make_trainer, random_model)
    (row,) = [trainer.train_dataset[0]]
    expected = trainer.roll_out([row])
    compute = LikelihoodBatch.log_probabilities

    def scarce(batch: LikelihoodBatch, *args: Any) -> Tensor:
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return compute(batch, *args)

    monkeypatch.setattr(LikelihoodBatch, "log_probabilities", scarce)
    found = trainer.roll_out([row])
    assert trainer.method.sizes.states_per_forward == 1 and not trainer.method.sizes.checkpointing
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other[0].reference, one[0].reference, rtol=1e-12, atol=1e-12)
    assert expected[0][0].old is None
    torch.testing.assert_close(found[1][0].old, expected[1][0].old, rtol=1e-12, atol=1e-12)


# ---- runs ----


@measurable
def test_a_run_with_a_budget(small_run: list[str], random_model: Path, tmp_path: Path) -> None:
    """From the command line to the report; passes that are not the student's are counted as such."""
    argv = [*small_run, *SHORT, "--model", str(random_model), "--max_steps", "3", "--memory_budget", "0.9"]
    run.main([*argv, "--logging_steps", "1", "--output_dir", str(tmp_path / "run")])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["updates"] == 3 and report["memory"]["sizes"]["states_per_forward"] <= 2 * GROUP
    assert (tmp_path / "run" / "README.md").is_file() and (tmp_path / "run" / "curves.png").stat().st_size > 0
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    assert len(rows) == 3
    for row in rows:
        assert float(row["rollouts"]) == 2 * GROUP == float(row["states"]) and float(row["ratio"]) == 1
        assert row["forward_tokens"] == row["tokens"]  # the reference's passes, over the same states
        assert 0 <= float(row["first_try"]) <= float(row["pass_rate"]) <= 1 and row["reward_std"] and row["kl"]
