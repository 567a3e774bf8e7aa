"""The JSON files beside a stranger's weights: what timm's, transformers' and open_clip's say of model, classes and preprocessing.

Where it stands: below `recognise.py`. What a file says must be what the shapes say, too, and a setting that this program does not know is
refused by name: nothing is read over.
"""

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from vitscale.anatomy import Facts
from vitscale.check import crop_problem
from vitscale.config import UNREADABLE, Format, ImportConfig, PreprocessConfig, ViTConfig
from vitscale.errors import CheckpointError
from vitscale.families import CENTRAL, CLIP, FAMILIES, IMAGENET
from vitscale.tensorfiles import read_json

Sidecars = Mapping[str, dict[str, Any]]  # what they hold, by their names

_MOST_PIXELS = 2**14  # of an image's side
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
# Names of timm's plain ViTs, whose entry points set nothing that a file does not show but CLIP's epsilon (vision_transformer.py)
_TIMM_PLAIN = re.compile(
    r"(vit|deit|deit3)_(tiny|small|medium|base|large|huge|giant|gigantic)_patch\d+(_reg\d)?(_clip)?(_quickgelu)?(_gap)?(_dinov2)?(_\d+)?"
)
# Settings of timm's VisionTransformer that change nothing in evaluation, and those that are looked at here
_TIMM_IDLE = {"dynamic_img_size", "dynamic_img_pad", "weight_init", "fix_init", "drop_rate", "pos_drop_rate", "patch_drop_rate",
              "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "strict_img_size", "pretrained"}  # fmt: skip
_TIMM_READ = {"img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "class_token", "global_pool", "fc_norm", "qk_norm",
              "init_values", "reg_tokens", "no_embed_class", "pre_norm", "act_layer", "norm_layer", "num_classes", "in_chans", "qkv_bias",
              "pos_embed", "num_features"}  # fmt: skip


def read_sidecars(folder: Path) -> dict[str, dict[str, Any]]:
    """The JSON files that may lie beside weights and say what they are. Raises CheckpointError where one cannot be read."""
    found = {}
    for name in ("config.json", "preprocessor_config.json", "open_clip_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            found[name] = read_json(file)
        except UNREADABLE as error:
            raise CheckpointError(f"{file} cannot be read ({' '.join(str(error).split())[:200]})") from None
    return found


def read_model(form: Format, facts: Facts, sidecars: Sidecars, *, headless: bool) -> dict[str, Any]:
    """What they say of the model, by its settings. Raises what `UNREADABLE` names, where it is not what the shapes say, too."""
    config, family = sidecars.get("config.json", {}), FAMILIES[form]
    defaults = family.config
    if form == "open_clip":
        clip = sidecars.get("open_clip_config.json", {}).get("model_cfg", {})
        return _of_open_clip(facts, clip, clip["vision_cfg"]) if clip else {}
    if defaults is not None and config:
        kind, architectures = config.get("model_type"), config.get("architectures") or [""]
        if str(architectures[0]).endswith("ForImageClassification") and not (facts.num_classes or headless):
            raise ValueError(f"config.json says {architectures[0]!r:.50}, and there is no classifier")
        config = config.get("vision_config", config)
        if config.get("qkv_bias", True) is not True:
            raise ValueError("qkv_bias is false; queries, keys and values of ours have a bias")
        hidden = round(facts.width * config["mlp_ratio"]) if form == "hf_dinov2" and "mlp_ratio" in config else None
        if hidden and facts.swiglu:
            hidden = (hidden * 2 // 3 + 7) // 8 * 8  # Dinov2SwiGLUFFN
        _agree("config.json", config, {
            "hidden_size": facts.width, "num_hidden_layers": facts.depth, "patch_size": facts.patch_size, "num_channels": 3,
            "num_register_tokens": facts.registers, "use_swiglu_ffn": facts.swiglu,
        } | ({} if form == "hf_dinov2" else {"intermediate_size": facts.mlp_dim}))  # fmt: skip
        if hidden and hidden != facts.mlp_dim:
            raise ValueError(f"config.json says mlp_ratio={config['mlp_ratio']!r:.50}, and the MLPs have {facts.mlp_dim} features")
        if form.startswith("hf_vit") and kind not in ("vit", "vit_mae"):
            defaults = {}  # of a model with ViT's tensors, whose defaults are not known
        config = {"hidden_act": "gelu", "image_size": 224, **defaults, **config}
        act, eps = "gelu" if facts.swiglu else config["hidden_act"], config.get("layer_norm_eps")  # SwiGLU looks at none
        if act not in _ACTIVATIONS:
            raise ValueError(f"hidden_act is {act!r:.50}; {', '.join(_ACTIVATIONS)} are known")
        if config.get("pooler_act", "tanh") != "tanh":
            raise ValueError(f"pooler_act is {config['pooler_act']!r:.50}, and ours is tanh")
        return {
            "num_heads": _count("num_attention_heads", config.get("num_attention_heads")),
            "layer_norm_eps": None if eps is None else float(eps),
            "activation": _ACTIVATIONS[act],
            "image_size": _pair(config["image_size"]),
        }
    if family.is_timms and "architecture" in config:
        return _of_timm(facts, config, config.get("model_args") or {}, config.get("pretrained_cfg") or config, headless=headless)
    return {}


def _agree(file: str, stated: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raises ValueError where a file says another value than the tensors do."""
    for name, value in found.items():
        if name in stated and (stated[name] if stated[name] is not None else value) != value:
            raise ValueError(f"{file} says {name}={stated[name]!r:.50}, and the tensors are those of {name}={value}")


def _of_open_clip(facts: Facts, clip: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, Any]:
    """What open_clip_config.json says; its settings are those of open_clip/model.py's CLIPVisionCfg."""
    found = {"width": facts.width, "layers": facts.depth, "patch_size": facts.patch_size, "pool_type": "tok"}
    _agree("open_clip_config.json", vision, found)
    _agree("open_clip_config.json", clip, {"embed_dim": facts.num_classes} if facts.num_classes else {})
    if other := sorted(name for name in ("act_kwargs", "norm_kwargs", "attentional_pool", "timm_model_name") if vision.get(name)):
        raise ValueError(f"open_clip_config.json says {other[0]}={vision[other[0]]!r:.50}, which is not known here")
    return {
        "num_heads": facts.width // (_count("head_width", vision.get("head_width")) or 64),
        "activation": "quick_gelu" if clip.get("quick_gelu") else "gelu",
        "image_size": _pair(vision.get("image_size")),
    }


def _of_timm(facts: Facts, config: Mapping[str, Any], args: Mapping[str, Any], cfg: Mapping[str, Any], *, headless: bool) -> dict[str, Any]:
    """What timm's config.json says: a name, what changes its settings, and what the weights were trained with."""
    architecture, stated = str(config["architecture"]), dict[str, Any]()
    if "_rpn_" in architecture:
        raise ValueError(f"timm's {architecture:.60} has its norms behind the branches, which ours has not; no tensor shows it")
    if unknown := sorted(args.keys() - _TIMM_IDLE - _TIMM_READ):
        raise ValueError(f"model_args say {unknown[0]:.50}={args[unknown[0]]!r:.50}, which is not known here")
    settings = {name: config[name] for name in ("num_classes", "num_features", "global_pool") if name in config} | dict(args)
    found = {
        "embed_dim": facts.width, "num_features": facts.width, "depth": facts.depth, "patch_size": facts.patch_size, "in_chans": 3,
        "class_token": facts.class_token, "reg_tokens": facts.registers, "qk_norm": facts.qk_norm, "pre_norm": facts.pre_norm,
        "fc_norm": facts.pool_norm, "qkv_bias": True,
    }  # fmt: skip
    _agree("config.json", settings, found if headless else found | {"num_classes": facts.num_classes})
    if "mlp_ratio" in settings and int(facts.width * settings["mlp_ratio"]) != facts.mlp_dim * (2 if facts.swiglu else 1):
        raise ValueError(f"config.json says mlp_ratio={settings['mlp_ratio']!r:.50}, and the MLPs have {facts.mlp_dim} features")
    if "init_values" in settings and bool(settings["init_values"]) != facts.layer_scale:
        raise ValueError(
            f"config.json says init_values={settings['init_values']!r:.50}, and there is {'a' if facts.layer_scale else 'no'} LayerScale"
        )
    if pooled := settings.get("global_pool"):
        pools = {"token": "cls", "avg": "mean_with_cls" if facts.class_token else "mean", "map": "map"}
        if pooled not in pools or (pooled == "map") != (facts.pool == "map") or (pooled == "token" and not facts.class_token):
            raise ValueError(f"config.json says global_pool={pooled!r:.50}, which the tensors are not for")
        stated["pool"] = pools[pooled]
    if "pos_embed" in settings:
        if settings["pos_embed"] not in ("", "none", "learn") or (settings["pos_embed"] == "learn") != (facts.positions is not None):
            there = f"{facts.positions or 'no'} position embeddings"
            raise ValueError(f"config.json says pos_embed={settings['pos_embed']!r:.50}, and there are {there}")
        stated["position"] = None if facts.positions else "none"
    stated["no_class_position"] = settings.get("no_embed_class")
    if "input_size" in cfg and "img_size" not in args:
        stated["image_size"] = _pair(cfg["input_size"][1:])
    if "img_size" in args:
        stated["image_size"] = _pair(args["img_size"])
    if "num_heads" in args:
        stated["num_heads"] = _count("num_heads", args["num_heads"])
    if not _TIMM_PLAIN.fullmatch(architecture):
        stated["unknown"] = f", and timm's {architecture} is none whose settings are known here"
        if "act_layer" not in args:
            return stated
    stated["layer_norm_eps"] = 1e-5 if "_clip" in architecture else 1e-6
    act = "gelu" if facts.swiglu else args.get("act_layer", "quick_gelu" if "quickgelu" in architecture else "gelu")
    if act not in _ACTIVATIONS:
        raise ValueError(f"act_layer is {act!r:.50}; {', '.join(_ACTIVATIONS)} are known")
    stated["activation"] = _ACTIVATIONS[act]
    if "norm_layer" in args:
        raise ValueError(f"norm_layer is {args['norm_layer']!r:.50}, which timm's own name does not have")
    return stated


def _pair(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    if not (type(height) is type(width) is int and min(height, width) > 0 and max(height, width) <= _MOST_PIXELS):
        raise ValueError(f"an image of {size!r:.50} pixels cannot be")
    return height, width


def _count(name: str, value: Any) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{name} is {value!r:.50}, and not a number of things")
    return value


def read_classes(sidecars: Sidecars, model: ViTConfig, where: str) -> tuple[tuple[str, ...] | None, bool]:
    """Names of the classes where they are told, and whether several may be right at once. Raises CheckpointError."""
    config = sidecars.get("config.json", {})
    labels = config.get("id2label") or config.get("label_names")
    names: tuple[str, ...] | None = None
    if isinstance(labels, dict) and all(str(number) in labels for number in range(model.num_classes)):
        names = tuple(str(labels[str(number)]) for number in range(model.num_classes))
        names = None if all(name == f"LABEL_{number}" for number, name in enumerate(names)) else names
    elif isinstance(labels, list) and len(labels) == model.num_classes:
        names = tuple(map(str, labels))
    if labels and model.num_classes and len(labels) != model.num_classes:
        raise CheckpointError(f"{where}: config.json names {len(labels)} classes, and the head has {model.num_classes}")
    if names:
        names = tuple(" ".join(name.split()) for name in names)  # they are written a line each
    return names if model.num_classes else None, config.get("problem_type") == "multi_label_classification"


def read_preprocess(
    form: Format, is_metas: bool, sidecars: Sidecars, overrides: ImportConfig, where: str
) -> tuple[PreprocessConfig, list[str]]:
    """What turns an image into the model's input, as the files beside the weights say, else as the family has it; and what was taken so.

    Raises CheckpointError.
    """
    family = FAMILIES[form]
    stated: dict[str, Any] = dict(IMAGENET if is_metas else family.preprocess)
    whose = "ImageNet's" if is_metas else "its family's" if stated else "vitscale's own"
    config, processor = sidecars.get("config.json", {}), sidecars.get("preprocessor_config.json", {})
    try:
        if "pretrained_cfg" in config or ("architecture" in config and "mean" in config):
            cfg = config.get("pretrained_cfg", config)
            stated, whose = _timm_views(cfg), ""
        elif "image_mean" in processor and family.config is not None:
            stated, whose = _processor_views(processor), ""
        elif clip := sidecars.get("open_clip_config.json", {}).get("preprocess_cfg", {}):
            stated, whose = _clip_views(clip), ""
        stated |= {f.name: value for f in fields(PreprocessConfig) if (value := getattr(overrides, f.name, None)) is not None}
        found = PreprocessConfig(**stated)
        if not (
            len(found.mean) == len(found.std) == 3
            and min(found.std) > 0
            and found.interpolation in ("bilinear", "bicubic")
            and not crop_problem(found.eval_crop, "")
        ):
            raise ValueError(f"mean {found.mean}, std {found.std}, {found.interpolation}, crop {found.eval_crop} make no preprocessing")
    except UNREADABLE as error:
        raise CheckpointError(
            f"{where}: what lies beside the weights says no preprocessing ({' '.join(str(error).split())[:200]})"
        ) from None
    taken = {name: getattr(found, name) for name in ("mean", "std", "interpolation", "eval_crop") if getattr(overrides, name) is None}
    words = ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in taken.items())
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in taken)
    assumed = [f"preprocessing ({whose}: {words}; {flags} would say another)"] if whose and taken else []
    return found, assumed


def _timm_views(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What timm's pretrained_cfg says of preprocessing. Raises what `UNREADABLE` names."""
    crop, mode = float(cfg.get("crop_pct") or 0.875), cfg.get("crop_mode") or "center"
    if mode not in ("center", "squash") or (mode == "squash" and crop != 1):
        raise ValueError(f"crop_mode {mode!r:.50} with crop_pct {crop:g}, which is not known here; --eval-crop says another")
    found = {"mean": tuple(cfg["mean"]), "std": tuple(cfg["std"]), "interpolation": cfg.get("interpolation", "bicubic")}
    return found | {"eval_crop": 1.0 if mode == "squash" else min(CENTRAL, crop)}


def _processor_views(processor: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers' preprocessor_config.json says. Raises what `UNREADABLE` names, also where it is no preprocessing of ours."""
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if processor.get(name, True) is not True:
            raise ValueError(f"{name} is {processor[name]!r:.50}, and images here are resized, divided by 255 and normalised")
    if abs(processor.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        raise ValueError(f"rescale_factor is {processor['rescale_factor']!r:.50}, and not 1/255")
    found = {"mean": tuple(processor["image_mean"]), "std": tuple(processor["image_std"]), "eval_crop": 1.0}
    kind = str(processor.get("image_processor_type") or processor.get("feature_extractor_type") or "")
    of_clip = kind.startswith("CLIP")
    found["interpolation"] = {2: "bilinear", 3: "bicubic"}[processor.get("resample", 3 if kind.startswith(("CLIP", "Siglip")) else 2)]
    if processor.get("do_center_crop", of_clip):
        size, crop = processor.get("size", 224 if of_clip else None), processor.get("crop_size", 224 if of_clip else None)
        short = size.get("shortest_edge") if isinstance(size, dict) else size  # a plain number is the older way to say it
        side = crop.get("height") if isinstance(crop, dict) else crop
        if not (isinstance(short, int) and isinstance(side, int) and 0 < side <= short):
            raise ValueError(f"size {size!r:.80} with a central crop of {crop!r:.80} is not known here; --eval-crop says another")
        found["eval_crop"] = min(CENTRAL, side / (short + 0.5))  # so that rounding down gives the very side that is resized to
    return found


def _clip_views(clip: Mapping[str, Any]) -> dict[str, Any]:
    """What open_clip's preprocess_cfg says. Raises what `UNREADABLE` names."""
    mode = clip.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash"):
        raise ValueError(f"resize_mode is {mode!r:.50}; shortest and squash are known here")
    found = {"mean": tuple(clip.get("mean", CLIP["mean"])), "std": tuple(clip.get("std", CLIP["std"]))}
    return found | {"interpolation": clip.get("interpolation", "bicubic"), "eval_crop": 1.0 if mode == "squash" else CENTRAL}
