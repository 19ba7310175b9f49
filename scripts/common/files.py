"""Files that are written whole or not at all."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def write_text(path: str | Path, text: str):
    """Write a file so that a reader, or a crash half-way, sees the whole old content or the whole new one."""
    path = Path(path)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")  # another process may write it too
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: str | Path, value: Any):
    """Write JSON atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: str | Path) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def append_json_line(path: str | Path, value: Any):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


def read_json_lines(path: str | Path) -> list[dict]:
    """The objects of a JSON lines file; a last line that was not written to its end is left out."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
