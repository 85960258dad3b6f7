"""TRL's on-policy distillation with this loss in place of its own: ``python examples/trl_distillation.py``.

The student completes prompts, and its distribution is pulled to the teacher's on what it wrote, by a clipped skew
divergence from the states before both heads; no logits of rows x vocabulary are made. Both networks are random here, so
that nothing is downloaded: put your own in their place. (Tested with TRL 1.16: pip install 'trl>=1.16'.)
"""

import tempfile

import torch
import trl
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from dopsd.assets.pretrain import character_tokenizer
from dopsd_kernels import fused_confidence, fused_step_kl


class StepKLTrainer(trl.DistillationTrainer):
    """TRL's, with a clipped skew divergence."""

    options = {"divergence": "skew_reverse_kl", "beta": 0.9, "clip": 0.05, "clip_form": "nonnegative"}

    def _compute_loss(self, student, inputs, num_items_in_batch):
        ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
        rows = inputs["completion_mask"] * inputs.get("tool_mask", 1) > 0
        teacher = self.accelerator.unwrap_model(self.teacher_model).eval()
        hidden = self._get_last_hidden_state(student, ids, mask, rows.shape[1])[rows]
        with torch.no_grad():
            target = self._get_last_hidden_state(teacher, ids, mask, rows.shape[1])[rows]
        weight, teacher_weight = (model.get_output_embeddings().weight for model in (student, teacher))
        options = {"temperature": self.temperature, "reduction": "sum", **self.options}
        out = fused_step_kl(hidden, target, weight, teacher_weight=teacher_weight.detach(), **options)
        loss = out.loss / (rows.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        return loss, fused_confidence(hidden.detach(), weight.detach(), entropy=True).entropy.sum(), rows.sum()


def network(vocabulary, width, seed):
    """A random one."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, initializer_range=0.1, **sizes))


def main(steps=40):
    """Train; the loss in each step."""
    tokenizer = character_tokenizer()  # that of the tiny model, with which both agree here
    tokenizer.padding_side = "left"
    student, teacher = network(len(tokenizer), 64, seed=0), network(len(tokenizer), 128, seed=1)
    rows = Dataset.from_list([{"prompt": f"{a}{b}{c}="} for a in range(4) for b in range(4) for c in range(4)])
    options = {"max_steps": steps, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "temperature": 1.0}
    options |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "max_completion_length": 12}
    with tempfile.TemporaryDirectory() as folder:  # of what TRL saves
        args = trl.DistillationConfig(folder, bf16=False, use_cpu=not torch.cuda.is_available(), **options)
        trainer = StepKLTrainer(student, teacher, args=args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    main()
