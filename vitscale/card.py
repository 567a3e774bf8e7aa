"""An export's model card: README.md, for people and for model hubs.

What a team needs that is given the folder and nothing else: how it is loaded, what goes in and what comes out, where it comes from, what
was measured, and how it is fine-tuned. Its code is `snippets.py`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from vitscale.checkpoint import Description
from vitscale.config import PreprocessConfig, ViTConfig
from vitscale.model import parameter_shapes
from vitscale.snippets import Snippets, has_no_pooler, snippets
from vitscale.targets import Target

_NAMED = 20  # classes, which are listed in the card itself
_LIBRARIES = {"timm": "timm", "hf": "transformers", "npz": "big_vision", "safetensors": "pytorch"}  # as hubs name them
_FILES = {
    "model.safetensors": "the weights",
    "weights.npz": "the weights",
    "config.json": "what the library reads to build the model",
    "preprocessor_config.json": "what transformers prepares images by",
    "classes.txt": "names of the classes, a line each, in the order of the logits",
    "vit.py": "the model and its preprocessing in plain torch, to copy and change",
    "verify.py": "holds the library to the certificate",
    "certificate": "twenty images rendered from a seed (nobody's; free to use) and what the model says of them",
    "vitscale.json": "what vitscale reads, where the folder is given to it as a checkpoint",
    "SHA256SUMS": "of all files but README.md, which may be written on, COMMIT.json and itself; `sha256sum -c SHA256SUMS`",
    "COMMIT.json": "sizes and checksums of them all for vitscale",
}


def model_card(
    name: str, target: Target, description: Description, certificate: Mapping[str, Any], *, multi_label: bool, licence: str
) -> str:  # fmt: skip
    """README.md of an export.

    Args:
        certificate: what certificate.json says: `library`, `dtype`, `changed`, and for npz `timm`.
    """
    model, preprocess, origin, library = target.model, description.preprocess, description.origin, certificate["library"]
    parameters = sum(map(math.prod, parameter_shapes(model).values()))
    code = snippets(target, preprocess, certificate, multi_label=multi_label, named=bool(description.class_names))
    made = "imported into" if "imported_from" in origin else "trained with"
    paragraphs = [
        _header(_plain(name), library, model, origin, licence, exact=not (certificate["changed"] or target.losses)),
        f"# {_plain(name)}",
        f"A Vision Transformer of {_size(parameters)} parameters, {made} vitscale: {model.depth} blocks, {model.width} features, "
        f"{model.num_heads} heads, MLPs of {model.mlp_dim}, patches of {model.patch_size} pixels. {_head(model.num_classes, multi_label)}",
        "## Load",
        _code(code.loading),
        *_outputs(library, target, code),
        "`python verify.py` holds that library to what the trained model said of twenty images and of seeded tensors (`certificate/`), "
        f"and the files to their SHA-256 sums; it needs {_needs(library)}. "
        "Sums tell damage; they are no signature of whoever gives the folder.",
        "## Preprocessing",
        _preprocessing(library, model.image_size, preprocess),
        *_classes(description),
        *_changes(target, certificate),
        "## Fine-tune",
        *_tuning(library, target, code),
        "## Where it comes from",
        _table(_rows(origin, target, certificate, licence)),
    ]
    if "training" in origin:
        paragraphs += ["How it was trained:", f"```json\n{json.dumps(origin['training'], indent=1)}\n```"]
    there = {target.weights, *target.sidecars, "vitscale.json", "verify.py", "certificate", "SHA256SUMS", "COMMIT.json"}
    there |= {"vit.py"} if library == "safetensors" else set()
    there |= {"classes.txt"} if description.class_names else set()
    paragraphs += ["## Files", _table({f"`{file}`": words for file, words in _FILES.items() if file in there})]
    return "\n\n".join(paragraphs) + "\n"


def _header(name: str, library: str, model: ViTConfig, origin: Mapping[str, Any], licence: str, *, exact: bool) -> str:
    """What model hubs read, with results only of what was measured; its values are JSON, which YAML takes."""
    task = "image-classification" if model.num_classes else "image-feature-extraction"
    header: dict[str, Any] = {
        "license": licence or "unknown", "library_name": _LIBRARIES[library], "pipeline_tag": task, "tags": ["vit", "vitscale"],
    }  # fmt: skip
    if exact and model.num_classes and (results := _results(origin)):
        called = origin.get("evaluated_on", {}).get("name") or "held out"
        metrics = [{"type": "accuracy", "name": measure, "value": round(value, 6)} for measure, value in results.items()]
        result = {"task": {"type": task}, "dataset": {"name": called, "type": called}, "metrics": metrics}
        header |= {"metrics": ["accuracy"], "model-index": [{"name": name, "results": [result]}]}
    return "\n".join(["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in header.items()), "---"])


def _results(origin: Mapping[str, Any]) -> dict[str, float]:
    """Shares of samples by their measure."""
    found = origin.get("results", {})
    return {words: found[name] for name, words in (("eval_top1", "top-1"), ("eval_top5", "top-5")) if name in found}


def _size(parameters: int) -> str:
    return f"{parameters / 1e6:.3g} M" if parameters < 1e9 else f"{parameters / 1e9:.3g} B"


def _head(num_classes: int, multi_label: bool) -> str:
    if not num_classes:
        return "It has no head: what comes out are features."
    if multi_label:
        return f"Its {num_classes:,} logits are those of sigmoids: several classes may be right, sigmoid(logit) is the probability of each."
    return f"Its {num_classes:,} logits are those of a softmax: one class is right, and softmax(logits) are the probabilities."


def _needs(library: str) -> str:
    """Packages for loading and verifying."""
    of_library = {"timm": "timm", "npz": "timm, which reads npz, too", "hf": "transformers", "safetensors": "nothing else"}[library]
    return f"torch, numpy, pillow, safetensors and {of_library}"


def _code(lines: Sequence[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def _outputs(library: str, target: Target, code: Snippets) -> list[str]:
    """What features are, where they come out, and patch tokens."""
    model = target.model
    mean = "the mean of the patch tokens"
    pooled = {"cls": "the class token", "mean": mean, "mean_with_cls": mean, "map": "what attention pooling makes of the patch tokens"}
    norm = ", then a LayerNorm" if model.pool_norm else " after the last LayerNorm"
    layer = ", through the representation layer and its tanh" if model.representation_size else ""
    said = (
        f"Features are {model.representation_size or model.width} numbers: {pooled[model.pool]}{norm}{layer}. Patch tokens are a grid of "
        f"{model.grid[0]} x {model.grid[1]}, row by row. After the code above:"
    )
    if library == "hf" and has_no_pooler(target):
        bare = "`AutoModel` makes up a pooler of random weights, unless it is given `add_pooling_layer=False`"
        pipe = 'a pipeline for features takes `model_kwargs={"add_pooling_layer": False}`, and gives all tokens, the class token first'
        return [said, _code(code.inner), f"{bare}: its `pooler_output` means nothing; {pipe}."]
    return [said, _code(code.inner)]


def _preprocessing(library: str, image_size: tuple[int, int], preprocess: PreprocessConfig) -> str:
    crop = "the whole image, squashed to that size"
    if preprocess.eval_crop != 1:
        crop = f"the central {preprocess.eval_crop:g} of the resized short side"
    said = (
        f'An RGB image (`.convert("RGB")` first, for grey ones and those with transparency) to {image_size[0]} x {image_size[1]} pixels '
        f"(height x width): {crop}, {preprocess.interpolation} with antialias, as {preprocess.eval_protocol} evaluates; then "
        f"(pixel / 255 - {list(preprocess.mean)}) / {list(preprocess.std)}."
    )
    if preprocess.eval_protocol != "timm" and library in ("npz", "safetensors"):
        return f"{said} The library has no code for that protocol; `vitscale evaluate` has, as google-research's."
    if library == "hf":
        return said + (
            ' The processor does so by `backend="pil"` (version 4 of transformers: `use_fast=False`); its default, which pipelines take, '
            "is off by a grey level in some pixels."
        )
    return said


def _tuning(library: str, target: Target, code: Snippets) -> list[str]:
    """A new head in the library, and in vitscale."""
    height, width = target.model.image_size
    said = []
    if code.tuning:
        where = ", at another resolution" if code.enlarged else f", at this resolution ({height} x {width}) alone"
        words = []
        if library == "hf" and code.enlarged:
            words.append("transformers resamples position embeddings without antialias, timm with it: outputs differ a little.")
        if library != "safetensors" and target.model.num_classes:
            words.append("With as many classes as before the old head stays.")
        if library in ("hf", "npz") and target.model.representation_size:
            words.append("The representation layer is left out there.")
        said = [f"With a new head{where}, after the code above:", _code(code.tuning), *([" ".join(words)] if words else [])]
    ours = "`vitscale finetune RECIPE --init FOLDER --data TRAIN --model.image-size H W` takes this folder as it is"
    return [*said, f"With vitscale: {ours}, at any resolution."]


def _classes(description: Description) -> list[str]:
    """Names in the order of the logits."""
    names = description.class_names
    if not names:
        return []
    some = ", ".join(f"{number} {_plain(name)}" for number, name in enumerate(names[:_NAMED]))
    return ["## Classes", f"{some}{f', ... (`classes.txt` has all {len(names):,})' if len(names) > _NAMED else ''}."]


def _changes(target: Target, certificate: Mapping[str, Any]) -> list[str]:
    """What the library computes otherwise, and rounding."""
    said = [f"- {loss.words}" for loss in target.losses]
    if certificate["dtype"] != "fp32":
        said.append(f"- weights are rounded to {certificate['dtype']}, whatever precision they are loaded in")
    if not said:
        return []
    if certificate["changed"]:
        far = ", ".join(f"{name.partition('_')[0]} {value:.1e}" for name, value in certificate["changed"].items())
        said.append(f"\nOf seeded tensors, outputs are off by (norm of the difference over the norm): {far}.")
    return ["## What is not as it was trained", "\n".join(said)]


def _rows(origin: Mapping[str, Any], target: Target, certificate: Mapping[str, Any], licence: str) -> dict[str, str | None]:
    """What is known of its making, empty where nothing is."""
    model, results, evaluated = target.model, _results(origin), origin.get("evaluated_on", {})
    measured = ", ".join(f"{name} {value:.2%}" for name, value in results.items() if name == "top-1" or model.num_classes > 5)
    if results and "eval_samples" in origin["results"]:
        measured += f" of {origin['results']['eval_samples']:,} samples"
    if results and evaluated:
        measured += f" of {evaluated.get('name')}, hash {evaluated.get('hash')}"
    if results and not model.num_classes:
        measured += " (with its head, which is left out here)"
    if results and (certificate["changed"] or target.losses):
        measured += " (before it was changed as said above)"
    seen = _seen(origin)
    return {
        "recipe": origin.get("recipe"),
        "trained on": _trained_on(origin),
        "initialised from": origin.get("initialised_from"),
        "which came of": _ancestors(origin),
        "imported from": origin.get("imported_from"),
        "its SHA-256": origin.get("sha256"),
        "its format": origin.get("format"),
        "what its tensors do not tell": "; ".join(origin.get("assumed", [])),
        "in it, and left out": "; ".join(f"{name} ({why})" for name, why in list(origin.get("left_out", {}).items())[:10]),
        "samples seen": f"{seen}, from there on" if seen and "initialised_from" in origin else seen,
        "weights": {"average": "the average over training", "weight": "as trained, no average"}.get(origin.get("weights", "")),
        "stored in": certificate["dtype"],
        "held out": measured,
        "commit": origin.get("commit"),
        "versions": ", ".join(f"{key} {value}" for key, value in origin.get("versions", {}).items()),
        "licence": licence or "not stated: ask who made it",
    }


def _trained_on(origin: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{of.get('name')}, {of.get('samples', 0):,} samples, hash {of.get('hash', of.get('names_hash'))}"
        for of in origin.get("datasets", [])
    )


def _seen(origin: Mapping[str, Any]) -> str:
    return f"{origin['samples_seen']:,} in {origin.get('step', 0):,} steps" if "samples_seen" in origin else ""


def _ancestors(origin: Mapping[str, Any]) -> str:
    """What the weights that a run began with were made of, and those that they began with, back to the first."""
    made = []
    while origin := origin.get("initial", {}):
        told = {
            "": origin.get("recipe"),
            "imported from": origin.get("imported_from"),
            "SHA-256": origin.get("sha256"),
            "trained on": _trained_on(origin),
            "samples seen": _seen(origin),
            "initialised from": origin.get("initialised_from"),
        }
        made.append(", ".join(f"{name} {value}".strip() for name, value in told.items() if value))
    return "; which came of ".join(made)


def _table(rows: Mapping[str, str | None]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {_plain(value)} |" for key, value in rows.items() if value)])


def _plain(words: str) -> str:
    """A stranger's words in a line of their own, with nothing that Markdown takes for a cell, code or a mark of HTML."""
    return " ".join(words.split()).translate({ord("|"): "/", ord("`"): "'", ord("<"): "&lt;", ord(">"): "&gt;"})
