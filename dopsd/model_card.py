"""The card that says what a run's adapter is, and the publication of both on the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from dopsd import collapse
from dopsd.checkpoints import ADAPTER_FILE
from dopsd.config import OF_METHODS, TrainingArguments
from dopsd.errors import RunError, one_line
from dopsd.evaluation.results import interval
from dopsd.files import write_text
from dopsd.methods import METHODS
from dopsd.models import SHIPPED
from dopsd.models.adapter import CONFIG
from dopsd.tables import markdown_table

CARD_FILE, CURVES_FILE = "README.md", "curves.png"
PUBLISHED = (CARD_FILE, CONFIG, ADAPTER_FILE, CURVES_FILE)

# Options that tell one run of a method from another, by group.
TOLD = {
    "rollout": ("gen_length", "block_length", "steps", "pass_k", "temperature", "first_temperature"),
    "teaching": (
        *("method", "teacher", "teacher_context", "retain_ratio", "reveal_scope", "divergence", "clip", "clip_form"),
        *("learn_tail", "mask_ratio", "entropy_weight", "likelihood", "updates_per_batch", "kl_weight"),
        *("elbo_draws", "preference_beta", "sft_weight"),
    ),
    "model": ("full_finetune", "lora_r", "lora_alpha", "dtype", "quantize"),
    "training": ("learning_rate", "per_device_train_batch_size", "seed"),
}

CARD = """\
---
{base_line}library_name: peft
pipeline_tag: text-generation
tags: [diffusion-language-model, {tag}, {kind_tag}]
# license: to be filled in. An adapter goes with its base model, whose license is not known here.
---
# {title}

{kind} for {base}.

It was trained by {method}: {summary}.

## Results

{table}

Percent of {problems} held-out problems of the task `{task}`, decoded greedily, with 95% intervals; before is the base
model{start}. {collapse}
{curves}
## How it was made

Recipe `{recipe}`, {updates} updates, in {seconds:.0f} s on {device} ({versions}).

{options}

## How to load it

With d-OPSD (the Python package `dopsd`), beside this folder:

```python
import dopsd

model = dopsd.load({folder!r}{prefill})
(sample,) = model.generate([{prompt!r}], gen_length={gen_length}, block_length={block_length}, steps={steps})
print(sample.text)
```

With PEFT alone:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, {folder!r})
```

`base_model` is then yours to load{code}.
Three things differ from an ordinary language model: attention must be
bidirectional (with a causal mask the adapter computes something else), `generate` of transformers does not apply
(masked tokens, id {mask_id}, are filled block by block, most confident first), and nothing predicts the next token.
{citation}"""
CITATION = """
## Citation

Luo et al., *Learning from the Self-future: On-policy Self-distillation for dLLMs*.
"""


def write_card(folder: Path, result: Mapping[str, Any], mask_id: int) -> None:
    """The card, beside the adapter."""
    write_text(folder / CARD_FILE, card(folder, result, mask_id))


def card(folder: Path, result: Mapping[str, Any], mask_id: int) -> str:
    """The card of the adapter in a run's ``folder``, of which ``result`` is the report."""
    config = result["config"]
    model, task, rollout, teaching = (config[group] for group in ("model", "task", "rollout", "teaching"))
    name = str(model["model"])
    falls = [collapse.sentence(event) for event in result["collapse"]]
    method, ours = teaching["method"], teaching["method"] == "d_opsd"
    full = model["full_finetune"]
    told = {
        name: config[group][name]
        for group, names in TOLD.items()
        for name in names
        if method in OF_METHODS.get(name, (method,)) and not (full and name.startswith("lora_"))
    }
    if task["prompt_file"] is not None:
        told["prompt_file"] = f"`{short(task['prompt_file'])}`, sha256 {task['prompt_sha256']}"
    if task["prefill"]:
        told["prefill"] = f"`{task['prefill']!r}`, from which responses go on"
    packages = ("dopsd", "torch", "transformers", "peft")
    return CARD.format(
        base_line=base_line(name, "adapter"),
        title=f"{Path(name).name} on {short(task['task'])}, {'self-distilled' if ours else method}",
        tag="self-distillation, d-opsd" if ours else method.replace("_", "-"),
        base=base_model(name),
        kind="All weights but embedding and LM head, as a PEFT adapter (LN tuning)," if full else "A LoRA adapter",
        kind_tag="full-fine-tuning" if full else "lora",
        method="d-OPSD" if ours else f"`{method}`, with the package of d-OPSD",
        summary=METHODS[method].summary,
        table=table(result["tokens_per_step"]),
        problems=result["eval_problems"],
        task=short(task["task"]),
        start="" if model["adapter"] is None else " with the adapter that training began with",
        collapse=f"On the way: {'; '.join(falls)}." if falls else "No collapse was seen.",
        curves=f"\n![Training curves]({CURVES_FILE})\n" if (folder / CURVES_FILE).is_file() else "",
        recipe=short(model["recipe"]),
        updates=result["updates"],
        seconds=result["seconds"],
        device=result["device"],
        versions=", ".join(f"{package} {result['versions'][package]}" for package in packages),
        options="\n".join(f"- `{name}`: {value}" for name, value in told.items()),
        folder=folder.name,
        prefill=f", prefill={task['prefill']!r}" if task["prefill"] else "",
        prompt="...",
        gen_length=rollout["gen_length"],
        block_length=rollout["block_length"],
        steps=rollout["steps"],
        code=f" (here it is `dopsd.models.load_model({name!r})[0]`)" if name in SHIPPED else "",
        mask_id=mask_id,
        citation=CITATION if ours else "",
    )


def base_line(name: str, relation: str) -> str:
    """The lines of a card's head that name a model of the hub as base; none for another."""
    hub = name not in SHIPPED and not Path(name).exists()
    return f"base_model: {json.dumps(name)}\nbase_model_relation: {relation}\n" if hub else ""


def base_model(name: str) -> str:
    """A base model as a card calls it: with a link to the hub, and without a local path."""
    if name in SHIPPED:
        return f"`{name}`, the small model that ships with d-OPSD"
    if Path(name).exists():
        return f"a model in a local folder, `{Path(name).name}`"
    return f"[{name}](https://huggingface.co/{name})"


def short(name: str) -> str:
    """A name without the folders of a file's."""
    return Path(name).name


def table(rates: Mapping[str, Mapping[str, Any]]) -> str:
    """Accuracies by tokens per step, as Markdown."""
    signs = {"before": "", "after": "", "gain": "+"}
    lines = [
        {"tokens per step": rate, **{moment: percent(row, moment, sign) for moment, sign in signs.items()}}
        for rate, row in rates.items()
    ]
    return markdown_table(lines).rstrip("\n")


def percent(row: Mapping[str, Any], moment: str, sign: str) -> str:
    """An accuracy with its interval, in percent."""
    bounds = interval({"interval": row[f"interval_{moment}"]}, sign)
    return f"{100 * row[f'accuracy_{moment}']:{sign}.1f} ({bounds})"


# ---- on the hub ----


@dataclass(frozen=True)
class Repository:
    """Where an adapter is published: the hub's ``id``, a branch (None: the main one) and a token (None: the stored)."""

    id: str
    revision: str | None
    token: str | None

    def publish(self, folder: Path) -> None:
        """Upload the adapter in ``folder`` with its card and curves, and nothing else; RunError if that fails."""
        try:
            HfApi(token=self.token).upload_folder(
                repo_id=self.id,
                folder_path=folder,
                allow_patterns=list(PUBLISHED),
                revision=self.revision,
                commit_message="Adapter trained with d-OPSD",
            )
        except Exception as error:  # of whichever library the hub's client uses
            hint = "the same command with --resume_from_checkpoint true publishes it"
            raise RunError(
                f"the run in {folder} has finished, but can't be published as {self.id}: {one_line(str(error))}; {hint}"
            ) from error


def repository(args: TrainingArguments) -> Repository:
    """The repository that ``args`` name, which is made unless it is there; RunError if it can't be."""
    name = args.hub_model_id or Path(args.output_dir or ".").absolute().name
    try:
        made = HfApi(token=args.hub_token).create_repo(name, private=args.hub_private_repo, exist_ok=True)
    except Exception as error:
        raise RunError(f"push_to_hub: there is no repository {name} to publish to: {one_line(str(error))}") from error
    return Repository(made.repo_id, args.hub_revision, args.hub_token)
