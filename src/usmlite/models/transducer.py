"""What usmlite must know about transducers: an encoder, a network of the labels so far, one that joins them.

Transformers' own `generate` decodes them greedily and says how far it went at each step, so that labels have
times. Recurrent layers and biases of attention stay in float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PretrainedConfig

from usmlite.audio import SAMPLE_RATE
from usmlite.errors import ModelError
from usmlite.models.adapter import WITHOUT_TIMES, Decoded, Said, TimedText
from usmlite.models.alignment import Emitted
from usmlite.models.frames import FrameAdapter
from usmlite.models.options import Options
from usmlite.models.sequence import Likelihoods
from usmlite.models.true_length import PROCESSOR_REMEDY, padded
from usmlite.network import IGNORED, TransducerNetwork


@dataclass(frozen=True)
class TransducerLayout:
    """Where the parts of a class are.

    Attributes:
        model: the class's name in Transformers. Its `encoder_projector`, `decoder` and `joint` are called.
        front: beginnings of names, within the encoder, of what makes frames of the input.
        encoder: attribute of the model that turns its input into states.
        layers: attribute of the encoder that holds the layers.
    """

    model: str
    front: tuple[str, ...] = ("subsampling",)
    encoder: str = "encoder"
    layers: str = "layers"


LAYOUTS = {
    "parakeet_rnnt": TransducerLayout("ParakeetForRNNT"),
    "parakeet_tdt": TransducerLayout("ParakeetForTDT"),
}
"""By the `model_type` of the configuration."""


class TransducerAdapter(FrameAdapter):
    """The family-specific half of a transducer. `layout` says of which class; arguments as for its base."""

    family = "transducer"
    labels_a_window = 100  # pieces of words
    layout: ClassVar[TransducerLayout]
    kinds = frozenset({"linear", "conv1d", "embedding"})

    def _set_network(self) -> None:
        super()._set_network()
        sizes = cast(Any, self.config)
        self.blank, self.durations = int(sizes.blank_token_id), getattr(sizes, "durations", None)
        self.network = TransducerNetwork(self.layout.encoder, self.blank, self.frames, self.durations)

    def _check_tokenizer(self) -> None:
        vocabulary, highest = cast(Any, self.config).vocab_size, self._highest_label(())
        if highest >= vocabulary:
            raise ModelError(
                "the tokenizer does not fit the model",
                where=self._where,
                expected=f"labels below {vocabulary}",
                found=f"labels up to {highest}",
                remedy=PROCESSOR_REMEDY,
            )

    @classmethod
    def depth(cls, config: PretrainedConfig) -> int:
        """See `TrueLengthAdapter.depth`."""
        sizes = cast(Any, config)
        return int(sizes.encoder_config.num_hidden_layers) + int(sizes.num_decoder_layers)

    # Text

    def fits(self, text: str, seconds: float) -> bool:
        """Whether decoding could say so many labels in so much audio."""
        most = cast(Any, self.config).max_symbols_per_step
        return len(self.encode_text(text)) <= int(most) * self.frames_of(seconds)

    def teach(
        self, windows: Sequence[Sequence[TimedText]], *, timestamps: Sequence[bool], language: str | None
    ) -> dict[str, Tensor]:
        """The labels of each window's texts, joined by spaces, and the same behind a blank."""
        rows = [self.encode_text(self.written(" ".join(t.text for t in window))) for window in windows]
        before = padded([[self.blank, *row] for row in rows], self.blank)
        return {"decoder_input_ids": before, "labels": padded(rows, IGNORED)}

    def outline(self, rows: int) -> dict[str, Tensor]:
        """See `Adapter.outline`."""
        batch = {name: value.to("meta") for name, value in super().outline(rows).items()}
        before = torch.empty(rows, self.labels_a_window + 1, dtype=torch.int64, device="meta")
        return {**batch, "decoder_input_ids": before}

    # Decoding

    def transcribe(
        self,
        model: nn.Module,
        audio: Sequence[Tensor],
        options: Options = WITHOUT_TIMES,
        *,
        previous: Sequence[Sequence[Said]] = (),
    ) -> list[Decoded]:
        """The likeliest label at each step; see `Adapter.transcribe`."""
        self._check_options(options, previous)
        sizes = cast(Any, self.config)
        batch, dtype = self._inputs(audio), next(model.parameters()).dtype
        frames: list[int] = self.frames(batch["lengths"]).tolist()
        limits = [sizes.max_symbols_per_step * count for count in frames]
        likelihoods = Likelihoods(sizes.vocab_size)
        settings = cast(Any, GenerationConfig)(
            max_new_tokens=max(limits), num_beams=1, do_sample=False,
            decoder_start_token_id=self.blank, pad_token_id=self.blank,
        )  # fmt: skip
        with torch.inference_mode():
            found = cast(Any, model).generate(
                batch[self.main_input].to(dtype),
                attention_mask=batch["attention_mask"],
                generation_config=settings,
                logits_processor=LogitsProcessorList([likelihoods]),
            )
        # The blank that everything begins with is no step.
        labels, far = (rows[:, 1:].tolist() for rows in (found.sequences, found.durations))
        steps = [list(zip(*row, strict=True)) for row in zip(labels, far, likelihoods.rows(), strict=True)]
        return [
            self._placed(row[:limit], count, len(samples) / SAMPLE_RATE, options)
            for row, limit, count, samples in zip(steps, limits, frames, audio, strict=True)
        ]

    def _placed(
        self, steps: Sequence[tuple[int, int, float]], frames: int, seconds: float, options: Options
    ) -> Decoded:
        """What is said in steps of a label, how many frames to go on and the log probability."""
        at = accumulate((far for _, far, _ in steps), initial=0)
        taken = [(frame, *step) for frame, step in zip(at, steps, strict=False) if frame < frames]
        length = seconds / frames
        emitted = [
            Emitted(label, frame * length, min(frame + max(1, far), frames) * length, logprob)
            for frame, label, far, logprob in taken
            if label != self.blank
        ]
        mean = sum(logprob for *_, logprob in taken) / max(1, len(taken))
        return self._decoded(emitted, mean, seconds, options)

    def _check_options(self, options: Options, previous: Sequence[Sequence[Said]]) -> None:
        super()._check_options(options, previous)
        self._refuse_search(options)

    # Weights

    @classmethod
    def part(cls, name: str) -> str:
        """The feature encoder, the encoder, the prediction network or the joint network."""
        layout = cls.layout
        if name.startswith(f"{layout.encoder}."):
            front = tuple(f"{layout.encoder}.{part}" for part in layout.front)
            return "feature encoder" if name.startswith(front) else "encoder"
        return "prediction network" if name.startswith("decoder.") else "joint network"

    def layers(self) -> list[str]:
        """The encoder's layers."""
        count = int(cast(Any, self.config).encoder_config.num_hidden_layers)
        return [f"{self.layout.encoder}.{self.layout.layers}.{i}" for i in range(count)]
