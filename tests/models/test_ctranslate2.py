from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ct2_writer import Blob, serialize, variables, write_directory
from small_whisper import small_teacher
from usmlite.errors import ModelError
from usmlite.models import load_teacher
from usmlite.models.ctranslate2 import ModelFile, read_config, read_weights

FFN = "encoder/layer_0/ffn/linear_0"


@pytest.fixture(scope="module")
def teacher():
    return small_teacher(encoder_layers=2, decoder_layers=1, encoder_ffn_dim=48)


@pytest.fixture(scope="module")
def blobs(teacher) -> dict[str, Blob]:
    return variables(teacher[0])


def read(path: Path, data: bytes) -> dict[str, torch.Tensor]:
    path.write_bytes(data)
    file = ModelFile([path])
    return dict(read_weights(file, read_config(file)))


def test_a_float32_model_comes_back_exactly(tmp_path: Path, teacher, blobs: dict[str, Blob]) -> None:
    model, _ = teacher
    weights = read(tmp_path / "model.bin", serialize(blobs))
    expected = {name: value for name, value in model.state_dict().items() if name != "proj_out.weight"}
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name


def test_the_architecture_is_read_from_the_variables(tmp_path: Path, teacher, blobs) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(serialize(blobs))
    found, wanted = read_config(ModelFile([path])), teacher[0].config
    sizes = "d_model encoder_layers decoder_layers encoder_ffn_dim decoder_ffn_dim num_mel_bins vocab_size"
    more = "encoder_attention_heads decoder_attention_heads max_source_positions max_target_positions"
    for name in [*sizes.split(), *more.split(), "activation_function"]:
        assert getattr(found, name) == getattr(wanted, name), name


def test_heads_that_are_not_written_are_64_wide(tmp_path: Path) -> None:
    model, _ = small_teacher(d_model=128)
    blobs = {name: blob for name, blob in variables(model).items() if "num_heads" not in name}
    path = tmp_path / "model.bin"
    path.write_bytes(serialize(blobs))
    assert read_config(ModelFile([path])).encoder_attention_heads == 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_widened_exactly(tmp_path: Path, teacher, dtype: str) -> None:
    weights = read(tmp_path / "model.bin", serialize(variables(teacher[0], dtype)))
    for name, value in teacher[0].state_dict().items():
        if name in weights:
            assert torch.equal(weights[name], value.to(getattr(torch, dtype)).float()), name


@pytest.mark.parametrize(("dtype", "levels"), [("int8", 127), ("int16", 1024)])
def test_integers_are_divided_by_their_scale(tmp_path: Path, teacher, dtype: str, levels: int) -> None:
    weights = read(tmp_path / "model.bin", serialize(variables(teacher[0], dtype)))
    source = teacher[0].state_dict()["model.decoder.layers.0.encoder_attn.v_proj.weight"].numpy()
    stacked = np.concatenate(
        [teacher[0].state_dict()[f"model.decoder.layers.0.encoder_attn.{part}_proj.weight"] for part in "kv"]
    )
    peak = np.abs(source).max(axis=1, keepdims=True) if dtype == "int8" else np.abs(stacked).max()
    scale = np.float32(levels) / peak
    expected = np.rint(source * scale) / scale
    found = weights["model.decoder.layers.0.encoder_attn.v_proj.weight"].numpy()
    assert np.array_equal(found, expected.astype(np.float32))
    biases = "model.decoder.layers.0.fc1.bias"
    assert torch.equal(weights[biases], teacher[0].state_dict()[biases])


@pytest.mark.parametrize("cut", [1, 1000, 33_333, -1])
def test_a_file_in_parts_reads_like_the_whole(tmp_path: Path, teacher, blobs, cut: int) -> None:
    data = serialize(blobs)
    parts = [tmp_path / "part1", tmp_path / "part2"]
    parts[0].write_bytes(data[:cut])
    parts[1].write_bytes(data[cut:])
    file = ModelFile(parts)
    for name, value in read_weights(file, read_config(file)):
        assert torch.equal(value, teacher[0].state_dict()[name]), name


def test_a_directory_becomes_a_teacher(tmp_path: Path, teacher) -> None:
    model, adapter = teacher
    data = serialize(variables(model, "float16"))
    directory = write_directory(tmp_path, adapter, data, suppress_ids=[3, 5], suppress_ids_begin=[7])
    found = load_teacher(directory)
    assert found.adapter.generation.suppress_tokens == [3, 5]
    assert found.adapter.generation.begin_suppress_tokens == [7]
    assert found.float32_bytes == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert found.adapter.computed(found.model) == {"model.encoder.embed_positions.weight"}
    assert found.model.proj_out.weight is found.model.model.decoder.embed_tokens.weight
    assert not found.model.training
    assert not any(parameter.requires_grad for parameter in found.model.parameters())
    features = torch.randn(1, 8, 3000)
    ids = torch.tensor([[257, 263, 40]])
    half = model.half().float()
    half.model.encoder.embed_positions.weight.data = adapter.compute("model.encoder.embed_positions.weight")
    with torch.inference_mode():
        ours = found.model(input_features=features, decoder_input_ids=ids).logits
        theirs = half(input_features=features, decoder_input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


Change = Callable[[dict[str, Blob]], None]


def edit(name: str, **values: object) -> Change:
    """Changes the header of one variable, not its bytes."""

    def change(blobs: dict[str, Blob]) -> None:
        blob = Blob.__new__(Blob)
        blob.__dict__.update({**blobs[name].__dict__, **values})
        blobs[name] = blob

    return change


def replace(name: str, values: np.ndarray, dtype: str = "float32") -> Change:
    def change(blobs: dict[str, Blob]) -> None:
        blobs[name] = Blob(values, dtype)

    return change


def drop(name: str) -> Change:
    return lambda blobs: blobs.pop(name) and None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit(f"{FFN}/bias", type=6), "unknown type"),
        (edit(f"{FFN}/bias", shape=[49]), "contradicts its shape"),
        (edit(f"{FFN}/weight", shape=[2**32 - 1, 2**32 - 1]), "contradicts its shape"),
        (edit(f"{FFN}/weight", shape=[1] * 9), "too many dimensions"),
        (edit(f"{FFN}/bias", shape=[2**30], size=2**32 - 1), "contradicts its shape"),
        (edit(f"{FFN}/bias", shape=[2**29], size=2**31), "ends early"),
        (drop(f"{FFN}/bias"), "bias is missing"),
        (drop("encoder/conv1/weight"), "conv1/weight is missing"),
        (drop("decoder/embeddings/weight"), "contradicts the variables"),
        (drop("decoder/layer_0/self_attention/linear_0/weight"), "no layers"),
        (replace("encoder/conv1/weight", np.zeros((24, 8))), "wrong shape"),
        (replace(f"{FFN}/bias", np.zeros(47)), "wrong shape"),
        (replace(f"{FFN}/bias", np.zeros(48), "int32"), "wrong type"),
        (replace(f"{FFN}/weight", np.zeros((48, 24)), "int8"), "weight_scale is missing"),
        (replace("decoder/layer_0/attention/linear_1/bias", np.ones(48)), "bias on its keys"),
        (replace("decoder/activation", np.asarray(0), "int8"), "decoder/activation"),
        (replace("decoder/scale_embeddings", np.asarray(1), "int8"), "scale_embeddings"),
        (replace("decoder/num_heads", np.asarray(5), "int16"), "number of heads"),
        (replace("decoder/num_heads", np.asarray(0), "int16"), "number of heads"),
        (replace("decoder/num_heads", np.asarray(2.0), "float32"), "wrong form"),
        (replace("decoder/rotary", np.asarray(1), "int8"), "decoder/rotary"),
        (replace("decoder/layer_0/adapter/weight", np.zeros((2, 2))), "that Whisper has not"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, blobs, change: Change, message: str) -> None:
    altered = dict(blobs)
    change(altered)
    path = tmp_path / "model.bin"
    with pytest.raises(ModelError) as caught:
        read(path, serialize(altered))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_scale_of_the_wrong_length_is_refused(tmp_path: Path, teacher) -> None:
    blobs = variables(teacher[0], "int8")
    blobs[f"{FFN}/weight_scale"] = Blob(np.ones(3), "float32")
    with pytest.raises(ModelError, match="cannot scale"):
        read(tmp_path / "model.bin", serialize(blobs))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"version": 5}, "binary version 6, found 5"),
        ({"spec": "TransformerSpec"}, "TransformerSpec"),
        ({"revision": 4}, "revision 4"),
        ({"aliases": {}}, "output projection"),
        ({"aliases": {"decoder/projection/weight": "nothing"}}, "contradicts the variables"),
        ({"spec": "Whisper\x07"}, "not a name"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, blobs, header: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read(tmp_path / "model.bin", serialize(blobs, **header))


def test_bytes_after_the_end_are_refused(tmp_path: Path, blobs) -> None:
    with pytest.raises(ModelError, match="after the last entry"):
        read(tmp_path / "model.bin", serialize(blobs) + b"\0")


def test_a_variable_that_is_there_twice_is_refused(tmp_path: Path, blobs) -> None:
    blob = blobs["decoder/alibi"]
    data = serialize({"a": blob}, aliases={})
    start = data.index(b"\x02\x00a\0")
    entry = data[start:-4]
    twice = data[: start - 4] + struct.pack("<I", 2) + entry + entry + data[-4:]
    path = tmp_path / "model.bin"
    path.write_bytes(twice)
    with pytest.raises(ModelError, match="a is there twice"):
        ModelFile([path])


@pytest.mark.parametrize(
    "data", [b"", b"\x06", b"\x06\0\0\0\xff\xff", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_what_is_no_model_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.bin"):
        ModelFile([path])


def test_a_file_cut_anywhere_is_refused(tmp_path: Path, blobs) -> None:
    data = serialize(blobs)
    path = tmp_path / "model.bin"
    for length in sorted({*range(0, 200, 7), *range(200, len(data), len(data) // 40), len(data) - 1}):
        path.write_bytes(data[:length])
        with pytest.raises(ModelError):
            ModelFile([path])


def test_altered_bytes_never_raise_anything_else(tmp_path: Path, blobs) -> None:
    data = serialize(blobs)
    # Everything but the weights, where a changed byte is only another weight.
    small = [index for index in range(len(data)) if index < 300 or index > len(data) - 100]
    path = tmp_path / "model.bin"

    @settings(max_examples=60, deadline=None)
    @given(st.sampled_from(small), st.integers(0, 255))
    def check(index: int, value: int) -> None:
        path.write_bytes(data[:index] + bytes([value]) + data[index + 1 :])
        try:
            file = ModelFile([path])
            dict(read_weights(file, read_config(file)))
        except ModelError:
            pass

    check()
