"""Accuracies that others have published, to be shown beside measured ones and never among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


# The protocol that they were made by: its grading, how many rows of each task, and what the response starts with.
GRADING = "published"
ROWS = {"gsm8k": 1319, "math": 500, "countdown": 256, "sudoku4x4": 256}
FILES = ("countdown", "sudoku4x4")  # whose rows are those of a file
PREFILL = "<reasoning>"
# Options that say how problems were posed; a result has those that the evaluation knew.
POSED = ("test_file", "prompt_file", "prompt_sha256", "prefill")


def published(result: Mapping[str, Any]) -> dict[str, float]:
    """The published percentages for a result's task, length and decoding, by method; empty if there are none."""
    same = (result["tokens_per_step"], result["block_length"], result["measure"]) == (2, 32, "greedy")
    return PUBLISHED.get((result["task"], result["gen_length"]), {}) if same else {}


def departures(result: Mapping[str, Any]) -> list[str]:
    """In what a result that has published figures, an entry of a file of results, was not made by their protocol."""
    found = {
        f"grading={result['grading']}": result["grading"] == GRADING,
        f"{result['problems']} problems": result["problems"] == ROWS[result["task"]],
        "made-up problems": result["task"] not in FILES or result.get("test_file") is not None,
        "another prompt (no prompt_file)": result.get("prompt_file") is not None,
        f"prefill={result.get('prefill')!r}": (result.get("prefill") or "").strip() == PREFILL,
    }
    return [departure for departure, kept in found.items() if not kept]
