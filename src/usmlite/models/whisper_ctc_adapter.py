"""What usmlite must know about Whisper's encoder with a CTC head: how it hears, and where its parts are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from usmlite.audio import log_mel
from usmlite.models.ctc import CTCAdapter, CTCLayout
from usmlite.models.engine import native_states
from usmlite.models.whisper_ctc import WhisperCTCEncoder, WhisperForCTC, positions
from usmlite.models.whisper_ctc_config import WhisperCTCConfig
from usmlite.network import Batch, FrameNetwork


class WhisperCTCAdapter(CTCAdapter):
    """The family-specific half of a `WhisperForCTC`; see `CTCAdapter` for the arguments.

    Features are Whisper's, of audio of its true length. Where attention is in chunks they do not wait for the
    end of the audio either: what is loud is judged by what was heard so far.
    """

    layout: ClassVar[CTCLayout] = CTCLayout(
        "WhisperForCTC", "encoder", "ctc_head", "layers", front=("conv1", "conv2")
    )
    config: WhisperCTCConfig

    def _set_network(self) -> None:
        super()._set_network()
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

    def outline(self, rows: int) -> dict[str, Tensor]:
        """See `Adapter.outline`."""
        batch = super().outline(rows)
        # Bins before frames, as in Whisper.
        return {**batch, self.main_input: batch[self.main_input].transpose(1, 2)}

    def states(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `CTCAdapter.states`: of packed models in the native library, one recording after the other.

        It knows no chunks and no intermediate heads; with these the layers run one by one.
        """
        config, features = self.config, batch[self.main_input]
        encoder = cast(WhisperCTCEncoder, model.get_submodule(self.layout.encoder))
        longest = 2 * config.max_source_positions
        if config.chunk_frames or config.intermediate_layers or features.shape[2] > longest:
            return super().states(model, batch)
        rows = []
        for row, length in zip(features, batch["lengths"].tolist(), strict=True):
            alone = row[None, :, :length]
            table = positions(config.max_source_positions, features.new_empty(0, config.d_model))
            found = native_states(model, encoder, alone, table)
            if found is None:
                return super().states(model, batch)
            rows.append(encoder.stacked(found)[0])
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def _extract(self, audio: Sequence[np.ndarray], **settings: Any) -> dict[str, Tensor]:
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
