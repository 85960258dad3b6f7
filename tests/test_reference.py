"""`--recipe reference` against a literal transcription of what docs/reference.md says the authors' code does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from dopsd.commands import parse_train
from dopsd.distillation import Distillation
from dopsd.method import Sizes
from dopsd.models import adapter_parameters, add_lora
from dopsd.models.llada import LLaDAModelLM
from dopsd.rollout import Decoder, Rollout
from dopsd.sampler import decode
from dopsd.seeds import REVEAL, mix_seeds
from dopsd.tasks import load_task
from dopsd.teacher import STUDENT, TeacherWeights
from dopsd.trajectory import Trajectory

EOS, MASK, VOCAB = 0, 36, 37
LENGTH, BLOCK, SLICES = 36, 6, 4
SEED = torch.tensor(11)
ROUNDED = 2**-23  # of the states' weights, 1 / S, which are fp32


@pytest.fixture
def method(small_llada: Callable[..., LLaDAModelLM], tmp_path: Path) -> Distillation:
    """The recipe's, of 36 tokens in blocks of six, on a random model with a random adapter."""
    model_arguments, _, rollouts, teaching, _ = parse_train(
        recipe="reference", gen_length=LENGTH, block_length=BLOCK, steps=LENGTH // 2, output_dir=tmp_path, bf16=False
    )
    assert teaching.updates_per_batch == SLICES
    network = small_llada()
    with torch.no_grad():
        network.lm_head_weight[EOS] *= 2  # so that texts end
    student = add_lora(network, model_arguments.lora_targets, 3, 6, model_arguments.lora_dropout).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in adapter_parameters(student, STUDENT).values():
            value += 0.1 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
    teacher = TeacherWeights(student, teaching.teacher, teaching.ema_decay, from_adapter=False)
    decoder = Decoder(network, None, load_task("sudoku"), MASK, EOS, 8)
    return Distillation(student, teacher, decoder, Sizes(5, False, 8), Accelerator(cpu=True), rollouts, teaching)


def whole_response(end: int | None) -> Trajectory:
    """Random tokens, two to a step, and the first end-of-text at ``end``; behind it text may go on."""
    generator = torch.Generator().manual_seed(0 if end is None else end)
    tokens = torch.randint(1, MASK, (LENGTH,), generator=generator)
    if end is not None:
        tokens[end] = EOS
        tokens[end + 1 :: 2] = EOS
    order = torch.cat([torch.randperm(BLOCK, generator=generator) + start for start in range(0, LENGTH, BLOCK)])
    reveal_step = torch.empty(LENGTH, dtype=torch.int64)
    reveal_step[order] = torch.arange(LENGTH) // 2
    return Trajectory(torch.tensor([3, 9, 4]), tokens, reveal_step, BLOCK)


def logits(method: Distillation, trajectory: Trajectory, response: list[int]) -> Tensor:
    """(L, V) of the network as it is."""
    network = method.decoder.model
    hidden = network.hidden_states(torch.cat((trajectory.prompt_ids, torch.tensor(response)))[None])
    return hidden[0, len(trajectory.prompt_ids) :] @ network.lm_head_weight.detach().T


@pytest.mark.parametrize("end", [None, 31, 18, 14, 3])
def test_states_reveals_k_loss_and_gradients(method: Distillation, end: int | None) -> None:
    """Of each slice of a response: one by one, from what is decoded to the gradient of every adapted weight."""
    trajectory = whole_response(end)
    tokens, at = trajectory.tokens.tolist(), trajectory.reveal_step.tolist()
    first_end = tokens.index(EOS) if EOS in tokens else LENGTH

    # What is recorded: the state before each step, until everything before an end-of-text stands; not the last block's.
    recorded: list[tuple[list[int], int]] = []
    for step in range(LENGTH // 2):
        state = [token if when < step else MASK for token, when in zip(tokens, at, strict=True)]
        if EOS in state and MASK not in state[: state.index(EOS)]:
            break
        if (block := min(i for i in range(LENGTH) if at[i] == step) // BLOCK) < LENGTH // BLOCK - 1:
            recorded.append((state, block))

    # The teacher's states: a quarter, rounded down, of all that lies behind the block, if there is text.
    seed = int(mix_seeds(SEED, REVEAL))
    noise = torch.rand(len(recorded), LENGTH, generator=torch.Generator().manual_seed(seed)).tolist()
    shown = []
    for (state, block), row in zip(recorded, noise, strict=True):
        behind = (block + 1) * BLOCK
        candidates = sorted(range(behind, LENGTH), key=row.__getitem__) if behind < first_end else []
        drawn = candidates[: int(len(candidates) * 0.25)]
        shown.append([tokens[i] if i in drawn else state[i] for i in range(LENGTH)])

    rollout = Rollout({}, trajectory, "", 1.0, 1)
    slices = method.slices(method.examples([{}], [rollout], SEED[None]))
    size = (len(recorded) - 1) // SLICES
    assert [sum(map(method.states, part)) for part in slices] == [size] * SLICES
    for number, part in enumerate(slices):
        if not size:
            continue
        chosen = range(number * size, (number + 1) * size)
        views = part[0].views(range(size), MASK)
        assert [view.tolist() for view in views] == [[recorded[i][0] for i in chosen], [shown[i] for i in chosen]]

        # The teacher's two largest raw logits among the block's masked positions; its twenty likeliest tokens there.
        total = torch.zeros((), dtype=torch.float64)
        positions = []
        for i in chosen:
            state, block = recorded[i]
            with method.student.disable_adapter(), torch.no_grad():
                theirs = logits(method, trajectory, shown[i])
            ours = logits(method, trajectory, state)
            masked = [p for p in range(block * BLOCK, (block + 1) * BLOCK) if state[p] == MASK]
            k = sorted(masked, key=lambda p, z=theirs: -float(z[p, :MASK].max()))[:2]  # type: ignore[misc]
            positions.append(sorted(k))
            for p in k:
                best = theirs[p].topk(20).indices
                log_t, log_s = theirs[p, best].log_softmax(-1), ours[p, best].log_softmax(-1)
                total = total + (log_s.exp() * (log_s - log_t)).clamp(max=0.05).sum() / size
        weights = [p for p in method.student.parameters() if p.requires_grad]
        expected = torch.autograd.grad(total, weights)

        loss, found = torch.zeros((), dtype=torch.float64), []
        for batch in method.batches(part, SEED, lambda *_, **__: None):
            output = method.objective.forward(method.decoder.model, method.teacher, batch, MASK)
            loss = loss + output.loss
            found += [row[k].tolist() for row, k in zip(batch.columns, output.chosen, strict=True)]
        assert found == positions
        torch.testing.assert_close(loss / method.size(part), total, rtol=ROUNDED, atol=1e-12)
        for value, own in zip(torch.autograd.grad(loss, weights), expected, strict=True):
            torch.testing.assert_close(value, own, rtol=ROUNDED, atol=1e-12)
        assert any(bool(value.abs().max() > 1e-6) for value in expected)


def test_what_is_decoded_and_what_of_it_is_recorded(method: Distillation) -> None:
    """Every try is sampled, and to the end; what is trained on ends where a decoding that stops there would have."""
    decoding = method.decoding.first_try()
    assert (decoding.temperature, decoding.stop_at_eos) == (0.9, False)
    prompts = [torch.tensor([1 + number, 2, 3]) for number in range(8)]
    options = {"mask_id": MASK, "eos_id": EOS, "seeds": torch.arange(8)}
    whole = decode(method.decoder.model, prompts, decoding, **options)
    stopping = method.decoding.decoding()
    stopped = decode(
        method.decoder.model, prompts, type(decoding)(**{**vars(decoding), "stop_at_eos": True}), **options
    )
    assert stopping.temperature == 0
    shorter = behind = 0
    for one, two in zip(whole, stopped, strict=True):
        end = one.text_length(EOS)
        assert torch.equal(one.tokens[:end], two.tokens[:end])
        steps = torch.arange(two.num_steps)
        steps = steps[one.block_starts(steps) < LENGTH - BLOCK]
        example = method.objective.example(one, one.prompt_ids, eos_id=EOS, seed=0)
        assert torch.equal(example.steps, steps)
        assert torch.equal(one.states(steps, MASK), two.states(steps, MASK))
        shorter += two.num_steps < one.num_steps
        behind += bool((one.tokens[end:] != EOS).any())
    assert shorter and behind, "a random model ends some texts, and goes on behind the end"
