"""The README's figures are those of the files they come from, and its commands are the ones that CI runs."""

from __future__ import annotations

from pathlib import Path

from benchmarks.report import README, SECTIONS, main, render

ROOT = Path(__file__).parent.parent


def test_every_figure_is_the_one_in_its_file() -> None:
    assert main(["--check"]) == 0


def test_every_section_is_in_the_readme_and_a_changed_figure_would_show() -> None:
    text = README.read_text()
    for name in SECTIONS:
        assert f"<!-- {name} -->\n" in text
        broken = text.replace(f"<!-- {name} -->\n|", f"<!-- {name} -->\nx|", 1)
        assert broken != text and render(broken) == text


def test_both_commands_are_where_ci_looks_for_them() -> None:
    text = README.read_text()
    for heading, end in (("## Run it", "-m dopsd.train"), ("## Test it", "-m pytest")):
        block = text.partition(f"{heading}\n")[2].partition("```bash\n")[2].partition("\n```")[0]
        assert block.startswith("python3 -m venv") and block.endswith(end)
