"""Speech in tar files, as WebDataset lays it out: files with one name before the first dot are one sample.

A file in a shard goes by the path of the tar with its own name below: train-000.tar/19/198-0001.flac. It is
read where it lies, nothing is unpacked.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath

SUFFIX = ".tar"
# Shards whose lists of files are kept: of 3,000 files each some 100 MB.
_KEPT = 256


def shard_of(path: str | os.PathLike[str]) -> Path | None:
    """The tar file that a path leads into; None where it leads into none."""
    for parent in Path(path).parents:
        if parent.suffix == SUFFIX and parent.is_file():
            return parent
    return None


def read_member(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file in a shard.

    Raises:
        OSError: there is no such file, or the shard cannot be read.
    """
    shard = shard_of(path)
    name = "" if shard is None else Path(path).relative_to(shard).as_posix()
    place = None if shard is None else _members(shard).get(name)
    if shard is None or place is None:
        raise FileNotFoundError("no such file in the shard")
    start, size = place
    with open(shard, "rb") as file:
        file.seek(start)
        found = file.read(size)
    if len(found) < size:
        raise OSError(f"the shard ends after {len(found)} of its {size} bytes")
    return found


def samples(shard: Path) -> dict[str, dict[str, Path]]:
    """The samples of a shard in its order: by name, the paths of their files by what follows the first dot.

    Raises:
        OSError: the shard cannot be read, or has a file twice.
    """
    found: dict[str, dict[str, Path]] = {}
    for name in _members(shard):
        folder, _, file = name.rpartition("/")
        stem, dot, suffix = file.partition(".")
        if not stem or not dot:  # hidden files, and such as README
            continue
        key = f"{folder}/{stem}" if folder else stem
        found.setdefault(key, {})[suffix.lower()] = shard / name
    return found


def _members(shard: Path) -> Mapping[str, tuple[int, int]]:
    state = os.stat(shard)
    return _index(str(shard), state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=_KEPT)
def _index(shard: str, changed: int, size: int) -> Mapping[str, tuple[int, int]]:
    """Files of a shard, where each begins and its bytes."""
    found: dict[str, tuple[int, int]] = {}
    try:
        # "r:": compressed ones cannot be read from the middle.
        with tarfile.open(shard, "r:") as file:
            for member in file:
                if not member.isfile() or member.issparse():
                    continue
                name = str(PurePosixPath(member.name))
                if name in found:
                    raise OSError(f"{name} is in it twice")
                found[name] = (member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise OSError(f"not an uncompressed tar file: {error}") from error
    return found
