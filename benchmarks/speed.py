"""How fast the runtimes that people use transcribe the same audio on this machine's processor, side by side.

    pip install faster-whisper pywhispercpp
    python benchmarks/speed.py --data LIBRISPEECH/test           60 utterances, 1 and 2 threads
    python benchmarks/speed.py --data LIBRISPEECH/test --save    results/runtimes.json and the tables of
                                                                    docs/performance.md

Every runtime has a process of its own, is loaded once, and hears one utterance after the other; each
utterance goes through all of them, in an order that turns, before the next one comes. All decode greedily, in
English, without timestamps and without a second try at a higher temperature. Seconds are counted twice: on
the wall, and as processor time of all threads of the process, which other work on the machine changes least.
Memory is the highest resident size while loading and transcribing once, less that after all imports.
Runtimes that are not installed are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata, util
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import jiwer
import numpy as np
import torch

import ggml_whisper
import runtimes
from pages import place
from peers import Place
from runtimes import Transcribe
from usmlite.atomic import write_json
from usmlite.audio import load_audio
from usmlite.data import Utterance, load_corpus
from usmlite.evaluate import describe_machine, describe_versions
from usmlite.load import load
from usmlite.memory import PeakMemory
from usmlite.models import load_teacher
from usmlite.packed import arithmetic
from usmlite.shipped import DEFAULT
from usmlite.text import normalize

ROOT = Path(__file__).resolve().parent.parent
RESULT, PAGE = ROOT / "results" / "runtimes.json", ROOT / "docs" / "performance.md"
FASTER_WHISPER = "faster-whisper int8"
TORCH = "torch float32"
TRANSFORMERS = "Transformers float32"
CPP = tuple(f"whisper.cpp {kind}" for kind in ("q5_0", "q8_0"))


def prepare(model: str, folder: Path, packed: Sequence[str]) -> dict[str, str]:
    """Writes the files that the installed runtimes load: name to path."""
    sources = {f"usmlite {Path(source).name}": source for source in packed}
    sources |= {TORCH: model, TRANSFORMERS: model}
    teacher = load_teacher(model)
    if util.find_spec("faster_whisper") is not None:
        from ctranslate2.converters import (  # type: ignore[import-not-found, unused-ignore]
            TransformersConverter,
        )

        saved = Place(teacher, folder, 1).transformers_directory()
        converter = TransformersConverter(str(saved), copy_files=["tokenizer.json"], low_cpu_mem_usage=True)
        converter.convert(str(folder / "ctranslate2"), quantization="int8")
        sources[FASTER_WHISPER] = str(folder / "ctranslate2")
    if util.find_spec("pywhispercpp") is not None:
        for name in CPP:
            file = folder / f"{name}.bin"
            ggml_whisper.write(teacher, file, name.split()[1])
            sources[name] = str(file)
    return sources


def open_runtime(name: str, source: str, threads: int) -> tuple[Transcribe, str]:
    """What transcribes, and how it computes."""
    if name == FASTER_WHISPER:
        return runtimes.faster_whisper(Path(source), "int8", threads), "int8"
    if name in CPP:
        return runtimes.whisper_cpp(Path(source), threads), name.split()[1]
    if name == TRANSFORMERS:
        return generate(source), "float32"
    recognizer = load(source)
    return runtimes.ours(recognizer), arithmetic(recognizer.model)


def generate(source: str) -> Transcribe:
    """Transformers' own `generate`."""
    teacher = load_teacher(source)
    model, adapter = cast(Any, teacher.model).eval(), teacher.adapter
    language = {"language": "en", "task": "transcribe"} if adapter.config.vocab_size > 51864 else {}

    def transcribe(audios: Sequence[np.ndarray]) -> list[str]:
        texts = []
        for audio in audios:
            window = torch.zeros(1, 480_000)
            window[0, : len(audio)] = torch.from_numpy(audio)
            with torch.inference_mode():
                tokens = model.generate(adapter.features(window), do_sample=False, num_beams=1, **language)
            texts.append(adapter.decode_text([token for token in tokens[0].tolist() if token < adapter.end]))
        return texts

    return transcribe


def serve(pipe: Connection, name: str, source: str, threads: int, first: np.ndarray) -> None:
    """One runtime: loads, then answers each utterance with its text, wall and processor seconds."""
    torch.set_num_threads(threads)
    module = {FASTER_WHISPER: "faster_whisper"} | dict.fromkeys(CPP, "pywhispercpp.model")
    if name in module:
        importlib.import_module(module[name])
    before = resident()
    peak = PeakMemory()
    start, spent = time.perf_counter(), time.process_time()
    transcribe, how = open_runtime(name, source, threads)
    loaded = time.perf_counter() - start
    transcribe([first])
    pipe.send(
        {
            "how": how,
            "load": loaded,
            "load_and_first": time.perf_counter() - start,
            "load_and_first_processor": time.process_time() - spent,
            "memory": peak.read()[0] - before,
        }
    )
    while (audio := pipe.recv()) is not None:
        start, spent = time.perf_counter(), time.process_time()
        text = transcribe([audio])[0]
        pipe.send((text, time.perf_counter() - start, time.process_time() - spent))


def resident() -> int:
    """Bytes of this process that are in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def running(sources: Mapping[str, str], threads: int, first: np.ndarray) -> Iterator[dict[str, Connection]]:
    """A process for each runtime, ready."""
    # Libraries read these as they are imported.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    try:
        for name, source in sources.items():
            pipes[name], theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, name, source, threads, first), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
        yield pipes
    finally:
        for pipe in pipes.values():
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in processes:
            process.join(10)
            process.kill()


def race(
    sources: Mapping[str, str], audios: Sequence[np.ndarray], references: Sequence[str], threads: int
) -> dict[str, Any]:
    """Every utterance through every runtime."""
    with running(sources, threads, audios[0]) as pipes:
        found: dict[str, Any] = {}
        for name, pipe in pipes.items():
            try:
                found[name] = pipe.recv() | {"seconds": 0.0, "processor": 0.0, "texts": []}
            except EOFError:
                print(f"{name} could not be loaded", file=sys.stderr)
        order = list(found)
        for index, audio in enumerate(audios):
            for name in order:
                pipes[name].send(audio)
                text, wall, processor = pipes[name].recv()
                found[name]["texts"].append(text)
                found[name]["seconds"] += wall
                found[name]["processor"] += processor
            order = order[1:] + order[:1]
            if (index + 1) % 10 == 0:
                print(f"{threads} threads: {index + 1} of {len(audios)}", file=sys.stderr, flush=True)
    dense = [normalize(text) for text in found[TORCH]["texts"]]
    for record in found.values():
        texts = [normalize(text) for text in record.pop("texts")]
        counts = jiwer.process_words(list(references), texts)
        record["errors"] = counts.substitutions + counts.deletions + counts.insertions
        record["different_texts"] = sum(a != b for a, b in zip(texts, dense, strict=True))
    return found


def page(results: Mapping[str, Any]) -> str:
    """The tables of docs/performance.md."""
    parts = []
    for result in results.values():
        machine, versions = result["machine"], result["versions"]
        shown = ", ".join(f"{name} {version}" for name, version in versions.items())
        parts.append(
            f"`{result['model']}`: {result['utterances']} utterances of {result['audio_seconds']:.0f} s, "
            f"{result['words']} words. {machine['cpu']}, {machine['kernels']}; {shown}."
        )
        for run in result["runs"]:
            parts.append(table(run["threads"], run["runtimes"], result["words"]))
    return "\n\n".join(parts)


def table(threads: int, found: Mapping[str, Mapping[str, Any]], words: int) -> str:
    """Seconds, and how many times as fast as each the first runtime of ours is."""
    best = next(record for name, record in found.items() if name.startswith("usmlite "))
    lines = [
        f"| {threads} thread{'s' if threads > 1 else ''} | processor, s | ours is faster | wall, s "
        "| ours is faster | load and first text, s | memory, MB | WER, % | texts other than torch's |",
        "| --- |" + " --: |" * 8,
    ]
    for name, record in found.items():
        lines.append(
            f"| {name} | {record['processor']:.1f} | {record['processor'] / best['processor']:.2f} "
            f"| {record['seconds']:.1f} | {record['seconds'] / best['seconds']:.2f} "
            f"| {record['load_and_first']:.2f} | {record['memory'] / 1e6:.0f} "
            f"| {100 * record['errors'] / words:.2f} | {record['different_texts']} |"
        )
    return "\n".join(lines)


def installed() -> dict[str, str]:
    """Versions of what was compared."""
    names = ("faster-whisper", "ctranslate2", "pywhispercpp")
    found = {key: value for key, value in describe_versions().items() if key in ("torch", "transformers")}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def chosen(data: Path, count: int) -> list[Utterance]:
    """Utterances evenly spread over a corpus."""
    found = sorted(load_corpus(data, require_text=True), key=lambda utterance: utterance.id)
    return found[:: max(1, len(found) // count)][:count]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="a corpus with texts")
    parser.add_argument("--model", default="tiny.en", help="the dense model (default: tiny.en)")
    parser.add_argument(
        "--packed", nargs="+", default=[DEFAULT], help="packed models of it, the first compared"
    )
    parser.add_argument("--utterances", type=int, default=60, help="how many (default: 60)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these runtimes, and ours")
    parser.add_argument(
        "--save", action="store_true", help=f"add to {RESULT.name}, rewrite the page's tables"
    )
    options = parser.parse_args(arguments)
    utterances = chosen(options.data, options.utterances)
    audios = [load_audio(utterance.audio)[: 30 * 16_000] for utterance in utterances]
    references = [normalize(utterance.text or "") for utterance in utterances]
    folder = Path(tempfile.mkdtemp())
    try:
        sources = prepare(options.model, folder, options.packed)
        if options.only is not None:
            kept = {*options.only, TORCH}
            sources = {k: v for k, v in sources.items() if k in kept or k.startswith("usmlite ")}
        runs = []
        for threads in options.threads:
            found = race(sources, audios, references, threads)
            print(table(threads, found, sum(map(len, map(str.split, references)))), flush=True)
            runs.append({"threads": threads, "runtimes": found})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if options.save:
        result = {
            "model": options.model,
            "utterances": len(audios),
            "words": sum(map(len, map(str.split, references))),
            "audio_seconds": sum(map(len, audios)) / 16_000,
            "machine": describe_machine(),
            "versions": installed(),
            "runs": runs,
        }
        results = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
        results[options.model] = result
        write_json(RESULT, results)
        place(PAGE, "runtimes", page(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
