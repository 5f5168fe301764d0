"""Puts a run's packed model into models/, with a model card made from its measured result.

    python benchmarks/ship.py tiny.en-small --run runs/9.4-percent-no-finetuning \\
        --result results/librispeech/9.4-percent-no-finetuning.json

The run is one of benchmarks/librispeech.py; the result is what that measured of it on test.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from usmlite.load import PACKED_FOLDER, load
from usmlite.packfile import WEIGHTS_NAME
from usmlite.shipped import SHIPPED

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"

CARD = Path(__file__).with_name("model_card.md")


def training(run: dict[str, Any]) -> str:
    """What the model learned from, in words."""
    told = "mini train-clean-5 of LibriSpeech (5.3 h, 28 speakers)"
    if run["training"] is None:
        windows = run["recipe"]["student"]["calibration"]
        return f"no fine-tuning; calibrated on {windows} windows of 30 s of {told}"
    settings = run["recipe"]["training"]
    windows = settings["batch_size"] * settings["accumulate"]
    return (
        f"{run['training']['best_step']} steps of {windows} windows of 30 s of {told}, the teacher's own "
        "transcripts as targets; the step was chosen on four other speakers"
    )


def card(name: str, result: dict[str, Any], size: int) -> str:
    """The model card."""
    score, other, run = result["evaluation"], result["comparison"], result["run"]
    recipe = run["recipe"]
    return CARD.read_text(encoding="utf-8").format(
        name=name,
        source=recipe["model"]["source"],
        hub=f"openai/whisper-{recipe['model']['source']}",
        megabytes=size / 1e6,
        share=100 * size / result["float32_bytes"],
        wer=100 * score["wer"],
        low=100 * score["ci95"][0],
        high=100 * score["ci95"][1],
        dense=100 * other["baseline_wer"],
        relative=100 * other["relative_difference"],
        rel_low=100 * other["relative_ci95"][0],
        rel_high=100 * other["relative_ci95"][1],
        p=other["p_value"],
        utterances=score["utterance_count"],
        hours=score["audio_seconds"] / 3600,
        speakers=len(score["speakers"]),
        precision=score["precision"],
        training=training(run),
        target=recipe["spec"]["target_size"],
        recipe=f"recipes/librispeech/{result['name']}.toml",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=SHIPPED)
    parser.add_argument("--run", type=Path, required=True, help="directory of the run")
    parser.add_argument("--result", type=Path, required=True, help="its measured result")
    arguments = parser.parse_args()
    result = json.loads(arguments.result.read_text(encoding="utf-8"))
    packed, target = arguments.run / PACKED_FOLDER, MODELS / arguments.name
    load(packed)  # checks every byte
    size = (packed / WEIGHTS_NAME).stat().st_size
    if size != result["evaluation"]["weights_bytes"]:
        parser.error(f"{packed} is not the model that {arguments.result} measured")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(packed, target)
    (target / "README.md").write_text(card(arguments.name, result, size), encoding="utf-8")
    print(f"{target}: {size:,} bytes")


if __name__ == "__main__":
    main()
