"""The packed model's files: byte layout, versioned header, and the checks that make them safe to read.

docs/format.md describes the same for somebody who writes another reader. Nothing that a file says is
believed before it has been compared with the file's real size and with what the other files say.
"""

from __future__ import annotations

from usmlite.packfile.computed import compute, computed_rule
from usmlite.packfile.directory import (
    CONFIG_NAME,
    COPY_AGAIN,
    PROCESSOR_FILES,
    QUANT_METHOD,
    WEIGHTS_NAME,
    is_packed,
    member,
    new_directory,
    read_config,
)
from usmlite.packfile.layer import PackedLayer
from usmlite.packfile.manifest import Manifest, read_manifest, stored_tensors, usmlite_version
from usmlite.packfile.parts import (
    PARTS,
    check_finite,
    pack_codes,
    pack_rows,
    packed_weight,
    part_shapes,
    stored_scales,
    to_weight,
)
from usmlite.packfile.weights import WeightsFile, WeightsWriter

__all__ = [
    "CONFIG_NAME",
    "COPY_AGAIN",
    "PARTS",
    "PROCESSOR_FILES",
    "QUANT_METHOD",
    "WEIGHTS_NAME",
    "Manifest",
    "PackedLayer",
    "WeightsFile",
    "WeightsWriter",
    "check_finite",
    "compute",
    "computed_rule",
    "is_packed",
    "member",
    "new_directory",
    "pack_codes",
    "pack_rows",
    "packed_weight",
    "part_shapes",
    "read_config",
    "read_manifest",
    "stored_scales",
    "stored_tensors",
    "to_weight",
    "usmlite_version",
]
