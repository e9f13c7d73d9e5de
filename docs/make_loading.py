"""Measures how fast training images come from our loaders and from timm's, and writes docs/loading.md.

`python docs/make_loading.py FOLDER_32 FOLDER_64 PHOTOGRAPHS`: image folders with images of 32 and 64 pixels and of any
size. Of timm, without a worker and with one, the faster counts. With `CLOCK=process` in the environment the time that
this process computes is printed, for machines that others use, too; timm's worker, which is another, is left out.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from timm.data import FastCollateMixup, ImageDataset, create_loader

from sequencer2d.data.augment import SMALL_IMAGE_SIZE, AugmentConfig
from sequencer2d.data.folders import load_folder
from sequencer2d.data.images import IMAGE_EXTENSIONS
from sequencer2d.data.loaders import CachedImages, TrainLoader
from sequencer2d.data.mixing import BatchMixing
from sequencer2d.data.transforms import TrainTransform, normalize
from sequencer2d.preprocessing import Preprocessing
from sequencer2d.training.machine import describe_machine, tune_allocator

tune_allocator()  # for all contenders

DOCS = Path(__file__).parent
POLICY = "rand-m9-mstd0.5-inc1"
BATCH_SIZE = 64
ROUNDS = 7
CLOCK = time.process_time if os.environ.get("CLOCK") == "process" else time.perf_counter
AUGMENT = AugmentConfig(
    crop="random-resized", hflip=0.5, auto_augment=POLICY, random_erasing=0.25, mixup_alpha=0.8, cutmix_alpha=1.0
)

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


def ours(folder: Path, side: int, num_workers: int) -> Batches:
    data = load_folder(folder, val_fraction=0.01, seed=0)
    preprocessing = Preprocessing(image_size=side)
    images = CachedImages(data.train) if side <= SMALL_IMAGE_SIZE else data.train
    transform = TrainTransform(AUGMENT, preprocessing)
    loader = TrainLoader(images, transform, batch_size=BATCH_SIZE, seed=0, num_workers=num_workers)
    mix = BatchMixing(AUGMENT, len(data.class_names))
    while True:
        for batch in loader:
            yield mix(normalize(batch.images, preprocessing), batch.labels)


def timms(folder: Path, side: int, num_workers: int) -> Batches:
    root = folder / "train" if (folder / "train").is_dir() else folder
    data = ImageDataset(str(root))
    classes = len(data.reader.class_to_idx)
    loader = create_loader(
        data,
        (3, side, side),
        BATCH_SIZE,
        is_training=True,
        re_prob=0.25,
        re_mode="pixel",
        hflip=0.5,
        auto_augment=POLICY,
        interpolation="random",
        num_workers=num_workers,
        collate_fn=FastCollateMixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=classes),
        device=torch.device("cpu"),
        pin_memory=False,
        persistent_workers=num_workers > 0,
    )
    while True:
        yield from loader


def rate(batches: Batches, num_batches: int) -> float:
    start = CLOCK()
    for _ in range(num_batches):
        images, targets = next(batches)
        assert images.dtype == targets.dtype == torch.float32
    return num_batches * BATCH_SIZE / (CLOCK() - start)


def few(folder: Path, scratch: Path) -> Path:
    """Links to at most 2,000 images in all, so that the warm-up reads each of them once, to few images several.

    Of less than a batch timm makes no batch.
    """
    train = folder / "train" if (folder / "train").is_dir() else folder
    classes = [path for path in sorted(train.iterdir()) if path.is_dir()]
    for path in classes:
        (scratch / path.name).mkdir(parents=True)
        files = [file for file in sorted(path.rglob("*.*")) if file.suffix.lower() in IMAGE_EXTENSIONS]
        for file in files[: 2000 // len(classes)]:
            for copy in range(max(1, 2 * BATCH_SIZE // len(files))):
                (scratch / path.name / f"{copy}-{file.name}").symlink_to(file.resolve())
    return scratch


def measure(folder: Path, side: int) -> dict[str, Any]:
    makers: dict[str, Callable[[], Batches]] = {
        "ours": lambda: ours(folder, side, 0),
        "timm, no worker": lambda: timms(folder, side, 0),
        "timm, one worker": lambda: timms(folder, side, 1),
    }
    if CLOCK is time.process_time:
        del makers["timm, one worker"]
    contenders = {name: make() for name, make in makers.items()}
    num_batches = 60 if side <= SMALL_IMAGE_SIZE else 12
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for batches in contenders.values():
        rate(batches, max(num_batches, len(list(folder.rglob("*.*"))) // BATCH_SIZE + 1))  # warm-up: an epoch
    for _ in range(ROUNDS):
        for name, batches in contenders.items():
            rates[name].append(rate(batches, num_batches))
            time.sleep(1)  # timm's worker reads two batches ahead, which must not fall into another's time
    return {name: statistics.median(values) for name, values in rates.items()}


def main(folders: list[str]) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    rows = {}
    for folder, side in zip(folders, (32, 64, 224), strict=True):
        with tempfile.TemporaryDirectory() as scratch:
            found = measure(few(Path(folder), Path(scratch, "images")), side)
        best = max(value for name, value in found.items() if name != "ours")
        rows[side] = {**found, "ratio": found["ours"] / best}
        print(side, rows[side])
    if CLOCK is time.process_time:
        return
    environment = {**describe_machine(), "command": "python docs/make_loading.py CIFAR10 TINY_IMAGENET PHOTOGRAPHS"}
    (DOCS / "loading.json").write_text(json.dumps({"rows": rows, "environment": environment}, indent=1) + "\n")
    lines = [
        "# Loading",
        "",
        "Training images per second and core, from our loader and from `timm.data.create_loader`, by",
        "`python docs/make_loading.py CIFAR10 TINY_IMAGENET PHOTOGRAPHS`: the same augmentation (random-resized crop,",
        f"flip, RandAugment `{POLICY}`, random erasing, mixup or CutMix), normalised float batches of {BATCH_SIZE}",
        "with soft targets; one core for everything, the contenders in turn in one process, one allocator setting,",
        f"an epoch of warm-up, medians of {ROUNDS} rounds. Small images are in memory after the first epoch, augmented",
        "in batches (`data/transforms.py`, `data/rand_augment.py`); JPEGs go from simplejpeg's decoder to the resize",
        "without a copy, and are decoded smaller where the crop has twice the pixels that are needed, which few of",
        "these photographs of 500×400 pixels have. That the distributions are timm's is tested in",
        "tests/data/test_transforms.py, test_rand_augment.py, test_shear.py and test_mixing.py.",
        "",
        "| images | ours | timm, no worker | timm, one worker | ours over the better |",
        "| --- | --- | --- | --- | --- |",
    ]
    for side, row in rows.items():
        rates = " | ".join(f"{row[name]:,.0f}" for name in ("ours", "timm, no worker", "timm, one worker"))
        lines.append(f"| {side}² | {rates} | {row['ratio']:.2f} |")
    packages = ", ".join(f"{name} {environment['packages'][name]}" for name in ("torch", "timm", "pillow"))
    lines += ["", f"Commit {environment['commit']}, {environment['cpu']}, {packages}."]
    (DOCS / "loading.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
