"""What a model's layers are given: means and second moments of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from usmlite.errors import DataError, ModelError
from usmlite.network import SEQUENCE_TO_SEQUENCE, Batch, Network

# By how much the square of an input vector may exceed the batch's median before the vector counts for less.
# A decoder's first token can be a hundred times as large as all others; the layer norm that follows makes
# its errors as small as theirs (docs/decisions/0015).
_LARGEST_SQUARE = 4.0


@dataclass
class Moments:
    """Weighted sums over input vectors x, from which their mean and second moments follow.

    Attributes:
        total: the sum of (x - shift) (x - shift)^T, float32 `[columns, columns]`.
        sum: the sum of x - shift, float32 `[columns]`.
        shift: the mean of the first vectors, float32 `[columns]`: moments about it can be moved to the
            mean without the cancellation that moments about zero would suffer.
        count: how many vectors, by their weights.
        is_table: the weight's rows are looked up as well; without any vector, they are only that.
    """

    total: Tensor
    sum: Tensor
    shift: Tensor | None = None
    count: float = 0.0
    is_table: bool = False

    @property
    def mean(self) -> Tensor:
        """The mean of x, float32 `[columns]`; zeros if nothing was seen."""
        return self.sum if self.shift is None else self.shift + self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        """The mean of (x - mean) (x - mean)^T, float32 `[columns, columns]`, or the identity."""
        if not self.count:
            return torch.eye(len(self.total), device=self.total.device)
        offset = self.sum / self.count
        return self.total / self.count - torch.outer(offset, offset)

    @property
    def hessian(self) -> Tensor:
        """The mean of x x^T, float32 `[columns, columns]`; the identity if nothing was seen."""
        return self.covariance + torch.outer(self.mean, self.mean)


def is_pointwise(layer: nn.Module) -> bool:
    """Whether a convolution looks at one place at a time, and at all channels."""
    return isinstance(layer, nn.Conv1d) and (layer.kernel_size, layer.stride, layer.groups) == ((1,), (1,), 1)


def input_rows(layer: nn.Module, inputs: Tensor) -> Tensor:
    """The vectors that the rows of the layer's weight matrix are multiplied by.

    Args:
        layer: a linear layer or a 1-D convolution.
        inputs: what the layer is given, `[..., in]` or `[batch, in, frames]`.

    Returns:
        float32 `[vectors, columns]`, in the column order of `student.to_matrix`: for a convolution
        kernel-major, its padding included. A convolution with channel groups gives the vectors of
        all groups.
    """
    if not isinstance(layer, nn.Conv1d):
        return inputs.reshape(-1, inputs.shape[-1]).float()
    values = inputs.float()
    if values.dim() == 2:
        values = values.unsqueeze(0)
    (kernel,), (stride,), (dilation,) = layer.kernel_size, layer.stride, layer.dilation
    if isinstance(layer.padding, str):
        total = dilation * (kernel - 1) if layer.padding == "same" else 0
        left, right = total // 2, total - total // 2
    else:
        left = right = layer.padding[0]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    values = nn.functional.pad(values, (left, right), mode=mode)
    windows = values.unfold(2, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    batch, channels, frames, _ = windows.shape
    windows = windows.reshape(batch, layer.groups, channels // layer.groups, frames, kernel)
    return windows.permute(0, 1, 3, 4, 2).reshape(batch * layer.groups * frames, -1)


class _Collector:
    """Forward hooks that add up the moments of layer inputs."""

    def __init__(self) -> None:
        self.moments: dict[str, Moments] = {}
        self.places: list[Tensor] = []
        self._input: Tensor | None = None
        self._sums: tuple[Tensor, Tensor, Tensor, float] | None = None

    def start_batch(self, *places: Tensor | None) -> None:
        """Takes the places that count, bool `[batch, places]`, of the decoder and the encoder; None: all."""
        self.places = [each for each in places if each is not None]
        self._input = self._sums = None

    def hook(self, name: str, columns: int, device: torch.device) -> Callable[..., None]:
        total, zeros = torch.zeros(columns, columns, device=device), torch.zeros(columns, device=device)
        moments = self.moments[name] = Moments(total, zeros)

        def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = cast(Tensor, args[0] if args else kwargs["input"])
            # Queries, keys and values are projected from the same tensor: multiply it once.
            known = self._sums if inputs is self._input and not isinstance(layer, nn.Conv1d) else None
            if known is None or (moments.shift is not None and moments.shift is not known[0]):
                known = self._add_up(layer, inputs, moments.shift)
                self._input, self._sums = inputs, known
            moments.shift, total, sums, count = known
            moments.total += total
            moments.sum += sums
            moments.count += count

        return record

    def _add_up(
        self, layer: nn.Module, inputs: Tensor, shift: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, float]:
        with torch.autocast(inputs.device.type, enabled=False):
            pointwise = is_pointwise(layer) and inputs.dim() == 3
            if pointwise:
                inputs = inputs.transpose(1, 2)  # a linear layer, but for its channels in the middle
            # Other convolutions have channels there, of which there may be as many as tokens.
            at_places = inputs.dim() == 3 and (pointwise or not isinstance(layer, nn.Conv1d))
            here = (each for each in self.places if at_places and inputs.shape[:2] == each.shape)
            counted = next(here, None)
            if counted is not None:
                inputs = inputs[counted]
            rows = inputs.flatten(0, -2).float() if pointwise else input_rows(layer, inputs)
            weights = _weights(rows)
            count = float(weights.sum())
            shift = weights @ rows / max(count, 1.0) if shift is None else shift
            rows = rows - shift
            weighted = rows * weights.unsqueeze(1)
            return shift, weighted.T @ rows, weighted.sum(dim=0), count


def _weights(rows: Tensor) -> Tensor:
    """What vectors count, float32 `[vectors]`: 1, or less for those much larger than the median."""
    squares = rows.square().sum(dim=1)
    if not len(squares):
        return squares
    limit = _LARGEST_SQUARE * squares.median()
    return torch.where(squares > limit, limit / squares, 1.0) if limit > 0 else torch.ones_like(squares)


def collect_moments(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Batch],
    *,
    network: Network = SEQUENCE_TO_SEQUENCE,
    autocast: torch.dtype | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> tuple[dict[str, Moments], int]:
    """Runs the model over the batches and adds up what its layers are given.

    Args:
        model: run in evaluation mode, and left as it was.
        names: modules with a weight: linear layers, 1-D convolutions, and tables of rows (embeddings),
            whose inputs are those of the projection that shares their weight, if there is one.
        batches: see `network`.
        network: how the model is run.
        autocast: the dtype the model runs in, None for its own.
        progress: called with the batches done, and of how many (None if unknown).

    Returns:
        Moments by name, and how many batches there were.

    Raises:
        DataError: no batch at all.
        ModelError: the model's activations are not finite.
    """
    collector = _Collector()
    device = next(model.parameters()).device
    with ExitStack() as stack:
        for name in names:
            module = model.get_submodule(name)
            weight = cast(Tensor, module.weight)
            hook = collector.hook(name, weight[0].numel(), device)
            source: nn.Module | None = module
            if not isinstance(module, (nn.Linear, nn.Conv1d)):
                collector.moments[name].is_table = True
                tied = (m for m in model.modules() if isinstance(m, nn.Linear) and m.weight is weight)
                source = next(tied, None)
            if source is not None:
                stack.callback(source.register_forward_pre_hook(hook, with_kwargs=True).remove)
        stack.callback(model.train, model.training)
        model.eval()
        total = len(batches) if isinstance(batches, Sequence) else None
        count = 0
        for batch in batches:
            moved = {name: value.to(device) for name, value in batch.items()}
            collector.start_batch(network.counted(moved), network.heard(moved))
            with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                network.run(model, moved)
            count += 1
            if progress is not None:
                progress(count, total)
    if not count:
        raise DataError("no batch to calibrate on", where="calibrate", expected="at least one batch")
    for name, moments in collector.moments.items():
        if not bool(torch.isfinite(moments.total).all()):
            raise ModelError(
                "the teacher's activations are not finite",
                where=name,
                expected="finite inputs",
                remedy="Check the model's weights and the audio; try autocast = None.",
            )
    return collector.moments, count
