"""Recipes: functions that return a `TrainConfig` or, to fine-tune, a `FinetuneConfig`; found by name through `recipe`.

Numbers come from "An Image is Worth 16x16 Words" (arXiv 2010.11929: table 3 for pre-training, table 4 and appendix B.1 for fine-tuning)
and, where the paper is silent, from google-research/vision_transformer and google-research/big_vision, as each docstring says; those with
more augmentation from arXiv 2106.10270 and 2205.01580; fine-tuning as it is done today from MAE's and BEiT's code. Results named here are
the papers', not ours. The `tiny` ones train on a CPU.

A recipe's name is its function's with dashes. Imports no torch.
"""

import difflib
from collections.abc import Callable
from dataclasses import replace

from vitscale.config import (
    Config,
    ConfigError,
    EngineConfig,
    FinetuneConfig,
    MixConfig,
    NewModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PreprocessConfig,
    ScheduleConfig,
    SweepConfig,
    TrainConfig,
    ViewConfig,
    ViTConfig,
)

Recipe = Callable[[], Config]

JFT_300M_CLASSES = 18_291
JFT_3B_CLASSES = 29_593
IMAGENET_21K_CLASSES = 21_843
IMAGENET_1K_CLASSES = 1_000


# ---------------------------------------------------------------------------------------------------------------------------------------
# Sizes (paper, table 1; Ti and S: arXiv 2012.12877 and 2106.10270; g and G: arXiv 2106.04560, table 2)
# ---------------------------------------------------------------------------------------------------------------------------------------


def vit(variant: str, **overrides: object) -> ViTConfig:
    """The model of a name like `b16` or `h14`: size ti, s, b, l, h, g or G (2 B parameters, g 1 B) and patch size."""
    sizes = {
        "ti": ViTConfig(depth=12, width=192, mlp_dim=768, num_heads=3),
        "s": ViTConfig(depth=12, width=384, mlp_dim=1536, num_heads=6),
        "b": ViTConfig(depth=12, width=768, mlp_dim=3072, num_heads=12),
        "l": ViTConfig(depth=24, width=1024, mlp_dim=4096, num_heads=16),
        "h": ViTConfig(depth=32, width=1280, mlp_dim=5120, num_heads=16),
        "g": ViTConfig(depth=40, width=1408, mlp_dim=6144, num_heads=16),
        "G": ViTConfig(depth=48, width=1664, mlp_dim=8192, num_heads=16),
    }
    size, patch = variant.rstrip("0123456789"), variant.lstrip("tisblhgG")
    if size not in sizes or not patch:
        raise ConfigError(f"no ViT is called {variant!r}; a size of {', '.join(sizes)} and a patch size make one, as in b16")
    return replace(sizes[size], patch_size=int(patch), **overrides)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------------------------
# Pre-training (paper, table 3): batch 4096, Adam, warm-up of 10 k steps, 224 px
# ---------------------------------------------------------------------------------------------------------------------------------------


def _jft300m(variant: str, epochs: float, peak_lr: float, micro_batch_size: int = 128) -> TrainConfig:
    """Paper, table 3: linear decay to 0, weight decay 0.1, no dropout; head and loss as in big_vision (sigmoid, bias -10)."""
    return TrainConfig(
        model=vit(variant, num_classes=JFT_300M_CLASSES, head_bias=-10.0),
        global_batch_size=4096,
        micro_batch_size=micro_batch_size,
        epochs=epochs,
        objective=ObjectiveConfig("sigmoid"),
        optimizer=OptimizerConfig(peak_lr=peak_lr, weight_decay=0.1),
        schedule=ScheduleConfig("linear", warmup_steps=10_000),
    )


def vit_b32_jft300m() -> TrainConfig:
    """ViT-B/32 on a JFT-300M-like set, 7 epochs, lr 8e-4 (paper, table 3; fine-tuned it reached 80.73 on ImageNet, table 5)."""
    return _jft300m("b32", epochs=7, peak_lr=8e-4, micro_batch_size=256)


def vit_b16_jft300m() -> TrainConfig:
    """ViT-B/16 on a JFT-300M-like set, 7 epochs, lr 8e-4 (paper, table 3)."""
    return _jft300m("b16", epochs=7, peak_lr=8e-4)


def vit_l32_jft300m() -> TrainConfig:
    """ViT-L/32 on a JFT-300M-like set, 7 epochs, lr 6e-4 (paper, table 3)."""
    return _jft300m("l32", epochs=7, peak_lr=6e-4)


def vit_l16_jft300m() -> TrainConfig:
    """ViT-L/16 on a JFT-300M-like set, 14 epochs, lr 4e-4 (paper, table 3; fine-tuned: ImageNet 87.76, 680 TPUv3-core-days)."""
    return _jft300m("l16", epochs=14, peak_lr=4e-4, micro_batch_size=64)


def vit_l16_jft300m_7ep() -> TrainConfig:
    """ViT-L/16 on a JFT-300M-like set, 7 epochs, lr 4e-4 (paper, table 3)."""
    return _jft300m("l16", epochs=7, peak_lr=4e-4, micro_batch_size=64)


def vit_h14_jft300m() -> TrainConfig:
    """ViT-H/14 on a JFT-300M-like set, 14 epochs of 303 M images, lr 3e-4: about 1.04 M steps and 4.3e21 FLOP.

    Paper, table 3. Fine-tuned at 518 px it reached 88.55 on ImageNet, 94.55 on CIFAR-100, 77.63 on VTAB for 2,500 TPUv3-core-days
    (table 2). Smaller images first, `--schedule.phases 0.5:image_size=126 0.8:image_size=154`, take 0.50 of the FLOPs; what that does to
    the accuracy has not been measured.
    """
    return _jft300m("h14", epochs=14, peak_lr=3e-4, micro_batch_size=32)


def _jft3b(variant: str) -> TrainConfig:
    """big_vision/configs/proj/scaling_laws/train_vit_g.py: batch 16,384, 1 M steps, MAP head, rsqrt with a cooldown of 50 k steps.

    What differs: AdamW stands for Adafactor with momentum 0.9, and the head's kernel decays as all others do, not 100 times as much.
    """
    return TrainConfig(
        model=vit(variant, num_classes=JFT_3B_CLASSES, head_bias=-10.0, pool="map"),
        global_batch_size=16_384,
        micro_batch_size=32,
        steps=1_000_000,
        preprocess=PreprocessConfig(eval_protocol="big_vision"),
        objective=ObjectiveConfig("sigmoid"),
        optimizer=OptimizerConfig(peak_lr=8e-4, weight_decay=0.03),
        schedule=ScheduleConfig("rsqrt", warmup_steps=10_000, cooldown_steps=50_000, timescale=10_000),
    )


def vit_giant14_jft3b() -> TrainConfig:
    """ViT-g/14 (1 B parameters) on a JFT-3B-like set, 1 M steps of 16,384 (arXiv 2106.04560; big_vision's train_vit_g.py).

    AdamW stands for Adafactor, and the head decays as all else, not 100 times as much.
    """
    return _jft3b("g14")


def vit_gigantic14_jft3b() -> TrainConfig:
    """ViT-G/14 (1.8 B parameters) on a JFT-3B-like set: vit-giant14-jft3b with the larger model, as train_vit_g.py (arXiv 2106.04560) says.

    Fine-tuned, the paper's reached 90.45 on ImageNet (its abstract), with Adafactor.
    """
    return _jft3b("G14")


def _imagenet21k(variant: str, epochs: float, micro_batch_size: int = 128) -> TrainConfig:
    """Paper, table 3: lr 1e-3 falling linearly (to 1e-5: vision_transformer), weight decay 0.03, dropout 0.1; sigmoid, bias -10."""
    return TrainConfig(
        model=vit(variant, num_classes=IMAGENET_21K_CLASSES, dropout=0.1, head_bias=-10.0),
        global_batch_size=4096,
        micro_batch_size=micro_batch_size,
        epochs=epochs,
        objective=ObjectiveConfig("sigmoid"),
        optimizer=OptimizerConfig(peak_lr=1e-3, weight_decay=0.03),
        schedule=ScheduleConfig("linear", warmup_steps=10_000, end_lr=1e-5),
    )


def vit_b32_imagenet21k() -> TrainConfig:
    """ViT-B/32 on ImageNet-21k, 90 epochs (paper, table 3)."""
    return _imagenet21k("b32", epochs=90, micro_batch_size=256)


def vit_b16_imagenet21k() -> TrainConfig:
    """ViT-B/16 on ImageNet-21k, 90 epochs (paper, table 3)."""
    return _imagenet21k("b16", epochs=90)


def vit_l32_imagenet21k() -> TrainConfig:
    """ViT-L/32 on ImageNet-21k, 90 epochs (paper, table 3)."""
    return _imagenet21k("l32", epochs=90)


def vit_l32_imagenet21k_30ep() -> TrainConfig:
    """ViT-L/32 on ImageNet-21k, 30 epochs (paper, table 3)."""
    return _imagenet21k("l32", epochs=30)


def vit_l16_imagenet21k() -> TrainConfig:
    """ViT-L/16 on ImageNet-21k, 90 epochs (paper, table 3; fine-tuned: ImageNet 85.30, table 2)."""
    return _imagenet21k("l16", epochs=90, micro_batch_size=64)


def vit_l16_imagenet21k_30ep() -> TrainConfig:
    """ViT-L/16 on ImageNet-21k, 30 epochs (paper, table 3)."""
    return _imagenet21k("l16", epochs=30, micro_batch_size=64)


def _imagenet1k(variant: str, micro_batch_size: int = 128) -> TrainConfig:
    """Paper, table 3: 300 epochs, lr 3e-3 with cosine decay, weight decay 0.3, dropout 0.1; softmax over the single label."""
    return TrainConfig(
        model=vit(variant, num_classes=IMAGENET_1K_CLASSES, dropout=0.1),
        global_batch_size=4096,
        micro_batch_size=micro_batch_size,
        epochs=300,
        objective=ObjectiveConfig("softmax"),
        optimizer=OptimizerConfig(peak_lr=3e-3, weight_decay=0.3),
        schedule=ScheduleConfig("cosine", warmup_steps=10_000),
    )


def vit_b32_imagenet1k() -> TrainConfig:
    """ViT-B/32 on ImageNet-1k, 300 epochs (paper, table 3)."""
    return _imagenet1k("b32", micro_batch_size=256)


def vit_b16_imagenet1k() -> TrainConfig:
    """ViT-B/16 on ImageNet-1k, 300 epochs (paper, table 3)."""
    return _imagenet1k("b16")


def vit_l32_imagenet1k() -> TrainConfig:
    """ViT-L/32 on ImageNet-1k, 300 epochs (paper, table 3)."""
    return _imagenet1k("l32")


def vit_l16_imagenet1k() -> TrainConfig:
    """ViT-L/16 on ImageNet-1k, 300 epochs (paper, table 3)."""
    return _imagenet1k("l16", micro_batch_size=64)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Pre-training with more augmentation (big_vision at commit 0127fb6): RandAugment of two layers, mixup, AdamW, lr 1e-3 with cosine decay.
#
# Its weight decay of 1e-4 is a step's, ours is times the learning rate: 0.1. It draws one lambda for a step and mixes each image with the
# one before; here each pair draws its own. Its ImageNet-1k models have a representation layer, as --model.representation-size gives one;
# without, an export to timm keeps the head.
# ---------------------------------------------------------------------------------------------------------------------------------------


def _augmented(model: ViTConfig, *, magnitude: float, mixup: float, epochs: float, objective: ObjectiveConfig) -> TrainConfig:
    return TrainConfig(
        model=model,
        global_batch_size=4096,
        micro_batch_size=64 if model.width >= 1024 else 256 if model.patch_size == 32 else 128,
        epochs=epochs,
        preprocess=PreprocessConfig(randaugment_layers=2, randaugment_magnitude=magnitude, eval_protocol="big_vision"),
        mix=MixConfig(mixup_alpha=mixup),
        objective=objective,
        optimizer=OptimizerConfig(peak_lr=1e-3, weight_decay=0.1),
        schedule=ScheduleConfig("cosine", warmup_steps=10_000),
    )


def vit_s16_imagenet1k_plain() -> TrainConfig:
    """ViT-S/16 on ImageNet-1k, 90 epochs: "Better plain ViT baselines" (arXiv 2205.01580; big_vision/configs/vit_s16_i1k.py).

    Batch 1024, mean pooling, fixed sin-cos positions, RandAugment(2, 10), mixup 0.2; big_vision reaches 76.5 in 6 to 7 hours on a TPUv3-8.
    --epochs 300 is its longer run.
    """
    model = vit("s16", num_classes=IMAGENET_1K_CLASSES, pool="mean", position="sincos")
    config = _augmented(model, magnitude=10, mixup=0.2, epochs=90, objective=ObjectiveConfig("softmax"))
    return replace(config, global_batch_size=1024)


def _augreg_imagenet1k(variant: str, magnitude: float, mixup: float) -> TrainConfig:
    model = vit(variant, num_classes=IMAGENET_1K_CLASSES, head_bias=-6.9)
    return _augmented(model, magnitude=magnitude, mixup=mixup, epochs=300, objective=ObjectiveConfig("sigmoid"))


def vit_ti16_imagenet1k_augreg() -> TrainConfig:
    """ViT-Ti/16 on ImageNet-1k, 300 epochs, `light1`: RandAugment(2, 0) (arXiv 2106.10270; big_vision/configs/vit_i1k.py)."""
    return _augreg_imagenet1k("ti16", 0, 0.0)


def vit_s32_imagenet1k_augreg() -> TrainConfig:
    """ViT-S/32 on ImageNet-1k, 300 epochs, `medium1`: RandAugment(2, 15), mixup 0.2 (arXiv 2106.10270; vit_i1k.py)."""
    return _augreg_imagenet1k("s32", 15, 0.2)


def vit_s16_imagenet1k_augreg() -> TrainConfig:
    """ViT-S/16 on ImageNet-1k, 300 epochs, `medium2`: RandAugment(2, 15), mixup 0.5 (arXiv 2106.10270; vit_i1k.py)."""
    return _augreg_imagenet1k("s16", 15, 0.5)


def vit_b32_imagenet1k_augreg() -> TrainConfig:
    """ViT-B/32 on ImageNet-1k, 300 epochs, `medium2`: RandAugment(2, 15), mixup 0.5 (arXiv 2106.10270; vit_i1k.py)."""
    return _augreg_imagenet1k("b32", 15, 0.5)


def vit_b16_imagenet1k_augreg() -> TrainConfig:
    """ViT-B/16 on ImageNet-1k, 300 epochs, `medium2`: RandAugment(2, 15), mixup 0.5 (arXiv 2106.10270; vit_i1k.py)."""
    return _augreg_imagenet1k("b16", 15, 0.5)


def vit_l16_imagenet1k_augreg() -> TrainConfig:
    """ViT-L/16 on ImageNet-1k, 300 epochs, `medium2`: RandAugment(2, 15), mixup 0.5 (arXiv 2106.10270; vit_i1k.py)."""
    return _augreg_imagenet1k("l16", 15, 0.5)


def _augreg_imagenet21k(variant: str, magnitude: float, mixup: float) -> TrainConfig:
    model = vit(variant, num_classes=IMAGENET_21K_CLASSES, head_bias=-10.0, pool="mean")
    return _augmented(model, magnitude=magnitude, mixup=mixup, epochs=300, objective=ObjectiveConfig("sigmoid"))


def vit_b32_imagenet21k_augreg() -> TrainConfig:
    """ViT-B/32 on ImageNet-21k, 300 epochs, mean pooling, `light2`: RandAugment(2, 10), mixup 0.2 (arXiv 2106.10270; vit_i21k.py)."""
    return _augreg_imagenet21k("b32", 10, 0.2)


def vit_b16_imagenet21k_augreg() -> TrainConfig:
    """ViT-B/16 on ImageNet-21k, 300 epochs, mean pooling, `light2`: RandAugment(2, 10), mixup 0.2 (arXiv 2106.10270; vit_i21k.py)."""
    return _augreg_imagenet21k("b16", 10, 0.2)


def vit_l16_imagenet21k_augreg() -> TrainConfig:
    """ViT-L/16 on ImageNet-21k, 300 epochs, mean pooling, `medium2`: RandAugment(2, 15), mixup 0.5 (arXiv 2106.10270; vit_i21k.py)."""
    return _augreg_imagenet21k("l16", 15, 0.5)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Fine-tuning (paper, table 4 and appendix B.1): SGD with momentum 0.9, batch 512, clip 1, cosine to 0, no weight decay.
# ---------------------------------------------------------------------------------------------------------------------------------------


_IMAGENET_SWEEP = SweepConfig((0.003, 0.01, 0.03, 0.06), holdout=0.01)  # rates: table 4; shares: appendix B.1.1
_CIFAR_SWEEP = SweepConfig((0.001, 0.003, 0.01, 0.03), holdout=0.02)
_SMALL_SWEEP = replace(_CIFAR_SWEEP, holdout=0.1)
_VTAB_SWEEP = SweepConfig(holdout=0.2)  # of a task's 1,000 examples the 200 that VTAB itself sets aside (arXiv 1910.04867)


def _finetune(
    *, steps: int, peak_lr: float, warmup_steps: int, sweep: SweepConfig = _IMAGENET_SWEEP, image_size: int = 384,
    average_decay: float = 0.0,
) -> FinetuneConfig:  # fmt: skip
    """Warm-up lengths and evaluation at the full, squashed image: vision_transformer, vit_jax/configs/common.py and input_pipeline.py."""
    return FinetuneConfig(
        steps=steps,
        global_batch_size=512,
        micro_batch_size=16,
        log_every=min(50, steps // 10),
        eval_every=max(100, steps // 10),
        checkpoint_every=max(100, steps // 10),
        model=NewModelConfig(image_size=(image_size, image_size)),
        preprocess=ViewConfig(eval_crop=1.0),
        objective=ObjectiveConfig("softmax"),
        optimizer=OptimizerConfig("sgd", peak_lr=peak_lr, average_decay=average_decay),
        schedule=ScheduleConfig("cosine", warmup_steps=warmup_steps),
        sweep=sweep,
    )


def finetune_imagenet_384() -> FinetuneConfig:
    """ImageNet-1k at 384 px, 20 k steps; the paper's grid of peak lr is 0.003, 0.01, 0.03, 0.06 (table 4), which --sweep tries."""
    return _finetune(steps=20_000, peak_lr=0.03, warmup_steps=500)


def finetune_imagenet_512() -> FinetuneConfig:
    """ImageNet-1k at 512 px with Polyak averaging 0.9999: the paper's best for ViT-L/16 (87.76; appendix B.1.1)."""
    return _finetune(steps=20_000, peak_lr=0.03, warmup_steps=500, image_size=512, average_decay=0.9999)


def finetune_imagenet_518() -> FinetuneConfig:
    """ImageNet-1k at 518 px with Polyak averaging 0.9999: the paper's best for ViT-H/14 (88.55; appendix B.1.1)."""
    return _finetune(steps=20_000, peak_lr=0.03, warmup_steps=500, image_size=518, average_decay=0.9999)


def finetune_cifar10() -> FinetuneConfig:
    """CIFAR-10 at 384 px, 10 k steps; grid of peak lr 0.001, 0.003, 0.01, 0.03 (table 4)."""
    return _finetune(steps=10_000, peak_lr=0.01, warmup_steps=500, sweep=_CIFAR_SWEEP)


def finetune_cifar100() -> FinetuneConfig:
    """CIFAR-100 at 384 px, 10 k steps; grid of peak lr 0.001, 0.003, 0.01, 0.03 (table 4; H/14 JFT: 94.55)."""
    return _finetune(steps=10_000, peak_lr=0.01, warmup_steps=500, sweep=_CIFAR_SWEEP)


def finetune_pets() -> FinetuneConfig:
    """Oxford-IIIT Pets at 384 px, 500 steps; grid of peak lr 0.001, 0.003, 0.01, 0.03 (table 4)."""
    return _finetune(steps=500, peak_lr=0.01, warmup_steps=100, sweep=_SMALL_SWEEP)


def finetune_flowers() -> FinetuneConfig:
    """Oxford Flowers-102 at 384 px, 500 steps; grid of peak lr 0.001, 0.003, 0.01, 0.03 (table 4)."""
    return _finetune(steps=500, peak_lr=0.01, warmup_steps=100, sweep=_SMALL_SWEEP)


def finetune_vtab() -> FinetuneConfig:
    """A VTAB task of 1,000 examples at 384 px, 2,500 steps, lr 0.01 for every task (table 4 and appendix B.1.1)."""
    return _finetune(steps=2_500, peak_lr=0.01, warmup_steps=100, sweep=_VTAB_SWEEP)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Fine-tuning on ImageNet-1k as it is done today: AdamW, a learning rate that falls from layer to layer, drop-path, RandAugment, at 224 px.
#
# What differs from the sources: RandAugment(2, 9) draws from big_vision's operations and its magnitude has no noise; there is no random
# erasing (whose effect FINETUNE.md of MAE calls smaller than random variance); each pair of images is mixed by a lambda of its own, not
# a whole batch by one; the head starts from zeros. The pool is the checkpoint's: the sources take the mean of the patches. Warm-ups
# are epochs there, and here the steps of as many epochs of ImageNet-1k.
# ---------------------------------------------------------------------------------------------------------------------------------------


def _finetune_by_layers(
    *, epochs: float, batch: int, peak_lr: float, layer_decay: float, drop_path_rate: float, weight_decay: float, mix: MixConfig,
    micro_batch_size: int, warmup_epochs: int = 5,
) -> FinetuneConfig:  # fmt: skip
    epoch = 1_281_167 / batch
    return FinetuneConfig(
        epochs=epochs,
        global_batch_size=batch,
        micro_batch_size=micro_batch_size,
        eval_every=round(5 * epoch),
        checkpoint_every=round(epoch),
        model=NewModelConfig(image_size=(224, 224), drop_path_rate=drop_path_rate),
        preprocess=ViewConfig("bicubic", crop_scale=(0.08, 1.0), randaugment_layers=2, randaugment_magnitude=9),
        mix=mix,
        objective=ObjectiveConfig("softmax", label_smoothing=0.1),
        optimizer=OptimizerConfig(peak_lr=peak_lr, weight_decay=weight_decay, grad_clip=0.0, layer_decay=layer_decay),
        schedule=ScheduleConfig("cosine", warmup_steps=round(warmup_epochs * epoch), end_lr=1e-6),
        position_interpolation="deit",
        sweep=SweepConfig(holdout=0.01),
    )


def _mae(*, epochs: float, base_lr: float, layer_decay: float, drop_path_rate: float, micro_batch_size: int) -> FinetuneConfig:
    """facebookresearch/mae, FINETUNE.md and main_finetune.py: batch 1024, lr = base_lr x 1024 / 256, mixup 0.8 and CutMix 1."""
    return _finetune_by_layers(
        epochs=epochs, batch=1024, peak_lr=4 * base_lr, layer_decay=layer_decay, drop_path_rate=drop_path_rate, weight_decay=0.05,
        mix=MixConfig(mixup_alpha=0.8, cutmix_alpha=1.0), micro_batch_size=micro_batch_size,
    )  # fmt: skip


def finetune_imagenet_mae_b16() -> FinetuneConfig:
    """ImageNet-1k at 224 px as MAE (arXiv 2111.06377) fine-tunes ViT-B/16, 100 epochs, lr 2e-3 x 0.65 a layer; theirs reached 83.66.

    `vitscale finetune finetune-imagenet-mae-b16 --init CHECKPOINT --data DATA`; theirs took 7 hours on 32 V100 (FINETUNE.md).
    """
    return _mae(epochs=100, base_lr=5e-4, layer_decay=0.65, drop_path_rate=0.1, micro_batch_size=128)


def finetune_imagenet_mae_l16() -> FinetuneConfig:
    """ImageNet-1k at 224 px as MAE (arXiv 2111.06377) fine-tunes ViT-L/16, 50 epochs, lr 4e-3 x 0.75 a layer; theirs reached 85.95.

    `vitscale finetune finetune-imagenet-mae-l16 --init CHECKPOINT --data DATA`; theirs took 9 hours on 32 V100 (FINETUNE.md).
    """
    return _mae(epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path_rate=0.2, micro_batch_size=64)


def finetune_imagenet_mae_h14() -> FinetuneConfig:
    """ImageNet-1k at 224 px as MAE (arXiv 2111.06377) fine-tunes ViT-H/14, 50 epochs, lr 4e-3 x 0.75 a layer; theirs reached 86.93.

    `vitscale finetune finetune-imagenet-mae-h14 --init CHECKPOINT --data DATA`; theirs took 13 hours on 64 V100 (FINETUNE.md).
    """
    return _mae(epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path_rate=0.3, micro_batch_size=32)


def _beit(*, layer_decay: float, drop_path_rate: float, micro_batch_size: int) -> FinetuneConfig:
    """microsoft/unilm, beit/get_started_for_image_classification.md, of models fine-tuned on ImageNet-22k before: batch 512, no mixing."""
    return _finetune_by_layers(
        epochs=30, batch=512, peak_lr=2e-5, layer_decay=layer_decay, drop_path_rate=drop_path_rate, weight_decay=1e-8, mix=MixConfig(),
        micro_batch_size=micro_batch_size,
    )  # fmt: skip


def finetune_imagenet_beit_b16() -> FinetuneConfig:
    """ImageNet-1k at 224 px as BEiT (arXiv 2106.08254) goes on from labels of ImageNet-22k: ViT-B/16, 30 epochs, lr 2e-5 x 0.85 a layer.

    `vitscale finetune finetune-imagenet-beit-b16 --init CHECKPOINT --data DATA`, of a checkpoint trained on ImageNet-21k, say. Theirs, with
    relative positions and LayerScale, reached 86.82 at 384 px.
    """
    return _beit(layer_decay=0.85, drop_path_rate=0.1, micro_batch_size=64)


def finetune_imagenet_beit_l16() -> FinetuneConfig:
    """ImageNet-1k at 224 px as BEiT (arXiv 2106.08254) goes on from labels of ImageNet-22k: ViT-L/16, 30 epochs, lr 2e-5 x 0.9 a layer.

    `vitscale finetune finetune-imagenet-beit-l16 --init CHECKPOINT --data DATA`. Theirs, with relative positions and LayerScale, reached
    87.40 at 224 px and 88.60 at 512.
    """
    return _beit(layer_decay=0.9, drop_path_rate=0.4, micro_batch_size=32)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Small ones, for a CPU
# ---------------------------------------------------------------------------------------------------------------------------------------


def tiny_digits() -> TrainConfig:
    """A ViT of 0.1 M parameters on 6-pixel images in patches of 2, for 8-pixel handwritten digits."""
    return TrainConfig(
        epochs=60,
        global_batch_size=64,
        micro_batch_size=32,
        log_every=10,
        eval_every=200,
        checkpoint_every=200,
        model=ViTConfig(depth=4, width=64, mlp_dim=128, num_heads=4, patch_size=2, image_size=(6, 6)),
        preprocess=PreprocessConfig(crop_scale=(0.6, 1.0), flip=0.0, eval_crop=1.0),
        optimizer=OptimizerConfig(peak_lr=2e-3, weight_decay=0.05),
        schedule=ScheduleConfig("cosine", warmup_steps=50),
        engine=EngineConfig(precision="fp32"),
    )


def tiny_fashion() -> TrainConfig:
    """A ViT of 0.1 M parameters on 20-pixel images in patches of 4, for the 28-pixel images of Fashion-MNIST."""
    return TrainConfig(
        epochs=8,
        global_batch_size=64,
        micro_batch_size=32,
        log_every=50,
        eval_every=0,
        checkpoint_every=1000,
        model=ViTConfig(depth=4, width=64, mlp_dim=128, num_heads=4, patch_size=4, image_size=(20, 20)),
        preprocess=PreprocessConfig(crop_scale=(0.9, 1.0), flip=0.0, eval_crop=1.0),
        optimizer=OptimizerConfig(peak_lr=2e-3, weight_decay=0.05),
        schedule=ScheduleConfig("cosine", warmup_steps=100),
        engine=EngineConfig(precision="fp32"),
    )


def tiny_finetune() -> FinetuneConfig:
    """The paper's fine-tuning recipe for tiny-digits and tiny-fashion: SGD, batch 64, native resolution by --model.image-size."""
    return FinetuneConfig(
        steps=100,
        global_batch_size=64,
        micro_batch_size=32,
        log_every=5,
        eval_every=25,
        checkpoint_every=100,
        model=NewModelConfig(image_size=(28, 28)),
        preprocess=ViewConfig(crop_scale=(0.6, 1.0), flip=0.0, eval_crop=1.0),
        optimizer=OptimizerConfig("sgd", peak_lr=0.06),
        schedule=ScheduleConfig("cosine", warmup_steps=10),
        engine=EngineConfig(precision="fp32"),
        sweep=SweepConfig((0.01, 0.03, 0.06), holdout=0.1),
    )


# ---------------------------------------------------------------------------------------------------------------------------------------

PRETRAIN: tuple[Recipe[TrainConfig], ...] = (
    vit_b32_jft300m, vit_b16_jft300m, vit_l32_jft300m, vit_l16_jft300m, vit_l16_jft300m_7ep, vit_h14_jft300m,
    vit_giant14_jft3b, vit_gigantic14_jft3b,
    vit_b32_imagenet21k, vit_b16_imagenet21k, vit_l32_imagenet21k, vit_l32_imagenet21k_30ep, vit_l16_imagenet21k, vit_l16_imagenet21k_30ep,
    vit_b32_imagenet1k, vit_b16_imagenet1k, vit_l32_imagenet1k, vit_l16_imagenet1k,
    vit_s16_imagenet1k_plain, vit_ti16_imagenet1k_augreg, vit_s32_imagenet1k_augreg, vit_s16_imagenet1k_augreg, vit_b32_imagenet1k_augreg,
    vit_b16_imagenet1k_augreg, vit_l16_imagenet1k_augreg, vit_b32_imagenet21k_augreg, vit_b16_imagenet21k_augreg,
    vit_l16_imagenet21k_augreg,
    tiny_digits, tiny_fashion,
)  # fmt: skip
FINETUNE: tuple[Recipe[FinetuneConfig], ...] = (
    finetune_imagenet_384, finetune_imagenet_512, finetune_imagenet_518, finetune_cifar10, finetune_cifar100, finetune_pets,
    finetune_flowers, finetune_vtab, finetune_imagenet_mae_b16, finetune_imagenet_mae_l16, finetune_imagenet_mae_h14,
    finetune_imagenet_beit_b16, finetune_imagenet_beit_l16, tiny_finetune,
)  # fmt: skip


def recipe_name(function: Recipe[Config]) -> str:
    """What a recipe is called on the command line."""
    return function.__name__.replace("_", "-")


def recipe(name: str, among: tuple[Recipe[Config], ...]) -> Config:
    """The recipe of that name. Raises ConfigError that lists the names there are."""
    by_name = {recipe_name(function): function for function in among}
    if name not in by_name:
        near = difflib.get_close_matches(name, by_name, n=1)
        guess = f" (perhaps {near[0]} was meant)" if near else ""
        if name in {recipe_name(function) for function in (*PRETRAIN, *FINETUNE)}:
            guess = " for this verb, but for the other of pretrain and finetune"
        raise ConfigError(f"no recipe is called {name!r}{guess}; there are {', '.join(by_name)}")
    return replace(by_name[name](), recipe=name)
