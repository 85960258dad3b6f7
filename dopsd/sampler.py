"""Block-diffusion decoding: masked positions are filled block by block, the most confident first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dopsd.cache import BlockCache, Cache, CleanBlocks
from dopsd.confidence import Confidence, choose_tokens, most_confident
from dopsd.errors import must_be, require
from dopsd.models import merged_adapters, require_layers
from dopsd.models.bidirectional import DiffusionModel
from dopsd.seeds import REMASKING, mix_seeds
from dopsd.trajectory import NEVER, Trajectory, block_positions

Remasking = Literal["low_confidence", "random", "margin", "entropy", "leftmost"]
SamplingDtype = Literal["float32", "float64"]


@dataclass(frozen=True)
class Decoding:
    """How responses are decoded.

    Args:
        gen_length: L, response positions.
        block_length: B, positions per block; divides ``gen_length``.
        steps: T, denoising steps over all blocks; None for gen_length / 2, two tokens a step.
        temperature: of the Gumbel-max sample; 0 is greedy.
        remasking: what keeps a position masked: a low probability of its token (``low_confidence``), a small gap
            between the two likeliest tokens (``margin``), a high ``entropy``, chance (``random``), or masked positions
            of the block to its left (``leftmost``).
        threshold: reveal every position whose token has at least this probability, and at least one, whatever
            ``steps`` says; None follows the schedule.
        sub_block_length: with a threshold, of how many positions at a time a block is revealed, left to right; where
            its first token is predicted by what stands before the block, that one comes first, alone. So does
            Fast-dLLM v2. None: of all.
        stop_at_eos: stop a sequence once everything before its first end-of-text token is revealed.
        sampling_dtype: logits and noise in ``float32`` or ``float64``.
        cache: what the steps of a block but its first take from the first: nothing (``none``, exact), the keys and
            values of all before the block (``prefix``), or of all but the block (``block``). With a block-causal model
            ``block`` is exact: every step takes those of the finished blocks.
    """

    gen_length: int
    block_length: int
    steps: int | None = None
    temperature: float = 0.0
    remasking: Remasking = "low_confidence"
    threshold: float | None = None
    sub_block_length: int | None = None
    stop_at_eos: bool = True
    sampling_dtype: SamplingDtype = "float32"
    cache: Cache = "none"

    def __post_init__(self) -> None:
        must_be(self.gen_length >= 1, "gen_length", self.gen_length, "at least 1")
        must_be(
            self.block_length >= 1 and self.gen_length % self.block_length == 0,
            "block_length",
            self.block_length,
            f"a divisor of gen_length={self.gen_length}",
        )
        must_be(
            self.blocks <= self.total_steps <= self.gen_length,
            "steps",
            self.steps,
            f"between {self.blocks} and {self.gen_length}, 1 to {self.block_length} for every one of the {self.blocks} "
            "blocks",
        )
        must_be(self.temperature >= 0, "temperature", self.temperature, "at least 0")
        must_be(self.threshold is None or 0 < self.threshold <= 1, "threshold", self.threshold, "in (0, 1], or none")
        for name, words in (("remasking", Remasking), ("sampling_dtype", SamplingDtype), ("cache", Cache)):
            given = getattr(self, name)
            must_be(given in get_args(words), name, given, f"one of {get_args(words)}")
        require(
            self.threshold is None or self.remasking == "low_confidence",
            "threshold",
            self.threshold,
            f"it is a probability and goes with remasking='low_confidence', not {self.remasking!r}",
        )
        part = self.sub_block_length
        fits = part is None or (part >= 1 and self.block_length % part == 0)
        must_be(fits, "sub_block_length", part, f"a divisor of block_length={self.block_length}, or none")
        hint = "it goes with a threshold: a schedule says how many tokens of the whole block a step reveals"
        require(part is None or self.threshold is not None, "sub_block_length", part, hint)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.gen_length // self.block_length

    @property
    def total_steps(self) -> int:
        """T with its default filled in; at least one step a block."""
        return max(self.blocks, self.gen_length // 2) if self.steps is None else self.steps

    def schedule(self) -> list[list[int]]:
        """Tokens to reveal at each step of each block; remainders go to the first blocks and steps, as in LLaDA."""
        return [spread(self.block_length, steps) for steps in spread(self.total_steps, self.blocks)]


def check_decoding(model: DiffusionModel, decoding: Decoding) -> None:
    """Raise UsageError unless ``model`` can decode so: with that cache, and in blocks that are its own."""
    require_layers(model, "cache", decoding.cache, "none")
    own, given = model.block_size, decoding.block_length
    require(
        own in (None, given), "block_length", given, f"this model is block-causal, and its blocks have {own} tokens"
    )
    hint = "a block-causal model sees nothing behind a block: cache=block, which is exact, or none"
    require(own is None or decoding.cache != "prefix", "cache", decoding.cache, hint)


def spread(total: int, parts: int) -> list[int]:
    """``total`` in ``parts`` whole numbers that differ by at most one, the larger first."""
    base, extra = divmod(total, parts)
    return [base + (part < extra) for part in range(parts)]


def left_pad(prompts: Sequence[Tensor], pad_id: int) -> tuple[Tensor, Tensor | None]:
    """Prompts as one (N, P) batch padded on the left, and its (N, P) bool mask; None if nothing is padded."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.stack([torch.cat((prompt.new_full((width - len(prompt),), pad_id), prompt)) for prompt in prompts])
    if all(len(prompt) == width for prompt in prompts):
        return ids, None
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=ids.device)
    return ids, torch.arange(width, device=ids.device) >= (width - lengths)[:, None]


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside; the model's mode is put back on the way out."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def decode(
    model: Any,
    prompts: Sequence[Tensor],
    decoding: Decoding,
    *,
    mask_id: int,
    eos_id: int,
    seeds: Tensor,
    hints: Tensor | None = None,
    on_step: Callable[[int], object] | None = None,
) -> list[Trajectory]:
    """Decode one response to each prompt, as one batch that enters each block together.

    A sequence's result depends on its prompt and its seed, not on what it is batched with. Only the masked positions of
    a sequence's current block meet the LM head (with a threshold, where sequences differ in how many these are, as many
    positions as the sequence has that has most).

    Args:
        model: a module with ``hidden_states(input_ids, attention_mask, read)``, ``lm_head_weight`` and
            ``lead(prompt_length)``, by which blocks begin in the prompt; with a cache, a
            :class:`~dopsd.models.bidirectional.BidirectionalModel`. Its adapters are merged meanwhile, as
            :func:`~dopsd.models.merged_adapters` says.
        prompts: N tensors (P_n,) of int64 token ids, on the model's device, of any lengths.
        decoding: lengths, schedule and sampling.
        mask_id: the mask token; never chosen.
        eos_id: the end-of-text token; also fills what is left when a sequence stops early.
        seeds: (N,) int64, one per sequence; unused at temperature 0 unless ``remasking`` is ``random``.
        hints: (N, L) int64 tokens shown ahead of their turn, ``mask_id`` where there is none. A block's hints are
            cleared when decoding enters it.
        on_step: called after each step with the number of sequences still going (on a GPU, after the last block:
            asking it costs waiting for it, and is done at the ends of blocks, or at every step with a threshold or
            with blocks that begin in prompts; a cache waits at a block's first step too).

    Returns:
        N trajectories, on the CPU.
    """
    length, width = decoding.gen_length, decoding.block_length
    prompt_ids, prompt_mask = left_pad(prompts, eos_id)
    prompt_length, device = prompt_ids.shape[1], prompt_ids.device
    count = len(prompts)
    tokens = prompt_ids.new_full((count, length), mask_id)
    reveal_step = prompt_ids.new_full((count, length), NEVER)
    step = prompt_ids.new_zeros(count)
    seeds = seeds.to(device)
    going = torch.ones(count, dtype=torch.bool, device=device)
    live = torch.arange(count, device=device)  # (n,) sequences still going, as of the last look
    leads = [model.lead(len(prompt)) for prompt in prompts]
    lead, every = torch.tensor(leads, device=device), torch.arange(length, device=device)
    # Without a threshold, all sequences are at the same step of a block, which is then known here: if blocks are equal.
    known = decoding.threshold is None and not any(leads)
    schedule = decoding.schedule()
    schedule += schedule[-1:] * any(leads)  # what is left behind a first block that is shorter
    clean: CleanBlocks | None = None
    with inference(model), merged_adapters(model):
        for block, counts in enumerate(schedule):
            start = block * width - lead  # (N,) each block's first position, negative in a prompt
            cache: BlockCache | CleanBlocks | None = None
            if decoding.cache != "none" and model.block_size is None:
                cache = BlockCache(
                    model, decoding.cache, prompt_length + block * width, prompt_length + (block + 1) * width, count
                )
            elif decoding.cache != "none":
                if clean is None:
                    clean = CleanBlocks(model, prompt_ids, prompt_mask, tokens, prompt_length + start)
                else:
                    clean.advance(torch.cat((prompt_ids[live], tokens[live]), dim=1), live)
                cache = clean
            steps = iter(countdown(counts))
            rows = live  # (n,) those with masks left in this block
            while len(rows):
                position, inside = block_positions(start[rows], width, length)
                masked = inside & (reveal_step[rows].gather(1, position) == NEVER)
                if decoding.sub_block_length is not None:
                    ahead = 0 if model.block_size is None else model.shift  # predicted by what is before the block
                    masked = leftmost_part(masked, decoding.sub_block_length, ahead)
                reveals, most_masked = next(steps) if decoding.threshold is None else (1, 0)
                if not known:
                    most_masked = int(masked.sum(-1).max())
                # The masked positions of the block, in order; a sequence with fewer has others behind them.
                offsets = masked.long().argsort(dim=-1, descending=True, stable=True)[:, :most_masked]
                masked = masked.gather(1, offsets)
                columns = position.gather(1, offsets)
                shown = tokens[rows]
                if hints is not None:
                    shown = torch.where(every >= start[rows, None] + width, hints[rows], shown)
                ids, attention_mask = torch.cat((prompt_ids[rows], shown), dim=1), None
                if prompt_mask is not None:
                    attention_mask = torch.cat((prompt_mask[rows], torch.ones_like(shown, dtype=torch.bool)), dim=1)
                read = columns + prompt_length
                if cache is None:
                    hidden = model.hidden_states(ids, attention_mask, read)
                else:
                    hidden = cache.hidden_states(ids, attention_mask, read, rows)
                position_seeds = mix_seeds(seeds[rows, None], step[rows, None], columns)
                drawn, confidence = draw(hidden, model.lm_head_weight, decoding, position_seeds, mask_id)
                chosen = most_confident(confidence, masked, torch.full_like(rows, reveals))
                if decoding.threshold is not None:
                    chosen |= masked & (confidence >= decoding.threshold)
                chosen &= going[rows, None]
                places = rows[:, None], columns
                tokens[places] = torch.where(chosen, drawn, tokens[places])
                reveal_step[places] = torch.where(chosen, step[rows, None], reveal_step[places])
                step[rows] += 1
                going[rows] = ~finished(tokens[rows], reveal_step[rows], eos_id, decoding.stop_at_eos)
                done = known and reveals == most_masked
                if done or not known or reading_is_free(device):
                    live = live[going[live].nonzero()[:, 0]]
                    rows = live
                if not known:
                    masks = (reveal_step[live] == NEVER) & (every < start[live, None] + width)
                    rows = live[masks.any(-1).nonzero()[:, 0]]
                if on_step is not None:
                    on_step(len(live))
                if done:
                    break
    tokens = torch.where(reveal_step == NEVER, eos_id, tokens).cpu()
    reveal_step = reveal_step.cpu()
    return [
        Trajectory(prompt.cpu(), tokens[index], reveal_step[index], width, leads[index])
        for index, prompt in enumerate(prompts)
    ]


def leftmost_part(
    masked: Tensor,  # (n, B) bool
    length: int,
    ahead: int,
) -> Tensor:  # (n, B) bool
    """Of blocks' ``masked`` positions, those of the first sub-block of ``length`` that has any.

    So many of a block's first tokens as ``ahead`` says are a sub-block of their own.
    """
    offset = torch.arange(masked.shape[1], device=masked.device)
    part = torch.where(offset < ahead, -1, offset // length)
    return masked & (part == part[masked.long().argmax(-1, keepdim=True)])


def draw(
    hidden: Tensor,  # (n, R, d)
    weight: Tensor,  # (V, d)
    decoding: Decoding,
    seeds: Tensor,  # (n, R) int64
    mask_id: int,
) -> tuple[Tensor, Tensor]:  # (n, R) int64 and float
    """Each position's token, and the model's confidence in it by the measure that ``decoding.remasking`` names."""
    kind: Confidence = decoding.remasking if decoding.remasking in ("margin", "entropy") else "probability"
    if decoding.sampling_dtype == "float64":
        hidden = hidden.double()
    tokens, confidence = choose_tokens(
        hidden.flatten(0, 1),
        weight,
        kind,
        mask_id=mask_id,
        temperature=decoding.temperature,
        seeds=seeds.flatten() if decoding.temperature else None,
    )
    if decoding.remasking == "random":
        confidence = mix_seeds(seeds, REMASKING).double()
    elif decoding.remasking == "leftmost":
        confidence = -torch.arange(seeds.shape[1], device=seeds.device).expand_as(seeds).double()  # they are in order
    return tokens.view(seeds.shape), confidence.view(seeds.shape)


def countdown(reveals: Sequence[int]) -> list[tuple[int, int]]:
    """Each step's reveals in a block, with how many positions are masked before it."""
    return [(count, sum(reveals[step:])) for step, count in enumerate(reveals)]


def reading_is_free(device: torch.device) -> bool:
    """Whether the host may read a tensor at any time: it would have to wait until a GPU has finished its work."""
    return device.type == "cpu"


def finished(tokens: Tensor, reveal_step: Tensor, eos_id: int, stop_at_eos: bool) -> Tensor:
    """(n,) bool: nothing is masked, or nothing before the first end-of-text token is."""
    masked = reveal_step == NEVER
    if not stop_at_eos:
        return ~masked.any(-1)
    ended = (~masked & (tokens == eos_id)).long().cumsum(-1) > 0
    return ~(masked & ~ended).any(-1)
