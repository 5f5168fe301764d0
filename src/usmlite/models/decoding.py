"""Decoding of Whisper: tokens out of features, in batches, with a key-value cache; greedily here.

The rules are those of openai/whisper `decoding.py` (suppressed tokens, `ApplyTimestampRules`, the
probability of no speech, the mean log probability). The loop calls the decoder's layers itself: one
token costs so little arithmetic that the generic path of `generate` would take longer than the layers.
Layers are only ever called, never asked for their `weight`, so the same loop runs dense, student and
packed models.

The cache is allocated once and rows that are done leave it: the last running row moves into the slot of
the one that finished, so the slots in use stay a contiguous view and a step reads nothing of finished rows.
At 1500 encoder positions reading the cross-attention cache is what a step mostly costs on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from usmlite.models.engine import NativeDecoder, native_decoder

SECONDS_PER_TIMESTAMP = 0.02
TIMESTAMPS = 1501  # <|0.00|> to <|30.00|>
_CACHE_CHUNK = 64  # positions by which the self-attention cache grows


@dataclass(frozen=True)
class DecodingOptions:
    """What the greedy loop needs to know about the vocabulary and the task.

    Attributes:
        end: the token that ends a text; ids below it are text (openai/whisper's layout).
        timestamp_begin: id of <|0.00|>; None decodes without timestamps.
        no_timestamps: id of <|notimestamps|>, never emitted.
        no_speech: id of <|nospeech|>; None where the vocabulary has none.
        suppress: ids that are never emitted.
        suppress_first: ids that are not emitted as the first token.
        max_initial_timestamp: the latest start of the first segment, in seconds.
        max_new_tokens: the most tokens to emit for a row.
    """

    end: int
    timestamp_begin: int | None
    no_timestamps: int
    no_speech: int | None
    suppress: tuple[int, ...] = ()
    suppress_first: tuple[int, ...] = ()
    max_initial_timestamp: float = 1.0
    max_new_tokens: int = 224


@dataclass
class Row:
    """One sequence on its way: what it has emitted and how likely that was."""

    index: int
    tokens: list[int] = field(default_factory=list)
    logprob: float = 0.0
    no_speech: float = 0.0
    language: int | None = None
    temperature: float = 0.0

    def mean_logprob(self) -> float:
        """Natural log probability per token, the end token counted (openai/whisper's average)."""
        return self.logprob / (len(self.tokens) + 1)


class _Decoder:
    """The decoder of a Whisper model with its caches, for up to `batch` rows.

    Args:
        model: a `WhisperForConditionalGeneration`, its layers possibly replaced.
        encoded: the encoder's output, `[batch, positions, d_model]`.
    """

    def __init__(self, model: Any, encoded: Tensor) -> None:
        self._decoder = model.model.decoder
        self._project = model.proj_out
        self._rows = encoded.shape[0]
        self._beams = 1
        self.length = 0
        self._limit = int(model.config.max_target_positions)
        self._cross: list[tuple[Tensor, Tensor]] = []
        self._own: list[tuple[Tensor, Tensor]] = []
        for layer in self._decoder.layers:
            attention = layer.encoder_attn
            keys = self._heads(attention, attention.k_proj(encoded)).contiguous()
            values = self._heads(attention, attention.v_proj(encoded)).contiguous()
            self._cross.append((keys, values))

    @staticmethod
    def _heads(attention: Any, projected: Tensor) -> Tensor:
        batch, length, _ = projected.shape
        return projected.view(batch, length, attention.num_heads, attention.head_dim).transpose(1, 2)

    def step(self, tokens: Tensor) -> Tensor:
        """Appends tokens int64 `[rows, new]` to the running rows; hidden states `[rows, new, d_model]`."""
        new = tokens.shape[1]
        past, self.length = self.length, self.length + new
        decoder = self._decoder
        positions = torch.arange(past, self.length, device=tokens.device)[None]
        hidden = decoder.embed_tokens(tokens) + decoder.embed_positions(
            tokens, past_key_values_length=past, position_ids=positions
        )
        mask = None
        if new > 1:
            mask = torch.ones(new, self.length, dtype=torch.bool, device=tokens.device).tril(past)
        for index, layer in enumerate(decoder.layers):
            attention = layer.self_attn
            normed = layer.self_attn_layer_norm(hidden)
            query = self._heads(attention, attention.q_proj(normed) * attention.scaling)
            keys, values = self._append(
                index,
                past,
                self._heads(attention, attention.k_proj(normed)),
                self._heads(attention, attention.v_proj(normed)),
            )
            hidden = hidden + attention.out_proj(self._attend(query, keys, values, mask))

            attention = layer.encoder_attn
            normed = layer.encoder_attn_layer_norm(hidden)
            query = self._heads(attention, attention.q_proj(normed) * attention.scaling)
            hidden = hidden + attention.out_proj(self._attend_speech(query, *self._cross[index]))

            normed = layer.final_layer_norm(hidden)
            hidden = hidden + layer.fc2(layer.activation_fn(layer.fc1(normed)))
        return decoder.layer_norm(hidden)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 `[rows, vocabulary]` from hidden states `[rows, d_model]`."""
        return self._project(hidden).float()  # type: ignore[no-any-return]

    @staticmethod
    def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        attended = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=1.0)
        return attended.transpose(1, 2).flatten(2)

    def _attend_speech(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        rows, heads, new, width = query.shape
        audios = rows // self._beams
        # The beams of one audio ask together: its keys and values are there, and read, once.
        together = query.view(audios, self._beams, heads, new, width).transpose(1, 2).flatten(2, 3)
        attended = scaled_dot_product_attention(together, keys[:audios], values[:audios], scale=1.0)
        apart = attended.reshape(audios, heads, self._beams, new, width).permute(0, 2, 3, 1, 4)
        return apart.reshape(rows, new, heads * width)

    def _append(self, index: int, past: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        rows, heads, new, width = keys.shape
        if index == len(self._own):
            size = (self._rows, heads, min(_CACHE_CHUNK, self._limit), width)
            self._own.append((keys.new_empty(size), values.new_empty(size)))
        if past + new > self._own[index][0].shape[2]:
            first, second = (
                torch.cat([cache, torch.empty_like(cache[:, :, :_CACHE_CHUNK])], dim=2)
                for cache in self._own[index]
            )
            self._own[index] = first, second
        all_keys, all_values = self._own[index]
        all_keys[:rows, :, past : past + new] = keys
        all_values[:rows, :, past : past + new] = values
        return all_keys[:rows, :, : past + new], all_values[:rows, :, : past + new]

    def move(self, source: int, target: int) -> None:
        """Puts the running row of slot `source` into slot `target`."""
        for keys, values in self._cross:
            keys[target], values[target] = keys[source], values[source]
        for keys, values in self._own:
            keys[target, :, : self.length] = keys[source, :, : self.length]
            values[target, :, : self.length] = values[source, :, : self.length]

    def select(self, rows: Sequence[int]) -> None:
        """Lets slot `i` go on from what slot `rows[i]` was told; its audio comes along.

        Args:
            rows: slots in use. Those of one audio stand side by side, equally many of each: its beams. Slots
                may be named more than once, and rows whose slot is not named are gone.
        """
        heard = [row // self._beams for row in rows]
        audios = list(dict.fromkeys(heard))
        self._beams = len(rows) // len(audios)
        if heard != [audio for audio in audios for _ in range(self._beams)]:
            raise ValueError(f"rows of one audio must stand side by side, equally many of each: {rows}")
        if audios != list(range(len(audios))):
            self._cross = [(keys[audios], values[audios]) for keys, values in self._cross]
        if len(rows) > self._rows:
            self._rows = len(rows)
            self._own = [(keys[rows], values[rows]) for keys, values in self._own]
            return
        changed = [slot for slot, row in enumerate(rows) if slot != row]
        if not changed:
            return
        sources = [rows[slot] for slot in changed]
        for keys, values in self._own:
            keys[changed, :, : self.length] = keys[sources, :, : self.length]
            values[changed, :, : self.length] = values[sources, :, : self.length]


@dataclass(frozen=True)
class Prompt:
    """What the decoder is told before the text.

    Attributes:
        start: <|startoftranscript|>.
        following: the tokens after it; or, if the language is to be found out, what turns the language's
            token into them.
        languages: the tokens of all languages, to choose from where `following` is callable.
        previous: for each row, the tokens before `start`, equally many; empty where there are none.
    """

    start: int
    following: Sequence[int] | Callable[[int], Sequence[int]]
    languages: Sequence[int] = ()
    previous: Sequence[Sequence[int]] = ()


def begin(
    model: nn.Module, encoded: Tensor, prompt: Prompt, options: DecodingOptions
) -> tuple[_Decoder | NativeDecoder, list[Row], Tensor, int]:
    """A decoder that was told the prompt.

    Args:
        model: a `WhisperForConditionalGeneration` in eval mode.
        encoded: the encoder's output, `[batch, positions, d_model]`.
        prompt: what to tell.
        options: the vocabulary and the rules.

    Returns:
        The decoder; a row for each of the batch, `language` (where it was found out) and `no_speech` set; the
        logits of the first token, float32 `[batch, vocabulary]`; and how many tokens may follow.
    """
    batch, device = encoded.shape[0], encoded.device
    decoder = native_decoder(model, encoded) or _Decoder(model, encoded)
    rows = [Row(index) for index in range(batch)]
    before = [[*previous, prompt.start] for previous in prompt.previous] or [[prompt.start]] * batch
    place = len(before[0]) - 1
    if callable(prompt.following):
        first = decoder.logits(decoder.step(torch.tensor(before, device=device))[:, place])
        found = first[:, list(prompt.languages)].argmax(dim=-1).tolist()
        for row, choice in zip(rows, found, strict=True):
            row.language = prompt.languages[choice]
        following = [list(prompt.following(prompt.languages[choice])) for choice in found]
        hidden = decoder.step(torch.tensor(following, device=device))
    else:
        known = list(prompt.following)
        hidden = decoder.step(torch.tensor([tokens + known for tokens in before], device=device))
        first = decoder.logits(hidden[:, place])
    if options.no_speech is not None:
        no_speech = first.softmax(dim=-1)[:, options.no_speech].tolist()
        for row, probability in zip(rows, no_speech, strict=True):
            row.no_speech = probability
    room = int(model.config.max_target_positions) - decoder.length  # type: ignore[union-attr, arg-type]
    return decoder, rows, decoder.logits(hidden[:, -1]), min(options.max_new_tokens, room)


@torch.inference_mode()
def decode_greedily(model: nn.Module, encoded: Tensor, prompt: Prompt, options: DecodingOptions) -> list[Row]:
    """Emits the likeliest token after token for every row until all have ended.

    Args:
        model: a `WhisperForConditionalGeneration` in eval mode, its layers possibly replaced.
        encoded: the encoder's output, `[batch, positions, d_model]`.
        prompt: what the decoder is told first.
        options: the vocabulary and the rules.

    Returns:
        One finished row for each row of `encoded`, in order. `language` is set where it was found out.
    """
    decoder, finished, logits, budget = begin(model, encoded, prompt, options)
    running = list(finished)
    choose = Chooser(options, encoded.device)
    for emitted in range(budget):
        tokens, logprobs = choose(logits, running)
        chosen = tokens.tolist()
        for row, token, logprob in zip(running, chosen, logprobs.tolist(), strict=True):
            row.logprob += logprob
            if token != options.end:
                row.tokens.append(token)
        slot = 0
        while slot < len(running):
            if chosen[slot] != options.end:
                slot += 1
                continue
            last_row, last_token = running.pop(), chosen.pop()
            if slot < len(running):
                decoder.move(len(running), slot)
                running[slot], chosen[slot] = last_row, last_token
        if not running or emitted + 1 == budget:
            break
        hidden = decoder.step(torch.tensor(chosen, device=encoded.device)[:, None])
        logits = decoder.logits(hidden[:, -1])
    return finished


class Chooser:
    """Picks the next token of every running row under the rules of openai/whisper `decoding.py`."""

    def __init__(self, options: DecodingOptions, device: torch.device) -> None:
        self._options = options
        suppress = {*options.suppress, options.no_timestamps}
        self._suppress = torch.tensor(sorted(suppress), device=device)
        self._suppress_first = torch.tensor(sorted(suppress | set(options.suppress_first)), device=device)

    def __call__(self, logits: Tensor, running: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Tokens int64 `[rows]` and their log probabilities float32 `[rows]`; `logits` is overwritten."""
        text, times = self._mask(logits, running)
        if times is None:
            best, token = logits.max(dim=-1)
            return token, best - logits.logsumexp(dim=-1)
        best_text, text_token = text.max(dim=-1)
        best_time, time_token = times.max(dim=-1)
        time_mass = times.logsumexp(dim=-1)
        # A timestamp is due when all timestamps together are likelier than the likeliest text token.
        due = time_mass > best_text
        is_time = due | (best_time > best_text)
        token = torch.where(is_time, time_token + text.shape[1], text_token)
        mass = torch.where(due, time_mass, torch.logaddexp(text.logsumexp(dim=-1), time_mass))
        return token, torch.where(is_time, best_time, best_text) - mass

    def allow(self, logits: Tensor, running: Sequence[Row]) -> None:
        """Sets the logits of all tokens that may not follow to minus infinity, in place."""
        text, times = self._mask(logits, running)
        if times is not None:
            due = times.logsumexp(dim=-1) > text.max(dim=-1).values
            text[due] = -torch.inf

    def _mask(self, logits: Tensor, running: Sequence[Row]) -> tuple[Tensor, Tensor | None]:
        """Applies all rules but the one about due timestamps; views of text and times, if there are any."""
        first = not running[0].tokens
        logits.index_fill_(1, self._suppress_first if first else self._suppress, -torch.inf)
        begin = self._options.timestamp_begin
        if begin is None:
            return logits, None
        text, times = logits[:, :begin], logits[:, begin : begin + TIMESTAMPS]
        if first:
            text.fill_(-torch.inf)
            last = round(self._options.max_initial_timestamp / SECONDS_PER_TIMESTAMP)
            times[:, last + 1 :] = -torch.inf
        else:
            for slot, row in enumerate(running):
                self._restrict(text[slot], times[slot], row.tokens, begin)
        return text, times

    def _restrict(self, text: Tensor, times: Tensor, tokens: Sequence[int], begin: int) -> None:
        """Timestamps come in pairs, except before the end, and never go back."""
        last_is_time = tokens[-1] >= begin
        pair_is_complete = len(tokens) < 2 or tokens[-2] >= begin
        if last_is_time and pair_is_complete:
            times.fill_(-torch.inf)
            return
        if last_is_time:
            text[: self._options.end] = -torch.inf
        latest = next((token for token in reversed(tokens) if token >= begin), None)
        if latest is not None:
            # A closing timestamp opens the next segment too; any other must be later than the last.
            earliest = latest if last_is_time else latest + 1
            times[: earliest - begin] = -torch.inf
