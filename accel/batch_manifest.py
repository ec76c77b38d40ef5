"""What a batch folder knows of itself: the rows of finished files, and who works on what.

`manifest.jsonl` gets one line after each file, in one write, so that several processes can share
it and a killed one leaves at most a torn last line. A claim is a lock of the operating system on a
file in `.accel/claims`: it is given back when its process dies, however it dies.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MANIFEST = "manifest.jsonl"
PRIVATE = ".accel"


class Manifest:
    """The rows of one output folder: the newest row of each file name, and all rows in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / MANIFEST
        self.rows: list[dict[str, Any]] = []
        self.by_name: dict[str, dict[str, Any]] = {}
        self._read = 0

    def refresh(self) -> None:
        """Read what was appended since the last time; a torn line is left out."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            try:
                row = json.loads(line)
                self.by_name[row["name"]] = row
            except (ValueError, KeyError, TypeError):
                continue
            self.rows.append(row)

    def append(self, row: dict[str, Any]) -> None:
        """Add a row; it is on the disk when this returns."""
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            with _locked(handle):
                size = os.fstat(handle).st_size
                if size and os.pread(handle, 1, size - 1) != b"\n":
                    line = b"\n" + line  # the last writer was killed inside its line
                os.write(handle, line)
                os.fsync(handle)
        finally:
            os.close(handle)

    def done(self, name: str, job: str) -> bool:
        """Whether the file of this name was made by job `job` and lies there as it was written."""
        row = self.by_name.get(name)
        if row is None or row.get("status") != "done" or row.get("id") != job:
            return False
        path = self.folder / row["file"]
        if not path.is_file() or path.stat().st_size != row["bytes"]:
            return False
        return bool(sha256(path) == row["sha256"])


def sha256(path: Path) -> str:
    """Of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


@contextlib.contextmanager
def claim(folder: Path, name: str) -> Iterator[bool]:
    """Whether this process alone may now work on `name`; given back at the end or at death."""
    place = folder / PRIVATE / "claims"
    place.mkdir(parents=True, exist_ok=True)
    handle = os.open(place / name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield _try_lock(handle)
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _locked(handle: int) -> Iterator[None]:
    import fcntl

    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)
