"""What the site has besides the files of this folder: README.md as its first page, and pages made from docstrings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from griffe import Extension, Function, Module
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# What the package's functions take, give and raise, and what is derived from to extend it.
DOPSD = (
    *("dopsd.run.Run", "dopsd.generate.Model", "dopsd.generate.Sample", "dopsd.trajectory.Trajectory"),
    *("dopsd.sampler.Decoding", "dopsd.evaluation.command.Results"),
    *("dopsd.errors.UsageError", "dopsd.errors.RunError", "dopsd.errors.Interrupted"),
    *("dopsd.tasks.task.Task", "dopsd.method.Method", "dopsd.models.bidirectional.DiffusionModel"),
)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text()))
    for package, more in (("dopsd", DOPSD), ("dopsd_kernels", ())):
        names = [name for name in public(package) if not name.startswith("_")]
        blocks = [f"# {package}", f"::: {package}\n    options: {{members: [], show_root_heading: false}}"]
        blocks += [f"::: {name}" for name in (*(f"{package}.{name}" for name in names), *more)]
        files.append(File.generated(config, f"api/{package}.md", content="\n\n".join(blocks) + "\n"))
    return files


def public(package: str) -> list[str]:
    """The names in ``__all__``, read and not imported."""
    body = ast.parse((ROOT / package / "__init__.py").read_text()).body
    (names,) = (
        node.value for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return ast.literal_eval(names)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links as they are from the site: those to files that are not in it become their text."""
    markdown = re.sub(r"\]\(docs/", "](", markdown)
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", markdown)


class Docstrings(Extension):
    """Docstrings as the site shows them: what a comment says of a field is part of them."""

    def __init__(self) -> None:
        self.functions: dict[str, Function] = {}

    def on_function_instance(self, *, func: Function, **_: Any) -> None:
        self.functions[func.path] = func

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        for name in public(pkg.path):
            inner = pkg.members.get(name)
            if isinstance(inner, Module):  # a function's name is also that of its module, which took its place
                pkg.set_member(name, self.functions.get(f"{pkg.path}.{name}") or inner.members[name])
        for obj in within(pkg):
            if obj.docstring is None:
                continue
            # Names that are marked up for Sphinx are code here.
            obj.docstring.value = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", obj.docstring.value)
            if obj.is_class and "NamedTuple" in map(str, obj.bases) and "Args:" not in obj.docstring.value:
                fields = [(name, re.search(r"  # (.+)", one.source)) for name, one in obj.members.items()]
                lines = [f"    {name}: {comment[1]}" for name, comment in fields if comment]
                obj.docstring.value += "\n".join(["\n\nAttributes:", *lines])


def within(obj: Any) -> Iterator[Any]:
    """An object and all that is defined in it."""
    yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from within(member)
