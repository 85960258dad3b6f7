"""The scripts and the notebook under ``examples`` run, in small, and do what they say."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pages import ROOT

from dopsd import report
from dopsd.tasks import check_golds

EXAMPLES = ROOT / "examples"


def main_of(name: str) -> Callable[..., Any]:
    """A script's ``main``, without having run it."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_every_example_is_tested_here() -> None:
    text = Path(__file__).read_text()
    assert all(f'main_of("{path.stem}")' in text for path in EXAMPLES.glob("*.py"))
    assert [path.name for path in EXAMPLES.glob("*.ipynb")] == ["quickstart.ipynb"]


def test_step_kl_loop() -> None:
    """The student comes closer."""
    history = main_of("step_kl_loop")(steps=15)
    assert 0 < history[-1] < 0.8 * history[0]


def test_dllm_sft() -> None:
    """Masked tokens become likelier."""
    history = main_of("dllm_sft")(steps=6, batch=8)
    assert 0 < history[-1] < 0.8 * history[0]


def test_own_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run reports grades of the task, some partial; its problems are of one split, and its own answers right."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "why_no_picture", lambda: "they take longer than the run")
    main = main_of("own_task")
    small = {"max_steps": 1, "per_device_train_batch_size": 2, "validation_problems": 2, "eval_problems": 8}
    before, after = main(**small, pass_k=2, inspect_samples=0)
    assert 0 < before < 1 and 0 < after < 1
    (folder,) = (tmp_path / "runs").iterdir()
    result = json.loads((folder / "report.json").read_text())
    assert result["updates"] == 1 and (result["accuracy_before"], result["accuracy_after"]) == (before, after)

    task = main.__globals__["AnyGrid"]()
    rows = {split: task.problems(split, 200) for split in ("train", "validation", "test")}
    assert len({row["puzzle"] for ones in rows.values() for row in ones}) == 600
    check_golds(task, rows["test"])
    row = {"puzzle": "1" + "0" * 15, "solution": "1234341221434321"}
    assert task.score(row, "=1234341243212143") == 1  # another solution
    # Two columns are right no longer; then a digit that was given is another, or there is no grid.
    assert task.score(row, "=1234341221434312") == pytest.approx(1 - 2 / 12)
    assert [task.score(row, text) for text in ("=4321341221433412", "1234341221434321", "")] == [0, 0, 0]


@pytest.mark.filterwarnings("ignore")  # what TRL warns of
def test_trl_distillation() -> None:
    """The student comes closer; the class is the one that docs/trainers.md shows."""
    pytest.importorskip("trl", "1.16")
    page = (ROOT / "docs" / "trainers.md").read_text()
    shown = page[page.index("class StepKLTrainer") :].partition("```")[0]
    assert shown in (EXAMPLES / "trl_distillation.py").read_text()
    history = main_of("trl_distillation")(steps=12)
    assert 0 < history[-1] < 0.8 * history[0]


def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells run, as one script of a smaller run; what they gave is in the file, and says nothing of a machine."""
    path = EXAMPLES / "quickstart.ipynb"
    assert path.stat().st_size < 300_000
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for output in (outputs := [output for cell in cells for output in cell["outputs"]]):
        assert output["output_type"] != "error" and output.get("name") != "stderr"
        assert not re.search(r"/(home|root|tmp|usr|Users|opt)/", json.dumps(output.get("data", output)))
    assert len(outputs) == len(cells) and sum("image/png" in output.get("data", ()) for output in outputs) == 1

    script = "\n".join("".join(cell["source"]) for cell in cells)
    small = {"max_steps": 1, "per_device_train_batch_size": 2, "eval_problems": 4, "validation_problems": 2}
    for name, value in {**small, "inspect_samples": 1}.items():
        script, count = re.subn(rf"\b{name}=\d+", f"{name}={value}", script)
        assert count, name
    (tmp_path / "quickstart.py").write_text(script)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "plot_curves", lambda *args, **kwargs: None)  # which it does not show
    run = runpy.run_path("quickstart.py")["run"]
    assert run.report["updates"] == 1 and (run.folder / "inspect.html").is_file()
