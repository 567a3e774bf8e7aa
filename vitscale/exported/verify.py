"""Checks an export of vitscale: its files against their SHA-256 sums, and the library that loads it against what the trained model said.

    python verify.py                         in fp32 on the CPU
    python verify.py --device cuda --precision bf16

It needs torch and the library that the export is for, timm or transformers; what lies in `certificate/` it holds that library to: of twenty
images the pixels that the model sees, and of these and of seeded tensors logits, pooled features and patch tokens. Exit status 0 where all
is as it was trained, but for what the export says is lossy (`--exact`: for nothing), 1 where not, 2 where it cannot be checked because a
package or the device is missing. Documents may be added and README.md be changed, for hubs want that, and nothing is computed by them.
"""

import os
import sys

if __name__ == "__main__":  # else what lies in the folder would be imported in place of what is installed
    sys.path[:] = [path for path in sys.path if os.path.realpath(path) != os.path.dirname(os.path.realpath(__file__))]

import argparse
import hashlib
import json
import types
from collections import namedtuple
from pathlib import Path

try:
    import numpy as np
    import torch
    from PIL import Image
    from safetensors.torch import load_file
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(f"NOT CHECKED: {error.name} is not installed; `pip install torch numpy pillow safetensors` and the export's library have all")
    sys.exit(2)

OF_THIS_MACHINE = (ImportError, MemoryError, torch.OutOfMemoryError)  # and no fault of the export's
# The export in its library: outputs of images (1, 3, H, W) by name, the view (3, H, W) of a picture or None, the name of the library, the
# epsilons of its LayerNorms, what it says that it is (`class_names`, `problem_type`, `mean`, `std`, `interpolation`) as far as it does
Loaded = namedtuple("Loaded", ["outputs", "view", "library", "epsilons", "says"])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default=Path(__file__).resolve().parent, type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "tf32", "bf16"))
    parser.add_argument("--exact", action="store_true", help="what is lossy or rounded counts as a failure")
    flags = parser.parse_args()
    if problem := device_problem(flags.device):
        print(f"NOT CHECKED: {problem}")
        sys.exit(2)
    try:
        found = replay(flags.folder, flags.device, flags.precision)
    except ModuleNotFoundError as error:
        print(f"NOT CHECKED: {error.name} is not installed, which loading needs (`pip install {error.name}`); the SHA-256 sums hold")
        sys.exit(2)
    except OF_THIS_MACHINE as error:
        print(f"NOT CHECKED: {type(error).__name__}: {in_a_line(error)}")
        sys.exit(2)
    except Exception as error:  # of libraries, on files that are not what they should be
        print(f"FAILED it cannot be loaded or computed: {type(error).__name__}: {in_a_line(error)}")
        sys.exit(1)
    print("\n".join(found["lines"]))
    if flags.exact and found["inexact"]:
        print(f"FAILED not exact: {found['inexact']}")
        sys.exit(1)
    sys.exit(0 if found["holds"] else 1)


def device_problem(device):
    """Why nothing can be computed on a device, if so."""
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        return f"device {device} is not here ({in_a_line(error)}); cpu works"
    return ""


def in_a_line(error):
    """What an error says."""
    return " ".join(str(error).split())[:300]


def replay(folder, device="cpu", precision="fp32"):
    """What a library makes of an export, as a `result`.

    Raises what the library raises, ImportError or a lack of memory where it is this machine that has not what it takes.
    """
    folder = Path(folder)
    if faults := list(wrong_sums(folder)):  # first, for nothing of a damaged file can be told
        return result([f"FAILED {fault}" for fault in faults], holds=False, precision=precision)
    about = json.loads((folder / "certificate" / "certificate.json").read_text())
    expected = load_file(folder / "certificate" / "expected.safetensors")
    lines = [f"{sum(1 for _ in sums(folder))} files have their SHA-256 sums"]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    loader = {"timm": in_timm, "npz": npz_in_timm, "hf": in_transformers, "safetensors": in_torch}[about["library"]]
    try:
        loaded = loader(folder, about, device, torch.bfloat16 if precision == "bf16" else torch.float32)
    except NotLoadedError as error:
        return result([f"FAILED {error}"], holds=False, precision=precision)
    view, library = loaded.view, loaded.library
    lossy = {loss["what"]: loss["words"] for loss in about["losses"]}
    differences, holds = {}, True
    if odd := sorted(eps for eps in loaded.epsilons if abs(eps - about["layer_norm_eps"]) > 1e-3 * about["layer_norm_eps"]):
        holds = False  # which hardly shows in the outputs of noise, and does in those of some images
        lines.append(f"FAILED LayerNorm has an epsilon of {odd[0]:g}, the model was trained with {about['layer_norm_eps']:g}")
    classes = about.get("class_names")  # which certificates of before have not, as they have no more of what is said here
    written = folder / "classes.txt"
    if classes and (not written.is_file() or written.read_bytes().decode() != "".join(f"{name}\n" for name in classes)):
        holds = False
        lines.append("FAILED classes.txt does not name the classes as trained")
    for what, value in loaded.says.items():
        if what in about and value != about[what]:
            holds = False
            lines.append(f"FAILED {what} is {str(value)[:200]} in {library}, {str(about[what])[:200]} as trained")
    paths = sorted((folder / "certificate").glob("*.jpg"))
    mean, std = (torch.tensor(about[name])[:, None, None] for name in ("mean", "std"))
    if view:
        viewed = torch.stack([view(Image.open(path).convert("RGB")) for path in paths]).float()
        pixels = ((viewed * std + mean) * 255).round().permute(0, 2, 3, 1)
        off = (pixels - expected["image_views_BHWC"]).abs().amax(dim=(1, 2, 3))
        differences["pixels"] = float(off.max())
    else:  # the pixels that vitscale saw stand in for them
        viewed = (expected["image_views_BHWC"].permute(0, 3, 1, 2) / 255 - mean) / std
    if not view:
        lines.append(
            f"NOT CHECKED: the pixels of {len(paths)} images, for {library} has no preprocessing by {about['protocol']}'s protocol"
        )
    elif differences["pixels"]:
        known = "preprocessing" in lossy
        holds = holds and known
        lines.append(
            f"{'lossy ' if known else 'FAILED'} {int((off > 0).sum())} of {len(paths)} images are seen otherwise, by {off.max():.0f} of 255"
        )
    else:
        lines.append(f"ok     the pixels of {len(paths)} images, to the bit")
    tolerance = about["tolerances"][precision]
    for images, prefix, what in ((expected["inputs_BCHW"], "", "tensors"), (viewed, "image_", "images")):
        known = bool(prefix) and "preprocessing" in lossy
        found = differences_of(loaded.outputs, images, expected, prefix, device)
        certified = {prefix + name for name in ("features_BD", "tokens_BND", "logits_BK")} & expected.keys()
        for name in sorted(certified - found.keys()):
            holds = False
            lines.append(f"FAILED {name.removeprefix(prefix)} of {len(images)} {what}: {library} gives none")
        for name, value in found.items():
            differences[name] = value
            good = value <= tolerance
            holds = holds and (good or known)
            state = "ok    " if good else "lossy " if known else "FAILED"
            found_is = f"relative difference {value:.1e}, at most {tolerance:g} is rounding"
            lines.append(f"{state} {name.removeprefix(prefix)} of {len(images)} {what}: {found_is}")
    lines += [f"lossy  {words}" for words in lossy.values()]
    why = " and ".join(["what is lossy"] * bool(lossy) + [f"rounding to {about['dtype']}"] * (about["dtype"] != "fp32"))
    if about["changed"]:
        far = ", ".join(f"{name} {value:.1e}" for name, value in about["changed"].items())
        lines.append(f"note   {why} changed the model, and {library} is held to what came of it; off from what was trained by: {far}")
    wanted = "what vitscale made of the imported file" if about["imported"] else "what was trained"
    rounded = f", rounded to {about['dtype']}" if about["dtype"] != "fp32" else ""
    verdict = f"does NOT give {wanted}{rounded}" if not holds else "differs as said above" if lossy else f"gives {wanted}{rounded}"
    lines.append(f"{library} {verdict} ({precision})")
    return result(lines, holds=holds, precision=precision, differences=differences, library=library, inexact=why)


def result(lines, *, holds, precision, differences=(), library="", inexact=""):
    """What is found of an export.

    Of `lines` for people; whether it `holds` (None: not checked); the `precision` that the library computed in; the relative `differences`
    by what was compared; the `library` and its version ("": it was not come to), and why the export is `inexact`, if so.
    """
    found = {"lines": lines, "holds": holds, "differences": dict(differences)}
    return found | {"library": library, "precision": precision, "inexact": inexact}


class NotLoadedError(ValueError):
    """A library that does not take what the export has."""


def differences_of(outputs, images, expected, prefix="", device="cpu"):
    """How far what is computed of images, each alone, is from what is expected under these names behind a prefix."""
    found = [outputs(image[None].to(device)) for image in images]
    computed = {prefix + name: torch.cat([one[name].float().cpu() for one in found]) for name in found[0]}
    return {name: difference(value, expected[name]) for name, value in computed.items()}


def difference(ours, theirs):
    """Norm of the difference over the norm; infinite where shapes differ or a number is not finite."""
    if ours.shape != theirs.shape or not bool(torch.isfinite(ours).all() and torch.isfinite(theirs).all()):
        return float("inf")
    apart, norm = float((ours - theirs).norm()), float(theirs.norm())
    return apart / norm if norm else float("inf") if apart else 0.0


def epsilons_of(model):
    """The epsilons of a module's LayerNorms."""
    return {module.eps for module in model.modules() if isinstance(module, torch.nn.LayerNorm)}


def sums(folder):
    """(SHA-256, file) of each line of SHA256SUMS."""
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ", 1)
        yield digest, name


def wrong_sums(folder):
    """What is wrong with files that have a sum."""
    needed = {"SHA256SUMS", "certificate/certificate.json", "certificate/expected.safetensors"}
    for name in sorted(name for name in needed if not (folder / name).is_file()):
        yield f"{name} is missing"
        return
    for digest, name in sums(folder):
        if not (folder / name).is_file():
            yield f"{name} is missing"
            continue
        found = hashlib.sha256()
        with open(folder / name, "rb") as file:
            while block := file.read(1 << 22):
                found.update(block)
        if found.hexdigest() != digest and name != "README.md":
            is_text = name.endswith((".json", ".py", ".txt"))
            if is_text and hashlib.sha256((folder / name).read_bytes().replace(b"\r\n", b"\n")).hexdigest() == digest:
                yield f"{name} has other line ends than it was written with, as git's core.autocrlf makes them; turn that off"
            else:
                yield f"{name} does not have its SHA-256 sum: the file is damaged or was changed"
    summed = {name for _, name in sums(folder)} | {"SHA256SUMS", "COMMIT.json"}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        is_document = path.parent == folder and (path.suffix in (".md", ".txt") or path.name in ("LICENSE", "NOTICE"))
        is_folder = path.is_dir() and not path.is_symlink()  # a link may lead to a package that Python would take for another
        is_hidden = name.startswith(".") and not {".py", ".pyc", ".pth", ".so"} & {*path.suffixes, path.name}  # of git and of hubs
        if not is_folder and not is_hidden and name not in summed and not is_document:
            compiled = ": Python runs it in place of a script; remove it" if "__pycache__" in path.parts else ""
            yield f"{name} has no line in SHA256SUMS{compiled}"


# Each loads the export


def in_timm(folder, about, device, dtype):
    """As timm loads it."""
    import timm
    from timm.data import create_transform, resolve_data_config

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().to(device, dtype)
    transform = create_transform(**resolve_data_config({}, model=model), is_training=False)
    config = resolve_data_config({}, model=model)
    says = {"class_names": model.pretrained_cfg.get("label_names"), "interpolation": config["interpolation"]}
    says |= {name: list(config[name]) for name in ("mean", "std")}
    says["settings"] = {name: config[name] for name in ("crop_pct", "crop_mode")} | {"input_size": list(config["input_size"])}
    return Loaded(timm_outputs(model, dtype), transform, f"timm {timm.__version__}", epsilons_of(model), says)


def timm_outputs(model, dtype):
    """What a ViT of timm says."""

    @torch.no_grad()
    def outputs(images_BCHW):
        tokens_BND = model.forward_features(images_BCHW.to(dtype))
        features_BD = model.forward_head(tokens_BND, pre_logits=True)
        found = {"features_BD": features_BD, "tokens_BND": tokens_BND[:, model.num_prefix_tokens :]}
        return found | ({"logits_BK": model.head(features_BD)} if model.num_classes else {})

    return outputs


def npz_in_timm(folder, about, device, dtype):
    """As timm loads Google's npz; a representation layer, which timm leaves out, is computed here."""
    import timm
    from timm.data import create_transform

    model = timm.create_model(about["timm"]["architecture"], num_classes=0, **about["timm"]["model_args"])
    model.load_pretrained(str(folder / "weights.npz"))
    model = model.eval().to(device, dtype)
    transform = create_transform(**about["timm"]["transform"], is_training=False) if about["protocol"] == "timm" else None
    arrays = np.load(folder / "weights.npz")
    layers = {}
    for name in ("pre_logits", "head"):
        if f"params/{name}/kernel" in arrays:
            layers[name] = [torch.from_numpy(arrays[f"params/{name}/{part}"]).to(device, dtype) for part in ("kernel", "bias")]
    inner = timm_outputs(model, dtype)

    @torch.no_grad()
    def outputs(images_BCHW):
        found = inner(images_BCHW)
        if "pre_logits" in layers:
            found["features_BD"] = torch.tanh(found["features_BD"] @ layers["pre_logits"][0] + layers["pre_logits"][1])
        if "head" in layers:
            found["logits_BK"] = found["features_BD"] @ layers["head"][0] + layers["head"][1]
        return found

    return Loaded(outputs, transform, f"timm {timm.__version__}, from npz,", epsilons_of(model), {})


def in_transformers(folder, about, device, dtype):
    """As transformers loads it; every tensor of the file must have found its place, and every one of the model its file."""
    import transformers
    from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

    transformers.utils.logging.disable_progress_bar()
    settings = {"output_loading_info": True, "trust_remote_code": False}
    if not about["has_head"] and about["model_type"] == "vit":
        settings["add_pooling_layer"] = about["has_representation"]
    model, info = (AutoModelForImageClassification if about["has_head"] else AutoModel).from_pretrained(folder, **settings)
    if wrong := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        some = ", ".join(map(str, wrong))[:300]
        raise NotLoadedError(f"transformers {transformers.__version__} does not load {len(wrong)} tensors: {some}")
    model = model.eval().to(device, dtype)
    base = getattr(model, "vit", None) or getattr(model, "vision_model", None) or model
    # Pillow resizes, as in training: torchvision's own kernels differ by a grey level here and there
    pillow = {"backend": "pil"} if int(transformers.__version__.split(".")[0]) >= 5 else {"use_fast": False}
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, **pillow)

    @torch.no_grad()
    def outputs(images_BCHW):
        hidden = base(pixel_values=images_BCHW.to(dtype))
        tokens_BND = hidden.last_hidden_state
        if about["model_type"] == "vit":
            features_BD = hidden.pooler_output if about["has_representation"] else tokens_BND[:, 0]
            found = {"features_BD": features_BD, "tokens_BND": tokens_BND[:, 1:]}
        else:
            features_BD = hidden.pooler_output if about["pool"] == "map" else tokens_BND.mean(dim=1)
            found = {"features_BD": features_BD, "tokens_BND": tokens_BND}
        return found | ({"logits_BK": model(pixel_values=images_BCHW.to(dtype)).logits} if about["has_head"] else {})

    says = {"mean": list(processor.image_mean), "std": list(processor.image_std)}
    says["settings"] = {name: plain(getattr(processor, name, None)) for name in about.get("settings") or {}}
    says["interpolation"] = {2: "bilinear", 3: "bicubic"}.get(int(processor.resample), str(processor.resample))
    if about["has_head"]:
        names = model.config.id2label
        unnamed = all(name == f"LABEL_{number}" for number, name in names.items())
        says["class_names"] = None if unnamed else [names[number] for number in sorted(names)]
        if any(names.get(number) != name for name, number in (model.config.label2id or {}).items()):
            raise NotLoadedError("config.json has numbers in label2id that are other classes in id2label")
        says["problem_type"] = model.config.problem_type

    def view(picture):
        return torch.as_tensor(np.asarray(processor(picture, return_tensors="np")["pixel_values"][0]))

    return Loaded(outputs, view, f"transformers {transformers.__version__}", epsilons_of(model), says)


def plain(value):
    """A setting of a processor as JSON has it: a size is a mapping in version 4 of transformers and an object in version 5."""
    sides = ("height", "width", "shortest_edge", "longest_edge")
    if not (hasattr(value, "get") or hasattr(value, sides[0]) or hasattr(value, sides[2])):
        return value
    found = {side: value.get(side) if hasattr(value, "get") else getattr(value, side, None) for side in sides}
    return {side: pixels for side, pixels in found.items() if pixels is not None}


def in_torch(folder, about, device, dtype):
    """As vit.py computes it, which lies beside: plain torch and nothing else."""
    vit = types.ModuleType("vit")
    exec((Path(folder) / "vit.py").read_text(), vit.__dict__)  # an import would look for compiled code beside it
    model = vit.load(folder, device=device, dtype=dtype)

    def outputs(images_BCHW):
        return vit.forward(model, images_BCHW.to(dtype))

    view = (lambda picture: vit.view(model, picture)) if about["protocol"] == "timm" else None
    says = {"class_names": model["class_names"], **{name: model["preprocess"][name] for name in ("mean", "std", "interpolation")}}
    return Loaded(outputs, view, f"torch {torch.__version__}", {model["model"]["layer_norm_eps"]}, says)


if __name__ == "__main__":
    main()
