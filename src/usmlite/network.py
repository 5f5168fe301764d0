"""How a network is run: what goes in, what comes out, and what of it counts. One class a kind of network.

A batch is what the network's forward pass takes by keyword, with "labels" beside it (int64 `[batch, tokens]`,
`IGNORED` where nothing is scored) and whatever else its kind asks for. Everything above (calibration,
allocation, distillation) runs networks through these methods and knows of no family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, ctc_loss, log_softmax

from usmlite.transducer_loss import rnnt_loss, tdt_loss

IGNORED = -100
"""Label of places that are not scored."""

Batch = Mapping[str, Tensor]


class Network:
    """A sequence-to-sequence recognizer of Transformers; other kinds override what differs.

    Places are where the output says something: tokens here, frames for CTC.
    """

    beside: tuple[str, ...] = ("labels",)
    """Keys of a batch that are not for the network."""
    intermediate: tuple[str, ...] = ()
    """Modules whose outputs are logits too, which `text_loss` takes as `between`."""
    heads: tuple[str, ...] = ()
    """Modules that turn states into logits and belong to the labels, not to the speech."""

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What of a batch is for the network."""
        return {name: value for name, value in batch.items() if name not in self.beside}

    def run(self, model: nn.Module, batch: Batch) -> None:
        """Runs the whole network, for the sake of hooks."""
        model(**self.inputs(batch))

    def encoder(self, model: nn.Module) -> nn.Module:
        """The part that `states` runs."""
        return cast(nn.Module, cast(Any, model).get_encoder())

    def states(self, model: nn.Module, batch: Batch) -> Tensor:
        """The encoder's output, `[batch, frames, d]`."""
        name = cast(Any, model).main_input_name
        return cast(Tensor, self.encoder(model)(batch[name]).last_hidden_state)

    def logits(self, model: nn.Module, batch: Batch, states: Tensor) -> Tensor:
        """At the scored places, `[scored, vocabulary]`.

        Args:
            model: the network.
            batch: as above.
            states: what `states` returned.
        """
        network = cast(Any, model)
        rest = {k: v for k, v in self.inputs(batch).items() if k != network.main_input_name}
        out = network.base_model(**rest, encoder_outputs=(states,), use_cache=False).last_hidden_state
        # Projecting onto 50,000 words is the dearest part of a short decoder: only where it is scored.
        return cast(Tensor, network.get_output_embeddings()(out[self.scored(batch)]))

    def scored(self, batch: Batch) -> Tensor:
        """The places whose output is compared with the teacher's, bool `[batch, places]`."""
        return batch["labels"] != IGNORED

    def counted(self, batch: Batch) -> Tensor | None:
        """The places whose inputs count in calibration, bool `[batch, places]`; None if all do."""
        mask = batch.get("decoder_attention_mask")
        if mask is not None:
            return mask.bool()
        labels = batch.get("labels")
        if labels is None:
            return None
        # The prompt is not scored either, but the student will see it: only what follows is padding.
        return (labels != IGNORED).flip(1).cummax(1).values.flip(1).bool()

    def heard(self, batch: Batch) -> Tensor | None:
        """The encoder's frames that are audio, bool `[batch, frames]`; None if all are, or are places."""
        return None

    def labels(self, batch: Batch) -> Tensor | None:
        """The label of each scored place, int64 `[scored]`; None where labels belong to no place."""
        return batch["labels"][self.scored(batch)]

    def text_loss(self, logits: Tensor, batch: Batch, between: Sequence[Tensor] = ()) -> Tensor:
        """How unlikely the text is, nats per label.

        Args:
            logits: what `logits` returned.
            batch: the same.
            between: what the modules of `intermediate` gave, if somebody listened.
        """
        return cross_entropy(logits.float(), cast(Tensor, self.labels(batch)))


class SequenceNetwork(Network):
    """A sequence-to-sequence recognizer that hears audio of its true length: the rest is masked.

    Args:
        encoder: the module that turns the main input into states.
        decoder: the module that turns tokens and states into what is projected onto the vocabulary.
        frames: which samples or feature frames are audio, int64 `[batch, length]`, to which of the encoder's
            frames are, bool `[batch, frames]`.
    """

    beside = ("labels", "lengths")

    def __init__(self, encoder: str, decoder: str, frames: Callable[[Tensor], Tensor]) -> None:
        self._encoder, self._decoder, self._frames = encoder, decoder, frames

    def encoder(self, model: nn.Module) -> nn.Module:
        """The part that `states` runs."""
        return model.get_submodule(self._encoder)

    def states(self, model: nn.Module, batch: Batch) -> Tensor:
        """The encoder's output, `[batch, frames, d]`."""
        heard = batch[cast(Any, model).main_input_name]
        out = self.encoder(model)(heard, attention_mask=batch["attention_mask"])
        return cast(Tensor, out.last_hidden_state)

    def logits(self, model: nn.Module, batch: Batch, states: Tensor) -> Tensor:
        """At the scored places, `[scored, vocabulary]`."""
        mask = cast(Tensor, self.heard(batch))
        out = model.get_submodule(self._decoder)(
            input_ids=batch["decoder_input_ids"],
            encoder_hidden_states=states.clone(),  # some decoders add positions to them, in place
            encoder_attention_mask=mask.long(),
            use_cache=False,
        ).last_hidden_state
        return cast(Tensor, cast(Any, model).get_output_embeddings()(out[self.scored(batch)]))

    def heard(self, batch: Batch) -> Tensor | None:
        """The encoder's frames that are audio, bool `[batch, frames]`."""
        return self._frames(batch["attention_mask"])


class FrameNetwork(Network):
    """An encoder with a CTC head: every frame has a distribution over labels and the blank.

    A batch has "lengths" beside it, int64 `[batch]`: how much of the main input is audio; the rest pads.

    Args:
        encoder: attribute of the model that turns its input into states.
        head: attribute that turns states into logits.
        blank: the label of frames that say nothing.
        frames: lengths of inputs to numbers of frames, int64 `[batch]` to int64 `[batch]`.
        time_axis: of the main input.
        intermediate: modules within the encoder that give logits `[batch, frames, vocabulary]` as well.
        frames_together: how many of their frames are one of the output.
    """

    beside = ("labels", "lengths")

    def __init__(
        self,
        encoder: str,
        head: str,
        blank: int,
        frames: Callable[[Tensor], Tensor],
        *,
        time_axis: int = 1,
        intermediate: tuple[str, ...] = (),
        frames_together: int = 1,
    ) -> None:
        self._encoder, self._head, self.blank, self.frames = encoder, head, blank, frames
        self._time_axis, self.intermediate, self._together = time_axis, intermediate, frames_together
        self.heads = (head, *(name.rpartition(".")[0] for name in intermediate))

    def encoder(self, model: nn.Module) -> nn.Module:
        """The part that `states` runs."""
        return model.get_submodule(self._encoder)

    def states(self, model: nn.Module, batch: Batch) -> Tensor:
        """The encoder's output, `[batch, frames, d]`."""
        return cast(Tensor, self.encoder(model)(**self.inputs(batch)).last_hidden_state)

    def logits(self, model: nn.Module, batch: Batch, states: Tensor) -> Tensor:
        """At the frames that are audio, `[frames of all rows, vocabulary]`."""
        return cast(Tensor, model.get_submodule(self._head)(states)[self.scored(batch)])

    def scored(self, batch: Batch) -> Tensor:
        """The frames that are audio, bool `[batch, frames]`."""
        main = next(value for name, value in batch.items() if name not in (*self.beside, "attention_mask"))
        count = int(self.frames(torch.tensor([main.shape[self._time_axis]])))
        frames = self.frames(batch["lengths"])
        return torch.arange(count, device=frames.device) < frames[:, None]

    def counted(self, batch: Batch) -> Tensor | None:
        """The frames that are audio, bool `[batch, frames]`."""
        return self.scored(batch)

    def labels(self, batch: Batch) -> Tensor | None:
        """None: CTC sums over all ways to lay the labels on the frames."""
        return None

    def text_loss(self, logits: Tensor, batch: Batch, between: Sequence[Tensor] = ()) -> Tensor:
        """The CTC loss (Graves et al., ICML 2006), nats per label.

        With intermediate logits it is the mean of theirs and the final one (arXiv 2104.02724). Texts of more
        labels than their frames have room for are left out: their loss would be infinite. Zero where there is
        none left.
        """
        frames = self.frames(batch["lengths"])
        scored = self.scored(batch)
        whole = logits.new_zeros((*scored.shape, logits.shape[-1]), dtype=torch.float32)
        whole[scored] = logits.float()
        losses = [self.loss_of_frames(whole, batch["labels"], frames)]
        for each in between:
            there = (frames * self._together).clamp(max=each.shape[1])
            losses.append(self.loss_of_frames(each.float(), batch["labels"], there))
        return torch.stack(losses).mean()

    def loss_of_frames(self, logits: Tensor, labels: Tensor, frames: Tensor) -> Tensor:
        """The CTC loss, nats per label.

        Args:
            logits: float32 `[batch, frames, vocabulary]`.
            labels: int64 `[batch, labels]`, `IGNORED` after the last of a row.
            frames: of each row, int64 `[batch]`.
        """
        return _ctc(logits, labels, frames, self.blank)


class TransducerNetwork(FrameNetwork):
    """An encoder, a network of the labels so far, and one that joins both.

    Every frame and number of labels so far have a distribution over labels and the blank, with `durations`
    another one over how many frames to go on. All of these places are compared with the teacher's: `frames x
    (labels + 1)` of them, each a vocabulary wide.

    Args:
        encoder: attribute of the model that turns its input into states.
        blank: the label that goes on to the next frame.
        frames: lengths of inputs to numbers of frames, int64 `[batch]` to int64 `[batch]`.
        durations: in frames; None for a transducer without them.
    """

    def __init__(
        self,
        encoder: str,
        blank: int,
        frames: Callable[[Tensor], Tensor],
        durations: Sequence[int] | None = None,
    ) -> None:
        super().__init__(encoder, "joint", blank, frames)
        self.heads, self._durations = ("joint.head",), durations

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What of a batch is for the encoder."""
        return {k: v for k, v in super().inputs(batch).items() if k != "decoder_input_ids"}

    def run(self, model: nn.Module, batch: Batch) -> None:
        """Runs the whole network, for the sake of hooks, at the places that count."""
        self.logits(model, batch, self.states(model, batch))

    def logits(self, model: nn.Module, batch: Batch, states: Tensor) -> Tensor:
        """At all places, `[places of all rows, vocabulary]`, with the durations' behind them.

        With durations both are log probabilities: a softmax over all then gives each distribution half.
        """
        network = cast(Any, model)
        heard, said = network.encoder_projector(states), network.decoder(batch["decoder_input_ids"])
        row, frame, label = self._places(batch).nonzero(as_tuple=True)
        found: Tensor = network.joint(
            encoder_hidden_states=heard[row, frame], decoder_hidden_states=said[row, label]
        )
        if self._durations is None:
            return found
        vocabulary = found.shape[1] - len(self._durations)
        parts = found[:, :vocabulary].float(), found[:, vocabulary:].float()
        return torch.cat([log_softmax(part, dim=-1) for part in parts], dim=1)

    def _places(self, batch: Batch) -> Tensor:
        """Frames that are audio with numbers of labels that there are, bool `[batch, frames, labels + 1]`."""
        return self.scored(batch)[:, :, None] & cast(Tensor, self.counted(batch))[:, None, :]

    def counted(self, batch: Batch) -> Tensor | None:
        """Numbers of labels so far that there are, bool `[batch, labels + 1]`."""
        counts = (batch["labels"] != IGNORED).sum(dim=1)
        return torch.arange(batch["decoder_input_ids"].shape[1], device=counts.device) <= counts[:, None]

    def heard(self, batch: Batch) -> Tensor | None:
        """The frames that are audio, bool `[batch, frames]`."""
        return self.scored(batch)

    def text_loss(self, logits: Tensor, batch: Batch, between: Sequence[Tensor] = ()) -> Tensor:
        """The transducer's loss, nats per label; texts that no way leads to are left out."""
        places, labels, frames = self._places(batch), batch["labels"], self.frames(batch["lengths"])
        row, _, said = places.nonzero(as_tuple=True)
        width = places.shape[2]
        following = torch.nn.functional.pad(labels, (0, width - labels.shape[1]), value=IGNORED)
        vocabulary = logits.shape[1] - len(self._durations or ())
        chances = log_softmax(logits[:, :vocabulary].float(), dim=-1)
        blank, label = (logits.new_zeros(places.shape, dtype=torch.float32) for _ in range(2))
        blank[places] = chances[:, self.blank]
        label[places] = chances.gather(1, following[row, said].clamp(min=0)[:, None])[:, 0]
        counts = (labels != IGNORED).sum(dim=1)
        if self._durations is None:
            losses = rnnt_loss(blank, label, frames, counts)
        else:
            durations = logits.new_zeros((*places.shape, len(self._durations)), dtype=torch.float32)
            durations[places] = log_softmax(logits[:, vocabulary:].float(), dim=-1)
            losses = tdt_loss(blank, label, frames, counts, durations, self._durations)
        fits = losses.isfinite() & (counts > 0)
        if not bool(fits.any()):
            return logits.sum() * 0.0
        return losses[fits].sum() / counts[fits].sum()


def _ctc(logits: Tensor, labels: Tensor, frames: Tensor, blank: int) -> Tensor:
    """Of logits `[batch, frames, vocabulary]`, of which each row has its own number of frames."""
    counts = (labels != IGNORED).sum(dim=1)
    fits = (labels_needed(labels) <= frames) & (counts > 0)
    if not bool(fits.any()):
        return logits.sum() * 0.0
    losses = ctc_loss(
        log_softmax(logits[fits], dim=-1).transpose(0, 1),
        labels[fits].clamp(min=0),
        frames[fits],
        counts[fits],
        blank=blank,
        reduction="none",
    )
    return losses.sum() / counts[fits].sum()


def labels_needed(labels: Tensor) -> Tensor:
    """The least frames on which labels can be laid: one each, and a blank between two that are the same.

    Args:
        labels: int64 `[batch, labels]`, `IGNORED` after the last.

    Returns:
        int64 `[batch]`.
    """
    real = labels != IGNORED
    repeated = (labels[:, 1:] == labels[:, :-1]) & real[:, 1:]
    return real.sum(dim=1) + repeated.sum(dim=1)


SEQUENCE_TO_SEQUENCE = Network()
