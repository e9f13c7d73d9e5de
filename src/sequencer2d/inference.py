"""From the pixels of a batch to what a model answers."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from sequencer2d.data.transforms import normalize
from sequencer2d.peers import Classifier
from sequencer2d.preprocessing import Preprocessing


def best_device() -> torch.device:
    """The current GPU if PyTorch sees one, else the CPU; `CUDA_VISIBLE_DEVICES=` in the environment hides GPUs."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def answer(
    model: Classifier, pixels: UInt8[Tensor, "B H W C"], preprocessing: Preprocessing, *, flips: bool = False
) -> Float[Tensor, "B K"]:
    """Logits in fp32.

    Args:
        model: In evaluation mode, on the device of the pixels.
        pixels: As `EvalTransform` gives them.
        preprocessing: Mean and standard deviation.
        flips: Average the logits of each image and its mirror image, left for right.
    """
    images = normalize(pixels, preprocessing)
    logits = model(images).float()
    return (logits + model(images.flip(3)).float()) / 2 if flips else logits
