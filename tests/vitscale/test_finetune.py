"""Position embeddings go to a new grid as each named code does it, and nothing but them, the head and the representation layer changes.

The references are numpy, written out: separable kernels at half-pixel centres for torch's modes, scipy.ndimage.zoom for the paper's.
"""

import io
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.ndimage
import torch
from PIL import Image
from torch import Tensor
from transformers import ViTConfig as ViTHFConfig
from transformers.models.vit.modeling_vit import ViTEmbeddings

from launch.run_verbs import command_of
from launch.verbs import pretrain_flags
from tests.command import vitscale
from tests.distributed import run_on_ranks
from tests.runs import case
from tests.vitscale.models import random_images, random_vit, write_checkpoint
from vitscale.checkpoint import describe
from vitscale.config import (
    EngineConfig,
    FinetuneConfig,
    InitConfig,
    NewModelConfig,
    OptimizerConfig,
    PreprocessConfig,
    ScheduleConfig,
    TrainConfig,
    ViTConfig,
    fine_tuned_model,
)
from vitscale.errors import CheckpointError
from vitscale.finding import find_checkpoint
from vitscale.finetune import METHODS, fine_tuned_weights, resample, resample_grid
from vitscale.model import ViT, initialize, parameter_shapes
from vitscale.resolve import resolve
from vitscale.run import read_config, read_metrics
from vitscale.weights import read_weights

Matrix = npt.NDArray[np.float64]
SMALL = ViTConfig(depth=2, width=32, mlp_dim=64, num_heads=4, patch_size=4, image_size=(16, 24), num_classes=7, representation_size=16)
GRIDS = [((16, 16), (37, 37)), ((14, 14), (24, 24)), ((14, 14), (7, 28)), ((4, 6), (9, 5)), ((12, 8), (5, 8)), ((3, 3), (1, 7))]


def grid_of(shape: tuple[int, int], width: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(1, shape[0] * shape[1], width, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------------------------
# References
# ---------------------------------------------------------------------------------------------------------------------------------------


def triangle(x: Matrix) -> Matrix:
    return np.clip(1 - np.abs(x), 0, None)


def keys_cubic(a: float) -> object:
    """Keys' cubic convolution kernel."""

    def kernel(x: Matrix) -> Matrix:
        x = np.abs(x)
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * (x**3 - 5 * x**2 + 8 * x - 4)
        return np.where(x <= 1, near, np.where(x < 2, far, 0.0))

    return kernel


def clamped(old: int, new: int, kernel: object, support: int) -> Matrix:
    """(new, old) weights without antialias: the kernel at its own size, taps past an edge are the edge's."""
    matrix = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        for tap in range(int(np.floor(centre)) - support + 1, int(np.floor(centre)) + support + 1):
            matrix[i, min(max(tap, 0), old - 1)] += kernel(np.array(centre - tap))  # type: ignore[operator]
    return matrix


def antialiased(old: int, new: int, kernel: object, support: int) -> Matrix:
    """(new, old) weights as Pillow has them: the kernel widened when shrinking, cut at the edges and normalised."""
    scale = max(old / new, 1.0)
    centres = (np.arange(new) + 0.5) * old / new
    matrix = kernel((np.arange(old)[None] + 0.5 - centres[:, None]) / scale)  # type: ignore[operator]
    low = np.clip(np.floor(centres - support * scale + 0.5), 0, None)[:, None]
    high = np.clip(np.floor(centres + support * scale + 0.5), None, old)[:, None]
    matrix = np.where((np.arange(old)[None] >= low) & (np.arange(old)[None] < high), matrix, 0.0)
    return matrix / matrix.sum(axis=1, keepdims=True)


def reference(embeddings: Tensor, old: tuple[int, int], new: tuple[int, int], method: str) -> Matrix:
    grid = embeddings[0].double().numpy().reshape(*old, -1)
    if method == "paper":
        out = scipy.ndimage.zoom(grid, (new[0] / old[0], new[1] / old[1], 1), order=1)
        assert out.shape[:2] == new
        return out.reshape(new[0] * new[1], -1)
    rows, columns = (
        {
            "timm": lambda a, b: antialiased(a, b, keys_cubic(-0.5), 2),
            "deit": lambda a, b: clamped(a, b, keys_cubic(-0.75), 2),
            "timm_npz": lambda a, b: clamped(a, b, triangle, 1),
        }[method](a, b)
        for a, b in zip(old, new, strict=True)
    )
    return np.einsum("ia,jb,abd->ijd", rows, columns, grid).reshape(new[0] * new[1], -1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("old", "new"), GRIDS, ids=str)
def test_every_method_is_the_written_out_one(method: str, old: tuple[int, int], new: tuple[int, int]) -> None:
    embeddings = grid_of(old)
    out = resample_grid(embeddings, old, new, method)
    assert out.shape == (1, new[0] * new[1], 8)
    np.testing.assert_allclose(out[0].numpy(), reference(embeddings, old, new, method), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("old", "new"), [((14, 14), (24, 24)), ((14, 14), (7, 28)), ((4, 6), (9, 5))], ids=str)
def test_deit_is_transformers_interpolation(old: tuple[int, int], new: tuple[int, int]) -> None:
    """`interpolate_pos_encoding` of transformers' ViT, which takes square grids alone to begin with, and any to end with."""
    side = old[0] if old[0] == old[1] else 6
    sizes: dict[str, int] = {"hidden_size": 8, "num_attention_heads": 2, "image_size": 4 * side, "patch_size": 4}
    theirs = ViTEmbeddings(ViTHFConfig(**sizes))
    with torch.no_grad():
        theirs.position_embeddings.normal_(generator=torch.Generator().manual_seed(0))
        expected = theirs.interpolate_pos_encoding(torch.zeros(1, 1 + new[0] * new[1], 8), 4 * new[0], 4 * new[1])
    model = replace(SMALL, width=8, num_heads=2, image_size=(4 * side, 4 * side))
    found = resample("pos_embed", theirs.position_embeddings.detach(), model, replace(model, image_size=(4 * new[0], 4 * new[1])), "deit")
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_grid_changes_nothing(method: str) -> None:
    embeddings = grid_of((7, 28))
    assert torch.equal(resample_grid(embeddings, (7, 28), (7, 28), method), embeddings)


@pytest.mark.parametrize("method", METHODS)
def test_as_many_tokens_are_not_the_same_grid(method: str) -> None:
    """14 x 14 and 7 x 28 have equally many; shapes alone would not tell."""
    embeddings = grid_of((14, 14))
    out = resample_grid(embeddings, (14, 14), (7, 28), method)
    assert out.shape == embeddings.shape
    assert (out - embeddings).norm() > 0.5 * embeddings.norm()


@pytest.mark.parametrize("method", METHODS)
def test_rows_stay_rows(method: str) -> None:
    """Embeddings that depend on the column alone still do, whatever the number of rows."""
    row = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    out = resample_grid(row.repeat(1, 4, 1), (4, 6), (9, 11), method).view(9, 11, 8)
    torch.testing.assert_close(out, out[:1].expand_as(out), rtol=0, atol=1e-5)
    assert (out[:, :1] - out).norm() > 1


def test_norms_kept_are_those_measured() -> None:
    """Random embeddings from 16 x 16 to 37 x 37: a recipe that names a method names this factor."""
    embeddings = grid_of((16, 16), width=1280)
    out = {method: resample_grid(embeddings, (16, 16), (37, 37), method) for method in METHODS}
    kept = {method: float(o.square().mean().sqrt() / embeddings.square().mean().sqrt()) for method, o in out.items()}
    assert kept == pytest.approx({"timm": 0.82, "deit": 0.86, "timm_npz": 0.68, "paper": 0.67}, abs=0.01)
    apart = {method: float((o - out["timm"]).norm() / out["timm"].norm()) for method, o in out.items()}
    assert apart == pytest.approx({"timm": 0, "deit": 0.08, "timm_npz": 0.21, "paper": 0.39}, abs=0.01)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Whole models
# ---------------------------------------------------------------------------------------------------------------------------------------


def new_model(old: ViTConfig, image_size: tuple[int, int], num_classes: int = 5) -> ViTConfig:
    return fine_tuned_model(old, NewModelConfig(image_size=image_size), num_classes)


def tuned(tmp_path: Path, old: ViTConfig, new: ViTConfig, method: str = "timm") -> tuple[ViT, dict[str, Tensor]]:
    source = random_vit(old)
    return source, fine_tuned_weights(write_checkpoint(tmp_path / "step-00000002", source), "weight", new, method, seed=3)


@pytest.mark.parametrize("pool", ["cls", "mean", "map"])
@pytest.mark.parametrize("position", ["learned_1d", "learned_2d", "relative", "sincos", "none"])
def test_the_body_stays_and_the_head_is_new(tmp_path: Path, position: str, pool: str) -> None:
    old = replace(SMALL, position=position, pool=pool)
    new = new_model(old, (32, 20))
    source, weights = tuned(tmp_path, old, new)
    before = source.state_dict()
    ViT(new).load_state_dict(weights, strict=True)
    assert weights["head.weight"].shape == (5, 32)
    assert weights["head.weight"].count_nonzero() == 0
    assert weights["head.bias"].count_nonzero() == 0
    assert not any(name.startswith("pre_logits") for name in weights)
    positions = {"learned_1d": {"pos_embed"}, "learned_2d": {"pos_embed_rows", "pos_embed_columns"}}.get(position, set())
    positions |= {name for name in weights if name.endswith("rel_pos_bias")}
    kept = weights.keys() - positions - {"head.weight", "head.bias"}
    assert len(kept) > 20
    assert all(torch.equal(weights[name], before[name]) for name in kept)
    assert all(weights[name].shape != before[name].shape for name in positions)


def test_the_class_tokens_position_is_kept(tmp_path: Path) -> None:
    new = new_model(SMALL, (32, 20))
    source, weights = tuned(tmp_path, SMALL, new, "deit")
    before = source.pos_embed.detach()
    assert weights["pos_embed"].shape == (1, 1 + 8 * 5, 32)
    assert torch.equal(weights["pos_embed"][:, :1], before[:, :1])
    assert torch.equal(weights["pos_embed"][:, 1:], resample_grid(before[:, 1:], (4, 6), (8, 5), "deit"))


def test_equally_many_tokens_are_resampled_in_a_model(tmp_path: Path) -> None:
    new = new_model(SMALL, (12, 32))  # 3 x 8 patches, as many as 4 x 6
    source, weights = tuned(tmp_path, SMALL, new)
    before = source.pos_embed.detach()
    assert weights["pos_embed"].shape == before.shape
    assert torch.equal(weights["pos_embed"][:, 1:], resample_grid(before[:, 1:], (4, 6), (3, 8), "timm"))
    assert not torch.equal(weights["pos_embed"], before)


@pytest.mark.parametrize("method", METHODS)
def test_2d_embeddings_are_resampled_along_their_own_axis(method: str) -> None:
    old, new = replace(SMALL, position="learned_2d"), replace(SMALL, position="learned_2d", image_size=(36, 16))
    table = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    rows = resample("pos_embed_rows", table, old, new, method)
    np.testing.assert_allclose(rows.numpy(), reference(table[None], (4, 1), (9, 1), method), rtol=0, atol=1e-5)
    wide = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    assert resample("pos_embed_columns", wide, old, new, method).shape == (4, 16)
    taller = replace(SMALL, position="learned_2d", image_size=(36, 24))
    torch.testing.assert_close(resample("pos_embed_columns", wide, old, taller, method), wide, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_relative_tables_are_grids_of_offsets(method: str, pool: str) -> None:
    """(2h-1) x (2w-1) offsets resampled as a grid; the three rows of the class token stay; the offset of nothing stays in the middle."""
    old = replace(SMALL, position="relative", pool=pool)
    new = replace(old, image_size=(20, 16))
    extra = 3 if pool == "cls" else 0
    table = torch.randn(7 * 11 + extra, 4, generator=torch.Generator().manual_seed(0))
    out = resample("blocks.1.attn.rel_pos_bias", table, old, new, method)
    assert out.shape == (9 * 7 + extra, 4)
    np.testing.assert_allclose(out[: 9 * 7].numpy(), reference(table[None, : 7 * 11], (7, 11), (9, 7), method), rtol=0, atol=2e-5)
    assert torch.equal(out[9 * 7 :], table[7 * 11 :])
    smooth = -(torch.arange(-3, 4)[:, None].square() + torch.arange(-5, 6).square()[None]).float().reshape(-1, 1).expand(-1, 4)
    peaked = resample("blocks.0.attn.rel_pos_bias", torch.cat([smooth, table[77:]]), old, new, method)[:63]
    assert peaked[:, 0].argmax() == 63 // 2


def test_the_same_size_gives_the_same_features(tmp_path: Path) -> None:
    new = new_model(replace(SMALL, representation_size=0), SMALL.image_size)
    source, weights = tuned(tmp_path, replace(SMALL, representation_size=0), new)
    model = ViT(new).eval()
    model.load_state_dict(weights)
    images = random_images(SMALL, 2)
    assert torch.equal(model.tokens(images), source.tokens(images))
    assert model(images).count_nonzero() == 0


def test_the_average_is_taken_where_there_is_one(tmp_path: Path) -> None:
    weight, average = random_vit(SMALL, seed=0), random_vit(SMALL, seed=1)
    both = write_checkpoint(tmp_path / "both", weight, average=average)
    alone = write_checkpoint(tmp_path / "alone", weight)
    new, name = new_model(SMALL, (32, 20)), "blocks.0.mlp.fc1.weight"
    taken = [fine_tuned_weights(d, kind, new, "timm", 0)[name] for d, kind in ((both, "average"), (both, "weight"), (alone, "average"))]
    expected = [model.state_dict()[name] for model in (average, weight, weight)]
    assert all(torch.equal(a, b) for a, b in zip(taken, expected, strict=True))


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    description = write_checkpoint(tmp_path / "step", random_vit(SMALL))
    short = replace(description, tensors=description.tensors[1:])
    with pytest.raises(CheckpointError, match=r"1 tensors are missing \(cls_token\)"):
        fine_tuned_weights(short, "weight", new_model(SMALL, (32, 20)), "timm", 0)
    deeper = replace(description, model=replace(SMALL, depth=1))
    with pytest.raises(CheckpointError, match="12 are not the model's"):
        fine_tuned_weights(deeper, "weight", new_model(SMALL, (32, 20)), "timm", 0)
    wider = replace(SMALL, mlp_dim=128)
    with pytest.raises(CheckpointError, match=r"mlp\.fc1\.weight has shape \(64, 32\), the model's has \(128, 32\)"):
        fine_tuned_weights(replace(description, model=wider), "weight", new_model(wider, (32, 20)), "timm", 0)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "method"), [("weight", "paper"), ("average", "timm")])
def test_a_run_starts_from_what_was_asked_for(dataset: Path, tmp_path: Path, kind: str, method: str) -> None:
    """Raw weights or the average, interpolated by the named method: what a step at learning rate 0 leaves as it was."""
    source = write_checkpoint(tmp_path / "source", random_vit(SMALL, 1), average=random_vit(SMALL, 2))
    asked = FinetuneConfig(
        data=str(dataset / "train"), out=str(tmp_path / "run"), init=str(source.path), init_weights=kind, position_interpolation=method,
        steps=9, global_batch_size=8, micro_batch_size=8, model=NewModelConfig(image_size=(32, 32)), eval_data="none", seed=5,
        optimizer=OptimizerConfig("sgd", peak_lr=0.1), schedule=ScheduleConfig(warmup_steps=2), engine=EngineConfig(precision="fp32"),
    )  # type: ignore[arg-type] # fmt: skip
    config = resolve(asked, 1)
    run_on_ranks("tests.vitscale.test_zero:walk", 1, {"cases": {"run": case(config, stop_at=1)}}, tmp_path)
    trained = describe(find_checkpoint(str(tmp_path / "run")))
    found = read_weights(trained, "weight", parameter_shapes(config.model))
    for name, weight in fine_tuned_weights(source, kind, config.model, method, seed=5).items():
        assert torch.equal(found[name], weight), name


def test_a_source_that_was_damaged_since_it_was_chosen_is_refused(dataset: Path, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", random_vit(SMALL))
    asked = FinetuneConfig(
        data=str(dataset / "train"), out=str(tmp_path / "run"), init=str(source.path), steps=9, global_batch_size=8, micro_batch_size=8,
        model=NewModelConfig(image_size=(32, 32)), eval_data="none", engine=EngineConfig(precision="fp32"),
    )  # fmt: skip
    config = resolve(asked, 1)
    file = source.path / "node-0000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(AssertionError, match=r"CheckpointError: .*node-0000.safetensors does not have the checksum"):
        run_on_ranks("tests.vitscale.test_zero:walk", 1, {"cases": {"run": case(config, stop_at=1)}}, tmp_path)


CLASSES = tuple(f"class-{label}" for label in range(5))  # of the dataset


@pytest.mark.parametrize(
    ("classes", "names", "kept"), [(5, CLASSES, True), (5, None, False), (5, ("a", *CLASSES[1:]), False), (6, (*CLASSES, "e"), False)]
)
@pytest.mark.parametrize("representation_size", [0, 16])
def test_pretraining_goes_on_from_weights(
    config: TrainConfig, tmp_path: Path, classes: int, names: tuple[str, ...] | None, kept: bool, representation_size: int
) -> None:  # fmt: skip
    """The body is the checkpoint's and all else the recipe's; head and representation layer are kept where classes agree."""
    old = replace(SMALL, num_classes=classes, representation_size=representation_size, qk_norm=True)
    preprocess = PreprocessConfig(mean=(0.4, 0.5, 0.6))
    source = write_checkpoint(tmp_path / "source", random_vit(old), class_names=names, preprocess=preprocess)
    asked = replace(config, init=InitConfig(str(source.path), "weight", "deit"), model=replace(config.model, representation_size=8))
    run = resolve(asked, 1)
    assert run.init == InitConfig(str(source.path), "weight", "deit", str(source.path), keep_head=kept)
    layer = representation_size if kept else 8
    assert run.model == replace(
        old, num_classes=5, image_size=(16, 24), drop_path_rate=config.model.drop_path_rate, representation_size=layer
    )
    assert (run.preprocess, run.optimizer) == (replace(config.preprocess, mean=(0.4, 0.5, 0.6)), config.optimizer)
    weights = fine_tuned_weights(source, "weight", run.model, "deit", run.seed, keep_head=kept)
    ViT(run.model).load_state_dict(weights)
    before = random_vit(old).state_dict()
    fresh = ViT(run.model)
    initialize(fresh, run.seed)
    for name, weight in weights.items():
        new = name.startswith(("head.", "pre_logits.")) and not kept
        assert torch.equal(weight, (fresh.state_dict() if new else before)[name]), name


def test_the_command_that_goes_on_from_weights(dataset: Path, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", random_vit(replace(SMALL, num_classes=5)), class_names=CLASSES).path
    words = ["pretrain", "tiny-digits", "--init", source, "--data", dataset / "train", "--out", tmp_path / "run", "--steps", "3"]
    words += "--model.image-size 16 16 --global-batch-size 8 --micro-batch-size 8 --schedule.warmup-steps 1 --stream.workers 1".split()
    assert "--model.depth is the checkpoint's" in vitscale(*words, "--model.depth", "3").stderr
    made = vitscale(*words)
    assert made.returncode == 0, made.stderr
    assert "16x24 pixels -> 16x16 pixels, 4x6 -> 4x4 patches, the head of 5 classes is kept" in made.stdout
    run = read_config(tmp_path / "run")
    assert (run.model.depth, run.model.representation_size, run.model.image_size) == (2, 16, (16, 16))
    assert "is finished" in vitscale(*words).stderr
    again = shlex.split(" ".join(command_of(run)))
    assert resolve(pretrain_flags(again[1:]).config, 1) == run


MULTI = ViTConfig(depth=1, width=16, mlp_dim=16, num_heads=2, patch_size=8, image_size=(16, 16), num_classes=4)


@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
def test_one_label_and_several_are_fine_tuned_by_the_command(tmp_path: Path, objective: str) -> None:
    """The first class is the images' brightness, which one step of SGD on a random backbone already tells; with several labels a second."""
    rng, rows = np.random.default_rng(0), []
    for number in range(64):
        bright, wide = number % 2, number // 2 % 2
        pixels = np.clip(rng.normal(60 + 130 * bright, 20, (20, 40 if wide else 20, 3)), 0, 255).astype(np.uint8)
        image = io.BytesIO()
        Image.fromarray(pixels).save(image, "PNG")
        rows.append({"image": image.getvalue(), "label": [bright] if objective == "softmax" else [bright, 2 + wide]})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "images.parquet")
    packed = vitscale("pack", tmp_path / "images.parquet", tmp_path / "data")
    assert packed.returncode == 0, packed.stderr
    source = write_checkpoint(tmp_path / "source", random_vit(MULTI)).path
    made = vitscale(
        "finetune", "tiny-finetune", "--init", source, "--data", tmp_path / "data" / "train", "--out", tmp_path / "run", "--steps", "12",
        "--model.image-size", "24", "16", "--objective.kind", objective, "--holdout", "0.2", "--global-batch-size", "16",
        "--micro-batch-size", "16", "--schedule.warmup-steps", "1", "--stream.workers", "1", "--optimizer.freeze", "backbone",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    classes = 2 if objective == "softmax" else 4
    assert read_config(tmp_path / "run").model.num_classes == classes
    losses = [line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert losses[0] == pytest.approx(np.log(2) if objective == "softmax" else 4 * np.log(2), rel=1e-5), "of a head of zeros"
    assert losses[-1] < 0.8 * losses[0]
    assert read_metrics(tmp_path / "run")[-1]["eval_top1"] > 0.8


@pytest.mark.peers
@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("new", [(12, 12), (3, 10), (5, 6), (2, 4)], ids=str)
def test_our_resampling_named_timm_is_timms(pool: str, new: tuple[int, int]) -> None:
    from timm.layers import resample_abs_pos_embed

    old = replace(SMALL, image_size=(20, 24), pool=pool)  # 5 x 6 patches; 3 x 10 are as many
    embeddings = random_vit(old).pos_embed.detach()
    wanted = replace(old, image_size=(new[0] * 4, new[1] * 4))
    theirs = resample_abs_pos_embed(embeddings, list(new), [5, 6], num_prefix_tokens=int(pool == "cls"))
    assert torch.equal(resample("pos_embed", embeddings, old, wanted, "timm"), theirs)
