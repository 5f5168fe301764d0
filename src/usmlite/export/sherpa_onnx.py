"""Whisper for sherpa-onnx: two graphs with its names, a table of tokens, and its settings as metadata.

Names, shapes and metadata are those of sherpa-onnx's `scripts/whisper/export-onnx.py`, and what its
`csrc/offline-whisper-model.cc` reads. sherpa-onnx takes the likeliest token as it is; what other runtimes
suppress is therefore suppressed in the graph.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from usmlite.export import onnx_files
from usmlite.export.ggml import text_tokens
from usmlite.export.nbits import FORMS, resolve
from usmlite.export.plan import Becomes
from usmlite.export.source import Source
from usmlite.export.whisper_graph import TOKENS, WhisperGraph
from usmlite.models import WhisperAdapter

if TYPE_CHECKING:
    from usmlite.export.graph import Graph

__all__ = ["FORMS", "plan", "resolve", "write"]

ENCODER, DECODER, TABLE = "encoder.onnx", "decoder.onnx", "tokens.txt"
WIDTHS = (4, 8)
"""Bits of `MatMulNBits` in the ONNX Runtime that sherpa-onnx comes with; 2 came later."""


def plan(source: Source, form: str) -> Iterator[Becomes]:
    """As for onnx, but for 2 bits."""
    return onnx_files.plan(source, form, WIDTHS)


def write(source: Source, form: str, folder: Path, progress: Callable[[float], None]) -> None:
    """Writes `encoder.onnx`, `decoder.onnx` and `tokens.txt`."""
    from usmlite.export.graph import Graph

    adapter = cast(WhisperAdapter, source.adapter)
    took = onnx_files.counter(source, progress)
    _write_encoder(Graph(source, form, WIDTHS, took), adapter, folder / ENCODER)
    _write_decoder(Graph(source, form, WIDTHS, took), adapter, folder / DECODER)
    lines = (
        f"{base64.b64encode(text).decode()} {number}\n" for number, text in enumerate(text_tokens(adapter))
    )
    (folder / TABLE).write_text("".join(lines), encoding="ascii")


def _write_encoder(graph: Graph, adapter: WhisperAdapter, path: Path) -> None:
    config, network = adapter.config, WhisperGraph(graph, adapter)
    states = network.encode("mel")
    pairs = [network.cross_keys(states, index) for index in range(config.decoder_layers)]
    outputs = {}
    for name, values in zip(("n_layer_cross_k", "n_layer_cross_v"), zip(*pairs, strict=True), strict=True):
        layers = [graph.op("Unsqueeze", value, graph.constant([0])) for value in values]
        graph.rename(graph.op("Concat", *layers, axis=0), name)
        outputs[name] = (graph.FLOAT, (config.decoder_layers, "n_audio", "n_frames", config.d_model))
    inputs = {"mel": (graph.FLOAT, ("n_audio", config.num_mel_bins, "T"))}
    graph.save(path, inputs, outputs, metadata(adapter), alone=True)


def _write_decoder(graph: Graph, adapter: WhisperAdapter, path: Path) -> None:
    config, network = adapter.config, WhisperGraph(graph, adapter)
    heads = config.decoder_attention_heads
    caches = ("in_n_layer_self_k_cache", "in_n_layer_self_v_cache")
    now = graph.op("Shape", "tokens", start=1, end=2)
    total = graph.op("Add", "offset", now)
    rows, logits = graph.tied("tokens", TOKENS)
    x = network.positions(rows, "offset", now)
    mask = network.causal("offset", now)
    updated: list[list[str]] = [[], []]
    for index in range(config.decoder_layers):
        query, *new = network.own_keys(x, index)
        own = []
        for cache, value, filled in zip(caches, new, updated, strict=True):
            layer = graph.op("Gather", cache, graph.constant(index), axis=0)
            before, after = (
                graph.op("Slice", layer, low, high, graph.constant([1]))
                for low, high in (
                    (graph.constant([0]), "offset"),
                    (total, graph.constant([config.max_target_positions])),
                )
            )
            so_far = graph.op("Concat", before, value, axis=1)
            whole = graph.op("Concat", so_far, after, axis=1)
            filled.append(graph.op("Unsqueeze", whole, graph.constant([0])))
            own.append(graph.split_heads(so_far, heads))
        cross = [
            graph.split_heads(graph.op("Gather", name, graph.constant(index), axis=0), heads)
            for name in ("n_layer_cross_k", "n_layer_cross_v")
        ]
        x = network.decode(x, index, query, (own[0], own[1]), mask, (cross[0], cross[1]))
    found = logits(graph.norm(x, "model.decoder.layer_norm"))
    graph.rename(_suppress(graph, adapter, found), "logits")
    state = (config.decoder_layers, "n_audio", config.max_target_positions, config.d_model)
    speech = (config.decoder_layers, "n_audio", "n_frames", config.d_model)
    outputs = {"logits": (graph.FLOAT, ("n_audio", "n_tokens", config.vocab_size))}
    for name, layers in zip(caches, updated, strict=True):
        graph.rename(graph.op("Concat", *layers, axis=0), name.replace("in_", "out_", 1))
        outputs[name.replace("in_", "out_", 1)] = (graph.FLOAT, cast(Any, state))
    inputs = {
        "tokens": (graph.INT64, ("n_audio", "n_tokens")),
        **dict.fromkeys(caches, (graph.FLOAT, state)),
        **dict.fromkeys(("n_layer_cross_k", "n_layer_cross_v"), (graph.FLOAT, speech)),
        "offset": (graph.INT64, (1,)),
    }
    graph.save(path, inputs, outputs, {}, alone=True)


def _suppress(graph: Graph, adapter: WhisperAdapter, logits: str) -> str:
    """Logits of the tokens that are never emitted, or not first, far below all others."""
    never = [*(adapter.generation.suppress_tokens or ()), adapter.no_timestamps]
    rows = np.zeros((2, adapter.config.vocab_size), dtype=np.float16)
    rows[:, never] = -np.inf
    # The prompt is what comes first, and the first token is chosen after it.
    rows[0, list(adapter.generation.begin_suppress_tokens or ())] = -np.inf
    first = graph.op("Less", graph.constant([0]), "offset")
    row = graph.op("Gather", graph.hold("suppressed", rows), graph.op("Cast", first, to=graph.INT64), axis=0)
    return str(graph.op("Add", logits, graph.op("Cast", row, to=graph.FLOAT)))


def metadata(adapter: WhisperAdapter) -> dict[str, str]:
    """What sherpa-onnx reads about a model, in the encoder's file."""
    config, ids = adapter.config, adapter.tokenizer.convert_tokens_to_ids
    multilingual = adapter.is_multilingual

    def token(name: str) -> int:
        return int(cast(Any, ids)(name))

    prompt = [adapter.start]
    if multilingual:
        prompt += [adapter.languages["en"], token("<|transcribe|>")]

    languages = adapter.languages
    values: dict[str, object] = {
        "model_type": "whisper",
        "version": 1,
        "maintainer": "usmlite",
        "n_mels": config.num_mel_bins,
        "n_audio_ctx": config.max_source_positions,
        "n_audio_state": config.d_model,
        "n_audio_head": config.encoder_attention_heads,
        "n_audio_layer": config.encoder_layers,
        "n_vocab": config.vocab_size,
        "n_text_ctx": config.max_target_positions,
        "n_text_state": config.d_model,
        "n_text_head": config.decoder_attention_heads,
        "n_text_layer": config.decoder_layers,
        "sot_sequence": ",".join(map(str, prompt)),
        "all_language_tokens": ",".join(map(str, languages.values())),
        "all_language_codes": ",".join(languages),
        "sot": adapter.start,
        "sot_index": 0,
        "eot": adapter.end,
        "blank_id": 220,
        "is_multilingual": int(multilingual),
        "no_speech": adapter.end if adapter.no_speech is None else adapter.no_speech,
        "non_speech_tokens": ",".join(map(str, adapter.generation.suppress_tokens or ())),
        "transcribe": token("<|transcribe|>"),
        "translate": token("<|translate|>"),
        "sot_prev": token("<|startofprev|>"),
        "sot_lm": token("<|startoflm|>"),
        "no_timestamps": adapter.no_timestamps,
    }
    return {name: str(value) for name, value in values.items()}
