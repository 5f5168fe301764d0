"""Machines to plan for: names of accelerators, or a list of one's own in a TOML file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from usmlite.errors import RecipeError
from usmlite.recipe import nearest, read_tables

GIB = 1 << 30
MACHINES = "machine"
"""The tables of a machine list: [[machine]]."""


@dataclass(frozen=True)
class Device:
    """One kind of device, and how many there are.

    Attributes:
        name: as the maker calls it, with its memory.
        memory: bytes.
        operations: multiplications and additions a second of dense matrix products, as the maker states them;
            in bfloat16 where `half`, else in float32. None where nobody knows.
        link: bytes a second that a device sends to the others; None where nobody knows.
        half: whether training computes in bfloat16 there.
        count: how many.
    """

    name: str
    memory: int
    operations: float | None
    link: float | None
    half: bool
    count: int = 1


# Data sheets of the makers: dense bfloat16, memory, and one direction of NVLink or PCIe.
KNOWN = {
    device.name: device
    for device in (
        Device("H200-141GB", 141 * 10**9, 989e12, 450e9, True),
        Device("H100-80GB", 80 * 10**9, 989e12, 450e9, True),
        Device("A100-80GB", 80 * 10**9, 312e12, 300e9, True),
        Device("A100-40GB", 40 * 10**9, 312e12, 300e9, True),
        Device("L40S-48GB", 48 * 10**9, 362e12, 32e9, True),
        Device("L4-24GB", 24 * 10**9, 121e12, 32e9, True),
        Device("RTX4090-24GB", 24 * 10**9, 165e12, 32e9, True),
        Device("RTX3090-24GB", 24 * 10**9, 71e12, 16e9, True),
    )
}


def this_machine() -> Device:
    """The GPUs of this machine, or else its processor."""
    import torch

    if torch.cuda.is_available():
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
        words = name.upper()
        known = next((d for d in KNOWN.values() if d.name.partition("-")[0] in words), None)
        half = torch.cuda.is_bf16_supported(including_emulation=False)
        return Device(
            name, memory, known.operations if known else None, known.link if known else None, half,
            torch.cuda.device_count(),
        )  # fmt: skip
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return Device("this processor", memory, None, None, False)


def read_devices(text: str | None) -> list[Device]:
    """The devices of `--devices`.

    Args:
        text: such as "H100-80GB" or "8xH100-80GB", several with commas, or a TOML file with [[machine]]
            tables of name, count, memory_gb, tflops, link_gb and bf16; None for this machine.

    Raises:
        RecipeError: an unknown device, or a table that is wrong.
    """
    if text is None:
        return [this_machine()]
    if text.endswith(".toml") or Path(text).is_file():
        return _from_file(Path(text))
    return [_named(part.strip()) for part in text.split(",")]


def _named(text: str) -> Device:
    match = re.fullmatch(r"(?:(\d{1,5})\s*x\s*)?([A-Za-z0-9][\w.-]*)", text)
    count, name = (int(match[1] or 1), match[2]) if match else (0, text)
    found = next((device for device in KNOWN.values() if device.name.lower() == name.lower()), None)
    if found is None or count < 1:
        raise RecipeError(
            "unknown device",
            where="--devices",
            expected="such as 8xH100-80GB, or a .toml file with [[machine]] tables",
            found=repr(text),
            remedy=nearest(name, list(KNOWN)),
        )
    return replace(found, count=count)


def _from_file(path: Path) -> list[Device]:
    tables = read_tables(path).get(MACHINES)
    if not isinstance(tables, list) or not tables:
        raise RecipeError("no machines", where=path, expected=f"[[{MACHINES}]] tables")
    return [_from_table(table, f"{path}: {MACHINES}[{i}]") for i, table in enumerate(tables)]


_KEYS = {"name": str, "count": int, "memory_gb": float, "tflops": float, "link_gb": float, "bf16": bool}


def _from_table(table: object, where: str) -> Device:
    if not isinstance(table, Mapping):
        raise RecipeError("not a table", where=where, found=repr(table)[:100])
    values: dict[str, Any] = {}
    for key, value in table.items():
        kind = _KEYS.get(key)
        if kind is None:
            raise RecipeError("unknown key", where=f"{where}.{key}", remedy=nearest(key, list(_KEYS)))
        value = float(value) if kind is float and isinstance(value, int) else value
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise RecipeError("wrong type", where=f"{where}.{key}", expected=kind.__name__, found=repr(value))
        if kind in (int, float) and not cast(float, value) > 0:
            raise RecipeError("out of range", where=f"{where}.{key}", expected="above 0", found=value)
        values[key] = value
    base = KNOWN.get(values.get("name", ""))
    if base is None and "memory_gb" not in values:
        raise RecipeError("a machine without its memory", where=where, expected="memory_gb")
    base = base or Device(values.get("name", "device"), 0, None, None, values.get("bf16", True))
    return Device(
        base.name,
        round(1e9 * values["memory_gb"]) if "memory_gb" in values else base.memory,
        1e12 * values["tflops"] if "tflops" in values else base.operations,
        1e9 * values["link_gb"] if "link_gb" in values else base.link,
        values.get("bf16", base.half),
        values.get("count", 1),
    )
