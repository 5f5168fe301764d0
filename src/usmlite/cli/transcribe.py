"""`usmlite transcribe`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usmlite.cli.arguments import add_command, number, whole
from usmlite.cli.console import bar, complain, settle_libraries
from usmlite.cli.recognizer_flags import add_hold, add_search, options_from
from usmlite.errors import UsmliteError
from usmlite.shipped import DEFAULT

if TYPE_CHECKING:
    from usmlite.transcription import Output

SOME_FAILED = 1

FORMATS = ("txt", "json", "srt", "vtt", "tsv")

EPILOG = """\
Audio may have any length, rate and number of channels: WAV, FLAC, OGG, Opus or MP3. Of a folder all audio in
it is taken. A file that cannot be read does not stop the others; it is named at the end, and the exit code is
then 1. Ctrl-C leaves the transcripts that are finished.

Without MODEL, tiny.en-small transcribes: English, a tenth of the bytes of tiny.en, inside usmlite itself.

examples:
  usmlite transcribe interview.wav
  usmlite transcribe small/packed interview.wav --word-timestamps --format json
  usmlite transcribe small/packed recordings/ --format all --output-dir transcripts/
  usmlite transcribe lecture.mp3 --vad --beam-size 5 --hotwords Tintoretto
  usmlite transcribe base rede.flac --language de --task translate --format vtt
  usmlite transcribe --mic
"""


def add(commands: Any) -> None:
    """The command and its flags."""
    parser = add_command(commands, "transcribe", "write down what is said in audio files", EPILOG, run)
    parser.add_argument(
        "source", nargs="?", metavar="MODEL",
        help=f"dense, student checkpoint or packed model (default: {DEFAULT})",
    )  # fmt: skip
    parser.add_argument("files", nargs="*", metavar="FILE", help="audio, or folders of it")
    parser.add_argument("--model", help="the same as MODEL")
    parser.add_argument(
        "--format", choices=(*FORMATS, "all"), default="txt",
        help="plain text, JSON with times, subtitles, or times and text in columns (default: txt)",
    )  # fmt: skip
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="one file for each recording, instead of the console"
    )
    parser.add_argument(
        "--language", metavar="CODE", help="such as en or German (default: heard from the speech itself)"
    )
    parser.add_argument(
        "--task", choices=("transcribe", "translate"), default="transcribe",
        help="translate goes into English, with multilingual models (default: transcribe)",
    )  # fmt: skip
    parser.add_argument(
        "--word-timestamps",
        action="store_true",
        help="time and probability of every word, in JSON and WebVTT",
    )
    parser.add_argument(
        "--highlight-words", action="store_true",
        help="underline each word in SRT and WebVTT while it is spoken",
    )  # fmt: skip
    parser.add_argument(
        "--vad", action="store_true",
        help="hear only where somebody speaks, stretches of one recording side by side "
        '(pip install "usmlite[vad]")',
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", type=whole(1), default=8, metavar="N",
        help="recordings, or with --vad stretches of them, decoded side by side (default: 8)",
    )  # fmt: skip
    add_search(parser)
    group = parser.add_argument_group("microphone")
    group.add_argument(
        "--mic", action="store_true",
        help='write down what is said now, until Ctrl-C (pip install "usmlite[mic]")',
    )  # fmt: skip
    group.add_argument(
        "--mic-device", metavar="NAME", help="number or part of the name (default: the system's)"
    )
    group.add_argument(
        "--mic-every", type=number(0.2, 10.0), default=1.0, metavar="S",
        help="seconds after which the text is made again (default: 1)",
    )  # fmt: skip
    add_hold(parser)


def sort_out(arguments: argparse.Namespace, rest: list[str]) -> list[str]:
    """Tells MODEL from the files, which flags may stand between; returns what is neither.

    argparse alone takes the first of several recordings for the model.
    """
    words = [word for word in (arguments.source, *arguments.files) if word is not None]
    # A word after a flag: argparse gave all it had to the words before.
    words += [word for word in rest if not word.startswith("-")]
    arguments.source = arguments.model or DEFAULT
    if words and arguments.model is None and not _is_recording(words[0]):
        arguments.source, *words = words
    if bool(words) == arguments.mic:
        raise UsmliteError(
            "a file and the microphone are named" if words else "no audio file is named",
            where="usmlite transcribe", expected="[MODEL] FILE..., or [MODEL] --mic",
            found=words[0] if words else f"only {arguments.source}",
        )  # fmt: skip
    arguments.files = [Path(word) for word in words]
    return [word for word in rest if word.startswith("-")]


def _is_recording(word: str) -> bool:
    from usmlite.audio import SUFFIXES

    path = Path(word)
    if path.is_dir():
        # Whatever a model's directory is made by, it has one of these.
        marks = ("config.json", "recipe.toml", "model.bin", "student.safetensors")
        return not any((path / mark).is_file() for mark in marks)
    # Models are directories or names; a name may have a dot too (tiny.en), but not these endings.
    return path.is_file() or path.suffix.lower() in SUFFIXES


def run(arguments: argparse.Namespace) -> int:
    """Carries the command out; its exit code."""
    formats = FORMATS if arguments.format == "all" else (arguments.format,)
    if arguments.format == "all" and arguments.output_dir is None:
        raise UsmliteError("several formats need files", where="--format all", remedy="Add --output-dir DIR.")
    if arguments.vad and (arguments.condition_on_previous_text or arguments.mic):
        other = "--mic" if arguments.mic else "--condition-on-previous-text"
        raise UsmliteError("contradicts --vad", where=other, remedy="Leave one of them out.")
    settle_libraries()
    from usmlite.transcription import Output, recordings

    names = recordings(arguments.files)
    output = Output(formats, arguments.output_dir, arguments.highlight_words, len(names) > 1)
    output.prepare(names)
    if arguments.mic:
        return _run_microphone(arguments, output)
    from usmlite.load import load
    from usmlite.transcription import Outcome, transcribe_files

    recognizer = load(arguments.source, hold=arguments.hold, activations=arguments.activations)
    outcome = Outcome()
    try:
        with bar("Transcribing") as progress:
            transcribe_files(
                recognizer, names, output, outcome, options_from(arguments, recognizer),
                batch_size=arguments.batch_size, vad=arguments.vad, progress=progress,
                condition_on_previous_text=arguments.condition_on_previous_text,
            )  # fmt: skip
    except KeyboardInterrupt:
        complain(f"{outcome.written} of {len(names)} transcripts are finished")
        raise
    finally:
        for problem in outcome.bad:
            complain(f"error: {problem}")
    if not outcome.bad:
        return 0
    if len(names) == 1:
        return UsmliteError.exit_code
    complain(f"error: {len(outcome.bad)} of {len(names)} files could not be transcribed")
    return SOME_FAILED


def _run_microphone(arguments: argparse.Namespace, output: Output) -> int:
    from usmlite.load import load
    from usmlite.microphone import Microphone
    from usmlite.transcription import LiveText, transcribe_live

    microphone = Microphone(arguments.mic_device)
    recognizer = load(arguments.source, hold=arguments.hold, activations=arguments.activations)
    complain("listening; Ctrl-C ends")
    # What comes as text is shown as it comes; all other formats need the whole.
    live = LiveText() if output.folder is not None or output.formats == ("txt",) else None
    found = transcribe_live(
        recognizer,
        microphone,
        options_from(arguments, recognizer),
        live or (lambda update: None),
        every=arguments.mic_every,
    )
    if live is not None:
        live.close()
    if output.folder is not None or live is None:
        output.deliver(found, "microphone", Path(time.strftime("microphone-%Y%m%d-%H%M%S")))
    return 0
