"""Compress a speech recognition model to a tenth of its bytes, and measure what that cost.

    import usmlite

    recognizer = usmlite.load("tiny.en-int4-2of4")        # a packed model's directory
    print(recognizer.transcribe("speech.wav").text)

What is named here is the public interface. It is imported when it is first used, so that
`import usmlite` itself stays light.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from usmlite.hf import install

if TYPE_CHECKING:
    from usmlite.compress import compress
    from usmlite.ctc import train_ctc
    from usmlite.data import Utterance, load_corpus, write_manifest
    from usmlite.errors import (
        AudioError,
        DataError,
        ModelError,
        OutputError,
        PackedModelError,
        RecipeError,
        SpecError,
        TrainingError,
        UsmliteError,
    )
    from usmlite.evaluate import Comparison, Evaluation, compare, evaluate
    from usmlite.export import export
    from usmlite.load import load
    from usmlite.models import Options, Teacher, Word, load_teacher
    from usmlite.movement import attach
    from usmlite.push import push
    from usmlite.recipe import Recipe, build_recipe, load_recipe
    from usmlite.runtime import Recognizer, Segment, Transcript
    from usmlite.spec import NM, CompressionSpec, Int, LayerSpec, Rule
    from usmlite.streaming import Update
    from usmlite.student import StudentOptions, make_student

__version__ = "0.1.0"

__all__ = [
    "NM",
    "AudioError",
    "Comparison",
    "CompressionSpec",
    "DataError",
    "Evaluation",
    "Int",
    "LayerSpec",
    "ModelError",
    "Options",
    "OutputError",
    "PackedModelError",
    "Recipe",
    "RecipeError",
    "Recognizer",
    "Rule",
    "Segment",
    "SpecError",
    "StudentOptions",
    "Teacher",
    "TrainingError",
    "Transcript",
    "Update",
    "UsmliteError",
    "Utterance",
    "Word",
    "attach",
    "build_recipe",
    "compare",
    "compress",
    "evaluate",
    "export",
    "load",
    "load_corpus",
    "load_recipe",
    "load_teacher",
    "make_student",
    "push",
    "train_ctc",
    "write_manifest",
]

_HOME = {
    "compress": ("compress",),
    "ctc": ("train_ctc",),
    "data": ("Utterance", "load_corpus", "write_manifest"),
    "errors": (
        "AudioError", "DataError", "ModelError", "OutputError", "PackedModelError", "RecipeError",
        "SpecError", "TrainingError", "UsmliteError",
    ),
    "evaluate": ("Comparison", "Evaluation", "compare", "evaluate"),
    "export": ("export",),
    "load": ("load",),
    "movement": ("attach",),
    "models": ("Options", "Teacher", "Word", "load_teacher"),
    "push": ("push",),
    "recipe": ("Recipe", "build_recipe", "load_recipe"),
    "runtime": ("Recognizer", "Segment", "Transcript"),
    "spec": ("NM", "CompressionSpec", "Int", "LayerSpec", "Rule"),
    "streaming": ("Update",),
    "student": ("StudentOptions", "make_student"),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'usmlite' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"usmlite.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """Keeps `usmlite.load`, `usmlite.compress`, `usmlite.evaluate` and `usmlite.export` the functions.

    Importing a submodule binds it in its package under its own name, which here would hide the
    function of that name. The modules are still reached with `from usmlite.load import ...`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULE_OF and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
# Afterwards AutoModelForSpeechSeq2Seq.from_pretrained reads packed models; nothing heavy is imported now.
install()
