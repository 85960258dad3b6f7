"""Tries at a row: the first correct one is kept, whatever is batched with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dopsd.baselines.rejection import Rejection
from dopsd.config import RolloutArguments
from dopsd.distillation import Distillation
from dopsd.models.llada import LLaDAModelLM
from dopsd.rollout import Decoder, Rollout
from dopsd.sampler import Decoding, decode
from dopsd.seeds import mix_seeds
from dopsd.trajectory import NEVER, Trajectory

EOS, MASK, VOCAB = 0, 36, 37
DECODING = Decoding(gen_length=8, block_length=4, steps=8)
TEMPERATURE, K = 1.2, 6


class Words:
    """A tokenizer whose text is the token ids with blanks between them; the special ones have no text."""

    def __call__(self, text: str, add_special_tokens: bool, return_tensors: str) -> dict[str, torch.Tensor]:
        assert not add_special_tokens and return_tensors == "pt"
        return {"input_ids": torch.tensor([[int(word) for word in text.split()]])}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(str(i) for i in ids if not (skip_special_tokens and i in (EOS, MASK)))


class Scripted:
    """A task that grades responses by a table and notes what it graded."""

    grading = "lenient"

    def __init__(self, grades: Mapping[tuple[str, str], float]) -> None:
        self.grades, self.graded = grades, []

    def prompt(self, row: Mapping[str, str]) -> str:
        return row["ids"]

    def reference_prompt(self, row: Mapping[str, str]) -> str:
        raise NotImplementedError

    def score(self, row: Mapping[str, str], response: str) -> float:
        self.graded.append(row["name"])
        return self.grades.get((row["name"], response), 0.0)


ROWS = [{"name": f"row{n}", "ids": " ".join(str(1 + (5 * n + i) % 30) for i in range(2 + n % 4))} for n in range(7)]
SEEDS = torch.arange(7) * 1000 - 3


@pytest.fixture
def model(small_llada: Callable[..., LLaDAModelLM]) -> LLaDAModelLM:
    """A random model that hardly ever ends its text, so that tries differ."""
    network = small_llada()
    with torch.no_grad():
        network.model.transformer.ff_out.weight[EOS] = 0.0
    return network


def attempt(model: LLaDAModelLM, index: int, number: int) -> tuple[str, Trajectory]:
    """Try ``number`` at a row, decoded on its own: greedy first, then at the temperature with a seed of its own."""
    warm = Decoding(gen_length=8, block_length=4, steps=8, temperature=TEMPERATURE)
    prompt = torch.tensor([int(word) for word in ROWS[index]["ids"].split()])
    seed = SEEDS[index : index + 1] if number == 0 else mix_seeds(SEEDS[index : index + 1], number)
    (trajectory,) = decode(model, [prompt], warm if number else DECODING, mask_id=MASK, eos_id=EOS, seeds=seed)
    tokens = trajectory.tokens.tolist()
    tokens = tokens[: tokens.index(EOS)] if EOS in tokens else tokens
    return " ".join(map(str, tokens)), trajectory


def expected_of(script: list[float], k: int) -> tuple[int, float, int]:
    """The try that is kept, its grade and the number of tries, one after the other."""
    best = 0
    for number in range(k):
        if script[number] > script[best]:
            best = number
        if script[number] >= 1:
            return number, 1.0, number + 1
    return best, script[best], k


# The grade of each of six tries at each row.
SCRIPTS = [
    [1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    [0.0, 1.0, 0.0, 0.0, 1.0, 0.0],
    [0.0, 0.0, 0.0, 1.0, 0.0, 1.0],
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    [0.2, 0.1, 0.5, 0.5, 0.4, 0.3],
    [0.3, 0.9, 0.0, 0.0, 0.0, 1.0],
    [0.6, 0.6, 0.2, 0.6, 1.0, 0.9],
]


# All tries at all rows; the model is the same in every test, so they are decoded once.
TRIES: list[list[tuple[str, Trajectory]]] = []


def scripted(model: LLaDAModelLM, batch_size: int) -> tuple[Decoder, list[list[tuple[str, Trajectory]]]]:
    """A decoder whose task grades every try as `SCRIPTS` says, and all the tries."""
    if not TRIES:
        TRIES.extend([attempt(model, index, number) for number in range(K)] for index in range(len(ROWS)))
    tries, grades = TRIES, {}
    for index, script in enumerate(SCRIPTS):
        assert len({response for response, _ in tries[index]}) == K
        for (response, _), grade in zip(tries[index], script, strict=True):
            grades[ROWS[index]["name"], response] = grade
    return Decoder(model, Words(), Scripted(grades), MASK, EOS, batch_size), tries


def check(rollout: Rollout, index: int, k: int, tries: list[list[tuple[str, Trajectory]]]) -> None:
    """The rollout is the try that the row's script keeps."""
    kept, grade, count = expected_of(SCRIPTS[index], k)
    response, trajectory = tries[index][kept]
    assert rollout.row is ROWS[index]
    assert (rollout.response, rollout.score, rollout.tries) == (response, grade, count)
    assert torch.equal(rollout.trajectory.tokens, trajectory.tokens)
    assert torch.equal(rollout.trajectory.reveal_step, trajectory.reveal_step)
    assert torch.equal(rollout.trajectory.prompt_ids, trajectory.prompt_ids)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 6])
def test_the_first_correct_try_is_kept(model: LLaDAModelLM, k: int, batch_size: int) -> None:
    """For each row the first correct try, else the first of the best ones; tries are counted one after the other."""
    decoder, tries = scripted(model, batch_size)
    rollouts = decoder.pass_at_k(ROWS, DECODING, SEEDS, k, TEMPERATURE)
    assert len(rollouts) == len(ROWS)
    for index, rollout in enumerate(rollouts):
        check(rollout, index, k, tries)


@pytest.mark.parametrize("batch_size", [3, 64])
@pytest.mark.parametrize("k", [1, 2, 6])
def test_the_best_of_all_tries_is_kept(model: LLaDAModelLM, k: int, batch_size: int) -> None:
    """With ``every`` row tried k times: the last of the best, though ``tries`` still counts until one was right."""
    decoder, tries = scripted(model, batch_size)
    rollouts = decoder.pass_at_k(ROWS, DECODING, SEEDS, k, TEMPERATURE, every=True)
    assert [decoder.task.graded.count(row["name"]) for row in ROWS] == [k] * 7
    for rollout, script, made in zip(rollouts, SCRIPTS, tries, strict=True):
        best = max(range(k), key=lambda number, script=script: (script[number], number))  # type: ignore[misc]
        right = script[:k].index(1.0) + 1 if 1.0 in script[:k] else k
        assert (rollout.response, rollout.score) == (made[best][0], script[best])
        assert (rollout.tries, rollout.decoded) == (right, k)


def test_rows_do_not_disturb_each_other(model: LLaDAModelLM) -> None:
    """A row on its own, or among others in another order, keeps the same try."""
    decoder, tries = scripted(model, 4)
    for index in range(len(ROWS)):
        (alone,) = decoder.pass_at_k(ROWS[index : index + 1], DECODING, SEEDS[index : index + 1], K, TEMPERATURE)
        check(alone, index, K, tries)
    order = [6, 2, 0, 5, 1, 4, 3]
    for index, rollout in zip(
        order, decoder.pass_at_k([ROWS[i] for i in order], DECODING, SEEDS[order], K, TEMPERATURE), strict=True
    ):
        check(rollout, index, K, tries)


def test_no_more_tries_than_needed(model: LLaDAModelLM) -> None:
    """A row that is right is not tried again in a later batch, and no row gets more than k tries."""
    decoder, _ = scripted(model, 64)
    decoder.pass_at_k(ROWS, DECODING, SEEDS, K, TEMPERATURE)
    # Tries come in groups of 1, 1, 2 and the 2 that are left of 4.
    assert [decoder.task.graded.count(row["name"]) for row in ROWS] == [1, 2, 4, 6, 6, 6, 6]


def test_retry_goes_on_from_given_first_tries(model: LLaDAModelLM) -> None:
    """`retry` on first tries decoded elsewhere is the rest of `pass_at_k`."""
    decoder, tries = scripted(model, 64)
    first = decoder.once(ROWS, DECODING, SEEDS)
    assert [rollout.tries for rollout in first] == [1] * 7
    for index, rollout in enumerate(decoder.retry(first, DECODING, SEEDS, K, TEMPERATURE)):
        check(rollout, index, K, tries)


@pytest.mark.parametrize("method", [Distillation, Rejection])
def test_the_first_try_has_a_temperature_of_its_own(
    model: LLaDAModelLM, method: type[Distillation | Rejection]
) -> None:
    """Sampled with the row's own seed at that temperature, or greedy at none; later tries are what they are."""
    decoder, tries = scripted(model, 64)
    for first in (0.0, 0.7):
        options = RolloutArguments(
            gen_length=8, block_length=4, steps=8, pass_k=2, temperature=TEMPERATURE, first_temperature=first
        )
        own = decoder.once(ROWS, replace(DECODING, temperature=first), SEEDS)
        again = decoder.once(ROWS, replace(DECODING, temperature=TEMPERATURE), mix_seeds(SEEDS, 1))
        found = method.rollouts(SimpleNamespace(decoding=options), decoder, ROWS, SEEDS, print)  # type: ignore[arg-type]
        for rollout, one, two in zip(found, own, again, strict=True):
            kept = two if two.score > one.score else one
            assert torch.equal(rollout.trajectory.tokens, kept.trajectory.tokens)
        greedy = [trajectory.tokens for (_, trajectory), *_ in tries]
        same = [torch.equal(one.trajectory.tokens, tokens) for one, tokens in zip(own, greedy, strict=True)]
        assert all(same) if first == 0 else not any(same)


def test_a_group_is_tries_at_one_row(model: LLaDAModelLM) -> None:
    """Side by side, each drawn for its number whatever the batches; rows are told of when all of theirs are done."""
    decoder, _ = scripted(model, 4)
    told: list[int] = []
    found = decoder.group(ROWS, DECODING, SEEDS, 3, TEMPERATURE, on_rows=told.append)
    assert [rollout.row["name"] for rollout in found] == [row["name"] for row in ROWS for _ in range(3)]
    assert told == [1, 1, 2, 1, 1, 1]  # of batches of 4, 4, 4, 4, 4 and 1
    for index, rollout in enumerate(found):
        seed = mix_seeds(SEEDS[index // 3], 1 + index % 3)[None]
        (alone,) = decoder.once([rollout.row], replace(DECODING, temperature=TEMPERATURE), seed)
        assert torch.equal(alone.trajectory.tokens, rollout.trajectory.tokens)


def test_responses_end_at_the_end_of_text(small_llada: Callable[..., LLaDAModelLM]) -> None:
    """The response is the text before the first end-of-text token, and what is graded."""
    network = small_llada()
    with torch.no_grad():
        network.model.transformer.ff_out.weight[EOS] *= 2
    seen: list[str] = []

    class Noting(Scripted):
        def score(self, row: Mapping[str, str], response: str) -> float:
            seen.append(response)
            return 0.5

    warm = Decoding(gen_length=8, block_length=4, steps=8, temperature=0.9, stop_at_eos=False)
    rollouts = Decoder(network, Words(), Noting({}), MASK, EOS, 64).once(ROWS, warm, SEEDS)
    lengths = []
    for rollout, graded in zip(rollouts, seen, strict=True):
        tokens = rollout.trajectory.tokens.tolist()
        text = tokens[: tokens.index(EOS)] if EOS in tokens else tokens
        assert rollout.response == graded == " ".join(map(str, text)) and rollout.score == 0.5
        lengths.append(len(text))
    assert len(set(lengths)) > 2


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
def test_on_rows_counts_every_row(model: LLaDAModelLM, batch_size: int) -> None:
    """Progress adds up to the rows, in steps of at most the batch; no rows are no rollouts."""
    decoder = Decoder(model, Words(), Scripted({}), MASK, EOS, batch_size)
    steps: list[int] = []
    decoder.once(ROWS, DECODING, SEEDS, on_rows=steps.append)
    assert sum(steps) == 7 and max(steps) <= batch_size
    assert decoder.once([], DECODING, SEEDS[:0]) == []
    assert decoder.pass_at_k([], DECODING, SEEDS[:0], K, TEMPERATURE) == []


@pytest.mark.parametrize("batch_size", [2, 64])
def test_hints_follow_their_rows(model: LLaDAModelLM, batch_size: int) -> None:
    """Each row is decoded with its own hints, however rows are batched."""
    decoder = Decoder(model, Words(), Scripted({}), MASK, EOS, batch_size)
    hints = torch.randint(1, MASK, (7, 8), generator=torch.Generator().manual_seed(0))
    differing = 0
    for index, rollout in enumerate(decoder.once(ROWS, DECODING, SEEDS, hints=hints)):
        prompt = decoder.encode(ROWS[index]["ids"])
        one = {"mask_id": MASK, "eos_id": EOS, "seeds": SEEDS[index : index + 1]}
        (expected,) = decode(model, [prompt], DECODING, hints=hints[index : index + 1], **one)
        assert torch.equal(rollout.trajectory.tokens, expected.tokens)
        (without,) = decode(model, [prompt], DECODING, **one)
        differing += not torch.equal(rollout.trajectory.tokens, without.tokens)
    assert differing > 0


def test_a_rollout_is_written_and_read() -> None:
    """JSON and back: equal in all; what files of results say of it are its row's columns and what became of it."""
    tokens, steps = torch.tensor([5, 0, 7, 0]), torch.tensor([1, 0, NEVER, NEVER])
    rollout = Rollout({"question": "?"}, Trajectory(torch.tensor([3]), tokens, steps, 2), "five", 0.25, 3)
    again = Rollout.from_json(json.loads(json.dumps({**rollout.to_json(), "index": 4})))
    for name in ("prompt_ids", "tokens", "reveal_step"):
        assert torch.equal(getattr(again.trajectory, name), getattr(rollout.trajectory, name))
    assert replace(again, trajectory=rollout.trajectory) == rollout
    said = {"question": "?", "response": "five", "score": 0.25, "tokens": 1, "steps": 2, "tries": 3}
    assert again.outcome(0) == said
