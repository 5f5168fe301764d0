"""A packed model without the dense one in memory: weights are read, rounded and written one by one.

For what needs neither training nor calibration: masks by magnitude, scales from the weight itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from usmlite.errors import ModelError
from usmlite.models import Adapter, adapter_class, read_configuration, skeleton
from usmlite.models.whisper import read_json
from usmlite.pack import Packed, packed_layer, stored_dtype, write_packed
from usmlite.packfile import PackedLayer, stored_tensors
from usmlite.spec import CompressionSpec
from usmlite.student import CompressedLayer, StudentOptions, WeightCompression, wrap

INDEX = "model.safetensors.index.json"
_AGAIN = "Download the model again."
# How a weight norm is stored: its lengths and its directions, by the old and by the new name.
_NORMS = (
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    ("weight_g", "weight_v"),
)


class Shards:
    """The tensors of a directory of safetensors files, of which one at a time is in memory.

    Attributes:
        folder: the directory.
        files: tensor name to the file that holds it.
    """

    def __init__(self, folder: Path) -> None:
        """Reads the index, or the header of the single file.

        Raises:
            ModelError: no weights, or an index that is damaged or names a file that is not there.
        """
        self.folder = folder
        self.files = self._from_index() if (folder / INDEX).is_file() else self._from_headers()

    def _from_index(self) -> dict[str, Path]:
        weights = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(weights, dict) or not all(isinstance(file, str) for file in weights.values()):
            raise ModelError(
                "an index without a weight_map", where=self.folder / INDEX, remedy=_AGAIN,
                expected="tensor names with the files that hold them",
            )  # fmt: skip
        for file in sorted(set(weights.values())):
            if Path(file).name != file or not (self.folder / file).is_file():
                raise ModelError(
                    "a file of the index is missing", where=self.folder / INDEX,
                    expected=f"{file} beside it", remedy=_AGAIN,
                )  # fmt: skip
        return {str(name): self.folder / file for name, file in weights.items()}

    def _from_headers(self) -> dict[str, Path]:
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise ModelError(
                "no weights that can be read one by one", where=self.folder, expected="safetensors files",
                remedy="Save the model with save_pretrained(), which writes them.",
            )  # fmt: skip
        found: dict[str, Path] = {}
        for file in files:
            with _opened(file) as tensors:
                found |= dict.fromkeys(tensors.keys(), file)
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor; only the header is read."""
        with _opened(self.files[name]) as tensors:
            return tuple(tensors.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        # Opened anew each time: pages of a mapped file count as this process's as long as it is open.
        with _opened(self.files[name]) as tensors:
            return cast(Tensor, tensors.get_tensor(name)).clone()


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelError("the weights cannot be read", where=file, found=error, remedy=_AGAIN) from error


class DenseFiles:
    """A dense model that stays on the disk.

    Attributes:
        adapter: what goes with it.
        model: its skeleton, on the meta device.
        shards: its tensors.
    """

    def __init__(self, folder: Path) -> None:
        """Reads configuration and headers.

        Raises:
            ModelError: not a directory of Transformers, of a family that must be loaded whole, or files that
                contradict the configuration.
        """
        settings = read_json(folder / "config.json")
        config = read_configuration(settings, folder / "config.json")
        family = adapter_class(config.model_type, folder)
        if family.centre is not Adapter.centre or family.restore is not Adapter.restore:
            raise ModelError(
                "models of this family are changed as a whole before they are compressed",
                where=folder, found=config.model_type, remedy="Leave out --streamed.",
            )  # fmt: skip
        self.shards = Shards(folder)
        self.adapter = family.from_directory(folder, config)
        self.model = skeleton(config)
        self._folder = folder
        for name, tensor in stored_tensors(self.model).items():
            self._check(name, tuple(tensor.shape))

    @property
    def float32_bytes(self) -> int:
        """Bytes of all parameters in float32, tied ones once."""
        return 4 * sum(parameter.numel() for parameter in self.model.parameters())

    def _parts(self, name: str) -> tuple[str, ...]:
        """The stored tensors that make up one of the model's."""
        if name in self.shards.files:
            return (name,)
        module = name.removesuffix("weight")
        pairs = [(module + lengths, module + directions) for lengths, directions in _NORMS]
        return next((pair for pair in pairs if all(part in self.shards.files for part in pair)), ())

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        parts = self._parts(name)
        found = self.shards.shape(parts[-1]) if parts else None
        if found != shape:
            raise ModelError(
                "the weights contradict config.json", where=self._folder, expected=f"{name} of shape {shape}",
                found="no such tensor" if found is None else f"shape {found}",
                remedy=f"{_AGAIN} Files of an older layout must be loaded whole: leave out --streamed.",
            )  # fmt: skip

    def read(self, name: str) -> Tensor:
        """One tensor of the model; weight norms are multiplied out."""
        parts = [self.shards.read(part) for part in self._parts(name)]
        parts = [part.float() if part.is_floating_point() else part for part in parts]
        if len(parts) == 1:
            return parts[0]
        lengths, directions = parts
        # The axis that keeps its size is the one that has a length each.
        axes = [axis for axis, size in enumerate(lengths.shape) if size == 1]
        norms: Tensor = torch.linalg.vector_norm(directions, dim=axes, keepdim=True)
        return lengths * directions / norms


@torch.no_grad()
def pack_streamed(
    files: DenseFiles,
    spec: CompressionSpec,
    options: StudentOptions,
    directory: Path,
    *,
    coded: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Packed:
    """Packs a model weight by weight: the same file that `pack` writes of a student at its magnitude start.

    Args:
        files: the dense model.
        spec: what each weight becomes.
        options: how scales are found.
        directory: where the packed model goes, see `pack.pack`.
        coded: entropy-code.
        progress: called with weights done, of how many.

    Raises:
        ModelError: a weight is not finite or cannot be read.
        OutputError: the directory holds something else or cannot be written.
    """
    kinds = {n.removesuffix(".weight"): k for n, k in files.adapter.compressible(files.model).items()}
    specs = {name: spec.resolve(name, kind) for name, kind in kinds.items()}
    covered = {name: kind for name, kind in kinds.items() if not specs[name].is_kept}

    def layers() -> Iterator[CompressedLayer]:
        for name, kind in covered.items():
            layer = files.model.get_submodule(name)
            weight = files.read(f"{name}.weight")
            layer.weight = nn.Parameter(weight, requires_grad=False)
            yield wrap(layer, kind, WeightCompression(weight, specs[name], options))
            layer.weight = nn.Parameter(weight.to("meta"), requires_grad=False)  # and out of memory

    def packed() -> Iterator[tuple[str, PackedLayer, dict[str, Tensor]]]:
        for done, (name, layer) in enumerate(zip(covered, layers(), strict=True), start=1):
            yield packed_layer(name, layer, coded=coded)
            if progress is not None:
                progress(done, len(covered))

    kept = {
        name: (stored_dtype(tensor), tuple(tensor.shape))
        for name, tensor in stored_tensors(files.model).items()
        if name.removesuffix(".weight") not in covered
    }
    return write_packed(directory, packed(), kept, files.read, {}, files.adapter, files.model)
