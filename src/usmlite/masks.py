"""How a student's masks move while it trains, in any loop.

`attach` hooks them to an optimizer. What is due after a step depends on the number of the step alone, so
that a run that was cut off goes on as it would have.
"""

from __future__ import annotations

import torch

from usmlite.errors import SpecError
from usmlite.schedule import kept_of
from usmlite.spec import NM
from usmlite.student import (
    StudentOptions,
    WeightCompression,
    compressed_layers,
    from_matrix,
    to_matrix,
)

# Rules that go from one end to another, so that they must know where the end is.
_SCHEDULED = ("gradual", "gumbel")
_DECAYING = ("sr-ste", "gradual")


@torch.no_grad()
def update_masks(student: torch.nn.Module) -> float:
    """Recomputes every mask from the present weights; returns the share of entries that changed."""
    changed = total = 0
    for _, layer in compressed_layers(student):
        if layer.compression.mask is not None:
            changed += layer.compression.update(layer.weight)
            total += layer.weight.numel()
    return changed / total if total else 0.0


@torch.no_grad()
def decay_pruned(student: torch.nn.Module, decay: float, optimizer: torch.optim.Optimizer) -> None:
    """Shrinks pruned master weights by decay times their own learning rate (SR-STE's decay, decoupled)."""
    rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    for _, layer in compressed_layers(student):
        mask, rate = layer.compression.mask, decay * rates.get(id(layer.weight), 0.0)
        if mask is not None and rate:
            matrix = to_matrix(layer.weight)
            shrunk = torch.where(mask, matrix, matrix * (1.0 - rate))
            layer.weight.copy_(from_matrix(shrunk, layer.weight.shape))


class MaskUpdater:
    """Moves a student's masks after optimizer steps. Made by `attach`.

    Attributes:
        steps: optimizer steps seen; `at` sets it where a run goes on.
        moving: optimizer steps after which the masks stay as they are, None where a loop sets `frozen`.
        churn: share of mask entries that the last update changed.
    """

    def __init__(self, student: torch.nn.Module, moving: int | None = None) -> None:
        self.student = student
        self.moving = moving
        self.steps = 0
        self.churn = 0.0
        self._frozen = False
        self._compressions = [layer.compression for _, layer in compressed_layers(student)]
        options = {compression.options for compression in self._compressions}
        self.options = next(iter(options)) if options else StudentOptions(masks="fixed")
        if moving is None and self.options.masks in _SCHEDULED:
            raise SpecError(
                f"{self.options.masks} masks must know when they stop",
                where="attach",
                expected="moving, the number of optimizer steps after which masks stay",
            )
        before = self._sparsities()
        self.at(0)
        if self._sparsities() != before:
            update_masks(student)

    @property
    def frozen(self) -> bool:
        """Whether all movement has stopped. Set it to stop it; masks then stay as they are."""
        return self._frozen

    @frozen.setter
    def frozen(self, value: bool) -> None:
        self._frozen = value
        progress = self.steps / self.moving if self.moving else 0.0
        for compression in self._compressions:
            compression.progress = None if value else progress

    def at(self, step: int) -> None:
        """Takes up the state that belongs to this many steps; weights and masks are left alone."""
        self.steps = step
        self.frozen = self._frozen if self.moving is None else step >= self.moving
        if self.moving is not None and self.options.masks == "gradual":
            for compression in self._compressions:
                compression.sparsity = _sparsity_at(step, self.moving, compression)

    @property
    def at_target(self) -> bool:
        """Whether all masks have the N:M of their specs, so that the student may ship."""
        return all(compression.sparsity == compression.spec.sparsity for compression in self._compressions)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Decays pruned weights and updates the masks when they are due."""
        if self.frozen:
            self.steps += 1
            return
        before = self._sparsities()
        self.at(self.steps + 1)
        if self.options.masks == "fixed":
            return
        if self.options.masks in _DECAYING:
            decay_pruned(self.student, self.options.mask_decay, optimizer)
        settling = self.options.masks == "gumbel" and self.frozen
        if self.steps % self.options.mask_every == 0 or self._sparsities() != before or settling:
            self.churn = update_masks(self.student)

    def _sparsities(self) -> list[NM | None]:
        return [compression.sparsity for compression in self._compressions]


def _sparsity_at(step: int, moving: int, compression: WeightCompression) -> NM | None:
    """The N:M of gradual masks after this many steps; None for dense."""
    target = compression.spec.sparsity
    if target is None:
        return None
    kept = kept_of(step, moving, target.n, target.m)
    return None if kept == target.m else NM(kept, target.m)


def attach(
    student: torch.nn.Module, optimizer: torch.optim.Optimizer, *, moving: int | None = None
) -> MaskUpdater:
    """Lets the student's masks follow this optimizer's steps, in any training loop.

    Example:
        student = make_student(...)
        optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4)
        attach(student, optimizer)
        # then loss.backward(); optimizer.step() as always

    Args:
        student: made by `make_student`.
        optimizer: trains it.
        moving: optimizer steps after which the masks stay as they are. Gradual and learned masks need it;
            others move until somebody sets `frozen`.

    Returns:
        The updater, whose `frozen` stops the masks for the last part of training.

    Raises:
        SpecError: gradual or learned masks without `moving`.
    """
    updater = MaskUpdater(student, moving)

    def hook(done: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        updater.after_step(done)

    optimizer.register_step_post_hook(hook)
    return updater
