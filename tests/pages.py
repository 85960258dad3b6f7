"""The code blocks of README.md and docs/*.md, and what is done with them."""

from __future__ import annotations

import re
import sys
import textwrap
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# A block that can't be run here is preceded by a comment that says why; one of an optional package, by its name.
BLOCK = re.compile(r"^(?:<!-- (not run|needs): (.+) -->\n)?```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def installed(package: str) -> bool:
    """Whether there is such a package; a mere folder of its name, such as one of tests, is none."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


class Block(NamedTuple):
    """A fenced block of a page, on the line below its fence."""

    language: str
    text: str
    line: int
    not_run: str | None
    needs: str | None


def blocks(page: Path) -> list[Block]:
    """All blocks of ``page``, in order."""
    text, found = page.read_text(), []
    for match in BLOCK.finditer(text):
        kind, what, language, code = match.groups()
        line = text.count("\n", 0, match.start(4)) + 1
        found.append(Block(language, code, line, *(what if kind == name else None for name in ("not run", "needs"))))
    return found


def write_files(page: Path, folder: Path) -> None:
    """Write each block of ``page`` that is a file to it in ``folder``: its first line is the name as a comment, or, of
    a text, the line above it ends with the name."""
    for name, text in re.findall(r"`(\w+\.txt)`:\n\n```text\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
        (folder / name).write_text(text)
    for block in blocks(page):
        if name := re.match(r"# (\w+\.\w+)\n", block.text):
            (folder / name[1]).write_text(block.text)


def run_python(page: Path, folder: Path) -> dict[str, Any]:
    """Run the Python blocks of ``page`` as one module, whose lines have the page's numbers; the names it then has."""
    lines: list[str] = []
    for block in blocks(page):
        if block.language == "python" and block.not_run is None and (block.needs is None or installed(block.needs)):
            lines += [""] * (block.line - 1 - len(lines)) + textwrap.dedent(block.text).splitlines()
    path = folder / f"page_{page.stem}.py"  # a file, since Triton reads the source of its kernels
    path.write_text("\n".join(lines) + "\n")
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return vars(module)
