import pytest
import torch
from torch import nn

from small_whisper import small_teacher
from usmlite.errors import ModelError, SpecError
from usmlite.movement import attach, decay_pruned, update_masks
from usmlite.pack import pack_layer
from usmlite.schedule import kept_of
from usmlite.spec import NM, CompressionSpec, Int, LayerSpec, Rule
from usmlite.student import (
    StudentOptions,
    WeightCompression,
    compressed_layers,
    fake_quantized,
    make_student,
    to_matrix,
)


@pytest.fixture
def teacher() -> nn.Module:
    return small_teacher()[0]


def student_of(teacher: nn.Module, sparsity: str = "2:4", **options: object) -> nn.Module:
    kinds = small_teacher()[1].compressible(teacher)
    spec = CompressionSpec.simple(4, sparsity)
    return make_student(teacher, kinds, spec, StudentOptions(**options))  # type: ignore[arg-type]


def batch(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (2, 5), generator=generator)
    features = torch.randn(2, 8, 3000, generator=generator)
    return {"input_features": features, "decoder_input_ids": ids, "labels": ids}


def kept(student: nn.Module) -> set[int]:
    """How many of every 4 neighbours the layers keep."""
    masks = [layer.compression.mask for _, layer in compressed_layers(student)]
    return {int(n) for mask in masks if mask is not None for n in mask.reshape(-1, 4).sum(-1)}


def step(student: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    loss = student(**batch(student)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def test_any_loop_trains_it_and_masks_follow_the_optimizer(teacher):
    student = student_of(teacher, mask_every=2)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    updater = attach(student, optimizer)
    layer = student.get_submodule("model.decoder.layers.0.fc1")
    losses, masks = [], [layer.compression.mask.clone()]
    for _ in range(8):
        loss = student(**batch(teacher)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        masks.append(layer.compression.mask.clone())
    assert losses[-1] < losses[0]
    assert updater.steps == 8
    assert torch.equal(masks[0], masks[1])  # mask_every=2: nothing after the first step
    assert not torch.equal(masks[0], masks[-1])
    updater.frozen = True
    optimizer.step()
    assert torch.equal(layer.compression.mask, masks[-1])


def test_fixed_masks_never_move(teacher):
    student = student_of(teacher, masks="fixed")
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    attach(student, optimizer)
    before = {
        name: layer.compression.mask.clone()
        for name, layer in compressed_layers(student)
        if layer.compression.mask is not None
    }
    student(**batch(teacher)).loss.backward()
    optimizer.step()
    for name, mask in before.items():
        assert torch.equal(student.get_submodule(name).compression.mask, mask)


def test_pruned_weights_receive_gradient_and_decay(teacher):
    student = student_of(teacher)
    layer = student.get_submodule("model.encoder.layers.0.fc2")
    student(**batch(teacher)).loss.backward()
    mask = layer.compression.mask
    assert layer.weight.grad[~mask].abs().max() > 0
    before = layer.weight.detach().clone()
    weights = [layer.weight for _, layer in compressed_layers(student)]
    others = [p for p in student.parameters() if all(p is not weight for weight in weights)]
    # What else is trained has a rate of its own, which is not the weights' affair.
    optimizer = torch.optim.SGD([{"params": weights, "lr": 0.125}, {"params": others, "lr": 0.5}])
    decay_pruned(student, 2.0, optimizer)
    assert torch.equal(layer.weight[mask], before[mask])
    assert torch.allclose(layer.weight[~mask], 0.75 * before[~mask])


def test_update_masks_reports_the_share_that_changed(teacher):
    student = student_of(teacher)
    assert update_masks(student) == 0.0
    layer = student.get_submodule("model.encoder.layers.0.fc2")
    with torch.no_grad():
        layer.weight.copy_(torch.where(layer.compression.mask, layer.weight * 1e-3, layer.weight))
    total = sum(x.weight.numel() for _, x in compressed_layers(student) if x.compression.mask is not None)
    assert update_masks(student) == pytest.approx(layer.weight.numel() / total)


def test_gradual_masks_lose_one_after_the_other_and_end_at_the_spec(teacher):
    student = student_of(teacher, "1:4", masks="gradual", mask_every=100)
    assert kept(student) == {1}  # whoever packs it untrained gets what the spec says
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    updater = attach(student, optimizer, moving=8)
    seen, churns = [kept(student)], []
    for _ in range(9):
        step(student, optimizer)
        seen.append(kept(student))
        churns.append(updater.churn)
        assert updater.at_target == (seen[-1] == {1})
        assert updater.frozen == (updater.steps >= 8)
    assert seen == [{kept_of(k, 8, 1, 4)} for k in range(10)]
    assert seen == [{4}, {4}, {3}, {3}, {2}, {2}, {1}, {1}, {1}, {1}]
    assert churns[1] == pytest.approx(0.25)


def test_a_student_on_its_way_down_cannot_be_packed(teacher):
    student = student_of(teacher, masks="gradual")
    name, layer = next(
        (name, layer) for name, layer in compressed_layers(student) if layer.compression.mask is not None
    )
    pack_layer(name, layer)
    attach(student, torch.optim.SGD(student.parameters(), lr=1e-3), moving=8)
    with pytest.raises(ModelError, match="does not keep 2 of every 4"):
        pack_layer(name, layer)


def test_gradual_masks_go_on_where_they_were(teacher):
    whole = student_of(teacher, masks="gradual", mask_every=2)
    optimizer = torch.optim.SGD(whole.parameters(), lr=1e-2)
    attach(whole, optimizer, moving=6)
    for number in range(7):
        if number == 3:
            saved = {name: value.clone() for name, value in whole.state_dict().items()}
        step(whole, optimizer)
    resumed = student_of(teacher, masks="gradual", mask_every=2)
    optimizer = torch.optim.SGD(resumed.parameters(), lr=1e-2)
    updater = attach(resumed, optimizer, moving=6)
    resumed.load_state_dict(saved)
    updater.at(3)
    for _ in range(4):
        step(resumed, optimizer)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize("decay", [0.0, 5.0])
def test_gradual_masks_decay_what_is_pruned_if_asked(teacher, decay):
    student = student_of(teacher, masks="gradual", mask_decay=decay)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    attach(student, optimizer, moving=9)
    layer = student.get_submodule("model.encoder.layers.0.fc1")
    for _ in range(4):
        optimizer.step()  # without gradients, so that only the decay moves weights
    assert kept(student) == {3}
    before, mask = to_matrix(layer.weight).clone(), layer.compression.mask.clone()
    optimizer.step()
    assert torch.allclose(to_matrix(layer.weight), torch.where(mask, before, before * (1 - 0.1 * decay)))


@pytest.mark.parametrize("masks", ["gradual", "gumbel"])
def test_masks_on_a_schedule_must_know_their_end(teacher, masks):
    student = student_of(teacher, masks=masks)
    with pytest.raises(SpecError, match="must know when they stop"):
        attach(student, torch.optim.SGD(student.parameters(), lr=1e-3))


def test_learned_masks_are_drawn_until_they_are_frozen(teacher):
    student = student_of(teacher, masks="gumbel", mask_every=100)
    layer = student.get_submodule("model.encoder.layers.0.fc1")
    compression, start = layer.compression, layer.compression.mask.clone()
    groups = [
        {"params": [p for n, p in student.named_parameters() if n.endswith("logits") == learned], "lr": lr}
        for learned, lr in ((True, 1.0), (False, 1e-3))
    ]
    optimizer = torch.optim.AdamW(groups)
    updater = attach(student, optimizer, moving=6)

    def drawn() -> bool:
        return not torch.equal(compression(layer.weight), compression(layer.weight))

    churns = []
    for number in range(8):
        if number < 2 or number >= 6:  # in between the temperature is low, and most draws are alike
            assert drawn() == (number < 6)
        assert updater.frozen == (number >= 6)
        settled = fake_quantized(layer)
        assert torch.equal(settled, fake_quantized(layer))
        student.eval()
        assert torch.equal(compression(layer.weight), settled)
        student.train()
        assert torch.equal(compression.mask, start) == (number < 6)
        step(student, optimizer)
        churns.append(updater.churn)
    assert [churn > 0 for churn in churns] == [False] * 5 + [True] * 3
    assert torch.equal(compression.mask, compression.patterns.likeliest())
    assert kept(student) == {2}
    for name, packed in compressed_layers(student):
        pack_layer(name, packed)


@pytest.mark.parametrize("bits", [4, None])
@pytest.mark.parametrize("scales", ["learned", "min-max"])
def test_what_is_drawn_and_only_that_gets_gradients(bits, scales):
    torch.manual_seed(4)
    weight = nn.Parameter(torch.randn(6, 22))
    spec = LayerSpec(None if bits is None else Int(bits), NM(2, 4))
    compression = WeightCompression(weight, spec, StudentOptions(scales=scales, masks="gumbel"))
    compression.progress = 0.0
    out = compression(weight)
    out.square().sum().backward()
    assert compression.patterns.logits.grad.abs().sum() > 0
    assert (weight.grad[out == 0] == 0).all()
    assert (weight.grad[out != 0] != 0).float().mean() > 0.8  # but for clipped ones
    # At no temperature the draw is the mask.
    compression.progress = 5.0
    assert torch.equal(compression(weight), compression(weight, settled=True))


def test_learned_masks_that_do_not_train_are_not_drawn():
    weight = nn.Parameter(torch.randn(6, 24))
    compression = WeightCompression(weight, LayerSpec(Int(4), NM(2, 4)), StudentOptions(masks="gumbel"))
    compression.progress = 0.0
    compression.patterns.logits.requires_grad_(False)
    assert torch.equal(compression(weight), compression(weight, settled=True))


def descending(teacher: nn.Module, bits: int | None = 2, **options: object) -> nn.Module:
    kinds = small_teacher()[1].compressible(teacher)
    rated = Rule("*.fc1", LayerSpec.at_rate(2.5))
    spec = CompressionSpec.simple(bits, first=[rated], grid="ternary" if bits == 2 else "integer")
    return make_student(teacher, kinds, spec, StudentOptions(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize("scales", ["learned", "min-error", "min-max"])
def test_bits_descend_and_scales_are_searched_anew(teacher, scales):
    student = descending(teacher, masks="fixed", bits_schedule=(8, 4), scales=scales)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-3)
    movement = attach(student, optimizer, moving=6)
    two, rated = (student.get_submodule(f"model.decoder.layers.0.{name}") for name in ("fc2", "fc1"))
    table = student.get_submodule("model.decoder.embed_tokens")
    seen, errors, levels, momenta = [], [], [], []
    for _ in range(8):
        seen.append((two.compression.present.precision, rated.compression.present.precision))
        assert table.compression.present == table.compression.spec
        assert movement.at_target == (movement.steps >= 4)
        errors.append([float((fake_quantized(x) - x.weight.detach()).square().mean()) for x in (two, rated)])
        rows = to_matrix(fake_quantized(two))
        levels.append(max(len(row.unique()) for row in rows))
        momenta.append(len(optimizer.state.get(two.compression.log_scale, {})))
        step(student, optimizer)
    assert seen == [(8, 8)] * 2 + [(4, 4)] * 2 + [(2, 2.5)] * 4
    for before, after in ((0, 2), (2, 4)):  # more error with fewer bits, by a factor that is no accident
        assert all(3 * few < many for few, many in zip(errors[before], errors[after], strict=True))
    assert levels[4] <= 3
    assert levels[2] <= 16 < levels[0]
    if scales == "learned":
        assert [count > 0 for count in momenta] == [False, True, False, True, False, True, True, True]
    for name, layer in compressed_layers(student):
        pack_layer(name, layer)


def test_a_student_with_more_bits_cannot_be_packed(teacher):
    student = descending(teacher, bits_schedule=(8,))
    attach(student, torch.optim.SGD(student.parameters(), lr=1e-3), moving=6)
    with pytest.raises(ModelError, match="more bits than its spec"):
        pack_layer("fc2", student.get_submodule("model.decoder.layers.0.fc2"))


def test_descending_bits_must_know_their_end(teacher):
    student = descending(teacher, bits_schedule=(8,))
    with pytest.raises(SpecError, match="descending bits must know when they stop"):
        attach(student, torch.optim.SGD(student.parameters(), lr=1e-3))


def test_bits_are_drawn_for_weights_and_steps_until_all_is_frozen(teacher):
    student = descending(teacher, masks="fixed", stochastic_bits=(4, 8), stochastic_share=0.5)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    movement = attach(student, optimizer, moving=20, seed=3)
    layers = dict(compressed_layers(student))
    drawn = []
    for _ in range(22):
        drawn.append({name: layer.compression.drawn_bits for name, layer in layers.items()})
        for name, layer in layers.items():
            if layer.weight.dim() != 2 or name.endswith(("embed_tokens", "embed_positions")):
                assert layer.compression.drawn_bits is None  # int8, and tables
            elif drawn[-1][name] is not None:
                settled, out = fake_quantized(layer), layer.compression(layer.weight)
                errors = [(x - layer.weight).square().mean().item() for x in (out, settled)]
                assert errors[0] < 0.3 * errors[1]
        optimizer.step()
    assert drawn[20] == drawn[21] == dict.fromkeys(layers)
    linear = [bits for now in drawn[:20] for name, bits in now.items() if "proj" in name or "fc" in name]
    assert linear.count(None) / len(linear) == pytest.approx(0.5, abs=0.1)
    assert linear.count(4) / len(linear) == pytest.approx(0.25, abs=0.1)
    # A function of the seed and the step.
    movement.at(7)
    assert {name: layer.compression.drawn_bits for name, layer in layers.items()} == drawn[7]
    student.eval()
    name = next(name for name, bits in drawn[7].items() if bits is not None)
    assert torch.equal(layers[name].compression(layers[name].weight), fake_quantized(layers[name]))


@pytest.mark.parametrize("scales", ["learned", "min-max", "min-error", "rand"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_learned_scales_do_not_learn_from_other_bits(scales, symmetric):
    torch.manual_seed(5)
    weight = nn.Parameter(torch.randn(6, 24) + 0.5)
    spec = LayerSpec(Int(2, symmetric=symmetric), NM(2, 4))
    compression = WeightCompression(weight, spec, StudentOptions(scales=scales, stochastic_bits=(5,)))
    compression.progress, compression.drawn_bits = 0.5, 5
    out = compression(weight)
    out.square().sum().backward()
    assert torch.equal(out == 0, ~compression.mask) or scales != "rand"
    assert weight.grad.abs().sum() > 0
    if compression.log_scale is not None:
        assert compression.log_scale.grad is None
    error = (out - weight)[compression.mask].square().mean()
    own = (fake_quantized_of(compression, weight) - weight)[compression.mask].square().mean()
    assert error < 0.2 * own


def fake_quantized_of(compression: WeightCompression, weight: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return compression(weight, settled=True)
