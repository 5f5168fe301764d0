"""What the student is trained on: the teacher's distribution, the text, and the encoder's states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

IGNORED = -100  # label of positions that are not scored
# Tokens whose distributions over the vocabulary are compared at once: their float32 logits, about
# 13 MB for Whisper's vocabulary, then stay in a CPU's cache.
_CHUNK_TOKENS = 64


@dataclass(frozen=True)
class LossWeights:
    """How much each term counts.

    Attributes:
        kl: KL divergence of the student's token distribution from the teacher's, nats per token.
        ce: cross-entropy of the student on the labels, nats per token.
        states: squared distance of the final encoder states, over the teacher's mean square.
        temperature: both distributions are softened by it in the KL term, which is then
            multiplied by its square (Hinton et al., arXiv 1503.02531).
    """

    kl: float = 1.0
    ce: float = 0.2
    states: float = 1.0
    temperature: float = 1.0


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
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, weights: LossWeights) -> None:
        super().__init__()
        self.student = student
        self.__dict__["teacher"] = teacher
        self.weights = weights

    def forward(
        self, heard: Tensor, taught: Tensor, decoder_input_ids: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            heard: float `[batch, mels, frames]`, what the student hears (perhaps masked).
            taught: the same for the teacher.
            decoder_input_ids: int64 `[batch, tokens]`.
            labels: int64 `[batch, tokens]`, `IGNORED` where nothing is scored.

        Returns:
            Scalars "loss" (weighted, with gradient), "kl", "ce", "states" (each unweighted). Without
            weight on "kl" and "states" the teacher is not run, and both are zero.
        """
        weights, scored = self.weights, labels != IGNORED
        if not (weights.kl or weights.states):
            _, logits = _run(self.student, heard, decoder_input_ids, scored)
            ce = cross_entropy(logits.float(), labels[scored])
            nothing = torch.zeros_like(ce)
            return {"loss": weights.ce * ce, "kl": nothing, "ce": ce.detach(), "states": nothing}
        with torch.no_grad():
            teacher_states, teacher_logits = _run(self.__dict__["teacher"], taught, decoder_input_ids, scored)
        states, logits = _run(self.student, heard, decoder_input_ids, scored)
        apply: Any = _TokenLoss.apply  # torch leaves it untyped
        tokens, kl, ce = apply(logits, teacher_logits, labels[scored], weights)
        distance = (states.float() - teacher_states.float()).square().mean()
        distance = distance / teacher_states.float().square().mean()
        return {"loss": tokens + weights.states * distance, "kl": kl, "ce": ce, "states": distance.detach()}


def _run(
    model: nn.Module, features: Tensor, decoder_input_ids: Tensor, scored: Tensor
) -> tuple[Tensor, Tensor]:
    """Final encoder states `[batch, frames, d]` and logits `[scored tokens, vocabulary]`."""
    any_model: Any = model
    out = any_model.base_model(input_features=features, decoder_input_ids=decoder_input_ids, use_cache=False)
    # Projecting onto 50,000 words is the dearest part of a short decoder: only where it is scored.
    return out.encoder_last_hidden_state, any_model.get_output_embeddings()(out.last_hidden_state[scored])
