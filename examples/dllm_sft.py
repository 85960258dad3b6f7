"""Supervised fine-tuning of a masked diffusion model in a hand-written loop: ``python examples/dllm_sft.py``.

The model that ships, which fills one cell after another, is taught to give the whole grid at once. LLaDA's objective:
each response is masked by a share t ~ U(0, 1), and the cross-entropy of its masked tokens is divided by t.
``fused_token_logprob`` has it from the states of these positions, without their logits.
(``python -m dopsd.train --method sft`` is the same with everything around it.)
"""

import torch

from dopsd.models import load_model
from dopsd.tasks.sudoku import Sudoku
from dopsd_kernels import fused_token_logprob


def main(steps=60, batch=16):
    """Train; the cross-entropy of masked tokens in each step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model("tiny")  # or a folder or hub id of LLaDA, Dream, ...
    model.to(device).train()
    task, mask_id, length = Sudoku(), model.config.mask_token_id, 48
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(0)
    history = []
    for step in range(steps):
        rows = task.problems("train", batch, seed=step)
        prompts = [tokenizer(task.prompt(row), add_special_tokens=False)["input_ids"] for row in rows]
        answers = [tokenizer(f"={row['solution']}", add_special_tokens=False)["input_ids"] for row in rows]
        answers = [(ids + [tokenizer.eos_token_id] * length)[:length] for ids in answers]
        prompt, tokens = torch.tensor(prompts, device=device), torch.tensor(answers, device=device)  # of one length
        share = torch.rand(batch, 1, device=device).clamp(min=1e-3)
        masked = torch.rand(tokens.shape, device=device) < share
        state = torch.cat((prompt, tokens.masked_fill(masked, mask_id)), dim=1)
        hidden = model.hidden_states(state)[:, prompt.shape[1] :][masked]  # (rows, d)
        logprob = fused_token_logprob(hidden, model.lm_head_weight, tokens[masked], exclude=(mask_id,)).logprob
        loss = -(logprob / share.expand_as(masked)[masked]).sum() / masked.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append(-logprob.mean().item())
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}, cross-entropy of masked tokens {history[-1]:.3f}")
    return history


if __name__ == "__main__":
    main()
