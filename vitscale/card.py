"""Where an export's weights come from, and its model card: README.md, for people and for model hubs.

`origin_of` collects what a run's directory says of a checkpoint; of an export that was exported again, or was imported, what that said.
"""

import json
from dataclasses import asdict
from typing import Any

from data_tools.errors import UserError
from vitscale.checkpoint import AVERAGE, WEIGHT, Description
from vitscale.config import TrainConfig
from vitscale.run import read_config, read_metrics, read_record, trained_datasets
from vitscale.targets import Target

REPORTED = ("eval_top1", "eval_top5", "eval_loss", "eval_samples")  # of a line of metrics.jsonl


def origin_of(description: Description, kind: str) -> dict[str, Any]:
    """What is known of a checkpoint's making, as JSON holds it."""
    if description.exported:
        return description.origin
    origin: dict[str, Any] = {"step": description.step, "samples_seen": description.samples_seen, "weights": kind}
    run = description.path.parent.parent
    try:
        config, record = read_config(run), read_record(run)
    except (UserError, OSError):  # a step's folder that was copied out of its run
        return origin
    start: dict[str, Any] = next(reversed(record.get("starts", [])), {})
    origin |= {
        "recipe": config.recipe,
        "seed": config.seed,
        "datasets": [{name: of[name] for name in ("name", "hash", "samples") if name in of} for of in trained_datasets(record)],
        "commit": start.get("commit", ""),
        "versions": start.get("versions", {}),
        "training": _training(config),
    }
    if config.init:
        origin["initialised_from"] = config.init.checkpoint
    lines = [line for line in read_metrics(run) if line.get("step") == description.step and "eval_top1" in line]
    evaluated = AVERAGE if config.optimizer.average_decay else WEIGHT
    if lines and (kind, description.preprocess) == (evaluated, config.preprocess):  # else they are another model's
        origin["results"] = {name: lines[-1][name] for name in REPORTED if name in lines[-1]}
        origin["evaluated_on"] = {name: record["held_out"][name] for name in ("name", "hash", "samples")} if record.get("held_out") else {}
    return origin


def _training(config: TrainConfig) -> dict[str, Any]:
    return {
        "objective": asdict(config.objective),
        "optimizer": asdict(config.optimizer),
        "schedule": asdict(config.schedule),
        "mix": asdict(config.mix),
        "global_batch_size": config.global_batch_size,
        "epochs": config.epochs,
        "steps": config.steps,
        "precision": config.engine.precision,
    }


def model_card(name: str, library: str, target: Target, description: Description, *, dtype: str, multi_label: bool, licence: str) -> str:
    """README.md of an export: what it is, how it is loaded, how its images are prepared, what its numbers mean, where it comes from."""
    model, preprocess, origin = target.model, description.preprocess, description.origin
    header = {"license": licence or "other", "pipeline_tag": "image-classification" if model.num_classes else "image-feature-extraction"}
    header |= {"timm": {"library_name": "timm"}, "hf": {"library_name": "transformers"}}.get(library, {})
    height, width = model.image_size
    crop = (
        "the whole image, squashed to that size"
        if preprocess.eval_crop == 1
        else f"the central {preprocess.eval_crop:g} of the resized short side"
    )
    lines = ["---", *(f"{key}: {value}" for key, value in header.items()), "---", "", f"# {name}", ""]
    lines += [
        f"A Vision Transformer of {model.depth} blocks, {model.width} features, {model.num_heads} heads and patches of {model.patch_size} "
        f"pixels, {'imported into' if 'imported_from' in origin else 'trained with'} vitscale. {_head(model.num_classes, multi_label)}", "",
        "## Load", "", "```python", *_loading(library, target, name), "```", "",
        "Then `python verify.py` here holds that library to what the trained model said of twenty images and of seeded tensors "
        "(`certificate/`), and every file to its SHA-256 sum.", "",
        "## Preprocessing", "",
        f"{height} x {width} pixels (height x width): {crop}, {preprocess.interpolation} with antialias, by {preprocess.eval_protocol}'s "
        f"protocol; then (pixel / 255 - {list(preprocess.mean)}) / {list(preprocess.std)}.", "",
    ]  # fmt: skip
    if target.losses:
        lines += ["## What is not as it was trained", "", *(f"- {loss.words}" for loss in target.losses), ""]
    lines += ["## Where it comes from", ""]
    results = origin.get("results", {})
    rows = {
        "recipe": origin.get("recipe"),
        "trained on": "; ".join(
            f"{of.get('name')}, {of.get('samples', 0):,} samples, hash {of.get('hash', of.get('names_hash'))}"
            for of in origin.get("datasets", [])
        ),
        "initialised from": origin.get("initialised_from"),
        "imported from": origin.get("imported_from"),
        "its SHA-256": origin.get("sha256"),
        "its format": origin.get("format"),
        "not in it, and taken for granted": "; ".join(origin.get("assumed", [])),
        "in it, and left out": "; ".join(f"{name} ({why})" for name, why in list(origin.get("left_out", {}).items())[:10]),
        "samples seen": f"{origin['samples_seen']:,} in {origin['step']:,} steps" if "samples_seen" in origin else None,
        "weights": {"average": "the average over training", "weight": "as trained, no average"}.get(origin.get("weights", "")),
        "stored in": dtype,
        "held-out results": ", ".join(f"{key.removeprefix('eval_')} {value:.4g}" for key, value in results.items()),
        "evaluated on": f"{origin['evaluated_on'].get('name')}, hash {origin['evaluated_on'].get('hash')}"
        if origin.get("evaluated_on")
        else None,
        "commit": origin.get("commit"),
        "versions": ", ".join(f"{key} {value}" for key, value in origin.get("versions", {}).items()),
        "licence": licence or "not stated",
    }
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items() if value), ""]
    if "training" in origin:
        lines += ["How it was trained:", "", "```json", json.dumps(origin["training"], indent=1), "```", ""]
    return "\n".join(lines)


def _head(num_classes: int, multi_label: bool) -> str:
    if not num_classes:
        return "It has no head: what comes out are features."
    if multi_label:
        return f"Its {num_classes:,} logits are those of sigmoids: several classes may be right, sigmoid(logit) is the probability of each."
    return f"Its {num_classes:,} logits are those of a softmax: one class is right, and softmax(logits) are the probabilities."


def _loading(library: str, target: Target, name: str) -> list[str]:
    if library == "timm":
        return [
            "import timm",
            "from timm.data import create_transform, resolve_data_config",
            "",
            f'model = timm.create_model("local-dir:{name}", pretrained=True).eval()  # timm 1.0.20 or later; where this folder lies',
            "transform = create_transform(**resolve_data_config({}, model=model))",
            "logits = model(transform(picture)[None])  # picture: a PIL image in RGB",
        ]
    if library == "hf":
        auto = "AutoModelForImageClassification" if target.model.num_classes else "AutoModel"
        headless = not target.model.num_classes and target.form == "hf_vit" and not target.model.representation_size
        return [
            f"from transformers import AutoImageProcessor, {auto}",
            "",
            f'model = {auto}.from_pretrained("{name}"{", add_pooling_layer=False" if headless else ""}).eval()  # where this folder lies',
            f'processor = AutoImageProcessor.from_pretrained("{name}")',
            'outputs = model(**processor(picture, return_tensors="pt"))  # picture: a PIL image in RGB',
        ]
    if library == "npz":
        return [
            "import numpy as np",
            "",
            f'weights = np.load("{name}/weights.npz")  # big_vision: model_init="{name}/weights.npz"; timm: model.load_pretrained(...)',
        ]
    return [
        "import vit  # vit.py, in this folder: plain torch",
        "",
        f'model = vit.load("{name}")',
        'found = vit.forward(model, vit.view(model, picture)[None])  # picture: a PIL image in RGB; found["features_BD"], ["logits_BK"]',
    ]
