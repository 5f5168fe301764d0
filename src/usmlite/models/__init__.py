"""Models in: where teachers come from, and what usmlite must know about a family of them.

`load_teacher` turns any supported source into one form, the Transformers model in float32 together
with the adapter of its family.
"""

from usmlite.models.adapter import Adapter, Attention, Decoded, TimedText, Word
from usmlite.models.ctc import CTCAdapter, CTCLayout
from usmlite.models.families import adapter_class, prepare, read_configuration, register, skeleton
from usmlite.models.options import Options
from usmlite.models.sources import Teacher, load_teacher
from usmlite.models.whisper import WhisperAdapter

__all__ = [
    "Adapter",
    "Attention",
    "CTCAdapter",
    "CTCLayout",
    "Decoded",
    "Options",
    "Teacher",
    "TimedText",
    "WhisperAdapter",
    "Word",
    "adapter_class",
    "load_teacher",
    "prepare",
    "read_configuration",
    "register",
    "skeleton",
]
