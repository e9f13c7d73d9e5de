"""Evaluation sees what timm would see, training what timm would train on, and every image becomes a square."""

import copy
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy.stats import ks_2samp, kstest
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.data.transforms_factory import transforms_imagenet_eval, transforms_imagenet_train
from torchvision.transforms import Compose

from sequencer2d.data.images import open_image
from sequencer2d.data.transforms import EvalTransform, TrainTransform, normalize, uniforms
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
        ours = normalize(torch.from_numpy(EvalTransform(preprocessing)([image], [0])), preprocessing)
        torch.testing.assert_close(ours[0], reference(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("size", "draws"), [(64, 1500), (100, 500)])
def test_training_sees_what_timm_trains_on(size: int, draws: int, photo: Image.Image) -> None:
    """The paper's crop, flip and RandAugment: mean and spread of many things, of small and large images."""
    preprocessing = Preprocessing(image_size=size)
    ours = TrainTransform(augment(224), preprocessing)([photo] * draws, range(draws))
    reference = transforms_imagenet_train(size, auto_augment=POLICY, interpolation="random", normalize=False)
    assert isinstance(reference, Compose)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    theirs = np.stack([np.asarray(reference(photo)).transpose(1, 2, 0) for _ in range(draws)])
    for name, statistic in STATISTICS.items():
        one, other = (np.array([statistic(image.astype(float)) for image in images]) for images in (ours, theirs))
        error = np.hypot(one.std(), other.std()) / np.sqrt(draws)
        assert abs(one.mean() - other.mean()) < 4 * error, name
        assert one.std() == pytest.approx(other.std(), rel=6 / np.sqrt(draws)), name


STATISTICS: dict[str, Callable[[np.ndarray], float]] = {
    "mean": np.mean,
    "deviation": np.std,
    "dark": lambda image: (image < 8).mean(),
    "bright": lambda image: (image > 247).mean(),
    "left to right": lambda image: (image * np.linspace(-1, 1, image.shape[1])[:, None]).mean(),
    "top to bottom": lambda image: (image * np.linspace(-1, 1, len(image))[:, None, None]).mean(),
    "roughness": lambda image: np.abs(np.diff(image, axis=1)).mean(),
    "colourfulness": lambda image: image.std(axis=2).mean(),
}
"""Numbers of an augmented image whose distribution is compared."""


@pytest.mark.parametrize("size", [(300, 200), (64, 64), (40, 200)])
def test_crops_are_distributed_as_timms(size: tuple[int, int]) -> None:
    """Area, aspect ratio and place of the cut, by a Kolmogorov-Smirnov test that one in a thousand equal ones fails."""
    image = Image.new("RGB", size)
    transform = TrainTransform(augment(224), Preprocessing(image_size=32))
    boxes = transform.boxes(np.array([size] * 4000), uniforms(np.arange(4000), 23))
    random.seed(0)
    torch.manual_seed(0)
    params = [RandomResizedCropAndInterpolation.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    theirs = np.array([(left, top, left + width, top + height) for top, left, height, width in params])
    for one, other in zip(box_features(boxes), box_features(theirs), strict=True):
        assert ks_2samp(one, other).pvalue > 1e-3  # type: ignore[operator]


def box_features(boxes: np.ndarray) -> list[np.ndarray]:
    left, top, right, bottom = boxes.T
    return [(right - left) * (bottom - top), (right - left) / (bottom - top), left, top, (left + right) / 2]


def test_large_photographs_are_decoded_smaller_without_loss_for_the_crop(photo: Image.Image, tmp_path: Path) -> None:
    smooth = photo.filter(ImageFilter.GaussianBlur(4)).resize((1500, 1000), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "large.jpg", quality=95)
    transform = TrainTransform(augment(224, auto_augment="none"), Preprocessing(image_size=100))
    whole = open_image(tmp_path / "large.jpg")
    sizes, differences = set(), []
    for seed in range(40):
        reduced = open_image(tmp_path / "large.jpg", transform.reduction(seed))
        sizes.add(reduced.size)
        left, upper, right, lower = transform.boxes(np.array([reduced.size]), uniforms(np.array([seed]), 23))[0]
        assert min(right - left, lower - upper) >= 99
        one, other = (transform([image], [seed])[0].astype(float) for image in (reduced, whole))
        differences.append(np.abs(one - other).mean())
    assert np.mean(differences) < 5
    assert {(188, 125), (375, 250), (750, 500)} <= sizes <= {(188, 125), (375, 250), (750, 500), (1500, 1000)}


def test_evaluation_decodes_whole_images() -> None:
    assert EvalTransform(Preprocessing(image_size=64)).reduction(0) is None


def test_random_numbers_are_uniform_and_independent_of_each_other_and_of_the_batch() -> None:
    numbers = uniforms(np.arange(20_000), 5)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert all(kstest(column, "uniform").pvalue > 1e-3 for column in numbers.T)
    correlations = np.corrcoef(np.concatenate([numbers.T[:, :-1], numbers.T[:, 1:]])) - np.eye(10)
    assert np.abs(correlations).max() < 0.05
    np.testing.assert_array_equal(uniforms(np.array([7, 3]), 3)[1], uniforms(np.array([3]), 5)[0, :3])


def test_what_happens_to_an_image_follows_from_its_seed_alone(photo: Image.Image) -> None:
    transform = TrainTransform(augment(32, auto_augment=POLICY), Preprocessing(image_size=32))
    other = photo.transpose(Image.Transpose.ROTATE_90)
    together = transform([photo, other, photo, other], [4, 5, 6, 4])
    for position, (image, seed) in enumerate(((photo, 4), (other, 5), (photo, 6), (other, 4))):
        np.testing.assert_array_equal(transform([image], [seed])[0], together[position])


@pytest.mark.parametrize("magnitude", range(11))
def test_the_papers_policy_runs_at_every_magnitude(magnitude: int) -> None:
    """timm's posterize fails under Pillow 13; warnings are errors here."""
    for size in (32, 100):
        policy = f"rand-m{magnitude}-mstd0.5-inc1"
        transform = TrainTransform(augment(32, auto_augment=policy), Preprocessing(image_size=size))
        noise = np.random.RandomState(magnitude).randint(0, 256, (48, 64, 3)).astype(np.uint8)
        assert transform([Image.fromarray(noise)] * 40, range(40)).shape == (40, size, size, 3)


@pytest.mark.parametrize("size", [(1000, 20), (20, 1000), (2, 2), (2, 300), (33, 32)])
@pytest.mark.parametrize("crop", ["random-resized", "padded"])
def test_an_image_of_any_shape_becomes_a_square_of_bytes(size: tuple[int, int], crop: str) -> None:
    preprocessing = Preprocessing(image_size=24, crop_pct=0.9)
    image = Image.new("RGB", size, "red")
    for transform in (EvalTransform(preprocessing), TrainTransform(augment(24, crop=crop), preprocessing)):
        pixels = transform([image] * 10, range(10))
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, np.broadcast_to((255, 0, 0), (10, 24, 24, 3)))


@pytest.mark.parametrize(("changes", "border"), [({}, 4), ({"shift": 1 / 16}, 2), ({"shift": 0.0}, 1)], ids=str)
def test_the_padded_crop_shifts_by_at_most_its_reflected_border(
    changes: dict[str, float], border: int, photo: Image.Image
) -> None:
    image = photo.resize((32, 32))
    transform = TrainTransform(augment(32, hflip=0.0, **changes), Preprocessing(image_size=32))
    bordered = np.pad(np.asarray(image), ((border, border), (border, border), (0, 0)), mode="reflect")
    places = range(2 * border + 1)
    crops = {bordered[y : y + 32, x : x + 32].tobytes(): (y, x) for y in places for x in places}
    shifts = {crops[pixels.tobytes()] for pixels in transform([image] * 300, range(300))}
    assert {y for y, _ in shifts} == {x for _, x in shifts} == set(places)


@pytest.mark.parametrize(("hflip", "flipped"), [(0.0, 0), (1.0, 10)])
def test_flips_have_their_probability(hflip: float, flipped: int, photo: Image.Image) -> None:
    image = photo.resize((8, 8))
    transform = TrainTransform(
        augment(8, crop="random-resized", scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=hflip, auto_augment="none"),
        Preprocessing(image_size=8),
    )
    mirrored = np.asarray(image)[:, ::-1]
    assert sum(np.array_equal(pixels, mirrored) for pixels in transform([image] * 10, range(10))) == flipped


def test_evaluation_is_not_random_and_leaves_the_image_alone(photo: Image.Image) -> None:
    transform = EvalTransform(Preprocessing(image_size=32))
    before = copy.deepcopy(photo)
    np.testing.assert_array_equal(transform([photo], [0]), transform([photo], [1]))
    assert photo == before


def test_normalize_gives_each_channel_its_mean_and_deviation() -> None:
    preprocessing = Preprocessing(image_size=2, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
    images = torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8)
    expected = torch.tensor([(0 - 0.1) / 0.5, (0.2 - 0.2) / 0.25, (1 - 0.3) / 1.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(normalize(images, preprocessing), expected)


@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (3, 300, 300, 3), (40, 60, 50, 3)])
def test_normalize_leaves_no_image_out(shape: tuple[int, ...]) -> None:
    """It takes one, some or all at a time."""
    preprocessing = Preprocessing(image_size=2)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    mean, std = (255 * torch.tensor(values) for values in (preprocessing.mean, preprocessing.std))
    expected = ((images - mean) / std).permute(0, 3, 1, 2)
    normalized = normalize(images, preprocessing)
    torch.testing.assert_close(normalized, expected)
    assert normalized.is_contiguous()


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
    for transform in (EvalTransform(preprocessing), TrainTransform(augment(image_size), preprocessing)):
        sent = pickle.loads(pickle.dumps(transform))
        np.testing.assert_array_equal(sent([photo], [1]), transform([photo], [1]))
