"""The code of a model card: a picture to a class or features, what lies between, and a new head. Tests run it as it stands.

Each of a card's snippets goes on from the first one. Shape suffixes are those of `model.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vitscale.config import PreprocessConfig
from vitscale.targets import Target

_NAMES = 'names = (folder / "classes.txt").read_bytes().decode().split("\\n")'


class Snippets(NamedTuple):
    """Lines of code."""

    loading: list[str]
    """From a picture to a class, or to features where there is no head."""
    inner: list[str]
    """Features and patch tokens."""
    tuning: list[str]
    """A new head; empty where the library has no model with one."""
    enlarged: bool
    """Whether `tuning` takes images of twice the size."""


def snippets(
    target: Target, preprocess: PreprocessConfig, certificate: Mapping[str, Any], *, multi_label: bool, named: bool
) -> Snippets:  # fmt: skip
    """Those of an export.

    Args:
        certificate: what certificate.json says: `library`, `dtype`, and for npz `timm`.
        named: whether the folder has names of the classes.
    """
    library, model = certificate["library"], target.model
    viewed = _certified_view(preprocess) if library in ("npz", "safetensors") and preprocess.eval_protocol != "timm" else []
    of_library = {"timm": _timm, "npz": _npz, "hf": _hugging_face, "safetensors": _plain}[library]
    imports, lines, result, inner, tuning, enlarged = of_library(target, certificate, viewed)
    given = ["", "from safetensors.torch import load_file"] if viewed else ["", "from PIL import Image"]
    begin = [*imports, "from pathlib import Path", *given, "", 'folder = Path(".").resolve()  # where this folder lies; "." from within it']
    if not viewed:
        begin.append('picture = Image.open(folder / "certificate" / "00.jpg").convert("RGB")')
    if not result:
        return Snippets([*begin, *lines, *inner], inner, tuning, enlarged)
    if not model.num_classes:
        return Snippets([*begin, *lines, f"features_BD = {result}"], inner, tuning, enlarged)
    name = "model.config.id2label[{}]" if library == "hf" else "names[{}]" if named else "{}"
    best = f"print({name.format('logits_BK.argmax().item()')})"
    if multi_label:
        best = f"print([{name.format('k')} for k in (logits_BK[0].sigmoid() > 0.5).nonzero().flatten().tolist()])"
    names = [_NAMES] if named and library != "hf" else []
    return Snippets([*begin, *lines, f"logits_BK = {result}", *names, best], inner, tuning, enlarged)


def _certified_view(preprocess: PreprocessConfig) -> list[str]:
    """Pixels of an image by a protocol that no library has code for."""
    return [
        f"# Pixels of certificate/00.jpg by {preprocess.eval_protocol}'s protocol, for which the library has no code",
        'views_BHWC = load_file(folder / "certificate" / "expected.safetensors")["image_views_BHWC"][:1]',
        "mean, std = (views_BHWC.new_tensor(of) for of in "
        f"({list(preprocess.mean)}, {list(preprocess.std)}))",
        "images_BCHW = ((views_BHWC / 255 - mean) / std).permute(0, 3, 1, 2)",
    ]  # fmt: skip


# What each library has: imports, lines up to the model and its inputs, the expression for logits or features ("": `inner` has them),
# and the rest of its Snippets
_Parts = tuple[list[str], list[str], str, list[str], list[str], bool]


def _timm(target: Target, certificate: Mapping[str, Any], viewed: Sequence[str]) -> _Parts:
    height, width = _doubled(target)
    size, options = (f", img_size=({height}, {width})", f'{{"input_size": (3, {height}, {width})}}') if _is_square(target) else ("", "{}")
    lines = [
        'model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()  # timm 1.0.20 or later',
        "transform = create_transform(**resolve_data_config({}, model=model))",
        "images_BCHW = transform(picture)[None]",
    ]
    tuning = [
        f'model = timm.create_model(f"local-dir:{{folder}}", pretrained=True, num_classes={_new_classes(target)}{size})',
        f"transform = create_transform(**resolve_data_config({options}, model=model))",
        "logits_BK = model(transform(picture)[None])",
    ]
    imports = ["import timm", "from timm.data import create_transform, resolve_data_config"]
    return imports, lines, "model(images_BCHW)", _timm_inner(target), tuning, _is_square(target)


def _npz(target: Target, certificate: Mapping[str, Any], viewed: Sequence[str]) -> _Parts:
    timm, model = certificate["timm"], target.model
    enlarged = _is_square(target) and not viewed

    def made(num_classes: int, args: Mapping[str, Any]) -> list[str]:
        return [
            f"model = timm.create_model({timm['architecture']!r}, num_classes={num_classes}, **{dict(args)!r})",
            'model.load_pretrained(str(folder / "weights.npz"))',
        ]

    def prepared(size: Sequence[int]) -> list[str]:
        transform = {**timm["transform"], "input_size": list(size)}
        return [f"transform = create_transform(**{transform!r})", "images_BCHW = transform(picture)[None]"]

    own, larger = (3, *model.image_size), (3, *_doubled(target))
    # timm leaves a representation layer out, and the head was trained behind it
    lines = [*made(0 if model.representation_size else model.num_classes, timm["model_args"]), "model.eval()", *(viewed or prepared(own))]
    args = {**timm["model_args"], **({"img_size": list(_doubled(target))} if enlarged else {})}
    tuning = [*made(_new_classes(target), args), *(prepared(larger) if enlarged else []), "logits_BK = model(images_BCHW)"]
    imports = ["import timm", *([] if viewed else ["from timm.data import create_transform"])]
    return imports, lines, "" if model.representation_size else "model(images_BCHW)", _timm_inner(target), tuning, enlarged


def _timm_inner(target: Target) -> list[str]:
    model = target.model
    prefix = f"[:, {model.num_prefix_tokens} :]" if model.num_prefix_tokens else ""
    if model.representation_size:
        return [f"tokens_BND = model.forward_features(images_BCHW){prefix}  # timm has no representation layer"]
    return [
        "hidden_BND = model.forward_features(images_BCHW)",
        "features_BD = model.forward_head(hidden_BND, pre_logits=True)",
        f"tokens_BND = hidden_BND{prefix}",
    ]


def _hugging_face(target: Target, certificate: Mapping[str, Any], viewed: Sequence[str]) -> _Parts:
    model, square, (height, width) = target.model, _is_square(target), _doubled(target)
    auto = "AutoModelForImageClassification" if model.num_classes else "AutoModel"
    pooler = ", add_pooling_layer=False" if has_no_pooler(target) and not model.num_classes else ""
    in_fp32 = ".float()" if certificate["dtype"] == "bf16" else ""  # version 5 would compute in what is stored
    lines = [
        f"model = {auto}.from_pretrained(folder{pooler}){in_fp32}.eval()",
        'processor = AutoImageProcessor.from_pretrained(folder, backend="pil")  # Pillow resizes, as in training',
        'inputs = processor(picture, return_tensors="pt")',
    ]
    base = {"hf_vit": "model.vit", "hf_siglip": "model.vision_model"}[target.form] if model.num_classes else "model"
    hidden = "outputs.last_hidden_state"
    features = f"{hidden}[:, 0]" if target.form == "hf_vit" else f"{hidden}.mean(dim=1)"
    if model.representation_size or model.pool == "map":
        features = "outputs.pooler_output"
    tokens = f"{hidden}[:, 1:]" if target.form == "hf_vit" else hidden
    inner = [f"outputs = {base}(**inputs)", f"features_BD = {features}", f"tokens_BND = {tokens}"]
    imports = [f"from transformers import AutoImageProcessor, {auto}"]
    result = "model(**inputs).logits" if model.num_classes else ""
    if not model.num_classes and target.form != "hf_vit":  # transformers has no head for SigLIP's tower alone
        return imports, lines, result, inner, [], False
    size = f', size={{"height": {height}, "width": {width}}}' if square else ""
    if square and "crop_size" in (said := target.sidecars["preprocessor_config.json"]):
        size = f', size={{"shortest_edge": {2 * said["size"]["shortest_edge"]}}}, crop_{size.removeprefix(", ")}'
    new = f"num_labels={_new_classes(target)}, ignore_mismatched_sizes=True"
    tuning = [
        *([] if model.num_classes else ["from transformers import AutoModelForImageClassification", ""]),
        f"model = AutoModelForImageClassification.from_pretrained(folder, {new}){in_fp32}",
        f'inputs = processor(picture{size}, return_tensors="pt")',
        f"logits_BK = model(**inputs{', interpolate_pos_encoding=True' if square else ''}).logits",
    ]
    return imports, lines, result, inner, tuning, square


def _plain(target: Target, certificate: Mapping[str, Any], viewed: Sequence[str]) -> _Parts:
    model, classes = target.model, _new_classes(target)
    lines = [
        'vit = runpy.run_path(str(folder / "vit.py"))  # or copy it elsewhere and import it',
        'model = vit["load"](folder)',
        *(viewed or ['images_BCHW = vit["view"](model, picture)[None]']),
    ]
    result = f'vit["forward"](model, images_BCHW)["{"logits_BK" if model.num_classes else "features_BD"}"]'
    inner = ['found = vit["forward"](model, images_BCHW)', 'features_BD, tokens_BND = found["features_BD"], found["tokens_BND"]']
    tuning = [
        "import torch",
        "",
        f'model["model"]["num_classes"] = {classes}',
        f'model["weights"]["head.weight"] = torch.zeros({classes}, {model.representation_size or model.width})',
        f'model["weights"]["head.bias"] = torch.zeros({classes})',
        'parameters = [weight.requires_grad_() for weight in model["weights"].values()]  # for an optimizer',
        'logits_BK = vit["forward"](model, images_BCHW)["logits_BK"]',
    ]
    return ["import runpy"], lines, result, inner, tuning, False


def _new_classes(target: Target) -> int:
    """So many as the model does not have, for with as many libraries keep the old head."""
    return 12 if target.model.num_classes == 10 else 10


def _doubled(target: Target) -> tuple[int, int]:
    height, width = target.model.image_size
    return 2 * height, 2 * width


def _is_square(target: Target) -> bool:
    """Whether the model's grid is: timm and transformers take every table of positions that they resample for one of a square."""
    return target.model.grid[0] == target.model.grid[1]


def has_no_pooler(target: Target) -> bool:
    """Whether transformers' bare model would have a pooler of its own making, which no weights are for."""
    return target.form == "hf_vit" and not target.model.representation_size
