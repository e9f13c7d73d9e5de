"""Mixup, CutMix, label smoothing and random erasing: what training does to whole batches, on the device."""

import random

import numpy as np
import torch
from jaxtyping import Float, Int64
from timm.data.mixup import Mixup, cutmix_bbox_and_lam, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from sequencer2d.data.augment import AugmentConfig


class BatchMixing:
    """timm's mixing and then erasing of a batch, of odd sizes too; label smoothing is applied here and only here."""

    def __init__(self, augment: AugmentConfig, num_classes: int) -> None:
        self.num_classes = num_classes
        self.label_smoothing = augment.label_smoothing
        self.random_erasing = RandomErasing(augment.random_erasing or 0.0, mode="pixel", device="cpu")
        self.mixup = None
        if augment.mixup_alpha or augment.cutmix_alpha:
            self.mixup = _FrugalMixup(
                mixup_alpha=augment.mixup_alpha or 0.0,
                cutmix_alpha=augment.cutmix_alpha or 0.0,
                prob=augment.mix_prob,
                label_smoothing=augment.label_smoothing,
                num_classes=num_classes,
            )

    def erase(self, images: Float[Tensor, "B C H W"], seeds: list[tuple[int, ...]]) -> Float[Tensor, "B C H W"]:
        """Erases in place, by a seed for every image, to which the global generators are set.

        Comes after the mixing, as in the official loader.
        """
        if self.random_erasing.probability:
            self.random_erasing.device = str(images.device)
            for image, seed in zip(images, seeds, strict=True):
                seed_generators(*seed)
                self.random_erasing(image)
        return images

    def __call__(
        self, images: Float[Tensor, "B C H W"], labels: Int64[Tensor, "B"], *, mix: bool = True
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
        """Mixed images and their soft targets, each row of which sums to 1. `images` may be changed in place.

        timm mixes pairs, so the last image of an odd batch stays itself. With `mix` off, all of them do. What is drawn
        does not depend on the size of the batch, so that shares of one are mixed alike.
        """
        if self.mixup is None or not mix:
            return images, mixup_target(labels, self.num_classes, smoothing=self.label_smoothing)
        even = len(images) - len(images) % 2
        if even == len(images):
            return self.mixup(images, labels)
        targets = mixup_target(labels, self.num_classes, smoothing=self.label_smoothing)
        if even:
            _, targets[:even] = self.mixup(images[:even], labels[:even])
        return images, targets


class _FrugalMixup(Mixup):
    """timm's to the bit, without its copy of the whole batch where that costs most: on a CPU."""

    def _mix_batch(self, x: Tensor) -> float:
        if x.device.type != "cpu":
            return super()._mix_batch(x)
        lam, cutmix = self._params_per_batch()
        if lam == 1.0:
            return 1.0
        if cutmix:
            (top, bottom, left, right), lam = cutmix_bbox_and_lam(
                x.shape, lam, ratio_minmax=self.cutmix_minmax, correct_lam=self.correct_lam
            )
            box = x[:, :, top:bottom, left:right]
            box.copy_(box.flip(0))
            return lam
        half = len(x) // 2
        few = max(1, _CACHED_FLOATS // x[0].numel())
        for start in range(0, half, few):
            stop = min(start + few, half)
            one, other = x[start:stop], x[len(x) - stop : len(x) - start]
            share_of_one, share_of_other = (part.flip(0).mul_(1 - lam) for part in (one, other))
            one.mul_(lam).add_(share_of_other)
            other.mul_(lam).add_(share_of_one)
        return lam


_CACHED_FLOATS = 2**17
"""Half a megabyte, a few of which fit the cache of a core."""


def seed_generators(*seed: int) -> None:
    """Seeds the global generators that training draws from by some numbers ≥ 0: Python's, NumPy's, PyTorch's for CPU
    and the GPU in use."""
    state = int(np.random.SeedSequence(seed).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.default_generator.manual_seed(state)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(state)
