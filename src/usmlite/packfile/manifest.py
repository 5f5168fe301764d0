"""The manifest of a packed model: `quantization_config` in its config.json."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from usmlite.errors import PackedModelError
from usmlite.packfile.computed import COMPUTED
from usmlite.packfile.directory import CONFIG_NAME, COPY_AGAIN, QUANT_METHOD, read_config
from usmlite.packfile.layer import FORMAT_VERSION, PLAIN_VERSION, PackedLayer


@dataclass(frozen=True)
class Manifest:
    """The `quantization_config` of a packed model.

    Attributes:
        layers: module name to shape and spec of every compressed weight.
        computed: tensor name to the rule that computes it.
        digest: "sha256:" and 64 hexadecimal digits over all tensors, see `WeightsFile.digest`.
        version: the usmlite that wrote it.
    """

    layers: Mapping[str, PackedLayer]
    computed: Mapping[str, str]
    digest: str
    version: str

    @property
    def format_version(self) -> int:
        """The least version of the format that can say this."""
        plain = all(layer.trellis is None for layer in self.layers.values())
        return PLAIN_VERSION if plain else FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """As config.json holds it."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "digest": self.digest,
            "layers": {name: layer.to_dict() for name, layer in self.layers.items()},
            "computed": dict(self.computed),
            "usmlite_version": self.version,
        }

    @classmethod
    def from_dict(cls, values: object, *, where: str) -> Manifest:
        """Reads `to_dict`'s form.

        Raises:
            PackedModelError: it is not ours, from a newer usmlite, or damaged.
        """
        if not isinstance(values, Mapping) or values.get("quant_method") != QUANT_METHOD:
            found = values.get("quant_method") if isinstance(values, Mapping) else None
            raise PackedModelError(
                "not a packed model of usmlite", where=where,
                expected=f"quantization_config with quant_method {QUANT_METHOD!r}",
                found="no quantization_config" if values is None else f"quant_method {found!r}",
                remedy="Give the directory that `usmlite compress` wrote.",
            )  # fmt: skip
        where = f"{where}: quantization_config"
        version = values.get("format_version")
        if version not in (PLAIN_VERSION, FORMAT_VERSION) or not isinstance(version, int):
            what, remedy = "unusable format version", COPY_AGAIN
            if isinstance(version, int) and version > FORMAT_VERSION:
                what = "packed by a newer usmlite"
                remedy = "Install a newer usmlite: pip install --upgrade usmlite."
            elif version == 1 and not isinstance(version, bool):
                what, remedy = "packed by an usmlite before its first release", "Compress the model again."
            raise PackedModelError(
                what, where=f"{where}.format_version",
                expected=f"{PLAIN_VERSION} or {FORMAT_VERSION}", found=repr(version),
                remedy=remedy,
            )  # fmt: skip
        digest_text = values.get("digest")
        if not isinstance(digest_text, str) or not re.fullmatch("sha256:[0-9a-f]{64}", digest_text):
            raise PackedModelError(
                "unusable digest", where=f"{where}.digest", expected="'sha256:' and 64 hexadecimal digits",
                found=repr(digest_text)[:100], remedy=COPY_AGAIN,
            )  # fmt: skip
        layers = values.get("layers")
        if not isinstance(layers, Mapping):
            raise PackedModelError("no layers", where=f"{where}.layers", remedy=COPY_AGAIN)
        computed = values.get("computed", {})
        # As a list: what a file says need not be hashable.
        if not isinstance(computed, Mapping) or any(rule not in list(COMPUTED) for rule in computed.values()):
            raise PackedModelError(
                "unknown computed tensors", where=f"{where}.computed",
                expected=f"tensor names with {' or '.join(COMPUTED)}",
                found=repr(computed)[:100], remedy=COPY_AGAIN,
            )  # fmt: skip
        return cls(
            {
                str(name): PackedLayer.from_dict(layer, version, where=f"{where}.layers[{name!r}]")
                for name, layer in layers.items()
            },
            {str(name): str(rule) for name, rule in computed.items()},
            digest_text,
            str(values.get("usmlite_version")),
        )

    def tensors(
        self, shapes: Mapping[str, tuple[int, ...]], *, where: str
    ) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
        """What the weights file must hold for a model.

        Args:
            shapes: name and shape of every parameter and buffer of the model, tied ones once.
            where: what errors should name.

        Returns:
            Dtype (None: float16, float32 or any whole numbers) and shape of every stored tensor.

        Raises:
            PackedModelError: the manifest speaks of weights that the model does not have, or not so.
        """
        unknown = {f"{name}.weight" for name in self.layers} | set(self.computed)
        unknown -= set(shapes)
        if unknown:
            raise PackedModelError(
                "describes a weight that the model does not have", where=f"{where}: quantization_config",
                expected="weights of the model", found=min(unknown), remedy=COPY_AGAIN,
            )  # fmt: skip
        out: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {}
        for name, shape in shapes.items():
            layer = self.layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            if layer is None:
                if name not in self.computed:
                    out[name] = (None, shape)
                continue
            if layer.shape != shape:
                raise PackedModelError(
                    "the layer's shape contradicts the model's config", where=f"{where}: {name}",
                    expected=list(shape), found=list(layer.shape), remedy=COPY_AGAIN,
                )  # fmt: skip
            for part, described in layer.parts().items():
                out[f"{name}.{part}"] = described
        return out


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """The manifest in a packed model's config.json.

    Raises:
        PackedModelError: as `read_config` and `Manifest.from_dict`.
    """
    config = read_config(directory)
    return Manifest.from_dict(config.get("quantization_config"), where=str(Path(directory) / CONFIG_NAME))


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that belong in a file, tied ones once; not what a model computes itself."""
    persistent = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {**dict(model.named_parameters()), **buffers}


def usmlite_version() -> str:
    """The installed version, "unknown" where the package is not installed."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version("usmlite")
    return "unknown"
