"""What usmlite must know about a family of models, in one interface. See docs/adding-a-model.md."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from torch import Tensor, nn

from usmlite.errors import ModelError
from usmlite.models.options import Options
from usmlite.network import SEQUENCE_TO_SEQUENCE, Network

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

WITHOUT_TIMES = Options(timestamps=False)
"""A window's text, greedily."""


@dataclass(frozen=True)
class Word:
    """One word with its place in the audio.

    Attributes:
        word: as it stands in the text, with the space before it and the punctuation beside it.
        start: seconds from the beginning.
        end: seconds from the beginning.
        probability: that the model gave it, the mean over its tokens, 0 to 1.
    """

    word: str
    start: float
    end: float
    probability: float


@dataclass(frozen=True)
class TimedText:
    """Text with its place in a window.

    Attributes:
        start: seconds from the window's beginning.
        end: seconds from the window's beginning.
        text: what is said, without surrounding space.
        words: of it, with times from the window's beginning; None where nobody asked for them.
    """

    start: float
    end: float
    text: str
    words: tuple[Word, ...] | None = None


Said: TypeAlias = str | TimedText
"""Something that was said before a window; times, if it has any, are of the window that it was heard in."""


@dataclass(frozen=True)
class Decoded:
    """What was decoded from one window.

    Attributes:
        tokens: what the model emitted after the prompt, without the end token; timestamps included.
        text: the text of all tokens.
        segments: the text with times; one segment over the whole window where there are no timestamps.
        language: the language code, such as "en".
        no_speech: the model's probability that the window holds no speech.
        mean_logprob: the mean log probability (natural) of the emitted tokens and the end token.
        advance: where the next window should begin, in seconds from the start of this one; None where this
            window is used up. What lies beyond it is in no segment.
        temperature: at which the text was found, see `Options`.
    """

    tokens: tuple[int, ...]
    text: str
    segments: tuple[TimedText, ...]
    language: str
    no_speech: float
    mean_logprob: float
    advance: float | None = None
    temperature: float = 0.0


@dataclass(frozen=True)
class Attention:
    """Where one attention of a model can be read.

    Attributes:
        queries: name of the module that gives them, `[batch, tokens, d]`.
        keys: name of the module that gives the keys, `[batch, frames, d]`.
        heads: how many.
    """

    queries: str
    keys: str
    heads: int


class Adapter(ABC):
    """The family-specific half of a model: everything but the network.

    Attributes:
        family: its name.
        may_miss: weights that a file need not have, because they are computed or tied.
        fixed_settings: settings in config.json that can have no other value.
        config: the model's configuration.
        network: how the network is run.
        main_input: the network's name for what it hears.
        has_idle_parameters: whether some parameters take no part in training.
        channel_axis: axis of the main input that holds channels (mel bins); None for plain samples.
    """

    family: ClassVar[str]
    may_miss: ClassVar[frozenset[str]] = frozenset()
    fixed_settings: ClassVar[Mapping[str, object]] = {}
    config: PretrainedConfig
    network: Network = SEQUENCE_TO_SEQUENCE
    main_input: str = "input_features"
    has_idle_parameters: bool = False
    channel_axis: int | None = 1

    # Files

    @classmethod
    @abstractmethod
    def model_class(cls) -> type[PreTrainedModel]:
        """The class of Transformers."""

    @classmethod
    @abstractmethod
    def from_directory(
        cls, directory: str | Path, config: PretrainedConfig, *, local: bool = True
    ) -> Adapter:
        """Reads tokenizer and feature extractor from a directory, or from the hub unless `local`.

        Raises:
            ModelError: one is missing or damaged, or does not fit the configuration.
        """

    @classmethod
    def of_weights(cls, config: PretrainedConfig) -> Adapter:
        """An adapter without tokenizer and feature extractor, for the questions about weights alone."""
        adapter = cls.__new__(cls)
        adapter.config = config
        return adapter

    def outline(self, rows: int) -> dict[str, Tensor]:
        """A batch of full windows by its shapes, for plans: what `hear` and `teach` give, on the meta device.

        Args:
            rows: how many windows.

        Raises:
            ModelError: the family does not say.
        """
        raise ModelError(
            "the family does not say how its batches look", where=self.family,
            remedy="Add `outline` to its adapter: docs/adding-a-model.md.",
        )  # fmt: skip

    @abstractmethod
    def save_processor(self, directory: Path) -> None:
        """Writes what `from_directory` reads into a directory that exists."""

    @classmethod
    def prepare(cls, model: nn.Module) -> None:
        """Changes a fresh model in place so that every weight belongs to a layer that is called.

        What it computes stays the same. Twice is the same as once.
        """
        return

    @classmethod
    def check_shapes(
        cls, shapes: Mapping[str, tuple[int, ...]], config: PretrainedConfig, where: str | Path
    ) -> None:
        """Compares a configuration with the weights' headers before anything of the claimed size is made.

        Raises:
            ModelError: they contradict each other.
        """
        return

    def restore(self, model: nn.Module) -> None:
        """Puts right, in place, what files round although it could be computed."""
        return

    def restore_settings(self, model: nn.Module) -> None:
        """Gives a loaded model the settings that are kept beside its weights."""
        return

    # Speech and text

    @property
    def shortest(self) -> float:
        """Seconds of audio without which there is not a single frame."""
        return 0.0

    @property
    def only_language(self) -> str | None:
        """The language of all speech; None where that is a question, or not known."""
        return None

    @property
    def searches(self) -> bool:
        """Whether texts grow token by token, so that beams, temperatures and prompts mean something."""
        return False

    @property
    def tells_languages(self) -> bool:
        """Whether the model can be asked which language it hears."""
        return False

    @abstractmethod
    def hear(self, samples: Tensor, seconds: Sequence[float]) -> dict[str, Tensor]:
        """Inputs of the network, on the samples' device.

        Args:
            samples: float32 `[batch, samples]` at 16 kHz, zero-padded.
            seconds: of each row, how much is audio.

        Raises:
            AudioError: a row is shorter than one frame.
        """

    @abstractmethod
    def teach(
        self, windows: Sequence[Sequence[TimedText]], *, timestamps: Sequence[bool], language: str | None
    ) -> dict[str, Tensor]:
        """What else of a batch follows from the text: "labels", and a decoder's inputs.

        Args:
            windows: the texts of each window, in order, with times in seconds from its start.
            timestamps: for each window, whether times are written, where the family can.
            language: code or name; None is English.
        """

    def written(self, text: str) -> str:
        """A corpus's text as the family writes; letters that it cannot write stay."""
        return text

    def unwritable(self, text: str) -> str:
        """The letters of a text (as `written`) that the tokenizer lacks, each once."""
        return ""

    def fits(self, text: str, seconds: float) -> bool:
        """Whether so long a text (as `written`) can be learned from so much audio."""
        return True

    def words(self, tokens: Tensor) -> Tensor:
        """Which of a decoder's inputs are text: bool of the same shape.

        Raises:
            NotImplementedError: the family has no decoder.
        """
        raise NotImplementedError

    @property
    def has_decoder(self) -> bool:
        """Whether the text so far is an input."""
        return bool(self.attentions())

    def language_code(self, language: str | None) -> str | None:
        """The code of a language given by code or name; None stays None.

        Raises:
            ModelError: the model does not know the language.
        """
        return language

    @abstractmethod
    def transcribe(
        self,
        model: nn.Module,
        audio: Sequence[Tensor],
        options: Options = WITHOUT_TIMES,
        *,
        previous: Sequence[Sequence[Said]] = (),
    ) -> list[Decoded]:
        """Transcribes windows, side by side.

        Args:
            model: in eval mode; its layers may be replaced.
            audio: float32 `[samples]` each, at 16 kHz, at most 30 s, on the model's device.
            options: what is asked for, and how texts are searched for.
            previous: for each window, what was said before it; empty where nobody knows.

        Returns:
            One result for each window, in order.

        Raises:
            ModelError: the model does not know the language or the task, or cannot do what is asked.
        """

    def languages_heard(self, model: nn.Module, audio: Sequence[Tensor]) -> list[dict[str, float]]:
        """The probability of every language that the model knows, likeliest first.

        Args:
            model: in eval mode; its layers may be replaced.
            audio: float32 `[samples]` each, at 16 kHz, at most 30 s, on the model's device.

        Returns:
            Language code to probability, for each window.

        Raises:
            ModelError: the family does not tell languages.
        """
        if self.only_language is not None:
            return [{self.only_language: 1.0} for _ in audio]
        raise ModelError(
            "the model does not tell languages", where=self.family,
            remedy="Name the language, or choose a multilingual Whisper model.",
        )  # fmt: skip

    # Weights

    @abstractmethod
    def compressible(self, model: nn.Module) -> dict[str, str]:
        """Every weight that a compression spec may name, in the order of the forward pass.

        Args:
            model: the dense model.

        Returns:
            Weight name to kind: "conv1d", "linear", "embedding" or "positions"; tied ones once.
        """

    @classmethod
    def part(cls, name: str) -> str:
        """The part of the network that a tensor belongs to, in words."""
        return "network"

    def centre(self, model: nn.Module) -> None:
        """Makes weights easier to quantize, in place; what the model computes stays the same."""
        return

    def octaves(self) -> dict[str, Tensor]:
        """By how many doublings a table's rows may have larger steps: weight name to float32 `[rows]`."""
        return {}

    def computed(self, model: nn.Module) -> set[str]:
        """Names of the weights that are computed, so that no file need store them and nothing trains them."""
        return set()

    @abstractmethod
    def layers(self) -> list[str]:
        """The modules whose outputs are the residual stream after each layer, encoder first."""

    def attentions(self) -> list[Attention]:
        """The attentions from the text to the speech."""
        return []


def unknown_task(task: str, tasks: Sequence[str], where: object, remedy: str) -> ModelError:
    """The error for a task that a model does not know."""
    return ModelError(
        f"the model does not know the task {task!r}",
        where=str(where),
        expected=" or ".join(tasks),
        remedy=remedy,
    )


def check_expected(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str | Path
) -> None:
    """Compares shapes in the weights' headers with those that follow from the configuration.

    Raises:
        ModelError: a weight is missing or of another shape.
    """
    for name, shape in expected.items():
        if found.get(name) != shape:
            raise ModelError(
                f"the weight {name} contradicts config.json",
                where=where,
                expected=f"shape {shape}",
                found=f"shape {found[name]}" if name in found else "no such weight",
                remedy="Download the model again.",
            )


def read_processor(
    reader: Any, location: str | Path, what: str, *, local: bool, where: str | Path | None = None
) -> Any:
    """What a Transformers class reads from a model's directory, or from the hub.

    Args:
        reader: a class with `from_pretrained`.
        location: directory or hub id.
        what: "tokenizer" or the like, for errors.
        local: never ask the hub.
        where: what errors should name, if not the location.

    Raises:
        ModelError: it is missing or damaged.
    """
    try:
        return reader.from_pretrained(location, local_files_only=local)
    except ImportError as error:
        raise ModelError(
            f"the {what} needs a package that is not installed", where=where or location,
            found=" ".join(str(error).split())[:300], remedy="Install what it names.",
        ) from error  # fmt: skip
    except Exception as error:  # the tokenizers library raises bare Exception on bad files
        raise unreadable(what, where or location, error) from error


def unreadable(what: str, where: str | Path, error: Exception) -> ModelError:
    """The error for what a library could not read."""
    return ModelError(
        f"the {what} cannot be read",
        where=where,
        found=(str(error) or type(error).__name__).splitlines()[0],
        remedy=f"Copy the {what} from the model that the weights come from.",
    )
