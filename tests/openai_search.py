"""What openai/whisper `decoding.py` does, in a few slow lines: what the tests compare with."""

from __future__ import annotations

import torch

from usmlite.models.decoding import DecodingOptions


def openai_rules(logits: torch.Tensor, tokens: list[int], options: DecodingOptions) -> torch.Tensor:
    """`ApplyTimestampRules` and the suppressions, written as openai/whisper writes them."""
    begin, end = options.timestamp_begin or 0, options.end
    logits = logits.clone()
    logits[list(options.suppress)] = -torch.inf
    if not tokens:
        logits[list(options.suppress_first)] = -torch.inf
    logits[options.no_timestamps] = -torch.inf
    last_was_timestamp = len(tokens) >= 1 and tokens[-1] >= begin
    penultimate_was_timestamp = len(tokens) < 2 or tokens[-2] >= begin
    if last_was_timestamp:
        if penultimate_was_timestamp:
            logits[begin:] = -torch.inf
        else:
            logits[:end] = -torch.inf
    timestamps = [token for token in tokens if token >= begin]
    if timestamps:
        together = last_was_timestamp and not penultimate_was_timestamp
        logits[begin : timestamps[-1] + (0 if together else 1)] = -torch.inf
    if not tokens:
        logits[:begin] = -torch.inf
        logits[begin + round(options.max_initial_timestamp / 0.02) + 1 :] = -torch.inf
    logprobs = logits.log_softmax(dim=0)
    if logprobs[begin:].logsumexp(dim=0) > logprobs[:begin].max():
        logits[:begin] = -torch.inf
    return logits


def allowed(logits: torch.Tensor, tokens: list[int], options: DecodingOptions) -> torch.Tensor:
    """Logits of what may follow, the others minus infinity."""
    if options.timestamp_begin is not None:
        return openai_rules(logits, tokens, options)
    logits = logits.clone()
    logits[
        [*options.suppress, options.no_timestamps, *(() if tokens else options.suppress_first)]
    ] = -torch.inf
    return logits


def openai_beams(
    model: torch.nn.Module, encoded: torch.Tensor, prompt: list[int], options: DecodingOptions, size: int,
    patience: float, length_penalty: float | None,
) -> list[int]:  # fmt: skip
    """`BeamSearchDecoder` and `MaximumLikelihoodRanker` of openai/whisper, for one audio, without a cache."""
    enough = round(size * patience)
    beams: list[tuple[tuple[int, ...], float]] = [((), 0.0)] * size
    finished: dict[tuple[int, ...], float] = {}
    for _ in range(options.max_new_tokens):
        scores: dict[tuple[int, ...], float] = {}
        for tokens, total in beams:
            ids = torch.tensor([[*prompt, *tokens]])
            hidden = model.model.decoder(ids, encoder_hidden_states=encoded[None], use_cache=False)
            logits = model.proj_out(hidden.last_hidden_state[:, -1])[0]
            logprobs = allowed(logits, list(tokens), options).log_softmax(dim=-1)
            best = logprobs.topk(size + 1)
            for score, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                scores[(*tokens, token)] = total + score
        beams, newly = [], {}
        for tokens in sorted(scores, key=scores.__getitem__, reverse=True):
            if tokens[-1] == options.end:
                newly[tokens] = scores[tokens]
            else:
                beams.append((tokens, scores[tokens]))
                if len(beams) == size:
                    break
        for tokens in sorted(newly, key=newly.__getitem__, reverse=True):
            if len(finished) < enough:
                finished[tokens] = newly[tokens]
        if len(finished) >= enough:
            break
    for tokens, score in sorted(beams, key=lambda beam: -beam[1]):
        if len(finished) >= size:
            break
        finished[(*tokens, options.end)] = score

    def rank(tokens: tuple[int, ...]) -> float:
        length = len(tokens) - 1
        by = max(1, length) if length_penalty is None else ((5 + length) / 6) ** length_penalty
        return finished[tokens] / by

    return list(max(finished, key=rank))[:-1]
