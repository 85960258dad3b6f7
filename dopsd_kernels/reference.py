"""Executable specification of the ops: plain PyTorch that materialises the logits.

Read this file to know what an op computes; the fast implementations are tested against it. Everything is
computed in fp32, or in fp64 when the (student's) hidden states are fp64. Autograd differentiates `step_kl`;
no gradient reaches the teacher.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .confidence.contracts import ConfidenceOutput
from .lora_layer.contracts import LoraLinear
from .step_kl.contracts import StepKLOptions, StepKLOutput
from .token_logprob.contracts import TokenLogprob

# ------------------------------------------------------------------------------------------------------------
# Clipped divergence between a student and a fixed teacher
# ------------------------------------------------------------------------------------------------------------


def step_kl(
    student_hidden: Tensor,  # (..., d)
    teacher_hidden: Tensor,  # (..., d_t)
    weight: Tensor,  # (V, d)
    *,
    teacher_weight: Tensor | None = None,  # (V, d_t)
    bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    row_weight: Tensor | None = None,  # (N,)
    reduction: str = "mean",
    options: StepKLOptions,
) -> StepKLOutput:
    """Specify `dopsd_kernels.fused_step_kl`, whose docstring defines the arguments."""
    if teacher_weight is None:
        teacher_weight = weight
        teacher_bias = bias if teacher_bias is None else teacher_bias
    student_logits = _logits(student_hidden, weight, bias, student_hidden.dtype) / options.temperature
    with torch.no_grad():
        teacher_logits = _logits(teacher_hidden, teacher_weight, teacher_bias, student_hidden.dtype)
        teacher_logits = teacher_logits / options.temperature
    log_s, log_t = _log_probabilities(student_logits, teacher_logits, options)

    exact = _contributions(log_s, log_t, options)
    row_kl = exact.sum(-1)
    if options.clip is None:
        row_loss, row_clip_fraction = row_kl, torch.zeros_like(row_kl)
    else:
        contributions = exact
        if options.clip_form == "nonnegative":
            # s and t both sum to 1, so these terms cancel in the sum and make every contribution nonnegative.
            s_minus_t = log_s.exp() - log_t.exp()
            contributions = exact + _SLOPE[options.divergence](options.beta) * s_minus_t
        row_loss = contributions.clamp(max=options.clip).sum(-1)
        row_clip_fraction = (contributions > options.clip).to(row_kl.dtype).mean(-1)

    leading = student_hidden.shape[:-1]
    weights = torch.ones_like(row_kl) if row_weight is None else row_weight.reshape(leading).to(row_kl.dtype)
    # A row of weight 0 is not a row: whatever it holds, NaN included, it adds nothing and gets no gradient.
    used = weights > 0
    row_loss, row_kl, row_clip_fraction = (
        torch.where(used, x, torch.zeros_like(x)) for x in (row_loss, row_kl, row_clip_fraction)
    )
    loss = weights * row_loss
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / used.sum().clamp(min=1)
    return StepKLOutput(loss, row_loss.detach(), row_kl.detach(), row_clip_fraction.detach())


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    logits = hidden.to(dtype) @ weight.to(dtype).T
    return logits if bias is None else logits + bias.to(dtype)


def _log_probabilities(
    student_logits: Tensor,  # (..., V)
    teacher_logits: Tensor,  # (..., V)
    options: StepKLOptions,
) -> tuple[Tensor, Tensor]:
    """Return log s and log t, over the vocabulary or over the teacher's top-k and perhaps a tail entry."""
    if options.top_k is not None:
        order = teacher_logits.sort(dim=-1, descending=True, stable=True).indices  # stable: ties to the lowest id
        kept, rest = order[..., : options.top_k], order[..., options.top_k :]
        student_logits, teacher_logits = (
            _restrict(x, kept, rest, bucket=options.tail == "bucket") for x in (student_logits, teacher_logits)
        )
    return _floored(student_logits.log_softmax(-1)), _floored(teacher_logits.log_softmax(-1))


def _restrict(logits: Tensor, kept: Tensor, rest: Tensor, *, bucket: bool) -> Tensor:
    """Keep the entries `kept`; a bucket is one more entry that holds the mass of `rest`."""
    support = logits.gather(-1, kept)
    if not bucket:
        return support
    return torch.cat([support, _floored(logits.gather(-1, rest)).logsumexp(-1, keepdim=True)], -1)


def _floored(log_p: Tensor) -> Tensor:
    """Replace log 0 by the lowest finite number, so that 0 times it is 0, in the gradient too."""
    return log_p.clamp(min=torch.finfo(log_p.dtype).min)


def _contributions(log_s: Tensor, log_t: Tensor, options: StepKLOptions) -> Tensor:
    """Return each entry's term of the divergence."""
    log_m = torch.logaddexp(log_s + math.log1p(-options.beta), log_t + math.log(options.beta))
    return {
        "reverse_kl": lambda: _weighted_log_ratio(log_s, log_t),
        "forward_kl": lambda: _weighted_log_ratio(log_t, log_s),
        "jsd": lambda: (
            (1 - options.beta) * _weighted_log_ratio(log_s, log_m) + options.beta * _weighted_log_ratio(log_t, log_m)
        ),
        "skew_reverse_kl": lambda: _weighted_log_ratio(log_s, log_m),
        "skew_forward_kl": lambda: _weighted_log_ratio(log_t, log_m),
    }[options.divergence]()


# Multiple of s - t, by beta, that gives a contribution its minimum, 0, at s = t.
_SLOPE: dict[str, Callable[[float], float]] = {
    "reverse_kl": lambda beta: -1,
    "forward_kl": lambda beta: 1,
    "jsd": lambda beta: 0,
    "skew_reverse_kl": lambda beta: -beta,
    "skew_forward_kl": lambda beta: 1 - beta,
}


def _weighted_log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return p log(p / q): 0 where p is 0, infinite where only q is."""
    p = log_p.exp()
    impossible = (p > 0) & (log_q == torch.finfo(log_q.dtype).min)
    return torch.where(impossible, math.inf, p * (log_p - log_q))


# ------------------------------------------------------------------------------------------------------------
# Log-probabilities of given tokens, and the entropy
# ------------------------------------------------------------------------------------------------------------


def token_logprob(
    hidden: Tensor,  # (..., d)
    weight: Tensor,  # (V, d)
    tokens: Tensor,  # (...) or (..., m) int64
    *,
    bias: Tensor | None = None,  # (V,)
    exclude: Sequence[int] = (),
    temperature: float = 1.0,
) -> TokenLogprob:
    """Specify `dopsd_kernels.fused_token_logprob`, whose docstring defines the arguments."""
    logits = _logits(hidden, weight, bias, hidden.dtype)
    logits = logits.index_fill(-1, torch.tensor(exclude, dtype=torch.int64, device=hidden.device), -math.inf)
    log_p = (logits / temperature).log_softmax(-1)
    logprob = log_p.gather(-1, tokens.reshape(*hidden.shape[:-1], -1)).reshape(tokens.shape)
    finite = log_p.masked_fill(log_p == -math.inf, 0)  # 0 log 0 is 0, in the gradient too
    return TokenLogprob(logprob, -(log_p.exp() * finite).sum(-1))


# ------------------------------------------------------------------------------------------------------------
# Attention of many short sequences over one shared prefix and their own keys
# ------------------------------------------------------------------------------------------------------------


def prefix_attention(
    q: Tensor,  # (G, S, H, T, D)
    k: Tensor,  # (G, S, H_kv, T, D)
    v: Tensor,  # (G, S, H_kv, T, D)
    k_prefix: Tensor,  # (G, H_kv, P, D)
    v_prefix: Tensor,  # (G, H_kv, P, D)
    *,
    prefix_mask: Tensor | None = None,  # (G, P) bool
    own_mask: Tensor | None = None,  # (G, S, T) bool
    prefix_length: Tensor | None = None,  # (G, S) int64
    scale: float | None = None,
) -> Tensor:
    """Specify `dopsd_kernels.prefix_attention`, whose docstring defines the arguments."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups, sequences, heads, _, width = q.shape
    repeats = heads // k.shape[2]
    keys, values = (
        torch.cat([prefix[:, None].expand(-1, sequences, -1, -1, -1), own], 3).to(dtype).repeat_interleave(repeats, 2)
        for prefix, own in ((k_prefix, k), (v_prefix, v))
    )
    seen = torch.ones(groups, sequences, keys.shape[3], dtype=torch.bool, device=q.device)
    if prefix_mask is not None:
        seen[..., : k_prefix.shape[2]] = prefix_mask[:, None]
    if prefix_length is not None:
        seen[..., : k_prefix.shape[2]] &= torch.arange(k_prefix.shape[2], device=q.device) < prefix_length[..., None]
    if own_mask is not None:
        seen[..., k_prefix.shape[2] :] = own_mask
    scores = (q.to(dtype) @ keys.mT) * (width**-0.5 if scale is None else scale)
    weights = scores.masked_fill(~seen[:, :, None, None], -math.inf).softmax(-1)
    # A query that sees no key gets 0.
    return (weights.nan_to_num(0.0) if not seen.any(-1).all() else weights).matmul(values).to(q.dtype)


# ------------------------------------------------------------------------------------------------------------
# Confidence of a softmax head, and sampling from it
#
# A sample is the argmax of logit / temperature + Gumbel noise. The noise of (row, column) is a pure function
# of the row's 64-bit seed and the column: Philox4x32-10 (Salmon et al., 2011) with the seed as key and the
# counter (column // 4, 0, 0, 0) gives four 32-bit words, and the column takes word column % 4. This is the
# layout of `triton.language.randint4x(seed, offset)`.
# ------------------------------------------------------------------------------------------------------------


def confidence(
    hidden: Tensor,  # (..., d)
    weight: Tensor,  # (V, d)
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 0.0,
    seed: Tensor | None = None,  # (...,) int64: one per row
    top_k: int = 0,
    exclude: Sequence[int] = (),
    entropy: bool = False,
) -> ConfidenceOutput:
    """Specify `dopsd_kernels.fused_confidence`, whose docstring defines the arguments."""
    logits = _logits(hidden, weight, bias, hidden.dtype).detach()
    logits[..., list(exclude)] = -math.inf
    ordered = logits.sort(dim=-1, descending=True, stable=True)  # stable: ties to the lowest id
    argmax = ordered.indices[..., 0]
    token = argmax
    if temperature > 0:
        assert seed is not None
        columns = torch.arange(weight.shape[0], device=hidden.device)
        scores = logits / temperature + gumbel_noise(seed[..., None], columns, logits.dtype)
        token = scores.argmax(-1)
    return ConfidenceOutput(
        token=token,
        logit=logits.gather(-1, token[..., None])[..., 0],
        logsumexp=logits.logsumexp(-1),
        max_logit=ordered.values[..., 0],
        argmax=argmax,
        top_values=ordered.values[..., :top_k],
        top_indices=ordered.indices[..., :top_k],
        entropy=torch.special.entr(logits.softmax(-1)).sum(-1) if entropy else logits[..., :0],
    )


def gumbel_noise(seed: Tensor, column: Tensor, dtype: torch.dtype) -> Tensor:
    """Return standard Gumbel noise for int64 seeds and columns (broadcast together)."""
    zero = torch.zeros_like(seed + column)
    words = philox4x32((column // 4 + zero, zero, zero, zero), (seed & _MASK, (seed >> 32) & _MASK))
    word = torch.stack(words, -1).gather(-1, (column % 4 + zero)[..., None])[..., 0]
    return gumbel_of_word(word, dtype)


def gumbel_of_word(word: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn 32-bit words (int64) into standard Gumbel noise."""
    below_one = 1 - torch.finfo(dtype).eps / 2
    # Small words become large noise: the upper tail, which decides the argmax, keeps all 32 bits of
    # resolution.
    uniform = ((word.to(dtype) + 0.5) * 2.0**-32).clamp(max=below_one)
    exponential = -torch.log1p(-uniform)
    return -torch.log(exponential)


_MASK = 0xFFFFFFFF


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor],
    key: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four words of Philox4x32-10; every word is an int64 tensor of values below 2**32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap around modulo 2**64, so that both 32-bit halves come out right after masking.
        low, high = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            ((high >> 32) & _MASK) ^ c1 ^ k0,
            high & _MASK,
            ((low >> 32) & _MASK) ^ c3 ^ k1,
            low & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


# ------------------------------------------------------------------------------------------------------------
# Halves of a transformer layer over frozen weights with LoRA adapters
# ------------------------------------------------------------------------------------------------------------


def lora_linears(
    x: Tensor,  # (..., d)
    linears: Sequence[LoraLinear],
    *,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,  # (..., out)
) -> tuple[Tensor, ...]:
    """Specify `dopsd_kernels.lora_linears`, in the dtype of x."""
    inner = x if norm is None else x * (x.square().mean(-1, keepdim=True) + norm[1]).rsqrt() * norm[0]
    *others, last = (_lora_linear(inner, linear) for linear in linears)
    return *others, last if residual is None else residual + last


def lora_swiglu(
    x: Tensor,  # (..., d)
    gate: LoraLinear,
    up: LoraLinear,
    down: LoraLinear,
    *,
    norm: tuple[Tensor, float] | None = None,
) -> Tensor:  # (..., d)
    """Specify `dopsd_kernels.lora_swiglu`, in the dtype of x."""
    of_gate, of_up = lora_linears(x, [gate, up], norm=norm)
    return x + _lora_linear(of_gate * torch.sigmoid(of_gate) * of_up, down)


def _lora_linear(x: Tensor, linear: LoraLinear) -> Tensor:
    output = x @ linear.matrix(x.dtype).T
    if linear.bias is not None:
        output = output + linear.bias
    if linear.lora_a is None or linear.lora_b is None:
        return output
    kept = dropout_mask(x.shape, linear.dropout, linear.seed).to(x.device)
    dropped = torch.where(kept, x / (1 - linear.dropout), 0)
    return output + linear.scale * (dropped @ linear.lora_a.T @ linear.lora_b.T)


def dropout_mask(shape: Sequence[int], probability: float, seed: int) -> Tensor:
    """Return which entries stay, a bool tensor: each has a word of 32 bits, and falls out by the lowest."""
    index, zero = torch.arange(math.prod(shape)), torch.zeros(1, dtype=torch.int64)
    key = torch.tensor([seed & _MASK]), torch.tensor([(seed >> 32) & _MASK])
    words = philox4x32((index // 4, zero, zero, zero), key)
    word = torch.stack(torch.broadcast_tensors(*words), -1).gather(-1, (index % 4)[:, None])[:, 0]
    return (word >= int(probability * 2**32)).view(*shape)
