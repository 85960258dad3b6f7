"""Step concatenation: denoising states of many steps and trajectories as one batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from dopsd.models.bidirectional import BidirectionalModel, DiffusionModel
from dopsd.models.block_causal import BlockCausalModel
from dopsd.models.packed import Packed
from dopsd.sampler import left_pad
from dopsd.trajectory import Trajectory, block_positions

Reuse = Literal["none", "prompt", "block"]


@dataclass(frozen=True)
class Example:
    """The states of one trajectory that are trained on, and what the teacher sees at each.

    Args:
        trajectory: the student's response.
        steps: (S,) int64, the steps to train on.
        reveal: (S, L) bool, positions whose final tokens the teacher is shown besides the state.
        teacher_prompt_ids: (P',) int64, the teacher's prompt; the student's is the trajectory's.
    """

    trajectory: Trajectory
    steps: Tensor
    reveal: Tensor
    teacher_prompt_ids: Tensor

    def slice(self, number: int, count: int, equal: bool = False) -> Example:
        """Part ``number`` of ``count`` nearly ``equal`` runs of its S steps, or of runs of (S - 1) // ``count``."""
        states = (len(self.steps) - 1) // count * count if equal else len(self.steps)
        bounds = [part * states // count for part in (number, number + 1)]
        chosen = slice(*bounds)
        return replace(self, steps=self.steps[chosen], reveal=self.reveal[chosen])

    def anchors(self) -> Tensor:
        """(S,) int64: for each state, the index of the example's first state of the same block."""
        starts = self.trajectory.block_starts(self.steps)
        return (starts[:, None] == starts).long().argmax(-1)

    def views(self, chosen: Sequence[int] | Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
        """What the student and the teacher see of the response in the ``chosen`` states, (len(chosen), L) each."""
        state = self.trajectory.states(self.steps[chosen], mask_id)
        return state, torch.where(self.reveal[chosen], self.trajectory.tokens, state)

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return {
            "trajectory": self.trajectory.to_json(),
            "steps": self.steps.tolist(),
            "reveal": [row.nonzero().flatten().tolist() for row in self.reveal],
            "teacher_prompt_ids": self.teacher_prompt_ids.tolist(),
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Example:
        """The inverse of :meth:`to_json`."""
        trajectory = Trajectory.from_json(fields["trajectory"])
        reveal = torch.zeros(len(fields["steps"]), len(trajectory.tokens), dtype=torch.bool)
        for row, positions in zip(reveal, fields["reveal"], strict=True):
            row[positions] = True
        steps = torch.tensor(fields["steps"], dtype=torch.int64)
        return cls(trajectory, steps, reveal, torch.tensor(fields["teacher_prompt_ids"], dtype=torch.int64))


@dataclass(frozen=True)
class Inputs:
    """One side's model inputs: ``input_ids`` (S, P + L), ``attention_mask`` (same, or None) and ``offset`` = P."""

    input_ids: Tensor
    attention_mask: Tensor | None
    offset: int

    def hidden_states(self, model: DiffusionModel, columns: Tensor) -> Tensor:
        """(S, R, d), the states that predict the tokens at the response positions ``columns`` (S, R)."""
        return model.hidden_states(self.input_ids, self.attention_mask, columns + self.offset)

    def to(self, device: torch.device) -> Inputs:
        """The same on a device."""
        mask = self.attention_mask
        return Inputs(self.input_ids.to(device), None if mask is None else mask.to(device), self.offset)

    @property
    def tokens(self) -> int:
        """Tokens that a pass computes, padding included."""
        return self.input_ids.numel()


@dataclass(frozen=True)
class PackedInputs:
    """One side's model inputs where states reuse activations.

    Args:
        anchors: the G states that are computed in full.
        packed: the N others.
        start: (G,) int64, the column of each where the tokens of the others begin.
        row: (S,) int64, each state's index among the anchors followed by the others.
    """

    anchors: Inputs
    packed: Packed
    start: Tensor
    row: Tensor

    def hidden_states(self, model: BidirectionalModel, columns: Tensor) -> Tensor:
        """As :meth:`Inputs.hidden_states`."""
        groups, count = len(self.anchors.input_ids), len(self.packed.input_ids)
        # An anchor whose own state is in another batch is read at the response's first position, for nothing.
        read = columns.new_zeros(groups + count, columns.shape[1]).index_copy(0, self.row, columns)
        read = read + self.anchors.offset
        states, cache = model.anchor_hidden_states(
            self.anchors.input_ids,
            self.anchors.attention_mask,
            read[:groups],
            self.start,
            self.packed.prefix_mask.shape[1],
        )
        own = model.packed_hidden_states(cache, self.packed, read[groups:])
        return torch.cat((states, own)).index_select(0, self.row)

    @property
    def tokens(self) -> int:
        """As :attr:`Inputs.tokens`."""
        return self.anchors.tokens + self.packed.input_ids.numel()


@dataclass(frozen=True)
class BlockInputs:
    """One side's model inputs where a block-causal model's states take all before their block from final tokens.

    Args:
        clean: those of the E trajectories, as far as the last of these blocks begins.
        packed: the S states, each with its block alone.
    """

    clean: Inputs
    packed: Packed

    @classmethod
    def of(
        cls,
        whole: Inputs,  # of the S states
        clean: Inputs,  # of the E trajectories, with their final tokens
        trajectory: Tensor,  # (S,) int64, the trajectory of each state
        start: Tensor,  # (S,) int64, its block's first position, negative in a prompt
        block_length: int,
    ) -> BlockInputs:
        """The states' blocks cut out of ``whole``. All tensors are on the CPU."""
        columns, total = (start + whole.offset)[:, None] + torch.arange(block_length), whole.input_ids.shape[1]
        begin, (slot, slots) = columns[:, 0], Packed.assign_slots(trajectory)
        width, mask = int(begin.max()), clean.attention_mask
        real = torch.ones(len(clean.input_ids), width, dtype=torch.bool) if mask is None else mask[:, :width]
        packed = Packed(
            input_ids=whole.input_ids.gather(1, columns.clamp_max(total - 1)),
            start=begin,
            slot=slot,
            slots=slots,
            prefix_mask=real,
            own_mask=columns < total if int(columns.max()) >= total else None,
            causal=True,
        )
        # What no block looks at is not computed; there is something to compute where nothing is before the blocks.
        cut = width or block_length
        mask = None if mask is None else mask[:, :cut]
        return cls(Inputs(clean.input_ids[:, :cut], mask, clean.offset), packed)

    def to(self, device: torch.device) -> BlockInputs:
        """The same on a device."""
        tensors: dict[str, Any] = {
            name: x.to(device) for name, x in self.packed._asdict().items() if isinstance(x, Tensor)
        }
        return BlockInputs(self.clean.to(device), self.packed._replace(**tensors))

    def hidden_states(self, model: BlockCausalModel, columns: Tensor) -> Tensor:
        """As :meth:`Inputs.hidden_states`; of columns outside of a state's block, what means nothing."""
        clean, packed = self.clean, self.packed
        width, start = packed.prefix_mask.shape[1], packed.start[:, None]
        read = (columns + clean.offset).maximum(start).minimum(start + packed.input_ids.shape[1] - 1)
        blocks = packed.start, packed.slot, packed.slots
        cache = model.clean_pass(clean.input_ids, clean.attention_mask, *blocks, width)
        return model.packed_hidden_states(cache, packed, read)

    @property
    def tokens(self) -> int:
        """As :attr:`Inputs.tokens`."""
        return self.clean.tokens + self.packed.input_ids.numel()


@dataclass(frozen=True)
class StepBatch:
    """S states, ready for both sides; a row is one state of one trajectory.

    Args:
        student, teacher: the model inputs.
        columns: (S, B) int64, the response positions of each state's current block, and those of another block in
            place of any that it has outside of the response.
        candidates: (S, B) bool, those masked for student and teacher alike: K is chosen among them.
        committed: (S, B) bool, those the student's step revealed.
        k: (S,) int64, how many it revealed.
        candidate_index: (C,) int64, the candidates' indices in the flattened (S, B).
        rows_by_confidence: (S,) int64 on the CPU, how many candidates K has if the k most confident are chosen.
        rows_by_commit: (S,) int64 on the CPU, how many it has if it is what the student's step revealed.
        example: (S,) int64, index of each state's example.
        weight: (S,) fp32, 1 / number of states of that example (the 1/T of Eq. 12).
    """

    student: Inputs | PackedInputs | BlockInputs
    teacher: Inputs | PackedInputs | BlockInputs
    columns: Tensor
    candidates: Tensor
    committed: Tensor
    k: Tensor
    candidate_index: Tensor
    rows_by_confidence: Tensor
    rows_by_commit: Tensor
    example: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.k)

    @property
    def tokens(self) -> int:
        """As :attr:`Inputs.tokens`, of the student."""
        return self.student.tokens


def step_batches(
    examples: Sequence[Example],
    size: int,
    *,
    reuse: Reuse = "none",
    block_causal: bool = False,
    mask_id: int,
    pad_id: int,
    device: torch.device,
) -> Iterator[StepBatch]:
    """Every state of every example, in batches of at most ``size`` states, which may mix examples.

    Reuse means the same for every ``size``: a block that two batches share has one anchor, which both compute.
    """
    index = [(number, step) for number, example in enumerate(examples) for step in range(len(example.steps))]
    for start in range(0, len(index), size):
        part = index[start : start + size]
        yield collate(
            *(examples, part), reuse=reuse, block_causal=block_causal, mask_id=mask_id, pad_id=pad_id, device=device
        )


def collate(
    examples: Sequence[Example],
    index: Sequence[tuple[int, int]],
    *,
    reuse: Reuse = "none",
    block_causal: bool = False,
    mask_id: int,
    pad_id: int,
    device: torch.device,
) -> StepBatch:
    """The states (example number, position in its steps) of ``index`` as one batch on ``device``.

    For a ``block_causal`` model, ``reuse`` of all but the block is of final tokens, and exact.
    """
    wanted: dict[int, list[int]] = {}
    for number, step in index:
        wanted.setdefault(number, []).append(step)
    parts = []
    for number, chosen in wanted.items():
        example, trajectory = examples[number], examples[number].trajectory
        steps = example.steps[chosen]
        state, shown = example.views(chosen, mask_id)
        start = trajectory.block_starts(steps)
        columns, inside = block_positions(start, trajectory.block_length, len(trajectory.tokens))
        commits = trajectory.commits(steps)
        masked = (trajectory.reveal_step >= steps[:, None]) & ~example.reveal[chosen]
        parts.append(
            (
                state,
                shown,
                start,
                columns,
                masked.gather(1, columns) & inside,
                commits.gather(1, columns) & inside,
                commits.sum(-1),
                torch.full((len(chosen),), number),
                torch.full((len(chosen),), 1 / len(example.steps)),
            )
        )
    state, shown, start, columns, candidates, committed, k, number_of_example, weight = (
        torch.cat(part) for part in zip(*parts, strict=True)
    )
    student_prompts = [example.trajectory.prompt_ids for example in examples]
    teacher_prompts = [example.teacher_prompt_ids for example in examples]
    student: Inputs | PackedInputs | BlockInputs
    teacher: Inputs | PackedInputs | BlockInputs
    if reuse == "none" or block_causal:
        numbers = number_of_example.tolist()
        student = with_prompts([student_prompts[number] for number in numbers], state, pad_id)
        teacher = with_prompts([teacher_prompts[number] for number in numbers], shown, pad_id)
        if reuse != "none":
            final = torch.stack([examples[number].trajectory.tokens for number in wanted])
            row = torch.cat([torch.full((len(chosen),), row) for row, chosen in enumerate(wanted.values())])
            cut = row, start, columns.shape[1]
            student = BlockInputs.of(student, with_prompts([student_prompts[n] for n in wanted], final, pad_id), *cut)
            teacher = BlockInputs.of(teacher, with_prompts([teacher_prompts[n] for n in wanted], final, pad_id), *cut)
        student, teacher = student.to(device), teacher.to(device)
    else:
        anchors = Anchors.of(examples, wanted, mask_id)
        numbers = anchors.numbers
        student = with_prompts([student_prompts[number] for number in numbers], anchors.state.to(device), pad_id)
        teacher = with_prompts([teacher_prompts[number] for number in numbers], anchors.shown.to(device), pad_id)
        computed = columns if reuse == "block" else torch.arange(state.shape[1]).expand_as(state)
        student = pack(student, anchors, state, computed)
        teacher = pack(teacher, anchors, shown, computed)
    return StepBatch(
        student=student,
        teacher=teacher,
        columns=columns.to(device),
        candidates=candidates.to(device),
        committed=committed.to(device),
        k=k.to(device),
        # Sizes that the host needs are counted before anything is on a GPU, which it would have to wait for.
        candidate_index=candidates.flatten().nonzero()[:, 0].to(device),
        rows_by_confidence=torch.minimum(k, candidates.sum(-1)),
        rows_by_commit=(committed & candidates).sum(-1),
        example=number_of_example.to(device),
        weight=weight.to(device),
    )


def with_prompts(prompts: Sequence[Tensor], responses: Tensor, pad_id: int) -> Inputs:
    """Left-padded ``prompts`` in front of ``responses`` (S, L)."""
    prompt_ids, prompt_mask = left_pad([prompt.to(responses.device) for prompt in prompts], pad_id)
    mask = None
    if prompt_mask is not None:
        mask = torch.cat((prompt_mask, torch.ones_like(responses, dtype=torch.bool)), dim=1)
    return Inputs(torch.cat((prompt_ids, responses), dim=1), mask, prompt_ids.shape[1])


@dataclass(frozen=True)
class Anchors:
    """The states that a batch's states reuse activations of.

    Args:
        numbers: the examples of the G anchors.
        state, shown: (G, L) int64, what student and teacher see in them.
        anchor: (S,) int64, the anchor of each state of the batch.
        itself: (S,) bool, whether the state is its own anchor.
    """

    numbers: list[int]
    state: Tensor
    shown: Tensor
    anchor: Tensor
    itself: Tensor

    @classmethod
    def of(cls, examples: Sequence[Example], wanted: Mapping[int, Sequence[int]], mask_id: int) -> Anchors:
        """Those of the states ``wanted``, by example."""
        numbers: list[int] = []
        parts = []
        for number, chosen in wanted.items():
            first = examples[number].anchors()[chosen]
            anchors, anchor = first.unique(return_inverse=True)
            parts.append(
                (*examples[number].views(anchors, mask_id), anchor + len(numbers), first == torch.tensor(chosen))
            )
            numbers += [number] * len(anchors)
        return cls(numbers, *(torch.cat(part) for part in zip(*parts, strict=True)))


def pack(
    inputs: Inputs,  # of the G anchors
    anchors: Anchors,
    responses: Tensor,  # (S, L) int64
    computed: Tensor,  # (S, T) int64
) -> PackedInputs:
    """The S states with these ``responses``: those that are not anchors compute the positions ``computed`` only."""
    device, groups = inputs.input_ids.device, len(anchors.numbers)
    others = (~anchors.itself).nonzero()[:, 0]
    slot, slots = Packed.assign_slots(anchors.anchor[others])
    row = torch.where(anchors.itself, anchors.anchor, groups + (~anchors.itself).cumsum(0) - 1)
    start = inputs.offset + torch.zeros(groups, dtype=torch.int64).scatter(0, anchors.anchor, computed[:, 0])
    own, start = start[anchors.anchor[others]].to(device), start.to(device)
    # Without the columns behind the prompt where nothing attends to them.
    whole = computed.shape[1] == responses.shape[1]
    width = inputs.offset if whole else inputs.input_ids.shape[1]
    packed = Packed(
        input_ids=responses.gather(1, computed)[others].to(device),
        start=own,
        slot=slot.to(device),
        slots=slots,
        prefix_mask=Packed.prefix(start, computed.shape[1], width, inputs.attention_mask),
    )
    return PackedInputs(inputs, packed, start, row.to(device))
