"""What all tests share: no network, no chatter, small audio, some speech and one small packed model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from usmlite.runtime import Recognizer

# Before anything imports Transformers: a test that reaches for the hub must fail at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# How long an example takes says more about who else uses the machine than about the code; and a CI run that
# fails must fail again for whoever looks into it.
settings.register_profile(
    "usmlite",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
)
settings.load_profile("usmlite")


@pytest.fixture(scope="session")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a manifest of four short recordings: hums, no speech."""
    import soundfile

    folder = tmp_path_factory.mktemp("recordings")
    rows = []
    for number, text in enumerate(("one two", "three", "four five six", "seven")):
        seconds = 0.5 + 0.25 * number
        time = np.arange(int(16_000 * seconds)) / 16_000
        noise = np.random.default_rng(number).normal(0, 0.01, len(time))
        samples = 0.2 * np.sin(2 * np.pi * (200 + 90 * number) * time) + noise
        soundfile.write(folder / f"{number}.wav", samples.astype(np.float32), 16_000)
        rows.append({
            "id": f"r{number}", "audio_filepath": f"{number}.wav", "duration": seconds, "text": text,
            "speaker": "ab"[number % 2],
        })  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "manifest.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def packed_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model with random weights, of a Whisper that is 24 wide."""
    from small_whisper import small_student
    from usmlite.pack import pack

    directory = tmp_path_factory.mktemp("models") / "packed"
    student, adapter = small_student()
    pack(student, adapter, directory)
    return directory


@pytest.fixture(scope="session")
def dense_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense model that `packed_model` was made from, as a Transformers directory."""
    from small_whisper import small_teacher

    directory = tmp_path_factory.mktemp("models") / "dense"
    teacher, adapter = small_teacher()
    teacher.save_pretrained(directory)
    adapter.save_processor(directory)
    return directory


@pytest.fixture(scope="session")
def sentences() -> list[tuple[np.ndarray, str]]:
    """Four sentences of synthetic speech: float32 samples at 16 kHz, and what is said."""
    import soundfile

    folder = Path(__file__).parent / "speech"
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(soundfile.read(folder / row["audio_filepath"], dtype="float32")[0], row["text"]) for row in rows]


@pytest.fixture(scope="session")
def small_model() -> Recognizer:
    """The model that comes along."""
    import usmlite

    return usmlite.load()
