"""What others wrote is taken up whole: files made by their own libraries, or laid out in their names by tables here, give the same outputs.

The tables here are of another making than `vitscale.formats`: full names spelt out, loops over blocks, transposes by numpy. Where an
independent program reads such files (timm, open_clip), `make peers` asks it, too.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data_tools.images import decode
from tests.vitscale.models import photograph, random_images, random_vit, randomize, relative_error, write_checkpoint
from vitscale.adopt import adopt, open_foreign
from vitscale.checkpoint import describe
from vitscale.config import ConfigError, ImportConfig, ViTConfig
from vitscale.errors import CheckpointError
from vitscale.export import export
from vitscale.families import FAMILIES
from vitscale.finding import find_checkpoint
from vitscale.images import evaluation_view
from vitscale.model import ViT, normalize
from vitscale.sidecars import read_preprocess
from vitscale.verification import verify_export
from vitscale.weights import load_model

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32, "patch_size": 8}
DINOV2 = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2, "image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}
NOTHING = ImportConfig()


def imported(folder: Path, file: Path, said: ImportConfig = NOTHING) -> ViT:
    """The model of a file, through the whole of an import: a folder that is found, described and loaded as any CHECKPOINT."""
    adopt(file, folder / "ours", said)
    return load_model(describe(find_checkpoint(str(folder / "ours"))), "average")


def agree(ours: ViT, images: Tensor, theirs: Tensor) -> None:
    with torch.no_grad():
        assert relative_error(ours(images), theirs) < 1e-6


# ---------------------------------------------------------------------------------------------------------------------------------------
# Saved by transformers
# ---------------------------------------------------------------------------------------------------------------------------------------


def hugging_face(kind: str) -> nn.Module:
    t = transformers
    siglip = {"vision_config": SIZES, "text_config": TEXT}
    models: dict[str, Any] = {
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**SIZES, num_labels=5)),
        "vit-rectangle": lambda: t.ViTForImageClassification(t.ViTConfig(**SIZES | {"image_size": [16, 64]}, hidden_act="gelu_new")),
        "vit-pooler": lambda: t.ViTModel(t.ViTConfig(**SIZES, pooler_output_size=24)),
        "vit-epsilon": lambda: t.ViTModel(t.ViTConfig(**SIZES, layer_norm_eps=1e-3), add_pooling_layer=False),
        "mae": lambda: t.ViTMAEModel(t.ViTMAEConfig(**SIZES, mask_ratio=0.0)),
        "mae-with-decoder": lambda: t.ViTMAEForPreTraining(
            t.ViTMAEConfig(**SIZES, mask_ratio=0.0, decoder_hidden_size=16, decoder_num_attention_heads=2, decoder_num_hidden_layers=1)
        ),
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**DINOV2)),
        "dinov2-swiglu": lambda: t.Dinov2Model(t.Dinov2Config(**DINOV2, use_swiglu_ffn=True)),
        "dinov2-registers": lambda: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**DINOV2, num_register_tokens=3)),
        "siglip": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**SIZES)),
        "siglip-classifier": lambda: t.SiglipForImageClassification(t.SiglipConfig(**siglip, num_labels=4)),
        "siglip-with-text": lambda: t.SiglipModel(t.SiglipConfig(**siglip)),
        "clip": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**SIZES)),
        "clip-projection": lambda: t.CLIPVisionModelWithProjection(t.CLIPVisionConfig(**SIZES, projection_dim=24)),
    }
    model: nn.Module = models[kind]().eval()
    positions = {name: p.clone() for name, p in model.named_parameters() if kind.startswith("mae") and "position" in name}
    randomize(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # MAE's are a fixed table
            parameter.copy_(positions.get(name, parameter))
    return model


@torch.no_grad()
def said_by(kind: str, model: nn.Module, images: Tensor) -> Tensor:
    """What the head sees, or logits where it has one, as the library itself computes them."""
    if kind.startswith("mae"):
        order = torch.arange(16.0)[None].expand(len(images), -1)  # of the patches, which are all kept
        return getattr(model, "vit", model)(images, noise=order).last_hidden_state[:, 0]
    if kind == "siglip-with-text":
        return model.vision_model(images).pooler_output
    outputs = model(pixel_values=images)
    for name in ("logits", "image_embeds"):
        if name in outputs:
            return outputs[name]
    if kind in ("vit-pooler", "siglip", "clip", "dinov2", "dinov2-swiglu", "dinov2-registers"):
        return outputs.pooler_output
    return outputs.last_hidden_state[:, 0]


KINDS = (
    "vit", "vit-rectangle", "vit-pooler", "vit-epsilon", "mae", "mae-with-decoder", "dinov2", "dinov2-swiglu", "dinov2-registers", "siglip",
    "siglip-classifier", "siglip-with-text", "clip", "clip-projection",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_saved_gives_the_same(tmp_path: Path, kind: str) -> None:
    theirs = hugging_face(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = imported(tmp_path, tmp_path / "theirs")
    images = random_images(ours.config, 2)
    agree(ours, images, said_by(kind, theirs, images))


def test_shards_are_read_as_one_file(tmp_path: Path) -> None:
    theirs = hugging_face("vit")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 2
    ours = imported(tmp_path, tmp_path / "theirs")
    images = random_images(ours.config, 2)
    agree(ours, images, said_by("vit", theirs, images))


def test_a_head_that_ours_lacks_is_refused_and_left_out_on_request(tmp_path: Path) -> None:
    """DINOv2's classifier sees the class token and the mean of the patches side by side."""
    theirs = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**DINOV2, num_labels=5))
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=r"classifier\.weight has shape .*\n.*--headless"):
        imported(tmp_path, tmp_path / "theirs")
    assert not (tmp_path / "ours").exists()
    ours = imported(tmp_path, tmp_path / "theirs", ImportConfig(headless=True))
    images = random_images(ours.config, 2)
    with torch.no_grad():
        agree(ours, images, theirs.dinov2(images).pooler_output)
    assert {name: why for name, why in describe(tmp_path / "ours").origin["left_out"].items() if name.startswith("classifier")} == {
        "classifier.bias": "of the head, which is not wanted",
        "classifier.weight": "of the head, which is not wanted",
    }


# ---------------------------------------------------------------------------------------------------------------------------------------
# Google's npz, laid out here from the weights of transformers' models
# ---------------------------------------------------------------------------------------------------------------------------------------


def google(theirs: nn.Module, *, old: bool, heads: int = 4) -> dict[str, np.ndarray]:
    """A ViT of transformers under the names of vision_transformer (`old`) or of big_vision, whose class token has no position."""
    w = {name.removeprefix("vit."): value.detach().numpy() for name, value in theirs.state_dict().items()}
    width = w["embeddings.cls_token"].shape[-1]
    found = {
        "cls": w["embeddings.cls_token"],
        "embedding/kernel": w["embeddings.patch_embeddings.projection.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": w["embeddings.patch_embeddings.projection.bias"],
        "Transformer/encoder_norm/scale": w["layernorm.weight"],
        "Transformer/encoder_norm/bias": w["layernorm.bias"],
    }
    table = w["embeddings.position_embeddings"]
    if old:
        found["Transformer/posembed_input/pos_embedding"] = table
    else:
        found["pos_embedding"] = table[:, 1:]
        found["cls"] = found["cls"] + table[:, :1]
    attention, mlp, second = ("MultiHeadDotProductAttention_1", "MlpBlock_3", "LayerNorm_2") if old else (
        "MultiHeadDotProductAttention_0", "MlpBlock_0", "LayerNorm_1")  # fmt: skip
    for i in range(2):
        at, to = f"layers.{i}", f"Transformer/encoderblock_{i}"
        for part, name in (("q", "query"), ("k", "key"), ("v", "value")):
            found[f"{to}/{attention}/{name}/kernel"] = w[f"{at}.attention.{part}_proj.weight"].T.reshape(width, heads, -1)
            found[f"{to}/{attention}/{name}/bias"] = w[f"{at}.attention.{part}_proj.bias"].reshape(heads, -1)
        found[f"{to}/{attention}/out/kernel"] = w[f"{at}.attention.o_proj.weight"].T.reshape(heads, -1, width)
        found[f"{to}/{attention}/out/bias"] = w[f"{at}.attention.o_proj.bias"]
        for number in (0, 1):
            found[f"{to}/{mlp}/Dense_{number}/kernel"] = w[f"{at}.mlp.fc{number + 1}.weight"].T
            found[f"{to}/{mlp}/Dense_{number}/bias"] = w[f"{at}.mlp.fc{number + 1}.bias"]
        for name, norm in (("LayerNorm_0", "before"), (second, "after")):
            found[f"{to}/{name}/scale"] = w[f"{at}.layernorm_{norm}.weight"]
            found[f"{to}/{name}/bias"] = w[f"{at}.layernorm_{norm}.bias"]
    if "pooler.dense.weight" in w:
        found["pre_logits/kernel"], found["pre_logits/bias"] = w["pooler.dense.weight"].T, w["pooler.dense.bias"]
    if "classifier.weight" in w:
        found["head/kernel"], found["head/bias"] = w["classifier.weight"].T, w["classifier.bias"]
    return found


def scanned(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The blocks stacked along a new first axis, as `nn.scan` has them."""
    found = {name: value for name, value in arrays.items() if "encoderblock" not in name}
    for name in arrays:
        if "encoderblock_0/" in name:
            stack = [arrays[name.replace("encoderblock_0/", f"encoderblock_{i}/")] for i in range(2)]
            found[name.replace("encoderblock_0/", "encoderblock/")] = np.stack(stack)
    return found


def tanh_vit(**settings: Any) -> nn.Module:
    config = transformers.ViTConfig(**SIZES, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, **settings)
    model: nn.Module = transformers.ViTForImageClassification(config) if "num_labels" in settings else transformers.ViTModel(config)
    randomize(model)
    return model.eval()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("head", [{"num_labels": 5}, {"pooler_output_size": 24}])
@pytest.mark.parametrize(("layout", "prefix"), [
    ("vision_transformer", ""), ("vision_transformer", "opt/target/"), ("big_vision", ""), ("big_vision", "params/"), ("scan", "params/"),
    ("big_vision", "params/img/"),
])  # fmt: skip
def test_googles_files_give_the_same(tmp_path: Path, layout: str, prefix: str, head: dict[str, int], compressed: bool) -> None:
    theirs = tanh_vit(**head)
    arrays = google(theirs, old=layout == "vision_transformer")
    arrays = {f"{prefix}{name}": value for name, value in (scanned(arrays) if layout == "scan" else arrays).items()}
    (np.savez_compressed if compressed else np.savez)(tmp_path / "theirs.npz", **arrays)
    ours = imported(tmp_path, tmp_path / "theirs.npz")
    assert (ours.config.activation, ours.config.num_heads) == ("gelu_tanh", 4)
    images = random_images(ours.config, 2)
    with torch.no_grad():
        outputs = theirs(images)
    agree(ours, images, outputs.logits if "logits" in outputs else outputs.pooler_output)


@pytest.mark.parametrize("pool", ["mean", "map"])
def test_googles_files_without_a_class_token_give_the_same(tmp_path: Path, pool: str) -> None:
    """SigLIP's tower in transformers is big_vision's own model: with its MAP head, or with a mean and a classifier."""
    t = transformers
    if pool == "map":
        theirs: nn.Module = t.SiglipVisionModel(t.SiglipVisionConfig(**SIZES))
    else:
        theirs = t.SiglipForImageClassification(t.SiglipConfig(vision_config=SIZES, text_config=TEXT, num_labels=4))
    randomize(theirs)
    w = {name.removeprefix("vision_model."): value.detach().numpy() for name, value in theirs.eval().state_dict().items()}
    arrays = {
        "pos_embedding": w["embeddings.position_embedding.weight"][None],
        "embedding/kernel": w["embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": w["embeddings.patch_embedding.bias"],
        "Transformer/encoder_norm/scale": w["post_layernorm.weight"],
        "Transformer/encoder_norm/bias": w["post_layernorm.bias"],
    }

    def attention(to: str, parts: dict[str, tuple[np.ndarray, np.ndarray]], out: str) -> None:
        for name, (kernel, bias) in parts.items():
            arrays[f"{to}/{name}/kernel"], arrays[f"{to}/{name}/bias"] = kernel.T.reshape(32, 4, 8), bias.reshape(4, 8)
        arrays[f"{to}/out/kernel"], arrays[f"{to}/out/bias"] = w[f"{out}.weight"].T.reshape(4, 8, 32), w[f"{out}.bias"]

    def mlp(to: str, at: str) -> None:
        for number in (0, 1):
            arrays[f"{to}/Dense_{number}/kernel"] = w[f"{at}.fc{number + 1}.weight"].T
            arrays[f"{to}/Dense_{number}/bias"] = w[f"{at}.fc{number + 1}.bias"]

    for i in range(2):
        at, to = f"encoder.layers.{i}", f"Transformer/encoderblock_{i}"
        parts = {
            name: (w[f"{at}.self_attn.{name[0]}_proj.weight"], w[f"{at}.self_attn.{name[0]}_proj.bias"])
            for name in ("query", "key", "value")
        }
        attention(f"{to}/MultiHeadDotProductAttention_0", parts, f"{at}.self_attn.out_proj")
        mlp(f"{to}/MlpBlock_0", f"{at}.mlp")
        for number in (1, 2):
            arrays[f"{to}/LayerNorm_{number - 1}/scale"] = w[f"{at}.layer_norm{number}.weight"]
            arrays[f"{to}/LayerNorm_{number - 1}/bias"] = w[f"{at}.layer_norm{number}.bias"]
    if pool == "map":
        arrays["MAPHead_0/probe"] = w["head.probe"]
        thirds = [np.split(w[f"head.attention.in_proj_{leaf}"], 3) for leaf in ("weight", "bias")]
        attention("MAPHead_0/MultiHeadDotProductAttention_0", dict(zip(("query", "key", "value"), zip(*thirds, strict=True), strict=True)),
                  "head.attention.out_proj")  # fmt: skip
        mlp("MAPHead_0/MlpBlock_0", "head.mlp")
        arrays["MAPHead_0/LayerNorm_0/scale"], arrays["MAPHead_0/LayerNorm_0/bias"] = w["head.layernorm.weight"], w["head.layernorm.bias"]
    else:
        arrays["head/kernel"], arrays["head/bias"] = w["classifier.weight"].T, w["classifier.bias"]
    np.savez(tmp_path / "theirs.npz", **{f"params/{name}": value for name, value in arrays.items()})
    ours = imported(tmp_path, tmp_path / "theirs.npz")
    assert ours.config.pool == pool
    images = random_images(ours.config, 2)
    with torch.no_grad():
        outputs = theirs(pixel_values=images)
    agree(ours, images, outputs.pooler_output if pool == "map" else outputs.logits)


def test_bfloat16_arrays_of_big_vision_are_read(tmp_path: Path) -> None:
    """numpy has no name for the type: two bytes a number, as big_vision's utils write and read them."""
    arrays = google(tanh_vit(num_labels=5), old=False)
    rounded = {name: torch.from_numpy(value.copy()).bfloat16() for name, value in arrays.items()}
    np.savez(tmp_path / "short.npz", **{f"params/{name}": value.view(torch.int16).numpy().view("V2") for name, value in rounded.items()})
    np.savez(tmp_path / "long.npz", **{f"params/{name}": value.float().numpy() for name, value in rounded.items()})
    short, long = (imported(tmp_path / name, tmp_path / f"{name}.npz") for name in ("short", "long"))
    assert all(torch.equal(weight, dict(long.named_parameters())[name]) for name, weight in short.named_parameters())


# ---------------------------------------------------------------------------------------------------------------------------------------
# The names of DINOv2's, MAE's and CLIP's own code, laid out here from the weights of transformers' models
# ---------------------------------------------------------------------------------------------------------------------------------------


def fused(w: dict[str, Tensor], at: str, names: tuple[str, str, str]) -> dict[str, Tensor]:
    return {leaf: torch.cat([w[f"{at}.{name}.{leaf}"] for name in names]) for leaf in ("weight", "bias")}


def by_names_of_5(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's weights in transformers 4, which the loaders that timm is tested beside need, under version 5's names."""
    renamed = {f"attention.attention.{name}": f"attention.{name[0]}_proj" for name in ("query", "key", "value")}
    renamed["attention.output.dense"] = "attention.o_proj"
    for old, new in renamed.items():
        weights = {name.replace(old, new): weight for name, weight in weights.items()}
    return weights


def as_dinov2(theirs: nn.Module) -> dict[str, Tensor]:
    """facebookresearch/dinov2, dinov2/models/vision_transformer.py, with `SwiGLUFFNFused` where theirs has SwiGLU."""
    w = by_names_of_5(theirs.state_dict())
    for i in range(2):  # transformers 5 keeps the gate and what it gates apart
        if f"encoder.layer.{i}.mlp.gate_proj.weight" in w:
            for leaf in ("weight", "bias"):
                w[f"encoder.layer.{i}.mlp.w12.{leaf}"] = torch.cat(
                    [w[f"encoder.layer.{i}.mlp.{part}_proj.{leaf}"] for part in ("gate", "up")]
                )
    found = {
        "cls_token": w["embeddings.cls_token"], "pos_embed": w["embeddings.position_embeddings"], "mask_token": w["embeddings.mask_token"],
        "patch_embed.proj.weight": w["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": w["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": w["layernorm.weight"], "norm.bias": w["layernorm.bias"],
    }  # fmt: skip
    if "embeddings.register_tokens" in w:
        found["register_tokens"] = w["embeddings.register_tokens"]
    gated = "encoder.layer.0.mlp.w12.weight" in w
    for i in range(2):
        at, to = f"encoder.layer.{i}", f"blocks.{i}"
        for leaf, value in fused(w, f"{at}.attention", ("q_proj", "k_proj", "v_proj")).items():
            found[f"{to}.attn.qkv.{leaf}"] = value
        pairs = {"attention.o_proj": "attn.proj", "norm1": "norm1", "norm2": "norm2"}
        pairs |= {"mlp.w12": "mlp.w12", "mlp.down_proj": "mlp.w3"} if gated else {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        for inner, outer in pairs.items():
            for leaf in ("weight", "bias"):
                found[f"{to}.{outer}.{leaf}"] = w[f"{at}.{inner}.{leaf}"]
        for number in (1, 2):
            found[f"{to}.ls{number}.gamma"] = w[f"{at}.layer_scale{number}.lambda1"]
    return found


@pytest.mark.parametrize("kind", ["dinov2", "dinov2-swiglu", "dinov2-registers"])
def test_dinov2s_own_files_give_the_same(tmp_path: Path, kind: str) -> None:
    theirs = hugging_face(kind)
    torch.save(as_dinov2(theirs), tmp_path / "dinov2.pth")
    with pytest.raises(CheckpointError, match="num_heads is not in the file"):
        open_foreign(tmp_path / "dinov2.pth", NOTHING)
    ours = imported(tmp_path, tmp_path / "dinov2.pth", ImportConfig(num_heads=4))
    assert ours.config.layer_norm_eps == 1e-6
    assert describe(tmp_path / "ours").preprocess.mean == (0.485, 0.456, 0.406)
    images = random_images(ours.config, 2)
    agree(ours, images, said_by(kind, theirs, images))


def test_maes_own_files_give_the_same(tmp_path: Path) -> None:
    """facebookresearch/mae, models_mae.py: under `model`, beside settings and an epoch, with a decoder that is left out."""
    theirs = hugging_face("mae-with-decoder")
    w = {name.removeprefix("vit."): value for name, value in theirs.state_dict().items()}
    found = {
        "cls_token": w["embeddings.cls_token"], "pos_embed": w["embeddings.position_embeddings"], "mask_token": w["decoder.mask_token"],
        "patch_embed.proj.weight": w["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": w["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": w["layernorm.weight"], "norm.bias": w["layernorm.bias"],
        "decoder_embed.weight": w["decoder.decoder_embed.weight"], "decoder_pos_embed": w["decoder.decoder_pos_embed"],
        "decoder_blocks.0.norm1.weight": torch.ones(16),
    }  # fmt: skip
    for i in range(2):
        at, to = f"layers.{i}" if "layers.0.layernorm_before.weight" in w else f"encoder.layer.{i}", f"blocks.{i}"
        for leaf, value in fused(w, f"{at}.attention", ("q_proj", "k_proj", "v_proj")).items():
            found[f"{to}.attn.qkv.{leaf}"] = value
        for inner, outer in {"attention.o_proj": "attn.proj", "layernorm_before": "norm1", "layernorm_after": "norm2",
                             "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}.items():  # fmt: skip
            for leaf in ("weight", "bias"):
                found[f"{to}.{outer}.{leaf}"] = w[f"{at}.{inner}.{leaf}"]
    import argparse

    torch.save({"model": found, "epoch": 7, "args": argparse.Namespace(lr=0.1)}, tmp_path / "mae.pth")
    # transformers' ViTMAEConfig has another epsilon than MAE's own code, which an import takes as it is known
    ours = imported(tmp_path, tmp_path / "mae.pth", ImportConfig(num_heads=4, layer_norm_eps=1e-12))
    images = random_images(ours.config, 2)
    agree(ours, images, said_by("mae-with-decoder", theirs, images))
    description = describe(tmp_path / "ours")
    assert set(description.origin["left_out"].values()) == {"of MAE's decoder", "stands for hidden patches in pre-training"}
    assert description.preprocess.mean == (0.485, 0.456, 0.406)


def as_open_clip(theirs: nn.Module) -> dict[str, Tensor]:
    """mlfoundations/open_clip, src/open_clip/transformer.py, VisionTransformer, in a model that has a text tower too."""
    w = {name.removeprefix("vision_model."): value for name, value in theirs.state_dict().items()}
    found = {
        "class_embedding": w["embeddings.class_embedding"], "positional_embedding": w["embeddings.position_embedding.weight"],
        "conv1.weight": w["embeddings.patch_embedding.weight"], "ln_pre.weight": w["pre_layrnorm.weight"],
        "ln_pre.bias": w["pre_layrnorm.bias"], "ln_post.weight": w["post_layernorm.weight"], "ln_post.bias": w["post_layernorm.bias"],
        "proj": w["visual_projection.weight"].T.contiguous(),
    }  # fmt: skip
    for i in range(2):
        at, to = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        for leaf, value in fused(w, f"{at}.self_attn", ("q_proj", "k_proj", "v_proj")).items():
            found[f"{to}.attn.in_proj_{leaf}"] = value
        for inner, outer in {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
                             "mlp.fc2": "mlp.c_proj"}.items():  # fmt: skip
            for leaf in ("weight", "bias"):
                found[f"{to}.{outer}.{leaf}"] = w[f"{at}.{inner}.{leaf}"]
    text = {
        "token_embedding.weight": torch.ones(3, 4),
        "transformer.resblocks.0.ln_1.weight": torch.ones(4),
        "logit_scale": torch.tensor(1.0),
    }
    return {f"visual.{name}": value for name, value in found.items()} | text


@pytest.mark.parametrize("told", [True, False])
def test_open_clips_own_files_give_the_same(tmp_path: Path, told: bool) -> None:
    theirs = hugging_face("clip-projection")
    save_file(as_open_clip(theirs), tmp_path / "open_clip_model.safetensors")
    said = NOTHING
    if told:
        vision = {"image_size": 32, "width": 32, "head_width": 8, "layers": 2, "patch_size": 8}
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"vision_cfg": vision, "quick_gelu": True}}))
    else:
        with pytest.raises(CheckpointError, match="num_heads and activation are not in the file; --num-heads and --activation say them"):
            open_foreign(tmp_path, NOTHING)
        with pytest.raises(CheckpointError, match="activation is not in the file"):
            open_foreign(tmp_path, ImportConfig(num_heads=4))
        said = ImportConfig(num_heads=4, activation="quick_gelu")
    ours = imported(tmp_path, tmp_path, said)
    assert ours.config.layer_norm_eps == 1e-5
    images = random_images(ours.config, 2)
    agree(ours, images, said_by("clip-projection", theirs, images))


# ---------------------------------------------------------------------------------------------------------------------------------------
# What a file does not say, and what does not fit
# ---------------------------------------------------------------------------------------------------------------------------------------

PLAIN = ViTConfig(depth=2, width=64, mlp_dim=96, num_heads=4, patch_size=8, image_size=(32, 32), num_classes=3)


def timm_file(folder: Path, model: ViTConfig, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: p.detach().clone() for name, p in random_vit(model).named_parameters()}, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_what_shapes_do_not_say_is_told_or_asked_for(tmp_path: Path) -> None:
    bare = timm_file(tmp_path / "bare", replace(PLAIN, width=192))  # a width that is known: Ti's
    found = open_foreign(bare, NOTHING).weights
    assert found.model.num_heads == 3
    assert [words.partition(" ")[0] for words in found.assumed] == [
        "num_heads",
        "layer_norm_eps",
        "activation",
        "image_size",
        "preprocessing",
    ]
    with pytest.raises(CheckpointError, match="num_heads is not in the file; --num-heads says it"):
        open_foreign(timm_file(tmp_path / "odd", PLAIN), NOTHING)
    rectangle = timm_file(tmp_path / "rectangle", replace(PLAIN, image_size=(16, 40)))
    with pytest.raises(CheckpointError, match=r"image_size is not in the file; --image-size HEIGHT WIDTH says it$"):
        open_foreign(rectangle, ImportConfig(num_heads=4))
    assert open_foreign(rectangle, ImportConfig(num_heads=4, image_size=(16, 40))).weights.model.grid == (2, 5)
    unknown = timm_file(tmp_path / "unknown", PLAIN, architecture="vit_base_patch16_rope_224", pretrained_cfg={"input_size": [3, 32, 32]})
    with pytest.raises(CheckpointError, match="vit_base_patch16_rope_224 is none whose settings are known"):
        open_foreign(unknown, ImportConfig(num_heads=4))


def test_what_the_user_says_and_the_file_does_not_is_refused(tmp_path: Path) -> None:
    normed = timm_file(tmp_path / "normed", replace(PLAIN, qk_norm=True))
    for said, refusal in {
        ImportConfig(position="sincos"): "has 17 learned position embeddings; leave --position sincos out",
        ImportConfig(num_heads=8): "has 4 heads by its tensors; leave --num-heads 8 out",
        ImportConfig(std=(0.0, 0.5, 0.5)): "must be above 0; 0.5 0.5 0.5 is",
        ImportConfig(image_size=(36, 36)): "has patches of 8 pixels, of which a side of --image-size 36 36 is no multiple; 32 32 works$",
        ImportConfig(image_size=(100, 36)): "of which a side of --image-size 100 36 is no multiple; 32 32 works$",
        ImportConfig(pool="mean"): "has a class token; leave --pool mean out",
    }.items():
        with pytest.raises((CheckpointError, ConfigError), match=refusal):
            open_foreign(normed, said)
    plain = timm_file(tmp_path / "plain", PLAIN)
    with pytest.raises(CheckpointError, match=f"has a width of {PLAIN.width}, which --num-heads 5 does not divide$"):
        open_foreign(plain, ImportConfig(num_heads=5))
    gated = timm_file(tmp_path / "gated", replace(PLAIN, mlp="swiglu"))
    with pytest.raises(CheckpointError, match="has SwiGLU's MLPs, whose gate is SiLU; leave --activation gelu out"):
        open_foreign(gated, ImportConfig(num_heads=4, activation="gelu"))


def test_what_the_user_says_against_the_json_beside_the_weights_is_told(tmp_path: Path) -> None:
    args = {"num_heads": 4, "img_size": 32}
    folder = timm_file(tmp_path / "timm", PLAIN, architecture="vit_tiny_patch16_224", model_args=args, global_pool="token")
    found = open_foreign(folder, ImportConfig(num_heads=2, image_size=(16, 64), pool="mean_with_cls")).weights
    assert (found.model.num_heads, found.model.image_size, found.model.pool) == (2, (16, 64), "mean_with_cls")
    told = [words for words in found.assumed if "(as said; the JSON beside the weights says" in words]
    assert [words.rpartition(" says ")[2] for words in told] == ["4)", "(32, 32))", "cls)"]


def test_a_swiglus_own_activation_is_known(tmp_path: Path) -> None:
    """Its gate is SiLU, as timm's `act_layer` says where it says it."""
    args = {"num_heads": 4, "img_size": 32, "act_layer": "silu"}
    plain = timm_file(tmp_path / "plain", PLAIN, architecture="vit_tiny_patch16_224", model_args=args)
    with pytest.raises(CheckpointError, match="act_layer is 'silu'"):
        open_foreign(plain, NOTHING)
    gated = timm_file(tmp_path / "gated", replace(PLAIN, mlp="swiglu"), architecture="vit_tiny_patch16_224", model_args=args)
    assert open_foreign(gated, NOTHING).weights.model.mlp == "swiglu"


@pytest.mark.parametrize("said", ["none", "", "rope"])
def test_positions_that_config_json_says_and_the_file_does_not_are_refused(tmp_path: Path, said: str) -> None:
    args = {"num_heads": 4, "img_size": 32, "pos_embed": said}
    folder = timm_file(tmp_path / "timm", PLAIN, architecture="vit_tiny_patch16_224", model_args=args)
    with pytest.raises(CheckpointError, match=f"config.json says pos_embed='{said}', and there are 17 position embeddings$"):
        open_foreign(folder, NOTHING)
    file = folder / "config.json"
    file.write_text(file.read_text().replace(f'"pos_embed": "{said}"', '"pos_embed": "learn"'))
    assert open_foreign(folder, NOTHING).weights.model.position == "learned_1d"


def test_pixels_that_no_patch_covers_are_told(tmp_path: Path) -> None:
    """As of SigLIP's models of 384 pixels in patches of 14."""
    config = {"architecture": "vit_tiny_patch16_224", "model_args": {"num_heads": 4, "img_size": 36}}
    found = open_foreign(timm_file(tmp_path / "timm", PLAIN, **config), NOTHING).weights
    assert found.model.image_size == (32, 32)
    assert "image_size 32x32 (36x36 is said, of which patches leave out the rest)" in found.assumed


def test_equal_numbers_of_tokens_are_not_taken_for_equal_grids(tmp_path: Path) -> None:
    """16 patches are 4 x 4 or 2 x 8: the size that is said decides, and one that does not fit is refused."""
    folder = timm_file(tmp_path / "square", PLAIN)
    assert open_foreign(folder, ImportConfig(num_heads=4, image_size=(16, 64))).weights.model.grid == (2, 8)
    with pytest.raises(CheckpointError, match=r"patches of 8 pixels, which are not those of --image-size 16 32; 32 32 works$"):
        open_foreign(folder, ImportConfig(num_heads=4, image_size=(16, 32)))


def test_every_tensor_that_does_not_fit_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    folder = timm_file(tmp_path / "theirs", PLAIN)
    weights = load_file(folder / "model.safetensors")
    del weights["blocks.1.norm2.bias"]
    weights |= {"blocks.0.attn.qkv.weight": torch.ones(64, 64), "blocks.0.extra": torch.ones(2)}
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as refused:
        adopt(folder, tmp_path / "ours", ImportConfig(num_heads=4))
    words = str(refused.value)
    assert "only 30 of its 32 tensors fit" in words
    assert "blocks.1.norm2.bias (64) is missing" in words
    assert "blocks.0.attn.qkv.weight has shape (64 x 64), the model's has (192 x 64)" in words
    assert "blocks.0.extra (2) has no place" in words
    assert {path.name for path in tmp_path.iterdir()} == {"theirs"}


@pytest.mark.parametrize(("form", "processor"), [("hf_vit", "ViTImageProcessor"), ("hf_siglip", "SiglipImageProcessor")])
def test_without_a_processor_a_family_has_what_transformers_gives_it(form: Any, processor: str) -> None:
    theirs = getattr(transformers, processor)()
    assert not theirs.do_center_crop
    assert FAMILIES[form].preprocess == {
        "mean": tuple(theirs.image_mean), "std": tuple(theirs.image_std), "eval_crop": 1.0,
        "interpolation": {2: "bilinear", 3: "bicubic"}[int(theirs.resample)],
    }  # fmt: skip


@pytest.mark.parametrize("processor", ["ViTImageProcessor", "SiglipImageProcessor", "CLIPImageProcessor"])
def test_what_a_processor_leaves_out_is_its_default(processor: str) -> None:
    theirs = getattr(transformers, processor)()
    whole = {"image_processor_type": processor, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    size = {name: dict(value) for name in ("size", "crop_size") if (value := getattr(theirs, name, None))}
    said = whole | size | {"resample": int(theirs.resample), "do_center_crop": bool(theirs.do_center_crop)}
    views = [read_preprocess("hf_vit", False, {"preprocessor_config.json": of}, ImportConfig(), "x") for of in (whole, said)]
    assert views[0] == views[1]
    assert not views[0][1], "nothing was assumed"


def test_an_import_verifies_and_says_where_it_comes_from(tmp_path: Path) -> None:
    folder = timm_file(tmp_path / "theirs", PLAIN)
    names = ("cat", "dog", "fox")
    adopt(folder, tmp_path / "ours", ImportConfig(num_heads=4, mean=(0.1, 0.2, 0.3), eval_crop=0.9), class_names=names, licence="mit")
    description = describe(find_checkpoint(str(tmp_path / "ours")))
    assert (description.class_names, description.preprocess.mean, description.preprocess.eval_crop) == (names, (0.1, 0.2, 0.3), 0.9)
    assert description.origin["imported_from"] == "model.safetensors"
    assert [words for words in description.origin["assumed"] if words.startswith("preprocessing")] == [  # mean and crop were given
        "preprocessing (vitscale's own: std (0.5, 0.5, 0.5), interpolation bilinear; --std, --interpolation would say another)"
    ]
    assert len(description.origin["sha256"]) == 64
    assert all(found["holds"] for found in verify_export(description, "cpu", "fp32"))
    card = (tmp_path / "ours" / "README.md").read_text()
    assert all(
        words in card
        for words in ("imported into vitscale", description.origin["sha256"], "layer_norm_eps 1e-06 (timm's)", 'license: "mit"')
    )
    assert "trained with vitscale" not in card
    with pytest.raises(CheckpointError, match="2 class names for a head of 3 classes"):
        adopt(folder, tmp_path / "other", ImportConfig(num_heads=4), class_names=names[:2])
    with pytest.raises(CheckpointError, match="every verb takes it as it is"):
        adopt(tmp_path / "ours", tmp_path / "other", NOTHING)


def test_positions_that_are_computed_are_asked_for(tmp_path: Path) -> None:
    """big_vision's `sincos2d` is no tensor of the file, and a model without positions is another one."""
    model = random_vit(replace(PLAIN, position="sincos", pool="mean", activation="gelu_tanh"))
    out = export(write_checkpoint(tmp_path / "step", model), "weight", tmp_path / "npz", to="npz")
    arrays = {name: value for name, value in np.load(out / "weights.npz").items() if "pos_embedding" not in name}
    np.savez(tmp_path / "theirs.npz", **arrays)
    with pytest.raises(CheckpointError, match="--image-size 3 12 is no multiple; 8 8 or 8 16 works"):
        open_foreign(tmp_path / "theirs.npz", ImportConfig(image_size=(3, 12)))
    both = r"position and image_size are not in the file; --position sincos .* or none and --image-size HEIGHT WIDTH say"
    with pytest.raises(CheckpointError, match=both):
        open_foreign(tmp_path / "theirs.npz", NOTHING)
    with pytest.raises(CheckpointError, match=r"position is not in the file; --position sincos \(computed, .*\) or none says it$"):
        open_foreign(tmp_path / "theirs.npz", ImportConfig(image_size=(32, 32)))
    ours = imported(tmp_path, tmp_path / "theirs.npz", ImportConfig(image_size=(32, 32), position="sincos"))
    images = random_images(PLAIN, 2)
    with torch.no_grad():
        agree(ours, images, model(images))


@pytest.mark.parametrize(("processor", "crop", "reason"), [
    ({"size": {"height": 32, "width": 32}}, 1.0, ""),
    ({"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}, 32 / 36.5, ""),
    ({"size": 32, "crop_size": 32, "do_center_crop": True}, 0.984, ""),
    ({"size": {"height": 36, "width": 36}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}, 0.0, "central crop"),
    ({"size": {"height": 32, "width": 32}, "do_normalize": False}, 0.0, "do_normalize"),
    ({"size": {"height": 32, "width": 32}, "rescale_factor": 1 / 127.5}, 0.0, "rescale_factor"),
])  # fmt: skip
def test_a_processor_is_read_as_it_works_or_refused(tmp_path: Path, processor: dict[str, Any], crop: float, reason: str) -> None:
    """Held to the pixels that transformers' own processor makes of a photograph."""
    hugging_face("vit").save_pretrained(tmp_path / "theirs")
    said = {"image_processor_type": "BitImageProcessor", "do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3}
    said |= {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.3], "do_center_crop": False} | processor
    (tmp_path / "theirs" / "preprocessor_config.json").write_text(json.dumps(said))
    if reason:
        with pytest.raises(CheckpointError, match=reason):
            open_foreign(tmp_path / "theirs", NOTHING)
        return
    found = open_foreign(tmp_path / "theirs", NOTHING).weights.preprocess
    assert found.eval_crop == pytest.approx(crop, abs=1e-3)
    picture = photograph((100, 80))  # margins of crops are even
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path / "theirs", backend="pil")(decode(picture), return_tensors="np")
    view = torch.from_numpy(evaluation_view(picture, (32, 32), found).copy())[None]
    assert np.abs(normalize(view, found)[0].numpy() - theirs["pixel_values"][0]).max() < 1e-5


@pytest.mark.peers
@pytest.mark.parametrize("architecture", [
    "vit_tiny_patch16_224", "vit_base_patch32_clip_quickgelu_224", "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2",
    "deit3_small_patch16_224",
    "vit_base_patch16_224",
])  # fmt: skip
def test_models_of_timm_by_their_names_give_the_same(tmp_path: Path, architecture: str) -> None:
    """As timm's own hub export writes them, nothing said by hand."""
    import timm
    from timm.models import save_for_hf

    theirs = timm.create_model(architecture).eval()
    randomize(theirs)
    save_for_hf(theirs, tmp_path / "theirs")
    ours = imported(tmp_path, tmp_path / "theirs")
    images = random_images(ours.config, 1)
    with torch.no_grad():
        agree(ours, images, theirs(images))


@pytest.mark.peers
def test_timm_reads_the_layouts_of_dinov2_and_open_clip_alike(tmp_path: Path) -> None:
    """timm converts the same files by its own rules: an independent reading of what stands in the tables above."""
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    for name, kind, table, architecture, said in (
        ("dinov2", "dinov2-registers", as_dinov2, "vit_small_patch14_reg4_dinov2", ImportConfig(num_heads=4)),
        (
            "clip",
            "clip-projection",
            as_open_clip,
            "vit_base_patch32_clip_quickgelu_224",
            ImportConfig(num_heads=4, activation="quick_gelu"),
        ),
    ):
        weights = {key: value.clone() for key, value in table(hugging_face(kind)).items()}
        torch.save(weights, tmp_path / f"{name}.pth")
        ours = imported(tmp_path / name, tmp_path / f"{name}.pth", said)
        settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": ours.config.num_classes}
        settings |= {"mlp_ratio": ours.config.mlp_dim / 32} | ({"reg_tokens": 3} if name == "dinov2" else {})
        theirs = timm.create_model(architecture, **settings).eval()
        theirs.load_state_dict(checkpoint_filter_fn(dict(weights), theirs), strict=True)
        images = random_images(ours.config, 2)
        with torch.no_grad():
            agree(ours, images, theirs(images))
