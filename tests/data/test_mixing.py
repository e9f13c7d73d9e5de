"""Soft targets are distributions, smoothed exactly once, for batches of any size."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.mixup import Mixup
from torch import Tensor
from torch.nn import functional as F

from sequencer2d.data.mixing import BatchMixing, seed_generators
from sequencer2d.training.config import AugmentConfig

NO_MIXING: dict[str, Any] = {"random_erasing": 0.0, "mixup_alpha": 0.0, "cutmix_alpha": 0.0}


def mix(batch_size: int, num_classes: int, **options: Any) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images `[B, 1, 8, 8]` that hold their own number, with labels; and both after mixing."""
    images = torch.arange(1.0, batch_size + 1).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).clone()
    labels = torch.arange(batch_size) % num_classes
    mixing = BatchMixing(AugmentConfig(**{**NO_MIXING, **options}), num_classes)
    mixed, targets = mixing(images.clone(), labels)
    return (images, labels), (mixing.erase(mixed, [(i,) for i in range(batch_size)]), targets)


@settings(deadline=None, max_examples=60)
@given(
    batch_size=st.integers(1, 9),
    num_classes=st.integers(2, 6),
    mixup_alpha=st.sampled_from([0.0, 0.8]),
    cutmix_alpha=st.sampled_from([0.0, 1.0]),
    mix_prob=st.sampled_from([0.5, 1.0]),
    label_smoothing=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 2**32 - 1),
)
def test_targets_are_distributions_of_the_mixed_labels_smoothed_once(
    batch_size: int, num_classes: int, seed: int, label_smoothing: float, **options: float
) -> None:
    """With ε of smoothing over K classes a target is (1-ε)·(λ·a + (1-λ)·b) + ε/K, whatever was mixed."""
    results = []
    for smoothing in (label_smoothing, 0.0):
        seed_generators(seed)
        results.append(mix(batch_size, num_classes, label_smoothing=smoothing, **options)[1])
    (images, targets), (same_images, hard) = results
    assert torch.equal(images, same_images)
    torch.testing.assert_close(targets.sum(1), torch.ones(batch_size))
    torch.testing.assert_close(targets, (1 - label_smoothing) * hard + label_smoothing / num_classes)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_target_holds_each_label_by_its_share_of_the_pixels(kind: str, batch_size: int) -> None:
    """Image i is mixed with image -i; the one that an odd batch leaves over stays itself."""
    for seed in range(20):
        seed_generators(seed)
        (images, _), (mixed, targets) = mix(batch_size, batch_size + 1, label_smoothing=0.0, **{f"{kind}_alpha": 1.0})
        even = batch_size - batch_size % 2
        partners = [*range(even - 1, -1, -1), *range(even, batch_size)]
        for i, partner in enumerate(partners):
            assert set(targets[i].nonzero().flatten().tolist()) <= {i, partner}
        expected = targets[:, :batch_size] @ images[:, 0, 0, 0]
        torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), expected)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (12, 3, 100, 100), (6, 3, 220, 220), (50, 1, 9, 7)])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_images_are_mixed_as_timm_mixes_them(kind: str, shape: tuple[int, int, int, int]) -> None:
    """To the bit; a few images at a time, which shapes make one, some or all."""
    options: dict[str, Any] = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, f"{kind}_alpha": 1.0}
    images, labels = torch.randn(shape), torch.arange(shape[0])
    mixing = BatchMixing(AugmentConfig(**{**NO_MIXING, **options}), shape[0])
    for seed in range(3):
        seed_generators(seed)
        theirs = Mixup(**options, label_smoothing=0.1, num_classes=shape[0])(images.clone(), labels)
        seed_generators(seed)
        ours = mixing(images.clone(), labels)
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("options", [{}, {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mix_prob": 0.0}])
def test_without_mixing_the_loss_is_torchs_with_label_smoothing(options: dict[str, float]) -> None:
    (images, labels), (mixed, targets) = mix(7, 5, label_smoothing=0.1, **options)
    logits = torch.randn(7, 5)
    assert torch.equal(mixed, images)
    torch.testing.assert_close(F.cross_entropy(logits, targets), F.cross_entropy(logits, labels, label_smoothing=0.1))


def test_mixing_can_be_left_out_and_smoothing_stays() -> None:
    images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    mixing = BatchMixing(AugmentConfig(random_erasing=0.0, mixup_alpha=0.8, cutmix_alpha=1.0), 4)
    same, targets = mixing(images.clone(), labels, mix=False)
    assert torch.equal(same, images)
    assert torch.allclose(targets, 0.9 * torch.eye(4) + 0.1 / 4)


@pytest.mark.parametrize("there", [False, True])
def test_the_gpu_in_use_is_seeded_too(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stochastic depth and the noise of erasing draw from it."""
    states: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: there)
    monkeypatch.setattr(torch.cuda, "manual_seed", states.append)
    seed_generators(3, 1)
    seed_generators(3, 2)
    assert len(set(states)) == 2 * there


def test_mix_prob_is_the_share_of_mixed_batches() -> None:
    seed_generators(0)
    pairs = [mix(4, 4, mixup_alpha=1.0, mix_prob=0.3) for _ in range(300)]
    share = np.mean([not torch.equal(before, after) for (before, _), (after, _) in pairs])
    assert share == pytest.approx(0.3, abs=0.08)


@pytest.mark.parametrize(("probability", "low", "high"), [(0.0, 0, 0), (0.25, 0.15, 0.35), (1.0, 0.97, 1)])
def test_erasing_has_its_probability_and_leaves_labels_alone(probability: float, low: float, high: float) -> None:
    """At one of the 200 images in a hundred timm finds no rectangle that fits."""
    (images, labels), (erased, targets) = mix(200, 3, random_erasing=probability, label_smoothing=0.0)
    share = (images != erased).flatten(1).any(1).float().mean().item()
    assert low <= share <= high
    assert torch.equal(targets, F.one_hot(labels, 3).float())


def test_erasing_fills_a_rectangle_with_noise() -> None:
    (images, _), (erased, _) = mix(50, 3, random_erasing=1.0)
    for before, after in zip(images[:, 0], erased[:, 0], strict=True):
        changed = before != after
        if changed.any():
            rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
            rectangle = changed[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert rectangle.all()
            assert rectangle.numel() <= 64 / 2
            assert len(after[changed].unique()) == changed.sum()
