"""The directory of a packed model: its files, which of them may be read, and how a new one replaces it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from usmlite.errors import OutputError, PackedModelError

QUANT_METHOD = "usmlite"
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
PROCESSOR_FILES = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "normalizer.json", "sentencepiece.bpe.model",
)  # fmt: skip
COPY_AGAIN = "Copy or download the packed model again."
"""What to do about a damaged one."""
_MAX_CONFIG_BYTES = 16 << 20
# What a packed model consists of; anything else in its directory is the user's.
_OWN_FILES = frozenset({WEIGHTS_NAME, CONFIG_NAME, *PROCESSOR_FILES})


def member(directory: str | os.PathLike[str], name: str) -> Path:
    """The path of one of the directory's own regular files.

    Links that lead out of the directory are refused; only a snapshot in a Hugging Face cache may
    link to the blobs beside it.

    Raises:
        PackedModelError: there is no such file, or it is not the directory's own.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise PackedModelError(
            "no such directory", where=folder, expected="the directory of a packed model",
            found="a file" if folder.exists() else "nothing",
        )  # fmt: skip
    path = folder / name
    real, home = path.resolve(), folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise PackedModelError(
            "a link that leads out of the directory", where=path, expected=f"a file in {folder}", found=real,
            remedy="Copy the file itself into the directory.",
        )  # fmt: skip
    try:
        mode = real.stat().st_mode
    except OSError as error:
        index = folder / f"{name}.index.json"
        raise PackedModelError(
            "cannot be read" if os.path.lexists(path) else "no such file", where=path,
            found=f"{index.name}, which packed models do not use" if index.exists() else error.strerror,
            remedy=f"A packed model holds {CONFIG_NAME} and {WEIGHTS_NAME}. {COPY_AGAIN}",
        ) from None  # fmt: skip
    if not stat.S_ISREG(mode):
        raise PackedModelError("not a regular file", where=path, remedy=COPY_AGAIN)
    return path


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of a packed model's config.json.

    Raises:
        PackedModelError: not a directory, no config.json in it, or not JSON.
    """
    path = member(directory, CONFIG_NAME)
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise PackedModelError(
                "too large", where=path, expected=f"at most {_MAX_CONFIG_BYTES} bytes",
                found=path.stat().st_size, remedy=COPY_AGAIN,
            )  # fmt: skip
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PackedModelError(
            "cannot be read", where=path, found=error.strerror, remedy=COPY_AGAIN
        ) from error
    except (ValueError, RecursionError) as error:
        raise PackedModelError(
            "not JSON", where=path, expected="JSON", found=error, remedy=COPY_AGAIN
        ) from None
    if not isinstance(config, dict):
        raise PackedModelError(
            "not a model's config", where=path, expected="an object", found=type(config).__name__,
            remedy=COPY_AGAIN,
        )  # fmt: skip
    return config


def is_packed(directory: str | os.PathLike[str]) -> bool:
    """Whether this is a directory whose config.json says that usmlite packed it; reads nothing else."""
    try:
        config = read_config(directory)
    except PackedModelError:
        return False
    settings = config.get("quantization_config")
    return isinstance(settings, Mapping) and settings.get("quant_method") == QUANT_METHOD


@contextlib.contextmanager
def new_directory(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary directory beside `directory` that takes its place when the block ends well.

    A packed model of ours that is there is replaced; other files in it move along. If the block fails,
    nothing stays of the new one and the old one is untouched.

    Raises:
        OutputError: something else is there, or the place cannot be written.
    """
    target = Path(directory).absolute()
    if target.is_symlink():
        target = target.resolve()
    _refuse_foreign(target)
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        _swap(temporary, target)
    except OSError as error:
        raise OutputError(
            "cannot be written", where=target, found=error.strerror or str(error),
            remedy="Nothing was changed; make room or choose another place, then try again.",
        ) from error  # fmt: skip
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, target: Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    old = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.old")
    target.rename(old)
    try:
        new.rename(target)
    except OSError:
        old.rename(target)
        raise
    for path in old.iterdir():
        # What the new model also has, or is a packed model's alone, goes with the old one.
        if not (target / path.name).exists() and path.name not in _OWN_FILES:
            path.rename(target / path.name)
    shutil.rmtree(old, ignore_errors=True)


def _refuse_foreign(target: Path) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise OutputError(
            "is not a directory", where=target, expected="a new name", found="a file",
            remedy="Choose another place.",
        )  # fmt: skip
    if any(target.iterdir()) and not is_packed(target):
        raise OutputError(
            "exists and is not a packed model", where=target,
            expected="a new name, an empty directory, or a packed model to replace",
            found=", ".join(sorted(path.name for path in target.iterdir())[:3]),
            remedy="Choose another place, or empty it yourself.",
        )  # fmt: skip
