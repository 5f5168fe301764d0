"""What each step from the paper's way to ours buys, by calibration alone.

    python benchmarks/ablation.py --data LIBRISPEECH --runs runs/ablation
    python benchmarks/ablation.py --table

Runs recipes/ablation.toml (a sweep: it resumes) and measures the KL divergence of each packed model's words
from the dense model's on utterances of dev, told the dense model's own words before each. That is far more
sensitive than word errors: hundreds of utterances of these say little about a difference of a tenth.
`--table` rewrites the table of docs/study.md from results/ablation.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pages import place
from usmlite.atomic import write_json
from usmlite.audio import WINDOW_SAMPLES, WINDOW_SECONDS, load_audio
from usmlite.data import load_corpus
from usmlite.evaluate import describe_machine, describe_versions
from usmlite.grid import expand
from usmlite.load import load
from usmlite.models import Options, Teacher, TimedText, load_teacher
from usmlite.network import IGNORED
from usmlite.speech import spread_out
from usmlite.sweep import sweep

ROOT = Path(__file__).resolve().parent.parent
RECIPE, RESULT, PAGE = (
    ROOT / "recipes" / "ablation.toml",
    ROOT / "results" / "ablation.json",
    ROOT / "docs" / "study.md",
)
UTTERANCES, BATCH = 48, 8


def batches_of(teacher: Teacher, corpus: Path) -> list[dict[str, torch.Tensor]]:
    """Utterances of a corpus with the dense model's own words for them, as forward inputs."""
    chosen = spread_out(load_corpus(corpus), UTTERANCES)
    batches = []
    for low in range(0, len(chosen), BATCH):
        samples = torch.zeros(len(chosen[low : low + BATCH]), WINDOW_SAMPLES)
        for row, utterance in zip(samples, chosen[low : low + BATCH], strict=True):
            audio = load_audio(utterance.audio)[:WINDOW_SAMPLES]
            row[: len(audio)] = torch.from_numpy(audio)
        features = teacher.adapter.features(samples)
        decoded = teacher.adapter.decode(teacher.model, features, Options(timestamps=False, language="en"))
        texts = [[TimedText(0.0, WINDOW_SECONDS, out.text)] for out in decoded]
        ids, labels = teacher.adapter.targets(texts, timestamps=[False] * len(texts), language="en")
        batches.append({"input_features": features, "decoder_input_ids": ids, "labels": labels})
    return batches


@torch.no_grad()
def words(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logarithms of probabilities at the scored positions, float32 `[positions, vocabulary]`."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits
    return logits[batch["labels"] != IGNORED].float().log_softmax(dim=-1)


def divergence(model: Any, dense: list[torch.Tensor], batches: list[dict[str, torch.Tensor]]) -> float:
    """The mean KL divergence from the dense model's words, nats a token."""
    total = count = 0.0
    for batch, expected in zip(batches, dense, strict=True):
        found = words(model, batch)
        total += float((expected.exp() * (expected - found)).sum())
        count += len(found)
    return total / count


def measure(arguments: argparse.Namespace) -> dict[str, str]:
    """Runs the recipes and measures what they packed; errors by name."""
    data = {"train": str(arguments.data / "train"), "dev": str(arguments.data / "dev")}
    runs = expand([RECIPE], {"data": data})
    failed = sweep(runs, arguments.runs, console=Console())
    teacher = load_teacher(runs[0].recipe.model.source)
    batches = batches_of(teacher, arguments.data / "dev")
    dense = [words(teacher.model, batch) for batch in batches]
    rows = []
    for run in runs:
        if run.name not in failed:
            recognizer = load(arguments.runs / run.name, hold="float32")
            kl = divergence(recognizer.model, dense, batches)
            rows.append({"name": run.name, "bytes": recognizer.weights_bytes, "kl": kl})
            print(f"{run.name}: {recognizer.weights_bytes / 1e6:.2f} MB, KL {kl:.4f}")
    result = {
        "command": "python benchmarks/ablation.py --data LIBRISPEECH",
        "model": runs[0].recipe.model.source,
        "float32_bytes": teacher.float32_bytes,
        "utterances": UTTERANCES,
        "tokens": sum(len(one) for one in dense),
        "rows": rows,
        "machine": describe_machine(),
        "versions": describe_versions(),
    }
    write_json(RESULT, result)
    return failed


def table() -> str:
    """The table of docs/study.md, in Markdown."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    lines = ["| | file, MB | % of float32 | KL, nats a token |", "| --- | --: | --: | --: |"]
    for row in found["rows"]:
        share = 100 * row["bytes"] / found["float32_bytes"]
        lines.append(f"| {row['name']} | {row['bytes'] / 1e6:.2f} | {share:.2f} | {row['kl']:.4f} |")
    tail = f"`{found['model']}`, {found['utterances']} utterances of dev, {found['tokens']:,} tokens."
    return "\n".join([*lines, "", tail])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with train and dev")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"), help="where the runs go")
    parser.add_argument("--table", action="store_true", help="rewrite the table of docs/study.md")
    arguments = parser.parse_args()
    failed = measure(arguments) if arguments.data is not None else {}
    if arguments.table:
        place(PAGE, "ablation", table())
    sys.exit("\n".join(f"{name} failed: {error}" for name, error in failed.items()) or 0)


if __name__ == "__main__":
    main()
