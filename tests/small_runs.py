"""Speech, batches and recipes for small random models that hear true lengths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import nn

from usmlite.models import TimedText
from usmlite.models.true_length import TrueLengthAdapter
from usmlite.recipe import Recipe, build_recipe

TEXTS = ("one", "two", "to ten", "see me")


def write_speech(folder: Path) -> Path:
    """A manifest of four recordings of about two seconds: hums, no speech."""
    rows = []
    for number, text in enumerate(TEXTS):
        seconds = 1.9 + 0.25 * number
        time = np.arange(int(16_000 * seconds)) / 16_000
        noise = np.random.default_rng(number).normal(0, 0.02, len(time))
        samples = 0.2 * np.sin(2 * np.pi * (200 + 90 * number) * time) + noise
        soundfile.write(folder / f"{number}.wav", samples.astype(np.float32), 16_000)
        rows.append(
            {"id": f"u{number}", "audio_filepath": f"{number}.wav", "text": text, "speaker": "ab"[number % 2]}
        )
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def short_recipe(source: Path, speech: Path, **sections: dict[str, Any]) -> Recipe:
    """Three steps of fine-tuning in float32; sections add to it or replace values."""
    values: dict[str, dict[str, Any]] = {
        "model": {"source": str(source)},
        "data": {"train": str(speech), "dev": str(speech), "targets": "text"},
        "student": {"calibration": 2},
        "training": {
            "steps": 3, "batch_size": 2, "eval_every": 100, "warmup": 0.0, "learning_rate": 1e-3,
            "precision": "float32", "layers": 0.1,
        },
    }  # fmt: skip
    for section, table in sections.items():
        values[section] = {**values.get(section, {}), **table}
    return build_recipe(values)


def heard(
    adapter: TrueLengthAdapter, seconds: tuple[float, ...] = (2.0, 1.3), seed: int = 0
) -> dict[str, torch.Tensor]:
    """A batch of noise with two texts."""
    generator = torch.Generator().manual_seed(seed)
    samples = 0.1 * torch.randn(len(seconds), 32_000, generator=generator)
    texts = [[TimedText(0.0, 1.0, text)] for text in ("hello", "at all")]
    written = adapter.teach(texts, timestamps=[False, False], language=None)
    return {**adapter.hear(samples, seconds), **written}


def logits(model: nn.Module, adapter: TrueLengthAdapter) -> torch.Tensor:
    """What a model makes of that batch."""
    batch = heard(adapter)
    with torch.inference_mode():
        return adapter.network.logits(model, batch, adapter.network.states(model, batch))


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """Float32 `[samples]` at 16 kHz."""
    return np.random.default_rng(seed).normal(0, 0.1, round(16_000 * seconds)).astype(np.float32)
