"""Runs for the tests of the inspector: a small one, one whose texts are hostile, and one as large as they come."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import dopsd

SAMPLES, CLIP = 2, 0.01
HOSTILE = "</script><img src=x onerror='window.hacked = 1'><!-- \u2028 {{style}} \"'&amp;"


def make_run(model: Path, output: Path, **options: Any) -> Path:
    """Two updates with a random model, of four held-out problems; figures of two before and after."""
    small: dict[str, Any] = {
        **{"recipe": "tiny", "model": str(model), "max_steps": 2, "per_device_train_batch_size": 2},
        **{"train_problems": 8, "validation_problems": 2, "eval_problems": 4, "steps": 12, "pass_k": 2, "lora_r": 4},
        **{"clip": CLIP, "correct_only": False, "bf16": False, "save_strategy": "no", "eval_steps": 1},
        **{"eval_tokens_per_step": [], "inspect_samples": SAMPLES},
    }
    dopsd.train(**{**small, "output_dir": str(output), **options})
    return output


def hostile_run(folder: Path) -> None:
    """Have a row, a response, and a token of what a run kept say what a page must not take for its own."""
    for name in ("held_out_before.json", "held_out_after.json"):
        content = json.loads((folder / name).read_text())
        first = next(iter(content["tokens_per_step"].values()))[0]
        first["puzzle"] = first["response"] = HOSTILE
        (folder / name).write_text(json.dumps(content))
    for name in ("before.json", "after.json"):
        content = json.loads((folder / "inspect" / name).read_text())
        content["samples"][0]["prompt"] = HOSTILE
        content["texts"][str(content["samples"][0]["tokens"][0])] = HOSTILE
        (folder / "inspect" / name).write_text(json.dumps(content))


def large_sample(seed: int) -> dict[str, Any]:
    """What is kept of 256 tokens in 128 steps and blocks of 32, of a vocabulary of 126 thousand."""
    draw = random.Random(seed)
    tokens = [draw.randrange(126_000) for _ in range(256)]
    reveal = [0] * 256
    for block in range(8):
        places = draw.sample(range(32 * block, 32 * block + 32), 32)
        for rank, place in enumerate(places):
            reveal[place] = 16 * block + rank // 2

    def side() -> tuple[list[int], list[float]]:
        values = sorted((draw.random() for _ in range(5)), reverse=True)
        return [draw.randrange(126_000) for _ in values], [float(f"{value / 3:.4g}") for value in values]

    states = []
    for step in range(128):
        block = step // 16
        masked = [place for place in range(32 * block, 32 * block + 32) if reveal[place] >= step]
        chosen = set(draw.sample(masked, 2))
        places = sorted(chosen | set(draw.sample(masked, min(6, len(masked)))))
        future = [place for place in range(32 * block + 32, 256)]
        rows = [
            [place, place in chosen, float(f"{draw.expovariate(3):.4g}"), 0.0001234, *side(), *side()]
            for place in places
        ]
        states.append({"step": step, "shown": sorted(draw.sample(future, len(future) // 4)), "rows": rows})
    return {
        **{"tokens": tokens, "reveal_step": reveal, "block_length": 32, "lead": 0, "states": states},
        **{"prompt": "Natalia sold clips. " * 20, "response": "So she sold 48. " * 40, "score": 1.0, "tries": 1},
    }


def large_run(folder: Path, samples: int) -> None:
    """Replace what a run kept by so many large samples before and after training."""
    for moment, offset in (("before", 0), ("after", samples)):
        kept = [large_sample(offset + number) for number in range(samples)]
        used = {token for sample in kept for token in sample["tokens"]}
        used |= {
            token for sample in kept for state in sample["states"] for row in state["rows"] for token in row[4] + row[6]
        }
        texts = {str(token): f"tok{token}"[: 2 + token % 9] for token in used}
        (folder / "inspect" / f"{moment}.json").write_text(json.dumps({"texts": texts, "samples": kept}))
