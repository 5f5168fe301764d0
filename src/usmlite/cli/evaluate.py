"""`usmlite evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usmlite.cli.arguments import add_command, whole
from usmlite.cli.console import bar, check_folder, make_console, settle_libraries
from usmlite.cli.recognizer_flags import add_hold, add_language_model
from usmlite.errors import UsmliteError

if TYPE_CHECKING:
    from rich.console import Console

    from usmlite.data import Utterance
    from usmlite.evaluate import Evaluation

EPILOG = """\
Both texts go through the Whisper English normalizer. The interval is a bootstrap over utterances; with
--against the same utterances are drawn for both models, so that small differences can be told.

examples:
  usmlite evaluate small/packed --data LibriSpeech/test-clean
  usmlite evaluate small/packed --data test.jsonl --against tiny.en --worst 10
  usmlite evaluate tiny.en --data test.jsonl --json dense.json
  usmlite evaluate small/packed --data test.jsonl --against dense.json
"""


def add(commands: Any) -> None:
    """The command and its flags."""
    parser = add_command(commands, "evaluate", "measure a model's word error rate", EPILOG, run)
    parser.add_argument("source", metavar="MODEL", help="dense, student checkpoint or packed model")
    parser.add_argument(
        "--data", required=True, metavar="D",
        help="speech with text: a manifest.jsonl, a LibriSpeech directory, a folder with .txt files, shards",
    )  # fmt: skip
    parser.add_argument(
        "--against", metavar="OTHER", help="another model, or a .json of an earlier run on the same data"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and transcripts here")
    parser.add_argument(
        "--worst",
        type=whole(0),
        default=0,
        metavar="N",
        help="show the N worst utterances, aligned (default: 0)",
    )
    parser.add_argument(
        "--batch-size",
        type=whole(1),
        default=16,
        metavar="N",
        help="utterances decoded together (default: 16)",
    )
    parser.add_argument("--limit", type=whole(1), metavar="N", help="only the first N utterances")
    add_hold(parser)
    add_language_model(parser)
    parser.add_argument(
        "--beam-size", type=whole(1), default=1, metavar="N",
        help="texts followed side by side (default: 1, or 64 with a language model)",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Carries the command out; its exit code."""
    if arguments.json is not None:
        check_folder(arguments.json.parent, arguments.json)
    settle_libraries()
    from usmlite.atomic import write_json
    from usmlite.data import load_corpus
    from usmlite.evaluate import compare, worst
    from usmlite.tables import comparison_table, difference_line

    utterances = load_corpus(arguments.data, require_text=True)[: arguments.limit]
    found, row = _evaluated(arguments.source, utterances, arguments)
    rows, result = [row], {**found.to_json(), "float32_bytes": row.float32_bytes}
    console = make_console()
    difference = None
    if arguments.against is not None:
        other, other_row = _baseline(arguments, utterances, row.float32_bytes)
        difference = compare(found, other)
        rows.insert(0, other_row)
        result |= {"comparison": difference.to_json(), "against": other.to_json()}
    console.print(comparison_table(rows))
    console.print(
        f"{found.name}: {found.substitutions} words substituted, {found.deletions} deleted, "
        f"{found.insertions} inserted, of {found.reference_words}; {found.audio_seconds / 60:.1f} minutes of "
        f"speech in {found.wall_seconds:.1f} s with {found.machine['arithmetic']}; "
        f"peak memory {found.peak_memory_bytes / 1e6:,.0f} MB",
        markup=False,
    )
    if difference is not None:
        console.print(difference_line(difference), markup=False)
    _print_speakers(found, console)
    for text in worst(found, arguments.worst):
        # Aligned text must not be wrapped.
        print(f"\n{text}", flush=True)
    if arguments.json is not None:
        write_json(arguments.json, result)
    return 0


def _evaluated(
    source: str, utterances: Sequence[Utterance], arguments: argparse.Namespace
) -> tuple[Evaluation, Any]:
    from usmlite.evaluate import evaluate
    from usmlite.info import dense_float32_bytes
    from usmlite.load import load
    from usmlite.packed import arithmetic
    from usmlite.runtime import GREEDY
    from usmlite.tables import ComparisonRow

    recognizer = load(source, hold=arguments.hold, activations=arguments.activations)
    options = replace(
        GREEDY,
        beam_size=arguments.beam_size,
        language_model=arguments.language_model,
        lm_weight=arguments.lm_weight,
        lm_bonus=arguments.lm_bonus,
    )
    with bar(f"Evaluating {source}") as progress:
        found = evaluate(
            lambda audios: recognizer.transcribe_batch(audios, options),
            utterances,
            name=recognizer.name,
            weights_bytes=recognizer.weights_bytes,
            batch_size=arguments.batch_size,
            arithmetic=arithmetic(recognizer.model),
            progress=lambda done, total: progress(done / total),
        )
    return found, ComparisonRow.of(found, dense_float32_bytes(recognizer.adapter.config))


def _baseline(
    arguments: argparse.Namespace, utterances: Sequence[Utterance], float32_bytes: int
) -> tuple[Evaluation, Any]:
    """The other model's evaluation: from an earlier run's JSON, or made now."""
    path = Path(arguments.against)
    if path.suffix != ".json" or not path.is_file():
        return _evaluated(arguments.against, utterances, arguments)
    import json

    from usmlite.evaluate import Evaluation
    from usmlite.tables import ComparisonRow

    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsmliteError("not a readable JSON file", where=path, found=str(error)) from None
    other = Evaluation.from_json(plain, where=str(path))
    return other, ComparisonRow.of(other, float32_bytes)


def _print_speakers(found: Evaluation, console: Console) -> None:
    scored = {name: row for name, row in found.speakers.items() if row["wer"] is not None}
    if len(scored) < 2:
        return
    ordered = sorted(scored, key=lambda name: (scored[name]["wer"], name))
    worst = ", ".join(f"{name} {100 * (scored[name]['wer'] or 0):.1f} %" for name in reversed(ordered[-5:]))
    best = ", ".join(f"{name} {100 * (scored[name]['wer'] or 0):.1f} %" for name in ordered[:3])
    console.print(f"{len(scored)} speakers; worst {worst}; best {best}", markup=False)
