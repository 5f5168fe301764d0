from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from small_whisper import small_student
from usmlite import packfile
from usmlite.errors import ModelError, OutputError
from usmlite.pack import pack
from usmlite.packed import load_packed
from usmlite.packfile import Manifest, WeightsFile, WeightsWriter
from usmlite.spec import CompressionSpec, Int, LayerSpec, Rule, matrix_shape
from usmlite.student import StudentOptions, compressed_layers, fake_quantized, make_student, round_kept


def test_the_directory_is_laid_out_as_hugging_face_expects(tmp_path: Path) -> None:
    student, adapter = small_student()
    packed = pack(student, adapter, tmp_path / "out")

    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json"} <= names
    assert {"preprocessor_config.json", "tokenizer.json"} <= names
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "whisper"
    assert config["architectures"] == ["WhisperForConditionalGeneration"]
    settings = config["quantization_config"]
    assert settings["quant_method"] == "usmlite"
    assert settings["format_version"] == 2
    assert settings["digest"] == packed.digest
    assert settings["layers"]["model.decoder.embed_tokens"]["column_scales"] is True
    assert settings["layers"]["model.decoder.layers.0.fc1"]["sparsity"] == "2:4"
    assert settings["computed"] == {"model.encoder.embed_positions.weight": "sinusoids-float16"}
    assert packed.weights_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_every_byte_is_accounted_for(tmp_path: Path) -> None:
    student, adapter = small_student()
    packed = pack(student, adapter, tmp_path / "out", coded=False)
    compressed = sum(layer.spec.bytes(*matrix_shape(layer.shape)) for layer in packed.layers.values())
    weights = WeightsFile(tmp_path / "out" / "model.safetensors")
    header = min(entry.start for entry in weights.entries.values())
    assert packed.weights_bytes == compressed + sum(packed.kept.values()) + header


def test_tied_weights_are_stored_once_and_computed_ones_not_at_all(tmp_path: Path) -> None:
    student, adapter = small_student()
    pack(student, adapter, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert not any(name.startswith("proj_out") for name in stored)
    assert "model.encoder.embed_positions.weight" not in stored
    assert not any("compression" in name for name in stored)
    floats = {name: tensor.dtype for name, tensor in stored.items() if tensor.is_floating_point()}
    assert set(floats.values()) == {torch.float16}


def test_positions_that_are_not_sinusoids_are_stored(tmp_path: Path) -> None:
    student, adapter = small_student()
    with torch.no_grad():
        student.get_parameter("model.encoder.embed_positions.weight").add_(0.01)
    packed = pack(student, adapter, tmp_path / "out")
    assert packed.computed == {}
    assert "model.encoder.embed_positions.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_a_model_without_any_compression_is_stored_in_float16(tmp_path: Path) -> None:
    student, adapter = small_student(CompressionSpec())
    packed = pack(student, adapter, tmp_path / "out")
    assert packed.layers == {}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(
        stored["model.decoder.embed_tokens.weight"].float(), student.model.decoder.embed_tokens.weight
    )


def test_rules_of_every_kind_are_recorded(tmp_path: Path) -> None:
    rules = (
        Rule("*.fc1", LayerSpec(Int(3, symmetric=False), group=8)),
        Rule("*.fc2", LayerSpec()),
        Rule("*.q_proj", LayerSpec(Int(2, grid="midrise"))),
        Rule("*.k_proj", LayerSpec(Int(2, grid="ternary"))),
    )
    student, adapter = small_student(CompressionSpec.simple(4, "1:4", first=rules))
    packed = pack(student, adapter, tmp_path / "out")
    manifest = packfile.read_manifest(tmp_path / "out")
    assert manifest.layers == packed.layers
    assert {name for name, _ in compressed_layers(student)} == set(manifest.layers)
    assert isinstance(manifest, Manifest)


@pytest.mark.parametrize("place", ["model.decoder.layers.0.fc1.weight", "model.decoder.layers.0.fc1.bias"])
def test_a_student_that_is_not_finite_is_refused(tmp_path: Path, place: str) -> None:
    student, adapter = small_student()
    with torch.no_grad():
        student.get_parameter(place).view(-1)[5] = float("nan")
    with pytest.raises(ModelError, match=f"{place}.*not finite"):
        pack(student, adapter, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_mask_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    student, adapter = small_student()
    layer = dict(compressed_layers(student))["model.decoder.layers.0.fc1"]
    assert layer.compression.mask is not None
    layer.compression.mask[3] = True
    with pytest.raises(
        ModelError, match=r"layers\.0\.fc1\.weight, rows 0 to 39: the mask does not keep 2 of"
    ):
        pack(student, adapter, tmp_path / "out")


def test_a_full_disk_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, adapter = small_student()
    first = pack(student, adapter, tmp_path / "out")
    calls = []
    write = WeightsWriter.write

    def failing(self: WeightsWriter, name: str, tensor: torch.Tensor) -> None:
        calls.append(name)
        if len(calls) == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, tensor)

    monkeypatch.setattr(WeightsWriter, "write", failing)
    with pytest.raises(OutputError, match="No space left on device") as caught:
        pack(student, adapter, tmp_path / "out")
    assert "try again" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    weights = WeightsFile(tmp_path / "out" / "model.safetensors")
    assert weights.digest() == first.digest


def test_packing_again_replaces_the_model(tmp_path: Path) -> None:
    student, adapter = small_student()
    first = pack(student, adapter, tmp_path / "out")
    other, _ = small_student(seed=5)
    second = pack(other, adapter, tmp_path / "out")
    assert first.digest != second.digest
    assert packfile.read_manifest(tmp_path / "out").digest == second.digest


def test_somebody_elses_directory_is_left_alone(tmp_path: Path) -> None:
    student, adapter = small_student()
    (tmp_path / "photo.jpg").write_text("me")
    with pytest.raises(OutputError, match="not a packed model"):
        pack(student, adapter, tmp_path)


def test_packing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    student, adapter = small_student()
    for name in ("one", "two"):
        pack(student, adapter, tmp_path / name)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (
        tmp_path / "two/model.safetensors"
    ).read_bytes()


def test_the_student_is_not_changed(tmp_path: Path) -> None:
    teacher_student, adapter = small_student()
    before = {name: tensor.clone() for name, tensor in teacher_student.state_dict().items()}
    pack(teacher_student, adapter, tmp_path / "out")
    after = teacher_student.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


MEMORY = """
import sys, torch
from pathlib import Path
from torch import nn

sys.path.insert(0, sys.argv[2])
from usmlite import packed as packed_model
from usmlite.pack import pack
from usmlite.spec import CompressionSpec
from usmlite.student import StudentOptions, make_student
from small_whisper import small_teacher

def reset():
    Path("/proc/self/clear_refs").write_text("5")
    return current()

def field(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def current():
    return field("VmRSS")

def peak():
    return field("VmHWM")

teacher, adapter = small_teacher(vocab_size=100_000, d_model=192)
options = StudentOptions(scales=sys.argv[3])
student = make_student(teacher, adapter.compressible(teacher), CompressionSpec.simple(4, "2:4"), options)
largest = 100_000 * 192 * 4
pack(small_teacher()[0], adapter, sys.argv[1] + "/warm-up")
start = reset()
pack(student, adapter, sys.argv[1] + "/out")
packing = peak() - start
del student, teacher
packed_model.load_packed(sys.argv[1] + "/warm-up")
start = reset()
model, _ = packed_model.load_packed(sys.argv[1] + "/out")
loading = peak() - start
returned = sum(p.numel() * 4 for p in model.parameters())
print(packing, loading - returned, largest)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's memory accounting")
@pytest.mark.parametrize("scales", ["learned", "min-max"])
def test_at_most_one_dense_copy_of_the_largest_tensor(tmp_path: Path, scales: str) -> None:
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", MEMORY, str(tmp_path), here, scales]
    # Freed blocks go back to the system at once: what earlier work left behind must not hide anything.
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=900, env=os.environ | allocator
    )
    packing, loading, largest = (int(number) for number in result.stdout.split())
    # That something is measured at all: a block of rows and the mapped file count.
    # A twentieth for what coding and the file beside it take.
    assert 0 < packing <= 1.05 * largest, f"packing took {packing} bytes, the largest tensor is {largest}"
    assert 0 < loading <= largest, f"loading took {loading} bytes beyond the model"


def test_min_max_students_pack_as_they_compute(tmp_path: Path) -> None:
    from small_whisper import small_teacher

    teacher, adapter = small_teacher()
    options = StudentOptions(scales="min-max", masks="fixed")
    student = make_student(teacher, adapter.compressible(teacher), CompressionSpec.simple(3, "2:4"), options)
    round_kept(student)
    packed = pack(student, adapter, tmp_path / "out")
    assert len(packed.layers) == len(dict(compressed_layers(student)))


def test_entropy_coding_changes_the_file_and_not_the_model(tmp_path: Path) -> None:
    student, adapter = small_student(CompressionSpec.simple(4), d_model=64, decoder_ffn_dim=256)
    fixed = pack(student, adapter, tmp_path / "fixed", coded=False)
    coded = pack(student, adapter, tmp_path / "coded")
    assert coded.weights_bytes < fixed.weights_bytes
    assert all(layer.coded is None for layer in fixed.layers.values())
    table = coded.layers["model.decoder.embed_tokens"]
    assert table.coded is not None
    assert {path.name for path in (tmp_path / "coded").iterdir()} == {
        path.name for path in (tmp_path / "fixed").iterdir()
    }
    one, two = (load_packed(tmp_path / name, hold="packed")[0] for name in ("fixed", "coded"))
    ours, theirs = one.state_dict(), two.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_weights_along_a_trellis_are_smaller_and_come_back(tmp_path: Path) -> None:
    rules = (Rule("*.fc1", LayerSpec.at_rate(2.5, 8)), Rule("*.embed_tokens", LayerSpec.at_rate(3.0, 32)))
    spec = CompressionSpec((*rules, *CompressionSpec.simple(4).rules))
    student, adapter = small_student(spec, encoder_ffn_dim=4200)
    sizes = {}
    for coded in (True, False):
        packed = pack(student, adapter, tmp_path / str(coded), coded=coded)
        config = json.loads((tmp_path / str(coded) / "config.json").read_text())["quantization_config"]
        # Without entropy coding they are codes like all others.
        assert config["format_version"] == (3 if coded else 2)
        layer = config["layers"]["model.encoder.layers.0.fc1"]
        assert layer.get("trellis") == (8 if coded else None)
        assert "rate" not in layer
        loaded, _ = load_packed(tmp_path / str(coded), hold="float32")
        for name, module in compressed_layers(student):
            expected = fake_quantized(module)
            assert torch.equal(loaded.get_submodule(name).weight, expected), name
        sizes[coded] = packed.weights_bytes
    assert sizes[True] < 0.6 * sizes[False]


def test_weights_that_left_their_trellis_are_not_packed(tmp_path: Path) -> None:
    spec = CompressionSpec((Rule("*.fc1", LayerSpec.at_rate(2.5, 8)), *CompressionSpec.simple(4).rules))
    student, adapter = small_student(spec)
    with torch.no_grad():
        student.get_submodule("model.encoder.layers.0.fc1").weight.mul_(1.1)
    with pytest.raises(ModelError, match=r"fc1\.weight.*does not follow its trellis.*hessian"):
        pack(student, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
