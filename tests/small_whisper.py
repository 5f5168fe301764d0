"""A Whisper small enough to build, compress and pack in a blink, with a tokenizer of its own."""

from __future__ import annotations

import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from usmlite.kernels import trellis
from usmlite.models import WhisperAdapter
from usmlite.quantize import round_scale
from usmlite.spec import CompressionSpec
from usmlite.student import StudentOptions, compressed_layers, from_matrix, make_student, round_kept

SPECIAL = ("<|endoftext|>", "<|startoftranscript|>", "<|translate|>", "<|transcribe|>", "<|startoflm|>",
           "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>")  # fmt: skip


def small_teacher(seed: int = 0, **changes: int) -> tuple[WhisperForConditionalGeneration, WhisperAdapter]:
    vocab = {character: index for index, character in enumerate(bytes_to_unicode().values())}
    tokenizer = WhisperTokenizer(vocab=vocab, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    ends = max(tokenizer.backend_tokenizer.token_to_id(name) for name in SPECIAL)
    sizes = {
        "vocab_size": ends + 1 + 1501, "d_model": 24, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 40,
        "decoder_ffn_dim": 40, "num_mel_bins": 8, "max_source_positions": 1500, "max_target_positions": 30,
    }  # fmt: skip
    end = tokenizer.backend_tokenizer.token_to_id("<|endoftext|>")
    start = tokenizer.backend_tokenizer.token_to_id("<|startoftranscript|>")
    config = WhisperConfig(
        **{**sizes, **changes}, pad_token_id=end, bos_token_id=end, eos_token_id=end,
        decoder_start_token_id=start, suppress_tokens=[], begin_suppress_tokens=[],
    )  # fmt: skip
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(config).eval()
    return model, WhisperAdapter(config, tokenizer)


def lively(seed: int, **changes: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """A model with weights large enough that it does not say one thing over and over, and what it hears."""
    model, _ = small_teacher(seed, **changes)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.model.decoder.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model, torch.randn(5, 1500, 24, generator=generator) * 2


def small_student(
    spec: CompressionSpec | None = None,
    *,
    seed: int = 0,
    options: StudentOptions | None = None,
    **changes: int,
) -> tuple[torch.nn.Module, WhisperAdapter]:
    teacher, adapter = small_teacher(seed, **changes)
    spec = spec or CompressionSpec.simple(4, "2:4")
    student = make_student(teacher, adapter.compressible(teacher), spec, options)
    follow_trellises(student)
    round_kept(student)
    return student.eval(), adapter


@torch.no_grad()
def follow_trellises(student: torch.nn.Module) -> None:
    """Moves weights onto the nearest path of their trellis, as second-order rounding leaves them."""
    for _, layer in compressed_layers(student):
        states, scale = layer.compression.spec.trellis, layer.compression.scale
        if states is None or scale is None:
            continue
        # As much finer as `rate_scales` makes them.
        scale.copy_(round_scale(scale * 0.55, 8))
        steps = layer.compression.matrix(layer.weight) / scale
        codes = torch.from_numpy(trellis.nearest(steps.numpy(), states)).float()
        values = (codes - trellis.ZERO) * scale * layer.compression.column_scale
        layer.weight.copy_(from_matrix(values, layer.weight.shape))


def logits(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, 8, 3000, generator=generator).to(next(model.parameters()).dtype)
    ids = torch.tensor([[257, 263, 40, 50, 60], [257, 263, 90, 1000, 3]])
    with torch.inference_mode():
        out: torch.Tensor = model(input_features=features, decoder_input_ids=ids).logits
    return out
