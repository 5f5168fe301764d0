"""Searching for a likelier text than the greedy one: beams, and draws at a temperature.

Both follow several texts for every audio, side by side in one batch: `_Decoder.select` lets a text go on from
another's cache, and the cross-attention reads an audio once for all its texts. The rules for what is kept are
those of openai/whisper `decoding.py` (`BeamSearchDecoder`, `GreedyDecoder` with a temperature,
`MaximumLikelihoodRanker`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from usmlite.models.decoding import Chooser, DecodingOptions, Prompt, Row, begin


def likeliest(rows: list[Row], length_penalty: float | None) -> Row:
    """The text to take: the highest log probability by length, or by Wu et al.'s penalty (arXiv 1609.08144).

    Args:
        rows: finished texts of one audio.
        length_penalty: alpha of the penalty ((5 + length) / 6) ** alpha; None divides by the length.
    """

    def score(row: Row) -> float:
        length = len(row.tokens)
        # A text that is only its end has a length of one: openai/whisper would divide by zero.
        by = max(1, length) if length_penalty is None else ((5 + length) / 6) ** length_penalty
        return row.logprob / by

    return max(rows, key=score)


@dataclass
class _Beams:
    """The texts of one audio: those that go on, likeliest first, and those that have ended."""

    running: list[Row]
    ended: list[Row] = field(default_factory=list)


@torch.inference_mode()
def decode_with_beams(
    model: nn.Module,
    encoded: Tensor,
    prompt: Prompt,
    options: DecodingOptions,
    *,
    beam_size: int,
    patience: float = 1.0,
    length_penalty: float | None = None,
) -> list[Row]:
    """Follows the likeliest texts of every row side by side, and takes the best that ended.

    Args:
        model: a `WhisperForConditionalGeneration` in eval mode, its layers possibly replaced.
        encoded: the encoder's output, `[batch, positions, d_model]`.
        prompt: what the decoder is told first.
        options: the vocabulary and the rules.
        beam_size: texts that are followed for each audio.
        patience: how many times `beam_size` of ended texts to wait for.
        length_penalty: see `likeliest`.

    Returns:
        One finished row for each row of `encoded`, in order.
    """
    decoder, rows, logits, budget = begin(model, encoded, prompt, options)
    enough = max(1, round(beam_size * patience))
    audios = [_Beams([row]) for row in rows]
    chooser = Chooser(options, encoded.device)
    alive = list(audios)
    for emitted in range(budget):
        running = [row for audio in alive for row in audio.running]
        chooser.allow(logits, running)
        # One more than the beams, for at most one of them ends the text.
        best = logits.log_softmax(dim=-1).topk(beam_size + 1, dim=-1)
        scores, tokens = best.values.tolist(), best.indices.tolist()
        sources: list[int] = []
        first = 0
        for audio in alive:
            last = first + len(audio.running)
            kept = _step(audio, scores[first:last], tokens[first:last], beam_size, enough, options.end)
            if len(audio.ended) < enough:
                sources += [first + slot for slot in kept]
            first = last
        alive = [audio for audio in alive if len(audio.ended) < enough]
        if not alive or emitted + 1 == budget:
            break
        decoder.select(sources)
        told = [[row.tokens[-1]] for audio in alive for row in audio.running]
        hidden = decoder.step(torch.tensor(told, device=encoded.device))
        logits = decoder.logits(hidden[:, -1])
    for audio in audios:
        # Too few have ended where there was no room for more: the likeliest of the others will do.
        audio.ended += audio.running[: max(0, beam_size - len(audio.ended))]
    return [likeliest(audio.ended, length_penalty) for audio in audios]


def _step(
    audio: _Beams, scores: list[list[float]], tokens: list[list[int]], beam_size: int, enough: int, end: int
) -> list[int]:
    """Takes the likeliest next tokens of one audio's beams; the slots that the new beams go on from."""
    candidates = sorted(
        (
            (row.logprob + score, slot, token)
            for slot, row in enumerate(audio.running)
            for score, token in zip(scores[slot], tokens[slot], strict=True)
        ),
        key=lambda candidate: -candidate[0],
    )
    kept: list[int] = []
    following: list[Row] = []
    for logprob, slot, token in candidates:
        row = audio.running[slot]
        if token == end:
            if len(audio.ended) < enough:
                audio.ended.append(replace(row, logprob=logprob))
            continue
        following.append(replace(row, tokens=[*row.tokens, token], logprob=logprob))
        kept.append(slot)
        if len(kept) == beam_size:
            break
    audio.running = following
    return kept


@torch.inference_mode()
def decode_by_drawing(
    model: nn.Module,
    encoded: Tensor,
    prompt: Prompt,
    options: DecodingOptions,
    *,
    temperature: float,
    best_of: int,
    length_penalty: float | None = None,
    seed: int = 0,
) -> list[Row]:
    """Draws texts token by token, several for every row, and takes the likeliest.

    Args:
        model: a `WhisperForConditionalGeneration` in eval mode, its layers possibly replaced.
        encoded: the encoder's output, `[batch, positions, d_model]`.
        prompt: what the decoder is told first.
        options: the vocabulary and the rules.
        temperature: what the logits are divided by, above 0.
        best_of: texts that are drawn for each audio.
        length_penalty: see `likeliest`.
        seed: of the draws. Every audio has its own: what it says does not depend on the others.

    Returns:
        One finished row for each row of `encoded`, in order; log probabilities are those without temperature.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    decoder, rows, logits, budget = begin(model, encoded, prompt, options)
    device = encoded.device
    drawn = [[replace(row, tokens=[], temperature=temperature) for _ in range(best_of)] for row in rows]
    dice = [torch.Generator().manual_seed(seed) for _ in rows]
    chooser = Chooser(options, device)
    decoder.select([index for index in range(len(rows)) for _ in range(best_of)])
    logits = logits.repeat_interleave(best_of, dim=0)
    alive = list(range(len(rows)))
    ended: set[tuple[int, int]] = set()
    for emitted in range(budget):
        chooser.allow(logits, [row for audio in alive for row in drawn[audio]])
        logprobs = logits.log_softmax(dim=-1)
        points = torch.cat([torch.rand(best_of, generator=dice[audio]) for audio in alive])
        tokens = _drawn((logprobs / temperature).softmax(dim=-1), points.to(device))
        chances = logprobs.gather(1, tokens[:, None])[:, 0].tolist()
        told = tokens.tolist()
        for place, (token, chance) in enumerate(zip(told, chances, strict=True)):
            key = alive[place // best_of], place % best_of
            if key in ended:
                told[place] = options.end
                continue
            row = drawn[key[0]][key[1]]
            row.logprob += chance
            if token == options.end:
                ended.add(key)
            else:
                row.tokens.append(token)
        left = [a for a in alive if not all((a, number) in ended for number in range(best_of))]
        if not left or emitted + 1 == budget:
            break
        slots = [alive.index(audio) * best_of + number for audio in left for number in range(best_of)]
        decoder.select(slots)
        hidden = decoder.step(torch.tensor([[told[slot]] for slot in slots], device=device))
        logits = decoder.logits(hidden[:, -1])
        alive = left
    return [likeliest(each, length_penalty) for each in drawn]


def _drawn(chances: Tensor, points: Tensor) -> Tensor:
    """Tokens int64 `[rows]`: where points from 0 to 1 fall among probabilities `[rows, vocabulary]`."""
    sums = chances.double().cumsum(dim=-1)
    found = torch.searchsorted(sums, (points * sums[:, -1])[:, None].contiguous(), right=True)[:, 0]
    # A point may be rounded up to the sum of all: the last token that has a probability is meant.
    last = sums.shape[1] - 1 - (chances > 0).flip(1).to(torch.uint8).argmax(dim=1)
    return torch.minimum(found, last)
