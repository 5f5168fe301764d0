"""Files that appear whole or not at all.

A new file is written under a temporary name beside its destination, flushed to the disk and then
renamed over it: whoever is killed in between leaves the old file as it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from usmlite.errors import OutputError


@contextlib.contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a binary file whose contents become `path` when the block ends without an error.

    Raises:
        OutputError: the file cannot be written (no folder, no permission, full disk, ...); what was at
            `path` is still there.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.tmp")
    try:
        # "x": never through a link that somebody put there; the mode follows the umask.
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(
            "cannot be written",
            where=target,
            found=error.strerror or str(error),
            remedy="Nothing was changed; make room or choose another place, then try again.",
        ) from error
    finally:
        # After a success the temporary name is gone already.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


def write_bytes(path: str | PathLike[str], data: bytes) -> None:
    """Writes a file atomically.

    Raises:
        OutputError: it cannot be written; an existing file is unchanged.
    """
    with replacing(path) as file:
        file.write(data)


def write_json(path: str | PathLike[str], obj: object) -> None:
    """Writes JSON atomically: UTF-8, indented, NaN refused.

    Args:
        path: the file.
        obj: what `json.dumps` takes.

    Raises:
        OutputError: it cannot be written; an existing file is unchanged.
        TypeError: `obj` holds something that JSON cannot.
        ValueError: `obj` holds NaN or infinity.
    """
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def _sync_folder(folder: Path) -> None:
    # The rename itself must reach the disk. Not every file system can do this for a folder.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
