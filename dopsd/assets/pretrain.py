"""Makes the tiny models that ship with the package: ``python -m dopsd.assets.pretrain --output_dir DIR``.

A 1.2M-parameter LLaDA learns to solve 4x4 Sudoku with the masked-diffusion objective (LLaDA, Nie et al. 2025, Eq. 3):
a share t ~ U(0, 1) of the response is masked and the cross-entropy of the masked tokens is weighted by 1/t. Every
fourth batch has its problems behind a solved copy (``Sudoku.reference_prompt``), which the model learns to read: a
teacher that is shown one knows more than the student, instead of being lost. The run is deterministic for a given seed
and thread count.

With ``--attention block_causal`` it is a Qwen3 of that size, and each block of the response has a share t of its own
and sees clean tokens before it (BD3LM, Arriola et al. 2025). That one ships after ``--steps 500 --batch_size 64``.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from dopsd.models.a2d import A2DQwen3Config, A2DQwen3LMHeadModel
from dopsd.models.bidirectional import BidirectionalModel
from dopsd.models.block_causal import BlockCausalModel
from dopsd.models.llada import LLaDAConfig, LLaDAModelLM
from dopsd.step_batch import BlockInputs, Inputs
from dopsd.tasks.sudoku import CELLS, Sudoku, grids_of, make_problem
from dopsd.tasks.task import Row

Attention = Literal["bidirectional", "block_causal"]

EOS, MASK = "<|endoftext|>", "<|mdm_mask|>"
RESPONSE_LENGTH = 48
BLOCK_LENGTH = 16  # of the block-causal model
REFERENCE_EVERY = 4  # one batch in so many is behind reference prompts


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of the Sudoku alphabet, plus end-of-text (also the padding) and mask."""
    vocabulary = [EOS, MASK, *"01234", *CELLS, ":", "="]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(vocabulary)}, unk_token=EOS))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, mask_token=MASK)


def fresh_model(tokenizer: PreTrainedTokenizerFast, attention: Attention) -> BidirectionalModel:
    """The architecture of a model that ships, at 1.2M parameters, untrained: LLaDA's, or that of a Tiny-A2D."""
    ids = {name: getattr(tokenizer, name) for name in ("mask_token_id", "eos_token_id", "pad_token_id")}
    if attention == "block_causal":
        config = A2DQwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            head_dim=32,
            intermediate_size=352,
            max_position_embeddings=128,
            rope_theta=10000.0,
            block_size=BLOCK_LENGTH,
            **ids,
        )
        return A2DQwen3LMHeadModel(config)
    return LLaDAModelLM(
        LLaDAConfig(
            vocab_size=len(tokenizer),
            d_model=128,
            n_layers=6,
            n_heads=4,
            mlp_hidden_size=352,
            max_sequence_length=128,
            rope_theta=10000.0,
            weight_tying=False,
            **ids,
        )
    )


def sample_batch(
    tokenizer: PreTrainedTokenizerFast, size: int, prompt_of: Callable[[Row], str], rng: random.Random
) -> tuple[Tensor, int]:
    """Token ids (size, P + 48) of fresh training problems with worked responses, and the prompt length P."""
    rows = []
    for _ in range(size):
        problem, response = make_problem(grids_of("train"), rng)
        prompt = tokenizer.encode(prompt_of(problem))
        answer = tokenizer.encode(response)
        rows.append(prompt + answer + [tokenizer.eos_token_id] * (RESPONSE_LENGTH - len(answer)))
    return torch.tensor(rows), len(rows[0]) - RESPONSE_LENGTH


def diffusion_loss(model: BidirectionalModel, ids: Tensor, prompt_length: int, generator: torch.Generator) -> Tensor:
    """Cross-entropy of masked response tokens over their mask ratio.

    A block-causal model has a ratio for each block, another one for each response; they are stratified over the batch.
    """
    size, blocks = len(ids), RESPONSE_LENGTH // (model.block_size or RESPONSE_LENGTH)
    ratio = (torch.arange(size * blocks) + torch.rand(size * blocks, generator=generator)) / (size * blocks)
    ratio = ratio.view(size, blocks).repeat_interleave(RESPONSE_LENGTH // blocks, dim=1)
    masked = torch.rand(size, RESPONSE_LENGTH, generator=generator) < ratio
    prompt, response = ids[:, :prompt_length], ids[:, prompt_length:]
    noisy = torch.cat((prompt, response.masked_fill(masked, model.config.mask_token_id)), dim=1)
    if isinstance(model, BlockCausalModel):
        states = two_copy_states(model, noisy, ids, prompt_length)
    else:
        states = model.hidden_states(noisy)[:, prompt_length:]
    logits = F.linear(states[masked], model.lm_head_weight).float()
    losses = F.cross_entropy(logits, response[masked], reduction="none")
    return (losses / ratio[masked]).sum() / (size * RESPONSE_LENGTH)


def two_copy_states(
    model: BlockCausalModel,
    noisy: Tensor,  # (B, P + L) int64
    clean: Tensor,  # (B, P + L) int64
    prompt_length: int,
) -> Tensor:  # (B, L, d)
    """States of noisy responses, each block of which sees itself and the clean tokens before it."""
    assert model.block_size is not None
    starts = torch.arange(0, RESPONSE_LENGTH, model.block_size)
    row, start = torch.arange(len(clean)).repeat_interleave(len(starts)), starts.repeat(len(clean))
    whole, final = (Inputs(ids, None, prompt_length) for ids in (noisy[row], clean))
    inputs = BlockInputs.of(whole, final, row, start, model.block_size)
    states = inputs.hidden_states(model, start[:, None] + torch.arange(model.block_size))
    return states.view(len(clean), RESPONSE_LENGTH, -1)


def train(
    model: BidirectionalModel,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    batch_size: int,
    seed: int,
    rate: Callable[[int], float],
) -> None:
    """Muon on the matrices of blocks and AdamW on the rest; ``rate`` is a factor of the learning rates, by step."""
    rng, generator, task = random.Random(seed), torch.Generator().manual_seed(seed), Sudoku()
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW([p for p in model.parameters() if id(p) not in inside], lr=2e-3, betas=(0.9, 0.99)),
    ]
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    model.train()
    average = None
    with tqdm(total=steps, desc="pretrain", unit="step") as bar:
        for step in range(1, steps + 1):
            prompt_of = task.prompt if step % REFERENCE_EVERY else task.reference_prompt
            ids, prompt_length = sample_batch(tokenizer, batch_size, prompt_of, rng)
            with torch.autocast("cpu", torch.bfloat16):
                loss = diffusion_loss(model, ids, prompt_length, generator)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
            bar.set_postfix(loss=f"{average:.4f}", refresh=False)
            bar.update()


def pretrain(
    steps: int, anneal_steps: int, batch_size: int, seed: int, attention: Attention = "bidirectional"
) -> tuple[BidirectionalModel, PreTrainedTokenizerFast]:
    """Train from scratch at a constant rate, then anneal: a fresh start of the optimisers at a rate that falls to 0.

    The models that ship are not annealed. At a constant rate they stay far below what they know: at two tokens a step
    the LLaDA solves a third of the problems, and two thirds with 240 more steps and 200 of annealing. So they have much
    to learn in few updates, and a part of what a method gains on them is what annealing would give as well.
    """
    torch.manual_seed(seed)
    tokenizer = character_tokenizer()
    model = fresh_model(tokenizer, attention)
    train(model, tokenizer, steps, batch_size, seed, lambda step: min(1.0, (step + 1) / 40))
    train(
        *(model, tokenizer, anneal_steps, batch_size, seed + 99),
        lambda step: min(1.0, (step + 1) / 10, 1 - step / max(1, anneal_steps)),
    )
    return model.eval(), tokenizer


def main() -> None:
    """Parse the command line, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write the model and tokenizer to")
    parser.add_argument("--attention", choices=get_args(Attention), default="bidirectional")
    parser.add_argument("--steps", type=int, default=1320, help="at a constant rate")
    parser.add_argument("--anneal_steps", type=int, default=0, help="at a falling rate; the models that ship have none")
    parser.add_argument("--batch_size", type=int, default=128, help="problems per step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="results are the same bits only for the same number")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.monotonic()
    model, tokenizer = pretrain(args.steps, args.anneal_steps, args.batch_size, args.seed, args.attention)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(f"{args.output_dir}: {args.steps + args.anneal_steps} steps in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
