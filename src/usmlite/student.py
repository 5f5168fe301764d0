"""The student: the teacher's own Transformers model, with layers that prune and quantize as they run.

`make_student` swaps the covered layers for subclasses of `nn.Linear`, `nn.Conv1d` and `nn.Embedding`
whose forward pass uses the pruned, then quantized weight. Parameter names stay those of the teacher,
so any loop (`finetune`, a user's own, the Transformers `Trainer`) trains it like any other model.

Masks, their decay and bits follow the optimizer's steps through `movement.attach`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, cast

import torch
from torch import Tensor, nn

from usmlite import kernels
from usmlite import quantize as q
from usmlite.errors import ModelError, SpecError
from usmlite.patterns import LearnedPatterns
from usmlite.schedule import kept_of, precision_of, temperature
from usmlite.sparsify import nm_mask
from usmlite.spec import NM, TABLES, CompressionSpec, Int, LayerSpec, matrix_shape

ScaleRule = Literal["min-max", "min-error", "learned", "rand"]
MaskRule = Literal["fixed", "periodic", "sr-ste", "gradual", "gumbel"]
SCALE_RULES: tuple[ScaleRule, ...] = ("min-max", "min-error", "learned", "rand")
MASK_RULES: tuple[MaskRule, ...] = ("fixed", "periodic", "sr-ste", "gradual", "gumbel")


@dataclass(frozen=True)
class StudentOptions:
    """How scales, masks and bits behave while the student trains.

    Attributes:
        scales: "min-max" follows the largest pruned weight in every forward pass; "min-error"
            searches the clip with the least squared error at the start and at every mask update;
            "learned" starts from min-error and is then trained (LSQ); "rand" is min-max with a gradient
            through the scale: what rounding costs everywhere in a group is charged to its largest weight,
            which decays where that is too much (robustness-aware norm decay, arXiv 2305.15536). Until masks
            are frozen the student is given uniform noise, one step wide, instead of rounding.
        masks: "fixed" once at the start; "periodic" recomputed every `mask_every` optimizer steps;
            "sr-ste" the same, and pruned weights decay towards zero (arXiv 2102.04010, with the
            decay in the optimizer step as arXiv 2302.01172 advises); "gradual" dense at first, then N
            falls by one at a time to that of the spec (`schedule.kept_of`), pruned weights decay; "gumbel"
            learned: drawn at random in every forward pass of training until they are frozen (`patterns`).
        mask_every: optimizer steps between mask updates.
        mask_decay: the decay of pruned weights, per unit of learning rate; 0 for none.
        bits_schedule: bits that weights have before those of their specs, descending, in equal parts of the
            steps in which masks move (`schedule.precision_of`); scales are searched anew at every change.
            Where a spec has a rate, the rate descends. Tables of rows are left out: of most rows nothing is
            learned that could make up for fewer bits.
        stochastic_bits: bits of which one is drawn for a weight and a step, of those above its own; until
            masks are frozen (stochastic precision, arXiv 2505.21245). Tables of rows are left out.
        stochastic_share: how often, a share of the steps.
    """

    scales: ScaleRule = "learned"
    masks: MaskRule = "sr-ste"
    mask_every: int = 1
    mask_decay: float = 10.0
    bits_schedule: tuple[int, ...] = ()
    stochastic_bits: tuple[int, ...] = ()
    stochastic_share: float = 0.5

    @property
    def covering(self) -> bool:
        """Whether scales always follow the largest weights, so that nothing is clipped and none is stored."""
        return self.scales in ("min-max", "rand")

    def __post_init__(self) -> None:
        for name, value, known in (("scales", self.scales, SCALE_RULES), ("masks", self.masks, MASK_RULES)):
            if value not in known:
                raise SpecError("unknown rule", where=name, expected=", ".join(known), found=repr(value))
        if self.mask_every < 1:
            raise SpecError(
                "unusable interval", where="mask_every", expected="at least 1", found=self.mask_every
            )
        for name, bits in (("bits_schedule", self.bits_schedule), ("stochastic_bits", self.stochastic_bits)):
            if any(not 1 <= each <= 8 for each in bits):
                raise SpecError("unsupported number of bits", where=name, expected="1 to 8", found=bits)
        if any(a <= b for a, b in pairwise(self.bits_schedule)):
            raise SpecError(
                "bits that do not descend", where="bits_schedule", expected="such as 8, 4, 3",
                found=self.bits_schedule,
            )  # fmt: skip


def to_matrix(weight: Tensor) -> Tensor:
    """The weight as `[rows, columns]`; a convolution `[out, in, kernel]` as `[out, kernel * in]`."""
    return weight if weight.dim() == 2 else weight.transpose(1, 2).reshape(weight.shape[0], -1)


def from_matrix(matrix: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `to_matrix`."""
    if len(shape) == 2:
        return matrix
    return matrix.reshape(shape[0], shape[2], shape[1]).transpose(1, 2).contiguous()


class WeightCompression(nn.Module):
    """One weight's mask and scales, and the forward pass that applies them.

    Attributes:
        spec: what the weight becomes.
        present: what it is now: the spec, but for gradual masks and descending bits on their way there.
        shape: the weight's shape.
        mask: bool `[rows, columns]`, True where kept; None if dense.
        log_scale: float32 `[rows, groups]` parameter, the logarithm of learned scales; else None.
        scale: float32 `[rows, groups]` buffer of searched scales; else None.
        zero: float32 `[rows, groups]` buffer of integer zero points; None if symmetric.
        progress: the share of the moving part of training that is over; None where that is over or has not
            begun, and nothing is drawn at random.
        drawn_bits: bits that were drawn for this step; None for those of `present`.
        patterns: the logits of learned masks; else None.
        column_scale: float32 `[columns]` buffer, exact in float16, chosen at the start; None without
            column scales. Masks, scales and codes are those of the weight divided by it.
        importance: float32 `[columns]` buffer that weighs the inputs when masks are chosen and
            clips are searched (ones unless calibrated).
    """

    mask: Tensor | None
    scale: Tensor | None
    zero: Tensor | None
    column_scale: Tensor | None
    importance: Tensor

    def __init__(
        self,
        weight: Tensor,
        spec: LayerSpec,
        options: StudentOptions,
        *,
        start: bool = True,
        octaves: Tensor | None = None,
    ) -> None:
        """Takes the weight's spec; `octaves` as for `make_student`, of no use without a rate."""
        super().__init__()
        self.spec = spec
        self.options = options
        self.octaves = octaves
        self.present = spec
        self.progress: float | None = None
        self.drawn_bits: int | None = None
        self.shape = weight.shape
        rows, columns = matrix_shape(weight.shape)
        device = weight.device
        mask = torch.ones(rows, columns, dtype=torch.bool, device=device)
        self.register_buffer("mask", None if spec.sparsity is None else mask)
        self.register_buffer("scale", None)
        self.register_buffer("zero", None)
        ones = torch.ones(columns, device=device)
        self.register_buffer("importance", ones)
        self.register_buffer("column_scale", ones.clone() if spec.column_scales else None)
        self.patterns: LearnedPatterns | None = None
        if options.masks == "gumbel" and spec.sparsity is not None:
            self.patterns = LearnedPatterns(rows, columns, spec.sparsity, device)
        self.log_scale: nn.Parameter | None = None
        quant = spec.quant
        if quant is not None:
            groups = spec.scale_groups(columns)
            if spec.rate is not None:
                self.scale = torch.ones(rows, groups, device=device)  # learning would change the rate
            elif options.scales == "learned":
                self.log_scale = nn.Parameter(torch.zeros(rows, groups, device=device))
            elif options.scales == "min-error":
                self.scale = torch.ones(rows, groups, device=device)
            if not quant.symmetric and not options.covering:
                self.zero = torch.zeros(rows, groups, device=device)
        if start:
            self.start(weight)

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        """Chooses mask and scales afresh for this weight."""
        matrix, quant = to_matrix(weight.detach()).float(), self.spec.quant
        if self.spec.rate is not None and quant is not None:
            rows = torch.ones(len(matrix), device=matrix.device)
            if self.octaves is not None:
                rows = torch.exp2(self.octaves.to(matrix.device))
            columns = q.column_scales(matrix, quant)
            self.set_scales(*q.rate_scales(matrix, quant, self.spec.rate, rows, columns))
            return
        if self.column_scale is not None and quant is not None:
            self.column_scale.copy_(q.column_scales(matrix, quant))
        if self.mask is not None:
            self.set_mask(self._largest(weight))
        self.search_scales(weight)

    @torch.no_grad()
    def update_mask(self, weight: Tensor) -> int:
        """Keeps the N largest weights of every M, or the likeliest; returns how many mask entries changed."""
        if self.mask is None:
            return 0
        mask = self._largest(weight) if self.patterns is None else self.patterns.likeliest()
        changed = int((mask != self.mask).sum())
        self.mask.copy_(mask)
        return changed

    def _largest(self, weight: Tensor) -> Tensor:
        scores = self.matrix(weight.detach()).float().abs() * self.importance.sqrt()
        if self.present.sparsity is None:
            return torch.ones_like(scores, dtype=torch.bool)
        return nm_mask(scores, self.present.sparsity)

    def spec_at(self, step: int, moving: int) -> LayerSpec:
        """What the weight is after so many optimizer steps, of which `moving` move masks and bits."""
        spec, sparsity = self.spec, self.spec.sparsity
        if sparsity is not None and self.options.masks == "gradual":
            kept = kept_of(step, moving, sparsity.n, sparsity.m)
            spec = replace(spec, sparsity=None if kept == sparsity.m else NM(kept, sparsity.m))
        if spec.precision is not None and self.options.bits_schedule:
            bits = precision_of(step, moving, spec.precision, self.options.bits_schedule)
            spec = spec if bits == spec.precision else spec.with_precision(int(bits))
        return spec

    @torch.no_grad()
    def set_mask(self, mask: Tensor) -> None:
        """Takes a given mask, bool `[rows, columns]`, as the present one; learned patterns start from it."""
        assert self.mask is not None
        self.mask.copy_(mask)
        if self.patterns is not None:
            self.patterns.start(mask)

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as `[rows, columns]`, divided by its column scales: what is pruned and quantized."""
        matrix = to_matrix(weight)
        return matrix if self.column_scale is None else matrix / self.column_scale

    def _pruned(self, weight: Tensor) -> Tensor:
        matrix = self.matrix(weight.detach()).float()
        return matrix if self.mask is None else torch.where(self.mask, matrix, torch.zeros_like(matrix))

    @torch.no_grad()
    def search_scales(self, weight: Tensor) -> None:
        """Chooses the scales afresh for this weight and the present mask and bits; those of a rate stay."""
        if self.spec.rate is not None:
            return
        quant = self.present.quant
        if quant is None or self.options.covering:
            return
        uniform = bool((self.importance == self.importance[0]).all())
        scale, zero = q.min_error(
            self._pruned(weight),
            self.mask,
            quant,
            self.spec.group,
            importance=None if uniform else self.importance,
        )
        self.set_scales(scale, zero=zero)

    @torch.no_grad()
    def set_scales(
        self, scale: Tensor, column_scale: Tensor | None = None, *, zero: Tensor | None = None
    ) -> None:
        """Takes given scales `[rows, groups]` (and of columns, and zero points) as the present ones."""
        if self.column_scale is not None and column_scale is not None:
            self.column_scale.copy_(column_scale)
        if self.log_scale is not None:
            self.log_scale.copy_(scale.log())
        elif self.scale is not None:
            self.scale.copy_(scale)
        if self.zero is not None and zero is not None:
            self.zero.copy_(zero)

    @torch.no_grad()
    def update(self, weight: Tensor) -> int:
        """A mask update during training; min-error scales follow it. Returns the changed entries."""
        changed = self.update_mask(weight)
        if self.options.scales == "min-error":
            self.search_scales(weight)
        return changed

    def scales(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scales and zero points in force, `[rows, groups]`, scales rounded as stored."""
        quant = self.present.quant
        assert quant is not None
        if self.log_scale is not None:
            return q.round_scale(self.log_scale.detach().exp(), quant.scale_bits), self.zero
        if self.scale is not None:
            return self._at_present_rate(self.scale, self.matrix(weight.detach())), self.zero
        return q.min_max(self._pruned(weight), quant, self.spec.group)

    def forward(self, weight: Tensor, rows: Tensor | None = None, *, settled: bool = False) -> Tensor:
        """The weight as the packed model will have it; while masks are learned or noise is added, as drawn.

        Args:
            weight: the master weight; with `rows`, only those rows of it, gathered.
            rows: int64 `[count]`, which rows of the full weight these are (embedding look-ups).
            settled: draw nothing at random, as in evaluation.

        Returns:
            A tensor of the weight's shape, in the autocast dtype if autocast is on.
        """
        random = self.progress is not None and self.training and not settled
        drawn = self._drawn_mask(rows) if random else None
        matrix, mask = self.matrix(weight), _select(self.mask, rows) if drawn is None else drawn > 0
        dtype = _computing_dtype(weight)
        if self.spec.quant is None:
            out = _round_to_half(matrix)
            out = _prune(out, mask) if drawn is None else out * drawn
            return from_matrix(out.to(dtype), weight.shape)
        # Column scales multiply last, in float32, as a reader of the packed model does it.
        inner = dtype if self.column_scale is None else torch.float32
        # A drawn mask is a factor, so that it gets a gradient; weights that it prunes get none.
        fixed = mask if drawn is None else None
        quant, log_scale, scale, zero = self._quantizer(matrix, mask, rows, random=random)
        # What does not train would be made no more robust by noise.
        if random and self.options.scales == "rand" and scale is not None and weight.requires_grad:
            out = _prune(q.add_noise(matrix, scale, self.spec.group).to(inner), fixed)
        else:
            out = _fake_quantize(matrix, log_scale, scale, fixed, zero, quant, self.spec.group, inner)
        if drawn is not None:
            out = out * drawn.to(inner)
        if self.column_scale is not None:
            out = (out * self.column_scale).to(dtype)
        return from_matrix(out, weight.shape)

    def _drawn_mask(self, rows: Tensor | None) -> Tensor | None:
        """A mask drawn from learned patterns; None without any, or where they do not learn: noise then."""
        if self.patterns is None or not self.patterns.logits.requires_grad:
            return None
        return self.patterns.draw(temperature(self.progress or 0.0), rows)

    def _quantizer(
        self, matrix: Tensor, mask: Tensor | None, rows: Tensor | None, *, random: bool
    ) -> tuple[Int, Tensor | None, Tensor | None, Tensor | None]:
        """The codes with the scales for them.

        Args:
            matrix: the weight over its column scales; with `rows`, those of its rows.
            mask: bool, of the matrix's shape, or None.
            rows: as for `forward`.
            random: take the bits that were drawn for this step, if any were.

        Returns:
            The codes, learned log scales or else scales, and zero points, as `FakeQuantize` takes them.
        """
        quant = self.present.quant
        drawn_bits = self.drawn_bits if random else None
        assert quant is not None
        if self.log_scale is None and self.scale is None:
            if drawn_bits is not None:
                quant = quant.with_bits(drawn_bits)
            return quant, None, *self._covering_scales(matrix, mask, quant)
        log_scale, scale, zero = (_select(value, rows) for value in (self.log_scale, self.scale, self.zero))
        if self.spec.rate is not None:
            return quant, None, self._at_present_rate(cast(Tensor, scale), matrix, drawn_bits), None
        if drawn_bits is None:
            return quant, log_scale, scale, zero
        # Learned scales learn for the bits that they are for.
        if log_scale is not None:
            scale = q.round_scale(log_scale.detach().exp(), quant.scale_bits)
        assert scale is not None
        finer = quant.with_bits(drawn_bits)
        return finer, None, *q.finer_scales(scale, zero, quant, finer)

    def _at_present_rate(self, scale: Tensor, matrix: Tensor, drawn: float | None = None) -> Tensor:
        """Scales of a rate, finer while a higher one is in force or was drawn; others as they are."""
        spec, now = self.spec, self.present
        if spec.rate is None or spec.quant is None or now.rate is None:
            return scale
        extra = (now.rate if drawn is None else drawn) - spec.rate
        return q.finer_rate_scales(scale, matrix, spec.quant, extra) if extra > 0 else scale

    def _covering_scales(
        self, matrix: Tensor, mask: Tensor | None, quant: Int
    ) -> tuple[Tensor, Tensor | None]:
        """Scales that follow the largest weights, with a gradient to these if the rule is "rand"."""
        group = self.spec.group
        pruned = matrix if mask is None else matrix.masked_fill(~mask, 0.0)
        scale, zero = q.min_max(pruned.detach(), quant, group)
        if self.options.scales == "rand" and matrix.requires_grad:
            scale = q.following(scale, pruned, quant, group)
        return scale, zero

    @torch.no_grad()
    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What is stored: codes uint8 `[rows, columns]`, scales float32 and zeros `[rows, groups]`."""
        quant = self.present.quant
        assert quant is not None
        scale, zero = self.scales(weight)
        return q.quantize(self._pruned(weight), scale, zero, quant, self.spec.group), scale, zero

    def extra_repr(self) -> str:
        """Shown in the model's printout."""
        return str(self.spec)


class _RoundToHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, matrix: Tensor) -> Tensor:
        return matrix.clamp(-kernels.MAX_SCALE, kernels.MAX_SCALE).half().to(matrix.dtype)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0]


class _Prune(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, matrix: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, matrix, torch.zeros_like(matrix))

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


# torch leaves `apply` untyped.
_round_to_half: Callable[..., Tensor] = _RoundToHalf.apply
_prune_straight_through: Callable[..., Tensor] = _Prune.apply
_fake_quantize: Callable[..., Tensor] = q.FakeQuantize.apply


def _prune(matrix: Tensor, mask: Tensor | None) -> Tensor:
    """The matrix with zeros where the mask is False; its gradient passes straight through."""
    return matrix if mask is None else _prune_straight_through(matrix, mask)


def _select(values: Tensor | None, rows: Tensor | None) -> Tensor | None:
    """These rows of what is given by row; all without `rows`."""
    return values if values is None or rows is None else values[rows]


def _computing_dtype(weight: Tensor) -> torch.dtype:
    if weight.is_meta:  # for which torch has no autocast
        return weight.dtype
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


class CompressedLinear(nn.Linear):
    """A linear layer that multiplies by its compressed weight.

    The output projection that is tied to the token embedding shares the embedding's
    `WeightCompression` without registering it twice (`borrowed`).
    """

    compression: WeightCompression

    @classmethod
    def wrap(
        cls, layer: nn.Linear, compression: WeightCompression, *, borrowed: bool = False
    ) -> CompressedLinear:
        """Makes one around the layer's own parameters."""
        new = cls(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        new.weight, new.bias = layer.weight, layer.bias
        if borrowed:
            new.__dict__["compression"] = compression
        else:
            new.compression = compression
        return new.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        return nn.functional.linear(input, self.compression(self.weight), self.bias)


class CompressedConv1d(nn.Conv1d):
    """A 1-D convolution with a compressed weight."""

    compression: WeightCompression

    @classmethod
    def wrap(cls, layer: nn.Conv1d, compression: WeightCompression) -> CompressedConv1d:
        """Makes one around the layer's own parameters."""
        new = cls(
            layer.in_channels,
            layer.out_channels,
            cast("tuple[int]", layer.kernel_size),
            stride=cast("tuple[int]", layer.stride),
            padding=cast("tuple[int]", layer.padding),
            dilation=cast("tuple[int]", layer.dilation),
            groups=layer.groups,
            bias=layer.bias is not None,
            padding_mode=layer.padding_mode,
            device="meta",
        )
        new.weight, new.bias, new.compression = layer.weight, layer.bias, compression
        return new.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """`[batch, in, frames]` to `[batch, out, frames']`."""
        out: Tensor = self._conv_forward(input, self.compression(self.weight), self.bias)
        return out


class CompressedEmbedding(nn.Embedding):
    """A token embedding that looks up compressed rows; only the rows asked for are computed."""

    compression: WeightCompression

    @classmethod
    def wrap(cls, layer: nn.Embedding, compression: WeightCompression) -> CompressedEmbedding:
        """Makes one around the layer's own parameters."""
        new = cls(layer.num_embeddings, layer.embedding_dim, layer.padding_idx, device="meta")
        new.weight, new.compression = layer.weight, compression
        return new.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """Token ids `[...]` to `[..., dimension]`."""
        rows = input.reshape(-1)
        # `embedding`, not indexing: its gradient is summed deterministically on every device.
        values: Tensor = self.compression(nn.functional.embedding(rows, self.weight, self.padding_idx), rows)
        return values.reshape(*input.shape, -1)


class CompressedPositions(nn.Embedding):
    """A learned position table with the call signature of Transformers' Whisper decoder."""

    compression: WeightCompression

    @classmethod
    def wrap(cls, layer: nn.Embedding, compression: WeightCompression) -> CompressedPositions:
        """Makes one around the layer's own parameters."""
        new = cls(layer.num_embeddings, layer.embedding_dim, device="meta")
        new.weight, new.compression = layer.weight, compression
        return new.train(layer.training)

    def forward(
        self, input: Tensor, past_key_values_length: int = 0, position_ids: Tensor | None = None
    ) -> Tensor:
        """Positions of token ids `[batch, tokens]`."""
        table: Tensor = self.compression(self.weight)
        if position_ids is not None:
            return table[position_ids]
        return table[past_key_values_length : past_key_values_length + input.shape[1]]


CompressedLayer = CompressedLinear | CompressedConv1d | CompressedEmbedding | CompressedPositions


def wrap(layer: nn.Module, kind: str, compression: WeightCompression) -> CompressedLayer:
    """The compressed layer in the place of a dense one.

    Raises:
        ModelError: the layer is not of this kind.
    """
    if kind == "linear" and isinstance(layer, nn.Linear):
        return CompressedLinear.wrap(layer, compression)
    if kind in ("conv1d", "linear") and isinstance(layer, nn.Conv1d):
        return CompressedConv1d.wrap(layer, compression)
    if kind == "embedding" and isinstance(layer, nn.Embedding):
        return CompressedEmbedding.wrap(layer, compression)
    if kind == "positions" and isinstance(layer, nn.Embedding):
        return CompressedPositions.wrap(layer, compression)
    raise ModelError(f"cannot compress a {type(layer).__name__} as {kind}")


def make_student(
    teacher: nn.Module,
    compressible: Mapping[str, str],
    spec: CompressionSpec,
    options: StudentOptions | None = None,
    *,
    computed: Collection[str] = (),
    octaves: Mapping[str, Tensor] | None = None,
    start: bool = True,
) -> nn.Module:
    """A trainable copy of the teacher whose covered layers prune and quantize in the forward pass.

    Args:
        teacher: the dense model; not changed.
        compressible: weight name to kind, as the model's adapter lists them.
        spec: what each weight becomes.
        options: how scales and masks behave.
        computed: names of parameters that are computed, never stored nor trained (sinusoids).
        octaves: weight name to how much coarser each of its rows may be, for specs with a rate; see
            `quantize.rate_scales`.
        start: choose masks and scales from the teacher's weights; False where saved ones follow.

    Returns:
        A model of the teacher's class, in training mode.

    Raises:
        ModelError: a listed weight is not there or not of its kind.
        SpecError: the spec compresses something, but no weight of this model.
    """
    options = options or StudentOptions()
    kinds = {name.removesuffix(".weight"): kind for name, kind in compressible.items()}
    specs = {name: spec.resolve(name, kind) for name, kind in kinds.items()}
    wanted = [rule for rule in spec.rules if not rule.spec.is_kept]
    if wanted and all(each.is_kept for each in specs.values()):
        raise SpecError(
            "the spec compresses no weight of this model",
            where=", ".join(f"{rule.match} ({rule.kind or 'any kind'})" for rule in wanted),
            expected=f"a rule for one of {len(kinds)} weights, such as {next(iter(kinds), 'none')}",
            remedy="'usmlite info MODEL' lists the weights and what becomes of them.",
        )
    student = copy.deepcopy(teacher)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and name not in computed)
    tied: dict[int, WeightCompression] = {}
    for name, kind in kinds.items():
        if specs[name].is_kept:
            continue
        layer = student.get_submodule(name)
        weight = cast(nn.Parameter, layer.weight)
        compression = WeightCompression(
            weight.detach(),
            specs[name],
            replace(options, bits_schedule=(), stochastic_bits=()) if kind in TABLES else options,
            start=start,
            octaves=(octaves or {}).get(f"{name}.weight"),
        )
        tied[id(weight)] = compression
        student.set_submodule(name, wrap(layer, kind, compression))
    # A layer that shares a compressed weight (the tied output projection) must compute with it too.
    for name, layer in list(student.named_modules()):
        shared = tied.get(id(getattr(layer, "weight", None)))
        if shared is not None and type(layer) is nn.Linear:
            student.set_submodule(name, CompressedLinear.wrap(layer, shared, borrowed=True))
    return student.train()


def train_compression(student: nn.Module, *, network: bool = False) -> None:
    """Lets what the compression draws at random be drawn; the network itself computes as it will be used.

    So there is no dropout and no dropped layer, batch norms keep the statistics of the speech that the model
    was trained on, and models that mask their own features (from NumPy's global generator) do not.

    Args:
        student: from `make_student`.
        network: let the network draw what it draws in training too, such as dropout.
    """
    student.train(network)
    for module in student.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    let_recurrent_learn(student)
    for _, layer in compressed_layers(student):
        layer.compression.train()


def let_recurrent_learn(model: nn.Module) -> None:
    """Puts recurrent layers without dropout in training mode: the same, but cuDNN then has gradients."""
    for module in model.modules():
        if isinstance(module, nn.RNNBase) and not module.dropout:
            module.train()


def compressed_layers(student: nn.Module) -> Iterator[tuple[str, CompressedLayer]]:
    """Name and layer of every compressed weight, tied ones once."""
    for name, layer in student.named_modules():
        if isinstance(layer, CompressedLayer) and "compression" in layer._modules:
            yield name, layer


def fake_quantized(layer: CompressedLayer) -> Tensor:
    """The weight that the packed model will hold, float32, of the layer's weight's shape."""
    with torch.no_grad(), torch.autocast(layer.weight.device.type, enabled=False):
        return cast(Tensor, layer.compression(layer.weight, settled=True))


@torch.no_grad()
def dense_equivalent(student: nn.Module, teacher: nn.Module) -> nn.Module:
    """A plain model of the teacher's class with the weights the student computes with.

    For whatever runs the model many times without training it: decoding, evaluation, export.

    Args:
        student: made from this teacher; not changed.
        teacher: gives the layers; not changed.

    Returns:
        A dense float32 model in eval mode.
    """
    dense = copy.deepcopy(teacher)
    own = dict(dense.named_parameters())
    compressed = {f"{name}.weight": layer for name, layer in compressed_layers(student)}
    for name, value in student.named_parameters():
        if name in own:
            own[name].copy_(fake_quantized(compressed[name]) if name in compressed else value)
    return dense.eval()


@torch.no_grad()
def round_kept(student: nn.Module) -> None:
    """Rounds the tensors that are stored as they are to float16, as the packed file holds them.

    Called once when training ends, so that the student that is evaluated equals what ships.
    """
    compressed = {id(layer.weight) for _, layer in compressed_layers(student)}
    own = {id(p) for _, layer in compressed_layers(student) for p in layer.compression.parameters()}
    for parameter in student.parameters():
        if id(parameter) not in compressed and id(parameter) not in own:
            parameter.copy_(parameter.clamp(-kernels.MAX_SCALE, kernels.MAX_SCALE).half())


def layer_specs(student: nn.Module) -> dict[str, LayerSpec]:
    """Module name to layer spec of every compressed weight."""
    return {name: layer.compression.spec for name, layer in compressed_layers(student)}
