"""The native library's operations on whole layers: attention, norms, and both sides of a Whisper model.

Attention multiplies in whole numbers, as `native.linear` does with rounded activations. Each query and each
key is rounded to a byte, keys less their mean, which no softmax notices; the weights of the softmax to 256
steps of the largest in a block of 256 positions; values to a byte, with a scale for each column and block.
That is the scheme of SageAttention (Zhang et al. 2024, arXiv 2410.02367) with whole numbers on both sides.

Everything here needs the library; `usmlite.models.engine` falls back where it is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from usmlite.kernels import native
from usmlite.kernels.native import NativeWeight


@dataclass(frozen=True)
class Norm:
    """Layer normalization: `weight` and `bias` float32 `[width]`, contiguous and in memory."""

    weight: Tensor
    bias: Tensor
    epsilon: float


@dataclass(frozen=True)
class Block:
    """A norm and the linear layers behind it, each with its bias, float32 `[rows]`, or None.

    Four layers (query, key, value, output) are attention, two (up, down) a feed-forward layer with the
    Gaussian error linear unit between them.
    """

    norm: Norm
    linears: tuple[tuple[NativeWeight, Tensor | None], ...]


Layers = Sequence[Sequence[Block]]


class Encoder:
    """The layers of an encoder, prepared once for many windows.

    Args:
        layers: attention and feed-forward blocks.
        last: the norm behind the last layer.
        heads: of each attention.

    Raises:
        ValueError: shapes do not fit together.
    """

    def __init__(self, layers: Layers, last: Norm, heads: int) -> None:
        self._width = last.weight.numel()
        parts, path, owner = _parts(layers, last)
        self._handle = native.library().Encoder(parts, _norm(last), self._width, heads, path, owner)

    def __call__(self, x: Tensor) -> Tensor:
        """Overwrites float32 `[batch, positions, width]`, contiguous, with what comes out; returns it."""
        _check(x, self._width)
        for window in x:
            self._handle.run(native.memory(window), window.shape[0], torch.get_num_threads())
        return x


class Decoder:
    """The layers of a decoder with the caches of some sequences.

    Args:
        layers: blocks of attention to the text, of attention to the speech, and feed-forward blocks.
        last: the norm behind the last layer.
        heads: of each attention.
        encoded: the encoder's output, float32 `[batch, positions, width]`, contiguous; read only here.

    Raises:
        ValueError: shapes do not fit together.
    """

    def __init__(self, layers: Layers, last: Norm, heads: int, encoded: Tensor) -> None:
        self._width = last.weight.numel()
        _check(encoded, self._width)
        parts, path, owner = _parts(layers, last)
        self._handle = native.library().Decoder(parts, _norm(last), self._width, heads, path, owner)
        batch, positions, _ = encoded.shape
        self._handle.hear(native.memory(encoded), batch, positions, torch.get_num_threads())

    def step(self, x: Tensor) -> Tensor:
        """Appends tokens to the first sequences; those that are not among them are dropped.

        Args:
            x: embeddings, float32 `[rows, added, width]`, contiguous; overwritten.

        Returns:
            The same memory: hidden states behind the last norm.
        """
        _check(x, self._width)
        rows, added, _ = x.shape
        self._handle.step(native.memory(x), rows, added, torch.get_num_threads())
        return x

    def swap(self, first: int, second: int) -> None:
        """Two sequences change places.

        Raises:
            IndexError: there is no such sequence.
        """
        self._handle.swap(first, second)

    def select(self, rows: Sequence[int]) -> None:
        """Sequence i becomes what sequence `rows[i]` was; those may be named more than once, or not at all.

        Raises:
            IndexError: there is no such sequence.
        """
        self._handle.select(list(rows))


def attention(
    query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float, *, path: str | None = None
) -> Tensor:
    """Attention in whole numbers, head by head.

    Args:
        query: float32 `[count, heads * width]`.
        key: float32 `[positions, heads * width]`, at least one position.
        value: as `key`.
        heads: how many.
        scale: of the products of queries and keys.
        path: the instruction set, see `native.paths`.

    Returns:
        float32 `[count, heads * width]`; NaN where something was not finite.

    Raises:
        ValueError: shapes do not fit together.
    """
    if query.dim() != 2 or key.shape != value.shape or key.shape[1:] != query.shape[1:] or heads < 1:
        raise ValueError(
            f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)} do not fit together"
        )
    if len(key) < 1 or query.shape[1] % heads or not query.shape[1]:
        raise ValueError(f"no {heads} heads in {list(key.shape)}")
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    out = torch.empty_like(query)
    native.library().attend(
        native.memory(query), native.memory(key), native.memory(value), len(query), len(key), heads,
        query.shape[1] // heads, scale, native.memory(out), native.number(path), torch.get_num_threads(),
    )  # fmt: skip
    return out


def gelu(x: Tensor, *, path: str | None = None) -> Tensor:
    """The Gaussian error linear unit of float32 `[...]`, contiguous, which is overwritten and returned."""
    native.library().gelu(
        native.memory(x), x.numel(), native.memory(x), native.number(path), torch.get_num_threads()
    )
    return x


def normalize(x: Tensor, norm: Norm, *, path: str | None = None) -> Tensor:
    """Layer normalization of float32 `[..., width]`, contiguous."""
    width = norm.weight.numel()
    if not x.dim() or x.shape[-1] != width:
        raise ValueError(f"expected [..., {width}], got {list(x.shape)}")
    out = torch.empty_like(x)
    count = x.numel() // width if width else 0
    weight, bias, epsilon = _norm(norm)
    native.library().normalize(
        native.memory(x), count, weight, bias, width, epsilon, native.memory(out), native.number(path)
    )
    return out


def _norm(norm: Norm) -> tuple[tuple[int, int], tuple[int, int], float]:
    return native.memory(norm.weight), native.memory(norm.bias), norm.epsilon


def _parts(layers: Layers, last: Norm) -> tuple[list[list[native.BlockParts]], int, object]:
    """What the binding takes: addresses, the path, and the owner of the memory."""
    weights = [weight for layer in layers for block in layer for weight, _ in block.linears]
    paths = {weight.path for weight in weights}
    if len(paths) != 1 or any(weight.activations != "int8" for weight in weights):
        raise ValueError("expected weights that were prepared alike, for rounded activations")
    parts = [
        [
            (
                _norm(block.norm),
                [
                    (weight.handle, (0, 0) if bias is None else native.memory(bias))
                    for weight, bias in block.linears
                ],
            )
            for block in layer
        ]
        for layer in layers
    ]
    return parts, paths.pop(), (layers, last)


def _check(x: Tensor, width: int) -> None:
    if x.dim() != 3 or x.shape[2] != width:
        raise ValueError(f"expected [rows, positions, {width}], got {list(x.shape)}")
