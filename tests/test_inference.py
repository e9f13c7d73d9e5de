"""What a model answers: with the preprocessing's numbers, of an image alone or with its mirror image, and where."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from sequencer2d.evaluation import evaluate
from sequencer2d.inference import answer, best_device
from sequencer2d.model import Sequencer2D, SequencerConfig
from sequencer2d.native import available
from sequencer2d.prediction import predict
from sequencer2d.preprocessing import Preprocessing

DIGITS = "sequencer2d_conv_p_patch2_16"
PREPROCESSING = Preprocessing(image_size=16)


@pytest.fixture
def model(tiny_config: SequencerConfig) -> Sequencer2D:
    torch.manual_seed(0)
    model = Sequencer2D(tiny_config).eval()
    torch.nn.init.normal_(model.get_parameter("head.fc.weight"))
    return model


@pytest.fixture
def pixels() -> Tensor:
    return torch.randint(0, 256, (3, 16, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@torch.no_grad()
def test_flips_make_left_and_right_the_same_to_a_model_that_tells_them_apart(
    precision: str, model: Sequencer2D, pixels: Tensor
) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        one, mirrored = (answer(model, images, PREPROCESSING) for images in (pixels, pixels.flip(2)))
        both, same = (answer(model, images, PREPROCESSING, flips=True) for images in (pixels, pixels.flip(2)))
    assert one.dtype == both.dtype == torch.float32
    assert (one - mirrored).abs().max() > 0.1
    torch.testing.assert_close(both, same)
    torch.testing.assert_close(both, (one + mirrored) / 2)  # of logits, not of probabilities
    upside_down = answer(model, pixels.flip(1), PREPROCESSING, flips=True)
    assert (both - upside_down).abs().max() > 0.1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which nothing fails")
def test_a_gpu_is_taken_where_there_is_one_but_for_int8(
    photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo.save(tmp_path / "photo.png")
    assert best_device().type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert best_device().type == "cuda"
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        next(predict(DIGITS, [tmp_path / "photo.png"]))
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        evaluate(DIGITS, data="digits")
    if available():
        assert evaluate(DIGITS, data="digits", precision="int8").top1 > 0.9
