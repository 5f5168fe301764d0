"""Training state on disk: safetensors and JSON, no pickle, complete or not there at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from usmlite.errors import OutputError, TrainingError

_PREFIX = "step-"
_STATE, _STUDENT, _OPTIMIZER = "state.json", "student.safetensors", "optimizer.safetensors"


def student_tensors(student: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of the student once, under its first name, contiguous on the CPU."""
    named = [*student.named_parameters(), *student.named_buffers()]
    persistent = student.state_dict().keys()
    return {name: value.detach().cpu().contiguous() for name, value in named if name in persistent}


@torch.no_grad()
def restore_student(student: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Copies saved tensors into a student of the same shape.

    Raises:
        TrainingError: the names or shapes differ; the first difference is named.
    """
    own = dict([*student.named_parameters(), *student.named_buffers()])
    expected = set(student_tensors(student))
    if expected != set(tensors):
        odd = sorted(expected ^ set(tensors))[0]
        raise TrainingError(
            "the saved student does not fit this recipe",
            where=where,
            expected=f"{len(expected)} tensors",
            found=f"{len(tensors)}, first difference {odd}",
            remedy="Use the recipe it was made with, or another output directory.",
        )
    for name, value in tensors.items():
        if own[name].shape != value.shape:
            raise TrainingError(
                "the saved student does not fit this recipe",
                where=f"{where}: {name}",
                expected=list(own[name].shape),
                found=list(value.shape),
            )
        own[name].copy_(value)


def _optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    tensors = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            saved = value if isinstance(value, Tensor) else torch.tensor(value)
            tensors[f"{key}:{names[id(parameter)]}"] = saved.detach().cpu().contiguous()
    return tensors


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], names: Mapping[int, str]
) -> None:
    by_name = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
    for key, value in tensors.items():
        field, _, name = key.partition(":")
        parameter = by_name[name]
        # Step counters stay where the optimizer keeps them (on the CPU unless it is fused).
        target = parameter.device if value.dim() or optimizer.defaults.get("fused") else "cpu"
        optimizer.state[parameter][field] = value.to(target).clone()


class CheckpointFolder:
    """The checkpoints of one run: `step-000200/` and so on, of which the newest is kept.

    Args:
        folder: where they are; made when the first is saved.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def newest(self) -> Path | None:
        """The newest complete checkpoint."""
        if not self.folder.is_dir():
            return None
        found = [
            p
            for p in self.folder.iterdir()
            if p.name.startswith(_PREFIX) and p.name[len(_PREFIX) :].isdigit()
        ]
        return max(found, key=lambda p: int(p.name[len(_PREFIX) :]), default=None)

    def save(
        self, student: nn.Module, optimizer: torch.optim.Optimizer | None, state: Mapping[str, Any], step: int
    ) -> None:
        """Writes a checkpoint beside the old one, then makes it the newest, then deletes the old.

        A kill at any moment leaves the old or the new one complete.

        Raises:
            OutputError: it cannot be written (a full disk, no permission); the old one is unharmed.
        """
        target = self.folder / f"{_PREFIX}{step:06d}"
        save_student(target, student, optimizer, state)
        for old in self.folder.iterdir():
            if old != target and (old.name.startswith(_PREFIX) or old.name.startswith(".")):
                shutil.rmtree(old, ignore_errors=True)

    def restore(self, student: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Loads the newest checkpoint into both; returns its state, or None if there is none.

        Raises:
            TrainingError: it is damaged or of another recipe.
        """
        path = self.newest()
        if path is None:
            return None
        state = load_student(path, student)
        names = {id(parameter): name for name, parameter in student.named_parameters()}
        _restore_optimizer(optimizer, _load(path / _OPTIMIZER), names)
        return state


def save_student(
    target: Path, student: nn.Module, optimizer: torch.optim.Optimizer | None, state: Mapping[str, Any]
) -> None:
    """Writes a folder with the student, perhaps its optimizer, and a JSON state; all or nothing.

    Raises:
        OutputError: it cannot be written; what was there before is unharmed.
    """
    scratch = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        save_file(student_tensors(student), scratch / _STUDENT)
        if optimizer is not None:
            names = {id(parameter): name for name, parameter in student.named_parameters()}
            save_file(_optimizer_tensors(optimizer, names), scratch / _OPTIMIZER)
        (scratch / _STATE).write_text(json.dumps(dict(state), indent=1), encoding="utf-8")
        for file in scratch.iterdir():
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        if target.exists():
            retired = target.parent / f".{target.name}.old.tmp"
            shutil.rmtree(retired, ignore_errors=True)
            os.replace(target, retired)
            os.replace(scratch, target)
            shutil.rmtree(retired, ignore_errors=True)
        else:
            os.replace(scratch, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise OutputError(
            "cannot write a checkpoint",
            where=target,
            found=getattr(error, "strerror", None) or str(error),
            remedy="Make room or give write permission, then repeat the command: it goes on from the last "
            "complete checkpoint.",
        ) from None


def load_student(path: Path, student: nn.Module) -> dict[str, Any]:
    """Loads what `save_student` wrote into a student of the same shape; returns the JSON state.

    Raises:
        TrainingError: damaged, or of another shape.
    """
    restore_student(student, _load(path / _STUDENT), path)
    return read_state(path)


def read_state(path: Path) -> dict[str, Any]:
    """The JSON state of a saved student.

    Raises:
        TrainingError: missing or damaged.
    """
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError("unreadable training state", where=path / _STATE, found=str(error)) from None
    if not isinstance(state, dict):
        raise TrainingError("unreadable training state", where=path / _STATE, expected="a JSON object")
    return state


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            "damaged checkpoint",
            where=file,
            found=str(error),
            remedy="Delete this checkpoint folder; the run then starts from the beginning.",
        ) from None
