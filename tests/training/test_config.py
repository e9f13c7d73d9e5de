"""A config is checked once, says what is wrong by name, fills in what follows, and survives YAML."""

import json
import math
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from sequencer2d.training.config import SMALL_IMAGE_SIZE, AugmentConfig, OptimConfig, TrainConfig, resolve
from sequencer2d.training.recipes import config_from_yaml

MEANS_NONE = {"weights", "data_root", "max_minutes", "run_dir", "clip_grad_norm", "ema_decay"}
MEANS_NONE |= {"split_seed", "early_stopping"}
"""Fields of which `None` is a value: no such file, folder, limit, average or seed of its own."""


def resolved(config: TrainConfig, image_size: int = 224) -> TrainConfig:
    return resolve(config, model="sequencer2d_s", image_size=image_size, crop_pct=0.875)


@pytest.mark.parametrize("image_size", [16, 224])
def test_resolve_fills_in_all_that_follows(image_size: int) -> None:
    config = asdict(resolved(TrainConfig(), image_size))
    left = {
        name for part in (config, config["augment"], config["optim"]) for name, value in part.items() if value is None
    }
    assert left == MEANS_NONE
    assert (config["model"], config["image_size"], config["crop_pct"]) == ("sequencer2d_s", image_size, 0.875)


def test_large_images_are_augmented_as_in_the_paper_and_small_ones_gently() -> None:
    small, large = (resolved(TrainConfig(), SMALL_IMAGE_SIZE + i).augment for i in (0, 1))
    assert (large.crop, large.auto_augment, large.random_erasing) == ("random-resized", "rand-m9-mstd0.5-inc1", 0.25)
    assert (large.mixup_alpha, large.cutmix_alpha) == (0.8, 1.0)
    assert (small.crop, small.auto_augment, small.random_erasing) == ("padded", "none", 0)
    assert (small.mixup_alpha, small.cutmix_alpha) == (0, 0)


def test_resolve_leaves_what_was_chosen_and_is_idempotent() -> None:
    augment = AugmentConfig(
        crop="padded", hflip=0.1, auto_augment="none", random_erasing=0.0, mixup_alpha=0.0, cutmix_alpha=0.5
    )
    optim = OptimConfig(learning_rate=0.0, warmup_epochs=0.0)
    config = resolved(TrainConfig(augment=augment, optim=optim, num_workers=0))
    assert (config.augment, config.optim, config.num_workers) == (augment, optim, 0)
    assert resolved(resolved(TrainConfig())) == resolved(TrainConfig())


def test_digits_are_not_flipped() -> None:
    assert resolved(TrainConfig(data="digits")).augment.hflip == 0.0
    assert resolved(TrainConfig(data="photos")).augment.hflip == 0.5


def test_the_learning_rate_follows_the_images_per_update() -> None:
    """By the square root, from the paper's 2e-3 at 2,048; and 20 epochs of warm-up in 300."""
    paper = resolved(TrainConfig(batch_size=256, accumulate=8, epochs=300)).optim
    quarter = resolved(TrainConfig(batch_size=512)).optim
    assert (paper.learning_rate, paper.warmup_epochs) == (pytest.approx(2e-3), pytest.approx(20))
    assert quarter.learning_rate == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("accumulate", -1),
        ("log_every", 0),
        ("image_size", 0),
        ("max_minutes", 0.0),
        ("max_minutes", math.inf),
        ("max_minutes", math.nan),
        ("crop_pct", 1.5),
        ("val_fraction", 0.0),
        ("val_fraction", 1.0),
        ("num_workers", -1),
        ("seed", -1),
        ("seed", 2**32),
        ("split_seed", -1),
        ("augment.scale", (0.0, 1.0)),
        ("augment.scale", (0.9, 0.1)),
        ("augment.ratio", (2.0, 1.0)),
        ("augment.hflip", 1.1),
        ("augment.random_erasing", -0.1),
        ("augment.mix_prob", math.nan),
        ("augment.mixup_alpha", -1.0),
        ("augment.cutmix_alpha", math.nan),
        ("augment.label_smoothing", 1.0),
        ("augment.auto_augment", "rand-m9-w0"),
        ("augment.auto_augment", "rand-m9.5-mstd0.5"),
        ("optim.learning_rate", -1e-3),
        ("optim.learning_rate", math.nan),
        ("optim.min_learning_rate", math.inf),
        ("optim.warmup_learning_rate", -1.0),
        ("optim.warmup_epochs", 101.0),
        ("optim.cooldown_epochs", -1.0),
        ("optim.weight_decay", -0.1),
        ("optim.betas", (0.9, 1.0)),
        ("optim.clip_grad_norm", -1.0),
        ("optim.ema_decay", 1.0),
        ("optim.ema_decay", 0.0),
    ],
)
def test_an_impossible_value_is_an_error_that_names_field_and_value(name: str, value: Any) -> None:
    part, _, field = name.rpartition(".")
    config = TrainConfig()

    def change() -> None:
        replace(config, **{part: replace(getattr(config, part), **{field: value})} if part else {field: value})

    with pytest.raises(ValueError, match=name) as caught:
        change()
    assert str(value) in str(caught.value)


def test_configs_are_frozen() -> None:
    config = TrainConfig()
    for part, field in ((config, "epochs"), (config.augment, "hflip"), (config.optim, "weight_decay")):
        with pytest.raises(FrozenInstanceError):
            setattr(part, field, 0)


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        resolved(TrainConfig(optim=OptimConfig(min_learning_rate=1e-7, ema_decay=0.9999, betas=(0.8, 0.95)))),
        TrainConfig(
            model_args={"layers": [2, 2], "drop_path_rate": 0.1, "stem_widths": []},
            data="Bilder/größe: #1",
            run_dir="~/runs",
            augment=AugmentConfig(scale=(0.3, 1.0), crop="padded"),
            precision="fp32",
            max_minutes=20,
        ),
    ],
    ids=["default", "resolved", "changed"],
)
def test_a_config_survives_yaml_and_json(config: TrainConfig, tmp_path: Path) -> None:
    plain = config.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    assert config_from_yaml(tmp_path / "config.yaml") == config


def test_what_is_muons_is_not_for_adamw() -> None:
    with pytest.raises(ValueError, match=r"optim\.keep_norms is Muon's; add --optim\.keep_norms false"):
        OptimConfig(keep_norms=True)
