"""What the student is trained on: the teacher's distribution, the text, and the encoder's states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from usmlite.models import Attention
from usmlite.network import SEQUENCE_TO_SEQUENCE, Network

# Tokens whose distributions over the vocabulary are compared at once: their float32 logits, about
# 13 MB for Whisper's vocabulary, then stay in a CPU's cache.
_CHUNK_TOKENS = 64
# Channels of the layers' outputs differ by orders of magnitude: each counts over its own mean square,
# but not over less than this share of the mean channel's.
_LEAST_CHANNEL = 0.01


@dataclass(frozen=True)
class LossWeights:
    """How much each term counts.

    Attributes:
        kl: KL divergence of the student's distribution from the teacher's, nats per scored place (a token,
            or for CTC a frame).
        ce: cross-entropy of the student on the labels, nats per label; for CTC, the CTC loss.
        states: squared distance of the final encoder states, over the teacher's mean square.
        temperature: both distributions are softened by it in the KL term, which is then
            multiplied by its square (Hinton et al., arXiv 1503.02531).
        layers: squared distance of the output of every layer, over the mean square of the teacher's channel;
            of the decoder's at the scored positions (arXiv 1908.09355).
        attention: KL divergence of what the decoder's heads look at from what the teacher's do, nats per
            scored token, mean over heads and layers.
    """

    kl: float = 1.0
    ce: float = 0.2
    states: float = 1.0
    temperature: float = 1.0
    layers: float = 0.0
    attention: float = 0.0

    @property
    def needs_teacher(self) -> bool:
        """Whether anything but the text is matched."""
        return any((self.kl, self.states, self.layers, self.attention))


class _TokenLoss(torch.autograd.Function):
    """Weighted KL and cross-entropy of `[tokens, vocabulary]` logits, in chunks of tokens.

    The gradient is made in the forward pass, chunk by chunk: only one full-size tensor, the gradient
    in the logits' own dtype, is ever written, instead of the six that separate operations would make.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, labels: Tensor, weights: LossWeights
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the weighted sum, and without gradient the mean KL and the mean cross-entropy."""
        count, temperature = student.shape[0], weights.temperature
        gradient = torch.empty_like(student)
        sums = torch.zeros(2, dtype=torch.float64 if student.device.type == "cpu" else torch.float32)
        sums = sums.to(student.device)
        for low in range(0, count, _CHUNK_TOKENS):
            part = slice(low, min(low + _CHUNK_TOKENS, count))
            logits, target = student[part].float(), labels[part, None]
            log_p = log_softmax(logits, dim=-1)
            sums[1] -= log_p.gather(1, target).sum()
            probability = log_p.exp()
            log_t = log_softmax(teacher[part].float() / temperature, dim=-1)
            soft = log_t.exp()
            if temperature == 1.0:
                log_s, softened = log_p, probability
            else:
                log_s = log_softmax(logits / temperature, dim=-1)
                softened = log_s.exp()
            sums[0] += (soft * (log_t - log_s)).sum() * temperature**2
            slope = (softened - soft).mul_(weights.kl * temperature)
            slope.add_(probability, alpha=weights.ce)
            slope.scatter_add_(1, target, torch.full_like(target, -weights.ce, dtype=slope.dtype))
            gradient[part] = slope.div_(count)
        ctx.save_for_backward(gradient)
        kl, ce = (sums / count).float().unbind()
        ctx.mark_non_differentiable(kl, ce)
        return weights.kl * kl + weights.ce * ce, kl, ce

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient made in the forward pass, times that of the weighted sum."""
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grads[0].to(gradient.dtype)), None, None, None


class Distillation(nn.Module):
    """The student together with its loss, so that one forward call does a whole training step.

    Wrapping it (DDP, Accelerate) wraps the student; the teacher is no submodule and has no gradients.

    Attributes:
        weights: how much each term counts; may be set anew between steps.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        weights: LossWeights,
        *,
        network: Network = SEQUENCE_TO_SEQUENCE,
        layers: Sequence[str] = (),
        attentions: Sequence[Attention] = (),
    ) -> None:
        """Takes the models, the weights, how both are run, and where in both to look inside."""
        super().__init__()
        self.student = student
        self.__dict__["teacher"] = teacher
        self.weights = weights
        self.network = network
        self._layers, self._attentions = tuple(layers), tuple(attentions)

    @property
    def layers(self) -> tuple[str, ...]:
        """The modules whose output is matched with these weights."""
        return self._layers if self.weights.layers else ()

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """The attentions that are matched with these weights."""
        return self._attentions if self.weights.attention else ()

    def forward(self, heard: Tensor, taught: Tensor, **rest: Tensor) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            heard: the main input for the student (perhaps masked), float, such as `[batch, mels, frames]`.
            taught: the same for the teacher.
            rest: what else a batch of the network has (`network`).

        Returns:
            Scalars "loss" (weighted, with gradient), "kl", "ce", "states" and, where they have a weight,
            "layers" and "attention" (each unweighted). Where nothing of the teacher is matched it is not
            run, and its terms are zero.
        """
        weights, network, name = self.weights, self.network, str(self._student.main_input_name)
        batch = {name: heard, **rest}
        if not weights.needs_teacher:
            with self._watched(self.student, network.intermediate) as seen:
                _, logits = self._run(self.student, batch)
            ce = network.text_loss(logits, batch, [seen[name] for name in network.intermediate])
            nothing = torch.zeros_like(ce)
            return {"loss": weights.ce * ce, "kl": nothing, "ce": ce.detach(), "states": nothing}
        teacher: nn.Module = self.__dict__["teacher"]
        with torch.no_grad(), self._watched(teacher) as wanted:
            teacher_states, teacher_logits = self._run(teacher, {**batch, name: taught})
        with self._watched(self.student, network.intermediate) as seen:
            states, logits = self._run(self.student, batch)
        scored, audible = network.scored(batch), network.heard(batch)
        between = [seen[name] for name in network.intermediate]
        loss, kl, ce = self._place_losses(logits, teacher_logits, batch, between)
        distance = _distance(states, teacher_states, scored, audible)
        losses = {"loss": loss + weights.states * distance, "kl": kl, "ce": ce, "states": distance.detach()}
        if self.layers:
            parts = [_layer_distance(seen[name], wanted[name], scored, audible) for name in self.layers]
            losses["layers"] = torch.stack(parts).mean()
        if self.attentions:
            parts = [_attention_divergence(seen, wanted, place, scored, audible) for place in self.attentions]
            losses["attention"] = torch.stack(parts).mean()
        for name in ("layers", "attention"):
            if name in losses:
                losses["loss"] = losses["loss"] + getattr(weights, name) * losses[name]
                losses[name] = losses[name].detach()
        return losses

    @property
    def _student(self) -> Any:
        return self.student

    def _run(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Final encoder states `[batch, frames, d]` and logits `[scored places, vocabulary]`."""
        states = self.network.states(model, batch)
        return states, self.network.logits(model, batch, states)

    def _place_losses(
        self, logits: Tensor, teacher_logits: Tensor, batch: dict[str, Tensor], between: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted sum of KL and cross-entropy, and without gradient the two."""
        weights, labels = self.weights, self.network.labels(batch)
        apply: Any = _TokenLoss.apply  # torch leaves it untyped
        if labels is not None:
            loss, kl, ce = apply(logits, teacher_logits, labels, weights)
            return loss, kl, ce
        nowhere = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        loss, kl, _ = apply(logits, teacher_logits, nowhere, replace(weights, ce=0.0))
        ce = self.network.text_loss(logits, batch, between)
        return loss + weights.ce * ce, kl, ce.detach()

    @contextmanager
    def _watched(self, model: nn.Module, others: Sequence[str] = ()) -> Iterator[dict[str, Tensor]]:
        """What the places to match, and others, give while the model runs."""
        seen: dict[str, Tensor] = {}
        attentions = (name for place in self.attentions for name in (place.queries, place.keys))
        names = [*self.layers, *attentions, *others]

        def watch(name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                seen[name] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


def _there(student: Tensor, teacher: Tensor, *places: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both at the places of the first mask that is of as many: scored ones, or frames that are audio."""
    for mask in places:
        if mask is not None and student.shape[:2] == mask.shape:
            return student[mask].float(), teacher[mask].float()
    return student.float(), teacher.float()


def _distance(student: Tensor, teacher: Tensor, *places: Tensor | None) -> Tensor:
    """Mean squared distance of `[batch, places, d]`, over the teacher's mean square."""
    student, teacher = _there(student, teacher, *places)
    return (student - teacher).square().mean() / teacher.square().mean()


def _layer_distance(student: Tensor, teacher: Tensor, *places: Tensor | None) -> Tensor:
    """Mean squared distance of `[batch, places, d]`, each channel over the teacher's mean square."""
    student, teacher = (states.flatten(0, -2) for states in _there(student, teacher, *places))
    size = teacher.square().mean(dim=0)
    return ((student - teacher).square().mean(dim=0) / size.clamp(min=_LEAST_CHANNEL * size.mean())).mean()


def _attention_divergence(
    student: dict[str, Tensor],
    teacher: dict[str, Tensor],
    place: Attention,
    scored: Tensor,
    heard: Tensor | None,
) -> Tensor:
    """Mean KL divergence of the attention of scored tokens, to frames that are audio, nats."""
    total = torch.zeros((), device=scored.device)
    for row, chosen in enumerate(scored):
        audio = slice(None) if heard is None else heard[row]

        def looks(
            seen: dict[str, Tensor], row: int = row, chosen: Tensor = chosen, audio: Any = audio
        ) -> Tensor:
            queries, keys = seen[place.queries][row][chosen].float(), seen[place.keys][row][audio].float()
            queries, keys = (x.reshape(len(x), place.heads, -1).transpose(0, 1) for x in (queries, keys))
            scores = queries @ keys.transpose(1, 2) / queries.shape[-1] ** 0.5
            return log_softmax(scores, dim=-1)  # [heads, tokens, frames]

        wanted = looks(teacher)
        total = total + (wanted.exp() * (wanted - looks(student))).sum()
    return total / (place.heads * scored.sum())
