"""Counted peaks: a run's micro-batches on tensors that have shapes and no memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from dopsd.cache import CleanBlocks
from dopsd.config import ModelArguments, RolloutArguments, TeachingArguments, TrainingArguments
from dopsd.distillation import costliest_batch
from dopsd.memory.meter import CUDA_ALLOWANCE
from dopsd.memory.planner import Persistent, optimizer_bytes
from dopsd.memory.probe import synthetic_trajectory
from dopsd.models import MODELS, checkpoint_activations, merged_adapters
from dopsd.models.bidirectional import BidirectionalModel
from dopsd.sampler import inference
from dopsd.step_batch import Example, Reuse, StepBatch
from dopsd.teacher import TeacherWeights

# Bytes of a parameter of a quantised linear layer: nf4 has 4 bits and its constants, themselves quantised, 0.127 more.
QUANTIZED = {"nf4": 0.516, "int8": 1.0}
NF4_CONSTANTS = 0.016  # of these, which each process has where the others are shared

# States, and sequences, of which the peaks are computed; others lie on the lines through these.
PROBED = (8, 32)

ATTENTION = "dopsd_plan"


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """Attention that keeps for its backward pass what a GPU's kernels keep: its inputs, its output and a logsumexp.

    A model's own takes plain products on a CPU, whose scores are T x T. A mask would change nothing of that.
    """
    out = F.scaled_dot_product_attention(query, key, value, enable_gqa=key.shape[1] != query.shape[1])
    return out.transpose(1, 2), None


class StorageMeter(TorchDispatchMode):
    """Counts the bytes of the storages that are made inside and still in use; ``peak`` is the most there were."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
                    self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return out

    def free(self, key: int, size: int) -> None:
        """A storage is gone; its address may be another's next."""
        self.known.discard(key)
        self.now -= size


class MetaNetwork:
    """A student whose parameters have shapes and no memory, with a few of the layers of its config.

    Args:
        config: of a :class:`BidirectionalModel`.
        layers: how many it has.
        model: options.
    """

    def __init__(self, config: Any, layers: int, model: ModelArguments) -> None:
        config = deepcopy(config)
        config.num_hidden_layers, config._attn_implementation = layers, ATTENTION
        self.layers = layers
        self.network, _ = meta_networks(config, model)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self.mode:
            for module in self.network.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        made = torch.empty(parameter.shape, dtype=parameter.dtype)
                        module._parameters[name] = nn.Parameter(made, requires_grad=parameter.requires_grad)
        self.parameters = list(self.network.parameters())

    def peaks(self, work: Callable[[BidirectionalModel], Iterator[None]]) -> Tensor:
        """The peaks (bytes) up to each ``yield`` of ``work``, beside parameters and gradients."""
        with self.mode:
            for parameter in self.parameters:
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        meter = StorageMeter([*self.parameters, *(p.grad for p in self.parameters if p.grad is not None)])
        peaks = []
        with self.mode, meter:
            for _ in work(self.network):
                peaks.append(meter.peak)
                meter.peak = meter.now
        return torch.tensor(peaks, dtype=torch.float64)


def meta_networks(config: Any, model: ModelArguments) -> tuple[BidirectionalModel, Any]:
    """The network of a config and the same with the adapter that is trained, on the meta device."""
    dtype = config.dtype if model.dtype == "auto" else getattr(torch, model.dtype)
    with torch.device("meta"):
        network: Any = MODELS[config.model_type](config)
        network.to(dtype or torch.float32)
        # A stored adapter is taken to have the options' shape.
        student = model.fresh(network)
    return network, student


class Line(NamedTuple):
    """Peaks (bytes) of the phases of some work: each a fixed part, and a part for every token."""

    fixed: Tensor
    per_token: Tensor

    def at(self, tokens: int) -> int:
        """The peak of them all."""
        return int((self.fixed + self.per_token * tokens).max())


class DryRun:
    """A training run of which only the shapes are computed.

    In each phase of a micro-batch the peak is linear in the number of layers, all of which are alike, and in that of
    tokens: two small networks with two numbers of states say what it is of any.

    Args:
        config: of a :class:`BidirectionalModel`.
        model, rollouts, teaching, args: options of the run.
        prompt_length: tokens of the longest prompt.
        workspace_bytes: of the ops.
        sharing: processes that share the weights.
    """

    def __init__(
        self,
        config: Any,
        model: ModelArguments,
        rollouts: RolloutArguments,
        teaching: TeachingArguments,
        args: TrainingArguments,
        prompt_length: int,
        workspace_bytes: int,
        sharing: int = 1,
    ) -> None:
        self.sharing = sharing
        self.rollouts, self.teaching, self.args = rollouts, teaching, args
        self.prompt_length, self.workspace_bytes = prompt_length, workspace_bytes
        self.vocab, self.layers = config.vocab_size, config.num_hidden_layers
        self.network, student = meta_networks(config, model)
        self.block_causal = self.network.block_size is not None
        with torch.device("meta"):
            TeacherWeights(student, teaching.teacher, teaching.ema_decay, model.adapter is not None)
        # The first and the last layer are special: one has no gradient of its input, the other few positions.
        self.samples = [
            MetaNetwork(config, layers, model) for layers in sorted({min(3, self.layers), min(4, self.layers)})
        ]
        self.training, self.decoding, self.batch = cache(self._training), cache(self._decoding), cache(self._batch)

    def persistent(self, quantize: str) -> Persistent:
        """What is in use throughout, by arithmetic."""
        trained = [p for p in self.network.parameters() if p.requires_grad]
        held = self.stored((p for p in self.network.parameters() if not p.requires_grad), quantize)
        optimizer = optimizer_bytes(self.args.optim) * sum(p.numel() for p in trained)
        size = sum(p.nbytes for p in trained)
        held, size, optimizer = (-(-part // self.sharing) for part in (held, size, optimizer))
        if quantize == "nf4":
            held += int(NF4_CONSTANTS * (1 - 1 / self.sharing) * sum(p.numel() for p in self.linear()))
        return Persistent(held, size, gradients=size, optimizer=optimizer, runtime=CUDA_ALLOWANCE)

    def stored(self, parameters: Iterable[Tensor], quantize: str) -> int:
        """Bytes of parameters, of which linear layers' may be quantised."""
        packed = set() if quantize == "none" else {id(weight) for weight in self.linear()}
        return sum(int(p.numel() * QUANTIZED[quantize]) if id(p) in packed else p.nbytes for p in parameters)

    def gathered(self, quantize: str) -> tuple[int, int]:
        """Bytes of others' weights that a process has in a pass with a gradient, at most, and in decoding."""
        if self.sharing == 1:
            return 0, 0
        layers = [self.stored(layer.parameters(), quantize) for layer in self.network.layers]
        everything = self.stored(self.network.parameters(), quantize)
        # The embedding, the head, a layer and the next.
        at_once = everything - sum(layers) + 2 * max(layers)
        return min(at_once, everything), everything - everything // self.sharing

    def linear(self) -> list[Tensor]:
        """The weights that quantisation stores in fewer bits."""
        head = self.network.lm_head_weight
        modules = self.network.named_modules()
        layers = [module for name, module in modules if type(module) is nn.Linear and ".lora_" not in name]
        return [layer.weight for layer in layers if layer.weight is not head and not layer.weight.requires_grad]

    def examples(self, reuse: Reuse) -> tuple[Example, Example]:
        """As those of :class:`~dopsd.memory.probe.RunProbe`."""
        # A reference's tokens are counted in the prompt's.
        objective = replace(
            self.teaching.objective(), reuse=reuse, teacher_context="self_future", block_causal=self.block_causal
        )
        several, decoding = self.args.train_batch_size > 1, self.rollouts.decoding()

        def example(length: int) -> Example:
            prompt_ids = torch.zeros(length, dtype=torch.int64)
            trajectory = synthetic_trajectory(prompt_ids, decoding, self.vocab, 1, lead=self.network.lead(length))
            return objective.example(trajectory, prompt_ids, eos_id=1, seed=0)

        return example(max(1, self.prompt_length - several)), example(self.prompt_length)

    def states(self) -> int:
        """Those of a whole update."""
        return -(-self.args.train_batch_size * len(self.examples("none")[1].steps) // self.teaching.updates_per_batch)

    def _batch(self, reuse: Reuse, states: int) -> StepBatch:
        options: dict[str, Any] = {"mask_id": 0, "pad_id": 1, "device": torch.device("cpu")}
        options |= {"reuse": reuse, "block_causal": self.block_causal}
        return costliest_batch(*self.examples(reuse), states=states, **options)

    def _training(self, reuse: Reuse, checkpointing: bool) -> Line:
        """A micro-batch beside what is persistent; the teacher's pass, which keeps nothing, is never its peak."""

        def step(network: Any, batch: StepBatch, columns: Tensor) -> Iterator[None]:
            checkpoint_activations(network, checkpointing)
            network.train()
            with self.autocast():
                hidden = batch.student.hidden_states(network, columns)
                yield
                torch.empty(self.workspace_bytes, dtype=torch.uint8)  # the loss's
                yield
            hidden.backward(torch.empty_like(hidden))
            yield

        works = []
        for states in PROBED:
            batch = self.batch(reuse, states)
            columns = batch.columns[:, : int(batch.rows_by_confidence.max())]  # as many as K has
            works.append((batch.student.tokens, partial(step, batch=batch, columns=columns)))
        return self.line(works)

    def _decoding(self) -> Line:
        """A step of decoding beside what is persistent."""
        length = self.prompt_length + self.rollouts.gen_length

        def step(network: Any, sequences: int) -> Iterator[None]:
            ids = torch.zeros(sequences, length, dtype=torch.int64)
            read = ids[:, : self.rollouts.block_length]
            with inference(network), self.autocast(), merged_adapters(network):
                if self.rollouts.cache == "none":
                    kept: object = network.hidden_states(ids, None, read)
                elif self.block_causal:
                    prompt, response = ids[:, : self.prompt_length], ids[:, self.prompt_length :]
                    clean = CleanBlocks(network, prompt, None, response, ids[:, 0])
                    kept = clean, clean.hidden_states(ids, None, read, torch.arange(sequences))
                else:
                    kept = network.anchor_hidden_states(ids, None, read, ids[:, 0], length)
            yield
            del kept

        return self.line([(sequences * length, partial(step, sequences=sequences)) for sequences in PROBED])

    def autocast(self) -> torch.autocast:
        """As the run computes."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16 is True)

    def line(self, works: Sequence[tuple[int, Callable[[BidirectionalModel], Iterator[None]]]]) -> Line:
        """The line through two pieces of work, (tokens, work), with all layers."""
        (few, low), (many, high) = ((tokens, self.whole(work)) for tokens, work in works)
        per_token = (high - low) / (many - few)
        return Line(low - per_token * few, per_token)

    def whole(self, work: Callable[[BidirectionalModel], Iterator[None]]) -> Tensor:
        """The peaks of the phases of ``work`` with all layers, from those with fewer."""
        peaks = [sample.peaks(work) for sample in self.samples]
        return peaks[-1] + (peaks[-1] - peaks[0]) * (self.layers - self.samples[-1].layers)


class DryProbe:
    """What a planner asks of a dry run with a ``reuse`` and a quantisation."""

    def __init__(self, run: DryRun, reuse: Reuse, quantize: str) -> None:
        self.run, self.reuse = run, reuse
        self.persistent = run.persistent(quantize)
        # One layer's weight at a time is turned back into 16 bits.
        self.transient = 0 if quantize == "none" else max(2 * p.numel() for p in run.linear())
        self.gathered, self.decoding_gathered = run.gathered(quantize)

    def tokens(self, states: int) -> int:
        return self.run.batch(self.reuse, states).student.tokens

    def training(self, states: int, checkpointing: bool) -> int:
        tokens = self.tokens(states)
        standing = self.persistent.total + self.transient + self.gathered
        return standing + self.run.training(self.reuse, checkpointing).at(tokens)

    def decoding(self, sequences: int) -> int:
        tokens = sequences * (self.run.prompt_length + self.run.rollouts.gen_length)
        standing = self.persistent.total - self.persistent.gradients + self.transient + self.decoding_gathered
        return standing + self.run.decoding().at(tokens)


AttentionInterface.register(ATTENTION, attention)
