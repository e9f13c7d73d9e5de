"""Progressive resizing: training begins with small images, which are quick, and ends at full size.

The images come out of the loader at full size and are made smaller on the device, so that nothing but the number of
the epoch tells their size, whatever the workers have read ahead.
"""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sequencer2d.training.finetune_config import ProgressiveConfig


def size_in(epoch: int, config: ProgressiveConfig, image_size: int, stride: int) -> int:
    """Side of the training images in an epoch, counted from 0: on a line from the start to full size.

    Args:
        epoch: Whole epochs done.
        config: Resolved, that is with `epochs` where it has a `start_size`.
        image_size: Full size in pixels.
        stride: Of the whole model, of which smaller sizes are multiples.
    """
    if config.start_size is None or config.epochs is None or epoch >= config.epochs:
        return image_size
    size = config.start_size + (image_size - config.start_size) * epoch / config.epochs
    return min(image_size, max(stride, round(size / stride) * stride))


def resized(images: Float[Tensor, "B C H W"], size: int) -> Float[Tensor, "B C S S"]:
    """The images at another size, smoothed where they become smaller."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True)
