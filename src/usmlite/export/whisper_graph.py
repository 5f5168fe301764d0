"""Whisper's encoder and decoder as ONNX operators: the parts that all layouts of files share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from usmlite.models import WhisperAdapter

if TYPE_CHECKING:
    from usmlite.export.graph import Graph

TOKENS = "model.decoder.embed_tokens.weight"


class WhisperGraph:
    """Builds the layers of one Whisper model in a graph.

    Args:
        graph: where.
        adapter: the model's.
    """

    def __init__(self, graph: Graph, adapter: WhisperAdapter) -> None:
        self.graph = graph
        self.config = adapter.config

    def encode(self, features: str) -> str:
        """Log-mel features `[batch, mel bins, frames]` to states `[batch, frames / 2, d]`.

        Windows may be shorter than 30 seconds: there are as many positions as frames.
        """
        g, heads = self.graph, self.config.encoder_attention_heads
        x = g.convolve(features, "model.encoder.conv1", stride=1)
        x = g.op("Transpose", g.convolve(x, "model.encoder.conv2", stride=2), perm=[0, 2, 1])
        frames = g.op("Shape", x, start=1, end=2)
        positions = g.floats("model.encoder.embed_positions.weight")
        x = g.op("Add", x, g.op("Slice", positions, g.constant([0]), frames, g.constant([0])))
        for index in range(self.config.encoder_layers):
            layer = f"model.encoder.layers.{index}"
            y = g.norm(x, f"{layer}.self_attn_layer_norm")
            own = f"{layer}.self_attn"
            query, value = g.linear(y, f"{own}.q_proj"), g.linear(y, f"{own}.v_proj")
            y = g.attend(query, g.linear(y, f"{own}.k_proj", bias=False), value, heads)
            x = self._feed_forward(g.op("Add", x, g.linear(y, f"{own}.out_proj")), layer)
        return g.norm(x, "model.encoder.layer_norm")

    def _feed_forward(self, x: str, layer: str) -> str:
        g = self.graph
        y = g.linear(g.norm(x, f"{layer}.final_layer_norm"), f"{layer}.fc1")
        return str(g.op("Add", x, g.linear(g.op("Gelu", y), f"{layer}.fc2")))

    def cross_keys(self, states: str, index: int) -> tuple[str, str]:
        """Keys and values `[batch, frames, d]` of a decoder layer, of the encoder's states."""
        module = f"model.decoder.layers.{index}.encoder_attn"
        return (
            self.graph.linear(states, f"{module}.k_proj", bias=False),
            self.graph.linear(states, f"{module}.v_proj"),
        )

    def positions(self, rows: str, past: str, now: str) -> str:
        """Adds the learned positions to embedded tokens; `past` and `now` are int64 `[1]`."""
        g = self.graph
        table = g.floats("model.decoder.embed_positions.weight")
        return str(g.op("Add", rows, g.op("Slice", table, past, g.op("Add", past, now), g.constant([0]))))

    def causal(self, past: str, now: str) -> str:
        """What is added before the softmax, `[1, 1, tokens, past + tokens]`: no token sees a later one."""
        g = self.graph
        zero, one = g.constant(0), g.constant(1)
        total = g.op("Add", past, now)

        def scalar(value: str) -> str:
            return str(g.op("Squeeze", value, g.constant([0])))

        rows = g.op("Range", scalar(past), scalar(total), one)
        columns = g.op("Range", zero, scalar(total), one)
        later = g.op(
            "Greater", g.op("Unsqueeze", columns, g.constant([0])), g.op("Unsqueeze", rows, g.constant([1]))
        )
        low = g.constant(np.finfo(np.float32).min / 2, np.float32)
        mask = g.op("Where", later, low, g.constant(0.0, np.float32))
        return str(g.op("Unsqueeze", mask, g.constant([0, 1])))

    def own_keys(self, x: str, index: int) -> tuple[str, str, str]:
        """Query, key and value `[batch, tokens, d]` of a decoder layer's attention to the text so far."""
        g, module = self.graph, f"model.decoder.layers.{index}.self_attn"
        y = g.norm(x, f"model.decoder.layers.{index}.self_attn_layer_norm")
        return (
            g.linear(y, f"{module}.q_proj"),
            g.linear(y, f"{module}.k_proj", bias=False),
            g.linear(y, f"{module}.v_proj"),
        )

    def decode(
        self, x: str, index: int, query: str, own: tuple[str, str], mask: str, cross: tuple[str, str]
    ) -> str:
        """The rest of a decoder layer.

        Args:
            x: `[batch, tokens, d]`, what came into the layer.
            index: the layer.
            query: of its attention to the text, see `own_keys`.
            own: keys and values of the text so far, those of these tokens at the end.
            mask: see `causal`.
            cross: keys and values of the speech.
        """
        g, heads = self.graph, self.config.decoder_attention_heads
        layer = f"model.decoder.layers.{index}"
        y = g.attend(query, *own, heads, mask)
        x = g.op("Add", x, g.linear(y, f"{layer}.self_attn.out_proj"))
        y = g.linear(g.norm(x, f"{layer}.encoder_attn_layer_norm"), f"{layer}.encoder_attn.q_proj")
        y = g.attend(y, *cross, heads)
        return self._feed_forward(g.op("Add", x, g.linear(y, f"{layer}.encoder_attn.out_proj")), layer)
