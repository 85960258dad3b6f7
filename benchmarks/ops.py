"""What the ops are compared on, and with whom.

A case is one problem: an op, its options and its sizes, those of LLaDA-8B on a GPU and scaled ones on a CPU. A provider
is one way to compute it, all of it, forward and backward where there is one. The "floor" is the matrix products that
the op cannot do without, bare; "eager" is what straightforward code does. Other libraries run as their own trainers
call them, on logits of the operands' dtype if they round them to it; `error` tells what that costs.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dopsd_kernels import fused_confidence, fused_step_kl, prefix_attention, reference
from dopsd_kernels.common import products
from dopsd_kernels.common.backends import triton_unsupported
from dopsd_kernels.step_kl.contracts import StepKLOptions

_FLOOR_BYTES = 1 << 30  # logits of one of the floor's products
ACCURACY_ROWS = 64  # few enough for fp64

Results = tuple[Tensor, ...] | None


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Args:
        name: who.
        run: computes it from the case and its tensors, and returns what is to be compared with the case's ``exact``;
            None if it is the work, but not the op.
        missing: why it cannot run on a device, or None; called before ``run``.
    """

    name: str
    run: Callable[[Any, Any], Results]
    missing: Callable[[torch.device], str | None] = lambda device: None


@dataclass(frozen=True)
class Rows:
    """Rows of hidden states and the LM head that they are multiplied by.

    Args:
        setting: what is asked of them.
        rows, width, vocab, dtype: N, d, V and the operands' dtype.
        data: "diffuse", or "peaked" like a trained model's.
    """

    op = ""
    phase = ""

    setting: str
    rows: int
    width: int
    vocab: int
    dtype: torch.dtype
    data: str = "diffuse"

    def __str__(self) -> str:
        return f"{self.op} {self.setting}{', peaked' if self.data == 'peaked' else ''}, N={self.rows}"

    def about(self) -> dict[str, Any]:
        """The columns that name it."""
        return {"part": "kernels", "op": self.op, "phase": self.phase, "variant": "", **_columns(self)}

    def small(self) -> Rows:
        """The same with fewer rows."""
        return replace(self, rows=min(self.rows, ACCURACY_ROWS))

    def needs(self) -> dict[str, float]:
        """The arithmetic of the products that it needs, and their operands' bytes, each once."""
        one, operands = 2 * self.rows * self.width * self.vocab, (self.vocab + self.rows) * self.width
        return {"flops": one, "bytes": operands * self.dtype.itemsize}

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Draw student (N, d), which requires a gradient, teacher (N, d) and weight (V, d).

        Weight rows have norm 1, so that hidden entries of size x give logits of size x. "diffuse" rows have random
        logits of standard deviation 3, with nothing that stands out. "peaked" rows have an entropy of about 1 to 3
        nats, as a language model where it must choose: one token, drawn by Zipf's law, has about a third of the mass,
        and the others a standard deviation of 1 around -2 log(id), as in a vocabulary sorted by frequency. The teacher
        is a little surer of the leading one.
        """
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        weight = (normal(self.vocab, self.width) / math.sqrt(self.width)).to(self.dtype)
        if self.data == "diffuse":
            teacher = 3 * normal(self.rows, self.width)
            student = teacher + 0.9 * normal(self.rows, self.width)
        else:
            common, spread = 16.0, 1.0
            falling = -2 * torch.arange(1, self.vocab + 1, device=device).float().log()
            weight[:, 0] = (falling / common).to(self.dtype)  # all hidden states have this entry in common
            token = (self.vocab ** torch.rand(self.rows, generator=generator, device=device)).long() - 1
            direction = weight[token].float()
            direction[:, 0] = 0
            others = spread * normal(self.rows, self.width)
            # The others must not touch the leading token's own logit.
            others -= (others * direction).sum(-1, keepdim=True) * direction
            lead = falling.logsumexp(0) + spread**2 / 2 - 0.7 + 0.3 * normal(self.rows, 1) - falling[token, None]
            student = lead * direction + others
            teacher = student + 0.5 * direction + 0.3 * normal(self.rows, self.width)
            student[:, 0] = teacher[:, 0] = common
        return student.to(self.dtype).requires_grad_(), teacher.to(self.dtype), weight


def _columns(case: Any) -> dict[str, Any]:
    return {name: dtype_name(value) if name == "dtype" else value for name, value in asdict(case).items()}


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name without the module's."""
    return str(dtype).removeprefix("torch.")


def _bare(hidden: Tensor, weight: Tensor) -> Tensor:
    """Multiply all rows in chunks, so that memory is no limit; return the buffer of one chunk's logits."""
    chunk_rows = max(1, min(len(hidden), _FLOOR_BYTES // (len(weight) * weight.itemsize)))
    buffer = hidden.new_empty(chunk_rows, len(weight))
    for chunk in hidden.split(chunk_rows):
        torch.mm(chunk, weight.T, out=buffer[: len(chunk)])
    return buffer


# ------------------------------------------------------------------------------------------------------------
# Who can run
# ------------------------------------------------------------------------------------------------------------


def installed(package: str, module: str, gpu: bool = False) -> Callable[[torch.device], str | None]:
    """Ask for a package and, of its Triton kernels, for a GPU."""

    def missing(device: torch.device) -> str | None:
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed: pip install {package}"
        return "it is a Triton kernel and needs a GPU" if gpu and device.type == "cpu" else None

    return missing


def no_compiler(device: torch.device) -> str | None:
    """Return why torch.compile cannot be used, or None if it can."""
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "torch.compile needs a C++ compiler on a CPU, and there is no g++ (or $CXX)"
    return None


def no_triton(device: torch.device) -> str | None:
    """Return why our Triton kernels cannot be timed, or None if they can."""
    if device.type == "cpu":
        return "Triton kernels need a GPU; their interpreter is for tests"
    return triton_unsupported([torch.empty(0, device=device)])


def _only_on_gpu(device: torch.device) -> str | None:
    return "on a CPU flex_attention is not compiled, and has no backward" if device.type == "cpu" else None


# ------------------------------------------------------------------------------------------------------------
# fused_step_kl
# ------------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "reverse_kl": {},
    "clipped": {"clip": 0.05},
    "forward_kl": {"divergence": "forward_kl"},
    "top_k=20": {"top_k": 20},
}


class StepKL(Rows):
    """The loss and the gradient of the student's hidden states; `OPTIONS` has the settings."""

    op = "step_kl"
    phase = "both"

    def needs(self) -> dict[str, float]:
        # With top_k and renormalised sides, only the teacher's logits are needed as a whole.
        units = 1 if "top_k" in self.setting else 3
        operands = (self.vocab + 3 * self.rows) * self.width
        return {"flops": units * 2 * self.rows * self.width * self.vocab, "bytes": operands * self.dtype.itemsize}

    def exact(self, tensors: Any) -> Results:
        student, teacher, weight = (x.detach().double() for x in tensors)
        options = StepKLOptions(**OPTIONS[self.setting])
        loss = reference.step_kl(student.requires_grad_(), teacher, weight, options=options).loss
        return loss.detach(), *torch.autograd.grad(loss, student)

    def providers(self) -> list[Provider]:
        def ours(backend: str) -> Callable[..., Results]:
            options = OPTIONS[self.setting]
            return _loss(lambda case, s, t, w: fused_step_kl(s, t, w, backend=backend, **options).loss)

        peers = []
        if self.setting == "reverse_kl":
            # Liger's and TRL's JSD with beta 1 is the reverse KL.
            peers = [
                Provider("liger", _loss(_liger_jsd), installed("liger-kernel", "liger_kernel", gpu=True)),
                Provider("trl", _loss(_trl), installed("trl", "trl")),
            ]
            if self.data == "diffuse":  # compiling takes longer than all else
                liger = installed("liger-kernel", "liger_kernel")
                peers.append(Provider("liger chunked", _loss(_liger_chunked), liger))
                peers.append(Provider("compile", _loss(_compiled_kl), no_compiler))
        elif self.setting == "forward_kl":
            module = "liger_kernel.ops.fused_linear_kl_div"
            peers = [Provider("liger kl", _loss(_liger_kl), _no_liger_kl(module))]
        return [
            Provider("floor", _floor_step_kl),
            Provider("eager", _loss(_eager_kl)),
            Provider("ours torch", ours("torch")),
            Provider("ours triton", ours("triton"), no_triton),
            *peers,
        ]


def _loss(forward: Callable[..., Tensor]) -> Callable[[StepKL, Any], Results]:
    def run(case: StepKL, tensors: Any) -> Results:
        loss = forward(case, *tensors)
        return loss.detach(), *torch.autograd.grad(loss, tensors[0])

    return run


def _floor_step_kl(case: StepKL, tensors: Any) -> None:
    """Two products forward, in one of 2N rows, and one backward; with top_k the teacher's alone."""
    student, teacher, weight = tensors
    if "top_k" in case.setting:
        _bare(teacher, weight)
        return
    buffer = _bare(torch.cat([student.detach(), teacher]), weight)
    for chunk in torch.empty_like(student).detach().split(len(buffer)):
        torch.mm(buffer[: len(chunk)], weight, out=chunk)


def _kl_of_logits(student: Tensor, teacher: Tensor, weight: Tensor, setting: str) -> Tensor:
    options = OPTIONS[setting]
    with torch.no_grad():
        teacher_logits = (teacher @ weight.T).float()
    student_logits = (student @ weight.T).float()
    if "top_k" in options:
        teacher_logits, support = teacher_logits.topk(options["top_k"])
        student_logits = student_logits.gather(-1, support)
    log_t, log_s = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    p, q = (log_t, log_s) if setting == "forward_kl" else (log_s, log_t)
    contributions = p.exp() * (p - q)
    if "clip" in options:
        contributions = contributions.clamp(max=options["clip"])
    return contributions.sum(-1).mean()


def _eager_kl(case: StepKL, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    return _kl_of_logits(student, teacher, weight, case.setting)


_compiled = functools.cache(torch.compile)


def _compiled_kl(case: StepKL, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    for rows in (student, teacher):
        torch._dynamo.maybe_mark_dynamic(rows, 0)  # one compilation for every N
    loss: Tensor = _compiled(_kl_of_logits)(student, teacher, weight, case.setting)
    return loss


def _liger_jsd(case: StepKL, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss: Tensor = LigerFusedLinearJSD(jsd_beta=1.0)(student, weight, teacher, weight, None)
    return loss


def _liger_chunked(case: StepKL, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Liger's chunked loss, which has no Triton; it always computes the weight's gradient, a fourth product."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    compiled = no_compiler(weight.device) is None
    chunked = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=compiled)
    labels = torch.zeros(len(student), dtype=torch.long, device=weight.device)
    loss: Tensor = chunked(student, weight, teacher, weight, labels)
    return loss


def _liger_kl(case: StepKL, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Liger's fused linear KL, whose target is the teacher's whole distribution: making that is part of it."""
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    with torch.no_grad():
        target = (teacher @ weight.T).softmax(-1)
    loss: Tensor = LigerFusedLinearKLDivLoss()(student, weight, target)
    return loss


def _no_liger_kl(module: str) -> Callable[[torch.device], str | None]:
    liger = installed("liger-kernel", "liger_kernel", gpu=True)

    def missing(device: torch.device) -> str | None:
        if importlib.util.find_spec("liger_kernel") is not None and importlib.util.find_spec(module) is None:
            return "the installed liger-kernel has no fused linear KL: pip install -U liger-kernel"
        return liger(device)

    return missing


def _trl(case: StepKL, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    with torch.no_grad():
        teacher_logits = teacher @ weight.T
    loss: Tensor = GKDTrainer.generalized_jsd_loss(student @ weight.T, teacher_logits, beta=1.0)
    return loss


# ------------------------------------------------------------------------------------------------------------
# fused_confidence
# ------------------------------------------------------------------------------------------------------------

ASKED: dict[str, dict[str, Any]] = {
    "argmax": {},
    "top_k=20": {"top_k": 20},
    "sampled": {"temperature": 1.0, "seed": 0},
}


class Confidence(Rows):
    """The probability of the chosen token (a sample's depends on the noise: of the largest logit instead)."""

    op = "confidence"
    phase = "forward"

    def exact(self, tensors: Any) -> Results:
        student, _teacher, weight = tensors
        exact = reference.confidence(student.detach().double(), weight.double())
        return ((exact.max_logit - exact.logsumexp).exp(),)

    def providers(self) -> list[Provider]:
        def ours(backend: str) -> Callable[..., Results]:
            def run(case: Confidence, tensors: Any) -> Results:
                output = fused_confidence(tensors[0], tensors[2], backend=backend, **ASKED[case.setting])
                return ((output.max_logit - output.logsumexp).exp(),)

            return run

        return [
            Provider("floor", _floor_confidence),
            Provider("eager", _eager_confidence),
            Provider("ours torch", ours("torch")),
            Provider("ours triton", ours("triton"), no_triton),
        ]


def _floor_confidence(case: Confidence, tensors: Any) -> None:
    _bare(tensors[0].detach(), tensors[2])


@torch.no_grad()
def _eager_confidence(case: Confidence, tensors: Any) -> Results:
    probability = (tensors[0] @ tensors[2].T).float().softmax(-1)
    if case.setting == "sampled":
        torch.multinomial(probability, 1)
    elif "top_k" in case.setting:
        probability.topk(ASKED[case.setting]["top_k"])
    return (probability.max(-1).values,)


# ------------------------------------------------------------------------------------------------------------
# The two products of a chunk, alone
# ------------------------------------------------------------------------------------------------------------


class Products(Rows):
    """One of the library's products as `fused_step_kl` calls it, with the results' dtype as the provider."""

    op = "products"
    phase = "forward"

    def exact(self, tensors: Any) -> Results:
        return tuple(x.double() for x in _product(self, tensors, None))

    def providers(self) -> list[Provider]:
        kinds = [torch.float32] if self.dtype == torch.float32 else [torch.float32, self.dtype]
        return [Provider(f"{dtype_name(kind)} out", functools.partial(_product, kind=kind)) for kind in kinds]


def _product(case: Products, tensors: Any, kind: torch.dtype | None) -> tuple[Tensor, ...]:
    student, _teacher, weight = (x.detach() for x in tensors)
    a, b = student, weight.T
    if case.setting == "hidden gradient":
        # Any matrix of the gradient's shape will do: the weight's own rows, in its dtype.
        a, b = weight.T.reshape(-1)[: case.rows * case.vocab].view(case.rows, case.vocab), weight
    if kind is None:
        return (a.double() @ b.double(),)
    return (products.matmul(a, b) if kind == torch.float32 else torch.mm(a, b),)


# ------------------------------------------------------------------------------------------------------------
# prefix_attention
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """Attention of G x S sequences of T tokens over P keys that a group shares, and their own.

    The shapes are those of a block's other states with reuse of all but the block (T = 32), and of the prompt.
    """

    groups: int
    sequences: int
    heads: int
    length: int
    prefix: int
    width: int
    dtype: torch.dtype
    phase: str

    def __str__(self) -> str:
        return f"attention {self.phase}, T={self.length}, P={self.prefix}"

    def about(self) -> dict[str, Any]:
        """The columns that name it."""
        return {"part": "attention", **_columns(self)}

    def small(self) -> Attention:
        """The same with one group of few heads."""
        return replace(self, groups=1, heads=min(self.heads, 2))

    def needs(self) -> dict[str, float]:
        """Two products forward, four backward (scores computed again do not count); every tensor once."""
        queries = self.groups * self.sequences * self.heads * self.length
        product = 2 * queries * (self.prefix + self.length) * self.width
        own, shared = queries * self.width, self.groups * self.heads * self.prefix * self.width
        # q, k, v, out and the prefix' two; backward reads them and out's gradient, and writes the gradients.
        numbers = 4 * own + 2 * shared
        if self.phase == "both":
            numbers += 4 * own + 2 * shared + own + 3 * own + 2 * shared
        return {"flops": product * (2 if self.phase == "forward" else 6), "bytes": numbers * self.dtype.itemsize}

    def tensors(self, device: torch.device) -> tuple[Tensor, ...]:
        """Random q, k, v and the prefix' keys and values, with gradients."""
        generator = torch.Generator(device).manual_seed(0)
        own = (self.groups, self.sequences, self.heads, self.length, self.width)
        shared = (self.groups, self.heads, self.prefix, self.width)
        return tuple(
            torch.randn(shape, generator=generator, device=device).to(self.dtype).requires_grad_()
            for shape in (own, own, own, shared, shared)
        )

    def exact(self, tensors: Any) -> Results:
        return _attend(concatenated)(self, tuple(x.detach().double().requires_grad_() for x in tensors))

    def providers(self) -> list[Provider]:
        def ours(backend: str) -> Callable[..., Tensor]:
            return functools.partial(prefix_attention, backend=backend)

        return [
            Provider("concatenated", _attend(concatenated)),
            Provider("ours torch", _attend(ours("torch"))),
            Provider("ours triton", _attend(ours("triton")), no_triton),
            Provider("flex", _attend(flex), _only_on_gpu),
        ]


def _attend(attention: Callable[..., Tensor]) -> Callable[[Attention, Any], Results]:
    def run(case: Attention, tensors: Any) -> Results:
        with torch.set_grad_enabled(case.phase == "both"):
            out = attention(*tensors)
        if case.phase == "forward":
            return (out,)
        return out.detach(), *torch.autograd.grad(out, tensors, torch.ones_like(out))

    return run


def concatenated(q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor, v_prefix: Tensor) -> Tensor:
    """PyTorch's attention over every sequence's own copy of the prefix."""
    keys, values = (
        torch.cat([prefix[:, None].expand(-1, q.shape[1], -1, -1, -1), own], 3).flatten(0, 1)
        for prefix, own in ((k_prefix, k), (v_prefix, v))
    )
    return F.scaled_dot_product_attention(q.flatten(0, 1), keys, values).view_as(q)


def flex(q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor, v_prefix: Tensor) -> Tensor:
    """flex_attention over the prefix and all of a group's sequences, with a mask that keeps these apart."""
    from torch.nn.attention.flex_attention import flex_attention

    groups, sequences, heads, length, _ = q.shape
    queries, own_keys, own_values = (x.transpose(1, 2).flatten(2, 3) for x in (q, k, v))
    keys, values = torch.cat([k_prefix, own_keys], 2), torch.cat([v_prefix, own_values], 2)
    mask = _flex_mask(sequences, length, k_prefix.shape[2], q.device)
    attend: Any = flex_attention if q.device.type == "cpu" else _compiled(flex_attention)
    out: Tensor = attend(queries, keys, values, block_mask=mask)
    return out.view(groups, heads, sequences, length, -1).transpose(1, 2)


@functools.cache
def _flex_mask(sequences: int, length: int, prefix: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def allowed(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key < prefix) | ((key - prefix) // length == query // length)

    return create_block_mask(allowed, None, None, sequences * length, prefix + sequences * length, device=str(device))


# ------------------------------------------------------------------------------------------------------------
# The cases
# ------------------------------------------------------------------------------------------------------------

Case = StepKL | Confidence | Products | Attention


def cases(device: torch.device, rehearsal: bool = False) -> list[Case]:
    """The cases of a kind of machine, what tells most first; small ones of every kind for a rehearsal."""
    many, few, head, decoded = 512, 64, (256, 16384, torch.float32), (256, 32768, torch.float32)
    groups, heads, attended = 1, 8, torch.float32
    lengths: tuple[tuple[int, int], ...] = ((32, 424), (256, 200))
    if rehearsal:
        many, few, head, decoded = 12, 8, (32, 500, torch.float32), (32, 500, torch.float32)
        groups, heads, lengths = 2, 2, ((4, 12),)
    elif device.type == "cuda":
        many, few, head = 2048, 256, (4096, 126464, torch.bfloat16)
        decoded, groups, heads, attended = head, 8, 32, torch.bfloat16
    found: list[Case] = [StepKL("reverse_kl", rows, *head) for rows in (many, few)]
    found += [Products(setting, few, *head) for setting in ("logits", "hidden gradient")]
    found += [StepKL("top_k=20", many, *head), StepKL("clipped", many, *head)]
    found += [Confidence(setting, rows, *decoded) for setting in ("argmax", "top_k=20") for rows in (32, many)]
    found += [Confidence("sampled", rows, *decoded, "peaked") for rows in (32, many)]
    found += [
        Attention(groups, 15, heads, length, prefix, 128, attended, phase)
        for length, prefix in lengths
        for phase in ("forward", "both")
    ]
    return [*found, StepKL("forward_kl", many, *head), StepKL("reverse_kl", many, *head, "peaked")]
