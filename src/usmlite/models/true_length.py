"""What families share that hear audio of its true length, by a feature extractor and a tokenizer."""

from __future__ import annotations

import unicodedata
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoFeatureExtractor, AutoTokenizer, PretrainedConfig, PreTrainedModel

from usmlite.audio import MIN_SECONDS, SAMPLE_RATE
from usmlite.errors import AudioError, ModelError
from usmlite.models.adapter import Adapter, Said, check_expected, read_processor, unknown_task
from usmlite.models.options import Options

if TYPE_CHECKING:
    from typing_extensions import Self

_SAME_AS = {"’": "'", "‘": "'", "ʼ": "'", "`": "'", "–": "-", "—": "-"}  # noqa: RUF001
# A linear layer of fewer outputs is a gate: a few hundred weights that decide for thousands.
_LEAST_OUTPUTS = 16
# How many times the parameters in the files a configuration may claim before anything is made for it.
_MOST_CLAIMED = 2
PROCESSOR_REMEDY = "Take the processor's files from the model that the weights come from."


class Layout(Protocol):
    """Where the parts of a class are, as every family's table says it."""

    @property
    def model(self) -> str:
        """The class's name in Transformers."""

    @property
    def encoder(self) -> str:
        """The module that turns the model's input into states."""

    @property
    def front(self) -> tuple[str, ...]:
        """Beginnings of names, within the encoder, of what makes frames of the input."""


class TrueLengthAdapter(Adapter):
    """An adapter with a feature extractor and a tokenizer. `layout` says of which class.

    Args:
        config: the model's configuration.
        extractor: turns samples into the model's input.
        tokenizer: letters or word pieces.
        where: what errors should name.

    Raises:
        ModelError: extractor or tokenizer do not fit the configuration.
    """

    layout: ClassVar[Layout]
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    """Kinds of weights that are compressed."""

    def __init__(
        self, config: PretrainedConfig, extractor: Any, tokenizer: Any, *, where: str | Path = "tokenizer"
    ) -> None:
        self.config, self.extractor, self.tokenizer = config, extractor, tokenizer
        self._where = where
        self._characters: dict[str, str] = {}
        if getattr(extractor, "sampling_rate", SAMPLE_RATE) != SAMPLE_RATE:
            raise ModelError(
                "the model hears another sample rate", where=where, expected=f"{SAMPLE_RATE} Hz",
                found=f"{extractor.sampling_rate} Hz",
            )  # fmt: skip
        self._set_network()
        self._check_tokenizer()

    @abstractmethod
    def _set_network(self) -> None:
        """Everything that follows from the configuration alone; extends this."""
        self.main_input = str(self.model_class().main_input_name)
        self.channel_axis = None if self.main_input == "input_values" else 2

    @property
    def called(self) -> str:
        """The kind of model, in errors."""
        return f"a {self.layout.model}"

    @abstractmethod
    def _check_tokenizer(self) -> None:
        """Raises ModelError unless the tokenizer fits the configuration."""

    def _highest_label(self, but: Sequence[int]) -> int:
        """The highest number of a token that texts may have, or that is among these."""
        unused = set(self.tokenizer.all_special_ids) - set(but)
        return max((n for n in self.tokenizer.get_vocab().values() if n not in unused), default=-1)

    @classmethod
    def of_weights(cls, config: PretrainedConfig) -> Self:
        """See `Adapter.of_weights`."""
        adapter = super().of_weights(config)
        cast(Any, adapter)._set_network()
        return cast("Self", adapter)

    @classmethod
    def of(cls, layout: Layout) -> type[Self]:
        """The adapter of a class with this layout."""
        return type(f"{layout.model}Adapter", (cls,), {"layout": layout})

    # Files

    @classmethod
    def model_class(cls) -> type[PreTrainedModel]:
        """The class that the layout names.

        Raises:
            ModelError: Transformers is too old.
        """
        found = getattr(transformers, cls.layout.model, None)
        if found is None:
            raise ModelError(
                "this version of Transformers does not have the model's class", where=cls.layout.model,
                found=f"Transformers {transformers.__version__}", remedy="pip install --upgrade transformers",
            )  # fmt: skip
        return cast(type[PreTrainedModel], found)

    @classmethod
    def from_directory(cls, directory: str | Path, config: PretrainedConfig, *, local: bool = True) -> Self:
        """Reads what `save_processor` wrote, or any such model's directory of Transformers.

        Raises:
            ModelError: tokenizer or feature extractor are missing or damaged, or do not fit.
        """
        return cls(config, *cls.read(directory, local=local), where=directory)

    @staticmethod
    def read(directory: str | Path, *, local: bool) -> tuple[Any, Any]:
        """The feature extractor and the tokenizer of a directory.

        Raises:
            ModelError: one is missing or damaged.
        """
        extractor = read_processor(AutoFeatureExtractor, directory, "feature extractor", local=local)
        return extractor, read_processor(AutoTokenizer, directory, "tokenizer", local=local)

    def save_processor(self, directory: Path) -> None:
        """Writes the tokenizer's files and `preprocessor_config.json`."""
        self.tokenizer.save_pretrained(directory)
        self.extractor.save_pretrained(directory)

    @classmethod
    def check_shapes(
        cls, shapes: Mapping[str, tuple[int, ...]], config: PretrainedConfig, where: str | Path
    ) -> None:
        """All weights that are called alike in both; see `Adapter.check_shapes`."""
        layers = cls.depth(config)
        if layers > len(shapes):
            raise ModelError(
                "the weights contradict config.json", where=where, expected=f"{layers} layers",
                found=f"{len(shapes)} tensors", remedy="Download the model again.",
            )  # fmt: skip
        with torch.device("meta"):
            skeleton = cls.model_class()(config)
        expected = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
        check_expected(shapes, {name: expected[name] for name in expected if name in shapes}, where)
        claimed = sum(parameter.numel() for parameter in skeleton.parameters())
        held = sum(int(np.prod(shape)) for shape in shapes.values())
        if claimed > _MOST_CLAIMED * held:
            raise ModelError(
                "the weights contradict config.json", where=where, expected=f"{claimed:,} parameters",
                found=f"{held:,}", remedy="Download the model again.",
            )  # fmt: skip

    @classmethod
    @abstractmethod
    def depth(cls, config: PretrainedConfig) -> int:
        """How many layers a configuration claims, all stacks together."""

    # Speech

    @abstractmethod
    def frames(self, lengths: Tensor) -> Tensor:
        """Lengths of the main input, int64 `[batch]`, to frames of the encoder's output; 0 for none."""

    def hear(self, samples: Tensor, seconds: Sequence[float]) -> dict[str, Tensor]:
        """What the feature extractor makes of audio of its true length; see `Adapter.hear`."""
        counts = [min(round(length * SAMPLE_RATE), samples.shape[1]) for length in seconds]
        return self._inputs([row[:count] for row, count in zip(samples, counts, strict=True)])

    def _inputs(self, audio: Sequence[Tensor]) -> dict[str, Tensor]:
        shortest = min(len(samples) for samples in audio)
        if shortest < round(self.shortest * SAMPLE_RATE):
            raise AudioError(
                "the audio is shorter than one frame of the model",
                where=self._where,
                expected=f"at least {self.shortest:.4f} s",
                found=f"{shortest / SAMPLE_RATE:.4f} s",
                remedy="Leave such recordings out.",
            )
        device = audio[0].device
        found = self._extract([samples.float().cpu().numpy() for samples in audio])
        mask = found.get("attention_mask")
        lengths = torch.tensor([len(row) for row in audio]) if mask is None else mask.sum(dim=1)
        return {name: value.to(device) for name, value in {**found, "lengths": lengths.long()}.items()}

    def _extract(self, audio: Sequence[np.ndarray], **settings: Any) -> dict[str, Tensor]:
        """The main input of audio side by side, and which of it is audio; settings are the extractor's."""
        asked = {"padding": True, "return_attention_mask": True, "return_tensors": "pt", **settings}
        found = self.extractor(list(audio), sampling_rate=SAMPLE_RATE, **asked)
        names = (self.main_input, "attention_mask")
        return {name: cast(Tensor, found[name]) for name in names if name in found}

    def _input_length(self, samples: int) -> int:
        """Length of the main input for so many samples; 0 for too few of them."""
        if self.main_input == "input_values":
            return samples
        noise = np.random.default_rng(0).normal(0, 0.1, samples).astype(np.float32)
        try:
            # Statistics over a single frame are not defined, and not asked for.
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                return int(self._extract([noise])["attention_mask"].sum())
        except (RuntimeError, ValueError, IndexError):
            return 0

    @cached_property
    def shortest(self) -> float:
        """Seconds of audio without which there is not a single frame."""
        low, high = 0, SAMPLE_RATE
        while high - low > 1:
            middle = (low + high) // 2
            enough = int(self.frames(torch.tensor([self._input_length(middle)]))) >= 1
            low, high = (low, middle) if enough else (middle, high)
        return max(high / SAMPLE_RATE, MIN_SECONDS)

    # Text

    def encode_text(self, text: str) -> list[int]:
        """Labels of a text (as `written`)."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def decode_text(self, labels: Sequence[int]) -> str:
        """The text of labels; special tokens are left out."""
        return " ".join(str(self.tokenizer.decode(list(labels), skip_special_tokens=True)).split())

    def written(self, text: str) -> str:
        """The text in the tokenizer's case, without punctuation that the tokenizer lacks.

        Where the tokenizer has both cases, corpora in capitals become sentences.
        """
        text = text.capitalize() if text.isupper() else text
        return " ".join("".join(self._character(c) for c in text).split())

    def unwritable(self, text: str) -> str:
        """See `Adapter.unwritable`."""
        return "".join(sorted({c for c in text if not c.isspace() and not self._has(c)}))

    def _character(self, character: str) -> str:
        found = self._characters.get(character)
        if found is None:
            forms = (character, character.upper(), character.lower(), _SAME_AS.get(character, " "))
            letter = unicodedata.category(character)[0] in "LMN"
            missing = character if letter else " "
            found = next((form for form in forms if not form.isspace() and self._has(form)), missing)
            self._characters[character] = found
        return found

    def _has(self, character: str) -> bool:
        return bool(self.decode_text(self.encode_text(character)))

    def _refuse(self, asked: Mapping[str, object]) -> None:
        """Raises ModelError if any of these was asked for; none is of use here."""
        for what, given in asked.items():
            if given:
                raise ModelError(
                    f"{self.called} has no use for {what}", where=self._where,
                    remedy="Leave that out, or choose a Whisper model.",
                )  # fmt: skip

    def _check_options(self, options: Options, previous: Sequence[Sequence[Said]]) -> None:
        if options.task != "transcribe":
            raise unknown_task(options.task, ("transcribe",), self._where, "Choose a Whisper model for that.")
        self._refuse({"an initial prompt": options.initial_prompt, "the text before": any(previous)})

    def _refuse_search(self, options: Options) -> None:
        """Raises ModelError for all that is not greedy, where texts are found by Transformers' `generate`."""
        self._refuse(
            {
                "hotwords": options.hotwords,
                "a word language model": options.language_model,
                "beams": options.beam_size > 1,
                "a temperature": options.temperatures[0] > 0,
            }
        )

    # Weights

    def compressible(self, model: nn.Module) -> dict[str, str]:
        """Linear layers, convolutions that mix channels, and tables of tokens; see `Adapter.compressible`.

        A convolution of one step ("pointwise") is a linear layer. Convolutions of one channel each
        (depthwise, and the first one over samples), those of a class of their own (the heads of Parakeet
        and LASR), gates, recurrent layers and, in a CTC model, all tables are kept.
        """
        found: dict[str, str] = {}
        seen: set[int] = set()
        for name, module in model.named_modules():
            kind = _kind(module)
            if kind is not None and kind in self.kinds and id(module.weight) not in seen:
                seen.add(id(module.weight))
                found[f"{name}.weight"] = kind
        return found


def _kind(module: nn.Module) -> str | None:
    """How a layer's weight is compressed; None if it is kept. Subclasses may use theirs otherwise: kept."""
    if type(module) is nn.Linear:
        return "linear" if module.out_features >= _LEAST_OUTPUTS else None
    if type(module) is nn.Conv1d and module.in_channels > module.groups:
        return "linear" if module.kernel_size == (1,) and module.groups == 1 else "conv1d"
    return "embedding" if type(module) is nn.Embedding else None


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of numbers as one tensor, int64 `[rows, longest]`, at least one wide; the rest is `value`."""
    out = torch.full((len(rows), max(1, *map(len, rows))), value, dtype=torch.int64)
    for row, numbers in zip(out, rows, strict=True):
        row[: len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
    return out
