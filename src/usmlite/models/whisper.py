"""What usmlite must know about the Whisper family: features, prompts, targets, weights, files.

Formats are those of openai/whisper (Radford et al. 2022, arXiv 2212.04356, section 2.3) as Transformers
carries them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
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
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from usmlite.audio import WINDOW_SAMPLES, WINDOW_SECONDS, log_mel
from usmlite.errors import ModelError
from usmlite.models.adapter import (
    Adapter,
    Attention,
    Decoded,
    TimedText,
    check_expected,
    read_processor,
    unknown_task,
)
from usmlite.models.decoding import (
    SECONDS_PER_TIMESTAMP,
    TIMESTAMPS,
    DecodingOptions,
    Row,
    decode_greedily,
)
from usmlite.models.engine import encode
from usmlite.network import IGNORED

TASKS = ("transcribe", "translate")
TOKENIZER_FILE = "tokenizer.json"

# float16 files round the sinusoids, which lie within -1 and 1, by at most 2**-12.
_SINUSOID_TOLERANCE = 2**-11
ENCODER_POSITIONS = "model.encoder.embed_positions.weight"
# Chosen on LibriSpeech's dev set among 0, 1/4 and 1/2 octaves a doubling (docs/decisions/0009).
_FREQUENT_TOKENS, _OCTAVES_PER_DOUBLING, _MOST_OCTAVES = 1000, 0.5, 2.0
_ENGLISH_VOCABULARY = 51_864  # one token fewer than the smallest multilingual vocabulary
_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


class WhisperAdapter(Adapter):
    """The family-specific half of a Whisper model: everything but the network.

    Args:
        config: the model's configuration.
        tokenizer: its tokenizer; timestamps need not be in it, they are the ids after <|notimestamps|>.
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
        tokenizer: WhisperTokenizer,
        generation: GenerationConfig | None = None,
        *,
        where: str | Path = TOKENIZER_FILE,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
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

    def _token(self, name: str) -> int:
        number = self._backend.token_to_id(name)
        if number is None:
            raise ModelError(
                "the tokenizer is not a Whisper tokenizer",
                where=self._where,
                expected=f"a token {name}",
                remedy="Take tokenizer.json from the model that the weights come from.",
            )
        return int(number)

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

    @cached_property
    def languages(self) -> dict[str, int]:
        """Language code to token id; empty for an English-only model."""
        if not self.is_multilingual:
            return {}
        ids = range(self.start + 1, self._token("<|translate|>"))
        return {str(self._backend.id_to_token(number)).strip("<|>"): number for number in ids}

    @property
    def only_language(self) -> str | None:
        """English, for an English-only model."""
        return None if self.is_multilingual else "en"

    def language_code(self, language: str | None) -> str | None:
        """The code of a language given by code or English name; None stays None.

        Raises:
            ModelError: the model does not know the language.
        """
        if language is None:
            return None
        code = TO_LANGUAGE_CODE.get(language.lower(), language.lower())
        known = self.languages or {"en": self.start}
        if code not in known:
            raise ModelError(
                f"the model does not know the language {language!r}",
                where=self._where,
                expected="one of " + ", ".join(known) if self.is_multilingual else "English",
                remedy="Choose another language"
                + ("." if self.is_multilingual else ", or a multilingual model such as base."),
            )
        return code

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

    def written(self, text: str) -> str:
        """A sentence: Whisper was not trained to shout as corpora in capitals do."""
        return text.capitalize() if text.isupper() else text

    def features(self, samples: Tensor) -> Tensor:
        """Log-mel features.

        Args:
            samples: `[batch, 480000]`, 30 s at 16 kHz, zero-padded.

        Returns:
            float32 `[batch, mel bins, 3000]`, on the samples' device.
        """
        if samples.ndim != 2 or samples.shape[1] != WINDOW_SAMPLES:
            raise ValueError(f"samples must be [batch, {WINDOW_SAMPLES}], got {list(samples.shape)}")
        return log_mel(samples, self.config.num_mel_bins)

    def encode_text(self, text: str) -> list[int]:
        """Text tokens; markup that looks like a special token is taken apart, not obeyed."""
        plain = text.replace("<|", "< |")
        return list(self._backend.encode(plain, add_special_tokens=False).ids)

    def decode_text(self, tokens: Sequence[int]) -> str:
        """The text of tokens; special tokens and timestamps are left out."""
        text = self._backend.decode([token for token in tokens if token < self.end])
        return str(text).strip()

    def _prefix(self, language: int | None, task: str, timestamps: bool) -> list[int]:
        """The prompt after <|startoftranscript|>."""
        prefix = [] if language is None else [language, self._token(f"<|{task}|>")]
        return prefix if timestamps else [*prefix, self.no_timestamps]

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

    # Decoding

    def transcribe(
        self,
        model: nn.Module,
        audio: Sequence[Tensor],
        *,
        timestamps: bool = False,
        language: str | None = None,
        task: str = "transcribe",
    ) -> list[Decoded]:
        """See `Adapter.transcribe`; windows are padded with silence to 30 seconds."""
        windows = torch.zeros(len(audio), WINDOW_SAMPLES, device=audio[0].device)
        for row, samples in zip(windows, audio, strict=True):
            row[: len(samples)] = samples
        found = self.decode(
            model, self.features(windows), timestamps=timestamps, language=language, task=task
        )
        if not timestamps:
            return found
        return [replace(each, advance=self.segments(each.tokens)[1]) for each in found]

    def decode(
        self,
        model: nn.Module,
        features: Tensor,
        *,
        timestamps: bool = False,
        language: str | None = None,
        task: str = "transcribe",
        max_new_tokens: int = 224,
    ) -> list[Decoded]:
        """Transcribes windows greedily.

        Args:
            model: a `WhisperForConditionalGeneration` in eval mode; its layers may be replaced.
            features: `[batch, mel bins, 3000]`, as `features` returns them.
            timestamps: whether to decode times, under the rules of openai/whisper.
            language: code or name; None lets a multilingual model find out for each window.
            task: "transcribe", or "translate" into English (multilingual models).
            max_new_tokens: the most tokens for one window.

        Returns:
            One result for each window, in order.

        Raises:
            ModelError: the model does not know the language or the task.
        """
        code = self.language_code(language)
        if task not in TASKS or (task != "transcribe" and not self.is_multilingual):
            remedy = "." if self.is_multilingual else ", or a multilingual model such as base."
            tasks = TASKS if self.is_multilingual else TASKS[:1]
            raise unknown_task(task, tasks, self._where, f"Choose another task{remedy}")
        options = DecodingOptions(
            end=self.end,
            timestamp_begin=self.timestamp_begin if timestamps else None,
            no_timestamps=self.no_timestamps,
            no_speech=self.no_speech,
            suppress=tuple(self.generation.suppress_tokens or ()),
            suppress_first=tuple(self.generation.begin_suppress_tokens or ()),
            max_new_tokens=max_new_tokens,
        )
        network = cast(Any, model)
        encoder = network.model.encoder
        norm = encoder.layer_norm.weight  # norms are kept as they are by every compression
        with torch.inference_mode():
            encoded = encode(network, features.to(norm.device, norm.dtype))
            if self.is_multilingual and code is None:
                rows = decode_greedily(
                    model,
                    encoded,
                    lambda found: self._prefix(found, task, timestamps),
                    options,
                    start=self.start,
                    languages=tuple(self.languages.values()),
                )
            else:
                known = self.languages.get(code or "en")
                prompt = self._prefix(known, task, timestamps)
                rows = decode_greedily(model, encoded, prompt, options, start=self.start)
        codes = {number: name for name, number in self.languages.items()}
        return [
            self._decoded(row, timestamps, code or codes.get(row.language or self.end, "en")) for row in rows
        ]

    def _decoded(self, row: Row, timestamps: bool, language: str) -> Decoded:
        text = self.decode_text(row.tokens)
        if timestamps:
            segments, _ = self.segments(row.tokens)
        else:
            segments = (TimedText(0.0, WINDOW_SECONDS, text),) if text else ()
        return Decoded(tuple(row.tokens), text, segments, language, row.no_speech, row.mean_logprob())

    def segments(
        self, tokens: Sequence[int], *, min_advance: float = 1.0
    ) -> tuple[tuple[TimedText, ...], float | None]:
        """Cuts a window's tokens at their timestamps, as openai/whisper `transcribe.py` does.

        Args:
            tokens: what was decoded with timestamps.
            min_advance: where the next window would begin less than this many seconds after this one,
                the window is taken whole instead. openai/whisper has no such bound, and a model that
                emits 0.02-second segments makes it decode 50 windows for a second of audio.

        Returns:
            The segments that are complete, and where the next window should begin, in seconds from the
            start of this one; None where this window is used up.
        """
        times = [token >= self.timestamp_begin for token in tokens]
        cuts = [index for index in range(1, len(tokens)) if times[index - 1] and times[index]]
        closed = times[-2:] == [False, True]
        seek: float | None = None
        if not cuts:
            given = [token for token, is_time in zip(tokens, times, strict=True) if is_time]
            end = self._seconds(given[-1]) if given and given[-1] != self.timestamp_begin else WINDOW_SECONDS
            begin = self._seconds(given[0]) if len(given) > 1 else 0.0
            pieces = [(begin, end, tokens)]
        else:
            pieces = [
                (self._seconds(tokens[first]), self._seconds(tokens[last - 1]), tokens[first:last])
                for first, last in zip([0, *cuts], cuts, strict=False)
            ]
            rest = tokens[cuts[-1] :]
            begin = self._seconds(rest[0])
            if closed:
                pieces.append((begin, self._seconds(rest[-1]), rest))
            elif begin < min_advance:
                pieces.append((begin, WINDOW_SECONDS, rest))
            else:
                # The text after the last pair was cut off by the window: the next one hears it whole.
                seek = self._seconds(tokens[cuts[-1] - 1])
        texts = ((begin, end, self.decode_text(piece)) for begin, end, piece in pieces)
        return tuple(TimedText(begin, end, text) for begin, end, text in texts if text), seek

    def _seconds(self, token: int) -> float:
        return round((token - self.timestamp_begin) * SECONDS_PER_TIMESTAMP, 2)

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

        The encoder's positions, where they are the sinusoids they should be.
        """
        found = model.get_parameter(ENCODER_POSITIONS)
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


def read_tokenizer(directory: Path) -> WhisperTokenizer:
    """Reads `tokenizer.json`, or `vocab.json` with `merges.txt`, of a directory.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    slow = (directory / "vocab.json", directory / "merges.txt")
    if not (directory / TOKENIZER_FILE).is_file() and not all(path.is_file() for path in slow):
        raise ModelError(
            "the tokenizer is missing",
            where=directory / TOKENIZER_FILE,
            remedy="Copy tokenizer.json from the model that the weights come from.",
        )
    where = directory / TOKENIZER_FILE
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
