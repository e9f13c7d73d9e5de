"""The command line: exit statuses, one-line errors, complete help, a clean Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sequencer2d.benchmarking import comparison
from sequencer2d.benchmarking.processes import Answers, Entry
from sequencer2d.cli import DONE, PROBLEM, STOPPED, VERBS, WRONG_INPUT, main
from sequencer2d.terminal import VerbParser
from sequencer2d.training import run
from sequencer2d.zoo import list_models

TINY = [
    *("--model", "sequencer2d_conv_p_patch2_16", "--model-args.layers", "[1,1]", "--model-args.embed_dims", "[8,8]"),
    *("--model-args.stem_widths", "[8]", "--model-args.hidden_sizes=[2,2]", "--batch-size", "64", "--epochs", "1"),
]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "digits"
    assert main(["train", "--config", "digits", *TINY, "--run-dir", str(run_dir)]) == DONE
    return run_dir


def test_hyphens_dots_and_recipes_reach_the_config(run_dir: Path) -> None:
    text = (run_dir / "config.yaml").read_text()
    assert "batch_size: 64" in text
    assert "ema_decay: 0.99" in text  # the recipe's
    assert "epochs: 1" in text  # the option's, not the recipe's


def test_train_says_where_model_and_report_are(
    run_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["train", "--config", "digits", *TINY, "--run-dir", str(tmp_path / "run")]) == DONE
    out = capsys.readouterr().out
    assert str(tmp_path / "run" / "model.safetensors") in out
    assert str(tmp_path / "run" / "report.html") in out
    assert "test accuracy" in out


def test_evaluate_prints_a_table_and_writes_json(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run_dir), "--split", "val", "--json", str(tmp_path / "e.json")]) == DONE
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "e.json").read_text())
    assert f"top-1 {result['top1']:.2%}" in out
    assert result["split"] == "val"
    assert "images of 16², fp32" in " ".join(out.split())
    assert main(["evaluate", str(run_dir), "--flips", "--image-size", "20", "--json", str(tmp_path / "f.json")]) == DONE
    assert "images of 20² and their mirror images, fp32" in " ".join(capsys.readouterr().out.split())
    result = json.loads((tmp_path / "f.json").read_text())
    assert (result["flips"], result["image_size"]) == (True, 20)


def test_predict_prints_top_k_and_goes_on_after_a_bad_file(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = sorted((run_dir / "samples").glob("*.png"))[:2]
    bad = tmp_path / "bad.png"
    bad.write_bytes(good[0].read_bytes()[:60])
    assert main(["predict", str(run_dir), str(good[0]), "--top-k", "3"]) == DONE
    plain = capsys.readouterr().out
    assert plain.count("%") == 3
    assert main(["predict", str(run_dir), str(good[0]), "--top-k", "3", "--flips"]) == DONE
    assert capsys.readouterr().out != plain
    status = main(["predict", str(run_dir), str(bad), *map(str, good), "--output", str(tmp_path / "p.jsonl")])
    assert status == PROBLEM
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "bad.png" in lines[0]
    assert lines[0].startswith("error")
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text there")
@pytest.mark.parametrize("extension", ["jsonl", "csv"])
def test_a_name_that_is_no_text_ends_no_prediction(
    extension: str, run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    image = next((run_dir / "samples").glob("*.png")).read_bytes()
    for name in (b"a.png", b"b\xff.png", b"c.png"):
        (tmp_path / os.fsdecode(name)).write_bytes(image)
    (tmp_path / os.fsdecode(b"\xffbad.png")).write_bytes(image[:60])
    output = tmp_path / f"p.{extension}"
    assert main(["predict", str(run_dir), str(tmp_path), "--output", str(output)]) == PROBLEM
    assert len(capfd.readouterr().out.splitlines()) == 4
    text = output.read_text()
    assert r"b\udcff.png" in text
    assert r"\udcffbad.png" in text
    if extension == "jsonl":
        paths = [json.loads(line)["path"] for line in text.splitlines()]
        assert [Path(path).read_bytes()[:4] for path in paths] == [image[:4]] * 4


@pytest.mark.skipif(sys.platform != "linux", reason="needs pipes of POSIX")
def test_a_reader_that_goes_costs_the_screen_and_not_the_file(run_dir: Path, tmp_path: Path) -> None:
    images = [str(path) for path in sorted((run_dir / "samples").glob("*.png"))]
    command = [sys.executable, "-m", "sequencer2d", "predict", str(run_dir), *images, "--output", "p.jsonl"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    os.close(writer)
    assert (done.returncode, done.stderr) == (DONE, "")
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == len(images)


def test_names_of_classes_are_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cat [small]", "dog"):
        for number in range(6):
            file = tmp_path / "pets [old]" / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (40 * number, 90, 200)).save(file)
    (tmp_path / "pets [old]" / "classes.json").write_text('{"cat [small]": "cat [small]", "dog": "dog [/x]"}')
    data, run_dir = ["--data", str(tmp_path / "pets [old]")], str(tmp_path / "run")
    assert main(["train", *data, *TINY, "--batch-size", "4", "--run-dir", run_dir, "--image-size", "16"]) == DONE
    capsys.readouterr()
    assert main(["evaluate", run_dir]) == DONE
    out = capsys.readouterr().out
    assert "cat [small]" in out
    assert "dog [/x]" in out
    assert "pets [old], val" in out


def test_a_run_asked_to_stop_before_it_trains_ends_with_status_75(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "load_data", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["train", *TINY, "--run-dir", str(tmp_path / "run")]) == STOPPED
    assert capsys.readouterr().err == "stopped before training began; give the same command again\n"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["trian"], "did you mean train?"),
        (["train", "--data", "cifar11"], "cifar10"),
        (["train", "--data", "nowhere/at/all"], "nowhere/at/all"),
        (["train", "--model", "sequencer_s"], "sequencer2d_s"),
        (["train", "--config", "digit"], "did you mean digits?"),
        (["train", "--epochs", "0"], "epochs=0"),
        (["train", "--epochs", "many"], "epochs"),
        (["train", "--optim.lerning-rate", "1"], "lerning_rate"),
        (["train", "--precision", "fp8"], "precision"),
        (["train", "--resume", "nowhere"], "nowhere"),
        (["train", "--augment.scale", "[2,1]"], "augment.scale"),
        (["predict", "nowhere", "x.png"], "nowhere"),
        (["predict"], "paths"),
        (["predict", "runs/digits"], "runs/digits is no image"),
        (["predict", "x.png", "--output", "nowhere/at/all.csv"], "nowhere/at: no such folder"),
        (["evaluate", "nowhere"], "nowhere"),
        (["evaluate", "sequencer2d_s", "--json", "nowhere/at/all.json"], "nowhere/at: no such folder"),
        (["models", "--nothing"], "--nothing"),
        (["prepare", "cifar10"], "root"),
        (["prepare", "cifar", "--root", "data"], "did you mean cifar10?"),
        (["prepare", "imagenet", "--root", "data"], "cannot be downloaded"),
        (["prepare", "pets", "--root", "data", "--source", "nowhere"], "nowhere: no such archive or folder"),
        (["prepare", "digits", "--root", "data"], "embedded"),
        (["check"], "data"),
        (["check", "nowhere/at/all"], "nowhere/at/all: no such folder"),
        (["check", "."], "no images"),
        (["check", "cifar10"], "cifar10"),
        (["check", "imagenet"], "root"),
        (["check", ".", "--workers", "-1"], "--workers -1"),
        (["check", ".", "--json", "nowhere/at/all.json"], "nowhere/at: no such folder"),
        (["benchmark", "--against", "tim"], "no contender 'tim': did you mean timm?"),
        (["benchmark", "--mode", "train", "--against", "openvino"], "openvino cannot train"),
        (["benchmark", "--mode", "test"], "mode"),
        (["benchmark", "--precision", "fp8"], "sequencer2d:fp8"),
        (["benchmark", "--model", "sequencer_s"], "sequencer2d_s"),
        (["benchmark", "--rounds", "0"], "rounds=0"),
        (["benchmark", "--json", "nowhere/at/all.jsonl"], "nowhere/at: no such folder"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = main(arguments)
    except SystemExit as error:  # argparse's way
        status = error.code
    captured = capsys.readouterr()
    assert status == WRONG_INPUT
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert hint in captured.err
    assert not list(tmp_path.iterdir())


def test_train_tells_which_options_were_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[int, set[str]]] = []

    def train(config: Any, given: set[str]) -> None:
        asked.append((config.log_every, given))
        raise ValueError

    monkeypatch.setattr(run, "train", train)
    (tmp_path / "mine.yaml").write_text("seed: 0\n")
    options = ["--config", str(tmp_path / "mine.yaml"), "--log-every=10", "--optim.clip-grad-norm", "1"]
    assert main(["train", "--resume", "somewhere", *options]) == WRONG_INPUT
    assert asked == [(10, {"resume", "seed", "log_every", "optim"})]


@pytest.mark.parametrize("options", [[], ["--resume", "auto"], ["--resume=never"], ["--resume", "somewhere"]], ids=str)
def test_without_data_the_digits_are_trained_unless_a_run_is_named(
    options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sequencer2d.training.config import TrainConfig

    asked: list[TrainConfig] = []

    def train(config: TrainConfig, given: set[str]) -> None:
        asked.append(config)
        raise ValueError

    monkeypatch.setattr(run, "train", train)
    assert main(["train", *options]) == WRONG_INPUT
    epochs = TrainConfig().epochs
    assert asked[0].epochs == epochs if "somewhere" in options else asked[0].epochs < epochs


def test_what_stands_behind_two_hyphens_is_no_option() -> None:
    parser = VerbParser("sequencer2d")
    parser.add_argument("--top_k", type=int)
    parser.add_argument("paths", nargs="+")
    options = parser.parse_args(["--top-k", "3", "--", "--my-photo.jpg"])
    assert (options.top_k, options.paths) == (3, ["--my-photo.jpg"])


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_has_a_help_with_every_option_explained(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([verb, "--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    wanted = {
        "train": "--config --model --data --data-root --epochs --max-minutes --batch-size --seed --run-dir --resume "
        "--precision --backend --optim.learning-rate --augment.mixup-alpha --augment.mixing-off-epochs "
        "--finetune.freeze --finetune.layer-decay --distill.teacher --progressive.start-size --early-stopping "
        "--seeds --loggers",
        "evaluate": "model --data --data-root --split --flips --image-size --json",
        "predict": "model paths --top-k --flips --output",
        "prepare": "name --root --source --val-fraction --seed",
        "models": "contains --image-size",
        "check": "data --data-root --json --no-cache --workers",
        "benchmark": "--model --mode --image-size --batch-size --against --precision --allocator --checkpointing "
        "--threads --rounds --json",
    }[verb]
    for option in wanted.split():  # with an explanation, beside it or in the next line
        assert re.search(rf"^  {option}\b([^\n]*  |[^\n]*\n {{10,}})\w", out, flags=re.MULTILINE), option


def test_help_of_the_whole_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == DONE
    assert all(verb in capsys.readouterr().out for verb in ["train"])
    assert main(["--version"]) == DONE
    assert main([]) == WRONG_INPUT


def test_other_classes_or_a_foreign_file_are_wrong_input(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ant", "bee"):
        (tmp_path / "insects" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / "insects" / name / f"{number}.png")
    assert main(["evaluate", str(run_dir), "--data", str(tmp_path / "insects")]) == WRONG_INPUT
    assert "10 classes" in capsys.readouterr().err
    (tmp_path / "weights.pth").write_bytes(b"PK\x03\x04 a zip of pickles")
    assert main(["predict", str(tmp_path / "weights.pth"), "x.png"]) == WRONG_INPUT
    assert "weights.pth cannot be read as weights" in capsys.readouterr().err


def test_models_prints_what_an_image_costs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["models"]) == DONE
    shown = capsys.readouterr().out
    assert all(re.search(rf"^{name} +\d", shown, re.MULTILINE) for name in list_models())
    assert re.search(r"^sequencer2d_s +27\.65 M +224² +8\.36 G .* hub", shown, re.MULTILINE)
    assert main(["models", "conv", "--image-size", "448"]) == DONE
    shown = capsys.readouterr().out
    assert "sequencer2d_xs" not in shown
    assert re.search(r"^sequencer2d_conv_t_patch4_32 +1\.64 M +448² +14\.3\d G", shown, re.MULTILINE)
    assert main(["models", "conv", "--image-size", "448x320"]) == DONE
    shown = capsys.readouterr().out
    assert re.search(r"^sequencer2d_conv_t_patch4_32 +1\.64 M 448×320 +10\.2\d G", shown, re.MULTILINE)
    for size in ("0", "-3", "x", "448x", "448x0", "448x320x3", "448.5"):
        assert main(["models", "--image-size", size]) == WRONG_INPUT
        assert f"--image-size {size} must be a side in pixels" in capsys.readouterr().err
    assert main(["models", "resnet"]) == WRONG_INPUT
    assert "no model's name contains 'resnet'" in capsys.readouterr().err


def make_pets(root: Path, count: int) -> Path:
    random = np.random.RandomState(0)
    for number in range(count):
        folder = root / ("train", "val")[number % 2] / ("cat", "dog")[number // 2 % 2]
        folder.mkdir(parents=True, exist_ok=True)
        squares = Image.fromarray(random.randint(0, 256, (8, 8, 3), dtype=np.uint8))
        squares.resize((64, 64)).save(folder / f"{number}.png")
    return root


def test_check_prints_a_table_writes_json_and_fails_for_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = make_pets(tmp_path / "pets", 20)
    assert main(["check", str(root)]) == DONE
    assert capsys.readouterr().out.splitlines()[-1] == "20 images checked: nothing is wrong"
    image = Image.open(root / "train/cat/0.png").convert("L")
    image.save(root / "train/cat/grey.png")
    assert main(["check", str(root)]) == DONE  # worth knowing
    out = capsys.readouterr().out
    assert "train/cat/grey.png: L: grey becomes RGB" in out
    assert "21 images checked, 20 of them known from an earlier check: nothing is wrong" in out
    for number in range(5):
        (root / f"val/dog/bad\x1b{number}.png").touch()
    assert main(["check", str(root), "--json", str(tmp_path / "check.json")]) == PROBLEM
    out = capsys.readouterr().out
    assert out.count("the file is empty") == 3
    assert "\x1b" not in out
    findings = json.loads((tmp_path / "check.json").read_text())["findings"]
    assert [finding["kind"] for finding in findings] == ["unreadable"] * 5 + ["mode"]


def test_benchmark_prints_a_table_writes_json_lines_and_fails_with_a_contender(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def take_turns(entries: list[Entry], rounds: int) -> list[Answers]:
        failed = Answers(error="ModuleNotFoundError: No module named 'openvino'")
        seconds = {"timm:fp32": 0.3, "sequencer2d:bf16": 0.1}
        return [
            Answers(rounds=[[seconds[entry.contender]]] * rounds, before_mib=50, peak_mib=150)
            if entry.contender in seconds
            else failed
            for entry in entries
        ]

    monkeypatch.setattr(comparison, "take_turns", take_turns)
    monkeypatch.setenv("COLUMNS", "100")
    command = ["benchmark", "--image-size", "32", "--batch-size", "2", "--threads", "1", "--precision", "bf16"]
    assert main([*command, "--against", "timm:fp32"]) == DONE
    out = capsys.readouterr().out
    assert "infer sequencer2d_s, 32², batch 2, 1 threads, tuned allocator" in out
    assert re.search(r"^sequencer2d:bf16 +100\.0 +– +– +20\.0 +3\.00 +\(3\.00–3\.00\) +100 +150", out, re.MULTILINE)
    file = tmp_path / "b.jsonl"
    assert main([*command, "--against", "timm:fp32,openvino:bf16", "--json", str(file)]) == PROBLEM
    assert "failed: openvino:bf16: ModuleNotFoundError: No module named 'openvino'" in capsys.readouterr().out
    records = {record["contender"]: record for record in map(json.loads, file.read_text().splitlines())}
    assert list(records) == ["timm:fp32", "openvino:bf16", "sequencer2d:bf16"]
    assert records["sequencer2d:bf16"]["speedup"] == pytest.approx([3, 3, 3])
    assert records["sequencer2d:bf16"]["images_per_s"] == pytest.approx(20)
    assert records["openvino:bf16"]["error"]
    for record in records.values():
        assert record["environment"]["cpu"]
        assert record["environment"]["packages"]["torch"]
        assert (record["model"], record["mode"], record["allocator"]) == ("sequencer2d_s", "infer", "tuned")


@pytest.mark.slow
def test_ctrl_c_ends_a_check_at_once_and_keeps_what_it_found(tmp_path: Path) -> None:
    root = make_pets(tmp_path / "pets", 3000)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    program = (
        "import sys\n"
        "from sequencer2d.cli import main\n"
        "from sequencer2d.data import check\n"
        "def tell(real):\n"
        "    for verdict in real:\n"
        "        print(verdict.file, flush=True)\n"
        "        yield verdict\n"
        "real = check.inspect_files\n"
        "check.inspect_files = lambda *arguments, **options: tell(real(*arguments, **options))\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(main(sys.argv[1:]))\n"
    )
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, str(tmp_path / "program.py"), "check", str(root), "--workers", "2"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(9):  # that of the last one may be interrupted before it counts
            process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the processes of the pool, too
        seen = 9 + len(process.stdout.read().splitlines())
        assert process.stderr.read() == "sequencer2d: interrupted\n"
        assert process.wait(timeout=60) == 130
    assert seen < 3000
    again = subprocess.run(
        [sys.executable, "-m", "sequencer2d", "check", str(root)], capture_output=True, text=True, env=environment
    )
    assert again.returncode == DONE
    known = re.search(r"3,000 images checked, ([\d,]+) of them known", again.stdout)
    assert known
    assert abs(int(known[1].replace(",", "")) - seen) <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "workers"),
    [
        (signal.SIGINT, 0),
        (signal.SIGINT, 1),
        (signal.SIGTERM, 0),
        (signal.SIGTERM, 1),
    ],
)
def test_a_signal_stops_with_status_75_and_the_run_can_go_on(
    number: signal.Signals, workers: int, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "sequencer2d.cli", "train", "--config", "digits", *TINY]
    command += ["--epochs", "400", "--run-dir", str(tmp_path / "run"), "--num-workers", str(workers)]
    command += ["--accumulate", "16"]  # a stop waits for the end of an update, for which workers must live on
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("epoch 2:"):
                os.killpg(process.pid, number)  # as a terminal does: to the workers, too
                break
        rest = process.stderr.read()
        assert process.wait(timeout=60) == STOPPED, rest
    assert f"sequencer2d train --resume {tmp_path / 'run'}" in rest
    assert "Traceback" not in rest
    assert list((tmp_path / "run" / "checkpoints").glob("step-*.ckpt"))


def test_a_screen_without_letters_for_a_name_ends_no_prediction(run_dir: Path, tmp_path: Path) -> None:
    """As a file that Windows redirects to; what was predicted would be lost with it."""
    (tmp_path / "фото.png").write_bytes(next((run_dir / "samples").glob("*.png")).read_bytes())
    command = [sys.executable, "-m", "sequencer2d", "predict", str(run_dir), str(tmp_path / "фото.png")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    options = ["--output", str(tmp_path / "p.jsonl")]
    done = subprocess.run([*command, *options], env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr.count(b"codec")) == (DONE, 0)
    assert b"\\u0444" in done.stdout
    assert "фото.png" in (tmp_path / "p.jsonl").read_text(encoding="utf-8")
