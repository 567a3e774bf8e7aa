"""The model is the paper's: against transformers' ViT, against a plain implementation written out here, and by its initialisation.

Every comparison is in fp32 with every tensor random (`tests.vitscale.models.randomize`), logits and gradients. The plain implementation has
no fused attention, no module and no convolution; it is what the options that transformers lacks are held to.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import ViTConfig as TheirConfig
from transformers import ViTForImageClassification, ViTModel

from tests.vitscale.models import (
    cotangent,
    gradient_errors,
    gradients,
    random_images,
    random_vit,
    relative_error,
)
from vitscale.config import PreprocessConfig, ViTConfig
from vitscale.model import PRODUCTS, ViT, initialize, normalize, sincos_2d
from vitscale.omissions import draw_omissions, keyed_uniform
from vitscale.recipes import vit

SMALL = ViTConfig(depth=2, width=64, mlp_dim=160, num_heads=4, patch_size=8, image_size=(24, 40), num_classes=7)
POSITIONS = ("learned_1d", "learned_2d", "relative", "sincos", "none")
POOLS = ("cls", "mean", "map")

# ---------------------------------------------------------------------------------------------------------------------------------------
# Against transformers
# ---------------------------------------------------------------------------------------------------------------------------------------


def their_config(config: ViTConfig, **changes: object) -> TheirConfig:
    return TheirConfig(
        hidden_size=config.width, num_hidden_layers=config.depth, num_attention_heads=config.num_heads, intermediate_size=config.mlp_dim,
        image_size=config.image_size, patch_size=config.patch_size, num_labels=config.num_classes, layer_norm_eps=1e-6,
        hidden_act={"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[config.activation], hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, attn_implementation="eager", **changes,
    )  # fmt: skip


def their_names(name: str) -> tuple[str, ...]:
    """The tensors of transformers (version 5) that one of ours is: the fused qkv is three, one below another."""
    whole = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "norm": "vit.layernorm",
        "head": "classifier",
        "pre_logits.fc": "vit.pooler.dense",
    }
    in_block = {
        "norm1": ("layernorm_before",),
        "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "attn.proj": ("attention.o_proj",),
        "norm2": ("layernorm_after",),
        "mlp.fc1": ("mlp.fc1",),
        "mlp.fc2": ("mlp.fc2",),
    }
    if name in whole:
        return (whole[name],)
    stem, _, leaf = name.rpartition(".")
    if stem in whole:
        return (f"{whole[stem]}.{leaf}",)
    _, number, rest = stem.split(".", 2)
    return tuple(f"vit.layers.{number}.{theirs}.{leaf}" for theirs in in_block[rest])


def load_into_theirs(theirs: nn.Module, ours: ViT, prefix: str = "") -> None:
    weights = {}
    for name, weight in ours.state_dict().items():
        names = their_names(name)
        weights |= {n.removeprefix(prefix): w.clone() for n, w in zip(names, weight.chunk(len(names)), strict=True)}
    theirs.load_state_dict(weights, strict=True)


def their_gradients(theirs: nn.Module, ours: ViT, prefix: str = "") -> dict[str, Tensor]:
    found = gradients(theirs)
    return {name: torch.cat([found[n.removeprefix(prefix)] for n in their_names(name)]) for name, _ in ours.named_parameters()}


def assert_equal_to_theirs(ours: ViT, theirs: nn.Module, tolerance: float, prefix: str = "") -> None:
    """Logits, or features where neither has a head, and gradients."""
    images = random_images(ours.config, batch_size=2)
    logits = ours(images)
    outputs = theirs(images)
    their_logits = outputs.logits if "logits" in outputs else outputs.pooler_output
    assert relative_error(logits, their_logits) < 1e-5
    (logits * cotangent(logits)).sum().backward()
    (their_logits * cotangent(logits)).sum().backward()
    errors = gradient_errors(gradients(ours), their_gradients(theirs, ours, prefix))
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < tolerance, worst


@pytest.mark.parametrize(
    ("config", "tolerance"),
    [
        (SMALL, 1e-5),
        (vit("ti16", num_classes=10, image_size=(96, 160), depth=2), 1e-5),
        (vit("ti16", num_classes=10, image_size=(96, 160), depth=2, activation="gelu_tanh"), 1e-5),
        (vit("b16", num_classes=1000), 3e-5),
    ],
    ids=["small", "rectangle", "tanh", "b16"],
)
def test_logits_and_gradients_are_those_of_transformers(config: ViTConfig, tolerance: float) -> None:
    ours = random_vit(config)
    theirs = ViTForImageClassification(their_config(config)).eval()
    load_into_theirs(theirs, ours)
    assert_equal_to_theirs(ours, theirs, tolerance)


def test_representation_layer_is_the_pooler_of_transformers() -> None:
    config = replace(SMALL, num_classes=0, representation_size=48)
    ours = random_vit(config)
    theirs = ViTModel(their_config(config, pooler_output_size=48, pooler_act="tanh"), add_pooling_layer=True).eval()
    load_into_theirs(theirs, ours, prefix="vit.")
    assert_equal_to_theirs(ours, theirs, 1e-5, prefix="vit.")


def test_the_two_gelus_differ() -> None:
    """Else the parity above would not see one taken for the other."""
    erf, tanh = random_vit(SMALL), random_vit(replace(SMALL, activation="gelu_tanh"))
    images = random_images(SMALL, 2)
    assert relative_error(erf(images), tanh(images)) > 5e-5


# ---------------------------------------------------------------------------------------------------------------------------------------
# Against a plain implementation
# ---------------------------------------------------------------------------------------------------------------------------------------


def plain_forward(w: dict[str, Tensor], config: ViTConfig, images_BCHW: Tensor, keys: Sequence[int] = ()) -> Tensor:
    """Logits from named weights, every operation spelt out; of samples with keys as in training, dropped branches times 0."""
    p, (h, wide) = config.patch_size, config.grid
    batch = images_BCHW.shape[0]
    patches = images_BCHW.reshape(batch, 3, h, p, wide, p).permute(0, 2, 4, 1, 3, 5).reshape(batch, h * wide, 3 * p * p)
    x = patches @ w["patch_embed.proj.weight"].reshape(config.width, -1).T + w["patch_embed.proj.bias"]
    if config.position == "learned_2d":
        x = x + torch.stack([torch.cat([w["pos_embed_rows"][i], w["pos_embed_columns"][j]]) for i in range(h) for j in range(wide)])
    if config.position == "sincos":
        x = x + plain_sincos(h, wide, config.width)
    if config.pool == "cls":
        x = torch.cat([w["cls_token"].repeat(batch, 1, 1), x], dim=1)
    if config.position == "learned_1d":
        x = x + w["pos_embed"]
    if keys and config.patch_dropout:
        x = torch.stack([tokens[plain_kept(key, config)] for key, tokens in zip(keys, x, strict=True)])
    for i in range(config.depth):
        rate = config.drop_path_rate * i / max(1, config.depth - 1)
        drawn = [[splitmix(key % 2**64, 2 * i + branch) for key in keys] for branch in (0, 1)] if keys else [[1.0] * batch] * 2
        kept = (torch.tensor(drawn) >= rate)[:, :, None, None] / ((1 - rate) if keys else 1)
        b = {name.removeprefix(f"blocks.{i}."): t for name, t in w.items() if name.startswith(f"blocks.{i}.")}
        bias = plain_relative_bias(b["attn.rel_pos_bias"], config) if config.position == "relative" else 0.0
        y = plain_norm(x, b["norm1.weight"], b["norm1.bias"]) @ b["attn.qkv.weight"].T + b["attn.qkv.bias"]
        q, k, v = y.split(config.width, dim=-1)
        if config.qk_norm:
            q, k = (
                plain_norm(t.unflatten(-1, (config.num_heads, -1)), b[f"attn.{of}_norm.weight"], b[f"attn.{of}_norm.bias"]).flatten(-2)
                for of, t in (("q", q), ("k", k))
            )
        x = x + kept[0] * (plain_attention(q, k, v, config.num_heads, bias) @ b["attn.proj.weight"].T + b["attn.proj.bias"])
        x = x + kept[1] * plain_mlp(plain_norm(x, b["norm2.weight"], b["norm2.bias"]), b, config.activation)
    x = plain_norm(x, w["norm.weight"], w["norm.bias"])
    x = {"cls": lambda: x[:, 0], "mean": lambda: x.sum(1) / x.shape[1], "map": lambda: plain_map(x, w, config)}[config.pool]()
    if config.representation_size:
        x = torch.tanh(x @ w["pre_logits.fc.weight"].T + w["pre_logits.fc.bias"])
    return x @ w["head.weight"].T + w["head.bias"] if config.num_classes else x


def plain_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6) * weight + bias


def plain_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | float) -> Tensor:
    size = q.shape[-1] // heads
    q, k, v = (t.unflatten(-1, (heads, size)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-2, -1) / math.sqrt(size) + bias
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2)


def plain_mlp(x: Tensor, w: dict[str, Tensor], activation: str) -> Tensor:
    x = x @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
    inner = torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)) if activation == "gelu_tanh" else torch.erf(x / math.sqrt(2))
    return 0.5 * x * (1 + inner) @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]


def plain_map(x: Tensor, w: dict[str, Tensor], config: ViTConfig) -> Tensor:
    a = {name.removeprefix("attn_pool."): t for name, t in w.items() if name.startswith("attn_pool.")}
    q = (a["latent"] @ a["q.weight"].T + a["q.bias"]).expand(x.shape[0], -1, -1)
    k, v = (x @ a["kv.weight"].T + a["kv.bias"]).split(config.width, dim=-1)
    y = plain_attention(q, k, v, config.num_heads, 0.0) @ a["proj.weight"].T + a["proj.bias"]
    return (y + plain_mlp(plain_norm(y, a["norm.weight"], a["norm.bias"]), a, config.activation))[:, 0]


def plain_kept(key: int, config: ViTConfig) -> list[int]:
    """The tokens of a sample that patch dropout keeps: the class token, and of the patches those that draw least."""
    patches, first = math.prod(config.grid), int(config.pool == "cls")
    by_draw = sorted(range(patches), key=lambda patch: splitmix(key % 2**64, 2**20 + patch))
    return [0] * first + [first + patch for patch in sorted(by_draw[: max(1, int(patches * (1 - config.patch_dropout)))])]


def plain_sincos(h: int, w: int, width: int) -> Tensor:
    """big_vision, models/vit.py, posemb_sincos_2d, a number at a time."""
    quarter = width // 4
    omega = [1.0 / 10_000.0 ** (i / (quarter - 1)) for i in range(quarter)]
    rows = []
    for y, x in itertools.product(range(h), range(w)):
        rows.append([f(position * o) for position, f in ((x, math.sin), (x, math.cos), (y, math.sin), (y, math.cos)) for o in omega])
    return torch.tensor(rows)


def plain_relative_bias(table: Tensor, config: ViTConfig) -> Tensor:
    """(H, N, N): a row of the table for each (down, across) from key to query, then class to patch, patch to class, class to class."""
    h, w = config.grid
    row_of = {offset: row for row, offset in enumerate(itertools.product(range(1 - h, h), range(1 - w, w)))}
    count = len(row_of)
    cells: list[tuple[int, int] | None] = [*([None] if config.pool == "cls" else []), *itertools.product(range(h), range(w))]

    def row(query: tuple[int, int] | None, key: tuple[int, int] | None) -> int:
        if query and key:
            return row_of[query[0] - key[0], query[1] - key[1]]
        return count + (0 if key else 1 if query else 2)

    return torch.stack([torch.stack([table[row(query, key)] for key in cells], dim=-1) for query in cells], dim=1)


def assert_equal_to_plain(
    config: ViTConfig, batch_size: int = 3, keys: Sequence[int] = (), tolerance: float = 1e-5, **checkpointing: Any
) -> None:
    model, images = random_vit(config, **checkpointing).train(bool(keys)), random_images(config, batch_size)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    logits, plain = model(images, torch.tensor(keys, dtype=torch.int64)), plain_forward(weights, config, images, keys)
    assert relative_error(logits, plain) < 1e-5
    (logits * cotangent(logits)).sum().backward()
    (plain * cotangent(plain)).sum().backward()
    assert all(w.grad is not None for w in weights.values())
    errors = gradient_errors(gradients(model), {name: w.grad for name, w in weights.items() if w.grad is not None})
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < tolerance, worst


@pytest.mark.parametrize(("position", "pool"), list(itertools.product(POSITIONS, POOLS)))
def test_every_position_and_pool_is_the_plain_one(position: str, pool: str) -> None:
    assert_equal_to_plain(replace(SMALL, position=position, pool=pool))


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": "gelu_tanh", "pool": "map"},
        {"representation_size": 40, "pool": "mean"},
        {"representation_size": 64, "num_classes": 0},
        {"num_classes": 0, "pool": "map"},
        {"image_size": (40, 8), "position": "relative"},
        {"depth": 1, "num_heads": 1, "position": "learned_2d"},
        {"qk_norm": True},
        {"qk_norm": True, "position": "relative", "pool": "map"},
    ],
    ids=str,
)
def test_other_options_are_the_plain_ones(changes: dict[str, object]) -> None:
    assert_equal_to_plain(replace(SMALL, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(("grid", "width"), [((3, 5), 64), ((16, 16), 192), ((1, 7), 8)])
def test_sincos_is_that_of_big_vision(grid: tuple[int, int], width: int) -> None:
    torch.testing.assert_close(sincos_2d(grid, width)[0], plain_sincos(*grid, width), rtol=0, atol=1e-6)


@torch.no_grad()
def test_attention_pool_is_multihead_attention_with_a_learned_query() -> None:
    model = random_vit(replace(SMALL, pool="map", num_classes=0))
    pool = model.attn_pool
    theirs = nn.MultiheadAttention(SMALL.width, SMALL.num_heads, batch_first=True)
    theirs.in_proj_weight.copy_(torch.cat([pool.q.weight, pool.kv.weight]))
    theirs.in_proj_bias.copy_(torch.cat([pool.q.bias, pool.kv.bias]))
    theirs.out_proj.load_state_dict(pool.proj.state_dict())
    tokens = model.tokens(random_images(SMALL, 3))
    x, _ = theirs(pool.latent.expand(3, -1, -1), tokens, tokens, need_weights=True)
    x = (x + pool.mlp(pool.norm(x)))[:, 0]
    assert relative_error(model.pool(tokens), x) < 1e-5


IN_BLOCK = ("norm1", "norm2", "attn.q_norm", "attn.k_norm")


@torch.no_grad()
def test_every_norm_has_the_epsilon_of_the_config() -> None:
    """Tokens of unit variance do not show 1e-5 taken for 1e-6, so the parity above would not."""
    for eps in (1e-6, 1e-2):
        model = ViT(replace(SMALL, layer_norm_eps=eps, pool="map", qk_norm=True))
        norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
        assert norms.keys() == {"norm", "attn_pool.norm", *(f"blocks.{i}.{of}" for i in (0, 1) for of in IN_BLOCK)}
        for norm in norms.values():
            x = torch.tensor([[0.0, 0.02] * (norm.normalized_shape[0] // 2)])  # standard deviation 0.01
            assert float(norm(x).max()) == pytest.approx(0.01 / math.sqrt(1e-4 + eps), rel=1e-5)
    assert ViTConfig().layer_norm_eps == 1e-6


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(40, 24\) pixels do not fit this model's image_size \(24, 40\)"):
        ViT(SMALL)(torch.zeros(1, 3, 40, 24))


def test_normalize_is_per_channel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    preprocess = PreprocessConfig(mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4))
    expected = ((pixels / 255 - np.array(preprocess.mean)) / np.array(preprocess.std)).transpose(0, 3, 1, 2)
    torch.testing.assert_close(normalize(torch.from_numpy(pixels), preprocess).double(), torch.from_numpy(expected), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Initialisation
# ---------------------------------------------------------------------------------------------------------------------------------------


def initialized(config: ViTConfig, seed: int = 0) -> dict[str, Tensor]:
    model = ViT(config)
    initialize(model, seed)
    return dict(model.state_dict())


EVERYTHING = ViTConfig(
    depth=2, width=256, mlp_dim=512, num_heads=4, patch_size=8, image_size=(64, 64), num_classes=9, head_bias=-10.0, pool="map",
    representation_size=128,
)  # fmt: skip


def assert_uniform(value: Tensor, bound: float) -> None:
    assert value.abs().max() <= bound
    assert value.abs().max() > 0.999 * bound
    assert value.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(value.mean()) < 4 * bound / math.sqrt(3 * value.numel())


def assert_lecun(value: Tensor, fan_in: int) -> None:
    """Unit variance of the outputs, by a normal truncated at two of *its* deviations: 0.8796 of a normal's deviation is left."""
    assert value.std() == pytest.approx(math.sqrt(1 / fan_in), rel=0.02)
    assert value.abs().max() <= 2 * math.sqrt(1 / fan_in) / 0.87962566
    assert value.abs().max() > 1.98 * math.sqrt(1 / fan_in) / 0.87962566


def test_initialisation_of_each_kind_of_tensor() -> None:
    w = initialized(EVERYTHING)
    D, M = EVERYTHING.width, EVERYTHING.mlp_dim
    assert_lecun(w["patch_embed.proj.weight"], 3 * 8 * 8)
    assert_lecun(w["pre_logits.fc.weight"], D)
    for kernel in (*w["blocks.0.attn.qkv.weight"].chunk(3), *w["attn_pool.kv.weight"].chunk(2), w["attn_pool.q.weight"]):
        assert_uniform(kernel, math.sqrt(6 / (D + D)))
    for name in ("blocks.0.attn.proj.weight", "blocks.1.attn.proj.weight", "attn_pool.proj.weight"):
        assert_uniform(w[name], math.sqrt(6 / (D + D)))
    for name in ("blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc2.weight", "attn_pool.mlp.fc1.weight"):
        assert_uniform(w[name], math.sqrt(6 / (D + M)))
    for name in ("blocks.0.mlp.fc1.bias", "blocks.1.mlp.fc2.bias", "attn_pool.mlp.fc2.bias"):
        assert w[name].std() == pytest.approx(1e-6, rel=0.25)
    assert w["pos_embed"].std() == pytest.approx(0.02, rel=0.03)
    assert w["pos_embed"].abs().max() > 0.06, "not truncated"
    assert w["attn_pool.latent"].abs().max() <= math.sqrt(6 / (1 + D))
    assert (w["head.bias"] == -10).all()
    zeros = ["head.weight", "patch_embed.proj.bias", "pre_logits.fc.bias", "attn_pool.q.bias", "attn_pool.kv.bias", "norm.bias"]
    zeros += [f"blocks.{i}.{name}.bias" for i in range(2) for name in ("attn.qkv", "attn.proj", "norm1", "norm2")]
    assert all(w[name].count_nonzero() == 0 for name in zeros)
    assert all((t == 1).all() for name, t in w.items() if "norm" in name and name.endswith("weight"))


def test_initialisation_of_the_other_options() -> None:
    assert initialized(SMALL)["cls_token"].count_nonzero() == 0
    wide = replace(SMALL, width=1024, num_heads=16)
    two = initialized(replace(wide, position="learned_2d"))
    assert two["pos_embed_rows"].std() == pytest.approx(0.02, rel=0.05)
    assert two["pos_embed_columns"].std() == pytest.approx(0.02, rel=0.05)
    relative = initialized(replace(wide, position="relative"))
    assert relative["blocks.1.attn.rel_pos_bias"].std() == pytest.approx(0.02, rel=0.1)


def test_weights_depend_on_seed_and_name_alone() -> None:
    """Not on the order of modules, on the depth, or on options that leave a tensor's name and shape as they were."""
    base = initialized(SMALL)
    for changes in (
        {"depth": 4},
        {"pool": "map", "position": "none"},
        {"dropout": 0.1, "drop_path_rate": 0.2, "activation": "gelu_tanh"},
        {"representation_size": 64, "num_classes": 7, "head_bias": 0.0},
        {"position": "relative"},
    ):
        other = initialized(replace(SMALL, **changes))  # type: ignore[arg-type]
        shared = base.keys() & other.keys()
        assert len(shared) >= 24
        assert all(torch.equal(base[name], other[name]) for name in shared)
    torch.manual_seed(123)  # torch's own generator plays no part
    assert all(torch.equal(base[name], w) for name, w in initialized(SMALL).items())


def test_other_seeds_and_names_give_other_weights() -> None:
    base, other = initialized(SMALL), initialized(SMALL, seed=1)
    name = "blocks.0.mlp.fc1.weight"
    assert not torch.equal(base[name], other[name])
    assert not torch.equal(base[name], base["blocks.1.mlp.fc1.weight"])


def test_a_parameter_without_a_rule_is_refused() -> None:
    model = ViT(SMALL)
    model.blocks[0].gain = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"blocks\.0\.gain"):
        initialize(model, 0)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Activation checkpointing, dropout and stochastic depth
# ---------------------------------------------------------------------------------------------------------------------------------------

NOISY = replace(SMALL, depth=4, dropout=0.2, drop_path_rate=0.6, patch_dropout=0.3, qk_norm=True)
KEYS = torch.tensor([5, -(2**62), 2**63 - 1, 12345678901234567])
MANY = torch.randint(-(2**63), 2**63 - 1, (16,), generator=torch.Generator().manual_seed(2))
CHECKPOINTING: list[dict[str, Any]] = [
    {"checkpoint_every_n_blocks": every, "checkpoint_keeps": keeps} for every in (1, 2, 3) for keeps in ("nothing", "products")
]


def noisy_step(config: ViTConfig, compiled: bool = False, **checkpointing: Any) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients and how often blocks ran, in training mode from a fixed torch seed."""
    model = random_vit(config, **checkpointing).train()
    calls: list[int] = []
    for block in model.blocks:
        if compiled:
            block.compile(fullgraph=True)
        else:
            block.norm1.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    logits = model(random_images(config, len(MANY)), MANY)
    loss = (logits * cotangent(logits)).sum()
    loss.backward()
    return loss.detach(), gradients(model), len(calls)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING, ids=str)
def test_activation_checkpointing_changes_no_bit(checkpointing: dict[str, Any]) -> None:
    loss, grads, once = noisy_step(NOISY)
    checkpointed_loss, checkpointed_grads, calls = noisy_step(NOISY, **checkpointing)
    again = len(range(0, NOISY.depth, checkpointing["checkpoint_every_n_blocks"]))
    assert (once, calls) == (NOISY.depth, NOISY.depth + again), "blocks run again in the backward pass"
    assert torch.equal(loss, checkpointed_loss)
    assert all(torch.equal(grads[name], g) for name, g in checkpointed_grads.items())


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations within it made and that something still holds, autograd's graph above all."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made, tensor in [*((0, t) for t in tree_leaves(args)), *((1, t) for t in tree_leaves(result))]:  # a view makes nothing
            if isinstance(tensor, Tensor):
                self.storages.setdefault(StorageWeakRef(tensor.untyped_storage()), made * tensor.untyped_storage().nbytes())
        return result

    def bytes(self) -> int:
        return sum(size for storage, size in self.storages.items() if not storage.expired())


def widths_kept(**checkpointing: Any) -> float:
    """Numbers a token that a block leaves for the backward pass, in widths: what eight blocks leave less what four do."""
    alive = []
    for depth in (4, 8):
        config = replace(SMALL, mlp_dim=4 * SMALL.width, depth=depth)
        model, images = random_vit(config, **checkpointing).train(), random_images(config, 4)
        with Alive() as made:
            logits = model(images)
            alive.append(made.bytes())
        assert logits.requires_grad
    return (alive[1] - alive[0]) / 4 / (4 * 4 * config.num_tokens * config.width)


def test_checkpointing_keeps_less_the_more_it_computes_again() -> None:
    """Of a block: its input; with the products also qkv, attention, proj, fc1 and fc2; without checkpointing what each step needs.

    To these come attention's logarithms, one a head, and four statistics of LayerNorm.
    """
    logarithms, statistics = SMALL.num_heads / SMALL.width, 4 / SMALL.width
    nothing, products, everything = 1, 1 + 3 + 1 + 1 + 4 + 1 + logarithms, 1 + 1 + 3 + 1 + 1 + 1 + 4 + 4 + logarithms + statistics
    assert widths_kept() == pytest.approx(everything)
    for every in (1, 2, 4):
        for keeps, kept in (("nothing", nothing), ("products", products)):
            measured = widths_kept(checkpoint_every_n_blocks=every, checkpoint_keeps=keeps)
            assert measured == pytest.approx((kept + (every - 1) * everything) / every)


def test_products_are_all_that_torch_has_for_attention() -> None:
    """A backend that a later torch adds would else be computed twice without a word."""
    names = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("aten::_scaled_dot_product_")}
    fused = {name for name in names if not name.endswith("_backward") and "_attention_math" not in name}
    assert fused
    assert fused <= {op.name() for op in PRODUCTS}


def test_dropout_follows_positions_mlp_layers_and_attention_output_and_nothing_else() -> None:
    model = ViT(replace(SMALL, dropout=0.25, pool="map"))
    dropouts = {name for name, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p == 0.25}
    expected = {"pos_drop", "attn_pool.mlp.drop"} | {f"blocks.{i}.{name}" for i in range(2) for name in ("attn.proj_drop", "mlp.drop")}
    assert dropouts == expected
    applied: list[str] = []
    for name, module in model.named_modules():
        if name in expected:
            module.register_forward_hook(lambda *_, name=name: applied.append(name))  # type: ignore[misc]
    model.train()(random_images(SMALL, 2))
    per_block = [[f"blocks.{i}.attn.proj_drop", f"blocks.{i}.mlp.drop", f"blocks.{i}.mlp.drop"] for i in range(2)]
    assert applied == ["pos_drop", *per_block[0], *per_block[1], "attn_pool.mlp.drop", "attn_pool.mlp.drop"]


OMITTING = [
    {"drop_path_rate": 0.6},
    {"drop_path_rate": 0.3, "pool": "map", "position": "relative"},
    {"drop_path_rate": 0.1, "pool": "mean"},
    {"patch_dropout": 0.5},
    {"patch_dropout": 0.75, "position": "sincos", "pool": "mean"},
    {"patch_dropout": 0.99, "pool": "map", "position": "none"},
    {"patch_dropout": 0.4, "drop_path_rate": 0.9, "qk_norm": True, "position": "learned_2d"},
]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("changes", OMITTING, ids=str)
def test_what_is_left_out_is_what_the_plain_one_multiplies_with_zero(changes: dict[str, object], batch_size: int) -> None:
    config = replace(SMALL, depth=4, **changes)  # type: ignore[arg-type]
    assert_equal_to_plain(config, batch_size, MANY[:batch_size].tolist(), 5e-5, checkpoint_every_n_blocks=2, checkpoint_keeps="products")


@torch.no_grad()
@pytest.mark.parametrize("changes", OMITTING, ids=str)
def test_what_a_sample_leaves_out_depends_on_its_key_alone(changes: dict[str, object]) -> None:
    config = replace(SMALL, depth=4, **changes)  # type: ignore[arg-type]
    model, images = random_vit(config).train(), random_images(config, 16)
    together = model(images, MANY)
    alone = torch.cat([model(images[i : i + size], MANY[i : i + size]) for size, i in ((1, 0), (1, 1), (5, 2), (9, 7))])
    turned = model(images.flip(0), MANY.flip(0)).flip(0)
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(turned, together, rtol=1e-4, atol=1e-4)
    other = model(images, MANY + 1)
    assert (other - together).norm(dim=1).max() > 0.1, "else the test above could not fail"


@pytest.mark.parametrize("batch_size", [1, 7, 20, 64])
def test_dropped_samples_are_not_computed(batch_size: int) -> None:
    """Of each branch at least those kept, at most an eighth more than the branch that keeps most; and eight shapes in all."""
    config = replace(SMALL, depth=4, drop_path_rate=0.6)
    model = random_vit(config).train()
    computed: dict[str, list[int]] = {}
    for index, block in enumerate(model.blocks):
        for name in ("attn", "mlp"):
            hook = lambda _, inputs, of=f"{index}.{name}": computed.setdefault(of, []).append(len(inputs[0]))  # noqa: E731
            block.get_submodule(name).register_forward_pre_hook(hook)
    generator = torch.Generator().manual_seed(batch_size)
    for _ in range(5):
        keys = torch.randint(-(2**63), 2**63 - 1, (batch_size,), generator=generator)
        model(random_images(config, batch_size), keys)
        for index in range(config.depth):
            drawn = keyed_uniform(keys.numpy(), np.array([[2 * index], [2 * index + 1]]))
            kept = int((drawn >= config.drop_path_rate * index / 3).sum(1).max())
            rows = computed[f"{index}.attn"][-1]
            assert rows == computed[f"{index}.mlp"][-1]
            assert max(1, kept) <= rows <= min(batch_size, max(1, kept) + math.ceil(batch_size / 8) - 1)
    assert len({rows for of in computed.values() for rows in of}) <= 8
    assert computed["0.mlp"] == [batch_size] * 5
    assert sum(computed["3.mlp"]) < 0.75 * 5 * batch_size or batch_size == 1


def test_drop_path_rates_rise_linearly_and_keep_the_mean() -> None:
    keys = torch.randint(-(2**63), 2**63 - 1, (40_000,), generator=torch.Generator().manual_seed(0))
    config, kept = replace(SMALL, depth=5, drop_path_rate=0.4), []
    paths = draw_omissions(config, keys, torch.device("cpu"))[1]
    assert paths[0].scales_2R is None
    for index, (rows_2R, scales_2R) in enumerate(paths[1:], start=1):
        assert scales_2R is not None
        expected = 0.4 * index / 4
        assert set(scales_2R.unique().tolist()) <= {0.0, float(torch.tensor(1.0) / (1 - expected))}
        for branch in (0, 1):
            factor_B = torch.zeros(len(keys))
            factor_B[slice(None) if rows_2R is None else rows_2R[branch]] = scales_2R[branch]
            assert (factor_B == 0).float().mean() == pytest.approx(expected, abs=4 * math.sqrt(0.25 / 40_000))
            assert factor_B.mean() == pytest.approx(1, abs=0.02)
            kept.append((factor_B > 0).float())
    correlation = torch.corrcoef(torch.stack(kept)) - torch.eye(len(kept))
    assert correlation.abs().max() < 0.025, "branches and blocks drop independently"


@pytest.mark.parametrize(("patch_dropout", "pool"), [(0.5, "cls"), (0.25, "mean"), (0.9, "map"), (0.999, "cls")])
def test_patch_dropout_keeps_a_fixed_number_and_every_patch_alike(patch_dropout: float, pool: str) -> None:
    config = replace(SMALL, patch_dropout=patch_dropout, pool=pool)
    keys = torch.arange(20_000)
    kept_BN, _ = draw_omissions(config, keys, torch.device("cpu"))
    assert kept_BN is not None
    patches, first = math.prod(config.grid), int(pool == "cls")
    wanted = max(1, int(patches * (1 - patch_dropout)))
    assert kept_BN.shape == (len(keys), config.num_train_tokens) == (len(keys), wanted + first)
    tokens_BN = kept_BN - config.num_tokens * torch.arange(len(keys))[:, None]
    assert (tokens_BN[:, :first] == 0).all(), "the class token stays"
    assert (tokens_BN.diff(dim=1) > 0).all(), "no patch twice"
    share = torch.bincount(tokens_BN[:, first:].flatten() - first, minlength=patches) / len(keys)
    deviation = math.sqrt(wanted / patches * (1 - wanted / patches) / len(keys))
    assert len(share) == patches
    assert (share - wanted / patches).abs().max() < 5 * deviation


def test_patches_left_out_have_no_gradient() -> None:
    config = replace(SMALL, patch_dropout=0.5)
    images = random_images(config, 4).requires_grad_()
    random_vit(config).train()(images, KEYS).square().sum().backward()
    assert images.grad is not None
    p, (h, w) = config.patch_size, config.grid
    learnt = images.grad.reshape(4, 3, h, p, w, p).abs().sum((1, 3, 5)).flatten(1) > 0
    assert learnt.sum(1).tolist() == [config.num_train_tokens - 1] * 4
    for key, of in zip(KEYS.tolist(), learnt, strict=True):
        assert (of.nonzero().flatten() + 1).tolist() == plain_kept(key, config)[1:]


def test_compiled_blocks_leave_out_and_compute_again_alike() -> None:
    """Dropout aside, of which the compiler draws other masks: drop-path, patch dropout and checkpointing in one compiled block."""
    config = replace(NOISY, dropout=0.0, depth=2)
    loss, grads, _ = noisy_step(config)
    compiled_loss, compiled_grads, _ = noisy_step(config, compiled=True, checkpoint_every_n_blocks=1, checkpoint_keeps="products")
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-4, atol=1e-4)
    errors = gradient_errors(compiled_grads, grads)
    assert max(errors.values()) < 1e-5


@torch.no_grad()
def test_evaluation_drops_nothing_and_needs_no_keys() -> None:
    images = random_images(NOISY, 2)
    quiet = random_vit(replace(NOISY, dropout=0.0, drop_path_rate=0.0, patch_dropout=0.0))
    assert torch.equal(random_vit(NOISY)(images), quiet(images))


@pytest.mark.parametrize("option", ["drop_path_rate", "patch_dropout"])
def test_training_that_leaves_out_asks_for_keys(option: str) -> None:
    config = replace(SMALL, **{option: 0.2})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="need sample_keys_B"):
        random_vit(config).train()(random_images(config, 2))


# ---------------------------------------------------------------------------------------------------------------------------------------
# Keyed numbers
# ---------------------------------------------------------------------------------------------------------------------------------------


def splitmix(state: int, draw: int) -> float:
    """The draw-th output of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), its top 24 bits, in Python's unbounded integers."""
    mask = 2**64 - 1
    z = (state + (draw + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 40) / 2**24


def test_keyed_uniform_is_splitmix() -> None:
    keys = torch.cat([torch.tensor([0, 1, -1, 2**63 - 1, -(2**63)]), torch.randint(-(2**63), 2**63 - 1, (500,))])
    for draw in (0, 1, 7, 63):
        assert keyed_uniform(keys.numpy(), draw).tolist() == [splitmix(key % 2**64, draw) for key in keys.tolist()]


def test_keyed_uniform_is_uniform_and_independent_over_consecutive_keys_and_draws() -> None:
    keys = torch.arange(100_000)  # the worst case: counters
    draws = torch.from_numpy(keyed_uniform(keys.numpy(), np.arange(4)[:, None]))
    assert 0 <= draws.min() <= draws.max() < 1
    for u in draws:
        counts = torch.histc(u, bins=100, min=0, max=1)
        chi_square = float(((counts - 1000) ** 2 / 1000).sum())
        assert 50 < chi_square < 160, "99 degrees of freedom: beyond about 4 deviations either way"
    neighbours = torch.stack([*draws[:, :-1], *draws[:, 1:]])
    assert (torch.corrcoef(neighbours) - torch.eye(8)).abs().max() < 5 / math.sqrt(100_000)
