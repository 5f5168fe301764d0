import copy
import math

import pytest
import torch
from torch import nn
from transformers import WhisperForConditionalGeneration

from small_whisper import small_teacher
from usmlite import entropy
from usmlite.errors import ModelError, SpecError
from usmlite.movement import attach
from usmlite.spec import NM, CompressionSpec, Int, LayerSpec, Rule
from usmlite.student import (
    SCALE_RULES,
    StudentOptions,
    WeightCompression,
    compressed_layers,
    dense_equivalent,
    fake_quantized,
    from_matrix,
    layer_specs,
    make_student,
    round_kept,
    to_matrix,
)

SPEC = CompressionSpec.simple(4, "2:4")


@pytest.fixture
def teacher() -> WhisperForConditionalGeneration:
    return small_teacher()[0]


def compressible(model: WhisperForConditionalGeneration) -> dict[str, str]:
    return small_teacher()[1].compressible(model)


def batch(model: WhisperForConditionalGeneration, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    frames = 2 * config.max_source_positions
    ids = torch.randint(0, config.vocab_size, (2, 5), generator=generator)
    return {
        "input_features": torch.randn(2, config.num_mel_bins, frames, generator=generator),
        "decoder_input_ids": ids,
        "labels": ids,
    }


def student_of(teacher: torch.nn.Module, spec: CompressionSpec = SPEC, **options: object) -> torch.nn.Module:
    return make_student(teacher, compressible(teacher), spec, StudentOptions(**options))  # type: ignore[arg-type]


def test_matrix_of_a_convolution_has_input_channels_as_neighbours():
    weight = torch.arange(24.0).reshape(2, 3, 4)
    matrix = to_matrix(weight)
    assert matrix.shape == (2, 12)
    assert matrix[1, :3].tolist() == weight[1, :, 0].tolist()
    assert torch.equal(from_matrix(matrix, weight.shape), weight)


@pytest.mark.parametrize("scales", SCALE_RULES)
@pytest.mark.parametrize("bits", [None, 1, 2, 4, 8])
def test_every_covered_weight_is_pruned_then_quantized(teacher, scales, bits):
    student = student_of(teacher, CompressionSpec.simple(bits, "2:4"), scales=scales)
    for name, layer in compressed_layers(student):
        values = to_matrix(fake_quantized(layer))
        spec = layer.compression.spec
        if layer.compression.column_scale is not None:
            values = values / layer.compression.column_scale
            values = (values * 2**20).round()  # the division undoes the product up to rounding
        if spec.sparsity is not None:
            columns = values.shape[1] // 4 * 4
            assert ((values[:, :columns].reshape(-1, 4) != 0).sum(-1) <= 2).all(), name
        if spec.quant is not None:
            assert all(len(row.unique()) <= 2**spec.quant.bits + 1 for row in values), name


def test_column_scales_keep_large_columns_from_taking_the_codes():
    torch.manual_seed(3)
    weight = torch.randn(64, 32)
    weight[:, 5] *= 30
    errors = {}
    for column_scales in (False, True):
        compression = WeightCompression(
            weight, LayerSpec(Int(4), column_scales=column_scales), StudentOptions()
        )
        found = compression(weight)
        errors[column_scales] = (found - weight)[:, :5].square().mean() / weight[:, :5].square().mean()
        # Straight through: the gradient of the weight is that of what it became, where it is not clipped.
        leaf = weight.clone().requires_grad_()
        compression(leaf).sum().backward()
        assert torch.allclose(leaf.grad[leaf.grad != 0], torch.ones(()))
        assert (leaf.grad != 0).float().mean() > 0.9
    assert errors[False] > 0.5
    assert errors[True] < 0.03


def test_the_tied_projection_computes_with_the_embeddings_compressed_weight(teacher):
    student = student_of(teacher)
    hidden = torch.randn(3, teacher.config.d_model)
    expected = hidden @ fake_quantized(student.get_submodule("model.decoder.embed_tokens")).T
    assert torch.allclose(student.proj_out(hidden), expected, atol=1e-5)
    assert student.proj_out.weight is student.model.decoder.embed_tokens.weight
    names = [name for name, _ in compressed_layers(student)]
    assert "model.decoder.embed_tokens" in names
    assert "proj_out" not in names


def test_the_students_own_forward_equals_its_dense_equivalent(teacher):
    student = student_of(teacher).eval()
    dense = dense_equivalent(student, teacher)
    inputs = batch(teacher)
    with torch.no_grad():
        ours, theirs = student(**inputs), dense(**inputs)
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-5)
    assert not torch.allclose(theirs.logits, teacher(**inputs).logits, atol=1e-3)


def test_the_teacher_is_not_changed(teacher):
    before = copy.deepcopy(teacher.state_dict())
    student = student_of(teacher)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.1)
    attach(student, optimizer)
    student(**batch(teacher)).loss.backward()
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_learned_scales_receive_gradient(teacher):
    student = student_of(teacher, CompressionSpec.simple(4, "2:4", coded=False))
    student(**batch(teacher)).loss.backward()
    moved = [layer.compression.log_scale.grad.abs().sum() > 0 for _, layer in compressed_layers(student)]
    assert all(moved)


def test_rules_decide_by_name_and_kind_and_the_rest_is_kept(teacher):
    spec = CompressionSpec(
        (
            Rule("model.encoder.*", LayerSpec(Int(4), NM(2, 4)), "linear"),
            Rule("*.embed_tokens", LayerSpec(Int(3), group=16)),
        )
    )
    specs = layer_specs(student_of(teacher, spec))
    assert specs["model.decoder.embed_tokens"] == LayerSpec(Int(3), group=16)
    assert specs["model.encoder.layers.0.fc1"] == LayerSpec(Int(4), NM(2, 4))
    assert not any(name.startswith("model.decoder.layers") or "conv" in name for name in specs)


def test_computed_parameters_do_not_train(teacher):
    computed = {"model.encoder.embed_positions.weight"}
    student = make_student(teacher, compressible(teacher), SPEC, computed=computed)
    frozen = {name for name, p in student.named_parameters() if not p.requires_grad}
    assert frozen == computed


def test_round_kept_makes_biases_and_norms_representable_in_float16(teacher):
    student = student_of(teacher)
    with torch.no_grad():
        student.model.encoder.layer_norm.weight.fill_(1.0001)
    masters = student.get_submodule("model.encoder.layers.0.fc1").weight.detach().clone()
    round_kept(student)
    norm = student.model.encoder.layer_norm.weight
    assert torch.equal(norm, norm.half().float())
    assert torch.equal(student.get_submodule("model.encoder.layers.0.fc1").weight, masters)


def test_a_weight_of_the_wrong_kind_is_named(teacher):
    with pytest.raises(ModelError, match="cannot compress a Linear as conv1d"):
        make_student(teacher, {"model.encoder.layers.0.fc1.weight": "conv1d"}, SPEC)


@pytest.mark.parametrize("options", [{"scales": "best"}, {"masks": "sometimes"}, {"mask_every": 0}])
def test_unknown_options_are_refused(options):
    with pytest.raises(SpecError):
        StudentOptions(**options)


def test_autocast_gives_the_same_weight_in_bf16(teacher):
    student = student_of(teacher)
    layer = student.get_submodule("model.encoder.layers.0.fc1")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        weight = layer.compression(layer.weight)
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, fake_quantized(layer).bfloat16())


def test_a_rate_is_spent_whatever_the_scale_rule(teacher):
    for rule in ("min-max", "min-error", "learned"):
        spec = CompressionSpec((Rule("*.embed_tokens", LayerSpec.at_rate(3.0)),))
        student = student_of(teacher, spec, scales=rule)
        ((_, layer),) = compressed_layers(student)
        codes, scale, _ = layer.compression.codes(layer.weight)
        contexts = entropy.Contexts.of(codes.numpy())
        counts = entropy.count_codes(codes.numpy(), 8, contexts)
        assert entropy.entropy_of(counts) == pytest.approx(3.0, abs=0.15)
        assert layer.compression.log_scale is None
        assert torch.equal(scale, scale[:1].expand_as(scale))


def test_rows_that_are_seldom_used_get_larger_steps(teacher):
    name = "model.decoder.embed_tokens"
    spec = CompressionSpec((Rule(name, LayerSpec.at_rate(3.0)),))
    rows = len(teacher.get_submodule(name).weight)
    octaves = torch.linspace(0, 2, rows)
    student = make_student(
        teacher, {f"{name}.weight": "embedding"}, spec, octaves={f"{name}.weight": octaves}
    )
    ((_, layer),) = compressed_layers(student)
    _, scale, _ = layer.compression.codes(layer.weight)
    assert scale[-1].item() == 4 * scale[0].item()


@pytest.mark.parametrize("quant", [Int(2, grid="midrise"), Int(2, grid="ternary")], ids=str)
def test_learned_scales_of_few_levels_start_at_the_least_error_and_learn(quant):
    torch.manual_seed(5)
    weight = torch.randn(16, 64)
    compression = WeightCompression(weight, LayerSpec(quant, NM(2, 4)), StudentOptions(masks="fixed"))
    levels = compression(weight)
    assert all(len(row[mask].unique()) <= quant.max_code + 1
               for row, mask in zip(levels, compression.mask, strict=True))  # fmt: skip
    if quant.grid == "midrise":
        assert (levels[compression.mask] != 0).all()
    pruned = torch.where(compression.mask, weight, torch.zeros(()))
    start = (levels - pruned).square().sum()
    for factor in (0.9, 1.1):
        other = copy.deepcopy(compression)
        other.log_scale.data.add_(math.log(factor))
        assert (other(weight) - pruned).square().sum() > start
    # Towards a larger weight, scales and weights move.
    target, leaf = 1.5 * pruned, nn.Parameter(weight)
    optimizer = torch.optim.Adam([compression.log_scale, leaf], lr=0.02)
    before = compression.log_scale.detach().clone()
    for _ in range(60):
        loss = (compression(leaf) - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.85 * (levels - target).square().sum()
    assert (compression.log_scale != before).all()


def test_a_learned_scale_of_one_bit_finds_the_mean_magnitude():
    torch.manual_seed(5)
    weight = torch.randn(16, 64)
    compression = WeightCompression(weight, LayerSpec(Int(1)), StudentOptions(masks="fixed"))
    compression.log_scale.data.add_(1.0)
    optimizer = torch.optim.SGD([compression.log_scale], lr=0.01)
    for _ in range(300):
        loss = (compression(weight) - weight).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scale = compression.scales(weight)[0]
    assert torch.allclose(scale / 2, weight.abs().mean(dim=1, keepdim=True), rtol=0.01)


def rand_of(weight, **choices):
    spec = LayerSpec(Int(4), **choices)
    return WeightCompression(weight, spec, StudentOptions(scales="rand", masks="fixed"))


@pytest.mark.parametrize("group", [None, 8])
def test_rand_charges_rounding_to_the_largest_weight(group):
    torch.manual_seed(6)
    weight = nn.Parameter(torch.randn(5, 32))
    compression = rand_of(weight, group=group)
    out = compression(weight)
    upstream = torch.randn(5, 32)
    out.backward(upstream)
    size = group or 32
    grouped = weight.detach().reshape(5, -1, size)
    largest = grouped.abs().argmax(dim=-1, keepdim=True)
    scale = compression.scales(weight)[0].unsqueeze(-1)
    slope = (grouped / scale).round() - grouped / scale
    charge = (slope * upstream.reshape(5, -1, size)).sum(dim=-1, keepdim=True) / 7
    expected = upstream.reshape(5, -1, size).clone()
    expected.scatter_add_(-1, largest, charge * grouped.gather(-1, largest).sign())
    assert torch.allclose(weight.grad, expected.reshape(5, 32), atol=1e-4)
    assert torch.equal(out, fake_quantized_alone(weight, group))


def fake_quantized_alone(weight, group):
    plain = WeightCompression(weight, LayerSpec(Int(4), group=group), StudentOptions(scales="min-max"))
    return plain(weight)


@pytest.mark.parametrize("sparsity", [None, NM(2, 4)])
@pytest.mark.parametrize("masks", ["fixed", "gumbel"])
def test_rand_adds_noise_of_one_step_while_masks_move(sparsity, masks):
    torch.manual_seed(7)
    weight = nn.Parameter(torch.randn(8, 40))
    spec = LayerSpec(Int(4, symmetric=masks == "fixed"), sparsity, 8)
    compression = WeightCompression(weight, spec, StudentOptions(scales="rand", masks=masks))
    settled = compression(weight)
    assert torch.equal(settled, compression(weight))
    compression.progress = 0.0
    noisy = compression(weight)
    assert not torch.equal(noisy, compression(weight))
    assert torch.equal(compression(weight, settled=True), settled)
    kept = noisy != 0
    if sparsity is not None:
        assert (kept.reshape(8, -1, 4).sum(-1) == 2).all()
    step = compression.scales(weight)[0].repeat_interleave(8, dim=1)
    if masks == "fixed":
        assert ((noisy - weight).abs() <= 0.51 * step)[kept].all()
    noisy.square().sum().backward()
    assert weight.grad.isfinite().all()
    compression.eval()
    assert torch.equal(compression(weight), settled)


def test_the_norm_decays_where_noise_hurts():
    # One weight far from the others makes the steps of all of them large.
    torch.manual_seed(8)
    start = torch.randn(4, 64)
    start[:, 0] = 20.0
    found = {}
    for scales in ("min-max", "rand"):
        weight = nn.Parameter(start.clone())
        spec, options = LayerSpec(Int(3)), StudentOptions(scales=scales, masks="fixed")
        compression = WeightCompression(weight, spec, options)
        optimizer = torch.optim.SGD([weight], lr=0.02)
        for _ in range(200):
            loss = (compression(weight) - start)[:, 1:].square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found[scales] = weight[:, 0].detach(), loss.item()
    assert (found["min-max"][0] == 20.0).all()
    assert (found["rand"][0] < 10.0).all()
    assert found["rand"][1] < 0.5 * found["min-max"][1]
