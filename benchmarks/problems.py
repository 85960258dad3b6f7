"""What the kernel benchmarks solve: LLaDA-8B's sizes on a GPU, scaled ones on a CPU, and two kinds of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Case:
    """One problem: an op, its sizes, and what its rows are like."""

    op: str  # "step_kl" or "confidence"
    rows: int
    width: int
    vocab: int
    dtype: torch.dtype
    data: str = "diffuse"  # or "peaked"
    clip: float | None = None

    @property
    def setting(self) -> str:
        if self.op == "confidence":
            return "confidence"
        return "reverse_kl" if self.clip is None else "clipped"

    def __str__(self) -> str:
        return f"{self.setting}-{self.data}-{self.rows}"


def cases(device: torch.device, rehearsal: bool = False) -> list[Case]:
    """Return the cases of a kind of machine, the cheap ones first; small ones of every kind for a rehearsal."""
    if rehearsal:
        sizes: dict[str, Any] = {"width": 32, "vocab": 500, "dtype": torch.float32}
        rows: tuple[int, ...] = (8,)
        decoded_rows: tuple[int, ...] = (8,)
        decoded_sizes = sizes
    elif device.type == "cuda":
        sizes = {"width": 4096, "vocab": 126464, "dtype": torch.bfloat16}
        rows = (256, 2048, 16384)
        decoded_rows = (32, 256, 2048)
        decoded_sizes = sizes
    else:
        sizes = {"width": 256, "vocab": 16384, "dtype": torch.float32}
        rows = (64, 512)
        decoded_rows = (32, 512)
        decoded_sizes = {**sizes, "vocab": 32768}
    return [
        *(Case("confidence", n, **decoded_sizes) for n in decoded_rows),
        *(
            Case("step_kl", n, data=data, clip=clip, **sizes)
            for n in rows
            for data, clip in (("diffuse", None), ("diffuse", 0.05), ("peaked", None))
        ),
    ]


@dataclass(frozen=True)
class Problem:
    """The tensors of a case."""

    case: Case
    weight: Tensor  # (V, d), frozen
    student: Tensor  # (N, d), requires a gradient
    teacher: Tensor  # (N, d)


def make_problem(case: Case, device: torch.device, seed: int = 0) -> Problem:
    """Draw a case's tensors. Weight rows have norm 1, so that hidden entries of size x give logits of size x.

    "diffuse" rows have random logits of standard deviation 3, with nothing that stands out. "peaked" rows are like
    confidently predicted positions of a language model. One token, drawn by Zipf's law, leads the logsumexp of all
    others by 4.5 +- 1.5, a probability above 0.9 for most; the teacher is a little surer of it. The others' logits have
    a standard deviation of 2 around -2 log(id), as in a vocabulary sorted by frequency, so that 20 tokens hold most of
    what is left. What a gradient threshold saves, and costs, depends on this: with flatter tails it changes more.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    count, width, vocab = case.rows, case.width, case.vocab
    weight = (normal(vocab, width) / math.sqrt(width)).to(case.dtype)
    if case.data == "diffuse":
        teacher = 3 * normal(count, width)
        student = teacher + 0.9 * normal(count, width)
    else:
        common, spread = 16.0, 2.0
        falling = -2 * torch.arange(1, vocab + 1, device=device).float().log()
        weight[:, 0] = (falling / common).to(case.dtype)  # all hidden states have this entry in common
        token = (vocab ** torch.rand(count, generator=generator, device=device)).long() - 1
        direction = weight[token].float()
        direction[:, 0] = 0
        others = spread * normal(count, width)
        # The others must not touch the leading token's own logit.
        others -= (others * direction).sum(-1, keepdim=True) * direction
        lead = falling.logsumexp(0) + spread**2 / 2 + 4.5 + 1.5 * normal(count, 1) - falling[token, None]
        student = lead * direction + others
        teacher = student + 0.5 * direction + 0.3 * normal(count, width)
        student[:, 0] = teacher[:, 0] = common
    return Problem(case, weight, student.to(case.dtype).requires_grad_(case.op == "step_kl"), teacher.to(case.dtype))
