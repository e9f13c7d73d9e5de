"""Runs from config to folder: what is left on disk, which images are used, and what goes wrong."""

import errno
import itertools
import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from runs import last_checkpoint, make_images, rows, stop_at
from sequencer2d import files
from sequencer2d.data.check import check_folder
from sequencer2d.data.mixing import BatchMixing
from sequencer2d.evaluation import evaluate
from sequencer2d.model import Sequencer2D
from sequencer2d.training import ranks, run
from sequencer2d.training.config import AugmentConfig, TrainConfig
from sequencer2d.training.faults import TrainingError
from sequencer2d.training.muon import Muon
from sequencer2d.training.run import train
from sequencer2d.training.schedule import Clock
from sequencer2d.training.task import SequencerTask
from sequencer2d.weights import ModelFileError, load_model


def test_a_run_leaves_all_that_was_promised(config: TrainConfig) -> None:
    result = train(config)
    assert result.finished
    assert result.evaluation is not None
    names = {path.name for path in result.run_dir.iterdir()}
    assert names >= {
        "config.yaml", "split.json", "environment.json", "metrics.jsonl", "checkpoints", "model.safetensors",
        "last.safetensors", "report.html", "result.json", "tensorboard", "samples",
    }  # fmt: skip
    assert list((result.run_dir / "tensorboard").glob("events.out.tfevents.*"))
    metrics = rows(result.run_dir)
    assert {"train_loss", "learning_rate", "step", "epoch"} <= metrics[0].keys()
    validations = [row for row in metrics if "valid_acc" in row]
    assert [row["epoch"] for row in validations] == [1, 2, 3, 4]
    assert all("val_loss" in row for row in validations)
    model, card = load_model(result.run_dir)
    assert card.class_names == ("blue", "green", "red")
    assert card.training["val_top1"] == result.val_top1 == max(row["valid_acc"] for row in validations)
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 3)
    assert "colours" in (result.run_dir / "report.html").read_text()


def test_it_learns_and_says_so_truly(config: TrainConfig) -> None:
    plain = AugmentConfig(mixup_alpha=0.0, cutmix_alpha=0.0, random_erasing=0.0)
    result = train(replace(config, epochs=30, accumulate=1, augment=plain, model_args={"layers": [1, 1]}))
    assert result.evaluation is not None
    assert result.evaluation.split == "val"
    assert result.evaluation.top1 == 1.0
    assert json.loads((result.run_dir / "result.json").read_text())["evaluation"]["top1"] == 1.0


def test_validation_images_are_never_trained_on(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[bool, set[str]] = {True: set(), False: set()}
    original = Sequencer2D.forward
    means: dict[float, str] = {}

    def forward(self: Sequencer2D, x: torch.Tensor) -> torch.Tensor:
        for image in x:
            seen[torch.is_grad_enabled()].add(means.get(round(image.double().sum().item(), 6), "?"))
        return original(self, x)

    monkeypatch.setattr(Sequencer2D, "forward", forward)
    from sequencer2d.data.catalog import load_data
    from sequencer2d.data.transforms import normalize
    from sequencer2d.preprocessing import Preprocessing

    data = load_data(config.data, val_fraction=config.val_fraction, seed=config.seed)
    for images in (data.train, data.val):
        for index in range(len(images)):
            pixels = torch.from_numpy(np.array(images.image(index)))[None]
            total = normalize(pixels, Preprocessing(image_size=16))[0].double().sum().item()
            means[round(total, 6)] = images.name(index)
    untouched = AugmentConfig(
        crop="random-resized", scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0, interpolation="bicubic"
    )
    train(replace(config, augment=untouched, epochs=2))
    split = json.loads((Path(config.run_dir or "") / "split.json").read_text())
    assert "?" not in seen[True] | seen[False]
    assert seen[True] <= set(split["train"])
    assert seen[False] == set(split["val"])
    assert not seen[True] & seen[False]


def test_a_run_that_ends_inside_an_epoch_is_validated_there(config: TrainConfig) -> None:
    optim = replace(config.optim, cooldown_epochs=0.5)
    result = train(replace(config, epochs=2, optim=optim, accumulate=1))
    validations = [row for row in rows(result.run_dir) if "valid_acc" in row]
    assert [row["epoch"] for row in validations] == pytest.approx([1, 2, 2.5], abs=0.2)
    assert validations[-1]["epoch"] > 2
    assert load_model(result.run_dir / "last.safetensors")[1].training["updates"] == result.updates


def test_the_last_weights_are_a_model_file_too(config: TrainConfig) -> None:
    result = train(config)
    best, last = (load_model(result.run_dir / f"{name}.safetensors")[1] for name in ("model", "last"))
    assert (best.training["which"], last.training["which"]) == ("best", "last")
    validations = [row for row in rows(result.run_dir) if "valid_acc" in row]
    assert last.training["val_top1"] == validations[-1]["valid_acc"]
    assert (last.training["epochs"], last.training["updates"]) == (4, result.updates)
    top1 = evaluate(result.run_dir / "last.safetensors", split="val").top1
    assert top1 == pytest.approx(validations[-1]["valid_acc"])
    checkpoint = torch.load(last_checkpoint(result.run_dir), weights_only=True)["state_dict"]
    for name, tensor in load_file(result.run_dir / "last.safetensors").items():
        assert torch.equal(tensor, checkpoint[f"ema.module.{name}"])


@pytest.mark.parametrize("budget", [None, 1000.0])
def test_the_last_epochs_are_not_mixed(
    budget: float | None, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed: list[bool] = []
    original = BatchMixing.__call__

    def observed(self: BatchMixing, *arguments: Any, **options: Any) -> Any:
        images, targets = original(self, *arguments, **options)
        mixed.append(len(targets.unique()) > 2)  # smoothed labels have two values
        return images, targets

    monkeypatch.setattr(BatchMixing, "__call__", observed)
    augment = replace(config.augment, mixing_off_epochs=1)
    train(replace(config, augment=augment, max_minutes=budget))
    assert len(mixed) == 4 * 5
    assert any(mixed[:15])
    assert not any(mixed[15:])


def test_a_split_of_its_own_seed(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, epochs=1)
    splits = [
        (train(replace(config, run_dir=str(tmp_path / name), **change)).run_dir / "split.json").read_text()
        for name, change in {"a": {"seed": 0}, "b": {"seed": 1, "split_seed": 0}, "c": {"seed": 1}}.items()
    ]
    assert splits[0] == splits[1] != splits[2]
    assert evaluate(tmp_path / "b").split == "val"


def test_options_that_are_given_count_even_if_they_are_the_defaults(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        run_dir = train(replace(config, max_minutes=60.0)).run_dir
    resume = TrainConfig(resume=str(run_dir))
    with pytest.raises(ValueError, match="leave out max_minutes, or begin"):
        train(resume, given={"resume", "max_minutes"})
    assert train(resume, given={"resume", "log_every"}).finished
    saved = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert (saved["log_every"], saved["max_minutes"]) == (resume.log_every, 60.0)
    assert config.log_every != resume.log_every


def test_in_an_sbatch_script_without_srun_one_process_trains_alone(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {
        "JOB_ID": "7",
        "JOB_NAME": "train",
        "NTASKS": "2",
        "NNODES": "1",
        "PROCID": "0",
        "LOCALID": "0",
        "NODEID": "0",
    }
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(ranks, "PATIENCE", timedelta(seconds=3))
    assert train(replace(config, epochs=1)).finished


def test_a_folder_in_use_is_not_written_over(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config, epochs=1)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        train(config)
    with pytest.raises(ValueError, match=r"unfinished run of another config \(seed\)"):
        train(replace(config, seed=1))
    with pytest.raises(ValueError, match="--resume is never"):
        train(replace(config, resume="never"))
    train(config)
    with pytest.raises(ValueError, match="finished run; give another --run-dir"):
        train(config)


def test_the_same_seed_gives_the_same_run(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, epochs=1)
    one, two, other = (
        load_file(train(replace(config, seed=seed, run_dir=str(tmp_path / name))).run_dir / "model.safetensors")
        for seed, name in ((0, "a"), (0, "b"), (1, "c"))
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_a_budget_of_time_ends_the_run_with_an_annealed_learning_rate(config: TrainConfig) -> None:
    result = train(replace(config, epochs=100_000, max_minutes=3 / 60))
    assert result.finished
    assert result.minutes < 12 / 60
    rates = [row["learning_rate"] for row in rows(result.run_dir) if "learning_rate" in row]
    assert rates[-1] < 0.05 * max(rates)


def test_unreadable_images_are_skipped_counted_and_named(config: TrainConfig) -> None:
    broken = Path(config.data) / "red" / "03.png"
    broken.write_bytes(broken.read_bytes()[:200])
    (Path(config.data) / "red" / "x.jpg").write_bytes(b"no image")
    result = train(replace(config, epochs=1))
    assert len(result.skipped) == 2
    assert {"03.png", "x.jpg"} == {message.split(":")[0].rsplit("/", 1)[-1] for message in result.skipped}
    assert json.loads((result.run_dir / "result.json").read_text())["skipped"] == list(result.skipped)
    assert "03.png" in (result.run_dir / "report.html").read_text()


@pytest.fixture
def broken(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two images that cannot be read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names = ["blue/05.png", "red/03.png"]
    for name in names:
        (Path(config.data) / name).write_bytes(b"no image")
    return names


def test_images_that_a_check_found_unreadable_are_left_out_after_splitting(
    config: TrainConfig, broken: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(config, epochs=1)
    unchecked = train(replace(config, run_dir=str(tmp_path / "unchecked")))
    assert len(unchecked.skipped) == 2
    assert not (unchecked.run_dir / "left_out.json").exists()
    check_folder(config.data)
    with caplog.at_level(logging.INFO):
        checked = train(config)
    assert checked.skipped == ()
    assert sorted(json.loads((checked.run_dir / "left_out.json").read_text())) == broken
    (line,) = (message for message in caplog.messages if "left out" in message)
    assert line.startswith("2 images are left out")
    assert line.endswith(str(checked.run_dir / "left_out.json"))
    split, same = ((run.run_dir / "split.json").read_text() for run in (checked, unchecked))
    assert split == same


def test_a_check_meanwhile_does_not_change_a_run_that_goes_on(
    config: TrainConfig, broken: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(replace(config, run_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        train(config)
    check_folder(config.data)
    assert rows(train(config).run_dir) == rows(whole.run_dir)
    again = replace(config, run_dir=str(tmp_path / "again"))
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        train(again)
    for name in broken:
        Image.new("RGB", (16, 16)).save(Path(config.data) / name)
    assert train(again).skipped == ()
    assert sorted(json.loads((tmp_path / "again" / "left_out.json").read_text())) == broken


def test_validation_images_of_which_all_are_left_out_are_an_error(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_images(tmp_path / "split" / "train", count=3)
    for path in make_images(tmp_path / "split" / "val", count=1).rglob("*.png"):
        path.write_bytes(b"")
    check_folder(tmp_path / "split")
    with pytest.raises(ValueError, match="too few readable images"):
        train(replace(config, data=str(tmp_path / "split")))


def test_validation_images_of_which_none_can_be_read_are_an_error(config: TrainConfig, tmp_path: Path) -> None:
    make_images(tmp_path / "split" / "train", count=3)
    for path in make_images(tmp_path / "split" / "val", count=1).rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(TrainingError, match="not one validation image"):
        train(replace(config, data=str(tmp_path / "split")))


def test_fine_tuning_begins_a_new_head_for_other_classes(config: TrainConfig, tmp_path: Path) -> None:
    donor = train(replace(config, epochs=1)).run_dir
    two = make_images(tmp_path / "two", {"cyan": (40, 200, 200), "pink": (200, 40, 200)})
    tuned = train(replace(config, epochs=1, data=str(two), weights=str(donor), run_dir=str(tmp_path / "tuned")))
    _, card = load_model(tuned.run_dir)
    assert card.class_names == ("cyan", "pink")
    wider = replace(config, model_args={}, weights=str(donor), run_dir=str(tmp_path / "wider"))
    with pytest.raises(ModelFileError, match="train the same --model"):
        train(wider)
    assert not (tmp_path / "wider").exists()


def test_a_loss_that_is_no_number_stops_with_advice(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sequencer2D, "forward_head", lambda self, x, pre_logits=False: self.head(x) * float("nan"))
    with pytest.raises(TrainingError, match=r"out of range at update 0: loss nan.*lower --optim\.learning-rate"):
        train(config)


@pytest.mark.parametrize(
    ("precision", "optimizer"), [("fp32", "adamw"), ("bf16", "adamw"), ("fp32", "muon"), ("bf16", "muon")]
)
def test_gradients_are_clipped_in_every_precision(
    precision: Literal["fp32", "bf16"],
    optimizer: Literal["adamw", "muon"],
    config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    norms: list[float] = []
    kind = Muon if optimizer == "muon" else torch.optim.AdamW
    original: Callable[..., Any] = kind.step

    def step(self: torch.optim.Optimizer, closure: Any = None) -> Any:
        def observed() -> Any:
            loss = closure()
            gradients = [p.grad.norm() for group in self.param_groups for p in group["params"] if p.grad is not None]
            norms.append(torch.stack(gradients).norm().item())
            return loss

        return original(self, observed)

    monkeypatch.setattr(kind, "step", step)
    optim = replace(config.optim, optimizer=optimizer, clip_grad_norm=1e-3)
    train(replace(config, precision=precision, optim=optim, epochs=1))
    assert norms
    assert max(norms) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "sequencer2d_x"}, "did you mean"),
        ({"model_args": {"num_classes": 7}}, "num_classes=7, but colours has 3 classes"),
        ({"model_args": {"in_chans": 1}}, "in_chans=1"),
        ({"model_args": {"layer": [1]}}, "did you mean layers"),
        ({"data": "cifar11"}, "cifar10"),
        ({"precision": "fp16"}, "needs a GPU"),
    ],
)
def test_wrong_input_is_named_before_anything_is_written(
    change: dict[str, Any], message: str, config: TrainConfig
) -> None:
    if "precision" in change and torch.cuda.is_available():
        pytest.skip("this machine has a GPU, where fp16 works")
    with pytest.raises(ValueError, match=message):
        train(replace(config, **change))
    assert not Path(config.run_dir or "").exists()


def test_a_full_disk_leaves_the_last_checkpoint_and_model_whole(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    original: Callable[[int], None] = os.fsync
    counter = itertools.count()

    def fsync(handle: int) -> None:
        if next(counter) > 6:  # config, split and environment, then model and checkpoint of an epoch or more
            raise OSError(errno.ENOSPC, "No space left on device")
        original(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(
        TrainingError, match=r"disk is full .*No space left .*(model\.safetensors|step-.*ckpt|metrics\.jsonl).*--resume"
    ):
        train(config)
    monkeypatch.undo()
    run_dir = Path(config.run_dir or "")
    load_model(run_dir)
    torch.load(last_checkpoint(run_dir), weights_only=True)
    assert [path.name for path in run_dir.rglob(".*") if path.is_file()] == [".lock"]
    assert train(config).finished


def test_a_run_folder_that_cannot_be_written_is_an_error_at_once(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        train(replace(config, run_dir=str(tmp_path / "file")))
    with pytest.raises(OSError, match="file"):
        train(replace(config, run_dir=str(tmp_path / "file" / "below")))


def test_weights_that_know_the_validation_images_are_told(
    config: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    first = replace(config, epochs=1, run_dir=f"{config.run_dir}-1")
    train(first)
    told = "was trained on images that are for validation now"

    def tells(number: int, **changes: Any) -> bool:
        caplog.clear()
        train(replace(first, weights=first.run_dir, run_dir=f"{config.run_dir}-{number}", **changes))
        return told in caplog.text

    assert not tells(2)
    assert tells(3, seed=1)
    assert "--split-seed 0 --val-fraction 0.25 makes its own split" in caplog.text
    assert not tells(4, seed=1, split_seed=0)
    (Path(first.run_dir or "") / "split.json").unlink()
    assert tells(5, val_fraction=0.5)
    assert not tells(6)
    assert not tells(7, seed=1, data=str(make_images(Path(config.data).with_name("others"))))


def test_the_final_evaluation_takes_no_more_than_training_did_and_its_backend(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, backends = [], set()
    original = run.evaluate_images

    def noting(model: Any, *arguments: Any, **options: Any) -> Any:
        sizes.append(options["batch_size"])
        backends.update(part.backend for part in model.modules() if hasattr(part, "backend"))
        return original(model, *arguments, **options)

    monkeypatch.setattr(run, "evaluate_images", noting)
    train(replace(config, epochs=1, backend="torch"))
    assert (sizes, backends) == ([5], {"torch"})


def test_time_for_the_first_validation_is_kept_free(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimated once half of the time is over; a first epoch that is longer than the budget would take it all."""
    seen: list[float] = []
    monkeypatch.setattr(Clock, "elapsed_s", property(lambda self: 60 * 40 * min(1, len(seen) / 4)))
    monkeypatch.setattr(SequencerTask, "images_per_s", property(lambda self: 0.01))
    original = SequencerTask.on_before_optimizer_step

    def noting(self: SequencerTask, *arguments: Any) -> None:
        original(self, *arguments)
        seen.append(self.clock.reserve_s)

    monkeypatch.setattr(SequencerTask, "on_before_optimizer_step", noting)
    train(replace(config, max_minutes=60.0, accumulate=1))
    assert seen[:4] == [0, 0, 0, 0]
    assert seen[4] == 9 / 0.01  # nine images at a hundredth of one a second
    assert seen[-1] < 60  # as measured
