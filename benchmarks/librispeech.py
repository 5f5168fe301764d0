"""The results on LibriSpeech: runs every recipe of recipes/librispeech, and measures it on test.

    python benchmarks/librispeech.py --data LIBRISPEECH --runs runs
    python benchmarks/librispeech.py --table

LIBRISPEECH holds train/, dev/ and test/, each a corpus as `usmlite` reads them. The runs resume where they
were cut off, and a result that is there is not made again, so the first command may be repeated. Checkpoints
are chosen on dev; test is only measured. `--table` rewrites the README's table from results/librispeech.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from usmlite.atomic import write_bytes, write_json
from usmlite.compress import ALLOCATION_FILE, compress
from usmlite.data import load_corpus
from usmlite.evaluate import Evaluation, compare, evaluate
from usmlite.load import load
from usmlite.models import load_teacher
from usmlite.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
RECIPES, RESULTS, README = (
    ROOT / "recipes" / "librispeech",
    ROOT / "results" / "librispeech",
    ROOT / "README.md",
)
START, END = "<!-- results -->", "<!-- /results -->"
# The run whose measurements the other target sizes choose from.
MEASURED = "9.4-percent-no-finetuning"
# The order of the table; what is not named comes after.
ORDER = (
    "dense", "dense-finetuned", "int8", "int4", "9.4-percent", "9.4-percent-no-finetuning",
    "6.3-percent", "4.7-percent", "int3", "int4-2of4", "int4-2of4-no-finetuning",
)  # fmt: skip


def measure(source: Path | str, corpus: Path, precision: str, console: Console) -> dict[str, Any]:
    """Evaluates one model on a corpus, in float32 or with weights and activations in bf16."""
    recognizer = load(source)
    if precision == "bf16":
        recognizer.model.to(torch.bfloat16)
    utterances = load_corpus(corpus, require_text=True)

    def progress(done: int, total: int) -> None:
        console.print(f"{source}: {done} of {total}")

    found = evaluate(
        recognizer.transcribe_batch,
        utterances,
        name=str(source),
        weights_bytes=recognizer.weights_bytes,
        batch_size=32,
        progress=progress,
    )
    return {**found.to_json(), "precision": precision}


def make(name: str, arguments: argparse.Namespace, console: Console) -> None:
    """Runs one recipe and measures what it packed; "dense" is the teacher itself."""
    target = RESULTS / f"{name}.json"
    if target.is_file():
        return
    result: dict[str, Any] = {"name": name, "float32_bytes": load_teacher("tiny.en").float32_bytes}
    if name == "dense":
        source: Path | str = "tiny.en"
    else:
        data = {"train": str(arguments.data / "train"), "dev": str(arguments.data / "dev")}
        data["transcripts"] = str(arguments.runs / "transcripts.jsonl")
        source = arguments.runs / name
        overrides = {"data": data}
        measured = arguments.runs / MEASURED / ALLOCATION_FILE
        recipe = RECIPES / f"{name}.toml"
        if name != MEASURED and measured.is_file() and load_recipe(recipe).spec.target_size is not None:
            overrides["spec"] = {"measured": str(measured)}
        report = compress(load_recipe(recipe, overrides), source, console=console)
        # The places on this machine are nobody's business.
        for section, table in overrides.items():
            for key in table:
                del report["recipe"][section][key]
        result["run"] = report
    evaluation = measure(source, arguments.data / "test", arguments.precision, console)
    evaluation["name"] = name
    result["evaluation"] = evaluation
    result["command"] = "python benchmarks/librispeech.py --data LIBRISPEECH --runs runs"
    dense = RESULTS / "dense.json"
    if name != "dense":
        other = json.loads(dense.read_text(encoding="utf-8"))["evaluation"]
        result["comparison"] = compare(
            Evaluation.from_json(evaluation), Evaluation.from_json(other)
        ).to_json()
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_json(target, result)


def table() -> str:
    """The README's table, in Markdown."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")}
    names = sorted(found, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    lines = [
        "| model | file, MB | % of float32 | steps | WER % (95 % interval) | against dense, relative | p |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    for name in names:
        result = found[name]
        score, run, other = result["evaluation"], result.get("run"), result.get("comparison")
        size = score["weights_bytes"]
        low, high = (100 * value for value in score["ci95"])
        steps = "" if run is None else str(run["training"]["steps"] if run["training"] else 0)
        relative = p = ""
        if other is not None:
            a, b = (100 * value for value in other["relative_ci95"])
            relative = f"{100 * other['relative_difference']:+.1f} % ({a:+.1f} to {b:+.1f})"
            p = f"{other['p_value']:.2g}"
        lines.append(
            f"| {name} | {size / 1e6:.2f} | {100 * size / result['float32_bytes']:.2f} | {steps} "
            f"| {100 * score['wer']:.2f} ({low:.2f} to {high:.2f}) | {relative} | {p} |"
        )
    one = found[names[0]]["evaluation"]
    lines += [
        "",
        f"{one['utterance_count']} utterances, {one['audio_seconds'] / 3600:.2f} h of test-clean; "
        f"greedy, {one['precision']}; intervals by bootstrap over utterances, differences paired on the same "
        f"utterances. Machine: {one['machine']['cpu']}.",
    ]
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with train, dev and test")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs go")
    parser.add_argument("--only", nargs="*", help="only these (dense, or the name of a recipe)")
    parser.add_argument(
        "--precision", choices=("float32", "bf16"), default="float32", help="of the evaluation"
    )
    parser.add_argument("--table", action="store_true", help="rewrite the README's table")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    if arguments.data is not None:
        recipes = sorted((path.stem for path in RECIPES.glob("*.toml")), key=lambda name: name != MEASURED)
        for name in arguments.only or ["dense", *recipes]:
            make(name, arguments, Console())
    if arguments.table:
        text = README.read_text(encoding="utf-8")
        head, tail = text.split(START)[0], text.split(END)[1]
        write_bytes(README, f"{head}{START}\n{table()}\n{END}{tail}".encode())
        print(table())


if __name__ == "__main__":
    main()
