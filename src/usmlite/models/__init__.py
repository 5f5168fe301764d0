"""Models in: where teachers come from, and what usmlite must know about a model family.

`load_teacher` turns any supported source into one form, the Transformers model in float32 together
with the adapter of its family.
"""

from usmlite.models.decoding import Decoded, TimedText
from usmlite.models.sources import Teacher, load_teacher
from usmlite.models.whisper import IGNORED, Attention, WhisperAdapter

__all__ = ["IGNORED", "Attention", "Decoded", "Teacher", "TimedText", "WhisperAdapter", "load_teacher"]
