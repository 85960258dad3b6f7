"""The documents' figures are those of the files they come from; the README's commands are the ones that CI runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.report import DOCUMENTS, SECTIONS, main, render

ROOT = Path(__file__).parent.parent


def test_every_figure_is_the_one_in_its_file() -> None:
    assert main(["--check"]) == 0


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_a_changed_figure_would_show(path: Path) -> None:
    text = path.read_text()
    shown = [name for name in SECTIONS if f"<!-- {name} -->\n" in text]
    assert shown
    for name in shown:
        broken = text.replace(f"<!-- {name} -->\n", f"<!-- {name} -->\nx", 1)
        assert broken != text and render(broken) == text


def test_every_section_is_in_a_document() -> None:
    text = "".join(path.read_text() for path in DOCUMENTS)
    assert all(f"<!-- {name} -->\n" in text for name in SECTIONS)


def test_both_commands_are_where_ci_looks_for_them() -> None:
    text = (ROOT / "README.md").read_text()
    for heading, end in (("## Run it", "-m dopsd.train"), ("## Test it", "-m pytest -n auto --dist loadfile")):
        block = text.partition(f"{heading}\n")[2].partition("```bash\n")[2].partition("\n```")[0]
        assert block.startswith("python3 -m venv") and block.endswith(end)
