"""What is in these images? Top-k classes per image; a file that cannot be read is an answer with an error."""

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from sequencer2d.data.folders import files_below, is_image_file, warn_of_unread
from sequencer2d.data.images import ImageError, open_image
from sequencer2d.data.transforms import EvalTransform
from sequencer2d.files import atomic_file, write_atomic
from sequencer2d.hub import PREFIX
from sequencer2d.inference import answer, best_device
from sequencer2d.weights import load_model
from sequencer2d.zoo import model_in_folder


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The classes of one image, likeliest first, or why there are none."""

    path: str
    classes: tuple[tuple[str, float], ...] = ()
    """Name and probability of the top-k classes."""
    error: str | None = None


def predict(
    model: str | Path, paths: Iterable[str | Path], *, top_k: int = 5, batch_size: int = 32, flips: bool = False
) -> Iterator[Prediction]:
    """Classifies images with the preprocessing that the model's training saved, in the order given, on `best_device`.

    Args:
        model: A model file, the folder of a run, or whatever `load_model` takes.
        paths: Image files, folders (all images below them, sorted), or `-` for one image on standard input.
        top_k: Classes per image, at most all there are.
        batch_size: Images per step.
        flips: Average the logits of each image and its mirror image, as in `evaluate`.

    Raises:
        FileNotFoundError, ModelFileError: There is no such model. (Images raise nothing: see `Prediction.error`.)
        ValueError: `top_k` or `batch_size` is below 1, or the model has no classes.
    """
    if top_k < 1 or batch_size < 1:
        raise ValueError(f"top_k={top_k} and batch_size={batch_size} must be at least 1")
    network, card = load_model(model)
    card.check_channels(model)
    if not card.class_names:
        raise ValueError(f"{model} has weights without a classifier; fine-tune it: sequencer2d train --weights {model}")
    device = best_device()
    network.to(device)
    transform = EvalTransform(card.preprocessing)
    top_k = min(top_k, len(card.class_names))
    files = _files(paths)
    while chunk := list(islice(files, batch_size)):
        parts: list[np.ndarray] = []
        errors: list[str | None] = []
        for path in chunk:
            try:
                source = io.BytesIO(sys.stdin.buffer.read()) if path == "-" else path
                parts.append(transform([open_image(source)], [0]))
                errors.append(None)
            except ImageError as error:
                errors.append(str(error))
        rows: Iterator[tuple[list[float], list[int]]] = iter(())
        if parts:
            pixels = torch.from_numpy(np.concatenate(parts)).to(device)
            with torch.inference_mode():
                logits = answer(network, pixels, card.preprocessing, flips=flips)
                best = logits.softmax(-1).topk(top_k)
            rows = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        for path, error in zip(chunk, errors, strict=True):
            if error is not None:
                yield Prediction(path=path, error=error)
                continue
            probabilities, indices = next(rows)
            names = [card.class_names[index] for index in indices]
            yield Prediction(path=path, classes=tuple(zip(names, probabilities, strict=True)))


def model_and_paths(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The model, or None, and the images of a list in which a model may stand first.

    A model is `hf-hub:…`, a folder that holds one or no image at all, and what has not the extension of an image file.

    Raises:
        ValueError: There is a model and no image.
    """
    first, *others = arguments
    if not _is_model(first):
        return None, list(arguments)
    if not others:
        raise ValueError(f"{first} is no image; name one, behind the model: sequencer2d predict {first} photo.jpg")
    return first, others


def _is_model(text: str) -> bool:
    path = Path(text)
    if path.is_dir():
        return model_in_folder(path) is not None or not _below(path)
    return text.startswith(PREFIX) or not (text == "-" or is_image_file(text))


def _files(paths: Iterable[str | Path]) -> Iterator[str]:
    """Files as they are, folders as the images below them.

    A folder without images, and one that cannot be read, stay, to become an error.
    """
    for path in map(str, paths):
        folder = Path(path)
        below = _below(folder) if path != "-" and folder.is_dir() else []
        yield from below or [path]


def _below(folder: Path) -> list[str]:
    """Folders that cannot be read, and then images."""
    locked: list[str] = []
    files = files_below(folder, folder, on_error=lambda error: locked.append(str(error.filename)))
    warn_of_unread(folder, files)
    return [*locked, *(str(folder / file) for file in files if is_image_file(file))]


Row = tuple[str, int | None, str | None, float | None, str | None]
COLUMNS = ("path", "rank", "class", "probability", "error")
ROW_GROUP = 2**16
"""Rows of a Parquet file that are written, and can be read, together."""


def write_predictions(predictions: Iterable[Prediction], path: Path) -> None:
    """Writes JSON lines, CSV or Parquet, by the file's extension, atomically.

    In the latter two each class of an image is a row of `COLUMNS`; a file that could not be read is one, too. Parquet
    is written as the predictions come, the others at the end.

    Raises:
        ValueError: The extension is none of `.jsonl`, `.csv` and `.parquet`.
        ImportError: `.parquet` without the extra `parquet`.
    """
    if path.suffix == ".parquet":
        _write_parquet(predictions, path)
        return
    if path.suffix not in (".jsonl", ".csv"):
        raise ValueError(f"{path} must end in .jsonl, .csv or .parquet")
    text = io.StringIO(newline="")
    if path.suffix == ".csv":
        writer = csv.writer(text)
        writer.writerow(COLUMNS)
        for file, rank, name, probability, error in _rows(predictions):
            writer.writerow([file, rank, name, "" if probability is None else f"{probability:.6f}", error])
    else:
        for prediction in predictions:
            classes = [{"class": name, "probability": probability} for name, probability in prediction.classes]
            row = {"path": prediction.path, "classes": classes, "error": prediction.error}
            text.write(json.dumps(row, ensure_ascii=False) + "\n")
    write_atomic(path, text.getvalue())


def _rows(predictions: Iterable[Prediction]) -> Iterator[Row]:
    for prediction in predictions:
        if prediction.error is not None:
            yield prediction.path, None, None, None, prediction.error
        for rank, (name, probability) in enumerate(prediction.classes, start=1):
            yield prediction.path, rank, name, probability, None


def _text(name: str) -> str:
    """A file's name with escapes in the place of what is no text."""
    return name.encode(errors="backslashreplace").decode()


def _write_parquet(predictions: Iterable[Prediction], path: Path) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"{path} needs pyarrow: pip install 'sequencer2d[parquet]', or write .csv") from error
    kinds = (pyarrow.string(), pyarrow.int32(), pyarrow.string(), pyarrow.float32(), pyarrow.string())
    schema = pyarrow.schema(list(zip(COLUMNS, kinds, strict=True)))
    rows = _rows(predictions)
    with atomic_file(path) as file, parquet.ParquetWriter(file, schema) as writer:
        while group := list(islice(rows, ROW_GROUP)):
            columns = [
                pyarrow.array([_text(value) if isinstance(value, str) else value for value in column], kind)
                for column, kind in zip(zip(*group, strict=True), kinds, strict=True)
            ]
            writer.write_table(pyarrow.table(columns, schema))
