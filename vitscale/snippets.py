"""The code of a model card: a picture to a class or features, what lies between, and a new head. A test runs each as it stands.

Each of a card's snippets goes on from the first: `loading`, then `inner` or `tuning`. Shape suffixes are those of `model.py`.
"""

from collections.abc import Mapping
from typing import Any

from vitscale.targets import Target

_NEW_CLASSES = 10


def loading(target: Target, certificate: Mapping[str, Any], *, multi_label: bool, named: bool) -> list[str]:
    """From a picture to a class, or to features where there is no head.

    Args:
        certificate: what certificate.json says: `library`, and for npz `timm`.
        named: whether the folder has names of the classes.
    """
    library, model = certificate["library"], target.model
    folder = ['folder = Path(".").resolve()  # where this folder lies; "." from within it']
    folder += ['picture = Image.open(folder / "certificate" / "00.jpg").convert("RGB")']
    begin = ["from pathlib import Path", "", "from PIL import Image"]
    if library == "timm":
        lines = ["import timm", "from timm.data import create_transform, resolve_data_config", *begin, "", *folder]
        lines += ['model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()  # timm 1.0.20 or later']
        lines += ["transform = create_transform(**resolve_data_config({}, model=model))"]
    elif library == "npz":
        timm = certificate["timm"]
        classes = 0 if model.representation_size else model.num_classes  # timm leaves that layer out, and the head was trained behind it
        lines = ["import timm", "from timm.data import create_transform", *begin, "", *folder]
        lines += _npz_model(timm, timm["model_args"], classes)
        lines += ["model.eval()", f"transform = create_transform(**{timm['transform']!r})"]
    elif library == "hf":
        auto = "AutoModelForImageClassification" if model.num_classes else "AutoModel"
        pooler = ", add_pooling_layer=False" if has_no_pooler(target) and not model.num_classes else ""
        lines = [f"from transformers import AutoImageProcessor, {auto}", *begin, "", *folder]
        lines += [f"model = {auto}.from_pretrained(folder{pooler}).eval()"]
        lines += ['processor = AutoImageProcessor.from_pretrained(folder, backend="pil")  # Pillow resizes, as in training']
    else:
        lines = ["import runpy", *begin, "", *folder]
        lines += ['vit = runpy.run_path(str(folder / "vit.py"))  # or copy it elsewhere and import it', 'model = vit["load"](folder)']
    given, logits, features = {
        "timm": ("images_BCHW = transform(picture)[None]", "model(images_BCHW)", "model(images_BCHW)"),
        "npz": ("images_BCHW = transform(picture)[None]", "model(images_BCHW)", "model(images_BCHW)"),
        "hf": ('inputs = processor(picture, return_tensors="pt")', "model(**inputs).logits", ""),
        "safetensors": (
            'images_BCHW = vit["view"](model, picture)[None]',
            'vit["forward"](model, images_BCHW)["logits_BK"]',
            'vit["forward"](model, images_BCHW)["features_BD"]',
        ),
    }[library]
    lines.append(given)
    if library == "npz" and model.representation_size:
        return [*lines, *inner(target, library)]
    if not model.num_classes:
        return [*lines, *(inner(target, library) if library == "hf" else [f"features_BD = {features}"])]
    lines.append(f"logits_BK = {logits}")
    if library == "hf":
        return [*lines, _best("model.config.id2label[{}]", multi_label=multi_label)]
    if named:
        lines.append('names = (folder / "classes.txt").read_text(encoding="utf-8").splitlines()')
    return [*lines, _best("names[{}]" if named else "{}", multi_label=multi_label)]


def _best(name: str, *, multi_label: bool) -> str:
    if multi_label:
        return f"print([{name.format('k')} for k in (logits_BK[0].sigmoid() > 0.5).nonzero().flatten().tolist()])"
    return f"print({name.format('logits_BK.argmax().item()')})"


def inner(target: Target, library: str) -> list[str]:
    """Features and patch tokens."""
    model = target.model
    if library == "safetensors":
        return ['found = vit["forward"](model, images_BCHW)', 'features_BD, tokens_BND = found["features_BD"], found["tokens_BND"]']
    if library == "hf":
        base = {"hf_vit": "model.vit", "hf_siglip": "model.vision_model"}[target.form] if model.num_classes else "model"
        pooled = model.representation_size or model.pool == "map"
        hidden = "outputs.last_hidden_state"
        features = "outputs.pooler_output" if pooled else f"{hidden}[:, 0]" if target.form == "hf_vit" else f"{hidden}.mean(dim=1)"
        tokens = f"{hidden}[:, 1:]" if target.form == "hf_vit" else hidden
        return [f"outputs = {base}(**inputs)", f"features_BD = {features}", f"tokens_BND = {tokens}"]
    prefix = f"[:, {model.num_prefix_tokens} :]" if model.num_prefix_tokens else ""
    if model.representation_size:
        return [f"tokens_BND = model.forward_features(images_BCHW){prefix}  # timm has no representation layer"]
    return [
        "hidden_BND = model.forward_features(images_BCHW)",
        "features_BD = model.forward_head(hidden_BND, pre_logits=True)",
        f"tokens_BND = hidden_BND{prefix}",
    ]


def tuning(target: Target, certificate: Mapping[str, Any]) -> list[str]:
    """A new head, and images of twice the size where the library takes them; nothing where it has no model for that."""
    library, model = certificate["library"], target.model
    height, width = (2 * side for side in model.image_size)
    square = is_square(target)
    if library == "timm":
        size = f", img_size=({height}, {width})" if square else ""
        options = f'{{"input_size": (3, {height}, {width})}}' if square else "{}"
        return [
            f'model = timm.create_model(f"local-dir:{{folder}}", pretrained=True, num_classes={_NEW_CLASSES}{size})',
            f"transform = create_transform(**resolve_data_config({options}, model=model))",
            "logits_BK = model(transform(picture)[None])",
        ]
    if library == "npz":
        timm = certificate["timm"]
        args, transform = dict(timm["model_args"]), dict(timm["transform"])
        if square:
            args["img_size"], transform["input_size"] = [height, width], [3, height, width]
        return [
            *_npz_model(timm, args, _NEW_CLASSES),
            f"transform = create_transform(**{transform!r})",
            "logits_BK = model(transform(picture)[None])",
        ]
    if library == "hf":
        if not model.num_classes and target.form != "hf_vit":  # there is no head for SigLIP's tower alone
            return []
        size = f', size={{"height": {height}, "width": {width}}}'
        if "crop_size" in (said := target.sidecars["preprocessor_config.json"]):
            size = f', size={{"shortest_edge": {2 * said["size"]["shortest_edge"]}}}, crop_{size.removeprefix(", ")}'
        return [
            *([] if model.num_classes else ["from transformers import AutoModelForImageClassification"]),
            f"model = AutoModelForImageClassification.from_pretrained(folder, num_labels={_NEW_CLASSES}, ignore_mismatched_sizes=True)",
            f'inputs = processor(picture{size if square else ""}, return_tensors="pt")',
            f"logits_BK = model(**inputs{', interpolate_pos_encoding=True' if square else ''}).logits",
        ]
    features = model.representation_size or model.width
    return [
        "import torch",
        "",
        f'model["model"]["num_classes"], weights = {_NEW_CLASSES}, model["weights"]',
        f'weights |= {{"head.weight": torch.zeros({_NEW_CLASSES}, {features}), "head.bias": torch.zeros({_NEW_CLASSES})}}',
        "parameters = [weight.requires_grad_() for weight in weights.values()]  # for an optimizer",
        'logits_BK = vit["forward"](model, images_BCHW)["logits_BK"]',
    ]


def _npz_model(timm: Mapping[str, Any], args: Mapping[str, Any], num_classes: int) -> list[str]:
    return [
        f"model = timm.create_model({timm['architecture']!r}, num_classes={num_classes}, **{dict(args)!r})",
        'model.load_pretrained(str(folder / "weights.npz"))',
    ]


def is_square(target: Target) -> bool:
    """Whether the model's grid is: timm and transformers take every table of positions that they resample for one of a square."""
    return target.model.grid[0] == target.model.grid[1]


def has_no_pooler(target: Target) -> bool:
    """Whether transformers' bare model would have a pooler of its own making, which no weights are for."""
    return target.form == "hf_vit" and not target.model.representation_size
