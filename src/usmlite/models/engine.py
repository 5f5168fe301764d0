"""Whisper's encoder and decoder in the native library, where it takes all of a model's weights.

What is not there for the library (dense and student models, other devices and dtypes, gradients) runs through
the modules of Transformers and torch instead; `decoding` says how.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from usmlite.kernels import NativeWeight, layers, native

_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
_FEED = ("fc1", "fc2")


def encode(model: Any, features: Tensor) -> Tensor:
    """The encoder's output.

    Args:
        model: a `WhisperForConditionalGeneration` in eval mode, its layers possibly replaced.
        features: `[batch, mel bins, frames]`.

    Returns:
        `[batch, positions, d_model]`.
    """
    encoder = model.model.encoder
    states = native_states(model, encoder, features, encoder.embed_positions.weight)
    return encoder(features).last_hidden_state if states is None else states


def native_states(model: Any, encoder: Any, features: Tensor, positions: Tensor) -> Tensor | None:
    """What an encoder like Whisper's makes of features, in the native library; None where that cannot be.

    Args:
        model: whose encoder it is, in eval mode, its layers possibly replaced.
        encoder: two convolutions, layers and a norm.
        features: `[batch, mel bins, frames]`, all of them audio.
        positions: what is added to the frames, at least as many as they are, float32 `[positions, d_model]`.

    Returns:
        `[batch, frames / 2, d_model]`.
    """
    parts = _blocks(encoder, ("self_attn",)) if _suits(model, features) else None
    if parts is None or not all(_takes(layer) for layer in (encoder.conv1, encoder.conv2)):
        return None
    x = features.transpose(1, 2)
    for layer in (encoder.conv1, encoder.conv2):
        x = native.convolve_frames(
            x,
            layer.weight.operand,
            layer.bias,
            layer.stride[0],
            layer.padding[0],
            gelu=True,
            activations="int16",
        )
    heads = int(model.config.encoder_attention_heads)
    return layers.Encoder(parts, _norm(encoder.layer_norm), heads)(x.add_(positions[: x.shape[1]]))


class NativeDecoder:
    """The decoder with its caches in one call a step; see `decoding._Decoder`, whose interface this is."""

    def __init__(self, model: Any, encoded: Tensor, parts: Sequence[Sequence[layers.Block]]) -> None:
        decoder = model.model.decoder
        self._tokens, self._positions = decoder.embed_tokens, decoder.embed_positions
        self._project = model.proj_out
        self._rows = encoded.shape[0]
        self.length = 0
        heads = int(model.config.decoder_attention_heads)
        self._layers = layers.Decoder(parts, _norm(decoder.layer_norm), heads, encoded.contiguous())

    def step(self, tokens: Tensor) -> Tensor:
        """Appends tokens int64 `[rows, new]` to the running rows; hidden states `[rows, new, d_model]`."""
        positions = torch.arange(self.length, self.length + tokens.shape[1])[None]
        embedded = self._tokens(tokens) + self._positions(
            tokens, past_key_values_length=self.length, position_ids=positions
        )
        hidden = self._layers.step(embedded.contiguous())
        self.length += tokens.shape[1]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 `[rows, vocabulary]` from hidden states `[rows, d_model]`."""
        weight = self._project.weight.operand
        return native.linear(hidden, weight, self._project.bias, activations="int16")

    def move(self, source: int, target: int) -> None:
        """Puts the running row of slot `source` into slot `target`; what was there is done."""
        self._layers.swap(source, target)

    def select(self, rows: Sequence[int]) -> None:
        """Row i goes on from what row `rows[i]` was."""
        self._layers.select(rows)


def native_decoder(model: Any, encoded: Tensor) -> NativeDecoder | None:
    """The model's decoder in the native library, for these windows; None where that cannot be.

    Args:
        model: a `WhisperForConditionalGeneration` in eval mode, its layers possibly replaced.
        encoded: the encoder's output, `[batch, positions, d_model]`.
    """
    if not _suits(model, encoded):
        return None
    parts = _blocks(model.model.decoder, ("self_attn", "encoder_attn"))
    return NativeDecoder(model, encoded, parts) if parts is not None and _takes(model.proj_out) else None


def _suits(model: Any, x: Tensor) -> bool:
    config = model.config
    return (
        native.chosen() is not None
        and native.suits(x)
        and x.dtype is torch.float32
        and not model.training
        and config.activation_function == "gelu"
    )


def _blocks(side: Any, attentions: Iterable[str]) -> list[list[layers.Block]] | None:
    """The layers of one side; None if the library does not take one of them."""
    found = []
    for layer in side.layers:
        blocks = [
            _block(getattr(layer, f"{name}_layer_norm"), getattr(layer, name), _ATTENTION)
            for name in attentions
        ]
        blocks.append(_block(layer.final_layer_norm, layer, _FEED))
        if any(block is None for block in blocks):
            return None
        found.append([block for block in blocks if block is not None])
    return found


def _block(norm: nn.Module, owner: nn.Module, names: Sequence[str]) -> layers.Block | None:
    linears = []
    for name in names:
        linear: Any = getattr(owner, name)
        bias = None if linear.bias is None else linear.bias.detach()
        if not _takes(linear) or not (bias is None or _plain(bias)):
            return None
        linears.append((linear.weight.operand, bias))
    found = _norm(norm)
    return layers.Block(found, tuple(linears)) if _plain(found.weight) and _plain(found.bias) else None


def _takes(layer: Any) -> bool:
    operand = getattr(layer.weight, "operand", None)
    return isinstance(operand, NativeWeight) and operand.activations == "int8"


def _plain(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype is torch.float32 and tensor.is_contiguous()


def _norm(norm: Any) -> layers.Norm:
    return layers.Norm(norm.weight.detach(), norm.bias.detach(), float(norm.eps))
