"""The native encoder and decoder say what the modules of Transformers and torch say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from small_whisper import small_student, small_teacher
from usmlite.kernels import native
from usmlite.models import engine
from usmlite.models.decoding import DecodingOptions, Prompt, _Decoder, decode_greedily
from usmlite.pack import pack
from usmlite.packed import load_packed
from usmlite.spec import CompressionSpec

needs_native = pytest.mark.skipif(not native.paths(), reason="installed without the native library")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    student, adapter = small_student(CompressionSpec.simple(4, "2:4"), decoder_layers=2)
    generator = torch.Generator().manual_seed(3)
    for parameter in student.parameters():
        if parameter.ndim > 1:  # lively: one token is not like another
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    path = tmp_path_factory.mktemp("engine") / "packed"
    pack(student, adapter, path)
    return path


def features() -> torch.Tensor:
    return torch.randn(2, 8, 3000, generator=torch.Generator().manual_seed(1))


def close(found: torch.Tensor, expected: torch.Tensor, limit: float) -> bool:
    return float((found - expected).norm() / expected.norm()) < limit


@needs_native
@pytest.mark.parametrize("hold", ["int8", "packed"])
def test_a_packed_model_runs_in_the_library(folder: Path, hold: Any) -> None:
    exact, _ = load_packed(folder)
    model, _ = load_packed(folder, hold=hold)
    with torch.inference_mode():
        expected = engine.encode(exact, features())
        encoded = engine.encode(model, features())
        assert not torch.equal(encoded, expected)
        assert close(encoded, expected, 0.03)
        decoder = engine.native_decoder(model, expected)
        assert decoder is not None
        ids = torch.tensor([[257, 263, 40], [257, 263, 90]])
        reference = _Decoder(exact, expected)
        assert close(decoder.step(ids), reference.step(ids), 0.03)
        more = torch.tensor([[7], [9]])
        hidden, wanted = decoder.step(more), reference.step(more)
        assert close(hidden, wanted, 0.03)
        assert close(decoder.logits(hidden[:, 0]), reference.logits(wanted[:, 0]), 0.03)


@needs_native
def test_a_batch_says_what_each_row_says_alone(folder: Path) -> None:
    """Rows end at different times, and the last one moves into their place."""
    model, _ = load_packed(folder, hold="int8")
    options = DecodingOptions(
        end=0, timestamp_begin=None, no_timestamps=263, no_speech=262, max_new_tokens=20
    )
    encoded = torch.randn(5, 1500, 24, generator=torch.Generator().manual_seed(0)) * 2
    free = [decode_greedily(model, row[None], Prompt(257, [263]), options)[0].tokens for row in encoded]
    common = next(token for token in free[0] if any(token not in row for row in free))
    ended = DecodingOptions(
        end=common, timestamp_begin=None, no_timestamps=263, no_speech=262, max_new_tokens=20
    )
    alone = [decode_greedily(model, row[None], Prompt(257, [263]), ended)[0].tokens for row in encoded]
    together = [row.tokens for row in decode_greedily(model, encoded, Prompt(257, [263]), ended)]
    assert together == alone
    assert len({len(tokens) for tokens in together}) > 1


@needs_native
def test_rows_are_selected(folder: Path) -> None:
    model, _ = load_packed(folder, hold="int8")
    encoded = torch.randn(2, 30, 24, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        decoder = engine.native_decoder(model, encoded)
        swapped = engine.native_decoder(model, encoded.flip(0).contiguous())
        assert decoder is not None
        assert swapped is not None
        ids = torch.tensor([[257, 4], [257, 5]])
        decoder.step(ids)
        swapped.step(ids.flip(0))
        decoder.select([1, 0, 0])
        found = decoder.step(torch.tensor([[6], [7], [8]]))
        swapped.select([0, 1])
        assert torch.equal(found[:2], swapped.step(torch.tensor([[6], [7]])))


def test_what_the_library_does_not_take_runs_through_torch(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense models, float32 activations, other dtypes and layers, and everything without the library."""
    encoded = torch.randn(1, 30, 24)

    def runs_in_torch(model: Any, dtype: torch.dtype = torch.float32) -> bool:
        with torch.inference_mode():
            windows = features()[:1].to(dtype)
            expected = model.model.encoder(windows).last_hidden_state
            same = torch.equal(engine.encode(model, windows), expected)
            return same and engine.native_decoder(model, encoded.to(dtype)) is None

    assert runs_in_torch(small_teacher()[0])
    assert runs_in_torch(load_packed(folder)[0])
    assert runs_in_torch(load_packed(folder, hold="int8", activations="float32")[0])
    assert runs_in_torch(load_packed(folder, hold="int8")[0].to(torch.bfloat16), torch.bfloat16)
    monkeypatch.setenv(native.VARIABLE, "reference")
    assert runs_in_torch(load_packed(folder, hold="int8")[0])


@needs_native
def test_a_model_with_one_dense_layer_runs_through_torch(folder: Path) -> None:
    model, _ = load_packed(folder, hold="int8")
    inner: Any = model
    inner.model.encoder.layers[0].fc1 = torch.nn.Linear(24, 40).eval()
    inner.model.decoder.layers[1].fc1 = torch.nn.Linear(24, 40).eval()
    with torch.inference_mode():
        expected = inner.model.encoder(features()).last_hidden_state
        assert torch.equal(engine.encode(model, features()), expected)
        assert engine.native_decoder(model, expected) is None


def test_runtime_needs_no_transformers() -> None:
    code = "import sys, usmlite.runtime; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
