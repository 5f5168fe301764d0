"""Learned N:M patterns: every group has a logit for each way to keep N of its M weights.

While they are learned a pattern is drawn for every group in every forward pass (Gumbel-softmax, arXiv
1611.01144, straight through; for N:M masks as in MaskLLM, arXiv 2409.17481, though here the weights learn
too); the gradient of the loss by the mask moves the logits. The likeliest patterns are what is evaluated
and shipped.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from usmlite import kernels
from usmlite.errors import SpecError
from usmlite.spec import NM

# The logits of 2:4 already take 1.5 times the floats of the weight.
MAX_PATTERNS = 16
# How far the logit of the first mask's pattern is above that of its complement. Of the six patterns of 2:4
# it is then drawn every second time at temperature 1.
_HEAD_START = 3.0
# Keeps the logarithm of a random number finite.
_LEAST = 1e-10


class LearnedPatterns(nn.Module):
    """The logits of one weight's patterns.

    Args:
        rows: of the weight.
        columns: of the weight.
        nm: the sparsity.
        device: where the weight is.

    Attributes:
        logits: float32 `[rows, groups, patterns]` parameter; patterns in the order of their ranks in the
            packed file.

    Raises:
        SpecError: a group has more than 16 patterns.
    """

    _table: Tensor
    _impossible: Tensor | None

    def __init__(self, rows: int, columns: int, nm: NM, device: torch.device) -> None:
        super().__init__()
        if nm.patterns > MAX_PATTERNS:
            raise SpecError(
                "too many patterns to learn",
                where="masks = 'gumbel'",
                expected=f"at most {MAX_PATTERNS} patterns a group, such as 2:4 (6) or 1:8 (8)",
                found=f"{nm} ({nm.patterns})",
                remedy="Use masks = 'sr-ste' with this sparsity.",
            )
        self.nm, self.columns = nm, columns
        groups = math.ceil(columns / nm.m)
        places = kernels.pattern_columns(torch.arange(nm.patterns), nm.n, nm.m)
        table = torch.zeros(nm.patterns, nm.m, dtype=torch.bool).scatter_(1, places, True).to(device)
        self.register_buffer("_table", table, persistent=False)
        # A last group that is short keeps as many of its real columns as there are, up to N.
        short = columns % nm.m
        impossible = torch.zeros(groups, nm.patterns, dtype=torch.bool, device=device)
        impossible[-1] = table[:, :short].sum(dim=1) != min(nm.n, short)
        self.register_buffer("_impossible", impossible if short else None, persistent=False)
        self.logits = nn.Parameter(torch.zeros(rows, groups, nm.patterns, device=device))

    @torch.no_grad()
    def start(self, mask: Tensor) -> None:
        """Makes the patterns of a mask the likeliest, and others the likelier the more they share with it.

        Args:
            mask: bool `[rows, columns]`, N kept of every M.
        """
        padded = nn.functional.pad(mask.float(), (0, -self.columns % self.nm.m))
        shared = padded.reshape(*self.logits.shape[:2], self.nm.m) @ self._table.float().T
        self.logits.copy_(shared * (_HEAD_START / self.nm.n))

    @torch.no_grad()
    def likeliest(self) -> Tensor:
        """The mask of the likeliest patterns, bool `[rows, columns]`."""
        return self._mask(self._possible(self.logits).argmax(dim=-1))

    def draw(self, temperature: float, rows: Tensor | None = None) -> Tensor:
        """A mask drawn at random, every pattern as likely as the softmax of logits / temperature says.

        Args:
            temperature: above 0; towards 0 the likeliest patterns are all that is drawn.
            rows: int64 `[count]`, the rows to draw for, or None for all.

        Returns:
            float32 `[rows, columns]` of ones and zeros, whose gradient is that of the expected mask.
        """
        logits = self._possible(self.logits if rows is None else self.logits[rows]) / temperature
        noise = torch.rand_like(logits).clamp_(min=_LEAST).log_().neg_().log_().neg_()
        perturbed = logits + noise
        drawn = self._mask(perturbed.argmax(dim=-1)).float()
        with torch.autocast(logits.device.type, enabled=False):
            soft = perturbed.softmax(dim=-1) @ self._table.float()
        soft = soft.reshape(len(logits), -1)[:, : self.columns]
        # Adds nothing but the gradient.
        return drawn + (soft - soft.detach())

    def _possible(self, logits: Tensor) -> Tensor:
        return logits if self._impossible is None else logits.masked_fill(self._impossible, -math.inf)

    def _mask(self, ranks: Tensor) -> Tensor:
        return self._table[ranks].reshape(len(ranks), -1)[:, : self.columns]
