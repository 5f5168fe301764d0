"""Augmentation: what is added is what was asked for, and nothing is changed in place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from usmlite import augment


@pytest.mark.parametrize("snr_db", [5.0, 30.0])
def test_noise_has_the_power_that_was_asked_for(snr_db: float) -> None:
    samples = np.sin(np.arange(16_000) / 20).astype(np.float32)
    before = samples.copy()
    noisy = augment.add_noise(samples, snr_db, np.random.default_rng(0))
    noise = noisy - samples
    found = 10 * np.log10(np.mean(samples.astype(np.float64) ** 2) / np.mean(noise**2))
    assert found == pytest.approx(snr_db, abs=1e-6)
    assert np.array_equal(samples, before)
    assert np.array_equal(noisy, augment.add_noise(samples, snr_db, np.random.default_rng(0)))


def test_low_pass_is_the_recursion() -> None:
    white = np.random.default_rng(0).standard_normal(600)
    expected = np.zeros(600)
    for index in range(600):
        expected[index] = white[index] + (0.8 * expected[index - 1] if index else 0.0)
    np.testing.assert_allclose(augment._low_pass(white, 0.8), expected, atol=1e-9)


def test_spec_augment_masks_a_copy_and_repeats_with_its_generator() -> None:
    features = torch.randn(2, 80, 3000)
    before = features.clone()
    one = augment.spec_augment(features, torch.Generator().manual_seed(1))
    two = augment.spec_augment(features, torch.Generator().manual_seed(1))
    assert torch.equal(features, before)
    assert torch.equal(one, two)
    changed = (one != features).float().mean().item()
    assert 0.0 < changed < 0.6


def test_words_are_swapped_for_others_of_the_batch_and_nothing_else() -> None:
    tokens = torch.arange(1000).reshape(2, 500)
    words = torch.ones(2, 500, dtype=torch.bool)
    words[:, :10] = words[1, 400:] = False
    before = tokens.clone()
    one = augment.swap_words(tokens, words, 0.25, torch.Generator().manual_seed(1))
    assert torch.equal(tokens, before)
    assert torch.equal(one, augment.swap_words(tokens, words, 0.25, torch.Generator().manual_seed(1)))
    assert torch.equal(one[~words], tokens[~words])
    assert 0.2 < (one != tokens)[words].float().mean().item() < 0.3
    assert set(one.flatten().tolist()) <= set(tokens[words].tolist()) | set(tokens[~words].tolist())
    assert torch.equal(augment.swap_words(tokens, words, 0.0, torch.Generator()), tokens)
    assert torch.equal(augment.swap_words(tokens, ~words & False, 1.0, torch.Generator()), tokens)
