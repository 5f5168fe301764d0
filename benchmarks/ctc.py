"""A CTC model of Whisper's encoder, dense and small, on LibriSpeech: word errors, bytes, speed.

    usmlite ctc tiny.en --data LIBRISPEECH/train --dev LIBRISPEECH/dev --out ctc-tiny
    python benchmarks/ctc.py --dense ctc-tiny --data LIBRISPEECH --runs runs-ctc
    python benchmarks/ctc.py --table

LIBRISPEECH holds train/, dev/ and test/. Every run of `RUNS` compresses the dense model and is measured on
test beside it; finished ones are not run again. Speed is that of transcribing the same utterances one by
one, with the packed Whisper model that comes along taking turns. `--table` rewrites the table of docs/ctc.md
from results/ctc.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pages import place
from usmlite.atomic import write_json
from usmlite.audio import load_audio
from usmlite.data import Utterance, load_corpus
from usmlite.evaluate import Evaluation, compare, describe_machine, describe_versions, evaluate
from usmlite.grid import Run
from usmlite.load import ALLOCATION_FILE, load
from usmlite.packed import arithmetic
from usmlite.recipe import build_recipe
from usmlite.runtime import Recognizer
from usmlite.shipped import DEFAULT
from usmlite.sweep import sweep
from usmlite.tables import ResultRow, markdown_table, measured_line

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "results" / "ctc.json", ROOT / "docs" / "ctc.md"
DENSE = "dense"
_PAIRS = {"bits": 4, "sparsity": "2:4"}
# What each run says of its spec, and its steps.
RUNS: dict[str, tuple[dict[str, Any], int]] = {
    "int8": ({"bits": 8, "sparsity": "dense"}, 0),
    "9.4-percent": ({"target_size": "9.4%"}, 0),
    "6.3-percent": ({"target_size": "6.3%"}, 0),
    "int4-2of4": (_PAIRS, 0),
    "int4-2of4-finetuned": (_PAIRS, 120),
}
# The one whose measurements the other target sizes choose from, and the one whose speed is compared.
MEASURED = "9.4-percent"
FAST = "int4-2of4-finetuned"
_ROUNDS, _TIMED = 3, 24


def run_all(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Runs and measures everything."""
    test = load_corpus(arguments.data / "test", require_text=True)
    dense = load(arguments.dense)
    found = {"models": {DENSE: measure(DENSE, dense, test)}, "steps": {}, "trained": trained(arguments.dense)}
    for name in arguments.only or RUNS:
        spec, steps = dict(RUNS[name][0]), RUNS[name][1]
        measured = arguments.runs / MEASURED / ALLOCATION_FILE
        if "target_size" in spec and name != MEASURED and measured.is_file():
            spec["measured"] = str(measured)
        settings = {
            "model": {"source": str(arguments.dense)},
            "data": {
                "train": str(arguments.data / "train"), "dev": str(arguments.data / "dev"), "targets": "text",
                "single": 1.0, "by_length": True, "speed": 0.1,
            },
            "spec": spec,
            "training": {
                "steps": steps, "batch_size": 8, "learning_rate": 1e-4, "eval_every": 60,
                "eval_utterances": 96,
            },
        }  # fmt: skip
        failed = sweep(
            [Run(name, build_recipe(settings), Path(__file__).name)], arguments.runs, console=console
        )
        if failed:
            raise SystemExit(f"{name} failed: {failed[name]}")
        model = load(arguments.runs / name)
        found["models"][name] = measure(name, model, test)
        found["steps"][name] = steps
        one = Evaluation.from_json(found["models"][name])
        base = Evaluation.from_json(found["models"][DENSE])
        found.setdefault("comparisons", {})[name] = compare(one, base).to_json()
        console.print(f"{name}: {found['models'][name]['wer']:.4f}")
    if FAST in found["models"]:
        found["speed"] = speed(load(arguments.runs / FAST), load(), test[:: max(1, len(test) // _TIMED)])
    found |= {
        "float32_bytes": dense.weights_bytes,
        "machine": describe_machine(),
        "versions": describe_versions(),
    }
    return found


def measure(name: str, recognizer: Recognizer, utterances: list[Utterance]) -> dict[str, Any]:
    """Evaluates a model on test."""
    found = evaluate(
        recognizer.transcribe_batch, utterances, name=name, weights_bytes=recognizer.weights_bytes,
        arithmetic=arithmetic(recognizer.model),
    )  # fmt: skip
    return found.to_json()


def trained(dense: Path) -> dict[str, Any]:
    """How the dense model came about, from its own report."""
    report = json.loads((dense / "training" / "report.json").read_text(encoding="utf-8"))
    settings = report["recipe"]["training"]
    return {
        "steps": settings["steps"],
        "utterances_a_step": settings["batch_size"] * settings["accumulate"],
        "seconds": report["seconds"],
        "vocabulary": report["recipe"]["ctc"]["vocabulary"],
    }


def speed(small: Recognizer, whisper: Recognizer, utterances: list[Utterance]) -> dict[str, Any]:
    """Seconds of the same utterances one by one with each model, taking turns."""
    recordings = [load_audio(utterance.audio) for utterance in utterances]
    models = {"ctc": small, "whisper": whisper}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(_ROUNDS + 1):
        for name, model in models.items():
            started = time.perf_counter()
            for recording in recordings:
                model.transcribe_batch([recording])
            if number:  # the first one warms up
                seconds[name].append(time.perf_counter() - started)
    ratios = [other / own for own, other in zip(seconds["ctc"], seconds["whisper"], strict=True)]
    return {
        "model": FAST, "other": DEFAULT, "utterances": len(recordings), "threads": torch.get_num_threads(),
        "audio_seconds": sum(len(recording) for recording in recordings) / 16_000,
        "seconds": seconds, "ratio": statistics.median(ratios),
    }  # fmt: skip


def table() -> str:
    """The table of docs/ctc.md."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = [
        ResultRow.of(
            name, found["float32_bytes"], evaluation, found["comparisons"].get(name),
            steps=found["steps"].get(name),
        )
        for name, evaluation in found["models"].items()
    ]  # fmt: skip
    dense = found["models"][DENSE]
    own = found["trained"]
    lines = [
        markdown_table(rows),
        measured_line(dense, found["machine"], corpus="test-clean", precision="float32 (packed: int8)"),
        f"The dense model: {own['steps']} steps of {own['utterances_a_step']} utterances, "
        f"{own['vocabulary']}.",
    ]
    if "speed" in found:
        fast = found["speed"]
        lines.append(
            f"`{fast['model']}` takes {1 / fast['ratio']:.2f} times the time of `{fast['other']}` on "
            f"{fast['utterances']} utterances, one by one, {fast['threads']} threads."
        )
    return "\n\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dense", type=Path, help="directory that `usmlite ctc` made")
    parser.add_argument("--data", type=Path, help="folder with train, dev and test")
    parser.add_argument("--runs", type=Path, default=Path("runs-ctc"), help="where the runs go")
    parser.add_argument("--only", nargs="*", choices=tuple(RUNS), help="only these runs")
    parser.add_argument("--table", action="store_true", help="rewrite the table of docs/ctc.md")
    arguments = parser.parse_args()
    if arguments.dense is not None and arguments.data is not None:
        write_json(RESULTS, run_all(arguments, Console()))
    if arguments.table:
        place(PAGE, "results", table())


if __name__ == "__main__":
    main()
