"""What the ops are compared on, and with whom.

A case is one problem: an op, its options and its sizes, those of LLaDA-8B on a GPU and scaled ones on a CPU. A provider
is one way to compute it, all of it, forward and backward where there is one. The "floor" is the matrix products that
the op cannot do without, bare; "eager" is what straightforward code does. Other libraries run as their own trainers
call them, on logits of the operands' dtype if they round them to it; `error` tells what that costs.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import attention, layer
from benchmarks.case import Case
from benchmarks.missing import Missing, installed, kernels_instead, no_compiler, no_torch_ce, no_triton, only_on_gpu
from dopsd.precision import has_bf16
from dopsd_kernels import fused_confidence, fused_step_kl, fused_token_logprob, reference
from dopsd_kernels.common import products
from dopsd_kernels.step_kl.contracts import StepKLOptions

_FLOOR_BYTES = 1 << 30  # logits of one of the floor's products
_LIGER = installed("liger-kernel", "liger_kernel", gpu=True)

# By setting.
OPTIONS: dict[str, dict[str, Any]] = {
    "reverse_kl": {},
    "clipped": {"clip": 0.05},
    "forward_kl": {"divergence": "forward_kl"},
    "top_k=20": {"top_k": 20},
}
ASKED: dict[str, dict[str, Any]] = {
    "argmax": {},
    "top_k=20": {"top_k": 20},
    "sampled": {"temperature": 1.0, "seed": 0},
}


class Provider(NamedTuple):
    """One way to compute an op."""

    forward: Callable[..., Tensor | None]  # of a case and its tensors; None if it is the work, but not the op
    missing: Missing = lambda device: None  # why it cannot run on a device, or None; called before all else
    takes: Callable[[Case], bool] = lambda case: True  # whether it is compared in a case


class Op(NamedTuple):
    """What can be computed, and who can; the first is what the others are compared with."""

    tensors: Callable[[Case, torch.device], tuple[Tensor, ...]]  # those with a gradient have requires_grad
    needs: Callable[[Case], dict[str, float]]  # the arithmetic of the products, and their operands' bytes, each once
    exact: Callable[..., Tensor]  # what is right, from the tensors in fp64
    providers: dict[str, Provider]


def providers(case: Case) -> list[str]:
    """The names of those that a case compares."""
    return [name for name, provider in OPS[case.op].providers.items() if provider.takes(case)]


def run(case: Case, forward: Callable[..., Tensor | None], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Compute a case: its output and, of both phases, the gradients of the output's sum; nothing of what is no op."""
    with torch.set_grad_enabled(case.phase == "both"):
        out = forward(case, *tensors)
    if out is None or case.phase == "forward":
        return () if out is None else (out,)
    inputs = [x for x in tensors if x.requires_grad]
    return out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))


# Rows of hidden states and an LM head


def _rows(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """Draw student (N, d), which requires a gradient, teacher (N, d) and weight (V, d).

    Weight rows have norm 1, so that hidden entries of size x give logits of size x. "diffuse" rows have random
    logits of standard deviation 3, with nothing that stands out. "peaked" rows have an entropy of about 1 to 3
    nats, as a language model where it must choose: one token, drawn by Zipf's law, has about a third of the mass,
    and the others a standard deviation of 1 around -2 log(id), as in a vocabulary sorted by frequency. The teacher
    is a little more confident of the leading one.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    weight = (normal(case.vocab, case.width) / math.sqrt(case.width)).to(case.dtype)
    if case.data == "diffuse":
        teacher = 3 * normal(case.rows, case.width)
        student = teacher + 0.9 * normal(case.rows, case.width)
    else:
        common = 16.0
        falling = -2 * torch.arange(1, case.vocab + 1, device=device).float().log()
        weight[:, 0] = (falling / common).to(case.dtype)  # all hidden states have this entry in common
        token = (case.vocab ** torch.rand(case.rows, generator=generator, device=device)).long() - 1
        direction = weight[token].float()
        direction[:, 0] = 0
        others = normal(case.rows, case.width)
        # The others must not touch the leading token's own logit.
        others -= (others * direction).sum(-1, keepdim=True) * direction
        lead = falling.logsumexp(0) + 0.5 - 0.7 + 0.3 * normal(case.rows, 1) - falling[token, None]
        student = lead * direction + others
        teacher = student + 0.5 * direction + 0.3 * normal(case.rows, case.width)
        student[:, 0] = teacher[:, 0] = common
    return student.to(case.dtype).requires_grad_(), teacher.to(case.dtype), weight


def _rows_need(case: Case) -> dict[str, float]:
    # The loss has two products forward, and one backward whose result is written; with top_k and renormalised sides,
    # only the teacher's logits are needed as a whole. A log-probability has one and one, all else has one.
    of_loss, of_tokens = case.op == "step_kl", case.op == "token_logprob"
    count = 3 if of_loss and "top_k" not in case.setting else 1 + of_tokens
    operands = (case.vocab + (1 + of_tokens + 2 * of_loss) * case.rows) * case.width
    return {"flops": count * 2 * case.rows * case.width * case.vocab, "bytes": operands * case.dtype.itemsize}


def _bare(hidden: Tensor, weight: Tensor) -> Tensor:
    """Multiply all rows in chunks, so that memory is no limit; return the buffer of one chunk's logits."""
    chunk_rows = max(1, min(len(hidden), _FLOOR_BYTES // (len(weight) * weight.itemsize)))
    buffer = hidden.new_empty(chunk_rows, len(weight))
    for chunk in hidden.split(chunk_rows):
        torch.mm(chunk, weight.T, out=buffer[: len(chunk)])
    return buffer


# fused_step_kl: the loss and the gradient of the student's hidden states


def _exact_kl(case: Case, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    return reference.step_kl(student, teacher, weight, options=StepKLOptions(**OPTIONS[case.setting])).loss


def _our_kl(case: Case, student: Tensor, teacher: Tensor, weight: Tensor, *, backend: str) -> Tensor:
    return fused_step_kl(student, teacher, weight, backend=backend, **OPTIONS[case.setting]).loss


def _floor_kl(case: Case, student: Tensor, teacher: Tensor, weight: Tensor) -> None:
    """Two products forward, in one of 2N rows, and one backward; with top_k the teacher's alone."""
    if "top_k" in case.setting:
        _bare(teacher, weight)
        return
    buffer = _bare(torch.cat([student.detach(), teacher]), weight)
    for chunk in torch.empty_like(student).detach().split(len(buffer)):
        torch.mm(buffer[: len(chunk)], weight, out=chunk)


def _eager_kl(case: Case, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    options = OPTIONS[case.setting]
    with torch.no_grad():
        teacher_logits = (teacher @ weight.T).float()
    student_logits = (student @ weight.T).float()
    if "top_k" in options:
        teacher_logits, support = teacher_logits.topk(options["top_k"])
        student_logits = student_logits.gather(-1, support)
    log_t, log_s = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    p, q = (log_t, log_s) if case.setting == "forward_kl" else (log_s, log_t)
    contributions = p.exp() * (p - q)
    if "clip" in options:
        contributions = contributions.clamp(max=options["clip"])
    return contributions.sum(-1).mean()


_compiled = functools.cache(torch.compile)


def _compiled_kl(case: Case, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    for rows in (student, teacher):
        torch._dynamo.maybe_mark_dynamic(rows, 0)  # one compilation for every N
    return _compiled(_eager_kl)(case, student, teacher, weight)


def _liger_jsd(case: Case, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=1.0)(student, weight, teacher, weight, None)


def _liger_chunked(case: Case, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Liger's chunked loss, which has no Triton; it always computes the weight's gradient, a fourth product."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    compiled = no_compiler(weight.device) is None
    chunked = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=compiled)
    labels = torch.zeros(len(student), dtype=torch.long, device=weight.device)
    return chunked(student, weight, teacher, weight, labels)


def _liger_kl(case: Case, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Liger's fused linear KL, whose target is the teacher's whole distribution: making that is part of it."""
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    with torch.no_grad():
        target = (teacher @ weight.T).softmax(-1)
    return LigerFusedLinearKLDivLoss()(student, weight, target)


def _trl(case: Case, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    with torch.no_grad():
        teacher_logits = teacher @ weight.T
    return GKDTrainer.generalized_jsd_loss(student @ weight.T, teacher_logits, beta=1.0)


def _reverse(case: Case) -> bool:
    return case.setting == "reverse_kl"  # Liger's and TRL's JSD with beta 1


def _both(case: Case) -> bool:
    return case.phase == "both"  # compiling takes longer than all else


def _plain_reverse(case: Case) -> bool:
    return _reverse(case) and case.data == "diffuse"  # compiling takes longer than all else


# fused_token_logprob: the log-probability of a token per row, or that plus the entropy, and the hidden states' gradient


def _targets(hidden: Tensor, weight: Tensor) -> Tensor:
    return torch.arange(len(hidden), device=hidden.device) * 7919 % len(weight)


def _logprob(op: Callable[..., Any], case: Case, hidden: Tensor, _: Tensor, weight: Tensor, **how: Any) -> Tensor:
    out = op(hidden, weight, _targets(hidden, weight), **how)
    return out.logprob + out.entropy if "entropy" in case.setting else out.logprob


def _floor_logprob(case: Case, hidden: Tensor, _: Tensor, weight: Tensor) -> None:
    """One product forward and one backward, of logits that nothing has to compute again."""
    buffer = _bare(hidden.detach(), weight)
    for chunk in torch.empty_like(hidden).detach().split(len(buffer)):
        torch.mm(buffer[: len(chunk)], weight, out=chunk)


def _eager_logprob(case: Case, hidden: Tensor, _: Tensor, weight: Tensor) -> Tensor:
    log_p = (hidden @ weight.T).float().log_softmax(-1)
    logprob = log_p.gather(-1, _targets(hidden, weight)[:, None])[:, 0]
    return logprob - (log_p.exp() * log_p).sum(-1) if "entropy" in case.setting else logprob


def _torch_ce(case: Case, hidden: Tensor, _: Tensor, weight: Tensor, *, chunked: bool) -> Tensor:
    """PyTorch's linear cross-entropy, which makes all logits unless it is asked for chunks; here of 256 rows."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256, chunking_method=None) if chunked else None
    return -F.linear_cross_entropy(hidden, weight, _targets(hidden, weight), reduction="none", options=options)


def _liger_ce(case: Case, hidden: Tensor, _: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="none")(weight, hidden, _targets(hidden, weight))


def _cut_ce(case: Case, hidden: Tensor, _: Tensor, weight: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, _targets(hidden, weight), reduction="none")


def _plain_tokens(case: Case) -> bool:
    return case.setting == "tokens"


# fused_confidence: the probability of the chosen token (a sample's depends on the noise: of the largest logit instead)


def _exact_confidence(case: Case, hidden: Tensor, _: Tensor, weight: Tensor) -> Tensor:
    exact = reference.confidence(hidden, weight)
    return (exact.max_logit - exact.logsumexp).exp()


def _our_confidence(case: Case, hidden: Tensor, _: Tensor, weight: Tensor, *, backend: str) -> Tensor:
    output = fused_confidence(hidden, weight, backend=backend, **ASKED[case.setting])
    return (output.max_logit - output.logsumexp).exp()


def _floor_confidence(case: Case, hidden: Tensor, _: Tensor, weight: Tensor) -> None:
    _bare(hidden, weight)


def _eager_confidence(case: Case, hidden: Tensor, _: Tensor, weight: Tensor) -> Tensor:
    probability = (hidden @ weight.T).float().softmax(-1)
    if case.setting == "sampled":
        torch.multinomial(probability, 1)
    elif "top_k" in case.setting:
        probability.topk(ASKED[case.setting]["top_k"])
    return probability.max(-1).values


# The two products of a chunk, alone, as `fused_step_kl` calls them; the provider is the results' dtype


def _product(case: Case, hidden: Tensor, _: Tensor, weight: Tensor, *, multiply: Callable[..., Tensor]) -> Tensor:
    if case.setting == "logits":
        return multiply(hidden, weight.T)
    # The hidden gradient's; any matrix of its other operand's shape will do: the weight's own rows, in its dtype.
    return multiply(weight.T.reshape(-1)[: case.rows * case.vocab].view(case.rows, case.vocab), weight)


# The tables


def _ours(forward: Callable[..., Tensor]) -> dict[str, Provider]:
    return {
        "ours torch": Provider(functools.partial(forward, backend="torch")),
        "ours triton": Provider(functools.partial(forward, backend="triton"), no_triton),
    }


OPS = {
    "step_kl": Op(
        _rows,
        _rows_need,
        _exact_kl,
        {
            "floor": Provider(_floor_kl),
            "eager": Provider(_eager_kl),
            **_ours(_our_kl),
            "liger": Provider(_liger_jsd, _LIGER, _reverse),
            "trl": Provider(_trl, installed("trl", "trl"), _reverse),
            "liger chunked": Provider(_liger_chunked, installed("liger-kernel", "liger_kernel"), _plain_reverse),
            "compile": Provider(_compiled_kl, no_compiler, _plain_reverse),
            "liger kl": Provider(
                _liger_kl,
                installed("liger-kernel", "liger_kernel", gpu=True, part="ops.fused_linear_kl_div"),
                lambda case: case.setting == "forward_kl",
            ),
        },
    ),
    "token_logprob": Op(
        _rows,
        _rows_need,
        functools.partial(_logprob, reference.token_logprob),
        {
            "floor": Provider(_floor_logprob),
            "eager": Provider(_eager_logprob),
            **_ours(functools.partial(_logprob, fused_token_logprob)),
            "torch ce": Provider(functools.partial(_torch_ce, chunked=False), no_torch_ce, _plain_tokens),
            "torch ce chunked": Provider(functools.partial(_torch_ce, chunked=True), no_torch_ce, _plain_tokens),
            "liger ce": Provider(_liger_ce, _LIGER, _plain_tokens),
            "cut ce": Provider(_cut_ce, installed("cut-cross-entropy", "cut_cross_entropy", gpu=True), _plain_tokens),
        },
    ),
    "confidence": Op(
        _rows,
        _rows_need,
        _exact_confidence,
        {"floor": Provider(_floor_confidence), "eager": Provider(_eager_confidence), **_ours(_our_confidence)},
    ),
    "products": Op(
        _rows,
        _rows_need,
        functools.partial(_product, multiply=torch.mm),
        {
            "float32 out": Provider(functools.partial(_product, multiply=products.matmul)),
            "bfloat16 out": Provider(
                functools.partial(_product, multiply=torch.mm), takes=lambda case: case.dtype == torch.bfloat16
            ),
        },
    ),
    "attention": Op(
        attention.tensors,
        attention.needs,
        attention.concatenated,
        {
            "concatenated": Provider(attention.concatenated),
            **_ours(attention.ours),
            "flex": Provider(attention.flex, only_on_gpu),
        },
    ),
    "lora_layer": Op(
        layer.tensors,
        layer.needs,
        layer.peft,
        {
            "floor": Provider(layer.floor),
            "eager": Provider(layer.peft),
            "compile": Provider(functools.partial(layer.peft, call=layer.compiled), no_compiler, _both),
            "liger": Provider(functools.partial(layer.peft, parts=layer.liger), _LIGER),
            "ours torch": Provider(layer.ours, kernels_instead),
            "ours triton": Provider(layer.ours, no_triton),
        },
    ),
}


def cases(device: torch.device, rehearsal: bool = False) -> list[Case]:
    """The cases of a kind of machine, what tells most first; small ones of every kind for a rehearsal."""
    many, few = 512, 64
    head = {"width": 256, "vocab": 16384, "dtype": torch.float32}
    decoder = {**head, "vocab": 32768}
    of_attention = {"groups": 1, "sequences": 15, "heads": 8, "width": 128, "dtype": torch.float32}
    # Those of a block's other states with reuse of all but the block, and of the prompt.
    lengths = [{"length": 32, "prefix": 424}, {"length": 256, "prefix": 200}]
    of_layer = layer.SIZES["rehearsal" if rehearsal else device.type]
    if rehearsal:
        many, few = 12, 8
        head = decoder = {**head, "width": 32, "vocab": 500}
        of_attention |= {"groups": 2, "heads": 2}
        lengths = [{"length": 4, "prefix": 12}]
    elif device.type == "cuda":
        many, few = 2048, 256
        head = decoder = {"width": 4096, "vocab": 126464, "dtype": torch.bfloat16}
        of_attention |= {"groups": 8, "heads": 32, "dtype": torch.bfloat16}
    of_layers = [head["dtype"]]
    if device.type == "cpu" and not rehearsal and has_bf16(cpu=True):
        of_layers.append(torch.bfloat16)  # what training takes there

    def loss(setting: str, rows: int, **more: str) -> Case:
        return Case("step_kl", "both", setting, rows, **head, **more)

    return [
        *(loss("reverse_kl", rows) for rows in (many, few)),
        *(Case("products", "forward", setting, few, **head) for setting in ("logits", "hidden gradient")),
        *(loss(setting, many) for setting in ("top_k=20", "clipped")),
        *(Case("token_logprob", "both", setting, many, **head) for setting in ("tokens", "tokens and entropy")),
        *(
            Case("confidence", "forward", what, rows, **decoder)
            for what in ("argmax", "top_k=20")
            for rows in (32, many)
        ),
        *(Case("confidence", "forward", "sampled", rows, **decoder, data="peaked") for rows in (32, many)),
        *(Case("attention", phase, **of_attention, **sizes) for sizes in lengths for phase in ("forward", "both")),
        *(Case("lora_layer", phase, dtype=dtype, **of_layer) for dtype in of_layers for phase in ("forward", "both")),
        loss("forward_kl", many),
        loss("reverse_kl", many, data="peaked"),
    ]
