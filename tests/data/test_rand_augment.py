"""Every operation is Pillow's, all but large shears and shifts to the bit; choices are distributed as timm's."""

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment
from timm.data.auto_augment import AugmentOp, rand_augment_transform

from sequencer2d.data import rand_augment
from sequencer2d.data.rand_augment import RandAugment
from sequencer2d.data.transforms import uniforms

FILL = (10, 200, 90)
NAMES = sorted({*auto_augment._RAND_TRANSFORMS, *auto_augment._RAND_INCREASING_TRANSFORMS})


def pictures(side: int, count: int = 12) -> np.ndarray:
    """Smooth and noisy ones, one of a single colour, one with a constant channel, one in few dark levels."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 4, 4, 3)).astype(np.uint8)
    images = np.stack([np.asarray(Image.fromarray(c).resize((side, side), Image.Resampling.BICUBIC)) for c in coarse])
    images[0] = rng.integers(0, 256, (side, side, 3))
    images[1] = 7
    images[2, ..., 1] = 0
    images[3] = rng.integers(20, 24, (side, side, 3))
    return images


@pytest.mark.parametrize("side", [1, 2, 32, 33, 120])
@pytest.mark.parametrize("name", NAMES)
def test_every_operation_is_pillows(name: str, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(side)
    augment = RandAugment("rand-m9", fill=FILL, interpolation="bicubic")
    augment.functions = {name: auto_augment.NAME_TO_OP[name]}
    for level in (0.0, 3.3, 7.7, 9.2, 10.0):
        for sign in (-1.0, 1.0):
            monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value, sign=sign: sign * value)
            options: dict[str, Any] = {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
            op = AugmentOp(name, prob=1.0, magnitude=level, hparams=options)  # type: ignore[arg-type]
            expected = np.stack([np.asarray(op(Image.fromarray(image))) for image in images])
            ours = images.copy()
            arguments: list[Any] = [rand_augment._ARGUMENTS[name](level / 10, sign * level / 10)] * len(images)
            augment.apply(ours, np.array([name] * len(images)), arguments, np.zeros(len(images)))
            tolerance = 1 if name in rand_augment._OFFSETS and side > rand_augment._PILLOW_SIZE else 0
            difference = np.abs(ours.astype(int) - expected)
            assert difference.max() <= tolerance, f"{name} at {sign * level}"


def test_images_without_arguments_are_left_alone() -> None:
    images = pictures(32)
    ours = images.copy()
    augment = RandAugment("rand-m9", fill=FILL, interpolation="random")
    augment.apply(ours, np.array(["Invert"] * len(images)), [None] * len(images), np.zeros(len(images)))
    np.testing.assert_array_equal(ours, images)


class Recorder:
    """Stands in for timm's function of one operation and notes what it is called with."""

    def __init__(self, name: str, calls: list[tuple[str, tuple[Any, ...], Any]]) -> None:
        self.name, self.calls = name, calls

    def __call__(self, image: Any, *arguments: Any, **options: Any) -> Any:
        resample = options["resample"]
        if isinstance(resample, tuple):  # timm draws inside the function
            resample = random.choice(resample)
        self.calls.append((self.name, arguments, resample))
        return image


@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "rand-m5-n3-p0.8", "rand-m9-mstdinf-inc1", "rand-m20-mmax30"]
)
def test_calls_are_distributed_as_timms(policy: str) -> None:
    """Of 30,000 draws each: how often an operation and a resampling come, sign, mean and spread of the argument."""
    count = 30_000
    theirs: list[Any] = []
    transform: Any = rand_augment_transform(policy, {"img_mean": FILL})
    for op in transform.ops:
        op.aug_fn = Recorder(op.name, theirs)
    random.seed(0)
    np.random.seed(0)
    for _ in range(count):
        transform(None)
    ours: list[Any] = []

    class Recording(RandAugment):
        def apply(
            self, images: Any, names: np.ndarray, arguments: list[tuple[Any, ...] | None], interpolate: np.ndarray
        ) -> None:
            calls = zip(names, arguments, map(self._resample, interpolate), strict=True)
            ours.extend(call for call in calls if call[1] is not None)

    augment = Recording(policy, fill=FILL, interpolation="random")
    seeds = np.random.default_rng(1).integers(2**63, size=count)
    augment(np.zeros((count, 1, 1, 3), np.uint8), uniforms(seeds, augment.num_randoms))

    def summary(calls: list[Any]) -> dict[str, tuple[float, ...]]:
        names = Counter(name for name, _, _ in calls)
        values = {name: np.array([a[0] if a else 0.0 for n, a, _ in calls if n == name], dtype=float) for name in names}
        return {
            name: (names[name] / count, values[name].mean(), values[name].std(), (values[name] < 0).mean())
            for name in sorted(names)
        }

    expected, found = summary(theirs), summary(ours)
    assert set(found) == set(expected)
    for name, (share, mean, spread, negative) in expected.items():
        tolerance = 5 * max(spread, 1e-9) * np.sqrt(2 / (share * count))
        assert found[name][0] == pytest.approx(share, rel=0.1), name
        assert found[name][1] == pytest.approx(mean, abs=tolerance + 1e-6), name
        assert found[name][2] == pytest.approx(spread, rel=0.1, abs=1e-6), name
        assert found[name][3] == pytest.approx(negative, abs=0.05), name
    bicubic = sum(resample == Image.Resampling.BICUBIC for _, _, resample in ours) / len(ours)
    assert bicubic == pytest.approx(0.5, abs=0.02)
