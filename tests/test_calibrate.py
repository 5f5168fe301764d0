"""Calibration: the chosen weights are exactly the student's, and they are better than the plain start."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperForConditionalGeneration

from correlated import correlated, output_error
from usmlite.calibrate import METHODS, calibrate
from usmlite.errors import DataError, ModelError, SpecError
from usmlite.moments import collect_moments, input_rows
from usmlite.movement import attach, update_masks
from usmlite.solve import solve
from usmlite.spec import NM, CompressionSpec, Int, LayerSpec, Rule
from usmlite.student import (
    SCALE_RULES,
    StudentOptions,
    compressed_layers,
    fake_quantized,
    make_student,
    to_matrix,
)

SPECS = [
    LayerSpec(Int(4), NM(2, 4)),
    LayerSpec(Int(4)),
    LayerSpec(Int(3), None, 16),
    LayerSpec(Int(2, grid="midrise"), NM(2, 4), 32),
    LayerSpec(Int(2), NM(1, 4)),
    LayerSpec(Int(2, grid="ternary")),
    LayerSpec(Int(2, grid="ternary"), NM(2, 4), 16),
    LayerSpec(Int(1)),
    LayerSpec(Int(1, symmetric=False), NM(1, 2)),
    LayerSpec(Int(4, symmetric=False), NM(2, 4), 8),
    LayerSpec(Int(3, symmetric=False), NM(3, 7), 5),
    LayerSpec(Int(5), NM(4, 32), 6),
    LayerSpec(Int(8)),
    LayerSpec(None, NM(2, 4)),
]


class Wrapped(nn.Module):
    """A model of one layer, called by keyword as the real ones are."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs)


def student_of(teacher: nn.Module, spec: LayerSpec, kind: str = "linear", **options: str) -> nn.Module:
    return make_student(
        teacher, {"layer.weight": kind}, CompressionSpec((Rule("*", spec),)), StudentOptions(**options)
    )


@pytest.mark.parametrize("scales", SCALE_RULES)
@pytest.mark.parametrize("columns", [64, 45])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_student_computes_with_exactly_the_solution(spec: LayerSpec, columns: int, scales: str) -> None:
    torch.manual_seed(1)
    teacher = Wrapped(nn.Linear(columns, 33, bias=False))
    inputs = correlated(300, columns)
    student = student_of(teacher, spec, scales=scales)
    report = calibrate(student, teacher, [{"inputs": inputs}], method="hessian")
    ((_, layer),) = compressed_layers(student)
    moments, _ = collect_moments(teacher, ["layer"], [{"inputs": inputs}])
    solution = solve(
        teacher.layer.weight.detach(),
        moments["layer"].hessian,
        spec,
        importance=layer.compression.importance,
        covering=scales in ("min-max", "rand"),
    )
    assert torch.equal(fake_quantized(layer), solution.values)
    mask = layer.compression.mask
    if spec.sparsity is not None:
        assert mask is not None
        padded = nn.functional.pad(mask, (0, -columns % spec.sparsity.m))
        kept = padded.reshape(33, -1, spec.sparsity.m).sum(dim=-1)
        assert (kept[:, :-1] == spec.sparsity.n).all()
        assert (solution.values[~mask] == 0).all()
        before = mask.clone()
        assert update_masks(student) == 0
        assert torch.equal(before, mask)
        assert (layer.weight[mask] != 0).all()
    assert report.layers[0].error_after == pytest.approx(
        output_error(teacher.layer.weight.detach(), solution.values, inputs), rel=1e-3
    )


@pytest.mark.parametrize("method", METHODS)
def test_gradual_masks_start_dense_from_the_dense_solution(method: str) -> None:
    torch.manual_seed(1)
    teacher, inputs = Wrapped(nn.Linear(64, 33)), correlated(300, 64)
    found = {}
    for sparsity, masks in ((None, "fixed"), (NM(2, 4), "gradual")):
        student = student_of(teacher, LayerSpec(Int(4), sparsity), masks=masks)
        report = calibrate(student, teacher, [{"inputs": inputs}], method=method)
        attach(student, torch.optim.SGD(student.parameters(), lr=1.0), moving=10)
        ((_, layer),) = compressed_layers(student)
        found[masks] = fake_quantized(layer), layer.bias, report.layers[0].error_after
    assert torch.equal(found["fixed"][0], found["gradual"][0])
    assert torch.equal(found["fixed"][1], found["gradual"][1])
    assert found["fixed"][2] == found["gradual"][2]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", [LayerSpec(Int(2)), LayerSpec.at_rate(2.0)], ids=str)
def test_descending_bits_start_from_the_solution_for_the_most(spec: LayerSpec, method: str) -> None:
    torch.manual_seed(1)
    teacher, inputs = Wrapped(nn.Linear(64, 33)), correlated(300, 64)
    errors = {}
    for before in ((), (6,)):
        student = student_of(teacher, spec, masks="fixed", bits_schedule=before)
        report = calibrate(student, teacher, [{"inputs": inputs}], method=method)
        ((_, layer),) = compressed_layers(student)
        compressed = fake_quantized(layer)
        attach(student, torch.optim.SGD(student.parameters(), lr=1.0), moving=10)
        if spec.rate is None:
            assert torch.equal(fake_quantized(layer), compressed)
        errors[before] = report.layers[0].error_after
    assert errors[(6,)] < 0.03 * errors[()]


@pytest.mark.parametrize(
    "spec",
    [
        LayerSpec(Int(4), NM(2, 4)),
        LayerSpec(Int(4)),
        LayerSpec(Int(3), None, 32),
        LayerSpec(Int(4, symmetric=False)),
        LayerSpec(Int(2, grid="midrise"), NM(2, 4)),
        LayerSpec(None, NM(1, 4)),
    ],
    ids=str,
)
def test_hessian_is_best_on_correlated_inputs(spec: LayerSpec) -> None:
    torch.manual_seed(2)
    columns = 160  # more than one block of columns
    teacher = Wrapped(nn.Linear(columns, 96))
    seen, unseen = correlated(4000, columns).split(2000)
    errors, on_unseen = {}, {}
    for method in METHODS:
        student = student_of(teacher, spec)
        report = calibrate(student, teacher, [{"inputs": seen}], method=method)
        errors[method] = report.layers[0].error_after
        ((_, layer),) = compressed_layers(student)
        on_unseen[method] = output_error(teacher.layer.weight.detach(), fake_quantized(layer), unseen)
    assert errors["hessian"] < 0.8 * errors["activation"]
    assert errors["activation"] < 1.02 * errors["magnitude"]
    assert on_unseen["hessian"] < 0.9 * min(on_unseen["activation"], on_unseen["magnitude"])


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("inputs", ["few", "dead", "equal", "zero"])
@pytest.mark.parametrize(
    "spec", [LayerSpec(Int(4), NM(2, 4)), LayerSpec(Int(3, symmetric=False), None, 8)], ids=str
)
def test_singular_statistics(spec: LayerSpec, inputs: str, damping: float) -> None:
    torch.manual_seed(5)
    columns = 32
    rows = {
        "few": torch.randn(5, columns),
        "dead": correlated(200, columns) * (torch.arange(columns) % 3 > 0),
        "equal": torch.randn(100, 1).expand(100, columns).contiguous(),
        "zero": torch.zeros(10, columns),
    }[inputs]
    teacher = Wrapped(nn.Linear(columns, 24))
    student = student_of(teacher, spec)
    report = calibrate(student, teacher, [{"inputs": rows}], method="hessian", damping=damping)
    ((_, layer),) = compressed_layers(student)
    assert torch.isfinite(layer.weight).all()
    assert torch.isfinite(fake_quantized(layer)).all()
    assert update_masks(student) == 0
    (entry,) = report.layers
    if inputs == "zero":
        assert "zero" in entry.note
    else:
        assert entry.error_after <= entry.error_before
        if damping == 0.0 and inputs != "dead":
            assert "damping raised" in entry.note
            assert report.notes


CONVOLUTIONS = {
    "plain": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilated": {"kernel_size": 3, "dilation": 2},
    "same": {"kernel_size": 5, "padding": "same"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
}


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions_are_counted_in_the_students_column_order(options: dict[str, object]) -> None:
    torch.manual_seed(6)
    convolution = nn.Conv1d(5, 7, bias=False, **options)
    inputs = torch.randn(2, 5, 19).cumsum(dim=-1)
    products = input_rows(convolution, inputs) @ to_matrix(convolution.weight.detach()).T
    outputs = convolution(inputs).detach()
    assert torch.allclose(products, outputs.transpose(1, 2).reshape(-1, 7), atol=1e-5)

    teacher = Wrapped(convolution)
    student = student_of(teacher, LayerSpec(Int(3), NM(2, 4)), "conv1d")
    report = calibrate(student, teacher, [{"inputs": inputs}], method="hessian")
    error = (student(inputs).detach() - outputs).square().sum() / outputs.square().sum()
    assert report.layers[0].error_after == pytest.approx(error.item(), rel=1e-3)
    assert report.layers[0].error_after < report.layers[0].error_before


@pytest.fixture(scope="module")
def whisper() -> WhisperForConditionalGeneration:
    torch.manual_seed(7)
    config = WhisperConfig(
        vocab_size=120, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        max_source_positions=20, max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=3, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config).eval()


def compressible(model: nn.Module) -> dict[str, str]:
    kinds = {nn.Linear: "linear", nn.Conv1d: "conv1d", nn.Embedding: "embedding"}
    names = {
        f"{name}.weight": kinds[type(module)]
        for name, module in model.named_modules()
        if type(module) in kinds and name != "proj_out"
    }
    return names | {"model.decoder.embed_positions.weight": "positions"}


def speech(batch: int = 3, tokens: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(8)
    return {
        "input_features": torch.randn(batch, 8, 40, generator=generator),
        "decoder_input_ids": torch.randint(4, 120, (batch, tokens), generator=generator),
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_whole_whisper(whisper: WhisperForConditionalGeneration, method: str) -> None:
    spec = CompressionSpec.simple(4, "2:4")
    student = make_student(whisper, compressible(whisper), spec)
    seen: list[tuple[str, int, int | None]] = []
    report = calibrate(
        student, whisper, [speech()], method=method, progress=lambda *event: seen.append(event)
    )
    names = [name for name, _ in compressed_layers(student)]
    assert [layer.name for layer in report.layers] == names
    assert seen == [("teacher", 1, 1), *((name, i + 1, len(names)) for i, name in enumerate(names))]
    samples = {layer.name: layer.samples for layer in report.layers}
    assert samples["model.encoder.conv1"] == 3 * 40
    assert samples["model.encoder.conv2"] == 3 * 20
    assert samples["model.encoder.layers.0.self_attn.q_proj"] == 3 * 20
    assert samples["model.decoder.layers.0.encoder_attn.k_proj"] == 3 * 20
    assert samples["model.decoder.layers.0.encoder_attn.q_proj"] == 3 * 6
    assert samples["model.decoder.embed_tokens"] == 3 * 6  # those of the tied output projection
    assert samples["model.decoder.embed_positions"] == 0
    assert not report.notes
    assert update_masks(student) == 0
    with torch.no_grad():
        assert torch.isfinite(student.eval()(**speech()).logits).all()
    found = json.loads(json.dumps(report.to_dict()))
    assert found["method"] == method
    assert len(found["layers"]) == len(names)
    if method == "hessian":
        assert all(layer.error_after <= layer.error_before * 1.001 for layer in report.layers)


@pytest.mark.parametrize("method", METHODS)
def test_the_bias_takes_up_what_goes_wrong_on_the_mean_input(method: str) -> None:
    torch.manual_seed(11)
    teacher = Wrapped(nn.Linear(24, 12))
    inputs = torch.randn(1, 200, 24) + 3 * torch.randn(24)
    with torch.no_grad():
        expected = teacher(inputs)
        student = student_of(teacher, LayerSpec(Int(2), NM(2, 4)))
        for _ in range(2):  # twice is the same as once
            (layer,) = calibrate(student, teacher, [{"inputs": inputs}], method=method).layers
            error = student(inputs) - expected
            assert error.mean(dim=(0, 1)).abs().max() < 1e-4
        spread = (expected - teacher.layer.bias).square().mean() - (
            (expected - teacher.layer.bias).mean(dim=(0, 1)).square().mean()
        )
    assert layer.error_after == pytest.approx(float(error.square().mean() / spread), rel=1e-3)


def test_a_tied_table_is_rounded_for_both_of_its_uses(whisper: WhisperForConditionalGeneration) -> None:
    teacher = copy.deepcopy(whisper)
    table = teacher.model.decoder.embed_tokens.weight
    with torch.no_grad():
        table[:, 3] *= 20
    spec = CompressionSpec((Rule("*", LayerSpec(Int(3), column_scales=True), "embedding"),))
    student = make_student(teacher, compressible(teacher), spec)
    layers = calibrate(student, teacher, [speech()], method="hessian").layers
    layer = next(layer for layer in layers if layer.name == "model.decoder.embed_tokens")
    rounded = fake_quantized(student.get_submodule("model.decoder.embed_tokens"))
    others = [column for column in range(16) if column != 3]
    as_rows = (rounded - table)[:, others].square().sum() / table[:, others].square().sum()
    assert as_rows < 0.15
    assert layer.error_after < 0.05


def test_padded_decoder_positions_are_not_counted(whisper: WhisperForConditionalGeneration) -> None:
    spec = CompressionSpec.simple(4)
    labels = torch.full((3, 6), -100)
    labels[0, 2:6], labels[1, 3], labels[2, 1] = 5, 5, 5  # prompt before, padding after
    attention = (torch.arange(6) < torch.tensor([[6], [4], [2]])).long()
    reports = []
    for extra in ({"labels": labels}, {"decoder_attention_mask": attention}):
        student = make_student(whisper, compressible(whisper), spec)
        reports.append(calibrate(student, whisper, [speech() | extra], method="hessian"))
    for report in reports:
        samples = {layer.name: layer.samples for layer in report.layers}
        assert samples["model.decoder.layers.0.fc1"] == 6 + 4 + 2
        assert samples["model.decoder.layers.0.encoder_attn.v_proj"] == 3 * 20
    assert [layer.error_after for layer in reports[0].layers] == pytest.approx(
        [layer.error_after for layer in reports[1].layers], rel=0.05
    )


def test_the_teacher_is_left_as_it_was(whisper: WhisperForConditionalGeneration) -> None:
    before = {name: value.clone() for name, value in whisper.state_dict().items()}
    student = make_student(whisper, compressible(whisper), CompressionSpec.simple(4, "2:4"))
    whisper.train()
    calibrate(student, whisper, iter([speech()]), method="hessian", autocast=torch.bfloat16)
    assert whisper.training
    whisper.eval()
    assert all(torch.equal(value, before[name]) for name, value in whisper.state_dict().items())
    assert not any(module._forward_pre_hooks for module in whisper.modules())


def test_calibrating_again_starts_from_the_teacher(whisper: WhisperForConditionalGeneration) -> None:
    spec = CompressionSpec.simple(4, "2:4")
    student = make_student(whisper, compressible(whisper), spec)
    states = []
    for method in ("hessian", "magnitude", "hessian"):
        calibrate(student, whisper, [speech()], method=method)
        states.append({name: value.clone() for name, value in student.state_dict().items()})
    assert all(torch.equal(value, states[2][name]) for name, value in states[0].items())
    fresh = make_student(whisper, compressible(whisper), spec).state_dict()
    # The biases are corrected by every method.
    assert all(torch.equal(v, states[1][name]) for name, v in fresh.items() if not name.endswith("bias"))


def test_a_layer_that_never_runs_is_noted() -> None:
    class Spare(Wrapped):
        def __init__(self) -> None:
            super().__init__(nn.Linear(8, 8))
            self.spare = nn.Linear(8, 8)

    teacher = Spare()
    student = make_student(
        teacher, {"layer.weight": "linear", "spare.weight": "linear"}, CompressionSpec.simple(4, "2:4")
    )
    report = calibrate(student, teacher, [{"inputs": torch.randn(20, 8)}], method="hessian")
    assert [bool(layer.note) for layer in report.layers] == [False, True]
    assert report.notes[0].startswith("spare: never reached")


def test_what_cannot_work_is_said() -> None:
    teacher = Wrapped(nn.Linear(8, 8))
    student = student_of(teacher, LayerSpec(Int(4)))
    batch = {"inputs": torch.randn(4, 8)}
    with pytest.raises(DataError, match="no batch"):
        calibrate(student, teacher, [])
    with pytest.raises(SpecError, match="unknown method"):
        calibrate(student, teacher, [batch], method="best")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="damping"):
        calibrate(student, teacher, [batch], damping=-1.0)
    with pytest.raises(SpecError, match="damping"):
        calibrate(student, teacher, [batch], damping=float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        calibrate(student, teacher, [{"inputs": torch.full((4, 8), torch.inf)}])
    with pytest.raises(ModelError, match="does not fit"):
        calibrate(student, Wrapped(nn.Linear(9, 8)), [{"inputs": torch.randn(4, 9)}])
    with pytest.raises(ModelError, match="teacher has not"):
        calibrate(student, nn.Sequential(nn.Linear(8, 8)), [batch])
