"""`usmlite export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from usmlite.cli.arguments import add_command
from usmlite.cli.console import bar, make_console, settle_libraries

EXPORTS = ("transformers", "compressed-tensors", "onnx", "sherpa-onnx", "ctranslate2", "ggml")

EPILOG = """\
target              for                            --dtype, the first is the default
transformers        Transformers, and all that     float32, float16, bfloat16
                    reads its directories
compressed-tensors  Transformers with the package  auto, int8, int4: linear layers
                    compressed-tensors
onnx                ONNX Runtime (MatMulNBits)     auto, int8, int4, float16, float32
sherpa-onnx         sherpa-onnx                    auto, int8, int4, float16, float32
ctranslate2         faster-whisper                 int8, float16, float32
ggml                whisper.cpp; OUT is a file     auto, f16, q8_0, q5_0, q4_0

The target's own integers and scales are the packed model's wherever it has them; "auto" takes the fewest bits
that hold every weight as it is. What a target has not (entropy-coded codes, N:M, scales of columns) is
widened: the plan says to what, by kind of layer, with the bytes, before anything is written. --plan stops
there. onnx and sherpa-onnx need the extra: pip install "usmlite[onnx]". CTC models go to transformers and
compressed-tensors. What each runtime makes of the files, in words and bytes, is in docs/exports.md.

examples:
  usmlite export small/packed --to ctranslate2 --out small-ct2/
  usmlite export tiny.en-small --to ggml --out ggml-tiny.en-small.bin
  usmlite export small/packed --to onnx --out small-onnx/ --plan
  usmlite export small/packed --to transformers --dtype float16 --out small-float16/
"""


def add(commands: Any) -> None:
    """The command and its flags."""
    parser = add_command(commands, "export", "write a model in the format of another runtime", EPILOG, run)
    parser.add_argument("source", metavar="MODEL", help="a packed, dense or student model")
    parser.add_argument("--to", required=True, choices=EXPORTS, metavar="TARGET", help=", ".join(EXPORTS))
    parser.add_argument(
        "--out", required=True, type=Path, metavar="OUT", help="a new or empty directory; of ggml, a new file"
    )
    parser.add_argument("--dtype", metavar="TYPE", help="numbers of the weights there, see below")
    parser.add_argument("--plan", action="store_true", help="only say what would be written")


def run(arguments: argparse.Namespace) -> int:
    """Carries the command out; its exit code."""
    settle_libraries()
    from usmlite.export import TARGETS, check_new, open_source, plan_export, write_export

    target = TARGETS[arguments.to]
    if not arguments.plan:
        # Before the model is read, not after it.
        target.check_packages()
        check_new(target, arguments.out)
    console = make_console()
    with console.status("Reading the model"):
        source = open_source(arguments.source)
        plan = plan_export(source, arguments.to, arguments.dtype)
    console.print(plan.table(source.name))
    console.print(plan.summary(), markup=False)
    if arguments.plan:
        return 0
    with bar(f"Writing {arguments.out}") as progress:
        write_export(source, plan, arguments.out, progress=progress)
    console.print(f"Written: {arguments.out}", markup=False)
    return 0
