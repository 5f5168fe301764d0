"""What searching, voice activity detection, word times and streaming do to real speech, and what they cost.

    python benchmarks/transcription.py --data LIBRISPEECH/test
    python benchmarks/transcription.py --page

Every part takes the same utterances, spread evenly over the corpus: one by one for the ways to search; one
behind the other, with a second of silence between, for long audio, word times and streaming. Seconds are
processor seconds of one thread, which other work on the machine disturbs least. `--page` rewrites the tables
of docs/transcription.md from results/transcription.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import torch

from pages import place
from usmlite.audio import SAMPLE_RATE, load_audio
from usmlite.data import Utterance, load_corpus
from usmlite.evaluate import describe_machine
from usmlite.load import load
from usmlite.models import Options
from usmlite.models.options import FALLBACK_TEMPERATURES
from usmlite.packed import arithmetic
from usmlite.runtime import Recognizer
from usmlite.text import normalize

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "results/transcription.json", ROOT / "docs/transcription.md"
SEARCHES = {
    "greedy, no timestamps (as `evaluate`)": Options(timestamps=False),
    "greedy": Options(),
    "greedy, fallback": Options(temperatures=FALLBACK_TEMPERATURES),
    "beam 5": Options(beam_size=5),
    "beam 5, fallback": Options(beam_size=5, temperatures=FALLBACK_TEMPERATURES),
    "beam 5, patience 2": Options(beam_size=5, patience=2.0),
    "drawn at 0.4, best of 5": Options(temperatures=(0.4,)),
}
LONG = {
    "window by window": {},
    "beam 5": {"beam_size": 5},
    "told the text before": {"condition_on_previous_text": True},
    "voice activity detection": {"vad": True},
    "voice activity detection, beam 5": {"vad": True, "beam_size": 5},
}  # fmt: skip
GAP = 1.0  # seconds of silence between utterances


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="speech with text: a manifest, a LibriSpeech directory, ...")
    parser.add_argument("--model", default="tiny.en-small")
    parser.add_argument("--utterances", type=int, default=60, help="how many (default: 60)")
    parser.add_argument("--first", type=int, metavar="N", help="only the first N of these")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--page", action="store_true", help="only rewrite the tables")
    return parser


def wer(references: Sequence[str], texts: Sequence[str]) -> float:
    found = jiwer.process_words([normalize(r) for r in references], [normalize(t) for t in texts])
    return 100 * float(found.wer)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    return work(), time.process_time() - start


def spread(utterances: Sequence[Utterance], count: int) -> list[Utterance]:
    return [utterances[index * len(utterances) // count] for index in range(count)]


def joined(audio: Sequence[np.ndarray]) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Recordings one behind the other, and where each lies, in seconds."""
    gap = np.random.default_rng(0).normal(0, 1e-3, round(GAP * SAMPLE_RATE)).astype(np.float32)
    pieces, places, position = [], [], 0
    for samples in audio:
        places.append((position / SAMPLE_RATE, (position + len(samples)) / SAMPLE_RATE))
        pieces += [samples, gap]
        position += len(samples) + len(gap)
    return np.concatenate(pieces), places


def search(recognizer: Recognizer, texts: list[str], audio: list[np.ndarray]) -> list[Any]:
    rows = []
    for name, options in SEARCHES.items():
        found, seconds = timed(lambda options=options: recognizer.transcribe(audio, options))
        rows.append({"name": name, "wer": wer(texts, [each.text for each in found]), "seconds": seconds})
        print(rows[-1], flush=True)
    return rows


def long(recognizer: Recognizer, texts: list[str], audio: list[np.ndarray]) -> list[Any]:
    # Three speeches, so that something can be decoded side by side in every row.
    parts = [joined(audio[first::3])[0] for first in range(3)]
    reference = [" ".join(texts[first::3]) for first in range(3)]
    rows = []
    for name, settings in LONG.items():
        found, seconds = timed(lambda settings=settings: recognizer.transcribe(parts, **settings))
        rows.append({"name": name, "wer": wer(reference, [each.text for each in found]), "seconds": seconds})
        print(rows[-1], flush=True)
    return rows


def words(recognizer: Recognizer, texts: list[str], audio: list[np.ndarray]) -> list[Any]:
    """Whether each word that was said is put into its utterance."""
    samples, places = joined(audio)
    rows = []
    for name, settings in {"window by window": {}, "voice activity detection": {"vad": True}}.items():
        settings = {"word_timestamps": True, **settings}
        found, seconds = timed(lambda settings=settings: recognizer.transcribe(samples, **settings))
        said = [word for segment in found.segments for word in segment.words or ()]
        by_place: list[list[str]] = [[] for _ in places]
        between = 0
        for word in said:
            middle = (word.start + word.end) / 2
            inside = [index for index, (start, end) in enumerate(places) if start <= middle <= end]
            between += not inside
            # A word between two utterances is put to the nearer one.
            nearest = min(range(len(places)), key=lambda i: max(places[i][0] - middle, middle - places[i][1]))
            by_place[inside[0] if inside else nearest].append(word.word)
        row = {
            "name": name,
            "words": len(said),
            "between": between,
            "backwards": sum(b.start < a.start for a, b in pairwise(said)),
            "wer": wer([" ".join(texts)], [found.text]),
            # Any word in a wrong utterance is a deletion here and an insertion there.
            "wer_by_place": wer(texts, ["".join(each) for each in by_place]),
            "seconds": seconds,
        }
        rows.append(row)
        print(row, flush=True)
    return rows


def stream(recognizer: Recognizer, texts: list[str], audio: list[np.ndarray]) -> list[Any]:
    samples, _ = joined(audio)
    offline = recognizer.transcribe(samples)
    seconds_of_audio = len(samples) / SAMPLE_RATE
    rows = [{"name": "offline, greedy", "wer": wer([" ".join(texts)], [offline.text])}]
    settings = {
        "every 1 s": {"every": 1.0},
        "every 2 s": {"every": 2.0},
        "every 1 s, told the text before": {"every": 1.0, "condition_on_previous_text": True},
    }
    for name, options in settings.items():
        final, costs, late, clock = "", [], [], 0.0
        size = SAMPLE_RATE // 4
        before = time.process_time()
        for update in recognizer.stream(
            (samples[i : i + size] for i in range(0, len(samples), size)), **options
        ):
            costs.append(time.process_time() - before)
            # The clock of somebody who listens with one core: audio comes in real time, work takes its time.
            clock = max(clock, update.seconds) + costs[-1]
            final += update.final
            late += [clock - word.end for word in update.words]
            before = time.process_time()
        rows.append({
            "name": name,
            "wer": wer([" ".join(texts)], [final]),
            "real_time_factor": sum(costs) / seconds_of_audio,
            "update_median": float(np.median(costs)),
            "update_most": max(costs),
            "late_median": float(np.median(late)),
            "late_90": float(np.quantile(late, 0.9)),
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


PARTS = {"search": search, "long": long, "words": words, "stream": stream}


HEADS = {
    "search": "| one utterance at a time | WER % | seconds | of real time |",
    "long": "| three recordings of many utterances | WER % | seconds | of real time |",
    "words": "| word times | words | between utterances | backwards | WER % | WER % by place |",
    "stream": "| stream | WER % | of real time | s an update | at most | latency, s | 90 % below |",
}


def cells(part: str, row: dict[str, Any], audio_seconds: float) -> list[str]:
    name, errors = row["name"], f"{row['wer']:.2f}"
    if part == "words":
        found = [str(row[key]) for key in ("words", "between", "backwards")]
        return [name, *found, errors, f"{row['wer_by_place']:.2f}"]
    if part == "stream":
        keys = ("real_time_factor", "update_median", "update_most", "late_median", "late_90")
        return [name, errors, *(f"{row[key]:.2f}" if key in row else "" for key in keys)]
    return [name, errors, f"{row['seconds']:.0f}", f"{row['seconds'] / audio_seconds:.3f}"]


def tables(measured: dict[str, Any]) -> str:
    out = []
    for part, head in HEADS.items():
        if part not in measured["parts"]:
            continue
        found = measured["parts"][part]
        rows = [f"| {' | '.join(cells(part, row, found['audio_seconds']))} |" for row in found["rows"]]
        line = "| --- " + "| --: " * (head.count("|") - 2) + "|"
        said = f"{found['utterances']} utterances, {found['audio_seconds'] / 60:.1f} minutes of speech"
        out += ["\n".join([head, line, *rows]), f"{said}."]
    out.append(
        f"`{measured['model']}`, {measured['arithmetic']}, one thread. Machine: {measured['machine']}."
    )
    return "\n\n".join(out)


def main() -> None:
    arguments = build_parser().parse_args()
    measured = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"parts": {}}
    if not arguments.page:
        torch.set_num_threads(1)
        chosen = spread(load_corpus(arguments.data, require_text=True), arguments.utterances)[
            : arguments.first
        ]
        audio = [load_audio(each.audio) for each in chosen]
        texts = [each.text or "" for each in chosen]
        recognizer = load(arguments.model)
        recognizer.transcribe(audio[0])  # what only the first call does
        measured |= {
            "model": arguments.model,
            "arithmetic": arithmetic(recognizer.model),
            "machine": describe_machine()["cpu"],
        }
        for part in arguments.parts:
            measured["parts"][part] = {
                "utterances": len(chosen),
                "audio_seconds": sum(map(len, audio)) / SAMPLE_RATE,
                "rows": PARTS[part](recognizer, texts, audio),
            }
            RESULTS.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    place(PAGE, "measured", tables(measured))


if __name__ == "__main__":
    main()
