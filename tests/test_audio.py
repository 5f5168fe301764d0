"""Reading audio and Whisper's features."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import WhisperFeatureExtractor

from usmlite.audio import (
    SAMPLE_RATE,
    WINDOW_SAMPLES,
    audio_seconds,
    check_samples,
    load_audio,
    log_mel,
)
from usmlite.errors import AudioError, AudioFormatError, AudioTooLongError


def tone(seconds: float, rate: int = SAMPLE_RATE, hertz: float = 440.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def save(path: Path, samples: np.ndarray, rate: int = SAMPLE_RATE, **options: str) -> Path:
    soundfile.write(path, samples, rate, **options)
    return path


FORMATS = {
    "a.wav": {},
    "float.wav": {"subtype": "FLOAT"},
    "a.flac": {},
    "a.ogg": {"format": "OGG", "subtype": "VORBIS"},
    "a.opus": {"format": "OGG", "subtype": "OPUS"},
    "a.mp3": {"format": "MP3"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_tone(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, tone(2.0), **FORMATS[name])
    samples = load_audio(path)
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert audio_seconds(path) == pytest.approx(2.0, abs=0.1)
    assert len(samples) == pytest.approx(32_000, abs=1_600)
    spectrum = np.abs(np.fft.rfft(samples[4_000:20_000]))
    assert np.argmax(spectrum) == 440
    assert np.sqrt(np.mean(samples[4_000:20_000] ** 2)) == pytest.approx(0.3 / np.sqrt(2), rel=0.03)


@pytest.mark.parametrize("name", FORMATS)
def test_open_files_are_read_like_paths(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, tone(1.0, 22_050), 22_050 if "opus" not in name else 24_000, **FORMATS[name])
    content = io.BytesIO(path.read_bytes())
    np.testing.assert_array_equal(load_audio(content), load_audio(path))
    content.seek(0)
    assert audio_seconds(content) == audio_seconds(path)


def test_errors_tell_what_is_no_audio_from_what_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(AudioFormatError, match=r"^audio: cannot be read as audio"):
        load_audio(io.BytesIO(b"nothing of the kind"))
    with pytest.raises(AudioTooLongError, match="at most 1 s"):
        load_audio(save(tmp_path / "a.wav", tone(1.5)), max_seconds=1.0)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_any_rate_is_resampled(tmp_path: Path, rate: int) -> None:
    samples = load_audio(save(tmp_path / "a.wav", tone(3.0, rate), rate))
    assert abs(len(samples) - 48_000) <= 1
    inner = slice(800, 46_400)
    assert np.abs(samples[inner] - tone(3.0)[inner]).max() < 2e-3


def test_resampling_drops_what_16_khz_cannot_hold(tmp_path: Path) -> None:
    path = save(tmp_path / "a.wav", tone(1.0, 48_000) + tone(1.0, 48_000, hertz=10_000.0), 48_000)
    assert np.abs(load_audio(path)[800:15_200] - tone(1.0)[800:15_200]).max() < 2e-3


def test_long_files_are_read_in_blocks_without_a_seam(tmp_path: Path) -> None:
    # 30 s of stereo at 48 kHz are three blocks.
    mono = tone(30.0, 48_000)
    path = save(tmp_path / "a.wav", np.stack([mono, mono], axis=1), 48_000)
    samples = load_audio(path)
    assert len(samples) == 480_000
    assert np.abs(samples[800:-800] - tone(30.0)[800:-800]).max() < 2e-3


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = tone(1.0), tone(1.0, hertz=1000.0)
    path = save(tmp_path / "a.wav", np.stack([left, right], axis=1), subtype="FLOAT")
    np.testing.assert_allclose(load_audio(path), (left + right) / 2, atol=1e-6)


def test_a_part_of_a_file(tmp_path: Path) -> None:
    path = save(tmp_path / "a.wav", tone(3.0), subtype="FLOAT")
    whole = load_audio(path)
    np.testing.assert_array_equal(load_audio(path, start=1.0, seconds=0.5), whole[16_000:24_000])
    np.testing.assert_array_equal(load_audio(path, start=2.0), whole[32_000:])
    np.testing.assert_array_equal(load_audio(path, start=2.0, seconds=9.0), whole[32_000:])


def test_a_part_may_be_silent(tmp_path: Path) -> None:
    path = save(tmp_path / "a.wav", np.concatenate([np.zeros(16_000, np.float32), tone(1.0)]))
    assert not load_audio(path, seconds=0.5).any()


def test_a_part_after_the_end(tmp_path: Path) -> None:
    path = save(tmp_path / "a.wav", tone(1.0))
    with pytest.raises(AudioError, match=r"ends before the part.*more than 5 s.*1\.00 s"):
        load_audio(path, start=5.0)


@pytest.mark.parametrize(("start", "seconds"), [(-1.0, None), (0.0, 0.0)])
def test_parts_that_cannot_be(tmp_path: Path, start: float, seconds: float | None) -> None:
    with pytest.raises(ValueError, match="start must be"):
        load_audio(tmp_path / "a.wav", start=start, seconds=seconds)


def test_missing_file(tmp_path: Path) -> None:
    for call in (load_audio, audio_seconds):
        with pytest.raises(AudioError, match=r"none\.wav: no such audio file"):
            call(tmp_path / "none.wav")


def test_a_folder_is_not_audio(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="not a file"):
        load_audio(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    path = save(tmp_path / "a.wav", tone(1.0))
    path.chmod(0)
    with pytest.raises(AudioError, match="no permission"):
        load_audio(path)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a.raw", "a.txt"])
def test_a_file_that_is_not_audio(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("This is a shopping list, not speech: milk, bread, butter.\n" * 50)
    with pytest.raises(AudioError, match=f"{name}: cannot be read as audio .*ffmpeg"):
        load_audio(path)


def test_no_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.wav").touch()
    with pytest.raises(AudioError, match=r"the file is empty .*0 bytes"):
        load_audio(tmp_path / "a.wav")


def test_no_samples(tmp_path: Path) -> None:
    path = save(tmp_path / "a.wav", np.zeros(0, np.float32))
    for call in (load_audio, audio_seconds):
        with pytest.raises(AudioError, match="the audio is empty"):
            call(path)


def test_silence(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="the audio is silent"):
        load_audio(save(tmp_path / "a.wav", np.zeros(16_000, np.float32)))


def test_channels_that_cancel(tmp_path: Path) -> None:
    path = save(tmp_path / "a.wav", np.stack([tone(1.0), -tone(1.0)], axis=1))
    with pytest.raises(AudioError, match=r"silent.*cancel"):
        load_audio(path)


def test_a_hundredth_of_a_second(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"too short \(expected at least 0\.1 s, found 0\.010 s\)"):
        load_audio(save(tmp_path / "a.wav", tone(0.01)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_numbers(tmp_path: Path, value: float) -> None:
    samples = tone(1.0)
    samples[8_000] = value
    path = save(tmp_path / "a.wav", samples, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"not numbers .* at 0\.500 s"):
        load_audio(path)


def test_three_hours(tmp_path: Path) -> None:
    path = tmp_path / "long.flac"
    with soundfile.SoundFile(path, "w", 8_000, 1) as sound:
        minute = tone(60.0, 8_000)
        for _ in range(180):
            sound.write(minute)
    with pytest.raises(AudioError, match=r"too long \(expected at most 3600 s, found 10800\.0 s\)"):
        load_audio(path, max_seconds=3600.0)
    assert audio_seconds(path) == 10_800.0
    assert len(load_audio(path, start=9_000.0, seconds=1.0)) == 16_000


def test_max_seconds_allows_what_fits(tmp_path: Path) -> None:
    path = save(tmp_path / "a.wav", tone(2.0))
    assert len(load_audio(path, max_seconds=2.0)) == 32_000
    with pytest.raises(AudioError, match="too long"):
        load_audio(path, max_seconds=1.99)


def flac_with_length(path: Path, frames: int) -> Path:
    """A real FLAC file whose header claims another number of samples."""
    save(path, tone(1.0))
    data = bytearray(path.read_bytes())
    # The 36-bit count is the end of bytes 18 to 25, after rate, channels and bits.
    (word,) = struct.unpack(">Q", data[18:26])
    data[18:26] = struct.pack(">Q", word >> 36 << 36 | frames)
    path.write_bytes(data)
    return path


def test_a_header_that_claims_a_month(tmp_path: Path) -> None:
    path = flac_with_length(tmp_path / "a.flac", 2**36 - 1)
    with pytest.raises(AudioError, match=r"ends early|damaged"):
        load_audio(path)
    with pytest.raises(AudioError, match="too long"):
        load_audio(path, max_seconds=60.0)


def test_a_header_that_does_not_know(tmp_path: Path) -> None:
    path = flac_with_length(tmp_path / "a.flac", 0)
    for call in (load_audio, audio_seconds):
        with pytest.raises(AudioError, match=r"gives no length.*convert it again"):
            call(path)


def test_a_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    rng = np.random.default_rng(0)
    save(path, rng.normal(0, 0.1, 160_000).astype(np.float32))
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(AudioError, match=r"a\.flac: the audio (ends early|is damaged)"):
        load_audio(path)


@pytest.mark.parametrize("rate", [1, 2**31 - 1])
def test_a_rate_that_makes_no_sense(tmp_path: Path, rate: int) -> None:
    path = save(tmp_path / "a.wav", tone(1.0))
    data = bytearray(path.read_bytes())
    data[24:28] = struct.pack("<I", rate)
    path.write_bytes(data)
    with pytest.raises(AudioError, match=r"sample rate makes no sense|cannot be read"):
        load_audio(path)


def test_random_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    originals = {name: save(tmp_path / name, tone(0.5), **FORMATS[name]).read_bytes() for name in FORMATS}
    for round_ in range(20):
        for name, original in originals.items():
            data = bytearray(original)
            for _ in range(1 + round_):
                data[rng.integers(min(len(data), 200) if round_ % 2 else len(data))] = rng.integers(256)
            path = tmp_path / name
            path.write_bytes(data[: rng.integers(1, len(data) + 1)] if round_ % 3 == 0 else data)
            try:
                samples = load_audio(path, max_seconds=60.0)
            except AudioError:
                continue
            assert np.isfinite(samples).all()


def test_check_samples_accepts_speech() -> None:
    check_samples(tone(1.0), "microphone")
    check_samples(tone(1.0).astype(np.float64), "microphone")


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros(0, np.float32), "empty"),
        (np.zeros(16_000, np.float32), "silent"),
        (tone(0.05), "too short"),
        (np.full(16_000, np.nan, np.float32), "not numbers"),
        (tone(1.0) * 32_768, "-1 to 1 scale"),
        (np.ones(16_000, np.int16), "not an array of mono samples"),
        (np.stack([tone(1.0), tone(1.0)]), "not an array of mono samples"),
    ],
)
def test_check_samples_names_what_is_wrong(samples: np.ndarray, message: str) -> None:
    with pytest.raises(AudioError, match=f"microphone: .*{message}"):
        check_samples(samples, "microphone")


@pytest.mark.parametrize("n_mels", [80, 128])
def test_log_mel_equals_transformers(n_mels: int) -> None:
    rng = np.random.default_rng(0)
    batch = np.zeros((4, WINDOW_SAMPLES), np.float32)
    batch[0, :48_000] = tone(3.0)
    batch[1] = rng.normal(0, 0.1, WINDOW_SAMPLES)
    batch[2, 1_000:9_000] = 1e-3 * rng.normal(size=8_000)  # faint, in a silent window
    batch[3] = np.clip(3 * tone(30.0), -1, 1)  # clipped
    extractor = WhisperFeatureExtractor(feature_size=n_mels)
    expected = extractor(list(batch), sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
    found = log_mel(torch.from_numpy(batch), n_mels)
    assert found.shape == (4, n_mels, 3000)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_log_mel_of_a_batch_is_that_of_its_items() -> None:
    batch = torch.from_numpy(np.stack([tone(1.0), 0.01 * tone(1.0, hertz=2000.0)]))
    torch.testing.assert_close(log_mel(batch)[1:], log_mel(batch[1:]), atol=1e-6, rtol=0)


def test_log_mel_ignores_autocast_and_inference_mode() -> None:
    samples = torch.from_numpy(tone(1.0))[None]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        inside = log_mel(samples, 40)
    assert inside.dtype == torch.float32
    outside = log_mel(samples.clone().requires_grad_(), 40)
    torch.testing.assert_close(inside.clone(), outside.detach())
    outside.sum().backward()  # what inference mode cached does not get in autograd's way


def test_log_mel_frames_are_whole_hops() -> None:
    assert log_mel(torch.zeros(1, 1_999)).shape == (1, 80, 12)


@pytest.mark.parametrize("shape", [(16_000,), (1, 1, 16_000), (1, 200)])
def test_log_mel_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="samples must be"):
        log_mel(torch.zeros(shape))


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_speed_changes_length_and_pitch(tmp_path: Path, rate: int) -> None:
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate)
    soundfile.write(tmp_path / "tone.wav", tone, rate)
    fast = load_audio(tmp_path / "tone.wav", speed=1.25)
    assert abs(len(fast) - 2 * 16_000 / 1.25) <= 2
    spectrum = np.abs(np.fft.rfft(fast * np.hanning(len(fast))))
    assert spectrum.argmax() * 16_000 / len(fast) == pytest.approx(550, abs=1)
    with pytest.raises(ValueError, match="speed"):
        load_audio(tmp_path / "tone.wav", speed=0.0)
