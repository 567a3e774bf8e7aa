"""mixup and CutMix: against a plain loop over pairs, the same for every split of a batch, with numbers that are distributed as they say.

The tests marked `peers` need timm and run under `make peers`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist
from scipy import stats
from torch import Tensor

from tests.distributed import run_on_ranks
from vitscale import keyed
from vitscale.check import check_config
from vitscale.config import ConfigError, FinetuneConfig, MixConfig, ObjectiveConfig, TrainConfig, from_dict, to_dict
from vitscale.mixing import Mix, draw_mix, mix_pairs, random_box, symmetric_beta
from vitscale.model import normalize
from vitscale.objective import compute_loss, per_sample_loss
from vitscale.resolve import resolve
from vitscale.run import open_run, read_metrics
from vitscale.train import train

B, H, W, K = 64, 13, 20, 11
KINDS = {
    "mixup": MixConfig(mixup_alpha=0.8),
    "cutmix": MixConfig(cutmix_alpha=1.0),
    "both": MixConfig(mixup_alpha=0.2, cutmix_alpha=1.0, prob=0.8, switch_prob=0.4),
}


def keys(count: int = B, seed: int = 3) -> npt.NDArray[np.int64]:
    return keyed.key(keyed.Purpose.SAMPLE, seed, np.arange(count)).view(np.int64)


def drawn(kind: str, count: int = B, size: tuple[int, int] = (H, W)) -> Mix:
    return mix_of(keys(count), size, KINDS[kind])


def mix_of(some_keys: npt.NDArray[np.int64], size: tuple[int, int], config: MixConfig) -> Mix:
    arrays = draw_mix(some_keys, size, config)
    assert arrays is not None
    return Mix(*map(torch.from_numpy, arrays))


def random_images(seed: int = 0) -> Tensor:
    return torch.randn(B, 3, H, W, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------------------------
# What is mixed
# ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_images_and_targets_are_those_of_a_plain_loop(kind: str) -> None:
    images, mix = random_images(), drawn(kind)
    targets = torch.rand(B, K, generator=torch.Generator().manual_seed(1))
    mixed, mixed_targets = mix.images(images).numpy(), mix.targets(targets).numpy()
    kinds = set()
    for i in range(B):
        k = i + 1 if i % 2 == 0 else i - 1
        x, y = images[i].numpy(), images[k].numpy()
        top, bottom, left, right = mix.box_B4[i].tolist()
        if bottom > top and right > left:
            expected = x.copy()
            expected[:, top:bottom, left:right] = y[:, top:bottom, left:right]
            assert (mixed[i] == expected).all(), "CutMix copies pixels, bit for bit"
            share = 1 - (bottom - top) * (right - left) / (H * W)
            kinds.add("cut")
        else:
            share = float(mix.outside_B[i])
            np.testing.assert_allclose(mixed[i], share * x + (1 - share) * y, rtol=1e-5, atol=1e-6)
            kinds.add("mixed" if share < 1 else "left")
            assert share < 1 or (mixed[i] == x).all()
        np.testing.assert_allclose(mixed_targets[i], share * targets[i].numpy() + (1 - share) * targets[k].numpy(), rtol=1e-5, atol=1e-6)
    assert {"mixup": {"mixed"}, "cutmix": {"cut"}, "both": {"cut", "mixed", "left"}}[kind] <= kinds
    assert torch.equal(mix.share_B[::2], mix.share_B[1::2])
    assert torch.equal(mix.box_B4[::2], mix.box_B4[1::2])


def test_a_share_of_1_or_0_copies_exactly() -> None:
    x = random_images() * 1e3
    assert torch.equal(mix_pairs(x, torch.ones(B, 1, 1, 1)), x)
    assert torch.equal(mix_pairs(x, torch.zeros(B, 1, 1, 1)), x.view(B // 2, 2, 3, H, W).flip(1).flatten(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_keep_their_precision(dtype: torch.dtype) -> None:
    mix = drawn("both")
    assert mix.images(random_images().to(dtype)).dtype == dtype


def test_it_does_not_matter_that_images_are_normalised_first() -> None:
    """Mixing is linear, so it may come before or after; after, nothing is rounded to 8 bits."""
    from vitscale.config import PreprocessConfig

    pixels = torch.randint(0, 256, (B, H, W, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mix, preprocess = drawn("both"), PreprocessConfig(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    before = mix.images(pixels.double().permute(0, 3, 1, 2))
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (preprocess.mean, preprocess.std))
    torch.testing.assert_close(mix.images(normalize(pixels, preprocess)).double(), (before / 255 - mean) / std, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("micro", [2, 4, 8])
def test_it_does_not_matter_how_a_batch_is_split(kind: str, micro: int) -> None:
    images, whole = random_images(), drawn(kind)
    labels = torch.randint(0, K, (B, 1), generator=torch.Generator().manual_seed(2))
    logits = torch.randn(B, K, generator=torch.Generator().manual_seed(4))
    objective = ObjectiveConfig("softmax", label_smoothing=0.1)
    losses = per_sample_loss(logits, labels, torch.ones(B, 1), objective, whole)
    mixed = whole.images(images)
    for start in range(0, B, micro):
        part = slice(start, start + micro)
        mix = mix_of(keys()[part], (H, W), KINDS[kind])
        assert torch.equal(mix.images(images[part]), mixed[part])
        assert torch.equal(per_sample_loss(logits[part], labels[part], torch.ones(micro, 1), objective, mix), losses[part])


def test_off_is_off() -> None:
    for config in (MixConfig(), MixConfig(mixup_alpha=0.5, prob=0.0), MixConfig(switch_prob=1.0)):
        assert draw_mix(keys(), (H, W), config) is None


# ---------------------------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_loss_of_a_mixed_image_is_the_mean_of_its_two_by_their_shares(kind: Any, smoothing: float, soft: bool) -> None:
    """With several labels, padding, none, and scores."""
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(B, K, generator=g)
    labels = torch.stack([torch.randperm(K, generator=g)[:3] for _ in range(B)])
    labels = labels.masked_fill(torch.rand(B, 3, generator=g) < 0.4, -1)
    assert (labels < 0).all(1).any(), "some have no label"
    scores = torch.rand(B, 3, generator=g) * 0.9 + 0.1
    config, mix = ObjectiveConfig(kind, smoothing, soft), drawn("both")
    own = per_sample_loss(logits, labels, scores, config)
    swapped = torch.arange(B).view(-1, 2).flip(1).flatten()
    other = per_sample_loss(logits, labels[swapped], scores[swapped], config)
    share = mix.share_B
    mixed = per_sample_loss(logits, labels, scores, config, mix)
    torch.testing.assert_close(mixed, share * own + (1 - share) * other, rtol=2e-5, atol=2e-5)
    assert (mixed - own).abs().max() > 0.1
    assert torch.equal(compute_loss(logits, labels, scores, config, mix), mixed.mean())
    unmixed = Mix(torch.ones(B), torch.ones(B), torch.zeros(B, 4, dtype=torch.int64))
    assert torch.equal(per_sample_loss(logits, labels, scores, config, unmixed), own)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Draws
# ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 0.8, 1.0, 3.0, 50.0])
def test_lambda_is_beta_distributed(alpha: float) -> None:
    many = keyed.key(keyed.Purpose.MIXING, np.arange(50_000))
    lam = symmetric_beta(keyed.uniform(many, 2), keyed.uniform(many, 3), np.full(many.shape, alpha))
    assert np.mean(lam < 0.5) == pytest.approx(0.5, abs=0.01)
    halves = [lam[lam < 0.5]] + [1 - lam[lam >= 0.5]] * (alpha >= 0.5)  # of small alphas much is so near to 1 that float64 has no digits
    for half in halves:
        assert stats.kstest(half, lambda x: 2 * stats.beta.cdf(x, alpha, alpha)).pvalue > 1e-3


@pytest.mark.parametrize("u", [0.0, 2**-53, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("v", [0.0, 0.25, 0.5, 0.75, 1 - 2**-53])
@pytest.mark.parametrize("alpha", [1e-300, 1e-3, 0.2, 1.0, 1e3, 1e300])
def test_lambda_is_a_number_for_the_most_extreme_draws(u: float, v: float, alpha: float) -> None:
    lam = symmetric_beta(np.array([u]), np.array([v]), np.array([alpha]))
    assert ((lam >= 0) & (lam <= 1)).all()


def test_pairs_draw_independently_and_mixing_follows_its_chances() -> None:
    count, config = 40_000, MixConfig(mixup_alpha=1.0, cutmix_alpha=1.0, prob=0.8, switch_prob=0.4)
    mix = mix_of(keys(count), (224, 224), config)
    share, outside, box = (t[::2].numpy() for t in mix)
    cut, mixed = (outside == 1) & (share < 1), outside < 1
    assert cut.mean() == pytest.approx(0.8 * 0.4, abs=0.012)  # a few boxes are empty
    assert mixed.mean() == pytest.approx(0.8 * 0.6, abs=0.012)
    assert (box[mixed] == 0).all()
    assert abs(np.corrcoef(share[:-1], share[1:])[0, 1]) < 0.03
    for other in (1, 5):  # another seed, other numbers
        theirs = mix_of(keys(count, other), (224, 224), config)
        assert abs(np.corrcoef(share, theirs.share_B[::2].numpy())[0, 1]) < 0.03


def test_what_is_drawn_is_the_first_samples_of_the_pair() -> None:
    first, changed = keys(), keys()
    changed[1::2] += 12345
    ours, theirs = (mix_of(k, (H, W), KINDS["both"]) for k in (first, changed))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("size", [(224, 224), (13, 20), (1, 1), (1, 9)], ids=str)
def test_boxes_lie_in_the_image_have_the_area_and_cover_all_of_it_alike(size: tuple[int, int]) -> None:
    many = keyed.key(np.arange(20_000))
    down, across, lam = (keyed.uniform(many, draw) for draw in range(3))
    top, bottom, left, right = random_box(down, across, lam, size).T
    height, width = size
    assert (top >= 0).all()
    assert (top <= bottom).all()
    assert (bottom <= height).all()
    assert (left >= 0).all()
    assert (left <= right).all()
    assert (right <= width).all()
    whole = (top > 0) & (bottom < height) & (left > 0) & (right < width)
    wanted = (np.sqrt(1 - lam) * height).astype(int) * (np.sqrt(1 - lam) * width).astype(int)
    assert ((bottom - top) * (right - left) == wanted)[whole].all()
    if size == (224, 224):
        assert abs(((bottom + top) / 2)[whole].mean() / height - 0.5) < 0.01
        assert np.corrcoef(down, top + bottom)[0, 1] > 0.9
        assert whole.mean() > 0.1


# ---------------------------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "micro", "world_size", "works"),
    [(30, 5, 1, "micro_batch_size=6"), (30, 15, 1, "micro_batch_size=10"), (20, 5, 2, "micro_batch_size=2"),
     (15, 5, 1, "global_batch_size=16 with 2"), (9, 3, 3, "global_batch_size=12 with 2"), (6, 1, 1, "micro_batch_size=2")],
)  # fmt: skip
def test_an_odd_micro_batch_cannot_be_mixed(config: TrainConfig, batch: int, micro: int, world_size: int, works: str) -> None:
    odd = replace(config, global_batch_size=batch, micro_batch_size=micro)
    check_config(odd, world_size)
    with pytest.raises(ConfigError, match=rf"micro_batch_size={micro} must be even .*; {works} works"):
        check_config(replace(odd, mix=MixConfig(mixup_alpha=0.2)), world_size)
    if works.startswith("micro"):
        check_config(replace(odd, mix=MixConfig(mixup_alpha=0.2), micro_batch_size=int(works.split("=")[1])), world_size)
    else:
        check_config(
            replace(odd, mix=MixConfig(0.2), global_batch_size=int(works.split("=")[1].split()[0]), micro_batch_size=2), world_size
        )


@pytest.mark.parametrize(
    ("mix", "says"),
    [(MixConfig(mixup_alpha=-1), "mix.mixup_alpha=-1"), (MixConfig(cutmix_alpha=float("nan")), "mix.cutmix_alpha=nan"),
     (MixConfig(prob=1.5), r"mix.prob=1.5 must lie in \[0, 1\]"), (MixConfig(switch_prob=-0.1), "mix.switch_prob=-0.1")],
)  # fmt: skip
def test_chances_and_alphas_have_ranges(config: TrainConfig, mix: MixConfig, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_config(replace(config, mix=mix), 1)


def test_a_config_of_before_has_no_mixing(config: TrainConfig) -> None:
    written = to_dict(config)
    del written["mix"], written["preprocess"]["randaugment_layers"]
    assert from_dict(TrainConfig, written) == config
    assert FinetuneConfig().mix == MixConfig()


# ---------------------------------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------------------------------


def run_all(payload: dict[str, Any]) -> dict[str, list[float]]:
    """On a rank: the losses of each run."""
    losses = {}
    for name, values in payload.items():
        config: TrainConfig = from_dict(TrainConfig, values)
        if dist.get_rank() == 0:
            Path(config.out).mkdir()
            open_run(config, dist.get_world_size())
        dist.barrier()
        train(config, stop_at=6)
        losses[name] = [line["loss"] for line in read_metrics(Path(config.out)) if "loss" in line]
    return losses


def test_a_mixed_run_has_the_same_losses_for_every_split_of_the_work(config: TrainConfig, tmp_path: Path) -> None:
    mix = MixConfig(mixup_alpha=0.4, cutmix_alpha=1.0, prob=0.9)
    stream = replace(config.stream, lanes=2, window=9)  # a lane a rank, where there are two
    mixed = replace(config, mix=mix, preprocess=replace(config.preprocess, randaugment_layers=2), stream=stream)
    losses: dict[str, list[float]] = {}
    for world_size, micros in ((1, (2, 4, 24)), (2, (2, 6))):
        payload = {}
        for micro in micros:
            name = f"{world_size}-{micro}"
            asked = replace(mixed, micro_batch_size=micro, out=str(tmp_path / name))
            payload[name] = to_dict(resolve(asked, world_size))
        if world_size == 1:
            payload["off"] = to_dict(resolve(replace(config, out=str(tmp_path / "off")), 1))
        folder = tmp_path / f"ranks-{world_size}"
        folder.mkdir()
        losses |= run_on_ranks("tests.vitscale.test_mixing:run_all", world_size, payload, folder)
    reference = losses.pop("1-2")
    off = losses.pop("off")
    assert len(reference) == 6
    assert max(abs(a - b) for a, b in zip(reference, off, strict=True)) > 1e-3
    for name, values in losses.items():
        assert values == pytest.approx(reference, rel=1e-5), name


# ---------------------------------------------------------------------------------------------------------------------------------------
# Peers
# ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_timm_mixes_a_pair_alike(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm pairs sample i with B - 1 - i, so a batch of two; it is given our lambda, and our box as its draw."""
    from timm.data import mixup as theirs

    mix = drawn(kind)
    for j in range(0, B, 2):
        images = random_images(j)[:2]
        share = float(mix.share_B[j])
        top, bottom, left, right = mix.box_B4[j].tolist()
        monkeypatch.setattr(theirs.np.random, "beta", lambda *_, share=share: share)
        monkeypatch.setattr(theirs, "cutmix_bbox_and_lam", lambda *_, box=(top, bottom, left, right), share=share, **__: (box, share))
        mixer = theirs.Mixup(float(kind == "mixup"), float(kind == "cutmix"), mode="batch", label_smoothing=0.1, num_classes=K)
        labels = torch.tensor([j % K, (j + 3) % K])
        x, y = mixer(images.clone(), labels)
        ours = Mix(mix.share_B[j : j + 2], mix.outside_B[j : j + 2], mix.box_B4[j : j + 2])
        torch.testing.assert_close(ours.images(images), x, rtol=1e-5, atol=1e-6)
        logits = torch.randn(2, K, generator=torch.Generator().manual_seed(j))
        loss = per_sample_loss(logits, labels[:, None], torch.ones(2, 1), ObjectiveConfig("softmax", label_smoothing=0.1), ours)
        torch.testing.assert_close(loss, -(y * logits.log_softmax(-1)).sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.peers
@pytest.mark.parametrize("lam", [0.0, 0.1, 0.5, 0.77, 1.0])
def test_timms_boxes_have_the_same_sides(lam: float) -> None:
    from timm.data.mixup import rand_bbox

    sides = set()
    for seed in range(200):
        np.random.seed(seed)
        yl, yh, xl, xh = rand_bbox((3, 40, 64), lam)
        sides.add((int(yh - yl), int(xh - xl)))
    down, across = (places.ravel() for places in np.mgrid[0.5:40, 0.5:64])
    top, bottom, left, right = random_box(down / 40, across / 64, np.full(down.shape, lam), (40, 64)).T
    ours = set(zip((bottom - top).tolist(), (right - left).tolist(), strict=True))
    assert sides <= ours
    assert len(sides) > 1 or lam == 1
    assert [max(side[i] for side in sides) for i in (0, 1)] == [max(side[i] for side in ours) for i in (0, 1)]
