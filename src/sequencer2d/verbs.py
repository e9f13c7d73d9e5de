"""The verbs of the command line: options in, calls of the library's functions, tables out."""

import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table

from sequencer2d.cli import DONE, PROBLEM, STOPPED
from sequencer2d.files import write_atomic
from sequencer2d.tables import print_evaluation, print_measurements, print_report
from sequencer2d.terminal import VerbParser, log_to_screen, printable, progress_bar, progress_bars

if TYPE_CHECKING:
    from sequencer2d.training.config import TrainConfig


def train(arguments: list[str]) -> int:
    """`sequencer2d train`"""
    from sequencer2d.training.recipes import add_config_options, find_recipe

    parser = VerbParser("sequencer2d train", description="Train a Sequencer2D; without options: the embedded digits.")
    add_config_options(parser)
    seeds_help = "train with each of these seeds, such as 0,1,2, and sum up"
    parser.add_argument("--seeds", type=str | None, default=None, help=seeds_help)
    for position, argument in enumerate(arguments):
        if argument == "--config" and position + 1 < len(arguments):
            arguments[position + 1] = str(find_recipe(arguments[position + 1]))
        elif argument.startswith("--config="):
            arguments[position] = f"--config={find_recipe(argument.removeprefix('--config='))}"
    named = parser.parse_args(arguments, defaults=False).as_dict()
    given = set(named) - {"config", "seeds"}
    if not {"config", "data"} & set(named) and named.get("resume", "auto") in ("auto", "never"):
        arguments = ["--config", str(find_recipe("digits")), *arguments]
    options = parser.parse_args(arguments)
    del options["config"]
    seeds = options.pop("seeds")
    from sequencer2d.training.config import TrainConfig

    config = TrainConfig(**parser.instantiate(options).as_dict())
    from sequencer2d.training.callbacks import StopRequested
    from sequencer2d.training.ranks import is_first_process

    first = is_first_process()
    log_to_screen(logging.INFO if first else logging.CRITICAL)
    try:
        return _train_once(config, given, first) if seeds is None else _train_seeds(config, seeds, first)
    except StopRequested:
        if first:
            print("stopped before training began; give the same command again", file=sys.stderr)
        return STOPPED


def _train_once(config: "TrainConfig", given: set[str], first: bool) -> int:
    """`sequencer2d train` without `--seeds`"""
    from sequencer2d.training.run import train as run_training

    result = run_training(config, given)
    if not first:
        return DONE if result.finished else STOPPED
    if not result.finished:
        again = f"sequencer2d train --resume {result.run_dir}"
        print(f"stopped after {result.updates:,} updates; continue with: {again}", file=sys.stderr)
        return STOPPED
    assert result.evaluation is not None
    print(f"best validation accuracy {result.val_top1:.2%}, {result.minutes:.1f} minutes, {result.updates:,} updates")
    if result.evaluation.split == "test":
        print(f"test accuracy {result.evaluation.top1:.2%} of {result.evaluation.num_images:,} images")
    if result.skipped:
        print(f"{len(result.skipped)} images could not be read; result.json and the report name them")
    print(f"model  {result.run_dir / 'model.safetensors'}")
    print(f"report {result.run_dir / 'report.html'}")
    return DONE


def _train_seeds(config: "TrainConfig", seeds: str, first: bool) -> int:
    """`sequencer2d train --seeds`"""
    from sequencer2d.training.seeds import HEADINGS, train_seeds

    if not re.fullmatch(r"\d+(,\d+)*", seeds):
        raise ValueError(f"--seeds {seeds}: give whole numbers with commas between them, such as 0,1,2")
    result = train_seeds(config, [int(seed) for seed in seeds.split(",")])
    if not first:
        return DONE if result.finished else STOPPED
    if not result.finished:
        print(f"stopped after {len(result.runs)} seeds; continue with the same command", file=sys.stderr)
        return STOPPED
    table = Table(*(Column(heading, justify="right") for heading in HEADINGS), box=None)
    for row in result.rows():
        table.add_row(*row)
    Console().print(table)
    print(f"seeds  {result.run_dir / 'seeds.json'}")
    return DONE


def evaluate(arguments: list[str]) -> int:
    """`sequencer2d evaluate`"""
    from sequencer2d.evaluation import evaluate as run_evaluation

    parser = VerbParser("sequencer2d evaluate", description="Evaluate a model on one split of a data set.")
    parser.add_function_arguments(run_evaluation, as_positional=True, skip={"progress", "flips"})
    parser.add_argument("--flips", action="store_true", help=_FLIPS_HELP)
    parser.add_argument("--json", type=str | None, default=None, help="file to write everything to, as JSON")
    options = parser.parse_args(arguments).as_dict()
    json_file = options.pop("json")
    _check_folder("json", json_file)
    result = run_evaluation(**options)
    try:
        print_evaluation(result)
    finally:  # whatever becomes of the screen
        if json_file:
            write_atomic(Path(json_file), json.dumps(result.to_dict(), indent=2, ensure_ascii=False))
    return PROBLEM if result.skipped else DONE


_FLIPS_HELP = "average the logits of each image and its mirror image"


def predict(arguments: list[str]) -> int:
    """`sequencer2d predict`"""
    from sequencer2d.prediction import Prediction, model_and_paths, write_predictions
    from sequencer2d.prediction import predict as run_prediction
    from sequencer2d.weights import load_model
    from sequencer2d.zoo import DEFAULT_MODEL

    parser = VerbParser(
        "sequencer2d predict",
        description="Print the likeliest classes of images. What stands first is a model, unless it has the extension "
        "of an image, or is a folder of images.",
    )
    model_help = "model file, folder of a run, name of a model with weights (sequencer2d models), or hf-hub:user/name; "
    model_help += f"where none is given, {DEFAULT_MODEL} of the package answers"
    parser.add_argument("model", nargs="?", help=model_help)
    parser.add_argument("paths", nargs="+", help="image files, folders, or - for an image on standard input")
    parser.add_argument("--top_k", type=int, default=5, help="classes per image")
    parser.add_argument("--batch_size", type=int, default=32, help="images per step")
    parser.add_argument("--flips", action="store_true", help=_FLIPS_HELP)
    parser.add_argument("--output", type=str | None, default=None, help="file to write to: .jsonl, .csv or .parquet")
    options = parser.parse_args(parser.options_first(arguments))
    _check_folder("output", options.output)
    model, paths = model_and_paths([*filter(None, [options.model]), *options.paths])
    if model is None:
        model = DEFAULT_MODEL
        _, card = load_model(model)
        classes = f"{len(card.class_names)} classes: {', '.join(card.class_names[:10])}"
        more = ", …" if len(card.class_names) > 10 else ""
        print(f"no model is named: {model} of the package answers, with {classes}{more}", file=sys.stderr)
    failed = 0

    def printed() -> Iterator[Prediction]:
        nonlocal failed
        settings = {"top_k": options.top_k, "batch_size": options.batch_size, "flips": options.flips}
        for prediction in run_prediction(model, paths, **settings):
            failed += prediction.error is not None
            classes = ", ".join(f"{name} {probability:.1%}" for name, probability in prediction.classes)
            line = f"error: {prediction.error}" if prediction.error else f"{prediction.path}: {classes}"
            try:
                print(printable(line), flush=True)
            except BrokenPipeError:  # the reader of our output, such as `head`, has gone
                if not options.output:
                    raise
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            yield prediction

    if options.output:
        write_predictions(printed(), Path(options.output))
    else:
        for _ in printed():
            pass
    return PROBLEM if failed else DONE


def prepare(arguments: list[str]) -> int:
    """`sequencer2d prepare`"""
    if arguments[:1] == ["shards"]:
        return _prepare_shards(arguments[1:])
    parser = VerbParser(
        "sequencer2d prepare",
        description="Make a data set ready for training: ROOT/NAME/{train,val,test}/CLASS/FILE and classes.json. "
        "It can be interrupted at any time and run again; the source is only read.",
    )
    parser.add_argument("name", help="cifar10, cifar100, tiny-imagenet, imagenet, or a name for images of yours")
    parser.add_argument("--root", type=str, required=True, help="folder that the data set, and downloads, go to")
    source_help = (
        "official archive or its folder; for imagenet the folder of the three archives; for images of yours a "
    )
    source_help += "folder, zip or tar of them. CIFAR and Tiny-ImageNet are downloaded where none is given"
    parser.add_argument("--source", type=str | None, default=None, help=source_help)
    fraction_help = "share of validation images, split off where images of yours come without"
    parser.add_argument("--val_fraction", type=float, default=0.1, help=fraction_help)
    parser.add_argument("--seed", type=int, default=0, help="seed of that split")
    options = parser.parse_args(arguments).as_dict()
    from sequencer2d.data.prepare import prepare as run_preparation

    with progress_bars() as progress:
        result = run_preparation(**options, progress=progress)
    images = ", ".join(f"{count:,} {split}" for split, count in result.num_images.items())
    print(f"{result.folder}: {images} images of {result.num_classes:,} classes")
    for note in result.notes:
        print(f"note: {note}")
    print(f"train on it: sequencer2d train --data {result.folder}")
    return DONE


def check(arguments: list[str]) -> int:
    """`sequencer2d check`"""
    from sequencer2d.data.catalog import find_folder
    from sequencer2d.data.check import check_folder

    parser = VerbParser(
        "sequencer2d check",
        description="Look at every image of a folder: unreadable files, empty classes, the same or nearly the same "
        "picture in two splits or classes (exit status 1), and what is worth knowing. Nothing in it is changed.",
    )
    parser.add_argument("data", help="folder of images, or a data set of the catalogue that is made of files")
    parser.add_argument("--data_root", type=str | None, default=None, help="folder of a data set of the catalogue")
    parser.add_argument("--json", type=str | None, default=None, help="file to write everything to, as JSON")
    parser.add_argument("--no_cache", action="store_true", help="look at every image again, and remember nothing")
    parser.add_argument("--workers", type=int | None, default=None, help="processes; default: one per core")
    options = parser.parse_args(arguments)
    if options.workers is not None and options.workers < 0:
        raise ValueError(f"--workers {options.workers} must be at least 0")
    _check_folder("json", options.json)
    log_to_screen()
    folder = find_folder(options.data, root=options.data_root)
    with progress_bar("images") as advance:
        report = check_folder(folder, workers=options.workers, cache=not options.no_cache, progress=advance)
    try:
        print_report(report)
    finally:  # whatever becomes of the screen
        if options.json:
            write_atomic(Path(options.json), json.dumps(report.to_dict(), indent=2))
    if report.findings and not options.json:
        print("--json FILE lists every file")
    return PROBLEM if report.wrong else DONE


def _check_folder(option: str, file: str | None) -> None:
    """Raises FileNotFoundError before minutes of work where the file that it is written to would have no folder."""
    if file and not Path(file).parent.is_dir():
        raise FileNotFoundError(f"--{option} {file}: {Path(file).parent}: no such folder; make it first")


def _prepare_shards(arguments: list[str]) -> int:
    """`sequencer2d prepare shards`"""
    from sequencer2d.data.catalog import load_data
    from sequencer2d.data.shards import INDEX, write_shards

    parser = VerbParser(
        "sequencer2d prepare shards",
        description="Write a data set as WebDataset shards, to train on with --data FOLDER or the folder's URL.",
    )
    parser.add_argument("--source", type=str, required=True, help="data set by name, or a folder of images")
    parser.add_argument("--root", type=str, required=True, help="folder to make")
    parser.add_argument("--data_root", type=str | None, default=None, help="where a named data set lies")
    parser.add_argument("--images_per_shard", type=int, default=1000, help="aim at 50 to 200 MB a shard")
    parser.add_argument(
        "--val_fraction", type=float, default=0.1, help="part held out where no validation set is given"
    )
    parser.add_argument("--seed", type=int, default=0, help="of that split")
    options = parser.parse_args(arguments)
    root = Path(options.root).expanduser()
    data = load_data(options.source, root=options.data_root, val_fraction=options.val_fraction, seed=options.seed)
    there = (root / INDEX).is_file()
    with progress_bar("images") as advance:
        shards = write_shards(data, root, images_per_shard=options.images_per_shard, progress=advance)
    for split in dict.fromkeys(shard.split for shard in shards):
        chosen = [shard for shard in shards if shard.split == split]
        images, size = sum(shard.num_images for shard in chosen), sum(shard.size for shard in chosen)
        print(f"{split:<6} {images:,} images in {len(chosen):,} shards, {size / 1e6:,.1f} MB")
    print(f"list   {root / INDEX}")
    if there:
        print("note: it was there already and is unchanged; to make it anew, remove it first")
    return DONE


def models(arguments: list[str]) -> int:
    """`sequencer2d models`"""
    from sequencer2d.flops import costs
    from sequencer2d.zoo import VARIANTS, list_models, packaged_file

    parser = VerbParser(
        "sequencer2d models",
        description="List the variants, with 1,000 classes, and what one image costs: multiply-accumulates with the "
        "LSTMs counted, and the memory of activations in fp32 (half of it in bf16) in training and in inference. Some "
        "have weights, in the package or on the Hugging Face hub. More: docs/models.md.",
    )
    parser.add_argument("contains", nargs="?", default="", help="only names that contain this text")
    parser.add_argument(
        "--image_size", type=str, help="side in pixels, or height and width such as 448x320; default: the variant's"
    )
    options = parser.parse_args(arguments)
    given = None if options.image_size is None else _height_width(options.image_size)
    names = list_models(options.contains)
    if not names:
        raise ValueError(f"no model's name contains {options.contains!r} (all: sequencer2d models)")
    headings = ("params", "image", "MACs", "MiB train", "MiB infer")
    numbers = (Column(heading, justify="right", no_wrap=True) for heading in headings)
    table = Table(Column("name", no_wrap=True), *numbers, "weights", box=None, padding=(0, 1, 0, 0))
    for name in names:
        variant = VARIANTS[name]
        height, width = given or (variant.image_size, variant.image_size)
        cost = costs(variant.config, (height, width))
        table.add_row(
            name,
            f"{cost.parameters / 1e6:.2f} M",
            f"{height}²" if height == width else f"{height}×{width}",
            f"{cost.macs / 1e9:.2f} G",
            f"{cost.training_activations * 4 / 2**20:.0f}",
            f"{cost.inference_activations * 4 / 2**20:.1f}",
            "package" if packaged_file(name) else "hub" if variant.hub_id else "–",
        )
    Console().print(table)
    return DONE


def benchmark(arguments: list[str]) -> int:
    """`sequencer2d benchmark`"""
    from sequencer2d.benchmarking.comparison import benchmark as run_benchmark
    from sequencer2d.benchmarking.comparison import records

    parser = VerbParser(
        "sequencer2d benchmark",
        description="Time our implementation and others on this CPU in turn: each in a process of its own, with the "
        "same weights and images, and what it computes is checked. Exit status 1 where one fails.",
    )
    parser.add_function_arguments(run_benchmark, as_positional=False)
    json_help = "file to write a line of JSON to for each: all steps, memory, versions, machine"
    parser.add_argument("--json", type=str | None, default=None, help=json_help)
    options = parser.parse_args(arguments).as_dict()
    json_file = options.pop("json")
    _check_folder("json", json_file)
    log_to_screen()
    found = run_benchmark(**options)
    if json_file:
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records(found))
        write_atomic(Path(json_file), "".join(lines))
    print_measurements(found)
    return PROBLEM if any(measurement.error for measurement in found) else DONE


def _height_width(text: str) -> tuple[int, int]:
    """Of `448` or `448x320`. Raises ValueError for other texts."""
    match = re.fullmatch(r"([1-9]\d{0,5})(?:[x×]([1-9]\d{0,5}))?", text)
    if not match:
        raise ValueError(f"--image-size {text} must be a side in pixels such as 448, or height and width, 448x320")
    return int(match[1]), int(match[2] or match[1])
