"""Models in: where teachers come from, and what usmlite must know about a family of them.

`load_teacher` turns any supported source into one form, the Transformers model in float32 together
with the adapter of its family.
"""

import importlib
from typing import TYPE_CHECKING, Any

# What a transcription alone needs of this; the others import Transformers, and come when they are asked for.
from usmlite.models.adapter import Adapter, Attention, Decoded, TimedText, Word
from usmlite.models.options import Options

if TYPE_CHECKING:
    from usmlite.models.ctc import CTCAdapter, CTCLayout
    from usmlite.models.families import adapter_class, prepare, read_configuration, register, skeleton
    from usmlite.models.sequence import SequenceAdapter, SequenceLayout
    from usmlite.models.sources import Teacher, load_teacher
    from usmlite.models.transducer import TransducerAdapter, TransducerLayout
    from usmlite.models.whisper import WhisperAdapter

__all__ = [
    "Adapter",
    "Attention",
    "CTCAdapter",
    "CTCLayout",
    "Decoded",
    "Options",
    "SequenceAdapter",
    "SequenceLayout",
    "Teacher",
    "TimedText",
    "TransducerAdapter",
    "TransducerLayout",
    "WhisperAdapter",
    "Word",
    "adapter_class",
    "load_teacher",
    "prepare",
    "read_configuration",
    "register",
    "skeleton",
]

_HOME = {
    "ctc": ("CTCAdapter", "CTCLayout"),
    "families": ("adapter_class", "prepare", "read_configuration", "register", "skeleton"),
    "sequence": ("SequenceAdapter", "SequenceLayout"),
    "sources": ("Teacher", "load_teacher"),
    "transducer": ("TransducerAdapter", "TransducerLayout"),
    "whisper": ("WhisperAdapter",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'usmlite.models' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"usmlite.models.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value
