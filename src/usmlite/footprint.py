"""What a piece of PyTorch would hold in memory, and how many operations it would do: run on the meta device.

Every tensor that an operation makes is counted while it lives, exactly as the real run would hold it, but
nothing is allocated or computed. What the meta device cannot do is answered here: numbers that depend on data
(taken as 1), selections by a mask (everything is selected), CTC's loss, and fused attention, which on the
meta device would be written out.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
_fused = _aten._scaled_dot_product_flash_attention_for_cpu
# What autocast computes in 16 bits, of what recognizers are made of.
_IN_HALF = (
    nn.functional.linear, nn.functional.conv1d, nn.functional.conv2d, torch.matmul, torch.bmm, Tensor.matmul,
    Tensor.__matmul__,
)  # fmt: skip


@dataclass
class Footprint:
    """What was seen of a training step.

    Attributes:
        operations: multiplications and additions of all products, attention included.
        curve: bytes of gradients of parameters, and of everything else that was made, after each growth.
    """

    operations: float = 0.0
    curve: list[tuple[int, int]] = field(default_factory=list)

    def peak(self, *, gradients: float = 1.0) -> int:
        """The most bytes at any moment, where only this share of each gradient is held."""
        return max((round(gradients * mine + other) for mine, other in self.curve), default=0)

    @property
    def activations(self) -> int:
        """The most bytes of all but gradients."""
        return max((other for _, other in self.curve), default=0)


def trace(step: Callable[[], Any], held: Iterable[Tensor], *, half: bool = False) -> Footprint:
    """Runs a step whose models and inputs lie on the meta device.

    Args:
        step: forward and backward pass.
        held: parameters, buffers and inputs, which are there before and are not counted; gradients of those
            that require one are told apart.
        half: compute products in bfloat16, as autocast does.
    """
    held = list(held)
    counter = _Counter(held)
    handles = [
        cast(Any, tensor).register_post_accumulate_grad_hook(lambda p: counter.is_gradient(p.grad))
        for tensor in held
        if tensor.requires_grad
    ]
    try:
        with AsOnADevice(half), counter:
            step()
    finally:
        for handle in handles:
            handle.remove()
    return counter.found


class AsOnADevice(TorchFunctionMode):
    """Keeps attention fused, and casts where autocast would.

    `trace` enters it; what computes again in the backward pass, where torch leaves such modes, must itself.
    """

    def __init__(self, half: bool) -> None:
        super().__init__()
        self.half = half

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        fused = func is nn.functional.scaled_dot_product_attention
        if self.half and (fused or func in _IN_HALF):
            args = tuple(_to_half(value) for value in args)
            kwargs = {name: _to_half(value) for name, value in kwargs.items()}
        mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None) if fused else None
        # Biases that are learned are written out on every device.
        if fused and args[0].device.type == "meta" and (mask is None or not mask.requires_grad):
            query, key, value = args[:3]
            if mask is not None and mask.dtype == torch.bool:
                mask = torch.empty(mask.shape, dtype=query.dtype, device="meta")
            out, _ = _fused(query, key, value, 0.0, bool(kwargs.get("is_causal")), attn_mask=mask)
            return out
        return func(*args, **kwargs)


def _to_half(value: Any) -> Any:
    wide = isinstance(value, Tensor) and value.dtype == torch.float32 and value.device.type == "meta"
    return value.to(torch.bfloat16) if wide else value


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = Footprint()
        self._other = self._gradients = 0
        # Views of what is held have its storage.
        self._kinds = {tensor.untyped_storage()._cdata: "held" for tensor in held}

    def is_gradient(self, gradient: Tensor | None) -> None:
        """Counts a tensor among the gradients from now on."""
        key = 0 if gradient is None else gradient.untyped_storage()._cdata
        if gradient is not None and self._kinds.get(key) == "other":
            self._kinds[key] = "gradient"
            size = gradient.untyped_storage().nbytes()
            self._other -= size
            self._gradients += size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = _answered(func, args)
        if out is NotImplemented:
            out = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.found.operations += count(*args, **kwargs, out_val=out)
        elif func._overloadpacket is _fused:
            self.found.operations += _attention_operations(*args[:3])
        elif func._overloadpacket is _aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.found.operations += 2.5 * _attention_operations(*args[1:4])  # it computes scores once more
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == "meta":
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._kinds or not size:
            return
        self._kinds[key] = "other"
        self._other += size
        weakref.finalize(storage, self._gone, key, size)
        self.found.curve.append((self._gradients, self._other))

    def _gone(self, key: int, size: int) -> None:
        if self._kinds.pop(key) == "gradient":
            self._gradients -= size
        else:
            self._other -= size


def _answered(func: Any, args: Any) -> Any:
    """What the meta device cannot say; NotImplemented where it can."""
    packet = func._overloadpacket
    if packet is _aten._local_scalar_dense and args[0].device.type == "meta":
        return 1
    if packet is _aten.index and args[1][0] is not None and args[1][0].dtype == torch.bool:
        whole, chosen = args[0], args[1][0]
        if whole.device.type == "meta":
            return whole.reshape(-1, *whole.shape[chosen.dim() :]).clone()
    if packet is _aten.nonzero and args[0].device.type == "meta":
        return torch.empty(args[0].numel(), args[0].dim(), dtype=torch.int64, device="meta")
    if packet is _aten._ctc_loss:
        logs, labels = args[:2]
        frames, batch = logs.shape[:2]
        return logs.new_empty(batch), logs.new_empty(batch, frames, 2 * labels.shape[1] + 1)
    if packet is _aten._ctc_loss_backward:
        return torch.empty_like(args[1])
    return NotImplemented


def _attention_operations(query: Tensor, key: Tensor, value: Tensor) -> float:
    heads, queries, depth = query.shape[0] * query.shape[1], query.shape[2], query.shape[3]
    return 2.0 * heads * queries * key.shape[2] * (depth + value.shape[3])
