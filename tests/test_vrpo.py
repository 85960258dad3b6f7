"""vrpo: pairs of responses, the loss of their ELBOs, and what is asked of options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_memory import measurable
from test_resume import Lottery
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dopsd.baselines.vrpo import Pair
from dopsd.commands import parse_train
from dopsd.errors import UsageError
from dopsd.memory.meter import ResidentMeter
from dopsd.memory.probe import RunProbe
from dopsd.rollout import Rollout
from dopsd.seeds import MASKING, PAIRING, mix_seeds
from dopsd.trainer import Trainer

Make = Callable[..., Trainer]
DRAWS, BETA, SFT, TRIES = 3, 0.5, 0.3, 4
NUMBERS = (0, 2, 4, 9)


@pytest.fixture
def exact(make_trainer: Make, random_model: Path) -> Trainer:
    """In fp64, with LoRA B away from its zeros, so that policy and reference are two; dropout only if it is put in."""
    options = {"elbo_draws": DRAWS, "preference_beta": BETA, "sft_weight": SFT, "pass_k": TRIES, "lora_dropout": 0.5}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    trainer = make_trainer("--model", str(random_model), "--method", "vrpo", *words, task=Lottery())
    trainer.student.double()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainer.student.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
    dropout(trainer, 0.0)
    return trainer


def dropout(trainer: Trainer, share: float) -> None:
    """Drop this share of the adapter's inputs in training."""
    for module in trainer.student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = share


def gradients_of(trainer: Trainer) -> dict[str, Tensor]:
    """The adapter's gradients, which are there and are not 0."""
    grads = {name: p.grad.clone() for name, p in trainer.student.named_parameters() if p.grad is not None}
    assert grads and all("lora_" in name and bool(grad.any()) for name, grad in grads.items())
    return grads


def resize(trainer: Trainer, states: int) -> None:
    trainer.method.resize(replace(trainer.method.sizes, states_per_forward=states))


def elbo(trainer: Trainer, prompt: list[int], tokens: list[int], p: list[float], hidden: list[list[bool]]) -> Tensor:
    """Of one response, draw by draw and token by token, from all its logits."""
    mask, end = trainer.method.decoder.mask_id, length_of(trainer, tokens)
    total = torch.zeros((), dtype=torch.float64)
    for share, row in zip(p, hidden, strict=True):
        seen = [mask if is_hidden else token for is_hidden, token in zip(row, tokens, strict=True)]
        logits = trainer.student(input_ids=torch.tensor([prompt + seen])).logits[0, len(prompt) :]
        for i in range(end):
            if row[i]:
                total = total + logits[i].log_softmax(-1)[tokens[i]] / share
    return total / len(p)


def length_of(trainer: Trainer, tokens: list[int]) -> int:
    """Up to the first end-of-text token and with it."""
    eos = trainer.method.decoder.eos_id
    return tokens.index(eos) + 1 if eos in tokens else len(tokens)


def pair_of(trainer: Trainer, number: int) -> tuple[Rollout, Rollout] | None:
    """A right and a wrong response to a row, if it has both: each try decoded alone, at the temperature."""
    decoder, row = trainer.method.decoder, trainer.train_dataset[number][1]
    seed = mix_seeds(trainer.args.seed, 0, number)
    warm = replace(trainer.rollouts.decoding(), temperature=0.9)
    tries = [decoder.once([row], warm, mix_seeds(seed, 1 + j)[None])[0] for j in range(TRIES)]
    right, wrong = [one for one in tries if one.score == 1], [one for one in tries if one.score == 0]
    if not right or not wrong:
        return None
    return tuple(  # type: ignore[return-value]
        ones[int(mix_seeds(seed, PAIRING, side)) % len(ones)] for side, ones in enumerate((right, wrong))
    )


def test_an_update_is_its_definition(exact: Trainer) -> None:
    """Loss and gradients against every draw alone with all its logits, for micro-batches of any size."""
    trainer = exact
    pairs = {number: pair for number in NUMBERS if (pair := pair_of(trainer, number)) is not None}
    assert 2 <= len(pairs) < len(NUMBERS), "some row has no pair"
    trainer.student.eval().zero_grad()
    total, margins, lengths = torch.zeros((), dtype=torch.float64), [], []
    for number, pair in pairs.items():
        seed = mix_seeds(mix_seeds(trainer.args.seed, 0, number), MASKING)
        generator = torch.Generator().manual_seed(int(seed))
        own, reference = [], []
        for response in pair:
            prompt, tokens = response.trajectory.prompt_ids.tolist(), response.trajectory.tokens.tolist()
            end = length_of(trainer, tokens)
            lengths.append(end)
            tokens = tokens[:end] + [trainer.method.decoder.eos_id] * (48 - end)
            p = [(1 - 1e-3) * t + 1e-3 for t in torch.rand(DRAWS, generator=generator).tolist()]
            noise = torch.rand(DRAWS, 48, generator=generator).tolist()
            hidden = [[u < share for u in row] for share, row in zip(p, noise, strict=True)]
            own.append(elbo(trainer, prompt, tokens, p, hidden))
            with torch.no_grad(), trainer.student.disable_adapter():
                reference.append(elbo(trainer, prompt, tokens, p, hidden))
        margin = BETA * ((own[0] - reference[0]) - (own[1] - reference[1]))
        margins.append(float(margin.detach()))
        total = total + (1 + (-margin).exp()).log() - SFT * own[0] / lengths[-2]
    assert min(lengths) < 48
    (total / len(pairs)).backward()
    expected = gradients_of(trainer)
    for size in (1000, 5, 1):
        resize(trainer, size)
        trainer.student.zero_grad()
        trainer.slices = []
        loss = trainer.training_step(trainer.student, {"rows": [trainer.train_dataset[number] for number in NUMBERS]})
        # Weights of states are fp32, all else fp64.
        assert float(loss) == pytest.approx(total.item() / len(pairs), rel=1e-6)
        for name, grad in gradients_of(trainer).items():
            assert float((grad - expected[name]).abs().max()) <= 1e-6 * float(expected[name].abs().max()), name
    logged = {name: value for figures in trainer.update_metrics for name, value in figures.values.items()}
    assert logged["margin"] == pytest.approx(sum(margins) / len(margins), rel=1e-6)
    assert logged["preferred"] == sum(margin > 0 for margin in margins) / len(margins)
    assert logged["rollouts"] == TRIES * len(NUMBERS) and logged["accepted"] == len(pairs) / len(NUMBERS)
    assert logged["states"] == 2 * DRAWS * len(pairs)
    # 48 tokens behind prompts of 17 in every state: twice without a gradient, once with one.
    assert logged["forward_tokens"] == 2 * logged["tokens"] == 2 * 65 * logged["states"]


def examples_of(trainer: Trainer) -> list[Pair]:
    """Those of some rows."""
    return trainer.roll_out([trainer.train_dataset[number] for number in NUMBERS])[0]  # type: ignore[return-value]


def passes(trainer: Trainer, examples: list[Pair]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients."""
    trainer.student.zero_grad()
    batches = trainer.method.batches(examples, torch.tensor(0), trainer.note)
    return float(trainer.method.backward(batches, 1, seed=0)[1]), gradients_of(trainer)


def test_a_draw_that_hides_nothing(exact: Trainer) -> None:
    """Alone in its micro-batch too."""
    example = examples_of(exact)[0]
    none = torch.arange(DRAWS)[:, None] > 0
    right = replace(example.right, masked=example.right.masked & none, learnt=example.right.learnt & none)
    found = []
    for size in (1000, 1):
        resize(exact, size)
        found.append(passes(exact, [replace(example, right=right)]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    for name, grad in found[0][1].items():
        assert float((grad - found[1][1][name]).abs().max()) <= 1e-11 * float(grad.abs().max()), name


def test_dropout_has_no_part_in_the_scalar(exact: Trainer) -> None:
    """The loss is that without dropout, and gradients are not."""
    examples = examples_of(exact)
    loss, grads = passes(exact, examples)
    dropout(exact, 0.5)
    torch.manual_seed(0)
    other_loss, other_grads = passes(exact, examples)
    assert other_loss == loss and exact.student.training
    assert all(not torch.allclose(grad, other_grads[name]) for name, grad in grads.items())


def test_no_tensor_has_the_logits_of_all_rows(exact: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes without a gradient, forward and backward, where all is masked."""
    vocab = len(exact.method.decoder.model.lm_head_weight)
    exact.method.resize(replace(exact.method.sizes, workspace_bytes=10 * 8 * vocab))
    (example, *_) = examples_of(exact)
    every = torch.ones_like(example.right.masked)
    right, wrong = (replace(one, masked=every, learnt=every) for one in (example.right, example.wrong))
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            for one in torch.utils._pytree.tree_leaves(out):
                if isinstance(one, Tensor) and vocab in one.shape:
                    seen.append(one.numel())
            return out

    with Watch():
        passes(exact, [Pair(right, wrong, example.length)])
    assert seen and max(seen) < 2 * DRAWS * 48 * vocab / 2


@measurable
def test_no_micro_batch_is_larger_than_a_probe(make_trainer: Make, random_model: Path) -> None:
    """In tokens, and in positions that are read; a run with a budget learns."""
    words = ("--model", str(random_model), "--method", "vrpo", "--pass_k", str(TRIES), "--elbo_draws", str(DRAWS))
    trainer = make_trainer(*words, "--memory_budget", "0.9", "--max_steps", "1", task=Lottery())
    rows = [row for _, row in trainer.train_dataset]
    probe = RunProbe(trainer.method, ResidentMeter(), rows, trainer.rollouts, trainer.teaching, trainer.args)
    assert probe.states == trainer.method.sizes.states_per_forward == 2 * 2 * DRAWS
    examples = examples_of(trainer)
    for size in (1, 2, 5):
        resize(trainer, size)
        largest: Any = probe.batch(size)
        assert len(largest) == size
        for batch in trainer.method.batches(examples, torch.tensor(0), trainer.note):
            assert batch.tokens <= largest.tokens
            assert len(batch.targets) <= len(largest.targets) and batch.columns.shape[1] <= largest.columns.shape[1]
    trainer.train()
    assert trainer.state.log_history[0]["peak_gib"] > 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--elbo_draws 0", "elbo_draws must be at least 1, but is 0"),
        ("--preference_beta 0", "preference_beta must be positive, but is 0"),
        ("--sft_weight -1", "sft_weight must be at least 0, but is -1"),
        ("--retain_ratio 0.5", "retain_ratio=0.5 can't be used: it goes with method=d_opsd, and not with vrpo"),
        ("--correct_only false", "correct_only=False can't be used"),
        ("--method d_opsd --elbo_draws 4", "elbo_draws=4 can't be used: it goes with method=vrpo, and not with d_opsd"),
    ],
)
def test_bad_options(argv: str, said: str) -> None:
    """By name."""
    with pytest.raises(UsageError) as raised:
        parse_train(["--method", "vrpo", *argv.split()])
    assert said in str(raised.value)


def test_a_pair_needs_two_tries(make_trainer: Make, random_model: Path) -> None:
    """One is refused before anything is decoded."""
    with pytest.raises(UsageError, match="pass_k must be at least 2: a response is compared with others, but is 1"):
        make_trainer("--model", str(random_model), "--method", "vrpo", "--pass_k", "1")
