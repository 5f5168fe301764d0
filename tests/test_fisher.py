"""The Fisher information of outputs, next to what errors of these outputs do to the model's words."""

from __future__ import annotations

import torch
from torch import nn

from small_whisper import small_teacher
from usmlite.fisher import output_fisher


def speech() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, 8, 3000, generator=generator)
    ids = torch.randint(0, 250, (2, 8), generator=generator)
    return {"input_features": features, "decoder_input_ids": ids, "labels": ids}


def kl_of_errors(model: nn.Module, name: str, batch: dict[str, torch.Tensor], size: float) -> torch.Tensor:
    """KL, nats, that a random error of each output causes, one output after the other."""
    rest = {key: value for key, value in batch.items() if key != "labels"}
    scored = batch["labels"] != -100

    def logarithms() -> torch.Tensor:
        return model(**rest, use_cache=False).logits[scored].double().log_softmax(dim=-1)

    with torch.no_grad():
        expected = logarithms()
        found = []
        for row in range(model.get_submodule(name).weight.shape[0]):
            generator = torch.Generator().manual_seed(row)

            def disturb(layer: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
                output = output.clone()
                channel = output.select(1 if isinstance(layer, nn.Conv1d) else -1, row)  # noqa: B023
                channel += size * torch.randn(channel.shape, generator=generator)  # noqa: B023
                return output

            handle = model.get_submodule(name).register_forward_hook(disturb)
            found.append((expected.exp() * (expected - logarithms())).sum())
            handle.remove()
    return torch.stack(found)


def test_outputs_that_the_words_feel_more_count_more() -> None:
    torch.manual_seed(0)
    model, batch = small_teacher()[0], speech()
    names = ["model.decoder.layers.0.fc1", "model.encoder.layers.0.self_attn.v_proj", "model.encoder.conv1"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = [parameter.requires_grad for parameter in model.parameters()]
    found = output_fisher(model, names, [batch] * 40)
    for name in names:
        felt = kl_of_errors(model, name, batch, 0.03)
        assert found[name].shape == felt.shape
        # Few draws tell single outputs roughly, the order of many well.
        ranks = torch.stack([values.argsort().argsort().double() for values in (found[name], felt)])
        assert torch.corrcoef(ranks)[0, 1] > 0.4, name
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_same_every_time() -> None:
    model, batch = small_teacher()[0], speech()
    names = ["model.decoder.layers.0.fc2"]
    first, second = (output_fisher(model, names, [batch])[names[0]] for _ in range(2))
    assert torch.equal(first, second)
