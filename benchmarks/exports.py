"""Every export in the runtime that it is for, on real speech: the same words as ours, and as few errors?

    pip install "usmlite[onnx]" onnxruntime sherpa-onnx faster-whisper pywhispercpp compressed-tensors
    python benchmarks/exports.py --data LIBRISPEECH/test --json results/exports.json
    python benchmarks/exports.py --table

A packed model is exported to every target whose runtime is installed, with the weights as they come out by
default and, where there is one, in floats: the second row says what the runtime does differently, the first
what the format does too. All decode greedily, in English and without times; the comparison is with usmlite
itself, from the packed file, in float32. Utterances are taken evenly from the corpus; those over 29 seconds
are left out, for sherpa-onnx hears no more. Each runs in a process of its own. A result that is there is not
made again. `--table` rewrites the table in docs/exports.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import runtimes
from pages import place
from usmlite.atomic import write_json
from usmlite.audio import load_audio
from usmlite.data import Utterance, load_corpus
from usmlite.evaluate import Evaluation, compare, describe_machine, describe_versions, evaluate
from usmlite.export import export
from usmlite.load import load

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT, RESULTS = ROOT / "docs" / "exports.md", ROOT / "results" / "exports.json"
OURS = "usmlite"
LONGEST = 29.0  # seconds


@dataclass(frozen=True)
class Row:
    """One export, and the runtime that it is tried in.

    Attributes:
        target: of the export.
        form: its numbers.
        packages: of the runtime, by the names that pip knows.
        start: what transcribes, given what was written and how many threads.
    """

    target: str
    form: str
    packages: tuple[str, ...]
    start: Callable[[Path, int], runtimes.Transcribe]

    @property
    def name(self) -> str:
        """As results call it."""
        return f"{self.target} {self.form}"

    def missing(self) -> str | None:
        """What to install, in one line; None where everything is there."""
        try:
            for package in self.packages:
                metadata.distribution(package)
        except metadata.PackageNotFoundError:
            return f"pip install {' '.join(self.packages)}"
        return None


def _transformers(path: Path, threads: int) -> runtimes.Transcribe:
    return runtimes.transformers(path)


def _ctranslate2_int8(path: Path, threads: int) -> runtimes.Transcribe:
    return runtimes.faster_whisper(path, "int8", threads)


def _ctranslate2_float32(path: Path, threads: int) -> runtimes.Transcribe:
    return runtimes.faster_whisper(path, "float32", threads)


_ONNX = ("onnx", "onnxruntime")
_SHERPA = ("onnx", "sherpa-onnx")
_CT2 = ("faster-whisper", "ctranslate2")
ROWS = {
    row.name: row
    for row in (
        Row("transformers", "float32", ("transformers",), _transformers),
        Row("compressed-tensors", "auto", ("compressed-tensors", "transformers"), _transformers),
        Row("onnx", "float32", _ONNX, runtimes.onnx_runtime),
        Row("onnx", "auto", _ONNX, runtimes.onnx_runtime),
        Row("sherpa-onnx", "float32", _SHERPA, runtimes.sherpa_onnx),
        Row("sherpa-onnx", "auto", _SHERPA, runtimes.sherpa_onnx),
        Row("ctranslate2", "float32", _CT2, _ctranslate2_float32),
        Row("ctranslate2", "int8", _CT2, _ctranslate2_int8),
        Row("ggml", "f16", ("pywhispercpp",), runtimes.whisper_cpp),
        Row("ggml", "auto", ("pywhispercpp",), runtimes.whisper_cpp),
    )
}


def chosen(data: Path, limit: int) -> list[Utterance]:
    """So many utterances, evenly from the corpus, without the longest."""
    found = [item for item in load_corpus(data, require_text=True) if item.duration <= LONGEST]
    return found[:: max(1, len(found) // limit)][:limit]


def measure(name: str, model: str, data: Path, limit: int, threads: int) -> dict[str, Any]:
    """Exports, transcribes and evaluates, in the process it is called in.

    Returns:
        What the JSON file says about it: an evaluation, or one line of error.
    """
    torch.set_num_threads(threads)
    utterances = chosen(data, limit)
    folder = Path(tempfile.mkdtemp())
    record: dict[str, Any] = {}
    try:
        if name == OURS:
            recognizer = load(model, hold="float32")
            transcribe, size = runtimes.ours(recognizer), recognizer.weights_bytes
        else:
            row = ROWS[name]
            out = folder / "export"
            plan = export(model, row.target, out, form=row.form)
            record = {
                "form": plan.form,
                "exact": plan.exact,
                "changes": [asdict(change) for change in plan.changes],
                "versions": {package: metadata.version(package) for package in row.packages},
            }
            transcribe, size = row.start(out, threads), weights_bytes(out)
        # What is compiled or set up at the first call is not counted as transcription.
        transcribe([load_audio(utterances[0].audio)])
        found = evaluate(
            transcribe, utterances, name=name, weights_bytes=size, batch_size=16 if name == OURS else 1,
            progress=lambda done, total: _progress(name, done, total),
        )  # fmt: skip
    except Exception as error:  # a runtime may fail in any way, and the others go on
        lines = str(error).strip().splitlines() or [""]
        return {"error": f"{type(error).__name__}: {lines[0]}"[:200].replace(str(folder), "")}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {**record, "evaluation": found.to_json()}


def weights_bytes(out: Path) -> int:
    """Bytes of an export without its JSON, which is the tokenizer and settings."""
    if out.is_file():
        return out.stat().st_size
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file() and path.suffix != ".json")


def _progress(name: str, done: int, total: int) -> None:
    if done % 8 == 0 or done == total:
        print(f"{name}: {done} of {total}", file=sys.stderr, flush=True)


def in_own_process(*arguments: Any) -> dict[str, Any]:
    """`measure`, where neither an abort in native code nor a library's settings reach the next one."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as executor:
        try:
            return executor.submit(measure, *arguments).result()
        except BrokenProcessPool:
            return {"error": "its process died"}


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Runs what is wanted, installed and not there yet; writes the file after each."""
    unknown = sorted(set(arguments.only or ()) - ROWS.keys())
    if unknown:
        parser.error(f"no export is called {unknown[0]!r}; there are: {', '.join(ROWS)}")
    utterances = chosen(arguments.data, arguments.limit)
    texts = "".join(f"{utterance.id} {utterance.text}\n" for utterance in utterances)
    settings = {
        "model": arguments.model,
        "threads": arguments.threads,
        "utterances": len(utterances),
        "corpus_sha256": hashlib.sha256(texts.encode()).hexdigest(),
    }
    results: dict[str, Any] = {
        "command": "python benchmarks/exports.py --data LIBRISPEECH/test --json results/exports.json "
        f"--limit {arguments.limit}",
        "settings": settings,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "exports": {},
    }
    if arguments.json.is_file():
        results = json.loads(arguments.json.read_text(encoding="utf-8"))
        if results["settings"] != settings:
            parser.error(f"{arguments.json} was made with other settings: {results['settings']}")
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # libraries read it as they are imported
    found = results["exports"]
    for name in (OURS, *(arguments.only or ROWS)):
        if "evaluation" in found.get(name, {}):
            continue
        missing = None if name == OURS else ROWS[name].missing()
        rest = (arguments.model, arguments.data, arguments.limit, arguments.threads)
        found[name] = in_own_process(name, *rest) if missing is None else {"missing": missing}
        if name != OURS and "evaluation" in found[name] and "evaluation" in found[OURS]:
            ours, theirs = (Evaluation.from_json(found[item]["evaluation"]) for item in (OURS, name))
            found[name]["comparison"] = compare(theirs, ours).to_json()
        write_json(arguments.json, results)
        print(_line(name, found[name]), flush=True)


def _line(name: str, record: dict[str, Any]) -> str:
    if "evaluation" not in record:
        return f"{name}: {record.get('error') or record['missing']}"
    score = record["evaluation"]
    text = f"{name}: WER {100 * score['wer']:.2f} %, {score['weights_bytes']:,} bytes"
    if "comparison" in record:
        other = record["comparison"]
        text += f", {100 * other['difference']:+.2f} points, {100 * other['same_transcripts']:.0f} % alike"
    return text


def table(results: dict[str, Any]) -> str:
    """The table of docs/exports.md, in Markdown, and a line about how it was made."""
    found, settings = results["exports"], results["settings"]
    lines = [
        "| export | numbers | file, MB | weights | WER % | against ours, points (95 % interval) "
        "| texts alike |",
        "| --- | --- | --: | --- | --: | --: | --: |",
    ]
    versions: dict[str, str] = {}
    for name in (OURS, *(name for name in ROWS if name in found)):
        record = found[name]
        if "evaluation" not in record:
            continue
        score, other = record["evaluation"], record.get("comparison")
        versions |= record.get("versions", {})
        cells = [name if name == OURS else ROWS[name].target, record.get("form", "as packed")]
        cells.append(f"{score['weights_bytes'] / 1e6:.2f}")
        cells.append("" if name == OURS else _weights(record["changes"]))
        cells.append(f"{100 * score['wer']:.2f}")
        if other is None:
            cells += ["", ""]
        else:
            low, high = (100 * value for value in other["ci95"])
            cells.append(f"{100 * other['difference']:+.2f} ({low:+.2f} to {high:+.2f})")
            cells.append(f"{100 * other['same_transcripts']:.1f} %")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"`{settings['model']}`, {settings['utterances']} utterances, greedy. "
        f"Machine: {results['machine']['cpu']}.",
    ]
    lines.append(", ".join(f"{package} {version}" for package, version in sorted(versions.items())) + ".")
    for name, record in found.items():
        if "evaluation" not in record:
            lines.append(f"Not measured: {name} ({record.get('error') or record['missing']}).")
    return "\n".join(lines)


def _weights(changes: list[dict[str, Any]]) -> str:
    """What became of matrices: the linear layers and the token embedding."""
    forms = {c["after"]: c["exact"] for c in changes if c["kind"] in ("linear", "embedding")}
    return "; ".join(f"{form} ({'as they are' if exact else 'rounded'})" for form, exact in forms.items())


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a corpus with text")
    parser.add_argument("--json", type=Path, default=RESULTS, help="the results, added to")
    parser.add_argument("--model", default="tiny.en-small", help="a packed model")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"only these: {', '.join(ROWS)}")
    parser.add_argument("--limit", type=int, default=200, help="how many utterances (default: 200)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--table", action="store_true", help="rewrite the table of docs/exports.md")
    return parser


def main() -> None:
    parser = build_parser()
    arguments = parser.parse_args()
    if arguments.data is not None:
        run(arguments, parser)
    if arguments.table:
        if not arguments.json.is_file():
            parser.error(f"there is no {arguments.json} yet: give --data")
        rows = table(json.loads(arguments.json.read_text(encoding="utf-8")))
        place(DOCUMENT, "exports", rows)
        print(rows)


if __name__ == "__main__":
    main()
