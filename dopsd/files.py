"""Files that are whole or not there: the old one or the new one, whenever a process is killed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dopsd.errors import RunError


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; RunError, naming the file, if it holds none."""
    try:
        content = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise RunError(f"{file}: not valid JSON for this purpose: it holds no object")
    return content


def plain(value: Any) -> Any:
    """``value`` as JSON allows it: no infinities, no nan."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def sync(path: Path) -> None:
    """Have what was written to a file, or the names in a folder, on disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # whose names some file systems keep without being asked to, and can't be
            raise
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise RunError, with the file or folder and the room that there is, if what is written to it can't be.

    What the system and libraries say of a write that fails names no file, and not always a cause.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RunError):
            raise
        room = shutil.disk_usage(next(folder for folder in path.parents if folder.is_dir())).free >> 20
        raise RunError(f"{path} can't be written: {first_line(error)}; {room} MiB are free there") from error


def write_text(path: Path, text: str) -> None:
    """As :func:`write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write atomically, so that a killed run leaves the old file or the new one, and so does a power cut."""
    part = path.with_suffix(path.suffix + ".part")
    with writing(path):
        part.write_bytes(content)
        sync(part)
        part.replace(path)
        sync(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON, atomically."""
    write_text(path, json.dumps(plain(content), indent=1) + "\n")


# What is being written into a folder, and what is left of it if a process is killed meanwhile.
PART = "files.part"


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder to write files into; on leaving, each of them replaces the one of its name in ``folder``, whole."""
    part = folder / PART
    with writing(part):
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed here
        part.mkdir(parents=True)
        try:
            yield part
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)  # a disk that is full has its room again
            raise
        for path in sorted(part.iterdir()):
            sync(path)
            path.replace(folder / path.name)
        part.rmdir()
        sync(folder)


def sha256(path: Path) -> str:
    """The hash of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
