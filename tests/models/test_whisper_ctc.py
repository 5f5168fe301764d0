"""Whisper's encoder with a CTC head: what it hears, in batches, in chunks and beyond its window."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCTC, pipeline

from small_ctc import save_model
from small_whisper import small_teacher
from usmlite.audio import log_mel
from usmlite.errors import AudioError
from usmlite.load import load
from usmlite.models import TimedText, load_teacher
from usmlite.models.whisper_ctc import WhisperForCTC
from usmlite.models.whisper_ctc_config import WhisperCTCConfig

SIZES: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 3, "encoder_attention_heads": 2, "encoder_ffn_dim": 48,
    "init_range": 0.2,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks": {"chunk_frames": 16, "left_chunks": 1},
    "stacked": {"time_reduction": 2},
    "conditioned": {"intermediate_layers": [1, 2]},
    "all of it": {"chunk_frames": 16, "left_chunks": 2, "time_reduction": 3, "intermediate_layers": [2]},
}


def small(**changes: Any) -> WhisperForCTC:
    torch.manual_seed(0)
    return WhisperForCTC(WhisperCTCConfig(**{**SIZES, **changes})).eval()


def features(frames: int, seed: int = 0) -> Tensor:
    return torch.randn(1, 80, frames, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_batches_say_what_each_says_alone(kind: str) -> None:
    model = small(**KINDS[kind])
    lengths = (201, 150, 3, 1)
    batch = torch.full((4, 80, 201), 7.0)  # whatever the padding holds
    mask = torch.zeros(4, 201, dtype=torch.long)
    for row, length in enumerate(lengths):
        batch[row, :, :length] = features(length, row)
        mask[row, :length] = 1
    with torch.no_grad():
        together = model(batch, mask).logits
        counts = model._get_feat_extract_output_lengths(torch.tensor(lengths)).tolist()
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            alone = model(features(length, row)).logits[0]
            assert len(alone) == count
            assert torch.allclose(together[row, :count], alone, atol=1e-5), length
    assert together.shape[1] == counts[0]
    assert bool(together.isfinite().all())


def test_frames_hear_their_chunk_and_those_before_it() -> None:
    model = small(chunk_frames=16, left_chunks=1)
    one, two = features(200), features(200)
    # Frame 32 begins the third chunk; convolutions before attention hear two log-mel frames ahead.
    two[:, :, 66:] = 3.0
    with torch.no_grad():
        before, after = (model(x).logits[0] for x in (one, two))
    assert torch.equal(before[:32], after[:32])
    assert not torch.allclose(before[32:], after[32:])
    # Three layers of one chunk to the left: the fifth chunk hears nothing of the first.
    three = features(200)
    three[:, :, :20] = 3.0
    with torch.no_grad():
        changed = (model(three).logits[0] != before).any(dim=1)
    assert bool(changed[:64].any())
    assert not bool(changed[64:].any())


def test_with_chunks_text_does_not_wait_for_the_end_of_the_audio(tmp_path: Path) -> None:
    recognizer = load(save_model(tmp_path, "WhisperForCTC", chunk_frames=25, left_chunks=2))
    generator = torch.Generator().manual_seed(0)
    one = 0.1 * torch.randn(1, 32_000, generator=generator)
    two = one.clone()
    two[:, 16_000 + 800 :] *= 9.0  # much louder 50 ms after the second chunk's end
    with torch.no_grad():
        heard = [recognizer.adapter.hear(x, [2.0]) for x in (one, two)]
        logits = [recognizer.model(x["input_features"], x["attention_mask"]).logits[0] for x in heard]
    assert torch.equal(logits[0][:50], logits[1][:50])
    assert not torch.allclose(logits[0][50:], logits[1][50:])


def test_causal_features_are_those_of_the_audio_so_far() -> None:
    samples = 0.1 * torch.randn(1, 16_000, generator=torch.Generator().manual_seed(0))
    samples[:, 8_000:] *= 30.0
    whole, part = (log_mel(x, causal=True) for x in (samples, samples[:, :7_600]))
    assert torch.allclose(whole[:, :, :45], part[:, :, :45], atol=1e-5)
    assert torch.equal(log_mel(samples, causal=True)[:, :, -1], log_mel(samples)[:, :, -1])


def test_audio_beyond_the_window_is_encoded_in_windows() -> None:
    model = small(max_source_positions=50)
    x = features(230)
    mask = torch.ones(1, 230, dtype=torch.long)
    mask[:, 205:] = 0
    with torch.no_grad():
        whole = model(x).logits
        parts = [model(x[:, :, low : low + 100]).logits for low in (0, 100, 200)]
        masked = model(x, mask).logits
    assert torch.equal(whole, torch.cat(parts, dim=1))
    assert torch.equal(masked[:, :100], whole[:, :100])
    assert bool(masked.isfinite().all())


def test_it_is_the_encoder_of_whisper() -> None:
    whisper, _ = small_teacher()
    model = WhisperForCTC.from_whisper(whisper, vocab_size=30)
    x = torch.randn(1, whisper.config.num_mel_bins, 3000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = whisper.model.encoder(x).last_hidden_state
        assert torch.allclose(model.encoder(x).last_hidden_state, theirs, atol=1e-5)
    other = small(encoder_layers=2)
    other.get_encoder = lambda: other.ctc_head  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="not Whisper's encoder"):
        WhisperForCTC.from_whisper(other)


def test_transformers_saves_and_loads_it(tmp_path: Path) -> None:
    model = small(**KINDS["all of it"])
    model.save_pretrained(tmp_path)
    again, report = AutoModelForCTC.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is WhisperForCTC
    assert not any(report.values())
    assert (again.config.intermediate_layers, again.config.chunk_frames) == ([2], 16)
    with torch.no_grad():
        assert torch.equal(again(features(99)).logits, model(features(99)).logits)
    # In a process where nobody has asked for a model yet, and for the configuration alone.
    code = (
        "import sys, usmlite; from transformers import AutoConfig\n"
        "print(AutoConfig.from_pretrained(sys.argv[1]).model_type)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.strip() == "whisper_ctc"
    assert type(AutoConfig.from_pretrained(tmp_path)) is WhisperCTCConfig


def test_a_pipeline_of_transformers_says_the_same(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "WhisperForCTC")
    noise = np.random.default_rng(0).normal(0, 0.1, 24_000).astype(np.float32)
    theirs = pipeline("automatic-speech-recognition", model=str(folder))
    ours = load(folder).transcribe_batch([noise])[0]
    assert " ".join(theirs(noise)["text"].split()) == ours


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"time_reduction": 0}, "time_reduction must be at least 1"),
        ({"time_reduction": 7}, "must divide 1500"),
        ({"intermediate_layers": [3]}, "from 1 to 2"),
        ({"chunk_frames": -1}, "chunk_frames must be at least 0"),
    ],
)
def test_a_configuration_out_of_range_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        small(**wrong)


def test_the_loss_is_the_mean_of_all_heads(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "WhisperForCTC", encoder_layers=3, intermediate_layers=[1, 2])
    teacher = load_teacher(folder)
    model, network = teacher.model, teacher.adapter.network
    assert network.intermediate == ("encoder.conditioning.1.head", "encoder.conditioning.2.head")
    samples = 0.1 * torch.randn(2, 32_000, generator=torch.Generator().manual_seed(0))
    batch = {
        **teacher.adapter.hear(samples, [2.0, 1.3]),
        **teacher.adapter.teach(
            [[TimedText(0, 1, "hello")], [TimedText(0, 1, "at all")]], timestamps=[False] * 2, language=None
        ),
    }
    seen: list[Tensor] = []
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.append(output))
        for name in network.intermediate
    ]
    with torch.no_grad():
        final = network.logits(model, batch, network.states(model, batch))
        for hook in hooks:
            hook.remove()
        scored = network.scored(batch)
        alone = [network.text_loss(logits, batch) for logits in (final, *(each[scored] for each in seen))]
        together = network.text_loss(final, batch, seen)
    assert len({round(float(loss), 4) for loss in alone}) == 3
    assert float(together) == pytest.approx(float(torch.stack(alone).mean()), rel=1e-6)


def test_what_it_says_reaches_the_layers_after(tmp_path: Path) -> None:
    model = small(intermediate_layers=[1])
    x = features(50)
    with torch.no_grad():
        before = model(x).logits
        model.encoder.conditioning["1"].head.bias[3] += 5.0
        assert not torch.allclose(model(x).logits, before)


def test_audio_of_a_frame_and_shorter(tmp_path: Path) -> None:
    recognizer = load(save_model(tmp_path, "WhisperForCTC"))
    assert recognizer.adapter.shortest == 0.1  # what audio must last anyway
    recognizer.transcribe(np.random.default_rng(0).normal(0, 0.1, 1600).astype(np.float32))
    with pytest.raises(AudioError, match="shorter than one frame"):
        recognizer.adapter.hear(torch.zeros(1, 1600), [0.05])


def test_not_a_number_is_no_text(tmp_path: Path) -> None:
    recognizer = load(save_model(tmp_path, "WhisperForCTC"))
    samples = np.full(16_000, np.nan, np.float32)
    with pytest.raises(AudioError, match="not numbers"):
        recognizer.transcribe(samples)
