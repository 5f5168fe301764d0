"""What usmlite must know about the Whisper family: features, prompts, targets, weights, files.

Formats are those of openai/whisper (Radford et al. 2022, arXiv 2212.04356, section 2.3) as Transformers
carries them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)
from transformers.models.whisper.configuration_whisper import NON_SPEECH_TOKENS, NON_SPEECH_TOKENS_MULTI
from transformers.models.whisper.modeling_whisper import sinusoids

from usmlite.errors import ModelError
from usmlite.models.adapter import Attention, TimedText, check_expected, read_processor, unreadable
from usmlite.models.decoding import SECONDS_PER_TIMESTAMP, TIMESTAMPS
from usmlite.models.whisper_decoding import TASKS, WhisperDecoding
from usmlite.network import IGNORED

TOKENIZER_FILE, TOKENIZER_SETTINGS = "tokenizer.json", "tokenizer_config.json"

# float16 files round the sinusoids, which lie within -1 and 1, by at most 2**-12.
_SINUSOID_TOLERANCE = 2**-11
ENCODER_POSITIONS = "model.encoder.embed_positions.weight"
# Chosen on LibriSpeech's dev set among 0, 1/4 and 1/2 octaves a doubling (docs/decisions/0009).
_FREQUENT_TOKENS, _OCTAVES_PER_DOUBLING, _MOST_OCTAVES = 1000, 0.5, 2.0
_TOKENS_A_WINDOW = 100  # of 30 s of speech, the prompt with it; about
_ENGLISH_VOCABULARY = 51_864  # one token fewer than the smallest multilingual vocabulary
_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


class WhisperAdapter(WhisperDecoding):
    """The family-specific half of a Whisper model: everything but the network.

    Args:
        config: the model's configuration.
        tokenizer: its tokenizer, or only what is in its tokenizer.json; timestamps need not be in it,
            they are the ids after <|notimestamps|>.
        generation: suppressed tokens and the like; None takes the family's defaults.
        where: what errors about the tokenizer should name.

    Raises:
        ModelError: the tokenizer lacks a special token, or does not fit the configuration.
    """

    family = "whisper"
    may_miss = frozenset({"proj_out.weight", ENCODER_POSITIONS})
    fixed_settings: ClassVar[Mapping[str, object]] = {"max_source_positions": 1500}  # of 30 seconds
    config: WhisperConfig

    def __init__(
        self,
        config: WhisperConfig,
        tokenizer: WhisperTokenizer | Tokenizer,
        generation: GenerationConfig | None = None,
        *,
        where: str | Path = TOKENIZER_FILE,
    ) -> None:
        self.config = config
        self._tokenizer = tokenizer
        self._backend = tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer.backend_tokenizer
        self._where = where
        self.end = self._token("<|endoftext|>")
        self.start = self._token("<|startoftranscript|>")
        self.no_timestamps = self._token("<|notimestamps|>")
        self.timestamp_begin = self.no_timestamps + 1
        self.no_speech: int | None = next(
            (
                number
                for name in ("<|nospeech|>", "<|nocaptions|>")
                if (number := self._backend.token_to_id(name)) is not None
            ),
            None,
        )
        if self.timestamp_begin + TIMESTAMPS > config.vocab_size:
            raise ModelError(
                "the tokenizer does not fit the model",
                where=where,
                expected=f"a vocabulary of at least {self.timestamp_begin + TIMESTAMPS} with its timestamps",
                found=config.vocab_size,
                remedy="Take tokenizer.json from the model that the weights come from.",
            )
        self.is_multilingual = config.vocab_size > _ENGLISH_VOCABULARY
        self.generation = self._complete(generation or cast(Any, GenerationConfig)())

    @property
    def tokenizer(self) -> WhisperTokenizer:
        """Transformers' tokenizer, made when it is asked for: it takes longer than loading the weights.

        Raises:
            ModelError: its settings are damaged.
        """
        if isinstance(self._tokenizer, Tokenizer):
            if (Path(self._where) / TOKENIZER_SETTINGS).is_file():
                found = read_processor(WhisperTokenizer, self._where, "tokenizer", local=True)
            else:
                found = cast(Any, WhisperTokenizer)(tokenizer_object=self._tokenizer)
            self._tokenizer = cast(WhisperTokenizer, found)
        return self._tokenizer

    def _complete(self, generation: GenerationConfig) -> GenerationConfig:
        """Fills in what Transformers' own `generate` needs and the source did not say."""
        suppress = NON_SPEECH_TOKENS_MULTI if self.is_multilingual else NON_SPEECH_TOKENS
        defaults: dict[str, Any] = {
            "bos_token_id": self.end,
            "eos_token_id": self.end,
            "pad_token_id": self.end,
            "decoder_start_token_id": self.start,
            "suppress_tokens": [token for token in suppress if token < self.config.vocab_size],
            "begin_suppress_tokens": [220, self.end],  # 220 is a lone space
            "max_length": self.config.max_target_positions,
            "no_timestamps_token_id": self.no_timestamps,
            "max_initial_timestamp_index": 50,
            "prev_sot_token_id": self._backend.token_to_id("<|startofprev|>"),
            "is_multilingual": self.is_multilingual,
            "return_timestamps": False,
        }
        if self.is_multilingual:
            defaults["lang_to_id"] = {f"<|{code}|>": number for code, number in self.languages.items()}
            defaults["task_to_id"] = {task: self._token(f"<|{task}|>") for task in TASKS}
        for name, value in defaults.items():
            if getattr(generation, name, None) is None:
                setattr(generation, name, value)
        return generation

    # Features and targets

    def hear(self, samples: Tensor, seconds: Sequence[float]) -> dict[str, Tensor]:
        """Log-mel features of whole windows: silence after the speech is heard too."""
        return {"input_features": self.features(samples)}

    def teach(
        self, windows: Sequence[Sequence[TimedText]], *, timestamps: Sequence[bool], language: str | None
    ) -> dict[str, Tensor]:
        """Decoder inputs and labels, see `targets`."""
        ids, labels = self.targets(windows, timestamps=timestamps, language=language)
        return {"decoder_input_ids": ids, "labels": labels}

    def outline(self, rows: int) -> dict[str, Tensor]:
        """See `Adapter.outline`."""
        frames = 2 * self.config.max_source_positions
        tokens = torch.empty(rows, _TOKENS_A_WINDOW, dtype=torch.int64, device="meta")
        heard = torch.empty(rows, self.config.num_mel_bins, frames, device="meta")
        return {"input_features": heard, "decoder_input_ids": tokens, "labels": tokens.clone()}

    def written(self, text: str) -> str:
        """A sentence: Whisper was not trained to shout as corpora in capitals do."""
        return text.capitalize() if text.isupper() else text

    def targets(
        self,
        windows: Sequence[Sequence[TimedText]],
        *,
        timestamps: Sequence[bool],
        language: str | None = "en",
    ) -> tuple[Tensor, Tensor]:
        """Decoder inputs and labels in Whisper's training format.

        Without timestamps a window is `<|startoftranscript|>(<|en|><|transcribe|>)<|notimestamps|> text
        <|endoftext|>`; with them, `<|startoftranscript|>(...)<|0.00|> text<|8.52|><|8.52|> text<|15.00|>
        <|endoftext|>`. Languages and tasks are written by multilingual models only.

        Args:
            windows: the texts of each window, in order, with times in seconds from its start.
            timestamps: for each window, whether times are written.
            language: code or name; None is English.

        Returns:
            decoder_input_ids and labels, both int64 `[windows, tokens]` of at most
            `config.max_target_positions` tokens. Labels are -100 on the prompt and the padding; what does
            not fit is cut off.
        """
        if len(windows) != len(timestamps):
            raise ValueError(f"{len(windows)} windows but {len(timestamps)} timestamps flags")
        code = self.language_code(language) or "en"
        rows, prompts = [], []
        for window, timed in zip(windows, timestamps, strict=True):
            texts = [item for item in window if item.text.strip()]
            # A window without a word has nothing to put times on.
            timed = timed and bool(texts)
            prompt = [self.start, *self._prefix(self.languages.get(code), "transcribe", timed)]
            rows.append([*prompt, *self._body(texts, timed), self.end])
            prompts.append(len(prompt))
        limit = min(max(len(row) for row in rows) - 1, self.config.max_target_positions)
        inputs = torch.full((len(rows), limit), self.end, dtype=torch.int64)
        labels = torch.full((len(rows), limit), IGNORED, dtype=torch.int64)
        for index, (row, prompt_length) in enumerate(zip(rows, prompts, strict=True)):
            tokens = torch.tensor(row[: limit + 1])
            inputs[index, : len(tokens) - 1] = tokens[:-1]
            labels[index, prompt_length - 1 : len(tokens) - 1] = tokens[prompt_length:]
        return inputs, labels

    def words(self, tokens: Tensor) -> Tensor:
        """Which tokens are text: bool of the same shape, False for prompts, times and the end."""
        return tokens < self.end  # Whisper numbers its special tokens after the text's

    def _body(self, texts: Sequence[TimedText], timed: bool) -> list[int]:
        body: list[int] = []
        latest = 0
        for item in texts:
            words = self.encode_text(" " + item.text.strip())
            if timed:
                first = max(latest, self._timestamp(item.start))
                latest = max(first, self._timestamp(item.end))
                body += [self.timestamp_begin + first, *words, self.timestamp_begin + latest]
            else:
                body += words
        return body

    @staticmethod
    def _timestamp(seconds: float) -> int:
        return max(0, min(round(seconds / SECONDS_PER_TIMESTAMP), TIMESTAMPS - 1))

    # Compression

    @torch.no_grad()
    def centre(self, model: nn.Module) -> None:
        """Makes the token embedding easier to quantize; what the model computes stays the same.

        A few columns of Whisper's embedding are nearly the same large number in every row, and the codes
        would be spent on them: 83 % of the energy of tiny.en's is its mean row. That row is subtracted
        and added to the decoder's positions instead. As an output projection the table then gives
        logits that are all lower by the same number, of which the softmax knows nothing.

        Args:
            model: a `WhisperForConditionalGeneration`, changed in place. Twice is the same as once.
        """
        network = cast(Any, model)
        decoder = network.model.decoder
        tokens, projection = decoder.embed_tokens.weight, network.proj_out.weight
        mean = tokens.mean(dim=0)
        tokens -= mean
        # Transformers has no other scale: it ignores the configuration's `scale_embedding`.
        decoder.embed_positions.weight.add_(mean)
        if projection is not tokens:
            projection -= projection.mean(dim=0)

    # Weights

    def compressible(self, model: nn.Module) -> dict[str, str]:
        """Every weight that a compression spec may name, in the order of the forward pass.

        Args:
            model: the dense model.

        Returns:
            Weight name to kind: "conv1d", "linear", "embedding" or "positions". The token embedding is
            tied to the output projection and stands here once, as `model.decoder.embed_tokens.weight`.
        """
        kinds = {f"model.encoder.{name}.weight": "conv1d" for name in ("conv1", "conv2")}
        kinds |= self._linear("encoder", self.config.encoder_layers, ("self_attn",))
        kinds["model.decoder.embed_tokens.weight"] = "embedding"
        kinds["model.decoder.embed_positions.weight"] = "positions"
        kinds |= self._linear("decoder", self.config.decoder_layers, ("self_attn", "encoder_attn"))
        parameters = dict(model.named_parameters())
        missing = [name for name in kinds if name not in parameters]
        if missing:
            raise ModelError(
                "the model does not have the weights of its configuration",
                where=missing[0],
                remedy="Give the dense model, before compression.",
            )
        return kinds

    @classmethod
    def part(cls, name: str) -> str:
        """The encoder, or the decoder with the token embedding, which is the output projection too."""
        return "encoder" if name.startswith("model.encoder.") else "decoder"

    def octaves(self) -> dict[str, Tensor]:
        """By how many doublings the steps of a table's rows may be larger where words are seldom used.

        Returns:
            Weight name to float32 `[rows]`. Tokens are numbered in the order in which byte-pair encoding
            merged them, the frequent ones first, and by Zipf's law the frequency falls as the number grows.
            Special tokens are few, and in every text.
        """
        numbers = torch.arange(self.config.vocab_size)
        rank = (numbers.float() / _FREQUENT_TOKENS).clamp(min=1.0)
        octaves = (_OCTAVES_PER_DOUBLING * rank.log2()).clamp(max=_MOST_OCTAVES)
        return {"model.decoder.embed_tokens.weight": torch.where(self.words(numbers), octaves, 0.0)}

    def layers(self) -> list[str]:
        """The modules whose outputs are the residual stream after each layer, encoder first."""
        counts = {"encoder": self.config.encoder_layers, "decoder": self.config.decoder_layers}
        return [f"model.{side}.layers.{i}" for side, count in counts.items() for i in range(count)]

    def attentions(self) -> list[Attention]:
        """The attentions from the text to the speech."""
        places = [f"model.decoder.layers.{i}.encoder_attn" for i in range(self.config.decoder_layers)]
        heads = self.config.decoder_attention_heads
        return [Attention(f"{place}.q_proj", f"{place}.k_proj", heads) for place in places]

    @staticmethod
    def _linear(side: str, layers: int, attentions: Sequence[str]) -> dict[str, str]:
        names = [f"{attention}.{part}" for attention in attentions for part in _ATTENTION] + ["fc1", "fc2"]
        return {
            f"model.{side}.layers.{index}.{name}.weight": "linear"
            for index in range(layers)
            for name in names
        }

    def computed(self, model: nn.Module) -> set[str]:
        """Names of the weights that `compute` makes, so that no file need store them.

        The encoder's positions, where they are the sinusoids they should be. Without values (on the meta
        device) they are taken to be.
        """
        found = model.get_parameter(ENCODER_POSITIONS)
        if found.is_meta:
            return {ENCODER_POSITIONS}
        same = torch.equal(found.detach().cpu(), self.compute(ENCODER_POSITIONS))
        return {ENCODER_POSITIONS} if same else set()

    def compute(self, name: str) -> Tensor:
        """A weight that `computed` names, float32."""
        if name != ENCODER_POSITIONS:
            raise KeyError(name)
        return sinusoids(self.config.max_source_positions, self.config.d_model)

    # Files

    @classmethod
    def model_class(cls) -> type[PreTrainedModel]:
        """Whisper has one."""
        return WhisperForConditionalGeneration

    @classmethod
    def check_shapes(
        cls, shapes: Mapping[str, tuple[int, ...]], config: PretrainedConfig, where: str | Path
    ) -> None:
        """Some weights of each size and each side's last layer; see `Adapter.check_shapes`."""
        sizes = cast(WhisperConfig, config)
        width = sizes.d_model
        # Some files were saved from the inner model, without the first "model.".
        found = {
            name if name.startswith(("model.", "proj_out.")) else f"model.{name}": shape
            for name, shape in shapes.items()
        }
        expected = {
            "model.encoder.conv1.weight": (width, sizes.num_mel_bins, 3),
            "model.decoder.embed_tokens.weight": (sizes.vocab_size, width),
            "model.decoder.embed_positions.weight": (sizes.max_target_positions, width),
        }
        if ENCODER_POSITIONS in found:
            expected[ENCODER_POSITIONS] = (sizes.max_source_positions, width)
        for side, layers, ffn in (
            ("encoder", sizes.encoder_layers, sizes.encoder_ffn_dim),
            ("decoder", sizes.decoder_layers, sizes.decoder_ffn_dim),
        ):
            expected[f"model.{side}.layers.{layers - 1}.fc1.weight"] = (ffn, width)
        check_expected(found, expected, where)

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Computes the encoder's positions where they are the sinusoids, but for rounding."""
        positions = cast(Any, model).model.encoder.embed_positions
        sinusoids = self.compute(ENCODER_POSITIONS)
        if bool((positions.weight - sinusoids).abs().max() <= _SINUSOID_TOLERANCE):
            positions.weight = nn.Parameter(sinusoids, requires_grad=False)

    def restore_settings(self, model: nn.Module) -> None:
        """For Transformers' own `generate`."""
        cast(Any, model).generation_config = self.generation

    def save_processor(self, directory: Path) -> None:
        """Writes the tokenizer, `preprocessor_config.json` and `generation_config.json`.

        Args:
            directory: where; it must exist.
        """
        self.tokenizer.save_pretrained(directory)
        # Again, on one line: less than half of the bytes.
        self.tokenizer.backend_tokenizer.save(str(directory / TOKENIZER_FILE), pretty=False)
        extractor = cast(Any, WhisperFeatureExtractor)(feature_size=self.config.num_mel_bins)
        extractor.save_pretrained(directory)
        self.generation.save_pretrained(directory)

    @classmethod
    def from_directory(
        cls, directory: str | Path, config: PretrainedConfig, *, local: bool = True
    ) -> WhisperAdapter:
        """Reads what `save_processor` wrote, or any Whisper directory of Transformers.

        Raises:
            ModelError: the tokenizer is missing or damaged, or does not fit the configuration.
        """
        generation = None
        settings = Path(directory) / "generation_config.json"
        if settings.is_file() or not local:
            generation = read_processor(
                GenerationConfig, directory, "generation settings", local=local, where=settings
            )
        if local:
            tokenizer = read_tokenizer(Path(directory))
        else:
            tokenizer = read_processor(WhisperTokenizer, directory, "tokenizer", local=False)
        return cls(cast(WhisperConfig, config), tokenizer, generation, where=directory)


def read_tokenizer(directory: Path) -> WhisperTokenizer | Tokenizer:
    """Reads `tokenizer.json`, or `vocab.json` with `merges.txt`, of a directory.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    where = directory / TOKENIZER_FILE
    if where.is_file():
        try:
            return Tokenizer.from_file(str(where))
        except Exception as error:  # the tokenizers library raises nothing more special
            raise unreadable("tokenizer", where, error) from error
    if not all((directory / name).is_file() for name in ("vocab.json", "merges.txt")):
        raise ModelError(
            "the tokenizer is missing",
            where=where,
            remedy=f"Copy {TOKENIZER_FILE} from the model that the weights come from.",
        )
    found = read_processor(WhisperTokenizer, directory, "tokenizer", local=True, where=where)
    return cast(WhisperTokenizer, found)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: the file is missing, not JSON, or not an object.
    """
    remedy = "Download or convert the model again."
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            "the file cannot be read as JSON", where=path, found=str(error), remedy=remedy
        ) from error
    if not isinstance(value, dict):
        raise ModelError(
            "the file is not a configuration",
            where=path,
            expected="a JSON object",
            found=type(value).__name__,
            remedy=remedy,
        )
    return value
