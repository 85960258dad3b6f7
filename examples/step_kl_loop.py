"""The op in a hand-written loop, a small model learns of a larger one: ``python examples/step_kl_loop.py``.

Widths differ, the vocabulary is the same; no logits of rows x vocabulary are made. Both networks are random here, so
that nothing is downloaded: put your own in their place.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dopsd_kernels import fused_step_kl

VOCAB = 5000


def network(width, seed):
    """A random one."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, initializer_range=0.1, **sizes))


def states(model, input_ids):
    """Those before the LM head, of which position i predicts token i + 1: (rows, d)."""
    return model.model(input_ids).last_hidden_state[:, :-1].flatten(0, 1)


def main(steps=100):
    """Train; the mean divergence in each step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student, teacher = network(64, seed=0).to(device), network(128, seed=1).to(device).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    history = []
    for step in range(steps):
        input_ids = torch.randint(VOCAB, (4, 33), device=device)
        with torch.no_grad():
            target = states(teacher, input_ids)
        out = fused_step_kl(
            states(student, input_ids),
            target,
            student.lm_head.weight,  # gets a gradient too
            teacher_weight=teacher.lm_head.weight,
            divergence="forward_kl",
        )
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(out.row_kl.mean().item())
        if step % 10 == 0:
            print(f"step {step}: KL {history[-1]:.4f}")
    return history


if __name__ == "__main__":
    main()
