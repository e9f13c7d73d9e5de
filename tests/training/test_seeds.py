"""Several seeds on one split: each run continues or stays as it is, and the sum is right."""

import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from runs import make_images, stop_at, tiny_run
from sequencer2d.cli import DONE, STOPPED, WRONG_INPUT, main
from sequencer2d.evaluation import evaluate
from sequencer2d.training import machine
from sequencer2d.training.config import TrainConfig
from sequencer2d.training.seeds import SeedRun, SeedsResult, train_seeds
from sequencer2d.weights import load_model


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return replace(tiny_run(tmp_path), epochs=1, run_dir=str(tmp_path / "seeds"))


def test_runs_share_their_validation_images_and_differ_otherwise(config: TrainConfig) -> None:
    result = train_seeds(replace(config, seed=5), [0, 7])
    assert result.finished
    folders = [result.run_dir / f"seed-{seed}" for seed in (0, 7)]
    splits = [(folder / "split.json").read_text() for folder in folders]
    assert splits[0] == splits[1]
    models = [load_model(folder) for folder in folders]
    assert [card.training["seed"] for _, card in models] == [0, 7]
    assert [card.training["split_seed"] for _, card in models] == [5, 5]
    weights = [model.get_parameter("stages.0.blocks.0.mlp_channels.fc1.weight") for model, _ in models]
    assert not weights[0].equal(weights[1])
    top1 = [evaluate(folder, split="val").top1 for folder in folders]
    assert top1 == pytest.approx([run.val_top1 for run in result.runs])


def test_a_stopped_seed_goes_on_and_a_finished_one_is_not_repeated(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 5 + 2)  # in the second run
        stopped = train_seeds(config, [0, 1])
    assert not stopped.finished
    assert [run.seed for run in stopped.runs] == [0]
    first = (stopped.run_dir / "seed-0" / "model.safetensors").stat().st_mtime_ns
    result = train_seeds(config, [0, 1])
    assert [run.seed for run in result.runs] == [0, 1]
    assert (result.run_dir / "seed-0" / "model.safetensors").stat().st_mtime_ns == first
    with pytest.raises(ValueError, match=r"seed-0 holds a finished run of another config \(epochs\)"):
        train_seeds(replace(config, epochs=2), [0, 1])


def test_mean_and_sample_deviation() -> None:
    runs = tuple(
        SeedRun(seed=seed, val_top1=val, test_top1=test, minutes=1.5)
        for seed, val, test in ((0, 0.9, 0.8), (1, 0.92, 0.7), (2, 0.97, 0.75))
    )
    result = SeedsResult(run_dir=Path("x"), runs=runs, finished=True)
    assert result.mean_and_std("test_top1") == (pytest.approx(0.75), pytest.approx(0.05))
    mean, std = result.mean_and_std("val_top1") or (0, 0)
    assert (mean, std) == (pytest.approx(0.93), pytest.approx(statistics.stdev([0.9, 0.92, 0.97])))
    assert result.rows()[-1] == ("mean ± std", "93.00 ± 3.61 %", "75.00 ± 5.00 %", "4.5")
    one = replace(result, runs=runs[:1])
    assert one.mean_and_std("val_top1") == (0.9, None)
    assert one.rows()[-1][1] == "90.00 %"
    no_test = replace(result, runs=(*runs, replace(runs[0], test_top1=None)))
    assert no_test.mean_and_std("test_top1") is None
    assert no_test.rows()[-1][2] == "–"


def test_the_files_say_what_the_result_says(config: TrainConfig) -> None:
    result = train_seeds(config, [3])
    saved = json.loads((result.run_dir / "seeds.json").read_text())
    assert saved == result.to_dict()
    assert saved["mean"] == {"val_top1": result.runs[0].val_top1}
    assert saved["std"] == {"val_top1": None}
    lines = (result.run_dir / "table.md").read_text().splitlines()
    assert lines[0] == "| seed | validation top-1 | test top-1 | minutes |"
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["3", "mean ± std"]


@pytest.mark.parametrize(
    ("change", "seeds", "message"),
    [({}, [], "one or more"), ({}, [1, 2, 1], "each of them once"), ({"resume": "runs/a"}, [1], "names one run")],
)
def test_wrong_seeds_are_named(change: dict[str, str], seeds: list[int], message: str, config: TrainConfig) -> None:
    with pytest.raises(ValueError, match=message):
        train_seeds(replace(config, **change), seeds)  # type: ignore[arg-type]


def test_a_folder_of_one_run_is_no_place_for_seeds(config: TrainConfig) -> None:
    folder = Path(config.run_dir or "")
    folder.mkdir()
    (folder / "config.yaml").write_text("")
    with pytest.raises(ValueError, match="holds a single run"):
        train_seeds(config, [0])


TINY = ["--model-args.embed_dims", "[8,8]", "--model-args.hidden_sizes", "[2,2]", "--model-args.stem_widths", "[8]"]


def test_the_command_prints_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "colours")
    command = ["train", "--data", "colours", *TINY, "--epochs", "1", "--batch-size", "5", "--seeds", "0,1"]
    with monkeypatch.context() as patch:
        stop_at(patch, 5 + 2)
        assert main(command) == STOPPED
    assert "stopped after 1 seeds" in capsys.readouterr().err
    assert main(command) == DONE
    out = capsys.readouterr().out
    assert "mean ± std" in out
    assert "runs/colours-auto-seeds/seeds.json" in out
    assert json.loads(Path("runs/colours-auto-seeds/seeds.json").read_text())["finished"]
    assert main(["train", "--seeds", "0-2"]) == WRONG_INPUT
    assert "--seeds 0-2: give whole numbers" in capsys.readouterr().err


def test_all_seeds_train_in_the_precision_of_the_first(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a probe of this processor may turn out the next time."""
    ratios = iter((0.9, 2.0, 2.0))
    monkeypatch.setattr(machine, "_bf16_speedup", lambda: next(ratios))
    config = replace(config, precision="auto")
    folders = [Path(config.run_dir or "") / f"seed-{seed}" for seed in (0, 1)]
    train_seeds(config, [0, 1])
    saved = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in folders]
    assert [run["precision"] for run in saved] == ["fp32", "fp32"]
    assert train_seeds(config, [0, 1]).finished
