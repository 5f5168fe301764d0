"""What usmlite must know about Whisper's encoder with a CTC head: how it hears, and where its parts are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from usmlite.audio import log_mel
from usmlite.models.ctc import CTCAdapter, CTCLayout
from usmlite.models.whisper_ctc import WhisperForCTC
from usmlite.models.whisper_ctc_config import WhisperCTCConfig
from usmlite.network import FrameNetwork


class WhisperCTCAdapter(CTCAdapter):
    """The family-specific half of a `WhisperForCTC`; see `CTCAdapter` for the arguments.

    Features are Whisper's, of audio of its true length. Where attention is in chunks they do not wait for the
    end of the audio either: what is loud is judged by what was heard so far.
    """

    layout: ClassVar[CTCLayout] = CTCLayout(
        "WhisperForCTC", "encoder", "ctc_head", "layers", front=("conv1", "conv2")
    )
    config: WhisperCTCConfig

    def __init__(
        self, config: PretrainedConfig, extractor: Any, tokenizer: Any, *, where: str | Path = "tokenizer"
    ) -> None:
        super().__init__(config, extractor, tokenizer, where=where)
        self.channel_axis = 1
        self.has_idle_parameters = False
        self.network = FrameNetwork(
            self.layout.encoder,
            self.layout.head,
            self.blank,
            self.frames,
            time_axis=2,
            intermediate=tuple(
                f"{self.layout.encoder}.conditioning.{layer}.head"
                for layer in sorted(self.config.intermediate_layers)
            ),
            frames_together=self.config.time_reduction,
        )

    @classmethod
    def model_class(cls) -> type[PreTrainedModel]:
        """Ours: Transformers has no such class."""
        return WhisperForCTC

    def _extract(self, audio: Sequence[np.ndarray]) -> dict[str, Tensor]:
        causal = self.config.chunk_frames > 0
        rows = [
            log_mel(torch.from_numpy(samples)[None], self.config.num_mel_bins, causal=causal)[0]
            for samples in audio
        ]
        counts = torch.tensor([row.shape[1] for row in rows])
        longest = int(counts.max())
        features = torch.stack([torch.nn.functional.pad(row, (0, longest - row.shape[1])) for row in rows])
        mask = (torch.arange(longest) < counts[:, None]).long()
        return {self.main_input: features, "attention_mask": mask}
