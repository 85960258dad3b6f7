"""Accuracies that others have published, to be shown beside measured ones and never among them."""

from __future__ import annotations

LABEL = "published, LLaDA-8B-Instruct, secondary summaries"
METHODS = ("base", "SFT", "diffu-GRPO", "VRPO", "d-OPSD")

# Percent, by task, response length and method. Source: secondary summaries of Luo et al., "Learning from the
# Self-future: On-policy Self-distillation for dLLMs", not the paper's own tables. Greedy, two tokens a step, blocks of
# 32.
PUBLISHED: dict[tuple[str, int], dict[str, float]] = {
    ("gsm8k", 256): {"base": 76.0, "d-OPSD": 81.0},
    ("gsm8k", 512): {"base": 79.5, "SFT": 81.1, "diffu-GRPO": 81.9, "VRPO": 81.5, "d-OPSD": 82.2},
    ("math", 512): {"base": 36.2, "SFT": 34.8, "diffu-GRPO": 39.2, "VRPO": 34.8, "d-OPSD": 37.8},
    ("countdown", 256): {"base": 19.1, "SFT": 14.5, "diffu-GRPO": 31.3, "VRPO": 21.1, "d-OPSD": 32.3},
    ("sudoku4x4", 256): {"base": 6.9, "SFT": 8.5, "diffu-GRPO": 12.9, "VRPO": 9.6, "d-OPSD": 20.6},
}


def published(task: str, gen_length: int, tokens_per_step: int, block_length: int, measure: str) -> dict[str, float]:
    """The published percentages of a setting, by method; empty if there are none for a decoding like that."""
    same = (tokens_per_step, block_length, measure) == (2, 32, "greedy")
    return PUBLISHED.get((task, gen_length), {}) if same else {}
