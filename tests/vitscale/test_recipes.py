"""Every recipe, run dry: it passes the checks, its model is the published size, and its numbers are those of the paper's tables."""

import math
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from vitscale.check import check_config
from vitscale.config import (
    ConfigError,
    InitConfig,
    PreprocessConfig,
    TrainConfig,
    ViTConfig,
    fine_tuning_run,
    grad_accum_steps,
)
from vitscale.flops import train_flops
from vitscale.model import ViT
from vitscale.optim import learning_rate
from vitscale.recipes import FINETUNE, PRETRAIN, recipe, recipe_name, vit
from vitscale.timeline import timeline_of

Recipe = Callable[[], TrainConfig]
JFT, I21K, I1K = 303_000_000, 14_197_122, 1_281_167  # images
CLASSES = {"jft300m": 18_291, "imagenet21k": 21_843, "imagenet1k": 1_000}
SIZES = {
    "ti": (12, 192, 768, 3),
    "s": (12, 384, 1536, 6),
    "b": (12, 768, 3072, 12),
    "l": (24, 1024, 4096, 16),
    "h": (32, 1280, 5120, 16),
    "g": (40, 1408, 6144, 16),
    "G": (48, 1664, 8192, 16),
}

# arXiv 2010.11929, table 3: epochs, peak lr, decay, weight decay, dropout.
TABLE_3 = {
    "vit-b32-jft300m": (7, 8e-4, "linear", 0.1, 0.0),
    "vit-b16-jft300m": (7, 8e-4, "linear", 0.1, 0.0),
    "vit-l32-jft300m": (7, 6e-4, "linear", 0.1, 0.0),
    "vit-l16-jft300m": (14, 4e-4, "linear", 0.1, 0.0),
    "vit-l16-jft300m-7ep": (7, 4e-4, "linear", 0.1, 0.0),
    "vit-h14-jft300m": (14, 3e-4, "linear", 0.1, 0.0),
    "vit-b32-imagenet21k": (90, 1e-3, "linear", 0.03, 0.1),
    "vit-b16-imagenet21k": (90, 1e-3, "linear", 0.03, 0.1),
    "vit-l32-imagenet21k": (90, 1e-3, "linear", 0.03, 0.1),
    "vit-l32-imagenet21k-30ep": (30, 1e-3, "linear", 0.03, 0.1),
    "vit-l16-imagenet21k": (90, 1e-3, "linear", 0.03, 0.1),
    "vit-l16-imagenet21k-30ep": (30, 1e-3, "linear", 0.03, 0.1),
    "vit-b32-imagenet1k": (300, 3e-3, "cosine", 0.3, 0.1),
    "vit-b16-imagenet1k": (300, 3e-3, "cosine", 0.3, 0.1),
    "vit-l32-imagenet1k": (300, 3e-3, "cosine", 0.3, 0.1),
    "vit-l16-imagenet1k": (300, 3e-3, "cosine", 0.3, 0.1),
}
# big_vision's configs vit_s16_i1k, vit_i1k and vit_i21k: epochs, batch, RandAugment's magnitude, mixup, pool, position, objective, bias.
AUGMENTED = {
    "vit-s16-imagenet1k-plain": (90, 1024, 10, 0.2, "mean", "sincos", "softmax", 0.0),
    "vit-ti16-imagenet1k-augreg": (300, 4096, 0, 0.0, "cls", "learned_1d", "sigmoid", -6.9),
    "vit-s32-imagenet1k-augreg": (300, 4096, 15, 0.2, "cls", "learned_1d", "sigmoid", -6.9),
    "vit-s16-imagenet1k-augreg": (300, 4096, 15, 0.5, "cls", "learned_1d", "sigmoid", -6.9),
    "vit-b32-imagenet1k-augreg": (300, 4096, 15, 0.5, "cls", "learned_1d", "sigmoid", -6.9),
    "vit-b16-imagenet1k-augreg": (300, 4096, 15, 0.5, "cls", "learned_1d", "sigmoid", -6.9),
    "vit-l16-imagenet1k-augreg": (300, 4096, 15, 0.5, "cls", "learned_1d", "sigmoid", -6.9),
    "vit-b32-imagenet21k-augreg": (300, 4096, 10, 0.2, "mean", "learned_1d", "sigmoid", -10.0),
    "vit-b16-imagenet21k-augreg": (300, 4096, 10, 0.2, "mean", "learned_1d", "sigmoid", -10.0),
    "vit-l16-imagenet21k-augreg": (300, 4096, 15, 0.5, "mean", "learned_1d", "sigmoid", -10.0),
}
# Table 4 and appendix B.1.1: steps, image side, warm-up, decay of the average, the grid that the peak lr is chosen from.
OTHERS_GRID, IMAGENET_GRID = {0.001, 0.003, 0.01, 0.03}, {0.003, 0.01, 0.03, 0.06}
TABLE_4 = {
    "finetune-imagenet-384": (20_000, 384, 500, 0.0, IMAGENET_GRID),
    "finetune-imagenet-512": (20_000, 512, 500, 0.9999, IMAGENET_GRID),
    "finetune-imagenet-518": (20_000, 518, 500, 0.9999, IMAGENET_GRID),
    "finetune-cifar10": (10_000, 384, 500, 0.0, OTHERS_GRID),
    "finetune-cifar100": (10_000, 384, 500, 0.0, OTHERS_GRID),
    "finetune-pets": (500, 384, 100, 0.0, OTHERS_GRID),
    "finetune-flowers": (500, 384, 100, 0.0, OTHERS_GRID),
    "finetune-vtab": (2_500, 384, 100, 0.0, {0.01}),
}
# MAE's FINETUNE.md and main_finetune.py, BEiT's get_started_for_image_classification.md and run_class_finetuning.py: epochs, batch, lr,
# layer decay, drop-path, weight decay, mixup, CutMix.
BY_LAYERS = {
    "finetune-imagenet-mae-b16": (100, 1024, 5e-4 * 1024 / 256, 0.65, 0.1, 0.05, 0.8, 1.0),
    "finetune-imagenet-mae-l16": (50, 1024, 1e-3 * 1024 / 256, 0.75, 0.2, 0.05, 0.8, 1.0),
    "finetune-imagenet-mae-h14": (50, 1024, 1e-3 * 1024 / 256, 0.75, 0.3, 0.05, 0.8, 1.0),
    "finetune-imagenet-beit-b16": (30, 512, 2e-5, 0.85, 0.1, 1e-8, 0.0, 0.0),
    "finetune-imagenet-beit-l16": (30, 512, 2e-5, 0.9, 0.4, 1e-8, 0.0, 0.0),
}
SCALED = {"vit-giant14-jft3b": "g", "vit-gigantic14-jft3b": "G"}
TINY = {"tiny-digits", "tiny-fashion", "tiny-finetune"}


def names(among: tuple[Recipe, ...]) -> list[str]:
    return [recipe_name(function) for function in among]


def closed_form(model: ViTConfig) -> int:
    """Parameters of a ViT with a class token and learned positions."""
    D, M, p, K = model.width, model.mlp_dim, model.patch_size, model.num_classes
    patches = (model.image_size[0] // p) * (model.image_size[1] // p)
    embedding = 3 * p * p * D + D + D + (patches + 1) * D
    norms, attention, mlp = 2 * 2 * D, 4 * D * D + 4 * D, 2 * D * M + M + D
    return embedding + model.depth * (norms + attention + mlp) + 2 * D + (D * K + K if K else 0)


def count(model: ViTConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in ViT(model).parameters())


def test_the_tables_here_name_every_recipe() -> None:
    assert set(names(PRETRAIN)) == TABLE_3.keys() | SCALED.keys() | AUGMENTED.keys() | (TINY - {"tiny-finetune"})
    assert set(names(FINETUNE)) == TABLE_4.keys() | BY_LAYERS.keys() | {"tiny-finetune"}
    everything = names(PRETRAIN) + names(FINETUNE)
    assert len(everything) == len(set(everything)) == sum(map(len, (TABLE_3, SCALED, AUGMENTED, TABLE_4, BY_LAYERS, TINY)))


@pytest.mark.parametrize("function", PRETRAIN + FINETUNE, ids=lambda f: f.__name__)
def test_a_recipe_is_found_by_its_functions_name_and_names_its_source(function: Recipe) -> None:
    name = function.__name__.replace("_", "-")
    assert recipe(name, PRETRAIN + FINETUNE) == replace(function(), recipe=name)
    assert function.__doc__
    if name not in TINY:
        assert re.search(r"table \d|appendix [A-Z]|arXiv \d", function.__doc__)


@pytest.mark.parametrize("among", [PRETRAIN, FINETUNE], ids=["pretrain", "finetune"])
def test_an_unknown_name_lists_those_there_are(among: tuple[Recipe, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        recipe("vit-h14-jft", among)
    assert "'vit-h14-jft'" in str(error.value)
    assert all(name in str(error.value) for name in names(among))


@pytest.mark.parametrize("wrong", ["x16", "b", "16", "", "b16x"])
def test_an_unknown_size_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="no ViT is called"):
        vit(wrong)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Pre-training
# ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE_3)
def test_pretraining_is_table_3(name: str) -> None:
    config = recipe(name, PRETRAIN)
    epochs, peak_lr, decay, weight_decay, dropout = TABLE_3[name]
    assert (config.epochs, config.steps) == (epochs, 0)
    assert (config.optimizer.name, config.optimizer.betas, config.optimizer.grad_clip) == ("adamw", (0.9, 0.999), 1.0)
    assert (config.optimizer.peak_lr, config.optimizer.weight_decay) == (peak_lr, weight_decay)
    assert (config.schedule.kind, config.schedule.warmup_steps, config.schedule.cooldown_steps) == (decay, 10_000, 0)
    assert config.schedule.end_lr == (1e-5 if "imagenet21k" in name else 0.0)
    assert (config.model.dropout, config.model.drop_path_rate) == (dropout, 0.0)
    assert config.global_batch_size == 4096
    assert (config.preprocess.mean, config.preprocess.std) == ((0.5,) * 3, (0.5,) * 3)
    assert (config.preprocess.crop_scale, config.preprocess.flip, config.preprocess.eval_crop) == ((0.05, 1.0), 0.5, 0.875)
    if "imagenet1k" in name:
        assert (config.objective.kind, config.model.head_bias) == ("softmax", 0.0)
    else:
        assert (config.objective.kind, config.model.head_bias) == ("sigmoid", -10.0)
    assert config.objective.label_smoothing == 0


@pytest.mark.parametrize("name", TABLE_3)
def test_pretraining_has_the_models_size(name: str) -> None:
    model = recipe(name, PRETRAIN).model
    _, variant, data = name.split("-")[:3]
    assert (model.depth, model.width, model.mlp_dim, model.num_heads) == SIZES[variant[0]]
    assert (model.patch_size, model.image_size, model.num_classes) == (int(variant[1:]), (224, 224), CLASSES[data])
    assert (model.pool, model.position, model.activation, model.representation_size) == ("cls", "learned_1d", "gelu", 0)
    assert count(model) == closed_form(model)


@pytest.mark.parametrize("name", SCALED)
def test_the_scaling_studys_are_big_visions(name: str) -> None:
    """big_vision/configs/proj/scaling_laws/train_vit_g.py."""
    config = recipe(name, PRETRAIN)
    model = config.model
    assert (model.depth, model.width, model.mlp_dim, model.num_heads) == SIZES[SCALED[name]]
    assert (model.patch_size, model.image_size, model.num_classes) == (14, (224, 224), 29_593)
    assert (model.pool, model.head_bias, config.objective.kind) == ("map", -10.0, "sigmoid")
    assert (config.global_batch_size, config.steps, config.epochs) == (16_384, 1_000_000, 0.0)
    assert (config.optimizer.peak_lr, config.optimizer.weight_decay, config.optimizer.grad_clip) == (8e-4, 0.03, 1.0)
    schedule = config.schedule
    assert (schedule.kind, schedule.timescale, schedule.warmup_steps, schedule.cooldown_steps) == ("rsqrt", 10_000, 10_000, 50_000)
    assert (config.preprocess.eval_protocol, config.preprocess.eval_crop) == ("big_vision", 224 / 256)
    for world_size in (1, 8, 512):
        check_config(config, world_size)


@pytest.mark.parametrize("name", AUGMENTED)
def test_augmented_recipes_are_big_visions(name: str) -> None:
    config = recipe(name, PRETRAIN)
    epochs, batch, magnitude, mixup, pool, position, objective, bias = AUGMENTED[name]
    _, variant, data = name.split("-")[:3]
    size, patch = variant.rstrip("0123456789"), int(variant.lstrip("tisbl"))
    model = config.model
    assert (model.depth, model.width, model.mlp_dim, model.num_heads) == SIZES[size]
    assert (model.patch_size, model.image_size, model.num_classes) == (patch, (224, 224), CLASSES[data])
    assert (model.pool, model.position, model.head_bias, model.dropout, model.drop_path_rate) == (pool, position, bias, 0.0, 0.0)
    assert (config.epochs, config.steps, config.global_batch_size) == (epochs, 0, batch)
    assert (config.preprocess.randaugment_layers, config.preprocess.randaugment_magnitude) == (2, magnitude)
    assert (config.mix.mixup_alpha, config.mix.cutmix_alpha, config.mix.prob) == (mixup, 0.0, 1.0)
    assert (config.objective.kind, config.objective.label_smoothing) == (objective, 0.0)
    assert (config.preprocess.eval_protocol, config.preprocess.eval_crop) == ("big_vision", 224 / 256)
    assert (config.optimizer.name, config.optimizer.peak_lr, config.optimizer.grad_clip) == ("adamw", 1e-3, 1.0)
    assert config.optimizer.weight_decay == pytest.approx(1e-4 / 1e-3), "a step's, over the learning rate"
    assert (config.schedule.kind, config.schedule.warmup_steps, config.schedule.end_lr) == ("cosine", 10_000, 0.0)
    for world_size in (1, 8):
        check_config(config, world_size)
    assert config.schedule.warmup_steps < timeline_of(config, I1K).total_steps


def test_the_headline_recipe_has_the_published_cost() -> None:
    config = recipe("vit-h14-jft300m", PRETRAIN)
    assert count(config.model) == 630_764_800 + 1281 * 18_291
    assert timeline_of(config, JFT).total_steps == 1_035_645
    assert round(timeline_of(config, JFT).total_steps / 1e6, 2) == 1.04
    assert round(train_flops(config.model) * timeline_of(config, JFT).total_steps * config.global_batch_size / 1e21, 1) == 4.3


@pytest.mark.parametrize("name", TABLE_3)
def test_pretraining_passes_the_checks_at_sensible_sizes(name: str) -> None:
    config = recipe(name, PRETRAIN)
    for world_size in (1, 8, 16):
        check_config(config, world_size)
        accumulate = grad_accum_steps(config.global_batch_size, config.micro_batch_size, world_size)
        assert accumulate * config.micro_batch_size * world_size == 4096
    with pytest.raises(ConfigError, match="is not a multiple of micro_batch_size x world_size"):
        check_config(config, 3)


@pytest.mark.parametrize(
    ("name", "images", "expected"),
    [
        ("vit-h14-jft300m", JFT, {0: 0, 5_000: 1.5e-4, 10_000: 3e-4, 522_822: 1.50e-4, 1_035_645: 0}),
        ("vit-b16-jft300m", JFT, {5_000: 4e-4, 10_000: 8e-4, 263_911: 4e-4}),
        ("vit-l16-imagenet21k", I21K, {5_000: 5e-4, 10_000: 1e-3, 160_976: 5.05e-4, 311_951: 1e-5}),
        ("vit-b32-imagenet1k", I1K, {5_000: 1.5e-3, 10_000: 3e-3, 51_918: 1.5e-3, 93_836: 0}),
    ],
)
def test_learning_rate_over_a_run(name: str, images: int, expected: dict[int, float]) -> None:
    config = recipe(name, PRETRAIN)
    steps = timeline_of(config, images).total_steps
    for step, rate in expected.items():
        assert learning_rate(step, steps, config.optimizer.peak_lr, config.schedule) == pytest.approx(rate, rel=1e-3, abs=1e-9), step


# ---------------------------------------------------------------------------------------------------------------------------------------
# Fine-tuning
# ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE_4)
def test_fine_tuning_is_table_4(name: str) -> None:
    config = recipe(name, FINETUNE)
    steps, side, warmup, average, grid = TABLE_4[name]
    assert (config.steps, config.epochs, config.global_batch_size) == (steps, 0.0, 512)
    assert (config.optimizer.name, config.optimizer.momentum, config.optimizer.grad_clip) == ("sgd", 0.9, 1.0)
    assert (config.optimizer.weight_decay, config.optimizer.average_decay) == (0.0, average)
    assert config.optimizer.peak_lr in grid
    assert set(config.sweep.peak_lrs) == (grid if len(grid) > 1 else set())
    assert config.sweep.holdout == {"imagenet": 0.01, "cifar10": 0.02, "cifar100": 0.02, "vtab": 0.2}.get(name.split("-")[1], 0.1)
    assert (config.schedule.kind, config.schedule.warmup_steps, config.schedule.end_lr) == ("cosine", warmup, 0.0)
    assert (config.objective.kind, config.model.image_size) == ("softmax", (side, side))
    assert config.preprocess.eval_crop == 1.0, "vision_transformer resizes to the model's size, without a crop"
    lr = [learning_rate(step, steps, config.optimizer.peak_lr, config.schedule) for step in (0, warmup, (steps + warmup) // 2, steps)]
    assert lr == pytest.approx([0, config.optimizer.peak_lr, config.optimizer.peak_lr / 2, 0], abs=1e-12)


@pytest.mark.parametrize("name", BY_LAYERS)
def test_fine_tuning_by_layers_is_maes_and_beits(name: str) -> None:
    config = recipe(name, FINETUNE)
    epochs, batch, peak_lr, layer_decay, drop_path, weight_decay, mixup, cutmix = BY_LAYERS[name]
    optimizer, schedule, mix = config.optimizer, config.schedule, config.mix
    assert (config.epochs, config.steps, config.global_batch_size) == (epochs, 0, batch)
    assert (optimizer.name, optimizer.betas, optimizer.grad_clip) == ("adamw", (0.9, 0.999), 0.0)
    assert (optimizer.peak_lr, optimizer.layer_decay, optimizer.weight_decay) == (peak_lr, layer_decay, weight_decay)
    assert (config.model.image_size, config.model.drop_path_rate, config.model.dropout) == ((224, 224), drop_path, 0.0)
    assert (mix.mixup_alpha, mix.cutmix_alpha, mix.prob, mix.switch_prob) == (mixup, cutmix, 1.0, 0.5)
    assert (config.objective.kind, config.objective.label_smoothing) == ("softmax", 0.1)
    assert (config.preprocess.interpolation, config.preprocess.crop_scale, config.preprocess.eval_crop) == ("bicubic", (0.08, 1.0), 0.875)
    assert (schedule.kind, schedule.end_lr, schedule.warmup_steps) == ("cosine", 1e-6, round(5 * I1K / batch))


@pytest.mark.parametrize("function", FINETUNE, ids=lambda f: f.__name__)
def test_fine_tuning_passes_the_checks_once_a_checkpoint_is_known(function: Recipe) -> None:
    """The image size must suit the checkpoint's patches: 518 is for /14, the others for /16 and /32."""
    asked = recipe(recipe_name(function), FINETUNE)
    patch = 14 if asked.model.image_size == (518, 518) or asked.recipe.endswith("h14") else 4 if asked.recipe in TINY else 16
    pretrained = replace(vit(f"l{patch}", num_classes=18_291, representation_size=1024, head_bias=-10.0), image_size=(14 * patch,) * 2)
    trained_with = PreprocessConfig(mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3), crop_scale=(0.2, 0.3))
    config = fine_tuning_run(asked, pretrained, trained_with, "a/folder", num_classes=1000)
    model = config.model
    for world_size in (1, 2):
        check_config(config, world_size)
    assert config.init == InitConfig(asked.init, asked.init_weights, asked.position_interpolation, "a/folder")
    assert (config.preprocess.mean, config.preprocess.std) == (trained_with.mean, trained_with.std)
    assert {name: getattr(config.preprocess, name) for name in vars(asked.preprocess)} == vars(asked.preprocess)
    for name in ("recipe", "steps", "global_batch_size", "optimizer", "schedule", "objective", "engine", "checkpoint_every"):
        assert getattr(config, name) == getattr(asked, name)
    assert (model.num_classes, model.representation_size, model.head_bias) == (1000, 0, 0.0)
    assert (model.patch_size, model.image_size, model.width) == (patch, config.model.image_size, 1024)
    assert count(model) == closed_form(model)
    assert 0 < config.schedule.warmup_steps < timeline_of(config, I1K).total_steps


def test_518_pixels_do_not_fit_patches_of_16() -> None:
    config = recipe("finetune-imagenet-518", FINETUNE)
    with pytest.raises(ConfigError, match="518 is not a multiple of patch_size=16; 512 is"):
        check_config(fine_tuning_run(config, vit("l16"), PreprocessConfig(), "", 1000), 1)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Tiny ones
# ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "images", "classes"), [("tiny-digits", 1_400, 10), ("tiny-fashion", 60_000, 10)])
def test_tiny_ones_pass_the_checks_and_have_the_size_they_say(name: str, images: int, classes: int) -> None:
    config = recipe(name, PRETRAIN)
    for world_size in (1, 2):
        check_config(config, world_size)
    model = replace(config.model, num_classes=classes)
    assert count(model) == closed_form(model)
    function = next(f for f in PRETRAIN if recipe_name(f) == name)
    said = re.search(r"A ViT of ([\d.]+) M parameters", function.__doc__ or "")
    assert said
    assert round(count(model) / 1e6, 1) == float(said[1])
    assert config.schedule.warmup_steps < timeline_of(config, images).total_steps / 5
    assert config.engine.precision == "fp32", "for a CPU"
    assert not math.isnan(learning_rate(0, timeline_of(config, images).total_steps, config.optimizer.peak_lr, config.schedule))
