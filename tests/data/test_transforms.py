"""Evaluation sees what timm would see, training what timm would train on, and every image becomes a square."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import transforms_imagenet_eval, transforms_imagenet_train
from torchvision.transforms import Compose

from sequencer2d.data.loaders import seed_generators
from sequencer2d.data.transforms import eval_transform, normalize, train_transform
from sequencer2d.preprocessing import Preprocessing
from sequencer2d.training.config import AugmentConfig, TrainConfig, resolve

POLICY = "rand-m9-mstd0.5-inc1"


def augment(image_size: int, **options) -> AugmentConfig:
    """Resolved, as a run would."""
    config = TrainConfig(data="photos", augment=AugmentConfig(**options))
    return resolve(config, model="any", image_size=image_size, crop_pct=1.0).augment


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("image_size", "crop_pct"), [(224, 0.875), (32, 1.0), (60, 0.77)])
def test_evaluation_sees_what_timm_sees(
    image_size: int, crop_pct: float, interpolation: str, photo: Image.Image
) -> None:
    preprocessing = Preprocessing(image_size=image_size, crop_pct=crop_pct, interpolation=interpolation)
    reference = transforms_imagenet_eval(image_size, crop_pct=crop_pct, interpolation=interpolation)
    for image in (photo, photo.transpose(Image.Transpose.ROTATE_90)):
        ours = normalize(torch.from_numpy(eval_transform(preprocessing)(image).copy())[None], preprocessing)
        torch.testing.assert_close(ours[0], reference(image), rtol=0, atol=1e-6)


def test_training_sees_what_timm_trains_on(photo: Image.Image) -> None:
    """The paper's crop, flip and RandAugment, image by image with the same random numbers."""
    preprocessing = Preprocessing(image_size=64)
    ours = train_transform(augment(224), preprocessing)
    reference = transforms_imagenet_train(64, auto_augment=POLICY, interpolation="random", normalize=False)
    assert isinstance(reference, Compose)
    for seed in range(20):
        seed_generators(seed)
        theirs = np.asarray(reference(photo)).transpose(1, 2, 0)
        seed_generators(seed)
        np.testing.assert_array_equal(ours(photo), theirs)


@pytest.mark.parametrize("magnitude", range(11))
def test_the_papers_policy_runs_at_every_magnitude(magnitude: int) -> None:
    """timm's posterize fails under Pillow 13; warnings are errors here."""
    transform = train_transform(
        augment(32, auto_augment=f"rand-m{magnitude}-mstd0.5-inc1"), Preprocessing(image_size=32)
    )
    generator = np.random.RandomState(magnitude)
    for size in ((32, 32), (64, 48)):
        image = Image.fromarray(generator.randint(0, 256, (size[1], size[0], 3)).astype(np.uint8))
        for seed in range(40):
            seed_generators(seed)
            assert transform(image).shape == (32, 32, 3)


@pytest.mark.parametrize("size", [(1000, 20), (20, 1000), (2, 2), (2, 300), (33, 32)])
@pytest.mark.parametrize("crop", ["random-resized", "padded"])
def test_an_image_of_any_shape_becomes_a_square_of_bytes(size: tuple[int, int], crop: str) -> None:
    preprocessing = Preprocessing(image_size=24, crop_pct=0.9)
    image = Image.new("RGB", size, "red")
    transforms = [eval_transform(preprocessing), train_transform(augment(24, crop=crop), preprocessing)]
    for transform in transforms:
        for seed in range(10):
            seed_generators(seed)
            pixels = transform(image)
            assert pixels.shape == (24, 24, 3)
            assert pixels.dtype == np.uint8
            np.testing.assert_array_equal(pixels, np.broadcast_to((255, 0, 0), (24, 24, 3)))


def test_the_padded_crop_shifts_by_at_most_an_eighth_within_its_reflection(photo: Image.Image) -> None:
    image = photo.resize((32, 32))
    transform = train_transform(augment(32, hflip=0.0), Preprocessing(image_size=32))
    bordered = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    crops = {bordered[y : y + 32, x : x + 32].tobytes(): (y, x) for y in range(9) for x in range(9)}
    shifts = set()
    for seed in range(300):
        seed_generators(seed)
        shifts.add(crops[transform(image).tobytes()])
    assert {y for y, _ in shifts} == {x for _, x in shifts} == set(range(9))


@pytest.mark.parametrize(("hflip", "flipped"), [(0.0, 0), (1.0, 10)])
def test_flips_have_their_probability(hflip: float, flipped: int, photo: Image.Image) -> None:
    image = photo.resize((8, 8))
    transform = train_transform(
        augment(8, crop="random-resized", scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=hflip, auto_augment="none"),
        Preprocessing(image_size=8),
    )
    mirrored = np.asarray(image)[:, ::-1]
    assert sum(np.array_equal(transform(image), mirrored) for _ in range(10)) == flipped


def test_evaluation_is_not_random_and_leaves_the_image_alone(photo: Image.Image) -> None:
    transform = eval_transform(Preprocessing(image_size=32))
    before, state = copy.deepcopy(photo), random.getstate()
    np.testing.assert_array_equal(transform(photo), transform(photo))
    assert photo == before
    assert random.getstate() == state


def test_normalize_gives_each_channel_its_mean_and_deviation() -> None:
    preprocessing = Preprocessing(image_size=2, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
    images = torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8)
    expected = torch.tensor([(0 - 0.1) / 0.5, (0.2 - 0.2) / 0.25, (1 - 0.3) / 1.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(normalize(images, preprocessing), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size"),
        ({"image_size": 8, "crop_pct": 0.0}, "crop_pct"),
        ({"image_size": 8, "crop_pct": 1.1}, "crop_pct"),
        ({"image_size": 8, "std": (0.2, 0.0, 0.2)}, "std"),
        ({"image_size": 8, "interpolation": "nearest"}, "interpolation='nearest'"),
    ],
)
def test_impossible_preprocessing_is_an_error_that_names_the_field(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing(**options)


@pytest.mark.parametrize("policy", ["bogus", "rand-foo9"])
def test_an_unknown_policy_is_an_error_that_names_it(policy: str) -> None:
    with pytest.raises(ValueError, match=policy):
        augment(32, auto_augment=policy)


@pytest.mark.parametrize("image_size", [32, 224])
def test_transforms_can_be_sent_to_a_spawned_worker(image_size: int, photo: Image.Image) -> None:
    """The start method of macOS and Windows, and on Linux the like of it from Python 3.14 on."""
    preprocessing = Preprocessing(image_size=32)
    for transform in (eval_transform(preprocessing), train_transform(augment(image_size), preprocessing)):
        sent = pickle.loads(pickle.dumps(transform))
        seed_generators(1)
        expected = transform(photo)
        seed_generators(1)
        np.testing.assert_array_equal(sent(photo), expected)
