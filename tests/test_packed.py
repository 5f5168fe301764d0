from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from small_whisper import logits, small_student
from usmlite import kernels
from usmlite.errors import OutputError, PackedModelError
from usmlite.kernels import native
from usmlite.pack import pack
from usmlite.packed import (
    HOLDS,
    Hold,
    PackedConv1d,
    PackedEmbedding,
    PackedLinear,
    PackedPositions,
    StoredWeight,
    arithmetic,
    load_packed,
)
from usmlite.packfile import WeightsFile
from usmlite.spec import CompressionSpec, Int, LayerSpec, Rule
from usmlite.student import compressed_layers, fake_quantized

MIXED = CompressionSpec(
    (
        Rule("*.fc1", LayerSpec(Int(3, symmetric=False), group=8)),
        Rule("*.fc2", LayerSpec()),
        Rule("*.q_proj", LayerSpec(Int(2, grid="midrise"))),
        Rule("*.v_proj", LayerSpec(None, CompressionSpec.simple(4, "2:4").rules[-1].spec.sparsity)),
        *CompressionSpec.simple(4, "2:4").rules,
    )
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    student, adapter = small_student(MIXED)
    folder = tmp_path_factory.mktemp("made") / "out"
    pack(student, adapter, folder)
    return student, folder


@pytest.mark.parametrize("hold", HOLDS)
def test_the_packed_model_computes_what_the_student_does(made: tuple[nn.Module, Path], hold: Hold) -> None:
    student, folder = made
    model, adapter = load_packed(folder, hold=hold, activations="float32")
    torch.testing.assert_close(logits(model), logits(student), rtol=1e-5, atol=1e-5)
    assert adapter.start == model.generation_config.decoder_start_token_id
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("hold", ["int8", "packed"])
def test_rounded_activations_change_little(made: tuple[nn.Module, Path], hold: Hold) -> None:
    student, folder = made
    model, _ = load_packed(folder, hold=hold, activations="int8")
    found, expected = logits(model), logits(student)
    assert float((found - expected).norm() / expected.norm()) < 0.02


@pytest.mark.skipif(not native.paths(), reason="installed without the native library")
def test_weights_are_prepared_once_and_again_after_a_change(made: tuple[nn.Module, Path]) -> None:
    model, _ = load_packed(made[1], hold="int8")
    expected = logits(model)
    weight = model.proj_out.weight
    assert isinstance(weight, StoredWeight)
    assert isinstance(weight.operand, kernels.NativeWeight)
    assert weight.operand is weight.operand
    copied = copy.deepcopy(model)
    assert copied.proj_out.weight.operand is not weight.operand
    assert torch.equal(logits(copied), expected)
    state = copied.state_dict()
    copied.load_state_dict({name: torch.zeros_like(value) for name, value in state.items()})
    assert not torch.equal(logits(copied), expected)
    copied.load_state_dict(model.state_dict())
    assert torch.equal(logits(copied), expected)


def test_reports_can_tell_what_a_model_computes_with(
    made: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expanded, _ = load_packed(made[1], hold="float32")
    assert arithmetic(expanded) == "torch, float32"
    assert arithmetic(expanded.bfloat16()) == "torch, bfloat16"
    model, _ = load_packed(made[1], hold="packed", activations="int8")
    if native.paths():
        weights = sum(isinstance(module, StoredWeight) for module in model.modules())
        values = sum(isinstance(layer, PackedLinear) for layer in model.modules() if "values" in str(layer))
        assert values > 0
        assert arithmetic(model) == (
            f"native ({native.paths()[0]}), int8 activations; "
            f"{values} of {weights} weights by the reference (float16 values)"
        )
    monkeypatch.setenv(native.VARIABLE, "reference")
    model, _ = load_packed(made[1], hold="packed")
    assert arithmetic(model) == "reference, float32 activations"


@pytest.mark.parametrize("hold", HOLDS)
def test_the_rest_of_the_model_may_have_another_dtype(made: tuple[nn.Module, Path], hold: Hold) -> None:
    model, _ = load_packed(made[1], hold=hold)
    expected = logits(model)
    found = logits(model.bfloat16())
    assert found.dtype == torch.bfloat16
    assert float((found.float() - expected).norm() / expected.norm()) < 0.03


def test_dense_weights_are_those_of_the_student(made: tuple[nn.Module, Path]) -> None:
    student, folder = made
    model, _ = load_packed(folder)
    for name, layer in compressed_layers(student):
        assert torch.equal(model.get_submodule(name).weight, fake_quantized(layer)), name
    own = dict(model.named_parameters())
    weights = {f"{name}.weight" for name, _ in compressed_layers(student)}
    for name, parameter in student.named_parameters():
        if name not in weights and ".compression." not in name:
            assert torch.equal(own[name], parameter), name
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight


@pytest.mark.parametrize("hold", ["int8", "packed"])
def test_weights_stay_small_and_tied(made: tuple[nn.Module, Path], hold: Hold) -> None:
    _, folder = made
    model, _ = load_packed(folder, hold=hold)
    assert isinstance(model.proj_out, PackedLinear)
    assert isinstance(model.model.decoder.embed_tokens, PackedEmbedding)
    assert isinstance(model.model.decoder.embed_positions, PackedPositions)
    assert isinstance(model.model.encoder.conv1, PackedConv1d)
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    held = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    dense = sum(layer.weight.numel() for _, layer in compressed_layers(made[0]))
    # At a rate codes take a byte each, and the embedding is most of this model; scales come on top.
    assert held < (1.5 if hold == "int8" else 1.2) * dense, held / dense


def test_a_packed_hold_has_the_files_tensors(made: tuple[nn.Module, Path]) -> None:
    model, _ = load_packed(made[1], hold="packed")
    stored = load_file(made[1] / "model.safetensors")
    state = model.state_dict()
    decoded = {name for name in stored if name.endswith(".coded")}
    assert decoded
    assert {name.removesuffix("coded") + "codes" for name in decoded} <= set(state)
    same = set(stored) - decoded
    assert same <= set(state)
    assert all(torch.equal(state[name].to(stored[name].dtype), stored[name]) for name in same)


@pytest.mark.parametrize("hold", ["int8", "packed"])
def test_casting_the_model_leaves_codes_and_scales_alone(made: tuple[nn.Module, Path], hold: Hold) -> None:
    model, _ = load_packed(made[1], hold=hold)
    expected = {name: buffer.dtype for name, buffer in model.named_buffers()}
    cast = copy.deepcopy(model).to(torch.bfloat16).float()
    assert {name: buffer.dtype for name, buffer in cast.named_buffers()} == expected
    assert cast.proj_out.weight is cast.model.decoder.embed_tokens.weight
    # Norms and biases went through bfloat16, the rest did not.
    torch.testing.assert_close(logits(cast), logits(model), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("hold", ["int8", "packed"])
def test_a_model_in_memory_is_not_saved_again(
    made: tuple[nn.Module, Path], tmp_path: Path, hold: Hold
) -> None:
    model, _ = load_packed(made[1], hold=hold)
    with pytest.raises(OutputError, match="Copy the directory"):
        model.save_pretrained(tmp_path)


def test_an_unknown_hold_is_refused(made: tuple[nn.Module, Path]) -> None:
    with pytest.raises(ValueError, match="float32, int8, packed, mapped"):
        load_packed(made[1], hold="int4")  # type: ignore[arg-type]


def test_a_loaded_model_survives_its_file(made: tuple[nn.Module, Path], tmp_path: Path) -> None:
    for hold in HOLDS:
        if hold == "mapped":  # lives on its file, and says so
            continue
        folder = copied(made[1], tmp_path / hold)
        model, _ = load_packed(folder, hold=hold)
        expected = logits(model)
        size = (folder / "model.safetensors").stat().st_size
        (folder / "model.safetensors").write_bytes(b"\xff" * size)
        assert torch.equal(logits(model), expected)


# Damage


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.fixture
def folder(made: tuple[nn.Module, Path], tmp_path: Path) -> Path:
    return copied(made[1], tmp_path / "model")


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_truncated_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        PackedModelError, match=r"model\.safetensors: truncated .*expected \d+ bytes, found \d+"
    ):
        load_packed(folder)


def test_a_flipped_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 4
    path.write_bytes(data)
    with pytest.raises(
        PackedModelError, match=r"altered after packing .*expected sha256:.*found sha256:.*Copy or"
    ):
        load_packed(folder)


def test_a_digest_of_another_model(folder: Path) -> None:
    edit_config(folder, lambda config: config["quantization_config"].update(digest="sha256:" + "1" * 64))
    with pytest.raises(PackedModelError, match="altered after packing"):
        load_packed(folder)


def test_a_format_from_the_future(folder: Path) -> None:
    edit_config(folder, lambda config: config["quantization_config"].update(format_version=7))
    with pytest.raises(PackedModelError, match=r"config\.json.*newer usmlite .*found 7.*Install a newer"):
        load_packed(folder)


def test_a_dense_model_is_not_packed(folder: Path) -> None:
    edit_config(folder, lambda config: config.pop("quantization_config"))
    with pytest.raises(PackedModelError, match="not a packed model of usmlite"):
        load_packed(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"d_model": 48}, r"expected \[\d+, .*found"),
        ({"d_model": 1 << 40}, "does not describe a model|contradicts"),
        ({"d_model": "24"}, "does not describe a model"),
        ({"vocab_size": 1 << 62}, "does not describe a model|contradicts"),
        ({"encoder_layers": 10**9}, "encoder_layers of at most"),
        ({"max_source_positions": 256}, "max_source_positions of 1500"),
        ({"activation_dropout": 1e300}, "activation_dropout from 0 to 1"),
        ({"encoder_attention_heads": -1}, "encoder_attention_heads of at least 1"),
        ({"decoder_layers": -1}, "decoder_layers of at most"),
        ({"encoder_layers": 2}, "missing"),
        ({"encoder_attention_heads": 0}, "does not describe a model"),
        ({"max_source_positions": 1 << 40}, "max_source_positions of 1500"),
        ({"model_type": "llama"}, "found 'llama'"),
        ({"model_type": None}, "model_type 'whisper'"),
    ],
)
def test_a_config_that_contradicts_the_weights(folder: Path, change: dict[str, Any], match: str) -> None:
    edit_config(folder, lambda config: config.update(change))
    with pytest.raises(PackedModelError, match=match):
        load_packed(folder)


def reseal(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes other tensors together with their right digest: what somebody hostile would do."""
    save_file(tensors, folder / "model.safetensors")
    digest = WeightsFile(folder / "model.safetensors").digest()
    edit_config(folder, lambda config: config["quantization_config"].update(digest=digest))


FC1 = "model.decoder.layers.0.fc1"


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        (f"{FC1}.weight.scale", lambda t: t.fill_(float("nan")), rf"{FC1}\.weight\.scale: impossible scale"),
        (f"{FC1}.weight.scale", lambda t: t.neg_(), rf"{FC1}\.weight\.scale: impossible scale"),
        (f"{FC1}.weight.zero", lambda t: t.fill_(9), rf"{FC1}\.weight\.zero: impossible zero point"),
        (
            "model.decoder.layers.0.self_attn.k_proj.weight.pattern",
            lambda t: t.fill_(255),
            "impossible 2:4 pattern",
        ),
        (f"{FC1}.bias", lambda t: t.fill_(float("inf")), rf"{FC1}\.bias: numbers that are not finite"),
    ],
)
def test_values_that_cannot_be(folder: Path, name: str, change: Callable[[Any], Any], match: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors[name])
    reseal(folder, tensors)
    with pytest.raises(PackedModelError, match=match):
        load_packed(folder)


def test_missing_and_extra_tensors(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    reseal(folder, {name: tensor for name, tensor in tensors.items() if name != f"{FC1}.weight.codes"})
    with pytest.raises(PackedModelError, match=rf"missing .*{FC1}\.weight\.codes"):
        load_packed(folder)
    reseal(folder, {**tensors, "intruder": torch.zeros(3)})
    with pytest.raises(PackedModelError, match=r"does not have .*found intruder"):
        load_packed(folder)


def test_a_layer_of_another_spec(folder: Path) -> None:
    edit_config(folder, lambda config: config["quantization_config"]["layers"][FC1].update(bits=5))
    with pytest.raises(PackedModelError, match=rf"{FC1}\.weight\.codes: contradicts config\.json"):
        load_packed(folder)
    edit_config(folder, lambda config: config["quantization_config"]["layers"][FC1].update(bits=50))
    with pytest.raises(PackedModelError, match=r"layers\['model\.decoder\.layers\.0\.fc1'\].*found 50"):
        load_packed(folder)


def test_a_weights_file_elsewhere_is_not_read(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to("../elsewhere.safetensors")
    with pytest.raises(PackedModelError, match="leads out of the directory"):
        load_packed(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "config.json"])
def test_a_linked_companion_is_not_read(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(PackedModelError, match=f"{name}: a link that leads out"):
        load_packed(folder)


def test_an_index_is_not_followed(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"proj_out.weight": "../x"}}')
    with pytest.raises(PackedModelError, match="which packed models do not use"):
        load_packed(folder)
