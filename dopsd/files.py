"""Files that are whole or not there: the old one or the new one, whenever a process is killed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dopsd.errors import RunError


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


def write_text(path: Path, text: str) -> None:
    """Write atomically, so that a killed run leaves the old file or the new one."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text)
    part.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON, atomically."""
    write_text(path, json.dumps(plain(content), indent=1) + "\n")
