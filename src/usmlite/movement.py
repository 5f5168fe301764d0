"""What moves in a student while it trains, in any loop: masks, and the bits of weights.

`attach` hooks them to an optimizer. What is due after a step depends on the number of the step alone, and
what is drawn for it on a seed and that number, so that a run that was cut off goes on as it would have.
"""

from __future__ import annotations

import torch

from usmlite.errors import SpecError
from usmlite.spec import LayerSpec
from usmlite.student import (
    StudentOptions,
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


@torch.no_grad()
def draw_bits(student: torch.nn.Module, seed: int, step: int) -> None:
    """Draws for every weight whether it has more bits in this step, and how many.

    A function of the seed and the step: the same in all processes, and in a run that was resumed.
    """
    generator = torch.Generator().manual_seed(hash((seed, step)) % 2**63)
    for _, layer in compressed_layers(student):
        compression = layer.compression
        # Drawn for every weight, so that what one gets does not depend on the specs of others.
        often, which = torch.rand(2, generator=generator).tolist()
        own = compression.present.precision
        choices = [bits for bits in compression.options.stochastic_bits if own is not None and bits > own]
        drawn = choices and often < compression.options.stochastic_share
        compression.drawn_bits = choices[int(which * len(choices))] if drawn else None


def take_up(student: torch.nn.Module, step: int, moving: int) -> None:
    """Gives every weight the N:M and the bits that belong to this step; masks and scales are left alone."""
    for _, layer in compressed_layers(student):
        layer.compression.present = layer.compression.spec_at(step, moving)


class Movement:
    """Moves a student's masks and bits after optimizer steps. Made by `attach`.

    Attributes:
        steps: optimizer steps seen; `at` sets it where a run goes on.
        moving: optimizer steps after which all stays as it is, None where a loop sets `frozen`.
        churn: share of mask entries that the last update of the masks changed.
    """

    def __init__(self, student: torch.nn.Module, moving: int | None = None, seed: int = 0) -> None:
        self.student = student
        self.moving = moving
        self.seed = seed
        self.steps = 0
        self.churn = 0.0
        self._frozen = False
        self._compressions = [layer.compression for _, layer in compressed_layers(student)]
        options = [compression.options for compression in self._compressions]
        self.options = options[0] if options else StudentOptions(masks="fixed")
        self._draws = any(each.stochastic_bits for each in options)
        descending = any(each.bits_schedule for each in options)
        if moving is None and (self.options.masks in _SCHEDULED or descending):
            what = "descending bits" if descending else f"{self.options.masks} masks"
            raise SpecError(
                f"{what} must know when they stop",
                where="attach",
                expected="moving, the number of optimizer steps after which they stay",
            )
        before = self._specs()
        self.at(0)
        if self._sparsity_changed(before):
            update_masks(student)
        self._rescale(before, None)

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
            compression.drawn_bits = None
        if self._draws and not value:
            draw_bits(self.student, self.seed, self.steps)

    def at(self, step: int) -> None:
        """Takes up the state that belongs to this many steps; weights, masks and scales are left alone."""
        self.steps = step
        if self.moving is not None:
            take_up(self.student, step, self.moving)
        self.frozen = self._frozen if self.moving is None else step >= self.moving

    @property
    def at_target(self) -> bool:
        """Whether all weights have the N:M and the bits of their specs, so that the student may ship."""
        return all(compression.present == compression.spec for compression in self._compressions)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Decays pruned weights, and updates masks, bits and what is drawn where that is due."""
        if self.frozen:
            self.steps += 1
            return
        before = self._specs()
        self.at(self.steps + 1)
        if self.options.masks in _DECAYING:
            decay_pruned(self.student, self.options.mask_decay, optimizer)
        settling = self.options.masks == "gumbel" and self.frozen
        due = self.options.masks != "fixed" and self.steps % self.options.mask_every == 0
        if due or self._sparsity_changed(before) or settling:
            self.churn = update_masks(self.student)
        self._rescale(before, optimizer)

    def _specs(self) -> list[LayerSpec]:
        return [compression.present for compression in self._compressions]

    def _sparsity_changed(self, before: list[LayerSpec]) -> bool:
        pairs = zip(self._compressions, before, strict=True)
        return any(compression.present.sparsity != old.sparsity for compression, old in pairs)

    @torch.no_grad()
    def _rescale(self, before: list[LayerSpec], optimizer: torch.optim.Optimizer | None) -> None:
        """Searches scales for weights whose bits have changed; learned ones begin to learn anew."""
        for (_, layer), old in zip(compressed_layers(self.student), before, strict=True):
            compression = layer.compression
            if compression.present.precision != old.precision:
                compression.search_scales(layer.weight)
                # Moments and averages are of scales for other codes.
                if optimizer is not None and compression.log_scale is not None:
                    optimizer.state.pop(compression.log_scale, None)


def attach(
    student: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    moving: int | None = None,
    seed: int = 0,
) -> Movement:
    """Lets the student's masks and bits follow this optimizer's steps, in any training loop.

    Example:
        student = make_student(...)
        optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4)
        attach(student, optimizer)
        # then loss.backward(); optimizer.step() as always

    Args:
        student: made by `make_student`.
        optimizer: trains it.
        moving: optimizer steps after which masks and bits stay as they are. Gradual and learned masks and
            descending bits need it; others move until somebody sets `frozen`.
        seed: of the bits that are drawn.

    Returns:
        The movement, whose `frozen` stops it for the last part of training.

    Raises:
        SpecError: gradual or learned masks, or descending bits, without `moving`.
    """
    movement = Movement(student, moving, seed)

    def hook(done: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        movement.after_step(done)

    optimizer.register_step_post_hook(hook)
    return movement
