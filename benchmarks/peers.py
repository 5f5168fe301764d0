"""What other post-training tools make of the same weights: their word errors, their files, their seconds.

    pip install torchao optimum-quanto ninja faster-whisper pywhispercpp
    python benchmarks/peers.py --data LIBRISPEECH/test --json results/peers.json
    python benchmarks/peers.py --table

Whichever tools are installed are run, each in a process of its own, and measured at the size of the file that
they write. All start from the weights that `usmlite.load_teacher` reads, hear the same audio, and decode
greedily without timestamps (audio over 30 s with them), in English, without a second try at a higher
temperature. `--packed` adds packed models. A result that is there is not made again, so the command may be
repeated; what failed or was missing is tried again. `--table` rewrites the README's table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import WhisperForConditionalGeneration

import ggml_whisper
import runtimes
from pages import place
from usmlite.atomic import write_json
from usmlite.audio import load_audio
from usmlite.data import load_corpus
from usmlite.evaluate import Evaluation, compare, describe_machine, describe_versions, evaluate
from usmlite.load import load
from usmlite.models import Teacher, load_teacher
from usmlite.packfile import WEIGHTS_NAME
from usmlite.runtime import Recognizer

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "results" / "peers.json"
DENSE, REFERENCE = "dense", "faster-whisper float32"
TOKENS, TIED = "model.decoder.embed_tokens.weight", "proj_out.weight"  # one weight under two names
SAME = 0.003  # dense and faster-whisper's float32 are called alike within so much WER


@dataclass(frozen=True)
class Place:
    """Where a peer makes its model.

    Attributes:
        teacher: the dense model, fresh.
        folder: empty, and gone afterwards.
        threads: how many it may use.
    """

    teacher: Teacher
    folder: Path
    threads: int

    def transformers_directory(self) -> Path:
        """The dense model as Transformers saves it, for tools that start from such a directory."""
        directory = self.folder / "transformers"
        self.teacher.model.save_pretrained(directory)
        self.teacher.adapter.tokenizer.save_pretrained(directory)
        return directory


@dataclass(frozen=True)
class Made:
    """A model that was made: what transcribes, and the file that would be shipped."""

    transcribe: runtimes.Transcribe
    file: Path


@dataclass(frozen=True)
class Peer:
    """One tool with one setting.

    Attributes:
        make: makes the model.
        how: the setting, in the words of the tool.
        packages: what must be installed, by the names that pip knows.
        batch: utterances handed over at a time; tools that take one after another get 1.
    """

    make: Callable[[Place], Made]
    how: str
    packages: tuple[str, ...] = ()
    batch: int = 16

    def missing(self) -> str | None:
        """What to install, in one line; None where everything is there."""
        try:
            for package in self.packages:
                metadata.distribution(package)
        except metadata.PackageNotFoundError:
            return f"pip install {' '.join(self.packages)}"
        return None


# Ours


def dense(place: Place) -> Made:
    """The teacher itself, in float32."""
    weights = place.transformers_directory() / "model.safetensors"
    return Made(_ours(place.teacher.model, place), weights)


def packed(source: Path, place: Place) -> Made:
    """A packed model of usmlite."""
    recognizer = load(source)
    if recognizer.kind != "packed":
        raise ValueError("this is not a packed model")
    folder = source if (source / WEIGHTS_NAME).is_file() else source / "packed"
    return Made(runtimes.ours(recognizer), folder / WEIGHTS_NAME)


def _ours(model: nn.Module, place: Place) -> runtimes.Transcribe:
    """Decodes with usmlite: of a tool that only changes weights, only the weights are compared."""
    return runtimes.ours(Recognizer(model, place.teacher.adapter, name="", kind="dense", weights_bytes=0))


# Tools that change the weights of a Transformers model. The float weights that they leave are bfloat16, as in
# their examples: float32 would double what they take.


def torchao(kind: str, place: Place) -> Made:
    """torchao's weight-only quantization of the linear layers, saved and loaded as its documentation does.

    The output projection is the token embedding's own weight. Left alone both stay bfloat16; with
    "int8 embedding" both are the same int8.
    """
    from torchao.prototype.quantization.int4 import (  # type: ignore[import-not-found, unused-ignore]
        PrototypeInt4WeightOnlyConfig,
    )
    from torchao.quantization import (  # type: ignore[import-not-found, unused-ignore]
        Int8WeightOnlyConfig,
        quantize_,
    )

    # torchao.quantization.Int4WeightOnlyConfig has no layout that runs on a CPU; this is where that one went.
    config = PrototypeInt4WeightOnlyConfig() if kind == "int4" else Int8WeightOnlyConfig()
    model = cast(Any, place.teacher.model).to(torch.bfloat16)
    quantize_(model, config, lambda module, name: isinstance(module, nn.Linear) and name != "proj_out")
    if kind == "int8 embedding":
        quantize_(model, config, lambda module, name: isinstance(module, nn.Embedding) and _is_tokens(name))
        model.proj_out.weight = model.model.decoder.embed_tokens.weight
    file = place.folder / "model.pt"
    torch.save({name: value for name, value in model.state_dict().items() if name != TIED}, file)
    loaded = _empty(place)
    state = torch.load(file, weights_only=True)
    loaded.load_state_dict({**state, TIED: state[TOKENS]}, assign=True)
    return Made(_ours(loaded, place), file)


def quanto(kind: str, place: Place) -> Made:
    """optimum-quanto's weight-only quantization of the linear layers; the tied output projection is left."""
    from optimum import quanto as library  # type: ignore[import-not-found, unused-ignore]

    model = cast(Any, place.teacher.model).to(torch.bfloat16)
    library.quantize(model, weights=getattr(library, kind), exclude="proj_out")
    library.freeze(model)
    file = place.folder / "model.safetensors"
    state = {name: value.contiguous() for name, value in model.state_dict().items() if name != TIED}
    save_file(state, file)
    loaded = _empty(place)
    state = load_file(file)
    places = library.quantization_map(model)
    library.requantize(loaded, {**state, TIED: state[TOKENS]}, places, device=torch.device("cpu"))
    for module in loaded.modules():
        if isinstance(module, library.QLinear):
            module.forward = _outside_inference_mode(module.forward)
    return Made(_ours(loaded, place), file)


def _outside_inference_mode(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """For optimum-quanto 0.2.7, whose tensors of 2 bits cannot be made in it ("version_counter")."""

    def outside(*arguments: Any) -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return forward(*arguments)

    return outside


def _is_tokens(name: str) -> bool:
    return f"{name}.weight" == TOKENS


def _empty(place: Place) -> Any:
    """A model of the teacher's shape, to load weights into."""
    model: Any = WhisperForConditionalGeneration
    made = model._from_config(place.teacher.adapter.config, attn_implementation="sdpa")
    made.generation_config = place.teacher.adapter.generation
    return made.to(torch.bfloat16).eval().requires_grad_(False)


# Runtimes of their own


def faster_whisper(kind: str, place: Place) -> Made:
    """faster-whisper with a `model.bin` that CTranslate2's converter wrote in this precision."""
    from ctranslate2.converters import (  # type: ignore[import-not-found, unused-ignore]
        TransformersConverter,
    )

    directory = place.folder / "ctranslate2"
    converter = TransformersConverter(
        str(place.transformers_directory()), copy_files=["tokenizer.json"], low_cpu_mem_usage=True
    )
    converter.convert(str(directory), quantization=kind)
    return Made(
        runtimes.faster_whisper(directory, kind, place.threads),
        directory / "model.bin",
    )


def whisper_cpp(kind: str, place: Place) -> Made:
    """whisper.cpp through pywhispercpp, with a file that `ggml_whisper` writes."""
    file = place.folder / f"ggml-{kind}.bin"
    ggml_whisper.write(place.teacher, file, kind)
    return Made(runtimes.whisper_cpp(file, place.threads), file)


# In the order of the table.
PEERS: dict[str, Peer] = {DENSE: Peer(dense, "float32")}
for _kind, _how in (
    ("int8", "Int8WeightOnlyConfig, linear layers; bfloat16 else"),
    ("int8 embedding", "the same, token embedding too"),
    ("int4", "PrototypeInt4WeightOnlyConfig (groups of 128), linear layers; bfloat16 else"),
):
    PEERS[f"torchao {_kind}"] = Peer(partial(torchao, _kind), _how, ("torchao",))
for _kind in ("qint4", "qint2"):
    PEERS[f"optimum-quanto {_kind}"] = Peer(
        partial(quanto, _kind),
        f"weights={_kind} (groups of 128), linear layers; bfloat16 else",
        ("optimum-quanto", "ninja"),
    )
for _kind in ("float32", "int8"):
    PEERS[f"faster-whisper {_kind}"] = Peer(
        partial(faster_whisper, _kind),
        f"CTranslate2 converter, quantization={_kind}",
        ("faster-whisper", "ctranslate2"),
        batch=1,
    )
for _kind in ggml_whisper.KINDS:
    PEERS[f"whisper.cpp {_kind}"] = Peer(
        partial(whisper_cpp, _kind), f"ggml {_kind}", ("pywhispercpp",), batch=1
    )


def packed_name(source: Path) -> str:
    """What results call a packed model: its run's folder, for the rest of its path is nobody's business."""
    path = source.resolve()
    return f"usmlite {path.parent.name if path.name == 'packed' else path.name}"


def measure(name: str, peer: Peer, model: str, data: Path, limit: int | None, threads: int) -> dict[str, Any]:
    """Makes one model and evaluates it, in the process it is called in.

    Returns:
        What the JSON file says about it: an evaluation, or one line of error.
    """
    torch.set_num_threads(threads)
    folder = Path(tempfile.mkdtemp())
    try:
        made = peer.make(Place(load_teacher(model), folder, threads))
        utterances = load_corpus(data, require_text=True)[:limit]
        # What is compiled or set up at the first call is not counted as transcription.
        made.transcribe([load_audio(utterances[0].audio)])
        found = evaluate(
            made.transcribe,
            utterances,
            name=name,
            weights_bytes=made.file.stat().st_size,
            batch_size=peer.batch,
            progress=partial(_progress, name),
        )
    except Exception as error:  # a tool may fail in any way, and the others go on
        return {"error": one_line(error)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    versions = {package: metadata.version(package) for package in peer.packages}
    return {"how": peer.how, "batch": peer.batch, "versions": versions, "evaluation": found.to_json()}


def _progress(name: str, done: int, total: int) -> None:
    if done % 16 == 0 or done == total:
        print(f"{name}: {done} of {total}", file=sys.stderr, flush=True)


def one_line(error: Exception) -> str:
    """An error in one line; of a path only the name, for where it lies is nobody's business."""
    lines = str(error).strip().splitlines() or [""]
    return re.sub(r"/\S*/", "", f"{type(error).__name__}: {lines[0]}")[:200]


def in_own_process(name: str, peer: Peer, *rest: Any) -> dict[str, Any]:
    """`measure`, where neither an abort in native code nor a library's settings reach the next peer."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as executor:
        try:
            return executor.submit(measure, name, peer, *rest).result()
        except BrokenProcessPool:
            return {"error": "its process died"}


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Runs what is wanted, installed and not there yet; writes the file after each."""
    peers = {**PEERS, **{packed_name(path): packed_peer(path) for path in arguments.packed}}
    unknown = sorted(set(arguments.only or ()) - peers.keys())
    if unknown:
        parser.error(f"no peer is called {unknown[0]!r}; there are: {', '.join(peers)}")
    utterances = load_corpus(arguments.data, require_text=True)[: arguments.limit]
    texts = "".join(f"{utterance.id} {utterance.text}\n" for utterance in utterances)
    settings = {
        "model": arguments.model,
        "threads": arguments.threads,
        "utterances": len(utterances),
        "corpus_sha256": hashlib.sha256(texts.encode()).hexdigest(),
    }
    results: dict[str, Any] = {
        "command": "python benchmarks/peers.py --data LIBRISPEECH/test --json results/peers.json",
        "settings": settings,
        "float32_bytes": load_teacher(arguments.model).float32_bytes,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "peers": {},
    }
    if arguments.json.is_file():
        results = json.loads(arguments.json.read_text(encoding="utf-8"))
        if results["settings"] != settings:
            parser.error(f"{arguments.json} was made with other settings: {results['settings']}")
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # libraries read it as they are imported
    for name in arguments.only or peers:
        if "evaluation" in results["peers"].get(name, {}):
            continue
        missing = peers[name].missing()
        if missing is None:
            found = in_own_process(
                name, peers[name], arguments.model, arguments.data, arguments.limit, arguments.threads
            )
        else:
            found = {"missing": missing}
        results["peers"][name] = found
        _compare(results["peers"])
        write_json(arguments.json, results)
        print(_line(name, found), flush=True)
    if agreement(results["peers"]):
        print(agreement(results["peers"]))


def packed_peer(path: Path) -> Peer:
    """A packed model as one more row."""
    return Peer(partial(packed, path), "usmlite compress")


def _compare(found: dict[str, Any]) -> None:
    """Adds the comparison with the dense model wherever both are there."""
    if "evaluation" not in found.get(DENSE, {}):
        return
    baseline = Evaluation.from_json(found[DENSE]["evaluation"])
    for name, record in found.items():
        if name != DENSE and "evaluation" in record and "comparison" not in record:
            record["comparison"] = compare(Evaluation.from_json(record["evaluation"]), baseline).to_json()


def _line(name: str, record: dict[str, Any]) -> str:
    if "evaluation" not in record:
        return f"{name}: {record.get('error') or record['missing']}"
    score = record["evaluation"]
    return (
        f"{name}: WER {100 * score['wer']:.2f} %, {score['weights_bytes']:,} bytes, "
        f"{score['wall_seconds']:.0f} s, real-time factor {score['real_time_factor']:.3f}"
    )


def agreement(found: dict[str, Any]) -> str | None:
    """Whether our dense transcripts and faster-whisper's of the same weights are as good as each other."""
    other = found.get(REFERENCE, {}).get("comparison")
    if other is None:
        return None
    verdict = "within" if abs(other["difference"]) <= SAME else "NOT within"
    return (
        f"{DENSE} is {verdict} {100 * SAME:.1f} points of {REFERENCE}: {-100 * other['difference']:+.2f}, "
        f"{100 * other['same_transcripts']:.1f} % of transcripts are the same"
    )


def table(results: dict[str, Any]) -> str:
    """The README's table, in Markdown, and a line about how it was made."""
    found = results["peers"]
    order = list(PEERS)
    names = sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name))
    lines = [
        "| model | made by | file, MB | % of float32 | WER % (95 % interval) | against dense | seconds |",
        "| --- | --- | --: | --: | --: | --: | --: |",
    ]
    versions: dict[str, str] = {}
    for name in (name for name in names if "evaluation" in found[name]):
        score, other = found[name]["evaluation"], found[name].get("comparison")
        versions |= found[name]["versions"]
        size = f"{score['weights_bytes'] / 1e6:.2f}"
        share = f"{100 * score['weights_bytes'] / results['float32_bytes']:.2f}"
        low, high = (100 * value for value in score["ci95"])
        wer = f"{100 * score['wer']:.2f} ({low:.2f} to {high:.2f})"
        relative = ""
        if other is not None and other["relative_difference"] is not None:
            a, b = (100 * value for value in other["relative_ci95"])
            relative = f"{100 * other['relative_difference']:+.1f} % ({a:+.1f} to {b:+.1f})"
        cells = (name, found[name]["how"], size, share, wer, relative, f"{score['wall_seconds']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    settings = results["settings"]
    lines += [
        "",
        f"`{settings['model']}`, {settings['utterances']} utterances, greedy; differences are relative and "
        f"paired. Seconds are those of all transcripts with {settings['threads']} threads, one utterance at "
        "a time with faster-whisper and whisper.cpp, 16 side by side with the others. "
        f"Machine: {results['machine']['cpu']}.",
    ]
    if versions:
        lines.append(", ".join(f"{package} {version}" for package, version in sorted(versions.items())) + ".")
    for name in names:
        reason = found[name].get("error") or found[name].get("missing")
        if reason is not None:
            lines.append(f"Not measured: {name} ({reason}).")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a corpus with text")
    parser.add_argument("--json", type=Path, default=RESULTS, help="the results, added to")
    parser.add_argument("--model", default="tiny.en", help="what load_teacher takes")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"only these: {', '.join(PEERS)}")
    parser.add_argument("--limit", type=int, help="only the first N utterances")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--packed", type=Path, nargs="+", default=[], metavar="DIR", help="packed models, too"
    )
    parser.add_argument("--table", action="store_true", help="rewrite the README's table")
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
        place(README, "peers", rows)
        print(rows)


if __name__ == "__main__":
    main()
