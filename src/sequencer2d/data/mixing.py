"""Mixup, CutMix, label smoothing and random erasing: what training does to whole batches, on the device."""

from jaxtyping import Float, Int64
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from sequencer2d.data.augment import AugmentConfig


class BatchMixing:
    """timm's erasing and mixing for one batch, of odd sizes too; label smoothing is applied here and only here."""

    def __init__(self, augment: AugmentConfig, num_classes: int) -> None:
        self.num_classes = num_classes
        self.label_smoothing = augment.label_smoothing
        self.erase = RandomErasing(augment.random_erasing or 0.0, mode="pixel", device="cpu")
        self.mixup = None
        if augment.mixup_alpha or augment.cutmix_alpha:
            self.mixup = Mixup(
                mixup_alpha=augment.mixup_alpha or 0.0,
                cutmix_alpha=augment.cutmix_alpha or 0.0,
                prob=augment.mix_prob,
                label_smoothing=augment.label_smoothing,
                num_classes=num_classes,
            )

    def __call__(
        self, images: Float[Tensor, "B C H W"], labels: Int64[Tensor, "B"], *, mix: bool = True
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
        """Mixed images and their soft targets, each row of which sums to 1. `images` may be changed in place.

        timm mixes pairs, so the last image of an odd batch stays itself. With `mix` off, all of them do.
        """
        if self.erase.probability:
            self.erase.device = str(images.device)
            images = self.erase(images)
        if self.mixup is None or not mix:
            return images, mixup_target(labels, self.num_classes, smoothing=self.label_smoothing)
        even = len(images) - len(images) % 2
        if even == len(images):
            return self.mixup(images, labels)
        targets = mixup_target(labels, self.num_classes, smoothing=self.label_smoothing)
        if even:
            _, targets[:even] = self.mixup(images[:even], labels[:even])
        return images, targets
