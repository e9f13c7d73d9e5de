"""How good is a model? Accuracy, loss, calibration and confusions on one split of a data set."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix

from sequencer2d.data.catalog import ImageData, ImageSet, is_same_data, load_data
from sequencer2d.data.loaders import eval_loader
from sequencer2d.data.transforms import EvalTransform, normalize
from sequencer2d.inference import answer, best_device
from sequencer2d.model import Sequencer2D
from sequencer2d.peers import Classifier, Peer
from sequencer2d.preprocessing import Preprocessing
from sequencer2d.provenance import check_split, warn_of_seen
from sequencer2d.quantization import quantize
from sequencer2d.weights import ModelCard, load_model
from sequencer2d.zoo import find_model_file

EvalPrecision = Literal["fp32", "bf16", "int8"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result on one split; fractions lie in 0…1."""

    data: str
    split: str
    num_images: int
    top1: float
    top5: float | None
    """Fraction whose class is among the five likeliest; None for fewer than six classes."""
    loss: float
    """Mean cross-entropy in nats."""
    ece: float
    """Expected calibration error over 15 bins of confidence."""
    class_names: tuple[str, ...]
    confusion: list[list[int]]
    """Rows are the true classes, columns the predicted ones."""
    per_class: list[dict[str, Any]]
    """Name, number of images, recall and precision of each class; None where there is nothing to divide by."""
    skipped: list[str]
    """One message for each image that could not be read; they count nowhere."""
    image_size: int
    """Side of the square that the model saw, in pixels."""
    flips: bool = False
    """Whether the logits are means over an image and its mirror image."""
    precision: str = "fp32"
    """Of the model's arithmetic."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def evaluate(
    model: str | Path,
    *,
    data: str | None = None,
    data_root: str | None = None,
    split: Literal["train", "val", "test"] | None = None,
    precision: EvalPrecision = "fp32",
    flips: bool = False,
    image_size: int | None = None,
    batch_size: int = 128,
    num_workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluates a model file or run on a split, with the preprocessing that its training saved.

    Example: `evaluate("runs/digits", image_size=20).top1`

    The validation split is cut from the training images just as the model's own training did it. Of other data that are
    not divided all images are evaluated. The arithmetic is done on a GPU if there is one (`best_device`), int8 on the
    CPU.

    Args:
        model: A model file or the folder of a run.
        data: Data set or folder; default: what the model was trained on.
        data_root: Where a named data set lies.
        split: Default: test where there is one, else val; all images of other data that have neither.
        precision: Of the arithmetic. int8 measures its ranges on validation images, or on training images where those
            are evaluated or there are none.
        flips: Average the logits of each image and its mirror image: better by a little, at twice the time, unless
            left and right matter, as of digits and letters.
        image_size: Side in pixels that images are resized to; default: that of the training. The part that is cut out
            and the interpolation stay.
        batch_size: Images per step.
        num_workers: Processes that decode images.
        progress: Called with the number of images done and in all.

    Raises:
        FileNotFoundError, ModelFileError, ValueError: The model, the data or the split is missing, or their classes
            differ; `image_size` is below 1, or one that the model does not take.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size={image_size} must be at least 1")
    if batch_size < 1 or num_workers < 0:
        raise ValueError(f"batch_size={batch_size} must be at least 1, and num_workers={num_workers} at least 0")
    if precision not in (precisions := get_args(EvalPrecision)):
        raise ValueError(f"precision={precision!r} must be one of {', '.join(precisions)}")
    network, card = load_model(model)
    card.check_channels(model)
    preprocessing = replace(card.preprocessing, image_size=image_size or card.preprocessing.image_size)
    if isinstance(network, Peer):
        network.check_size(preprocessing.image_size)
    trained = card.training
    if data is None and "data" not in trained:
        lies = f"where the {trained['trained_on']} lies that it was trained on" if "trained_on" in trained else ""
        raise ValueError(f"{model} does not say {lies or 'what it was trained on'}; give --data")
    own = data is None or is_same_data(data, trained.get("data", ""))
    images = load_data(
        data or trained["data"],
        root=data_root or (trained.get("data_root") if data is None else None),
        val_fraction=trained.get("val_fraction", 0.1) if own or split else None,
        seed=trained.get("split_seed", trained.get("seed", 0)),
    )
    check_classes(card, images)
    run_dir = find_model_file(model).parent
    chosen = split or ("test" if images.test else "val" if len(images.val) else "all")
    if own and (data is None or chosen != "test") and (run_dir / "split.json").exists():
        check_split(run_dir, images)
    if not own and chosen in ("val", "all") and images.val_source != "given":
        warn_of_seen(run_dir, get_split(images, chosen), data=images.name, split=chosen)
    if precision == "int8":
        if not isinstance(network, Sequencer2D):
            raise ValueError(f"{model} is a {card.architecture}, and int8 is for Sequencers; give --precision bf16")
        others = images.val if len(images.val) and chosen != "val" else images.train
        network = quantize(network, calibration_images(others, preprocessing))
    device = torch.device("cpu") if precision == "int8" else best_device()
    network.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        evaluation, _ = evaluate_images(
            network,
            preprocessing,
            get_split(images, chosen),
            data=images.name,
            split=chosen,
            class_names=card.class_names,
            flips=flips,
            batch_size=batch_size,
            num_workers=num_workers,
            progress=progress,
        )
    return replace(evaluation, precision=precision)


def calibration_images(images: ImageSet, preprocessing: Preprocessing, count: int = 128) -> Float[Tensor, "N C H W"]:
    """Up to `count` images from all over a set, as the model takes them, for `quantize`; unreadable ones are left out.

    Raises:
        ValueError: Not one image could be read.
    """
    places = np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(np.int64)
    few = eval_loader(images.subset(places), EvalTransform(preprocessing), batch_size=32)
    batches = [normalize(batch.images, preprocessing) for batch in few if len(batch.images)]
    if not batches:
        raise ValueError("there is no readable image to measure the ranges of int8 on")
    return torch.cat(batches)


def get_split(data: ImageData, split: str) -> ImageSet:
    """The images of `train`, `val` or `test`; `all` of a set that is not divided.

    Raises:
        ValueError: The data set has no such split.
    """
    images = {"train": data.train, "val": data.val, "test": data.test, "all": data.train}.get(split)
    if images is None:
        there = "train, val" if data.test is None else "train, val, test"
        raise ValueError(f"{data.name} has no split {split!r}; there are {there}")
    return images


def check_classes(card: ModelCard, data: ImageData) -> None:
    """Raises ValueError, naming the differences, unless the model's classes are the data's, in the same order."""
    if data.has_classes(card.class_names):
        return
    lacking = [name for name in card.class_names if name not in data.class_names]
    unknown = [name for name in data.class_names if name not in card.class_names]
    details = [
        f"{text} {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
        for text, names in (("the data lack", lacking), ("the model does not know", unknown))
        if names
    ] or ["they are ordered differently"]
    raise ValueError(
        f"the model has {len(card.class_names)} classes and {data.name} has {len(data.class_names)}, not the same: "
        f"{'; '.join(details)}"
    )


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model said of each image that could be read."""

    probabilities: Float[np.ndarray, "N K"]
    indices: Int64[np.ndarray, "N"]
    """Of the images in their `ImageSet`."""


@torch.inference_mode()
def evaluate_images(
    model: Classifier,
    preprocessing: Preprocessing,
    images: ImageSet,
    *,
    data: str,
    split: str,
    class_names: tuple[str, ...],
    flips: bool = False,
    batch_size: int = 128,
    num_workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Evaluation, Answers]:
    """Evaluates on given images; also returns what the model said of each.

    Raises:
        ValueError: Not one image could be read.
    """
    model.eval()
    device = next(model.parameters()).device
    all_logits: list[Tensor] = []
    all_labels: list[Tensor] = []
    all_indices: list[Tensor] = []
    skipped: list[str] = []
    done = 0
    for batch in eval_loader(images, EvalTransform(preprocessing), batch_size=batch_size, num_workers=num_workers):
        skipped += batch.skipped
        if len(batch.images):
            all_logits.append(answer(model, batch.images.to(device), preprocessing, flips=flips).cpu())
            all_labels.append(batch.labels)
            all_indices.append(batch.indices)
        done += len(batch.images) + len(batch.skipped)
        if progress:
            progress(done, len(images))
    if not all_logits:
        reason = f"; the first: {skipped[0]}" if skipped else ""
        raise ValueError(f"{data} has no readable image in {split}{reason}")
    logits, labels = torch.cat(all_logits), torch.cat(all_labels)
    answers = Answers(probabilities=logits.softmax(-1).numpy(), indices=torch.cat(all_indices).numpy())
    result = _summarise(logits, labels, data, split, class_names, skipped, preprocessing.image_size)
    return replace(result, flips=flips), answers


def _summarise(
    logits: Float[Tensor, "N K"],
    labels: Int64[Tensor, "N"],
    data: str,
    split: str,
    class_names: tuple[str, ...],
    skipped: list[str],
    image_size: int,
) -> Evaluation:
    num_classes = len(class_names)
    confusion = multiclass_confusion_matrix(logits, labels, num_classes)
    right, true, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    top5 = None
    if num_classes > 5:
        top5 = (logits.topk(5).indices == labels[:, None]).any(-1).double().mean().item()
    return Evaluation(
        data=data,
        split=split,
        num_images=len(labels),
        top1=right.sum().item() / len(labels),
        top5=top5,
        loss=F.cross_entropy(logits, labels).item(),
        ece=multiclass_calibration_error(logits.softmax(-1), labels, num_classes, n_bins=15).item(),
        class_names=class_names,
        confusion=confusion.tolist(),
        per_class=[
            {
                "name": name,
                "num_images": int(true[k]),
                "recall": int(right[k]) / int(true[k]) if true[k] else None,
                "precision": int(right[k]) / int(predicted[k]) if predicted[k] else None,
            }
            for k, name in enumerate(class_names)
        ],
        skipped=skipped,
        image_size=image_size,
    )
