"""A Vision Transformer of vitscale in plain torch, from an export's model.safetensors and vitscale.json. Copy it elsewhere, change it.

    model = load("FOLDER")
    logits = forward(model, view(model, Image.open("picture.jpg").convert("RGB"))[None])["logits_BK"]

`model["weights"]` are plain tensors by their names: to train them, set their `requires_grad`. Images are of the model's own size.

Axes: B batch, N tokens, D width, H heads, d width of a head, h x w patches, p pixels of a patch's side, K classes.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file


def load(folder, device="cpu", dtype=torch.float32):
    """The weights by their names, under `weights`, and what vitscale.json says: `model`, `preprocess`, `class_names`."""
    said = json.loads((Path(folder) / "vitscale.json").read_text())
    weights = load_file(Path(folder) / said["weights"], device=str(device))
    return {**said, "weights": {name: weight.to(dtype) for name, weight in weights.items()}}


def forward(model, images_BCHW):
    """Normalised images to `logits_BK` (where there is a head), `features_BD`, which the head sees, and patch `tokens_BND`."""
    said, w = model["model"], model["weights"]
    if list(images_BCHW.shape[2:]) != list(said["image_size"]):
        raise ValueError(f"images of {tuple(images_BCHW.shape[2:])} pixels; this model takes {tuple(said['image_size'])} (height, width)")
    images_BCHW = images_BCHW.to(w["patch_embed.proj.weight"])
    eps, (rows, columns) = said["layer_norm_eps"], (side // said["patch_size"] for side in said["image_size"])
    class_token, D = said["pool"] in ("cls", "mean_with_cls"), said["width"]

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, (x.shape[-1],), w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def mlp(x, name, kind):
        hidden = linear(x, f"{name}.fc1")
        if kind == "swiglu":
            gate, value = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * value
        elif said["activation"] == "quick_gelu":
            hidden = hidden * torch.sigmoid(1.702 * hidden)
        else:
            hidden = F.gelu(hidden, approximate="tanh" if said["activation"] == "gelu_tanh" else "none")
        return linear(hidden, f"{name}.fc2")

    def heads(x_BND):
        return x_BND.unflatten(-1, (said["num_heads"], -1)).transpose(1, 2)

    def attention(x_BND, name):
        q_BHNd, k_BHNd, v_BHNd = (heads(part) for part in linear(x_BND, f"{name}.qkv").chunk(3, dim=-1))
        if said["qk_norm"]:
            q_BHNd, k_BHNd = norm(q_BHNd, f"{name}.q_norm"), norm(k_BHNd, f"{name}.k_norm")
        bias_HNN = None
        if said["position"] == "relative":
            bias_HNN = w[f"{name}.rel_pos_bias"][relative_index(rows, columns, class_token)].permute(2, 0, 1)
        x_BHNd = F.scaled_dot_product_attention(q_BHNd, k_BHNd, v_BHNd, attn_mask=bias_HNN)
        return linear(x_BHNd.transpose(1, 2).flatten(2), f"{name}.proj")

    x_BND = (
        F.conv2d(images_BCHW, w["patch_embed.proj.weight"], w.get("patch_embed.proj.bias"), stride=said["patch_size"])
        .flatten(2)
        .transpose(1, 2)
    )
    if said["position"] == "learned_2d":
        grid_hwD = torch.cat(
            [w["pos_embed_rows"][:, None].expand(-1, columns, -1), w["pos_embed_columns"][None].expand(rows, -1, -1)], dim=-1
        )
        x_BND = x_BND + grid_hwD.flatten(0, 1)
    if said["position"] == "sincos":
        x_BND = x_BND + sincos(rows, columns, D).to(x_BND)
    learned = said["position"] == "learned_1d"
    if learned and not said["class_position"]:
        x_BND = x_BND + w["pos_embed"]
    if class_token:
        x_BND = torch.cat([w["cls_token"].expand(len(x_BND), -1, -1), x_BND], dim=1)
    if learned and said["class_position"]:
        x_BND = x_BND + w["pos_embed"]
    if said["registers"]:
        registers_BRD = w["reg_token"].expand(len(x_BND), -1, -1)
        x_BND = torch.cat([x_BND[:, :class_token], registers_BRD, x_BND[:, int(class_token) :]], dim=1)
    if said["pre_norm"]:
        x_BND = norm(x_BND, "norm_pre")
    for block in (f"blocks.{index}" for index in range(said["depth"])):
        y_BND = attention(norm(x_BND, f"{block}.norm1"), f"{block}.attn")
        x_BND = x_BND + (y_BND * w[f"{block}.ls1.gamma"] if said["layer_scale"] else y_BND)
        y_BND = mlp(norm(x_BND, f"{block}.norm2"), f"{block}.mlp", said["mlp"])
        x_BND = x_BND + (y_BND * w[f"{block}.ls2.gamma"] if said["layer_scale"] else y_BND)
    if not said["pool_norm"]:
        x_BND = norm(x_BND, "norm")
    patches_BND = x_BND[:, class_token + said["registers"] :]
    if said["pool"] == "map":
        q_BH1d = heads(linear(w["attn_pool.latent"], "attn_pool.q").expand(len(x_BND), -1, -1))
        k_BHNd, v_BHNd = (heads(part) for part in linear(patches_BND, "attn_pool.kv").chunk(2, dim=-1))
        x_B1D = linear(F.scaled_dot_product_attention(q_BH1d, k_BHNd, v_BHNd).transpose(1, 2).flatten(2), "attn_pool.proj")
        features_BD = (x_B1D + mlp(norm(x_B1D, "attn_pool.norm"), "attn_pool.mlp", "plain"))[:, 0]
    else:
        features_BD = x_BND[:, 0] if said["pool"] == "cls" else patches_BND.mean(dim=1)
    if said["pool_norm"]:
        features_BD = norm(features_BD, "fc_norm")
    if said["representation_size"]:
        features_BD = torch.tanh(linear(features_BD, "pre_logits.fc"))
    found = {"features_BD": features_BD, "tokens_BND": patches_BND}
    return found | ({"logits_BK": linear(features_BD, "head")} if said["num_classes"] else {})


def view(model, picture):
    """What the model sees (3, H, W) of an RGB picture: the central crop of the resized image, or with a crop of 1 all of it, squashed."""
    said, (height, width) = model["preprocess"], model["model"]["image_size"]
    if said["eval_protocol"] != "timm":
        raise ValueError(f"this model was evaluated by {said['eval_protocol']}'s protocol (google-research), which is not written out here")
    resample = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[said["interpolation"]]
    size = (width, height)
    if said["eval_crop"] != 1:
        target_h, target_w = (math.floor(side / said["eval_crop"]) for side in (height, width))
        if target_h == target_w:
            long = int(target_h * max(picture.size) / min(picture.size))
            size = (target_h, long) if picture.width <= picture.height else (long, target_h)
        else:
            ratio = min(picture.height / target_h, picture.width / target_w)
            size = (round(picture.width / ratio), round(picture.height / ratio))
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    pixels_HWC = np.asarray(picture.resize(size, resample).crop((left, top, left + width, top + height)), dtype=np.float32) / 255
    return torch.from_numpy((pixels_HWC - np.float32(said["mean"])) / np.float32(said["std"])).permute(2, 0, 1)


def sincos(rows, columns, width, temperature=10_000.0):
    """Fixed position embeddings (h w, D), as big_vision's `posemb_sincos_2d`."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    omega = temperature ** -(torch.arange(width // 4, dtype=torch.float64) / max(1, width // 4 - 1))
    x, y = x.flatten()[:, None] * omega, y.flatten()[:, None] * omega
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()


def relative_index(rows, columns, class_token):
    """For each pair of tokens (N, N) its row in the table of relative position biases, as BEiT's."""
    y, x = (t.flatten() for t in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    index_NN = (y[:, None] - y[None] + rows - 1) * (2 * columns - 1) + (x[:, None] - x[None] + columns - 1)
    if class_token:
        offsets = (2 * rows - 1) * (2 * columns - 1)
        index_NN = F.pad(index_NN, (1, 0, 1, 0))
        index_NN[0, :], index_NN[:, 0], index_NN[0, 0] = offsets, offsets + 1, offsets + 2
    return index_NN
