"""What a run would take before anything is trained: memory of every device, time, and bytes of the result.

Nothing is loaded but a configuration. The models are built without memory for their weights, one training
step of them is traced on the meta device (`footprint`), and the parts are added up for each engine.
docs/scale.md says what was compared with measurements, and how near it came.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from usmlite import student as students
from usmlite.devices import Device
from usmlite.distill import Distillation
from usmlite.errors import ModelError, RecipeError
from usmlite.finetune import autocast_precision, choose_trained, loss_weights, recompute_layers
from usmlite.footprint import AsOnADevice, Footprint, trace
from usmlite.info import describe_weights
from usmlite.load import student_options
from usmlite.memory import resident_memory
from usmlite.models import Adapter, adapter_class, load_teacher, read_configuration, skeleton
from usmlite.models.packages import PACKAGED
from usmlite.models.whisper import read_json
from usmlite.pack import sample_coding
from usmlite.recipe import Recipe
from usmlite.spec import LayerSpec, matrix_shape
from usmlite.tables import readable_bytes

ENGINES = ("single", "ddp", "fsdp2")
EFFICIENCY = 0.35
"""Share of a device's stated speed that training reaches, unless measured; 0.3 to 0.5 is usual."""
# Beside PyTorch's own tensors, on a GPU: the driver's context, libraries and their workspaces.
_CONTEXT_BYTES = 1 << 30
# Layers of the cut-down models that are traced, and timed, from which the full one is extrapolated.
_SHALLOW, _TIMED = 2, (1, 2)
# What configurations with an encoder and a decoder call the numbers of their layers.
_STACKS = (
    ("encoder_layers", "decoder_layers"),
    ("encoder_num_hidden_layers", "decoder_num_hidden_layers"),
)
_WINDOW_SECONDS = 30
_FLOAT, _MOMENTS = 4, 8  # bytes a parameter; AdamW has two numbers


@dataclass(frozen=True)
class Memory:
    """Bytes of one device under one engine setting.

    Attributes:
        engine: "single", "ddp" or "fsdp2".
        recompute: whether layers' activations are computed again in the backward pass.
        teacher: its weights.
        student: float master weights, learned scales among them.
        masks: masks, searched scales and other buffers of the student.
        gradients: of what is trained; under DDP with its buckets.
        optimizer: AdamW's moments, and the running average where there is one.
        activations: the most that a step holds beside all these, gathered weights among them.
        process: what Python, PyTorch and a GPU's context hold.
        peak: the most at any moment. Less than the sum: gradients grow as activations go.
    """

    engine: str
    recompute: bool
    teacher: int
    student: int
    masks: int
    gradients: int
    optimizer: int
    activations: int
    process: int
    peak: int


@dataclass(frozen=True)
class Plan:
    """What a run would take.

    Attributes:
        source: the model.
        parameters: of the dense model, tied ones once.
        compressed: of these, in weights that the spec compresses.
        trained: numbers that the optimizer updates, learned scales among them.
        float32_bytes: the dense model in float32.
        packed_bytes: the packed file with fixed-width codes.
        coded_bytes: about what it takes with entropy coding; None without.
        device: what memory and time are for.
        batch: windows of 30 seconds a device and step.
        operations: multiplications and additions a device and step, without recomputation.
        memory: one for each engine setting.
        seconds_per_step: about; by engine setting as in `memory`, None where no speed is known.
        how: where the speed comes from, in words.
        steps: of the recipe.
        speech_hours: the speech asked about; None for none.
    """

    source: str
    parameters: int
    compressed: int
    trained: int
    float32_bytes: int
    packed_bytes: int
    coded_bytes: int | None
    device: Device
    batch: int
    operations: float
    memory: tuple[Memory, ...]
    seconds_per_step: tuple[float | None, ...]
    how: str
    steps: int
    speech_hours: float | None = None

    @property
    def steps_for_speech(self) -> int | None:
        """Steps that hear the speech asked about once; None without any."""
        if self.speech_hours is None:
            return None
        windows = self.speech_hours * 3600 / _WINDOW_SECONDS
        return math.ceil(windows / (self.batch * self.device.count))

    def hours(self, setting: int) -> float | None:
        """Hours of the recipe's steps, or of hearing the speech once, under one of the settings."""
        seconds = self.seconds_per_step[setting]
        steps = self.steps if self.speech_hours is None else self.steps_for_speech
        return None if seconds is None or steps is None else seconds * steps / 3600

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        values = asdict(self)
        values["settings"] = [
            {**memory, "seconds_per_step": seconds, "hours": self.hours(i), "fits": self.fits(i)}
            for i, (memory, seconds) in enumerate(
                zip(values.pop("memory"), values.pop("seconds_per_step"), strict=True)
            )
        ]
        values["steps_for_speech"] = self.steps_for_speech
        return values

    def summary(self) -> list[str]:
        """What the table does not say, in words."""
        heard = f"{self.batch * self.device.count} windows of 30 s a step"
        lines = [
            f"Model     {self.parameters:,} parameters, {self.compressed:,} of them in weights that are "
            f"compressed; {self.trained:,} numbers are trained",
            f"Packed    {readable_bytes(self.packed_bytes)}, "
            f"{100 * self.packed_bytes / self.float32_bytes:.2f} % of float32"
            + (f"; with entropy coding about {readable_bytes(self.coded_bytes)}" if self.coded_bytes else ""),
            f"Step      {self.operations / 1e12:.3g} TFLOP a device; {heard}",
            f"Speed     {self.how}",
        ]
        if self.speech_hours is None:
            return [*lines, f"Hours     of the recipe's {self.steps} steps"]
        return [
            *lines,
            f"Hours     to hear {self.speech_hours:g} h of speech once: {self.steps_for_speech} steps",
        ]

    def fits(self, setting: int) -> bool:
        """Whether the device has that much memory."""
        return self.memory[setting].peak <= self.device.memory


@dataclass(frozen=True)
class Outline:
    """A model by its configuration alone.

    Attributes:
        source: what it was asked for by.
        config: its configuration.
        adapter: answers questions about weights.
    """

    source: str
    config: PretrainedConfig
    adapter: Adapter

    def at_depth(self, *depths: int) -> Outline:
        """The same with at most so many layers in every stack: one number for all, or one for each."""
        config = copy.deepcopy(self.config)
        stacks = [
            (part, name)
            for part in (config, getattr(config, "encoder_config", None))
            for name in _depths(part)
        ]
        given = depths * len(stacks) if len(depths) == 1 else depths
        for (part, name), depth in zip(stacks, given, strict=True):
            setattr(part, name, min(depth, getattr(part, name)))
        return Outline(self.source, config, type(self.adapter).of_weights(config))

    @property
    def depths(self) -> list[int]:
        """Layers of each stack."""
        parts = (self.config, getattr(self.config, "encoder_config", None))
        return [int(getattr(part, name)) for part in parts for name in _depths(part)]


def _depths(config: Any) -> list[str]:
    if config is None:
        return []
    for names in _STACKS:
        if all(hasattr(config, name) for name in names):
            return list(names)
    return ["num_hidden_layers"] if "num_hidden_layers" in config.to_dict() else []


def read_outline(source: str | Path) -> Outline:
    """A model's configuration: from config.json, a directory, a name or a hub id; weights are not needed.

    Raises:
        ModelError: unknown, unsupported or damaged.
    """
    path = Path(source).expanduser()
    file = path if path.is_file() else path / "config.json"
    if not (isinstance(source, str) and source in PACKAGED):
        if file.is_file() and not (path / "model.bin").is_file():
            config = read_configuration(read_json(file), file)
            return Outline(str(source), config, adapter_class(config.model_type, file).of_weights(config))
        if not path.exists() and str(source).count("/") == 1:
            return _from_hub(str(source))
    teacher = load_teacher(source)
    found = teacher.model.config
    return Outline(str(source), found, type(teacher.adapter).of_weights(found))


def _from_hub(name: str) -> Outline:
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            "no such configuration", where=name, found=str(error).splitlines()[0],
            remedy="Give a config.json, a model's directory, a name or a hub id.",
        ) from error  # fmt: skip
    return Outline(name, config, adapter_class(config.model_type, name).of_weights(config))


def make_plan(
    source: str | Path,
    recipe: Recipe,
    device: Device,
    *,
    engines: Sequence[str] = ENGINES,
    efficiency: float = EFFICIENCY,
    speech_hours: float | None = None,
    measure: bool = False,
) -> Plan:
    """Plans a run of a recipe.

    Args:
        source: see `read_outline`.
        recipe: what is done. With a target size, bytes are those of its one-line spec.
        device: where; `count` of them side by side.
        engines: settings to plan.
        efficiency: share of the device's stated speed that is reached, where nothing is measured.
        speech_hours: plan the time to hear so much speech once, instead of the recipe's steps.
        measure: time real steps of a cut-down model on this machine.

    Raises:
        ModelError: the model is unknown or of an unsupported kind.
        RecipeError: an unknown engine, or a share that is none.
        SpecError: the spec compresses nothing of this model.
    """
    unknown = sorted(set(engines) - set(ENGINES))
    if unknown or not engines:
        raise RecipeError(
            "unknown engine", where="--engine", expected=", ".join(ENGINES), found=", ".join(unknown)
        )
    if not 0 < efficiency <= 1:
        raise RecipeError("out of range", where="--efficiency", expected="a share, 0 to 1", found=efficiency)
    outline = read_outline(source)
    teacher, student = _models(outline, recipe)
    bytes_ = _Bytes.of(teacher, student, recipe)
    half = _half(recipe, device)
    plain = _trace(outline, recipe, device, half=half, recompute=False)
    seldom = _trace(outline, recipe, device, half=half, recompute=True)
    settings = [
        _memory(engine, recompute, bytes_, seldom if recompute else plain, device, recipe)
        for engine in engines
        for recompute in (False, True)
    ]
    speed, how = _speed(outline, recipe, device, efficiency, measure)
    done = plain.operations * recipe.training.accumulate
    again = seldom.operations * recipe.training.accumulate
    seconds = tuple(
        None if speed is None else _seconds(each, again if each.recompute else done, speed, device, bytes_)
        for each in settings
    )
    packed, coded = _packed_bytes(teacher, outline, recipe)
    specs = students.layer_specs(student)
    compressed = sum(cast(Tensor, student.get_submodule(name).weight).numel() for name in specs)
    return Plan(
        str(source), bytes_.parameters, compressed, bytes_.trained, _FLOAT * bytes_.parameters, packed, coded,
        device, recipe.training.batch_size * recipe.training.accumulate, done, tuple(settings), seconds, how,
        recipe.training.steps, speech_hours,
    )  # fmt: skip


def _models(outline: Outline, recipe: Recipe) -> tuple[nn.Module, nn.Module]:
    """Teacher and student on the meta device; what is trained requires gradients."""
    adapter, teacher = outline.adapter, skeleton(outline.config)
    teacher.requires_grad_(False)
    student = students.make_student(
        teacher, adapter.compressible(teacher), recipe.spec.build(), student_options(recipe),
        computed=adapter.computed(teacher), start=False,
    )  # fmt: skip
    choose_trained(student, recipe.training)
    students.train_compression(student)
    return teacher, student


def _half(recipe: Recipe, device: Device) -> bool:
    if recipe.training.precision != "auto":
        return recipe.training.precision == "bf16"
    if device.name == "this processor":
        return autocast_precision("auto", torch.device("cpu")) == "bf16"
    return device.half


# Memory


@dataclass(frozen=True)
class _Bytes:
    parameters: int
    teacher: int
    student: int
    masks: int
    trained: int
    average: int
    largest_unit: int

    @classmethod
    def of(cls, teacher: nn.Module, student: nn.Module, recipe: Recipe) -> _Bytes:
        held = {id(p): p for p in student.parameters()}.values()
        trained = sum(p.numel() for p in held if p.requires_grad)
        units = _units(student)
        return cls(
            sum(p.numel() for p in teacher.parameters()),
            _size(teacher.parameters()) + _size(teacher.buffers()),
            _size(held),
            _size(student.buffers()),
            trained,
            _FLOAT * trained if recipe.training.average else 0,
            max(units, default=0),
        )


def _size(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _units(student: nn.Module) -> list[int]:
    """Bytes of what FSDP2 gathers at once: each layer, and the rest."""
    layers = [m for m in student.modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    outermost = [layer for stack in layers for layer in stack]
    seen = {id(p) for layer in outermost for p in layer.parameters()}
    rest = _size(p for p in student.parameters() if id(p) not in seen)
    return [_size(layer.parameters()) for layer in outermost] + [rest]


def _memory(
    engine: str, recompute: bool, sizes: _Bytes, seen: _Traced, device: Device, recipe: Recipe
) -> Memory:
    process = resident_memory() if device.name == "this processor" else _CONTEXT_BYTES
    sharded = device.count if engine == "fsdp2" else 1
    gradients = _FLOAT * sizes.trained
    gathered = 0
    if engine == "fsdp2" and sharded > 1:
        # The layer at work and the next one, of student and teacher, and one layer's whole gradients.
        gathered = 3 * sizes.largest_unit + 2 * sizes.largest_unit
    held = (
        (sizes.teacher + sizes.student) // sharded
        + sizes.masks
        + (_MOMENTS * sizes.trained + sizes.average) // sharded
        + (gradients if engine == "ddp" else 0)  # its buckets are there from the first step on
    )
    peak = round(seen.whole if sharded == 1 else seen.share) + gathered
    evaluation = sizes.teacher + sizes.average // sharded if recipe.data.dev is not None else 0
    return Memory(
        engine, recompute, sizes.teacher // sharded, sizes.student // sharded, sizes.masks,
        gradients // sharded + (gradients if engine == "ddp" else 0),
        (_MOMENTS * sizes.trained + sizes.average) // sharded, round(seen.activations) + gathered, process,
        process + held + max(peak, evaluation),
    )  # fmt: skip


@dataclass(frozen=True)
class _Traced:
    """Of one step: operations, and the most bytes without gradients, with them, and with a device's share."""

    operations: float
    activations: float
    whole: float
    share: float

    @classmethod
    def of(cls, found: Footprint, devices: int) -> _Traced:
        return cls(found.operations, found.activations, found.peak(), found.peak(gradients=1 / devices))

    def plus(self, other: _Traced, times: float) -> _Traced:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return _Traced(*(mine + times * theirs for mine, theirs in pairs))


def _trace(outline: Outline, recipe: Recipe, device: Device, *, half: bool, recompute: bool) -> _Traced:
    """A step of the full model, from those of a few layers: every layer is like the others."""

    def at(*depths: int) -> _Traced:
        cut = outline.at_depth(*depths)
        teacher, student = _models(cut, recipe)
        objective = _objective(cut, teacher, student, recipe)
        if recompute:
            recompute_layers(student, cut.adapter.layers(), lambda: AsOnADevice(half))
        given = _step_inputs(cut.adapter, recipe.training.batch_size)
        held = _held(teacher, student, given)
        found = trace(lambda: objective(**given)["loss"].backward(), held, half=half)
        return _Traced.of(found, device.count)

    return _extrapolated(outline, at)


def _extrapolated(outline: Outline, at: Callable[..., _Traced]) -> _Traced:
    """What is linear in the depth of every stack, of the full model."""
    depths = outline.depths
    if max(depths, default=1) <= _SHALLOW + 1:
        return at(max(depths, default=1))
    shallow = at(_SHALLOW)
    if len(set(depths)) == 1:
        return shallow.plus(at(_SHALLOW + 1).plus(shallow, -1.0), depths[0] - _SHALLOW)
    found = shallow
    for number, depth in enumerate(depths):
        if depth > _SHALLOW:
            more = at(*(_SHALLOW + (each == number) for each in range(len(depths))))
            found = found.plus(more.plus(shallow, -1.0), depth - _SHALLOW)
    return found


def _objective(outline: Outline, teacher: nn.Module, student: nn.Module, recipe: Recipe) -> Distillation:
    adapter = outline.adapter
    return Distillation(
        student, teacher, loss_weights(recipe.training), network=adapter.network, layers=adapter.layers(),
        attentions=adapter.attentions(),
    )  # fmt: skip


def _held(teacher: nn.Module, student: nn.Module, given: Mapping[str, Tensor]) -> list[Tensor]:
    models = [tensor for model in (teacher, student) for tensor in (*model.parameters(), *model.buffers())]
    return [*models, *given.values()]


def _step_inputs(adapter: Adapter, rows: int) -> dict[str, Tensor]:
    batch = adapter.outline(rows)
    heard = batch.pop(adapter.main_input)
    return {"heard": heard, "taught": heard, **batch}


# Time


def _speed(
    outline: Outline, recipe: Recipe, device: Device, efficiency: float, measure: bool
) -> tuple[float | None, str]:
    """Operations a second that a step reaches, and where that comes from."""
    if measure:
        return _measured(outline, recipe)
    if device.operations is None:
        return None, "no speed is known for this device: --measure times real steps on this machine"
    speed = efficiency * device.operations
    return speed, f"{100 * efficiency:g} % of the {device.operations / 1e12:g} TFLOP/s that its maker states"


def _measured(outline: Outline, recipe: Recipe, repeats: int = 2) -> tuple[float, str]:
    """Operations a second of real steps of one window; what one layer more takes is what counts."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = autocast_precision(recipe.training.precision, device) == "bf16"
    depths = [depth for depth in _TIMED if depth <= max(outline.depths, default=1)]
    seconds, operations = [], []
    for depth in depths:
        cut = outline.at_depth(depth)
        seconds.append(_time_steps(cut, recipe, device, half, repeats))
        teacher, student = _models(cut, recipe)
        objective, given = _objective(cut, teacher, student, recipe), _step_inputs(cut.adapter, 1)

        def step(objective: Distillation = objective, given: dict[str, Tensor] = given) -> None:
            objective(**given)["loss"].backward()

        operations.append(trace(step, _held(teacher, student, given), half=half).operations)
    speed = operations[-1] / seconds[-1]
    if len(depths) > 1 and seconds[1] > seconds[0]:
        speed = (operations[1] - operations[0]) / (seconds[1] - seconds[0])
    text = f"{speed / 1e9:.1f} GFLOP/s measured here: {repeats} steps of one window with {depths} layers"
    return speed, text


def _time_steps(outline: Outline, recipe: Recipe, device: torch.device, half: bool, repeats: int) -> float:
    """Seconds of the fastest real step, random weights and noise; the optimizer's part is in it."""
    teacher, student = _models(outline, recipe)
    for model in (teacher, student):
        _fill(model, device)
    objective = _objective(outline, teacher, student, recipe)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
    given = {name: _noise(value, device) for name, value in _step_inputs(outline.adapter, 1).items()}
    best = math.inf
    for _ in range(repeats + 1):  # the first one warms up
        with _timed(device) as taken:
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                loss = objective(**given)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        best = min(best, taken[0])
    return best


@contextmanager
def _timed(device: torch.device) -> Iterator[list[float]]:
    taken = [0.0]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    yield taken
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    taken[0] = time.perf_counter() - started


@torch.no_grad()
def _fill(model: nn.Module, device: torch.device) -> None:
    """Gives a model on the meta device memory and small random weights; ties stay."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, empty in tensors.items():
                if empty is None:
                    continue
                if id(empty) not in made:
                    value = _noise(empty, device, 0.02)
                    trained = empty.requires_grad
                    is_parameter = isinstance(empty, nn.Parameter)
                    made[id(empty)] = nn.Parameter(value, requires_grad=trained) if is_parameter else value
                tensors[name] = cast(Any, made[id(empty)])


def _noise(outline: Tensor, device: torch.device, size: float = 1.0) -> Tensor:
    if not outline.is_meta:
        return outline.to(device)
    if outline.is_floating_point():
        return size * torch.rand(outline.shape, device=device, dtype=outline.dtype)
    return torch.ones(outline.shape, device=device, dtype=outline.dtype)


def _seconds(setting: Memory, operations: float, speed: float, device: Device, sizes: _Bytes) -> float:
    """Of one step: computing, or sending where that takes longer; both go on at once."""
    computing = operations / speed
    if device.count == 1 or device.link is None or setting.engine == "single":
        return computing
    # DDP sends every gradient twice round; FSDP2 gathers all weights twice and sends gradients once.
    passes = 2.0 * _FLOAT * sizes.trained
    if setting.engine == "fsdp2":
        passes = 2.0 * (sizes.student + sizes.teacher) + _FLOAT * sizes.trained
    return max(computing, passes * (device.count - 1) / device.count / device.link)


# Bytes


def _packed_bytes(teacher: nn.Module, outline: Outline, recipe: Recipe) -> tuple[int, int | None]:
    """Of the packed file: with fixed-width codes, and about with entropy coding."""
    spec = recipe.spec.build()
    fixed = describe_weights(teacher, outline.adapter, spec, outline.source).file_bytes
    if not recipe.spec.entropy_coding:
        return fixed, None
    ratios: dict[LayerSpec, float] = {}
    saved = 0.0
    for name, kind in outline.adapter.compressible(teacher).items():
        layer = spec.resolve(name.removesuffix(".weight"), kind)
        if layer.quant is None or layer.rate is not None:
            continue  # the bytes of a rate are those with entropy coding already
        if layer not in ratios:
            ratios[layer] = sample_coding(layer, student_options(recipe))
        rows, columns = matrix_shape(teacher.get_parameter(name).shape)
        saved += (1.0 - ratios[layer]) * layer.bytes(rows, columns)
    return fixed, round(fixed - saved)


def plan_table(found: Plan) -> Table:
    """Memory of one device, in GB, and time: a line for each engine setting."""
    count = f"{found.device.count} x " if found.device.count > 1 else ""
    title = f"{found.source} on {count}{found.device.name}: GB a device, and time"
    table = Table(title=title, title_justify="left")
    for name in ("engine", "recompute"):
        table.add_column(name)
    for name in (
        "teacher",
        "student",
        "masks",
        "grads",
        "AdamW",
        "activ.",
        "process",
        "peak",
        "fits",
        "s/step",
    ):
        table.add_column(name, justify="right")
    table.add_column("hours", justify="right")
    for index, memory in enumerate(found.memory):
        parts = (
            memory.teacher, memory.student, memory.masks, memory.gradients, memory.optimizer,
            memory.activations, memory.process, memory.peak,
        )  # fmt: skip
        times = (found.seconds_per_step[index], found.hours(index))
        table.add_row(
            memory.engine,
            "yes" if memory.recompute else "no",
            *(f"{part / 1e9:.2f}" for part in parts),
            "yes" if found.fits(index) else "no",
            *("" if each is None else f"{each:.3g}" for each in times),
        )
    return table
