"""Scored rollouts: a task's rows decoded, graded, and tried again until one is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from dopsd.errors import RunError
from dopsd.limits import limited
from dopsd.prompt_file import PromptFile
from dopsd.ranks import gather, interleaved, mine
from dopsd.sampler import Decoding, decode
from dopsd.seeds import mix_seeds
from dopsd.tasks import Row, Task
from dopsd.tasks.answers import END, ENDS
from dopsd.trajectory import Trajectory

# Characters of a prompt or a solution. That is far more than a model's context, and less than takes all memory to cut
# into tokens.
LONGEST_TEXT = 1 << 22


@dataclass(frozen=True)
class Rollout:
    """The best response to one row.

    Args:
        row: the task row.
        trajectory: how the response was decoded.
        response: its text, see :meth:`Decoder.text`.
        score: its grade in [0, 1].
        tries: tries until the first correct one; all of them if there was none.
        decoded: tries that were decoded, some of them beside that one.
    """

    row: Row
    trajectory: Trajectory
    response: str
    score: float
    tries: int
    decoded: int = 1

    def outcome(self, eos_id: int) -> dict[str, Any]:
        """What files of results say: the row's columns and what became of it, with its length in tokens."""
        return {
            **self.row,
            "response": self.response,
            "score": self.score,
            "tokens": self.trajectory.text_length(eos_id),
            "steps": self.trajectory.num_steps,
            "tries": self.tries,
        }

    def to_json(self) -> dict[str, Any]:
        """All of it, in plain lists and numbers."""
        return {
            "row": dict(self.row),
            "trajectory": self.trajectory.to_json(),
            "response": self.response,
            "score": self.score,
            "tries": self.tries,
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Rollout:
        """The inverse of :meth:`to_json`; other ``fields`` are not looked at."""
        trajectory = Trajectory.from_json(fields["trajectory"])
        return cls(fields["row"], trajectory, fields["response"], fields["score"], fields["tries"])


@dataclass(frozen=True)
class Decoder:
    """A model, its tokenizer and a task, ready to decode and grade rows.

    Args:
        model: offers ``hidden_states`` and ``lm_head_weight`` (unwrapped: no DDP or PEFT around it).
        tokenizer: a transformers tokenizer.
        task: prompts and grades.
        mask_id, eos_id: special token ids of the model.
        batch_size: sequences decoded at a time.
        prompt_file: asks in place of the task's own prompts; None: these do.
        prefill: the end of every prompt, from which responses go on.
    """

    model: Any
    tokenizer: Any
    task: Task
    mask_id: int
    eos_id: int
    batch_size: int
    prompt_file: PromptFile | None = None
    prefill: str = ""

    @classmethod
    def of(cls, model: Any, tokenizer: Any, task: Task, batch_size: int, **asking: Any) -> Decoder:
        """With the special tokens of a model and a tokenizer as :func:`~dopsd.models.load_model` gives them."""
        return cls(model, tokenizer, task, model.config.mask_token_id, tokenizer.eos_token_id, batch_size, **asking)

    def turns(self, row: Row) -> tuple[str, str | None]:
        """What the user says in a row's prompt, and the system, if it says something."""
        if self.prompt_file is None:
            return self.task.prompt(row), None
        return self.prompt_file.turns(self.task.fields(row))

    def shown(self, row: Row) -> str:
        """A row's prompt for people to read: what the user says in it, and the prefill."""
        return f"{self.turns(row)[0]}{self.prefill}"

    def prompt_ids(self, row: Row) -> Tensor:
        """(P,) token ids of a row's prompt, on the model's device."""
        return self.encode(*self.turns(row))

    def reference_ids(self, row: Row) -> Tensor:
        """(P',) token ids of the prompt that holds a row's reference solution, likewise."""
        return self.encode(self.task.reference_prompt(row))

    def encode(self, text: str, system: str | None = None) -> Tensor:
        """(P,) token ids of a prompt, on the model's device, the prefill included.

        If the tokenizer has a chat template the text is a user's turn, behind the ``system``'s if there is one.
        """
        if getattr(self.tokenizer, "chat_template", None):
            turns = [] if system is None else [{"role": "system", "content": system}]
            turns.append({"role": "user", "content": text})
            try:
                with limited("the tokenizer's chat template"):
                    text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            except (TemplateError, ValueError, TypeError, LookupError, RecursionError) as error:
                raise RunError(f"the tokenizer's chat template fails: {type(error).__name__}: {error}") from error
        elif system is not None:
            raise RunError("prompt_file has a system's turn, and the tokenizer has no chat template to put it into")
        return self.tokenize(text + self.prefill)

    def tokenize(self, text: str) -> Tensor:
        """(N,) token ids of a text as it stands, on the model's device."""
        if len(text) > LONGEST_TEXT:
            raise RunError(f"a text of the task has {len(text)} characters, and at most {LONGEST_TEXT} are read")
        try:
            ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        except BaseException as error:
            if isinstance(error, Exception | KeyboardInterrupt):
                raise
            raise RunError(f"the tokenizer fails: {error}") from error  # a panic of its Rust, which is no Exception
        return ids.to(self.model.lm_head_weight.device)

    def check_lengths(self, prompts: Iterable[Tensor], gen_length: int) -> None:
        """Raise :class:`~dopsd.errors.RunError` if a prompt, (P,) each, and its response don't fit the context."""
        context = self.model.config.max_position_embeddings
        lengths = [len(prompt) for prompt in prompts]
        long = [number for number, length in enumerate(lengths) if length + gen_length > context]
        if long:
            raise RunError(
                f"{len(long)} of {len(lengths)} prompts don't fit: row {long[0]} has {lengths[long[0]]} tokens, and "
                f"with gen_length={gen_length} the model's context of {context} leaves room for "
                f"{context - gen_length}; prompts are never cut"
            )

    def text(self, trajectory: Trajectory) -> str:
        """The response up to the end-of-text, or to the end of its turn; the published grading reads on behind that."""
        tokens = trajectory.tokens[: trajectory.text_length(self.eos_id)].tolist()
        whole = self.tokenizer.decode(tokens, skip_special_tokens=False)
        if self.task.grading == "published":
            return whole
        if END.search(whole):
            tokens = list(takewhile(lambda token: self.tokenizer.decode([token]).strip() not in ENDS, tokens))
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def once(
        self,
        rows: Sequence[Row],
        decoding: Decoding,
        seeds: Tensor,  # (N,) int64
        *,
        hints: Tensor | None = None,  # (N, L) int64, see ``decode``
        on_rows: Callable[[int], object] | None = None,
        on_step: Callable[[int], object] | None = None,
    ) -> list[Rollout]:
        """Decode each row once; ``on_rows`` is told of each finished batch, ``on_step`` is what ``decode`` takes."""
        rollouts = []
        for start in range(0, len(rows), self.batch_size):
            part = slice(start, start + self.batch_size)
            trajectories = decode(
                self.model,
                [self.prompt_ids(row) for row in rows[part]],
                decoding,
                mask_id=self.mask_id,
                eos_id=self.eos_id,
                seeds=seeds[part],
                hints=None if hints is None else hints[part],
                on_step=on_step,
            )
            for index, trajectory in enumerate(trajectories, start):
                response = self.text(trajectory)
                score = float(self.task.score(rows[index], response))
                if not 0 <= score <= 1:
                    raise RunError(
                        f"{type(self.task).__name__}.score must be from 0 to 1, but is {score} for row {index}"
                    )
                rollouts.append(Rollout(rows[index], trajectory, response, score, tries=1))
            if on_rows is not None:
                on_rows(len(trajectories))
        return rollouts

    def pass_at_k(
        self,
        rows: Sequence[Row],
        decoding: Decoding,
        seeds: Tensor,  # (N,) int64
        k: int,
        temperature: float,
        *,
        every: bool = False,
        on_rows: Callable[[int], object] | None = None,
    ) -> list[Rollout]:
        """For each row the first correct response of at most ``k`` tries, else the one with the best grade.

        The first try is decoded as ``decoding`` says, later ones at ``temperature``. With ``every``, all ``k`` are
        made, and the last of those with the best grade is kept.
        """
        first = self.once(rows, decoding, seeds, on_rows=on_rows)
        return self.retry(first, decoding, seeds, k, temperature, every=every)

    def retry(
        self,
        first: Sequence[Rollout],
        decoding: Decoding,
        seeds: Tensor,  # (N,) int64, those of the first try
        k: int,
        temperature: float,
        *,
        every: bool = False,
        on_step: Callable[[int], object] | None = None,
    ) -> list[Rollout]:
        """Tries 2 to ``k`` at the rows whose ``first`` try was wrong, or at ``every`` row.

        Tries are batched: each such row gets one more, then two more, then four, so that few are decoded in vain and
        few batches are needed. Which response is kept does not depend on that.
        """
        best, decoded = list(first), [1] * len(first)  # each with the number of its first correct try, if there is one
        warm = replace(decoding, temperature=temperature)
        done, width = 1, k if every else 1
        while done < k and (left := [index for index, rollout in enumerate(best) if every or rollout.score < 1]):
            width = min(width, k - done)
            pairs = [(index, done + more) for index in left for more in range(width)]
            chosen = torch.tensor([index for index, _ in pairs])
            attempt = torch.tensor([number for _, number in pairs])
            rows = [best[index].row for index, _ in pairs]
            rollouts = self.once(rows, warm, mix_seeds(seeds[chosen], attempt), on_step=on_step)
            for (index, number), rollout in zip(pairs, rollouts, strict=True):
                decoded[index] += 1
                held = best[index]
                if rollout.score > held.score or (every and rollout.score == held.score):
                    best[index] = replace(rollout, tries=held.tries if held.score >= 1 else number + 1)
            done, width = done + width, width * 2
        return [
            replace(rollout, tries=rollout.tries if rollout.score >= 1 else k, decoded=count)
            for rollout, count in zip(best, decoded, strict=True)
        ]

    def group(
        self,
        rows: Sequence[Row],
        decoding: Decoding,
        seeds: Tensor,  # (N,) int64
        k: int,
        temperature: float,
        *,
        on_rows: Callable[[int], object] | None = None,
    ) -> list[Rollout]:
        """``k`` independent responses to each row at ``temperature``, N k in all, those of a row side by side."""
        repeated = [row for row in rows for _ in range(k)]
        own = mix_seeds(seeds[:, None], 1 + torch.arange(k)).flatten()
        warm, done = replace(decoding, temperature=temperature), 0

        def tell(responses: int) -> None:
            nonlocal done
            done, before = done + responses, done
            if on_rows is not None:
                on_rows(done // k - before // k)

        return self.once(repeated, warm, own, on_rows=tell)


@dataclass(frozen=True, kw_only=True)
class SharedDecoder(Decoder):
    """A decoder of rows that are the same on all processes: each decodes its share, and all get all responses.

    Args:
        locally: runs what it is given with the decoder of one process, which decodes at most so many sequences.
    """

    locally: Callable[[Callable[[Decoder], list[Rollout]], int], list[Rollout]]

    def once(
        self,
        rows: Sequence[Row],
        decoding: Decoding,
        seeds: Tensor,  # (N,) int64
        *,
        hints: Tensor | None = None,  # (N, L) int64
        on_rows: Callable[[int], object] | None = None,
        on_step: Callable[[int], object] | None = None,
    ) -> list[Rollout]:
        """As :meth:`Decoder.once`; only this process's rows and steps are told of."""
        own = mine(rows)
        options: dict[str, Any] = {"hints": None if hints is None else mine(hints)}
        options |= {"on_rows": on_rows, "on_step": on_step}
        rollouts = self.locally(lambda decoder: decoder.once(own, decoding, mine(seeds), **options), len(own))
        return interleaved(gather(rollouts))
