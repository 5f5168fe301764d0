"""Writes Whisper models the way CTranslate2 does, so that tests need neither it nor large files."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from usmlite.models import WhisperAdapter

TYPES = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4, "bfloat16": 5}
CODES = {"float32": "<f4", "int8": "i1", "int16": "<i2", "int32": "<i4", "float16": "<f2"}


class Blob:
    """One variable: shape, type name and bytes."""

    def __init__(self, values: np.ndarray, dtype: str) -> None:
        self.shape = list(values.shape)
        self.type = TYPES[dtype]
        if dtype == "bfloat16":
            bits = torch.from_numpy(values.astype(np.float32)).bfloat16().view(torch.int16)
            self.data = bits.numpy().astype("<i2").tobytes()
        else:
            self.data = values.astype(CODES[dtype]).tobytes()
        self.size = len(self.data)


def variables(model: torch.nn.Module, dtype: str = "float32") -> dict[str, Blob]:
    """The variables of a Transformers Whisper model under CTranslate2's names."""
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    config: Any = model.config
    found: dict[str, Blob] = {}

    def add(name: str, values: np.ndarray) -> None:
        if name.endswith("/weight") and dtype == "int8":
            # model_spec.py: one scale for each row, convolutions flattened.
            rows = values.reshape(len(values), -1)
            peak = np.abs(rows).max(axis=1)
            peak[peak == 0] = 127.0
            scale = np.float32(127.0) / peak
            found[name] = Blob(np.rint(rows * scale[:, None]).reshape(values.shape), "int8")
            found[f"{name}_scale"] = Blob(scale, "float32")
        elif name.endswith("/weight") and dtype == "int16":
            scale = np.float32(2**10 / np.abs(values).max())
            found[name] = Blob(np.rint(values * scale), "int16")
            found[f"{name}_scale"] = Blob(np.asarray(scale), "float32")
        else:
            found[name] = Blob(values, dtype if "float" in dtype else "float32")

    def flag(name: str, value: int, kind: str = "int8") -> None:
        found[name] = Blob(np.asarray(value), kind)

    def layer(target: str, *sources: str) -> None:
        add(f"{target}/weight", np.concatenate([weights[f"{source}.weight"] for source in sources]))
        biases = [
            weights.get(f"{source}.bias", np.zeros(len(weights[f"{source}.weight"]), np.float32))
            for source in sources
        ]
        add(f"{target}/bias", np.concatenate(biases))

    def norm(target: str, source: str) -> None:
        add(f"{target}/gamma", weights[f"{source}.weight"])
        add(f"{target}/beta", weights[f"{source}.bias"])

    flag("decoder/activation", 3)
    flag("decoder/alibi", 0)
    flag("decoder/alignment_heads", 1, "int16")
    flag("decoder/alignment_layer", -1, "int16")
    flag("decoder/pre_norm", 1)
    flag("decoder/scale_embeddings", 0)
    flag("decoder/num_heads", config.decoder_attention_heads, "int16")
    flag("encoder/num_heads", config.encoder_attention_heads, "int16")
    add("decoder/embeddings/weight", weights["model.decoder.embed_tokens.weight"])
    for name in ("conv1", "conv2"):
        layer(f"encoder/{name}", f"model.encoder.{name}")
    for side in ("encoder", "decoder"):
        add(f"{side}/position_encodings/encodings", weights[f"model.{side}.embed_positions.weight"])
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for index in range(getattr(config, f"{side}_layers")):
            ours, theirs = f"model.{side}.layers.{index}", f"{side}/layer_{index}"
            own = f"{ours}.self_attn"
            layer(f"{theirs}/self_attention/linear_0", f"{own}.q_proj", f"{own}.k_proj", f"{own}.v_proj")
            layer(f"{theirs}/self_attention/linear_1", f"{own}.out_proj")
            norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            if side == "decoder":
                cross = f"{ours}.encoder_attn"
                layer(f"{theirs}/attention/linear_0", f"{cross}.q_proj")
                layer(f"{theirs}/attention/linear_1", f"{cross}.k_proj", f"{cross}.v_proj")
                layer(f"{theirs}/attention/linear_2", f"{cross}.out_proj")
                norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
            layer(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            layer(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
    return found


def text(value: str) -> bytes:
    raw = value.encode() + b"\0"
    return struct.pack("<H", len(raw)) + raw


ALIASES = {"decoder/projection/weight": "decoder/embeddings/weight"}


def serialize(
    blobs: Mapping[str, Blob],
    *,
    version: int = 6,
    spec: str = "WhisperSpec",
    revision: int = 3,
    aliases: Mapping[str, str] = ALIASES,
) -> bytes:
    out = [struct.pack("<I", version), text(spec), struct.pack("<II", revision, len(blobs))]
    for name, blob in sorted(blobs.items()):
        out += [text(name), struct.pack("<B", len(blob.shape))]
        out += [struct.pack("<I", dimension) for dimension in blob.shape]
        out += [struct.pack("<BI", blob.type, blob.size), blob.data]
    out.append(struct.pack("<I", len(aliases)))
    out += [text(alias) + text(target) for alias, target in aliases.items()]
    return b"".join(out)


def write_directory(directory: Path, adapter: WhisperAdapter, data: bytes, **settings: object) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.bin").write_bytes(data)
    (directory / "config.json").write_text(json.dumps(settings))
    adapter.tokenizer.save_pretrained(directory)
    return directory
