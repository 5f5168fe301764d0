"""Models as files that other runtimes read, one module for each of them.

Every module has `FORMS`, the numbers that it can write weights in (the first is the default), `plan`, what
becomes of each tensor, and `write`. Integers and steps that the other format has too are taken over as they
are; what it has not is widened, and the plan says so before anything is written.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any, cast

import torch

from usmlite.atomic import replacing
from usmlite.errors import ModelError, OutputError, SpecError, UsmliteError
from usmlite.export.plan import Becomes, Change, Plan, make_plan
from usmlite.export.source import Source, open_source
from usmlite.packfile import new_directory


@dataclass(frozen=True)
class Target:
    """One other format.

    Attributes:
        name: as `usmlite export --to` knows it.
        module: in this package.
        families: of adapters whose models it can hold; empty for all.
        packages: what must be installed to write it, by the names that Python imports.
        extra: the extra of usmlite that installs them.
        is_file: whether it is one file; otherwise it is a directory.
    """

    name: str
    module: str
    families: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    extra: str = ""
    is_file: bool = False

    def _load(self) -> Any:
        return importlib.import_module(f"usmlite.export.{self.module}")

    @property
    def forms(self) -> tuple[str, ...]:
        """The numbers that it can write weights in; the first is the default."""
        return cast("tuple[str, ...]", self._load().FORMS)

    def resolve(self, source: Source, form: str | None) -> str:
        """The form that is meant.

        Raises:
            SpecError: there is no such form, or the model cannot be written in it.
        """
        if form is not None and form not in self.forms:
            raise SpecError(
                f"{self.name} has no such numbers", where="dtype", expected=", ".join(self.forms),
                found=repr(form),
            )  # fmt: skip
        resolve: Callable[[Source, str], str] | None = getattr(self._load(), "resolve", None)
        form = form or self.forms[0]
        return form if resolve is None else resolve(source, form)

    def tensors(self, source: Source, form: str) -> Iterator[Becomes]:
        """What becomes of each tensor."""
        return cast("Iterator[Becomes]", self._load().plan(source, form))

    def write(self, source: Source, form: str, out: Path, progress: Callable[[float], None]) -> None:
        """Writes it, whole or not at all."""
        if self.is_file:
            with replacing(out) as file:
                self._load().write(source, form, file, progress)
        else:
            with new_directory(out) as folder:
                self._load().write(source, form, folder, progress)

    def check_packages(self) -> None:
        """Refuses to go on without the packages.

        Raises:
            UsmliteError: one is missing; says how to install it.
        """
        missing = [package for package in self.packages if util.find_spec(package) is None]
        if missing:
            raise UsmliteError(
                f"the export to {self.name} needs {' and '.join(missing)}",
                remedy=f'Install it: pip install "usmlite[{self.extra}]".',
            )


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("transformers", "transformers"),
        Target("compressed-tensors", "compressed_tensors"),
        Target("onnx", "onnx_files", ("whisper",), ("onnx",), "onnx"),
        Target("sherpa-onnx", "sherpa_onnx", ("whisper",), ("onnx",), "onnx"),
        Target("ctranslate2", "ctranslate2", ("whisper",)),
        Target("ggml", "ggml", ("whisper",), is_file=True),
    )
}


@torch.no_grad()
def plan_export(source: Source, target: str, form: str | None = None) -> Plan:
    """What an export would write; nothing is written.

    Args:
        source: the model, see `open_source`.
        target: a name in `TARGETS`.
        form: one of the target's forms; None is its default.

    Raises:
        SpecError: the target has no such form, or cannot hold the model in it.
        ModelError: there is no such target, or it has no place for this family of models.
    """
    chosen = _target(target)
    family = source.adapter.family
    if chosen.families and family not in chosen.families:
        raise ModelError(
            f"{target} has no place for this family of models", where=source.name,
            expected=" or ".join(chosen.families), found=family,
            remedy=f"These have: {', '.join(t.name for t in TARGETS.values() if not t.families)}.",
        )  # fmt: skip
    resolved = chosen.resolve(source, form)
    return make_plan(target, resolved, source, chosen.tensors(source, resolved))


def export(
    source: str | Path | Source,
    target: str,
    out: str | os.PathLike[str],
    *,
    form: str | None = None,
    progress: Callable[[float], None] | None = None,
) -> Plan:
    """Writes a model in the format of another runtime.

    Args:
        source: what `usmlite.load` takes, or a source that is open already.
        target: "transformers", "compressed-tensors", "onnx", "sherpa-onnx", "ctranslate2" or "ggml".
        out: a directory that is new or empty; of "ggml", a new file.
        form: the numbers of the weights, such as "int8" or "float16"; None is the target's default.
        progress: is called with the share that is done.

    Returns:
        What was written.

    Raises:
        SpecError: the target has no such form, or cannot hold the model in it.
        ModelError: no such target, no place in it for this family of models, or no such source.
        OutputError: something is there already, or it cannot be written.
        UsmliteError: a package that this target needs is not installed.
    """
    chosen = _target(target)
    chosen.check_packages()
    check_new(chosen, Path(out))
    opened = source if isinstance(source, Source) else open_source(source)
    plan = plan_export(opened, target, form)
    write_export(opened, plan, out, progress=progress)
    return plan


@torch.no_grad()
def write_export(
    source: Source,
    plan: Plan,
    out: str | os.PathLike[str],
    *,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Writes what was planned.

    Args:
        source: the model that the plan was made for.
        plan: see `plan_export`.
        out: a directory that is new or empty; of "ggml", a new file.
        progress: is called with the share that is done.

    Raises:
        OutputError: something is there already, or it cannot be written.
        UsmliteError: a package that this target needs is not installed.
    """
    chosen, path = _target(plan.target), Path(out)
    chosen.check_packages()
    check_new(chosen, path)
    chosen.write(source, plan.form, path, progress or (lambda share: None))


def check_new(target: Target, out: Path) -> None:
    """Refuses a place where something is already.

    Raises:
        OutputError: there is a file, or a directory with something in it.
    """
    if target.is_file and not out.absolute().parent.is_dir():
        raise OutputError(
            "no such directory",
            where=out,
            expected=f"a directory {out.parent}",
            remedy=f"mkdir -p {out.parent}",
        )
    if not os.path.lexists(out):
        return
    if not target.is_file and out.is_dir() and not any(out.iterdir()):
        return
    raise OutputError(
        "exists already", where=out, expected="a new file" if target.is_file else "a new or empty directory",
        remedy="Choose another place, or remove it yourself.",
    )  # fmt: skip


def _target(name: str) -> Target:
    if name not in TARGETS:
        raise ModelError("there is no such export", expected=", ".join(TARGETS), found=repr(name))
    return TARGETS[name]


__all__ = [
    "TARGETS",
    "Change",
    "Plan",
    "Source",
    "Target",
    "check_new",
    "export",
    "open_source",
    "plan_export",
    "write_export",
]
