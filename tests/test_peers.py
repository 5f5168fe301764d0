"""The benchmark of other tools: the file for whisper.cpp, and the table."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.convert_slow_tokenizer import bytes_to_unicode

import ggml_whisper
import peers
from small_whisper import small_teacher
from usmlite.export import ggml
from usmlite.models import Teacher

README = Path(__file__).parents[1] / "README.md"


def decoded(kind: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Weights and their scales from ggml's blocks, as its `dequantize_row_*` read them."""
    size = {"q4_0": 18, "q5_0": 22, "q8_0": 34}[kind]
    blocks = np.frombuffer(data, dtype=np.uint8).reshape(-1, size)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    if kind == "q8_0":
        return scale * blocks[:, 2:].view(np.int8), scale
    low = blocks[:, -16:]
    codes = np.concatenate([low & 15, low >> 4], axis=1).astype(np.int64)
    if kind == "q4_0":
        return scale * (codes - 8), scale
    highest = np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little")
    return scale * (codes + 16 * highest - 16), scale


@pytest.mark.parametrize("kind", ["q4_0", "q5_0", "q8_0"])
def test_ggml_blocks_are_read_back(kind: str) -> None:
    weight = np.random.default_rng(0).normal(0, 0.1, (6, 96)).astype(np.float32)
    weight[2, 32:64] = 0.0
    encode = ggml_whisper.KINDS[kind].encode
    assert encode is not None
    values, scale = decoded(kind, encode(weight))
    # The far end of the range has one code fewer, so that what is largest there may be off by a whole step.
    steps = 0.51 if kind == "q8_0" else 1.01
    assert np.all(np.abs(values - weight.reshape(-1, 32)) <= steps * np.abs(scale) + 1e-3 * np.abs(values))
    assert np.mean(np.abs(values - weight.reshape(-1, 32))) <= 0.3 * np.mean(np.abs(scale))
    assert not values[7].any()


def test_ggml_blocks_are_those_of_ggml() -> None:
    # By hand: the farthest weight, -8, gets code 0 and the scale is 1.
    weight = np.zeros((1, 32), dtype=np.float32)
    weight[0, [0, 1, 16]] = -8.0, 7.0, 3.2
    data = ggml.q4_0(weight)
    assert data[:2] == np.float16(1).tobytes()
    assert data[2:4] == bytes([0 | 11 << 4, 15 | 8 << 4])


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
def test_ggml_file(kind: str, tmp_path: Path) -> None:
    model, adapter = small_teacher(
        d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_layers=2, decoder_layers=1
    )
    path = tmp_path / "ggml.bin"
    ggml_whisper.write(Teacher(model, adapter, "small", 0), path, kind)
    header, tokens, tensors = read(path.read_bytes())
    config = adapter.config
    assert header == (
        config.vocab_size, 1500, 32, 2, 2, config.max_target_positions, 32, 2, 1, 8,
        {"f16": 1, "q8_0": 2007, "q4_0": 2002}[kind],
    )  # fmt: skip
    assert tokens == [bytes([byte]) for byte in bytes_to_unicode()]
    assert len(tensors) == len(list(model.parameters()))
    query = model.model.decoder.layers[0].encoder_attn.q_proj.weight.detach().numpy()
    shape, number, data = tensors["decoder.blocks.0.cross_attn.query.weight"]
    assert shape == (32, 32)
    if kind == "f16":
        assert number == 1
        assert np.array_equal(np.frombuffer(data, "<f2"), query.astype(np.float16).ravel())
    else:
        encode = ggml_whisper.KINDS[kind].encode
        assert encode is not None
        assert data == encode(query.astype(np.float16).astype(np.float32))
    assert tensors["encoder.conv1.bias"][:2] == ((1, 32), 0)
    assert tensors["encoder.conv2.weight"][:2] == ((3, 32, 32), 1)
    assert tensors["encoder.positional_embedding"][:2] == ((32, 1500), 0)
    assert tensors["decoder.ln.weight"][:2] == ((32,), 0)


def read(data: bytes) -> tuple[tuple[int, ...], list[bytes], dict[str, tuple[tuple[int, ...], int, bytes]]]:
    """A ggml file's header, tokens and tensors, read as whisper.cpp reads them."""
    at = 0

    def take(form: str) -> tuple[int, ...]:
        nonlocal at
        values = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(f"<{form}")
        return values

    def slice_of(size: int) -> bytes:
        nonlocal at
        at += size
        return data[at - size : at]

    assert take("i") == (0x67676D6C,)
    header = take("11i")
    mels, bins = take("2i")
    slice_of(4 * mels * bins)
    tokens = [slice_of(*take("i")) for _ in range(*take("i"))]
    tensors = {}
    block_bytes = {0: (1, 4), 1: (1, 2), 8: (32, 34), 2: (32, 18)}
    while at < len(data):
        rank, length, number = take("3i")
        shape = take(f"{rank}i")
        name = slice_of(length).decode()
        block, size = block_bytes[number]
        tensors[name] = (shape, number, slice_of(int(np.prod(shape)) // block * size))
    assert at == len(data)
    return header, tokens, tensors


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, adapter = small_teacher()
    with pytest.raises(ValueError, match=r"q4_0 packs 32 weights of a row together, .* rows of 24"):
        ggml_whisper.write(Teacher(model, adapter, "small", 0), tmp_path / "ggml.bin", "q4_0")
    assert not list(tmp_path.iterdir())


def test_dense_and_packed_are_measured(dense_model: Path, packed_model: Path, recordings: Path) -> None:
    for name, peer in ((peers.DENSE, peers.PEERS[peers.DENSE]), ("packed", peers.packed_peer(packed_model))):
        found = peers.measure(name, peer, str(dense_model), recordings, 2, peers.torch.get_num_threads())
        assert found.get("error") is None
        assert found["evaluation"]["utterance_count"] == 2
    assert found["evaluation"]["weights_bytes"] == (packed_model / "model.safetensors").stat().st_size


def test_a_failure_is_one_line(dense_model: Path, recordings: Path) -> None:
    peer = peers.packed_peer(dense_model)
    found = peers.measure("packed", peer, str(dense_model), recordings, 2, peers.torch.get_num_threads())
    assert found == {"error": "ValueError: this is not a packed model"}
    assert peers.one_line(OSError("no /somewhere/private/model.bin\nmore")) == "OSError: no model.bin"


def test_what_is_not_installed_is_said() -> None:
    peer = peers.Peer(peers.dense, "", packages=("no-such-package-at-all",))
    assert peer.missing() == "pip install no-such-package-at-all"
    assert peers.PEERS[peers.DENSE].missing() is None


def record(wer: float, size: int, difference: float | None = None) -> dict[str, Any]:
    evaluation = {"wer": wer, "ci95": [wer - 0.005, wer + 0.005], "weights_bytes": size, "wall_seconds": 61.4}
    found: dict[str, Any] = {"how": "somehow", "versions": {"tool": "1.2"}, "evaluation": evaluation}
    if difference is not None:
        found["comparison"] = {
            "difference": difference, "relative_difference": difference / 0.05,
            "relative_ci95": [0.01, 0.2], "same_transcripts": 0.9,
        }  # fmt: skip
    return found


def test_table() -> None:
    results = {
        "settings": {"model": "tiny.en", "threads": 2, "utterances": 8},
        "float32_bytes": 150_000_000,
        "machine": {"cpu": "a processor"},
        "peers": {
            "usmlite int4": record(0.06, 15_000_000, 0.01),
            "whisper.cpp q2_k": {"error": "ValueError: rows of 384"},
            "faster-whisper float32": record(0.052, 150_000_000, 0.002),
            "dense": {**record(0.05, 150_000_000), "versions": {}},
        },
    }
    lines = peers.table(results).splitlines()
    assert lines[2] == "| dense | somehow | 150.00 | 100.00 | 5.00 (4.50 to 5.50) |  | 61 |"
    assert lines[3].startswith("| faster-whisper float32 |")
    assert lines[4] == (
        "| usmlite int4 | somehow | 15.00 | 10.00 | 6.00 (5.50 to 6.50) | +20.0 % (+1.0 to +20.0) | 61 |"
    )
    assert "8 utterances" in lines[6]
    assert lines[-1] == "Not measured: whisper.cpp q2_k (ValueError: rows of 384)."
    assert peers.agreement(results["peers"]) == (
        "dense is within 0.3 points of faster-whisper float32: -0.20, 90.0 % of transcripts are the same"
    )


def test_the_readme_has_a_place_for_the_table() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.count("<!-- peers -->") == text.count("<!-- /peers -->") == 1
