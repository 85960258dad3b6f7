"""The examples of docs/trainers.md run, and compute what they say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pages import ROOT, run_python
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page's blocks define."""
    return run_python(ROOT / "docs" / "trainers.md", tmp_path_factory.mktemp("page"))


def model(seed: int, vocab: int = 97) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.5, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 97, (3, 9), generator=generator)
    mask = torch.zeros(3, 9, dtype=torch.int64)
    mask[0, 4:], mask[1, 6:], mask[2, 3:7] = 1, 1, 1
    return {"input_ids": ids, "completion_mask": mask}


def log_probabilities(network: LlamaForCausalLM, batch: dict[str, Tensor]) -> Tensor:
    """Of the completions' tokens, (rows, V)."""
    logits = network(batch["input_ids"]).logits[:, :-1].double()
    return logits[batch["completion_mask"][:, 1:].bool()].log_softmax(-1)


def test_the_loop(examples: dict[str, Any], batch: dict[str, Tensor]) -> None:
    student, teacher = model(0), model(1)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    log_s, log_t = log_probabilities(student, batch), log_probabilities(teacher, batch)
    expected = (log_s.exp() * (log_s - log_t)).sum(-1).mean().item()
    logged = [
        examples["train_step"](student, teacher, optimizer, attention_mask=torch.ones(3, 9), **batch) for _ in range(5)
    ]
    assert logged[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert logged[-1]["kl"] < logged[0]["kl"]


def test_the_trainer(examples: dict[str, Any], batch: dict[str, Tensor], tmp_path: Path) -> None:
    student, teacher = model(0), model(1)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    rows = [
        {"input_ids": ids, "attention_mask": torch.ones(9), "labels": label}
        for ids, label in zip(batch["input_ids"], labels, strict=True)
    ]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=5, per_device_train_batch_size=3, learning_rate=1e-2, report_to=[], use_cpu=True,
        remove_unused_columns=False, save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    with torch.no_grad():
        log_s, log_t = log_probabilities(student, batch), log_probabilities(teacher, batch)
        log_m = torch.logaddexp(log_s, log_t) - torch.tensor(2.0).log()
        jsd = 0.5 * (log_s.exp() * (log_s - log_m) + log_t.exp() * (log_t - log_m)).sum(-1).mean().item()
    trainer = examples["DistillationTrainer"](student, arguments, train_dataset=rows, teacher=teacher)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(jsd, rel=1e-3)  # logged with four digits
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore")  # what TRL warns of
def test_trl(examples: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The subclass trains; with TRL's divergence, its loss, gradients, and count of tokens are TRL's own."""
    trl = pytest.importorskip("trl", "1.16")
    datasets = pytest.importorskip("datasets")
    from dopsd.assets.pretrain import character_tokenizer

    tokenizer = character_tokenizer()
    tokenizer.padding_side = "left"
    arguments = trl.DistillationConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, max_completion_length=6, beta=0.3, temperature=0.8,
        learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True,
        bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    student, teacher = model(0, len(tokenizer)), model(1, len(tokenizer))
    rows = datasets.Dataset.from_list([{"prompt": text} for text in ("12=", "3=", "0413=", "4=")])
    trainer = examples["StepKLTrainer"](
        student, teacher, args=arguments, train_dataset=rows, processing_class=tokenizer
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2 and all(entry["loss"] > 0 and entry["entropy"] > 0 for entry in logged)

    generator = torch.Generator().manual_seed(0)
    inputs = {
        f"{part}_ids": torch.randint(2, len(tokenizer), (2, length), generator=generator)
        for part, length in (("prompt", 4), ("completion", 5))
    }
    inputs["prompt_mask"] = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    inputs["completion_mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    monkeypatch.setattr(type(trainer), "options", {"divergence": "jsd", "beta": 0.3})
    for count in (None, torch.tensor(11.0)):
        found = []
        for kind in (type(trainer), trl.DistillationTrainer):
            student.zero_grad()
            loss, entropy, rows = kind._compute_loss(trainer, student, inputs, count)
            loss.backward()
            found.append((loss.detach(), rows, student.model.embed_tokens.weight.grad.clone(), entropy))
        for ours, theirs in zip(found[0][:3], found[1][:3], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        assert found[0][3] > 0


def test_the_policy_gradient(examples: dict[str, Any], batch: dict[str, Tensor]) -> None:
    policy, advantage = model(0), torch.tensor([1.0, -2.0, 0.5])
    ids, predicts = batch["input_ids"], batch["completion_mask"][:, 1:].bool()
    log_p = log_probabilities(policy, batch)
    logprob = log_p.gather(1, ids[:, 1:][predicts][:, None])[:, 0]
    old = logprob.detach() + torch.linspace(-0.5, 0.5, len(logprob))  # some are clipped
    loss = examples["policy_loss"](policy, **batch, old_logprob=old.float(), advantage=advantage)
    gain, each = (logprob - old).exp(), advantage[:, None].expand(3, 8)[predicts]
    gain = torch.minimum(gain * each, gain.clamp(0.8, 1.2) * each)
    expected = -(gain - 0.01 * (log_p.exp() * log_p).sum(1)).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    weight = policy.model.embed_tokens.weight
    ours, theirs = (torch.autograd.grad(x, weight)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_from_logits(examples: dict[str, Any], batch: dict[str, Tensor]) -> None:
    student, teacher = model(0), model(1)
    loss = examples["distillation_loss"](student, teacher, **batch)
    loss.backward()
    log_s, log_t = log_probabilities(student, batch), log_probabilities(teacher, batch)
    kept = log_t.topk(20).indices
    sides = [
        torch.cat([x.gather(1, kept), x.scatter(1, kept, -torch.inf).logsumexp(1, keepdim=True)], 1)
        for x in (log_s, log_t)
    ]
    expected = (sides[0].exp() * (sides[0] - sides[1])).sum(1).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    ours = student.model.embed_tokens.weight.grad.clone()
    student.zero_grad()
    expected.backward()
    torch.testing.assert_close(ours, student.model.embed_tokens.weight.grad, rtol=1e-3, atol=1e-6)
