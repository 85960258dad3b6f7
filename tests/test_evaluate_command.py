"""``python -m dopsd.evaluate``: every setting decoded, graded and written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from dopsd.evaluation import command as evaluate
from dopsd.evaluation.accuracy import wilson
from dopsd.evaluation.decoding import own_future
from dopsd.evaluation.options import parse_evaluate
from dopsd.rollout import Decoder, Rollout
from dopsd.seeds import mix_seeds
from dopsd.tasks.sudoku import Sudoku
from dopsd.trajectory import Trajectory

PROBLEMS = 5


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int, str], dict[str, Any]]:
    """Two lengths, two rates, four tries and two shares of the own future, by length, rate and measure."""
    path = tmp_path_factory.mktemp("evaluation") / "result.json"
    line = f"--eval_problems {PROBLEMS} --gen_length 48 96 --tokens_per_step 2 8 --pass_k 4 --reveal 0 1 "
    line += "--temperature 0.9 --seed 3"
    evaluate.main([*line.split(), "--output", str(path)])
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["result.json", "result.md"]
    written = json.loads(path.read_text())
    assert written["config"]["evaluation"]["gen_length"] == [48, 96]
    assert (written["seed"], written["device"], written["processes"]) == (3, "cpu", 1)
    assert written["versions"]["torch"] == torch.__version__
    return {(one["gen_length"], one["tokens_per_step"], one["measure"]): one for one in written["results"]}


def test_every_setting_has_a_row(results: dict[tuple[int, int, str], dict[str, Any]]) -> None:
    """Lengths by rates by measures, each once."""
    measures = ["greedy", "pass@4", *(f"{share} of its own correct answer revealed" for share in ("0%", "100%"))]
    assert list(results) == [(length, rate, name) for length in (48, 96) for rate in (2, 8) for name in measures]


def test_accuracies_are_those_of_the_responses(results: dict[tuple[int, int, str], dict[str, Any]]) -> None:
    """Graded again here: the grid behind the one ``=`` is the solution. The rows are the task's test problems."""
    rows = Sudoku().problems("test", PROBLEMS)
    for one in results.values():
        assert [{"puzzle": r["puzzle"], "solution": r["solution"]} for r in one["responses"]] == rows
        scores = [float(r["response"].split("=")[1:] == [r["solution"]]) for r in one["responses"]]
        assert scores == [r["score"] for r in one["responses"]]
        mean = sum(scores) / PROBLEMS
        assert one["problems"] == PROBLEMS and one["accuracy"] == pytest.approx(mean, abs=1e-12)
        error = math.sqrt(sum((score - mean) ** 2 for score in scores) / (PROBLEMS - 1) / PROBLEMS)
        assert one["standard_error"] == pytest.approx(error, abs=1e-12)
        assert one["interval"] == list(wilson(int(sum(scores)), PROBLEMS)) and one["interval_method"] == "wilson"
        assert one["fully_correct"] == one["accuracy"] and one["grading"] == "lenient" and one["task"] == "sudoku"
        # The alphabet's tokens are single characters, so a response that ended is as long as its text.
        assert all(r["tokens"] == len(r["response"]) <= one["gen_length"] for r in one["responses"])
        assert all(r["tokens"] <= r["steps"] * one["tokens_per_step"] for r in one["responses"])
        for name in ("tokens", "steps"):
            assert one[f"mean_{name}"] == pytest.approx(sum(r[name] for r in one["responses"]) / PROBLEMS)
        assert one["text_tokens_per_step"] == pytest.approx(one["mean_tokens"] / one["mean_steps"])
        assert one["seconds"] >= 0
    assert any(one["accuracy"] > 0 for one in results.values())


def test_more_tries_never_hurt(results: dict[tuple[int, int, str], dict[str, Any]]) -> None:
    """Problem by problem pass@k is at least greedy, and somewhere better; a correct greedy answer is kept as it is."""
    gains = 0.0
    for length in (48, 96):
        for rate in (2, 8):
            pairs = zip(
                results[length, rate, "greedy"]["responses"], results[length, rate, "pass@4"]["responses"], strict=True
            )
            for greedy, best in pairs:
                assert best["score"] >= greedy["score"]
                assert best["tries"] == 4 if best["score"] < 1 else 1 <= best["tries"] <= 4
                assert greedy["score"] < 1 or greedy == best
                gains += best["score"] - greedy["score"]
    assert gains > 0


def test_the_own_future_tells_something_and_no_share_of_it_nothing(
    results: dict[tuple[int, int, str], dict[str, Any]],
) -> None:
    """With a share of 0 every response is the greedy one; with all of it some are others, and only where a try was
    right."""
    differ = 0
    for length in (48, 96):
        for rate in (2, 8):
            greedy, best, nothing, everything = (
                results[length, rate, measure]["responses"]
                for measure in (
                    *("greedy", "pass@4"),
                    *(f"{share} of its own correct answer revealed" for share in ("0%", "100%")),
                )
            )
            assert nothing == greedy
            right = [one["score"] for one in best if one["score"] >= 1]
            for share, responses in (("0%", nothing), ("100%", everything)):
                told = results[length, rate, f"{share} of its own correct answer revealed"]
                kept = [one["score"] for one, solved in zip(responses, best, strict=True) if solved["score"] >= 1]
                assert told["solved"] == len(right)
                assert told["accuracy_of_solved"] == (sum(kept) / len(kept) if kept else None)
            assert "solved" not in results[length, rate, "pass@4"]
            for first, right, shown in zip(greedy, best, everything, strict=True):
                if right["score"] < 1:
                    assert shown == first
                differ += shown != first
    assert differ > 0


def test_hints_are_a_share_of_correct_answers_only() -> None:
    """round(share * n) of the n tokens of a correct response's text, which ends before the first end-of-text; none of a
    wrong one; nested as shares grow."""
    tokens = torch.cat((torch.arange(10, 22), torch.tensor([0, 23, 0, 0])))
    trajectory = Trajectory(torch.tensor([1]), tokens, torch.arange(16), 8)
    rollouts = [Rollout({}, trajectory, "", score, 1) for score in (1.0, 0.5, 1.0)]
    seeds = torch.tensor([5, 6, 7])
    shown = []
    for share, count in ((0.0, 0), (0.25, 3), (0.5, 6), (1.0, 12)):
        hints = own_future(rollouts, share, seeds, mask_id=-1, eos_id=0)
        assert hints.shape == (3, 16)
        assert ((hints != -1).sum(-1)).tolist() == [count, 0, count]
        assert bool(((hints == -1) | (hints == tokens)).all()) and bool((hints[:, 12:] == -1).all())
        shown.append(hints != -1)
    assert all(bool((fewer <= more).all()) for fewer, more in pairwise(shown))
    assert not torch.equal(shown[1][0], shown[1][2])  # drawn for each row anew


def test_decoding_is_what_the_options_say(shipped: Decoder, tmp_path: Path) -> None:
    """The command's greedy responses are those of the sampler called with the same lengths and steps."""
    path = tmp_path / "result.json"
    line = "--eval_problems 3 --gen_length 64 --block_length 16 --tokens_per_step 8 --sequences_per_forward 2"
    evaluate.main([*line.split(), "--output", str(path)])
    (result,) = json.loads(path.read_text())["results"]
    decoding = parse_evaluate(line.split()).decoding(Sudoku(), 64, 8)
    assert (decoding.gen_length, decoding.block_length, decoding.total_steps) == (64, 16, 8)
    rollouts = shipped.once(Sudoku().problems("test", 3), decoding, mix_seeds(0, torch.arange(3)))
    assert [one["response"] for one in result["responses"]] == [one.response for one in rollouts]
    assert any(result["responses"][0]["response"])


def test_a_file_of_problems(command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """The first so many rows of --test_file, whatever the case of its columns; the table goes to standard output."""
    rows = Sudoku().problems("validation", 3)
    path, output = tmp_path / "rows.csv", tmp_path / "result.json"
    path.write_text("Puzzle,Solution\n" + "".join(f"{row['puzzle']},{row['solution']}\n" for row in rows))
    argv = ["--test_file", str(path), "--eval_problems", "2", "--tokens_per_step", "8", "--output", str(output)]
    code, out, err = command(evaluate.main, *argv)
    assert code == 0, err
    (result,) = json.loads(output.read_text())["results"]
    assert [one["puzzle"] for one in result["responses"]] == [row["puzzle"] for row in rows[:2]]
    for word in ("accuracy (%)", "greedy", "48", "8"):
        assert word in out


def test_the_cache_is_used(tmp_path: Path) -> None:
    """Each kind gives its own responses."""
    found = {}
    for kind in ("none", "prefix", "block"):
        path = tmp_path / f"{kind}.json"
        evaluate.main(["--eval_problems", "6", "--cache", kind, "--output", str(path)])
        (one,) = json.loads(path.read_text())["results"]
        found[kind] = [response["response"] for response in one["responses"]]
    assert len(set(map(tuple, found.values()))) == 3
