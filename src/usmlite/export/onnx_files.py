"""Whisper for ONNX Runtime, in the layout of Optimum and of the hub's onnx-community.

`onnx/encoder_model.onnx` and `onnx/decoder_model_merged.onnx`, whose inputs and outputs are called as Optimum
and transformers.js know them; configuration, tokenizer and feature extractor stand beside `onnx/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from usmlite.export import nbits
from usmlite.export.nbits import FORMS, resolve
from usmlite.export.plan import Becomes
from usmlite.export.source import Source
from usmlite.export.transformers import write_config
from usmlite.export.whisper_graph import TOKENS, WhisperGraph
from usmlite.models import WhisperAdapter

if TYPE_CHECKING:
    from usmlite.export.graph import Graph

__all__ = ["FORMS", "plan", "resolve", "write"]


def plan(source: Source, form: str, widths: tuple[int, ...] = (2, 4, 8)) -> Iterator[Becomes]:
    """Matrices in the fewest bits that hold them, the rest in floats."""
    for stored in source.tensors.values():
        weight = nbits.pack(source, stored, form, widths)
        if weight is not None:
            yield Becomes(stored.name, str(weight), weight.bytes, weight.exact)
            continue
        kind = nbits.float_form(source, stored, form)
        tensor = source.tensor(stored.name)
        exact = kind == "float32" or bool((tensor.half().float() == tensor).all())
        yield Becomes(stored.name, kind, tensor.numel() * (2 if kind == "float16" else 4), exact)


def write(source: Source, form: str, folder: Path, progress: Callable[[float], None]) -> None:
    """Writes both graphs and what goes with them."""
    from usmlite.export.graph import Graph

    adapter = cast(WhisperAdapter, source.adapter)
    took = counter(source, progress)
    (folder / "onnx").mkdir()
    _write_encoder(Graph(source, form, (2, 4, 8), took), adapter, folder / "onnx" / "encoder_model.onnx")
    _write_decoder(
        Graph(source, form, (2, 4, 8), took), adapter, folder / "onnx" / "decoder_model_merged.onnx"
    )
    write_config(source, {"dtype": "float32"}, folder)
    adapter.save_processor(folder)


def counter(source: Source, progress: Callable[[float], None]) -> Callable[[int], None]:
    """Turns numbers of weights that were taken into a share of all."""
    total = sum(source.tensor(name).numel() for name in source.tensors)
    done = 0

    def took(count: int) -> None:
        nonlocal done
        done += count
        progress(min(1.0, done / total))

    return took


def _write_encoder(graph: Graph, adapter: WhisperAdapter, path: Path) -> None:
    config = adapter.config
    graph.rename(WhisperGraph(graph, adapter).encode("input_features"), "last_hidden_state")
    graph.save(
        path,
        {"input_features": (graph.FLOAT, ("batch_size", config.num_mel_bins, "feature_length"))},
        {"last_hidden_state": (graph.FLOAT, ("batch_size", "encoder_sequence_length", config.d_model))},
        {},
    )


def _write_decoder(graph: Graph, adapter: WhisperAdapter, path: Path) -> None:
    config, network = adapter.config, WhisperGraph(graph, adapter)
    heads, layers = config.decoder_attention_heads, range(config.decoder_layers)

    def past(index: int, part: str) -> str:
        return f"past_key_values.{index}.{part}"

    # Without a cache the first call may bring a past of any length, as Optimum's does; none of it is seen.
    used = graph.op("Cast", "use_cache_branch", to=graph.INT64)
    length = graph.op("Mul", graph.op("Shape", past(0, "decoder.key"), start=2, end=3), used)
    now = graph.op("Shape", "input_ids", start=1, end=2)
    rows, logits = graph.tied("input_ids", TOKENS)
    x = network.positions(rows, length, now)
    mask = network.causal(length, now)
    names = [past(index, f"encoder.{part}") for index in layers for part in ("key", "value")]
    with graph.branch() as held:
        kept = [graph.op("Identity", name) for name in names]
    with graph.branch() as fresh:
        made = [
            graph.split_heads(value, heads)
            for index in layers
            for value in network.cross_keys("encoder_hidden_states", index)
        ]
    cross = graph.choose("use_cache_branch", (held, kept), (fresh, made))
    presents: dict[str, str] = {}
    for index in layers:
        query, *new = network.own_keys(x, index)
        own = []
        for part, value in zip(("key", "value"), new, strict=True):
            before = graph.op(
                "Slice", past(index, f"decoder.{part}"), graph.constant([0]), length, graph.constant([2])
            )
            own.append(graph.op("Concat", before, graph.split_heads(value, heads), axis=2))
        speech = cross[2 * index : 2 * index + 2]
        for part, value in zip(
            ("decoder.key", "decoder.value", "encoder.key", "encoder.value"), (*own, *speech), strict=True
        ):
            presents[f"present.{index}.{part}"] = value
        x = network.decode(x, index, query, (own[0], own[1]), mask, (speech[0], speech[1]))
    graph.rename(logits(graph.norm(x, "model.decoder.layer_norm")), "logits")
    for name, value in presents.items():
        graph.rename(value, name)
    size = config.d_model // heads

    def cache(name: str, text: str, speech: str) -> tuple[int, tuple[Any, ...]]:
        return graph.FLOAT, ("batch_size", heads, speech if ".encoder." in name else text, size)

    graph.save(
        path,
        {
            "input_ids": (graph.INT64, ("batch_size", "decoder_sequence_length")),
            "encoder_hidden_states": (
                graph.FLOAT, ("batch_size", "encoder_sequence_length", config.d_model),
            ),
            **{
                name.replace("present.", "past_key_values."): cache(
                    name, "past_decoder_sequence_length", "encoder_sequence_length_out"
                )
                for name in presents
            },
            "use_cache_branch": (graph.BOOL, (1,)),
        },
        {
            "logits": (graph.FLOAT, ("batch_size", "decoder_sequence_length", config.vocab_size)),
            **{
                name: cache(name, "past_decoder_sequence_length + 1", "encoder_sequence_length_out")
                for name in presents
            },
        },
        {},
    )  # fmt: skip
