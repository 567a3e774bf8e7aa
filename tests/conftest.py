"""What tests of several packages share: a small packed dataset of real pixels and a configuration that trains on it in a second."""

import dataclasses
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.config import PackConfig
from data_tools.pack import pack
from data_tools.processes import spin_little
from vitscale.config import (
    EngineConfig,
    OptimizerConfig,
    PreprocessConfig,
    ScheduleConfig,
    StreamConfig,
    TrainConfig,
    ViTConfig,
)

NUM_CLASSES = 5

os.environ.update(spin_little(os.environ))  # before torch is there, for tests share cores

# Tests that run in the background of a shell are started with Ctrl-C ignored, and would hand that down to what they interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)


def write_images(folder: Path, count: int, seed: int, num_classes: int = NUM_CLASSES) -> Path:
    """Class folders of small images whose stripes tell their class."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        label = i % num_classes
        height, width = (int(side) for side in rng.integers(20, 40, 2))
        rows, columns = np.mgrid[0:height, 0:width]
        wave = np.sin((label + 1) * (rows if label % 2 else columns) / 3)
        pixels = np.clip(127 + 90 * wave[..., None] + rng.normal(0, 25, (height, width, 3)), 0, 255).astype(np.uint8)
        path = folder / f"class-{label}" / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT with train (131 samples in 7 shards: neither divides a batch) and val (37 samples)."""
    folder = tmp_path_factory.mktemp("dataset")
    for split, count, seed in (("train", 131, 0), ("val", 37, 1)):
        source = write_images(folder / "images" / split, count, seed)
        pack(PackConfig(sources=(str(source),), out=str(folder / "packed"), split=split, samples_per_shard=20))
    return folder / "packed"


@pytest.fixture
def config(dataset: Path, tmp_path: Path) -> TrainConfig:
    """An unresolved config of a tiny ViT: 27 steps of 24 images, each of them logged."""
    return TrainConfig(
        recipe="test",
        data=str(dataset / "train"),
        eval_data="none",
        out=str(tmp_path / "run"),
        steps=27,
        global_batch_size=24,
        micro_batch_size=4,
        log_every=1,
        eval_every=0,
        checkpoint_every=1000,
        model=ViTConfig(depth=3, width=32, mlp_dim=64, num_heads=4, patch_size=8, image_size=(16, 24), drop_path_rate=0.2),
        preprocess=PreprocessConfig(crop_scale=(0.3, 1.0)),
        stream=StreamConfig(workers=2),
        optimizer=OptimizerConfig(peak_lr=3e-3, weight_decay=0.1, grad_clip=0.3),
        schedule=ScheduleConfig("cosine", warmup_steps=3),
        engine=EngineConfig(zero_stage=0, precision="fp32"),
    )


def with_engine(config: TrainConfig, **changes: object) -> TrainConfig:
    """The config with parts of `engine` replaced."""
    return dataclasses.replace(config, engine=dataclasses.replace(config.engine, **changes))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of the same classes as `dataset`, with 43 samples in 15 shards."""
    folder = tmp_path_factory.mktemp("second")
    pack(PackConfig(sources=(str(write_images(folder / "images", 43, 7)),), out=str(folder / "packed"), samples_per_shard=3))
    return folder / "packed" / "train"
