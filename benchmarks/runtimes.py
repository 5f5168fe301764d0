"""Other runtimes as something that transcribes: greedily, in English, without times up to 30 seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from usmlite.audio import SAMPLE_RATE, WINDOW_SAMPLES
from usmlite.runtime import Recognizer

Transcribe = Callable[[Sequence[np.ndarray]], list[str]]


def ours(recognizer: Recognizer) -> Transcribe:
    """usmlite itself."""

    def transcribe(audios: Sequence[np.ndarray]) -> list[str]:
        found = recognizer.transcribe(
            list(audios), timestamps=False, language="en", batch_size=max(1, len(audios))
        )
        return [transcript.text for transcript in found]

    return transcribe


def transformers(directory: Path) -> Transcribe:
    """`AutoModelForSpeechSeq2Seq` and its own `generate`; windows of 30 seconds, one after another."""
    from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

    model = cast(Any, AutoModelForSpeechSeq2Seq).from_pretrained(directory, dtype="auto").eval()
    processor = cast(Any, AutoProcessor).from_pretrained(directory)

    def window(samples: np.ndarray) -> str:
        inputs = processor(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(inputs.input_features.to(model.dtype), num_beams=1, do_sample=False)
        return str(processor.batch_decode(ids, skip_special_tokens=True)[0]).strip()

    return lambda audios: [" ".join(window(part) for part in _windows(audio)) for audio in audios]


def faster_whisper(directory: Path, kind: str, threads: int) -> Transcribe:
    """faster-whisper with a CTranslate2 directory."""
    from faster_whisper import WhisperModel  # type: ignore[import-not-found, unused-ignore]

    model = WhisperModel(str(directory), device="cpu", compute_type=kind, cpu_threads=threads)

    def transcribe(audios: Sequence[np.ndarray]) -> list[str]:
        texts = []
        for audio in audios:
            segments, _ = model.transcribe(
                audio, language="en", beam_size=1, temperature=0.0, condition_on_previous_text=False,
                without_timestamps=len(audio) <= WINDOW_SAMPLES, vad_filter=False,
            )  # fmt: skip
            texts.append(" ".join(segment.text.strip() for segment in segments))
        return texts

    return transcribe


_KEPT: list[Any] = []


def whisper_cpp(file: Path, threads: int) -> Transcribe:
    """whisper.cpp through pywhispercpp."""
    from pywhispercpp.model import Model  # type: ignore[import-not-found, unused-ignore]

    # Tokens that are no speech are suppressed as by openai/whisper, Transformers and faster-whisper.
    model = Model(
        str(file), n_threads=threads, redirect_whispercpp_logs_to=None, print_progress=False,
        print_realtime=False, language="en", no_context=True, temperature=0.0, temperature_inc=0.0,
        greedy={"best_of": 1}, suppress_blank=True, suppress_nst=True,
    )  # fmt: skip

    # Freeing it crashes in some processes, before they have said what they found.
    _KEPT.append(model)

    def transcribe(audios: Sequence[np.ndarray]) -> list[str]:
        texts = []
        for audio in audios:
            segments = model.transcribe(audio, no_timestamps=len(audio) <= WINDOW_SAMPLES)
            texts.append(" ".join(segment.text.strip() for segment in segments))
        return texts

    return transcribe


def _windows(audio: np.ndarray) -> list[np.ndarray]:
    return [audio[low : low + WINDOW_SAMPLES] for low in range(0, max(1, len(audio)), WINDOW_SAMPLES)]


def onnx_runtime(directory: Path, threads: int) -> Transcribe:
    """ONNX Runtime with an encoder and a merged decoder, by a greedy loop of our own."""
    import onnxruntime  # type: ignore[import-untyped, unused-ignore]
    from transformers import AutoConfig

    from usmlite.models import WhisperAdapter

    config = cast(Any, AutoConfig).from_pretrained(directory)
    adapter = WhisperAdapter.from_directory(directory, config)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    encoder, decoder = (
        onnxruntime.InferenceSession(directory / "onnx" / f"{name}.onnx", options)
        for name in ("encoder_model", "decoder_model_merged")
    )
    outputs = [output.name for output in decoder.get_outputs()]
    pasts = [name.replace("present", "past_key_values") for name in outputs[1:]]
    suppressed = [*(adapter.generation.suppress_tokens or ()), adapter.no_timestamps]
    heads = config.decoder_attention_heads
    nothing = np.zeros((1, heads, 0, config.d_model // heads), np.float32)
    names = ["<|en|>", "<|transcribe|>"] if adapter.is_multilingual else []
    language = [int(cast(Any, adapter.tokenizer).convert_tokens_to_ids(name)) for name in names]

    def window(samples: np.ndarray) -> str:
        padded = torch.zeros(1, WINDOW_SAMPLES)
        padded[0, : len(samples)] = torch.from_numpy(samples)
        states = encoder.run(None, {"input_features": adapter.features(padded).numpy()})[0]
        prompt = [adapter.start, *language, adapter.no_timestamps]
        ids, past, used = prompt, dict.fromkeys(pasts, nothing), False
        found: list[int] = []
        while len(found) + len(prompt) < config.max_target_positions:
            inputs = {"input_ids": np.array([ids]), "encoder_hidden_states": states, **past}
            logits, *rest = decoder.run(outputs, {**inputs, "use_cache_branch": np.array([used])})
            past, used, last = dict(zip(pasts, rest, strict=True)), True, logits[0, -1]
            last[suppressed] = -np.inf
            if not found:
                last[adapter.generation.begin_suppress_tokens] = -np.inf
            token = int(last.argmax())
            if token == adapter.end:
                break
            found.append(token)
            ids = [token]
        return adapter.decode_text(found)

    return lambda audios: [" ".join(window(part) for part in _windows(audio)) for audio in audios]


def sherpa_onnx(directory: Path, threads: int) -> Transcribe:
    """sherpa-onnx, which hears 29.5 seconds at most; windows are padded to 30, as everywhere else."""
    import sherpa_onnx as library  # type: ignore[import-not-found, unused-ignore]

    recognizer = library.OfflineRecognizer.from_whisper(
        encoder=str(directory / "encoder.onnx"), decoder=str(directory / "decoder.onnx"),
        tokens=str(directory / "tokens.txt"), language="en", num_threads=threads, tail_paddings=3000,
    )  # fmt: skip

    def transcribe(audios: Sequence[np.ndarray]) -> list[str]:
        texts = []
        for audio in audios:
            stream = recognizer.create_stream()
            stream.accept_waveform(SAMPLE_RATE, audio)
            recognizer.decode_stream(stream)
            texts.append(stream.result.text.strip())
        return texts

    return transcribe
