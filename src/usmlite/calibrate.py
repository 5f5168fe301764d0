"""A data-driven start for the student: masks, scales and rounded weights from a few batches of speech.

The dense teacher runs over the batches once; hooks collect the second moments of every compressed
layer's inputs. Then each layer is started on its own, by one of three methods:

    magnitude    the largest weights stay, the clip with the least squared error (no data used)
    activation   the same with every input weighed by its mean square (Wanda, arXiv 2306.11695)
    hessian      columns are pruned and rounded one after the other, and the columns still to come make
                 up for the error (see `solve`)

Every method corrects the biases for what the compressed weight makes of the mean input.

Used alone this is post-training compression; before fine-tuning it is a better starting point.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from usmlite import quantize as q
from usmlite.errors import ModelError, SpecError
from usmlite.fisher import FISHER_BATCHES, output_fisher
from usmlite.moments import Moments, collect_moments
from usmlite.network import SEQUENCE_TO_SEQUENCE, Batch, Network
from usmlite.solve import DAMPING, Problem, corrected_bias, importance_of, relative_error, solve
from usmlite.student import (
    CompressedLayer,
    compressed_layers,
    fake_quantized,
    from_matrix,
    to_matrix,
)

Method = Literal["magnitude", "activation", "hessian"]
METHODS: tuple[Method, ...] = ("magnitude", "activation", "hessian")
Progress = Callable[[str, int, "int | None"], None]


@dataclass(frozen=True)
class Statistics:
    """What the dense model showed on speech: enough to start a student of it, with any spec.

    Attributes:
        moments: of the inputs of every weight, by module.
        rows: how much the loss feels each output of a weight, float32 `[rows]`, by module (`fisher`); weights
            that are not there count all of them alike.
        batches: batches that the model ran on.
        seconds: wall time.
    """

    moments: Mapping[str, Moments]
    rows: Mapping[str, Tensor]
    batches: int
    seconds: float


@dataclass(frozen=True)
class LayerCalibration:
    """What calibration did to one layer.

    Attributes:
        name: the module's name.
        spec: the layer spec, as text.
        rows: output channels.
        columns: inputs.
        samples: input vectors seen, by their weights (`moments`).
        error_before: ||(W - What) X||^2 / ||W X||^2 of the student as it came, What its compressed weight; X
            less its mean where the layer has a bias, which takes up what goes wrong on the mean.
        error_after: the same after calibration.
        damping: what was added to the Hessian's diagonal, as a share of its mean; None if unused.
        seconds: wall time of this layer.
        note: what was unusual, or "".
    """

    name: str
    spec: str
    rows: int
    columns: int
    samples: int
    error_before: float
    error_after: float
    damping: float | None
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class CalibrationReport:
    """What `calibrate` did.

    Attributes:
        method: "magnitude", "activation" or "hessian".
        layers: one entry per compressed weight, in the model's order.
        batches: batches the teacher ran on.
        teacher_seconds: wall time of the teacher's run and the statistics.
        seconds: wall time of everything.
    """

    method: Method
    layers: tuple[LayerCalibration, ...]
    batches: int
    teacher_seconds: float
    seconds: float

    @property
    def notes(self) -> list[str]:
        """What was unusual, one line a layer."""
        return [f"{layer.name}: {layer.note}" for layer in self.layers if layer.note]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        return asdict(self) | {"layers": [asdict(layer) for layer in self.layers]}


def collect_statistics(
    teacher: nn.Module,
    names: Sequence[str],
    batches: Iterable[Batch],
    *,
    network: Network = SEQUENCE_TO_SEQUENCE,
    felt: bool = True,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Runs the dense model over the batches.

    Args:
        teacher: the dense model. It is run in evaluation mode and left as it was.
        names: the modules of the weights.
        batches: see `calibrate`.
        network: see `calibrate`.
        felt: also find what outputs count for, where batches have labels. It decides the steps of weights
            with a rate, and nothing else.
        autocast: see `calibrate`.
        progress: see `calibrate`.

    Raises:
        DataError: no batch at all.
        ModelError: the teacher's activations are not finite.
    """
    started = time.perf_counter()
    first: list[Batch] = []
    if isinstance(batches, Sequence):
        first.extend(batches[:FISHER_BATCHES])
    else:
        batches = _remembered(batches, first)
    moments, count = collect_moments(
        teacher,
        list(names),
        batches,
        network=network,
        autocast=autocast,
        progress=None if progress is None else lambda done, total: progress("teacher", done, total),
    )
    rows: Mapping[str, Tensor] = {}
    matrices = [name for name in names if not moments[name].is_table]
    if felt and matrices and all("labels" in batch for batch in first):
        rows = output_fisher(teacher, matrices, first, network=network, autocast=autocast)
    return Statistics(moments, rows, count, time.perf_counter() - started)


def calibrate(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Batch] | Statistics,
    *,
    network: Network = SEQUENCE_TO_SEQUENCE,
    method: Method = "hessian",
    damping: float = DAMPING,
    autocast: torch.dtype | None = None,
    only: Collection[str] | None = None,
    progress: Progress | None = None,
) -> CalibrationReport:
    """Starts every compressed layer of the student from the teacher's weights and its inputs.

    Masks, scales and master weights are set, afterwards the student computes with exactly the
    weights that the method chose, and recomputing its masks changes none of them. The student's
    own weights of the compressed layers are overwritten; calibrating twice is the same as once.
    Gradual masks start dense, and descending bits with the most.

    Args:
        student: made by `make_student` from `teacher`.
        teacher: the dense model. It is run in evaluation mode and left as it was.
        batches: keyword inputs of the teacher's forward pass, such as "input_features" float32
            `[batch, mels, 3000]` and "decoder_input_ids" int64 `[batch, tokens]`. Decoder positions
            that "decoder_attention_mask" (0) rules out, or, without it, those after the last label of
            "labels" that is not -100, are not counted. Labels do not reach the model. Or what
            `collect_statistics` found with them, for more than one student.
        network: how the models are run, and so what batches have and which places count.
        method: how layers are started; see the module's text.
        damping: what is added to the Hessian's diagonal, as a share of its mean.
        autocast: the dtype the teacher runs in (bfloat16 is fast where the processor has it), None
            for its own. Statistics are float32 sums of float32 products either way.
        only: the layers to start; None for all. No layer's start depends on another's.
        progress: called with what was done ("teacher" or a layer's name), how many of how many
            (None if the number of batches is unknown).

    Returns:
        Errors before and after of every layer, and timings.

    Raises:
        DataError: no batch at all.
        ModelError: the student does not come from this teacher, or the teacher's activations
            are not finite.
        SpecError: an unknown method or a negative damping.
    """
    if method not in METHODS:
        raise SpecError("unknown method", where="calibrate", expected=", ".join(METHODS), found=repr(method))
    if not 0 <= damping < float("inf"):
        raise SpecError("unusable damping", where="calibrate", expected="a number from 0", found=damping)
    started = time.perf_counter()
    layers = {name: layer for name, layer in compressed_layers(student) if only is None or name in only}
    for name, layer in layers.items():
        _check(teacher, name, layer)
    if isinstance(batches, Statistics):
        known, teacher_seconds = batches, 0.0
    else:
        rated = any(layer.compression.spec.rate is not None for layer in layers.values())
        known = collect_statistics(
            teacher, list(layers), batches, network=network, felt=rated and method == "hessian",
            autocast=autocast, progress=progress,
        )  # fmt: skip
        teacher_seconds = known.seconds
    done = []
    for name, layer in layers.items():
        module = teacher.get_submodule(name)
        done.append(_start(name, layer, module, known.moments[name], known.rows.get(name), method, damping))
        if progress is not None:
            progress(name, len(done), len(layers))
    return CalibrationReport(
        method, tuple(done), known.batches, teacher_seconds, time.perf_counter() - started
    )


def _remembered(batches: Iterable[Batch], first: list[Batch]) -> Iterator[Batch]:
    """The batches; `first` is given those that the Fisher information is computed from."""
    for batch in batches:
        if len(first) < FISHER_BATCHES:
            first.append(batch)
        yield batch


def _check(teacher: nn.Module, name: str, layer: CompressedLayer) -> None:
    """Raises ModelError unless the teacher has this layer."""
    try:
        module = teacher.get_submodule(name)
    except AttributeError:
        raise ModelError("the student has a layer that the teacher has not", where=name) from None
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.shape != layer.weight.shape:
        raise ModelError(
            "the student's layer does not fit the teacher's",
            where=name,
            expected=list(layer.weight.shape),
            found=list(weight.shape) if isinstance(weight, Tensor) else type(module).__name__,
        )


@torch.no_grad()
def _start(
    name: str,
    layer: CompressedLayer,
    module: nn.Module,
    moments: Moments,
    rows: Tensor | None,
    method: Method,
    damping: float,
) -> LayerCalibration:
    started = time.perf_counter()
    compression = layer.compression
    # What has made up for fewer bits or weights already would suit the ones before badly.
    spec = compression.present = compression.spec_at(0, 1)
    weight = cast(Tensor, module.weight).detach().to(layer.weight.device)
    whole, bias = to_matrix(weight).float(), corrected_bias(layer)
    if bias is not None:
        bias.copy_(cast(Tensor, module.bias))
    problem = Problem.of(whole, moments, biased=bias is not None, damping=damping, rows=rows)
    before = relative_error(whole, to_matrix(fake_quantized(layer)), problem.hessian)
    used, notes = None, []
    if not moments.count and not moments.is_table:
        notes.append("never reached by the batches: all inputs counted alike")
    layer.weight.copy_(weight)
    scale = None
    own = compression.spec
    if own.quant is not None and own.rate is not None and method == "hessian":
        along = own.trellis is not None
        octaves = compression.octaves
        compression.set_scales(*problem.rate_scales(own.quant, own.rate, octaves, along_trellis=along))
        scale, _ = compression.scales(weight)
    elif compression.column_scale is not None and spec.quant is not None:
        compression.column_scale.copy_(q.column_scales(whole, spec.quant))
    column_scale = compression.column_scale
    compression.importance.fill_(1.0)
    if method != "magnitude":
        squares = problem.hessian.diagonal()
        compression.importance.copy_(
            importance_of(squares if column_scale is None else squares * column_scale.square())
        )
    if method == "hessian":
        solution = solve(
            whole,
            problem.hessian,
            spec,
            damping=problem.damping,
            importance=compression.importance,
            covering=compression.options.covering,
            scale=scale,
            column_scale=column_scale,
            inward=own.rate is not None and problem.inward,
        )
        used = solution.damping
        notes += solution.notes
        master = solution.master if column_scale is None else solution.master * column_scale
        layer.weight.copy_(from_matrix(master, layer.weight.shape))
        if compression.mask is not None:
            dense = torch.ones_like(compression.mask)
            compression.set_mask(dense if solution.mask is None else solution.mask)
        if solution.scale is not None and own.rate is None:
            compression.set_scales(solution.scale, zero=solution.zero)
    else:
        compression.start(layer.weight)
    compressed = to_matrix(fake_quantized(layer))
    if bias is not None:
        bias += (whole - compressed) @ moments.mean.to(weight.device)
    after = relative_error(whole, compressed, problem.hessian)
    return LayerCalibration(
        name, str(spec), whole.shape[0], whole.shape[1], round(moments.count), before, after, used,
        time.perf_counter() - started, "; ".join(notes),
    )  # fmt: skip
