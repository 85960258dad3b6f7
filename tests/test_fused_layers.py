"""Layers of the models computed by the fused ops: the modules' results and gradients, in less memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dopsd.models import STUDENT, add_lora, bidirectional, compile_layers, fused
from dopsd.models.a2d import A2DQwen3Config, A2DQwen3LMHeadModel
from dopsd.models.dream import DreamConfig, DreamModel
from dopsd.models.llada import LLaDAConfig, LLaDAModelLM

IDS = torch.arange(3 * 9).reshape(3, 9) % 30
MASK = torch.arange(9) >= torch.tensor([[0], [2], [0]])
LINEARS = LLaDAModelLM.lora_modules
READ = torch.tensor([[3, 4], [8, 5], [2, 2]])


def llada(dtype: torch.dtype = torch.float64, **changes: Any) -> LLaDAModelLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 37, "d_model": 32, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 48, "init_std": 0.3}
    special = {"mask_token_id": 36, "eos_token_id": 0, "pad_token_id": 0, "max_sequence_length": 128}
    return LLaDAModelLM(LLaDAConfig(**{**sizes, **special, **changes})).to(dtype)


def dream() -> DreamModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 37, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "intermediate_size": 41, "mask_token_id": 36, "initializer_range": 0.3}
    model = DreamModel(DreamConfig(**sizes, **more)).double()  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def qwen3(dtype: torch.dtype = torch.float64, **changes: Any) -> A2DQwen3LMHeadModel:
    """Heads are normed, and wider than the width over their number unless that is changed."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 37, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 10}
    more = {"num_key_value_heads": 2, "intermediate_size": 48, "mask_token_id": 36, "initializer_range": 0.3}
    model = A2DQwen3LMHeadModel(A2DQwen3Config(block_size=0, **{**sizes, **more, **changes})).to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "llada": llada,
    "grouped and tied": lambda: llada(n_kv_heads=2, weight_tying=True),
    "dream": dream,
    "qwen3": qwen3,
}


def adapted(model: Any, dropout: float = 0.0) -> PeftModel:
    student = add_lora(model, None, r=4, alpha=2, dropout=dropout)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return student.train()


def results(student: PeftModel, model: Any, bf16: bool = False) -> list[Tensor]:
    """States at some positions of padded sequences, and the gradients of the adapter and of the embedding's result."""
    student.zero_grad()
    embedded: list[Tensor] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda *call: embedded.append(call[-1].detach().requires_grad_()) or embedded[-1]
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        states = model.hidden_states(IDS, MASK, READ)
    hook.remove()
    states.pow(3).sum().backward()
    gradients = [p.grad.double().clone() for p in student.parameters() if p.grad is not None]
    assert len(gradients) == len(model.layers) * 2 * 7 and embedded[0].grad is not None
    return [states.detach().double(), embedded[0].grad.double(), *gradients]


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, layers are computed by their modules."""
    return lambda: monkeypatch.setattr(bidirectional, "fused", lambda parts, x: parts)


@pytest.mark.parametrize("name", MODELS)
def test_what_modules_compute(name: str, modules: Callable[[], None]) -> None:
    """States and every gradient in fp64, to 1e-10."""
    model = MODELS[name]()
    student = adapted(model)
    ours = results(student, model)
    modules()
    for got, expected in zip(ours, results(student, model), strict=True):
        assert float((got - expected).norm()) <= 1e-10 * float(expected.norm())


def test_which_adapter_is_computed(modules: Callable[[], None]) -> None:
    """The student's, another one's, none, and weights with which it is merged."""
    model = llada()
    student = adapted(model).eval()
    student.add_adapter("teacher", student.peft_config[STUDENT])
    for name, parameter in student.named_parameters():
        if "teacher" in name:
            torch.nn.init.normal_(parameter, std=0.2)

    def states() -> list[Tensor]:
        found = [model.hidden_states(IDS)]
        student.set_adapter("teacher")
        found.append(model.hidden_states(IDS))
        student.set_adapter(STUDENT)
        with student.disable_adapter():
            found.append(model.hidden_states(IDS))
        student.merge_adapter()
        found.append(model.hidden_states(IDS))
        student.unmerge_adapter()
        return [one.detach() for one in found]

    ours = states()
    assert all(float((ours[0] - other).abs().max()) > 1e-3 for other in ours[1:3])
    modules()
    for got, expected in zip(ours, states(), strict=True):
        assert float((got - expected).norm()) <= 1e-10 * float(expected.norm())


def test_dropout_is_the_same_when_a_layer_is_computed_again() -> None:
    """Gradients with checkpointing are those without, draw by draw; another pass draws anew, and evaluation nothing."""
    found = []
    for checkpointing in (False, True):
        model = llada()
        student = adapted(model, dropout=0.4)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        found.append([results(student, model), results(student, model)])
    for plain, again in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    first, second = found[0]
    assert float((first[0] - second[0]).abs().max()) > 1e-3
    student.eval()
    assert torch.equal(model.hidden_states(IDS), model.hidden_states(IDS))


def test_bf16_is_as_exact_as_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, against fp64: in the mean over tensors and seeds, at most twice their error."""
    errors = []
    for seed in range(3):
        model = llada(torch.float32, init_std=0.1)
        torch.manual_seed(seed)
        student = adapted(model)
        truth = results(student.double(), model)
        student.float()
        ours = results(student, model, bf16=True)
        with monkeypatch.context() as patch:
            patch.setattr(bidirectional, "fused", lambda parts, x: parts)
            theirs = results(student, model, bf16=True)
        for some in (ours, theirs):
            errors.append([float((a - t).norm() / t.norm()) for a, t in zip(some, truth, strict=True)])
    ours_error, theirs_error = torch.tensor(errors).square().unflatten(0, (-1, 2)).mean((0, 2)).sqrt()
    assert 0 < ours_error < 2 * theirs_error


@pytest.mark.parametrize(("name", "dropout", "numbers"), [("llada", 0.0, 12), ("llada", 0.1, 12), ("qwen3", 0.1, 14)])
def test_a_layer_keeps_thirteen_numbers_a_column(
    name: str, dropout: float, numbers: int, modules: Callable[[], None]
) -> None:
    """At a hidden width of 3 d, in 16 bits, of every token and layer: at most 13 d; attention's own statistics apart.

    They are the layer's input, queries, keys, values, what attention gives, the middle, gate and up: 12 d. Norms of
    heads keep queries and keys as they were as well.
    """
    width, tokens = 64, 4 * 32
    makes = {
        "llada": partial(llada, torch.bfloat16, d_model=width, mlp_hidden_size=3 * width),
        "qwen3": partial(
            *(qwen3, torch.bfloat16), hidden_size=width, intermediate_size=3 * width, head_dim=16, num_key_value_heads=4
        ),
    }
    ids = torch.arange(tokens).reshape(4, 32) % 30

    def kept() -> float:
        """16-bit numbers a token and a column of the width, of one layer more."""
        counts = []
        for layers in (2, 3):
            model = makes[name](**{"n_layers" if name == "llada" else "num_hidden_layers": layers})
            student = adapted(model, dropout)
            held = {p.untyped_storage().data_ptr() for p in student.parameters()}
            found: dict[int, Any] = {}

            def pack(x: Tensor, held: set[int] = held, found: dict[int, Any] = found) -> Tensor:
                storage = x.untyped_storage()
                if storage.data_ptr() not in held and x.shape != (4, 4, 32):  # of attention's softmax
                    found[storage.data_ptr()] = storage
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                states = model.hidden_states(ids)
            del states
            counts.append(sum(storage.nbytes() for storage in found.values()) / 2)
        return (counts[1] - counts[0]) / tokens / width

    with pytest.MonkeyPatch.context() as patch:
        # As on a GPU; what a CPU takes keeps attention's weights.
        patch.setattr(bidirectional, "sdpa_kernel", lambda _: sdpa_kernel(SDPBackend.FLASH_ATTENTION))
        ours = kept()
        assert numbers < ours <= numbers + 1
        modules()
        assert kept() > 1.7 * ours


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_weights(kind: str, modules: Callable[[], None]) -> None:
    """Unpacked for each pass: what is computed with the weights that they stand for, in place of them."""
    nn = pytest.importorskip("bitsandbytes").nn
    model = llada(torch.float32, init_std=0.1)
    for block in model.layers:
        for name in LINEARS:
            own = getattr(block, name)
            if kind == "nf4":
                made = nn.Linear4bit(*own.weight.T.shape, bias=False, compute_dtype=torch.float32, quant_type="nf4")
                made.weight = nn.Params4bit(own.weight.detach(), requires_grad=False, quant_type="nf4")
            else:
                made = nn.Linear8bitLt(*own.weight.T.shape, bias=False, has_fp16_weights=False)
                made.weight = nn.Int8Params(own.weight.detach(), requires_grad=False, has_fp16_weights=False)
            setattr(block, name, made.to("cpu"))
    model.hidden_states(IDS[:, :0].new_ones(1, 2))  # 8-bit layers take their scales to themselves at the first call
    student = adapted(model)
    assert isinstance(fused.fused(model.layers[0].parts(), torch.zeros(1, 1, 32)), fused.FusedParts)
    ours = results(student, model)
    for block in model.layers:
        for name in LINEARS:
            layer = getattr(block, name)
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
            plain.weight = torch.nn.Parameter(fused.dequantize_module_weight(layer.base_layer).detach(), False)
            layer.base_layer = plain
    modules()
    for got, expected in zip(ours, results(student, model), strict=True):
        assert float((got - expected).norm()) <= 1e-5 * float(expected.norm())


# ---- what is left to the modules ----


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "an adapter is no plain LoRA"),
        ({"lora_bias": True}, "an adapter has a bias"),
        ({"base": True}, "a base weight is trained"),
        ({"two": True}, "several adapters are active: default, other"),
        ({"hook": True}, "a linear layer has hooks"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_log_says_once_what_is_computed_by_modules(
    change: dict[str, bool], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What the fused ops don't know works as PEFT computes it, and is named."""
    model = llada()
    options = {name: value for name, value in change.items() if name.startswith(("use", "lora"))}
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], **options)
    student = get_peft_model(model, config).double()
    if "base" in change:
        model.model.transformer.blocks[0].k_proj.weight.requires_grad_(True)
    if "hook" in change:
        model.layers[0].k_proj.register_forward_hook(lambda *call: call[-1])
    if "two" in change:
        student.add_adapter("other", config)
        student.base_model.set_adapter(["default", "other"])
    fused.say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=fused.__name__):
        for _ in range(2):
            model.hidden_states(IDS).sum().backward()
    assert [record.message for record in caplog.records] == [
        f"layers are computed by their modules, and keep more for the backward pass: {said}"
    ]
    assert any(p.grad is not None for name, p in student.named_parameters() if "lora_A" in name)


def test_a_network_without_an_adapter() -> None:
    """Decoded, it takes the fused path; trained as a whole, the modules'."""
    model = llada()
    with torch.no_grad():
        states = model.hidden_states(IDS)
        assert isinstance(fused.fused(model.layers[0].parts(), states), fused.FusedParts)
    parts = model.layers[0].parts()
    assert fused.fused(parts, states) is parts
    torch.testing.assert_close(model.hidden_states(IDS), states, rtol=1e-12, atol=1e-12)


def test_compiled_layers_share_their_graphs() -> None:
    """One graph for each way of calling, for all layers and sizes; what is computed is what modules compute."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    model = llada()
    student = adapted(model)
    expected = results(student, model)
    compile_layers(model, "eager", None)
    counters.clear()
    for got, want in zip(results(student, model), expected, strict=True):
        assert float((got - want).norm()) <= 1e-10 * float(want.norm())
    assert counters["stats"]["unique_graphs"] == 2  # the last layer reads some positions
    graphs = []
    for size in (4, 7):
        model.hidden_states(IDS[:, :size], MASK[:, :size], READ.clamp_max(size - 1)).sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1
    torch._dynamo.reset()
