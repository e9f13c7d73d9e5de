"""A teacher sees what it was trained to see, keeps its weights, and has its part in the loss."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from runs import last_checkpoint, tiny_run
from sequencer2d.model import Sequencer2D
from sequencer2d.preprocessing import Preprocessing
from sequencer2d.training.config import TrainConfig
from sequencer2d.training.distillation import Teacher, load_teacher
from sequencer2d.training.finetune_config import DistillConfig
from sequencer2d.training.run import train
from sequencer2d.weights import ModelCard, load_model, save_model
from sequencer2d.zoo import create_model

STUDENT = Preprocessing(image_size=16)
NAMES = ("blue", "green", "red")


class Recorder(nn.Module):
    """Answers with fixed logits and remembers what it saw."""

    num_classes = 3

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(logits)
        self.batch_norm = nn.BatchNorm2d(3)
        self.seen = torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        self.batch_norm(x)
        return self.weight + 0 * x.mean()


def teacher(logits: Tensor, size: tuple[int, int] = (16, 16), **settings: Any) -> Teacher:
    config = DistillConfig(teacher="anyone", **settings)
    return Teacher(Recorder(logits), mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7), size=size, config=config)


def test_it_sees_the_images_by_its_own_normalisation_and_at_its_own_size() -> None:
    pixels = torch.rand(2, 3, 16, 16)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (STUDENT.mean, STUDENT.std))
    known = teacher(torch.zeros(2, 3))
    known.logits((pixels - mean) / std, STUDENT)
    own = (pixels - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    assert isinstance(known.model, Recorder)
    assert torch.allclose(known.model.seen, own, atol=1e-5)
    larger = teacher(torch.zeros(2, 3), size=(24, 32))
    larger.logits(torch.rand(2, 3, 16, 16), STUDENT)
    assert isinstance(larger.model, Recorder)
    assert larger.model.seen.shape == (2, 3, 24, 32)


def test_it_is_in_evaluation_mode_and_gets_no_gradient() -> None:
    known = teacher(torch.zeros(2, 3))
    assert isinstance(known.model, Recorder)
    logits = torch.randn(2, 3, requires_grad=True)
    known.blend(F.cross_entropy(logits, torch.tensor([0, 1])), logits, torch.rand(2, 3, 16, 16), STUDENT).backward()
    assert logits.grad is not None
    assert known.model.weight.grad is None
    assert torch.equal(known.model.batch_norm.running_mean, torch.zeros(3))  # type: ignore[arg-type]


def test_soft_and_hard_losses_by_their_definitions() -> None:
    own, logits = torch.randn(4, 3), torch.randn(4, 3)
    probabilities = (own / 2).softmax(1)
    divergence = (probabilities * (probabilities.log() - (logits / 2).log_softmax(1))).sum(1).mean()
    soft = teacher(own, kind="soft", temperature=2.0)
    assert torch.allclose(soft.loss(logits, own), divergence * 4, atol=1e-6)
    assert soft.loss(own, own).item() == pytest.approx(0, abs=1e-6)
    hard = teacher(own, kind="hard")
    assert torch.equal(hard.loss(logits, own), F.cross_entropy(logits, own.argmax(1)))


def test_the_weight_is_the_teacher_s_part() -> None:
    own, logits, label_loss = torch.randn(2, 3), torch.randn(2, 3), torch.tensor(7.0)
    quarter = teacher(own, weight=0.25, kind="hard")
    images = torch.rand(2, 3, 16, 16)
    expected = 0.75 * 7 + 0.25 * F.cross_entropy(logits, own.argmax(1)).item()
    assert quarter.blend(label_loss, logits, images, STUDENT).item() == pytest.approx(expected)


def save_ours(path: Path, names: tuple[str, ...] = NAMES, training: dict[str, Any] | None = None) -> str:
    args: dict[str, Any] = {"layers": (1, 1), "embed_dims": (8, 8), "hidden_sizes": (2, 2), "stem_widths": (8,)}
    model = create_model("sequencer2d_conv_p_patch2_16", num_classes=len(names), **args)
    nn.init.normal_(model.get_classifier().weight)  # type: ignore[arg-type]
    preprocessing = Preprocessing(image_size=24, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    card = ModelCard(
        architecture="sequencer2d_conv_p_patch2_16",
        config=model.config,
        class_names=names,
        preprocessing=preprocessing,
        training={"data": "colours"} if training is None else training,
    )
    save_model(model, card, path)
    return str(path)


def test_a_file_of_ours_brings_its_preprocessing(tmp_path: Path) -> None:
    loaded = load_teacher(DistillConfig(teacher=save_ours(tmp_path / "model.safetensors")), NAMES)
    assert loaded is not None
    assert (loaded.size, loaded.mean, loaded.std) == ((24, 24), (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    assert not loaded.model.training
    folder = load_teacher(DistillConfig(teacher=str(tmp_path)), NAMES)
    assert folder is not None
    assert isinstance(folder.model, Sequencer2D)
    assert load_teacher(DistillConfig(), NAMES) is None
    packaged = load_teacher(DistillConfig(teacher="sequencer2d_conv_p_patch2_16"), tuple("0123456789"))
    assert packaged is not None
    assert isinstance(packaged.model, Sequencer2D)
    assert packaged.size == (16, 16)


def test_a_teacher_of_other_classes_is_an_error(tmp_path: Path) -> None:
    path = save_ours(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="has 3 classes and the data have 2"):
        load_teacher(DistillConfig(teacher=path), ("blue", "green"))
    with pytest.raises(ValueError, match="its number 1 is green, theirs red"):
        load_teacher(DistillConfig(teacher=path), ("blue", "red", "green"))
    foreign = save_ours(tmp_path / "foreign.safetensors", training={})  # names that may be made up
    assert load_teacher(DistillConfig(teacher=foreign), ("blue", "red", "green"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_model_of_timm_s_from_a_local_file(suffix: str, tmp_path: Path) -> None:
    model = timm.create_model("resnet10t", num_classes=3)
    file = tmp_path / f"teacher{suffix}"
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    config = DistillConfig(teacher="resnet10t", teacher_file=str(file))
    loaded = load_teacher(config, NAMES)
    assert loaded is not None
    assert loaded.size == model.pretrained_cfg["input_size"][1:]  # type: ignore[index]
    assert all(torch.equal(loaded.model.state_dict()[name], tensor) for name, tensor in state.items())
    with pytest.raises(ValueError, match=rf"teacher{suffix} does not fit the teacher resnet10t with 2 classes"):
        load_teacher(config, ("a", "b"))


def test_a_folder_that_timm_wrote_is_a_teacher(tmp_path: Path) -> None:
    from timm.models import save_for_hf

    model = timm.create_model("resnet10t", num_classes=3)
    save_for_hf(model, str(tmp_path / "timms"), model_config={"label_names": ["blue", "red", "green"]})
    config = DistillConfig(teacher=f"local-dir:{tmp_path / 'timms'}")
    assert load_teacher(config, ("blue", "red", "green"))
    with pytest.raises(ValueError, match="its number 1 is red, theirs green"):
        load_teacher(config, NAMES)


class Evil:
    def __reduce__(self) -> Any:
        return (Path("unpickled").touch, ())


def test_a_teacher_s_file_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Evil()}, "evil.pth")
    with pytest.raises(ValueError, match="does not fit"):
        load_teacher(DistillConfig(teacher="resnet10t", teacher_file="evil.pth"), NAMES)
    assert not Path("unpickled").exists()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"teacher": "resnet81"}, ValueError, "named 'resnet81': did you mean resnet"),
        ({"teacher": "resnet18", "teacher_file": "no.pth"}, FileNotFoundError, "teacher_file=no.pth does not exist"),
        ({"teacher": "resnet10t_no"}, ValueError, "no file, folder or model"),
        ({"teacher": "test_vit.none"}, FileNotFoundError, "test_vit.none cannot be had: .*--distill.teacher-file"),
    ],
)
def test_a_teacher_that_cannot_be_had(
    settings: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(error, match=message):
        load_teacher(DistillConfig(**settings), NAMES)


def test_without_a_network_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_network(*arguments: Any, **options: Any) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", no_network)
    monkeypatch.setattr("timm.models._hub.download_cached_file", no_network)
    with pytest.raises(FileNotFoundError, match=r"resnet18 cannot be had: .*; give a local file: --distill\.teacher"):
        load_teacher(DistillConfig(teacher="resnet18"), NAMES)


@pytest.mark.parametrize(
    "settings",
    [{"weight": 0.0}, {"weight": 1.1}, {"temperature": 0.0}, {"temperature": float("inf")}],
)
def test_wrong_settings_are_named(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"distill\.{next(iter(settings))}="):
        DistillConfig(teacher="resnet18", **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs distill\.teacher"):
        DistillConfig(teacher_file="a.pth")


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_student_learns_what_its_teacher_says_whatever_the_labels(
    kind: Literal["soft", "hard"], tmp_path: Path
) -> None:
    stubborn, card = load_model(save_ours(tmp_path / "teacher.safetensors"))
    with torch.no_grad():
        stubborn.head.fc.weight.zero_()  # type: ignore[operator]
        stubborn.head.fc.bias.copy_(torch.tensor([0.0, 9.0, 0.0]))  # type: ignore[operator]
    save_model(stubborn, card, tmp_path / "teacher.safetensors")
    distill = DistillConfig(teacher=str(tmp_path / "teacher.safetensors"), weight=1.0, kind=kind)
    student = train(replace(tiny_run(tmp_path), distill=distill))
    assert student.evaluation is not None
    assert [sum(column) for column in zip(*student.evaluation.confusion, strict=True)] == [0, 9, 0]
    names = torch.load(last_checkpoint(student.run_dir), weights_only=True)["state_dict"]
    assert all(name.startswith(("model.", "ema.", "val_")) for name in names)


def test_a_teacher_that_does_not_fit_is_named_before_anything_is_written(tmp_path: Path) -> None:
    config: TrainConfig = tiny_run(tmp_path)
    path = save_ours(tmp_path / "two.safetensors", ("blue", "green"))
    with pytest.raises(ValueError, match="has 2 classes and the data have 3"):
        train(replace(config, distill=DistillConfig(teacher=path)))
    assert not Path(config.run_dir or "").exists()


def test_a_teacher_may_know_the_classes_by_their_ids(tmp_path: Path) -> None:
    path = save_ours(tmp_path / "model.safetensors")
    assert load_teacher(DistillConfig(teacher=path), ("sky", "grass", "blood"), NAMES)
