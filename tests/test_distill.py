import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from small_whisper import small_student, small_teacher
from usmlite.distill import Distillation, LossWeights
from usmlite.network import IGNORED


def inputs(adapter, teacher, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 8, 3000, generator=generator)
    ids = torch.randint(0, teacher.config.vocab_size, (2, 9), generator=generator)
    labels = ids.roll(-1, 1)
    labels[:, :2] = IGNORED
    labels[1, 6:] = IGNORED
    return {"heard": features, "taught": features, "decoder_input_ids": ids, "labels": labels}


@pytest.mark.parametrize(
    "weights",
    [
        LossWeights(),
        LossWeights(0.5, 0.0, 0.0, 2.0),
        LossWeights(0.0, 1.0, 0.0),
        LossWeights(1.0, 0.3, 2.0, 1.5),
    ],
)
def test_losses_and_gradients_equal_the_plain_formulas(weights: LossWeights):
    teacher, adapter = small_teacher()
    student, _ = small_student()
    student.train()
    batch = inputs(adapter, teacher)
    out = Distillation(student, teacher, weights)(**batch)
    out["loss"].backward()
    name = "model.decoder.layers.0.fc1.weight"
    ours = student.get_parameter(name).grad.clone()
    student.zero_grad()

    labels = batch["labels"].reshape(-1)
    full = student(input_features=batch["heard"], decoder_input_ids=batch["decoder_input_ids"])
    with torch.no_grad():
        target = teacher(input_features=batch["taught"], decoder_input_ids=batch["decoder_input_ids"])
    scored = labels != IGNORED
    logits, wanted = full.logits.flatten(0, 1)[scored], target.logits.flatten(0, 1)[scored]
    t = weights.temperature
    kl = kl_div(
        log_softmax(logits / t, -1), log_softmax(wanted / t, -1), log_target=True, reduction="batchmean"
    )
    kl = kl * t**2
    ce = cross_entropy(logits, labels[scored])
    states = (full.encoder_last_hidden_state - target.encoder_last_hidden_state).square().mean()
    states = states / target.encoder_last_hidden_state.square().mean()
    loss = weights.kl * kl + weights.ce * ce + weights.states * states
    loss.backward()
    terms = {"loss": loss, "ce": ce}
    if weights.kl or weights.states:
        terms |= {"kl": kl, "states": states}
    for key, value in terms.items():
        assert out[key].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), key
    theirs = student.get_parameter(name).grad
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-7 + 1e-3 * theirs.abs().max().item())


def test_the_teacher_is_no_part_of_the_module_and_gets_no_gradient():
    teacher, adapter = small_teacher()
    student, _ = small_student()
    distillation = Distillation(student, teacher, LossWeights())
    ours = {id(p) for p in distillation.parameters()}
    assert not ours & {id(p) for p in teacher.parameters()}
    distillation(**inputs(adapter, teacher))["loss"].backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_a_student_equal_to_its_teacher_has_no_divergence():
    teacher, adapter = small_teacher()
    out = Distillation(small_teacher()[0], teacher, LossWeights())(**inputs(adapter, teacher))
    assert out["kl"].item() == pytest.approx(0.0, abs=1e-6)
    assert out["states"].item() == 0.0


def test_layers_and_attention_equal_what_the_model_itself_reports():
    teacher, adapter = small_teacher(encoder_layers=2, decoder_layers=2)
    student, _ = small_student(encoder_layers=2, decoder_layers=2)
    batch = inputs(adapter, teacher)
    places = {"layers": adapter.layers(), "attentions": adapter.attentions()}
    weights = LossWeights(0.0, 0.0, 0.0, layers=0.5, attention=2.0)
    out = Distillation(student, teacher, weights, **places)(**batch)

    scored = batch["labels"] != IGNORED
    found = []
    for model in (student, teacher):
        model.set_attn_implementation("eager")
        whole = model.model(
            input_features=batch["heard"], decoder_input_ids=batch["decoder_input_ids"],
            output_attentions=True, output_hidden_states=True,
        )  # fmt: skip
        found.append(whole)
    ours, theirs = found
    distances = []
    # The last of the hidden states is after the final norm, which is no layer's output.
    for side in ("encoder", "decoder"):
        pairs = zip(ours[f"{side}_hidden_states"][1:-1], theirs[f"{side}_hidden_states"][1:-1], strict=True)
        for a, b in pairs:
            a, b = (x[scored] if side == "decoder" else x.flatten(0, 1) for x in (a, b))
            size = b.square().mean(0)
            distances.append(((a - b).square().mean(0) / size.clamp(min=0.01 * size.mean())).mean().item())
    divergences = [
        (b * (b.log() - a.log())).sum(-1).transpose(1, 2)[scored].mean().item()
        for a, b in zip(ours.cross_attentions, theirs.cross_attentions, strict=True)
    ]
    assert len(divergences) == len(adapter.attentions()) > 0
    assert out["attention"].item() == pytest.approx(sum(divergences) / len(divergences), rel=0.02)
    own = [name for name in adapter.layers() if not name.endswith(".1")]
    few = Distillation(student, teacher, weights, layers=own)(**batch)
    assert few["layers"].item() == pytest.approx(sum(distances) / len(distances), rel=1e-4)
    expected = 0.5 * out["layers"].item() + 2.0 * out["attention"].item()
    assert out["loss"].item() == pytest.approx(expected, rel=1e-5)
    out["loss"].backward()
    assert student.get_parameter("model.encoder.layers.0.fc1.weight").grad.abs().max() > 0
