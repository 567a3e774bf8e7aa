"""The verbs of `vitscale checkpoint`: what one holds, whether it is what was trained, weights for others and from others, and room made."""

import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from launch.flags import Checkpoint, UsageError, Weights, parse
from launch.terminal import Json, Verb, VerbError, need, print_json, progress_bar
from vitscale.check import crop_problem
from vitscale.config import EvalProtocol, ImportConfig, Library

Out = Annotated[Positional[str], tyro.conf.arg(metavar="OUT", help="The folder to write; it must not exist.")]
Licence = Annotated[str, tyro.conf.arg(help="Of the weights, as hubs name it (apache-2.0, cc-by-nc-4.0), for the model card.")]
FILE = "A file of weights (safetensors, npz, pth), or a folder with one, as timm, transformers and open_clip write them."


@dataclass(frozen=True)
class ShowFlags:
    """Prints what a checkpoint or any file of weights holds, after checking that it is whole."""

    checkpoint: Annotated[Positional[str], tyro.conf.arg(metavar="CHECKPOINT", help=f"A CHECKPOINT of vitscale; or: {FILE}")]
    overrides: Annotated[ImportConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=ImportConfig)
    tensors: bool = False
    """List every tensor."""
    json: Json = False


def checkpoint_show(words: list[str]) -> None:
    """What a checkpoint, or any file of weights, holds."""
    flags = parse(ShowFlags, words, "checkpoint show")
    from vitscale.checkpoint import describe, settings
    from vitscale.finding import find_checkpoint, is_foreign

    path = Path(flags.checkpoint)
    if is_foreign(path):
        need("torch")
        from vitscale.adopt import lines, open_foreign

        foreign = open_foreign(path, flags.overrides)
        shapes = foreign.tensors.shapes
        if flags.json:
            print_json({"path": flags.checkpoint} | dataclasses.asdict(foreign.weights) | ({"tensors": shapes} if flags.tensors else {}))
            return
        print("\n".join(lines(path, foreign)))
        if flags.tensors:
            for name, shape in shapes.items():
                print(f"{name:<60} {' x '.join(map(str, shape))}")
        return
    description = describe(find_checkpoint(flags.checkpoint))
    if flags.json:
        tensors = [dataclasses.asdict(tensor) for tensor in description.tensors]
        print_json({"path": str(description.path), **settings(description), "tensors": tensors})
        return
    print(f"{description.path}: step {description.step}, {description.samples_seen:,} samples seen; checksums hold")
    if exported := description.exported:
        print(f"an export: {exported.weights}, {exported.form}'s names and layout")
        told = {name: value for name, value in description.origin.items() if not isinstance(value, dict | list)}
        print("origin: " + ", ".join(f"{name} {value}" for name, value in told.items() if value))
    else:
        weights = [t for t in description.tensors if t.kind == "weight"]
        print(f"{len(weights)} tensors, {sum(math.prod(t.shape) for t in weights):,} parameters; kinds: {', '.join(description.kinds)}")
    for part in (description.model, description.preprocess):
        print(f"{type(part).__name__}: " + ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(part).items()))
    if flags.tensors:
        for tensor in description.tensors:
            print(f"{tensor.kind:<16} {tensor.name:<40} {' x '.join(map(str, tensor.shape))}")


@dataclass(frozen=True)
class VerifyFlags:
    """Checks every byte of a checkpoint or an export; and of an export that this program, and the library that it is for, where that is
    installed, compute what the trained model did."""

    checkpoint: Checkpoint
    device: str = "cpu"
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """What the library computes with."""
    json: Json = False


def checkpoint_verify(words: list[str]) -> None:
    """Whether a checkpoint is whole, and an export what was trained."""
    flags = parse(VerifyFlags, words, "checkpoint verify")
    from vitscale.checkpoint import describe
    from vitscale.finding import find_checkpoint

    description = describe(find_checkpoint(flags.checkpoint))
    found: dict[str, Any] = {"checkpoint": str(description.path), "holds": True, "replays": []}
    said = [f"{description.path}: sizes and checksums hold"]
    if description.exported:
        need("torch", "safetensors")
        from vitscale.verification import verify_export

        found["replays"] = verify_export(description, flags.device, flags.precision)
        found["holds"] = all(replay["holds"] is not False for replay in found["replays"])
        said += [line for replay in found["replays"] for line in replay["lines"]]
    if flags.json:
        print_json(found)
    else:
        print("\n".join(said))
    if not found["holds"]:
        raise VerbError(f"{description.path} does not give what was trained")


@dataclass(frozen=True)
class ExportFlags:
    """Writes a folder that others load, with a certificate by which they can see that it is what was trained."""

    checkpoint: Checkpoint
    out: Out
    to: Library = "timm"
    """timm; Hugging Face transformers; Google's npz (big_vision, vision_transformer); safetensors with the model in plain torch."""
    headless: bool = False
    """Leave out the head, and a representation layer before it."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16: weights rounded to the nearest, half the size."""
    lossy: bool = False
    """Write also what the library does not compute as the model was trained, and say in the folder what that is."""
    eval_protocol: EvalProtocol | None = None
    """Another evaluation preprocessing than the run's (docs/stream.md, "Evaluation")."""
    eval_crop: float | None = None
    """Another crop in evaluation than the run's; 1 is the whole image, squashed, which every library does alike."""
    weights: Weights = "average"
    licence: Licence = ""
    json: Json = False


def checkpoint_export(words: list[str]) -> None:
    """Weights for timm, Hugging Face, big_vision, or plain torch."""
    flags = parse(ExportFlags, words, "checkpoint export")
    if flags.eval_crop is not None and (problem := crop_problem(flags.eval_crop, "eval-crop")):
        raise UsageError(problem)
    from vitscale.checkpoint import describe
    from vitscale.finding import find_checkpoint

    description = describe(find_checkpoint(flags.checkpoint)).evaluated_by(flags.eval_protocol, flags.eval_crop)
    need("torch", "safetensors")
    from vitscale.export import export

    with progress_bar("exporting", quiet=flags.json, unit="bytes") as update:
        out = export(
            description, flags.weights, Path(flags.out), to=flags.to, headless=flags.headless, dtype=flags.dtype, lossy=flags.lossy,
            licence=flags.licence, progress=update,
        )  # fmt: skip
    used = description.preferred(flags.weights)
    if flags.json:
        print_json(
            {
                "out": str(out),
                "to": flags.to,
                "headless": flags.headless,
                "dtype": flags.dtype,
                "weights": used,
                "from": str(description.path),
            }
        )
    else:
        print(f"{out}: the {used} tensors of {description.path} for {flags.to}{', without head' if flags.headless else ''}")
        told = "how to load it and what is lossy" if flags.lossy else "how to load it"
        library = {"hf": "transformers", "safetensors": "plain torch"}.get(flags.to, "timm, where that is installed,")
        print(f"`python {out}/verify.py` holds {library} to what the trained model says; README.md there says {told}")


@dataclass(frozen=True)
class ImportFlags:
    """Makes a CHECKPOINT of weights that others wrote: timm's, Hugging Face's, open_clip's, DINOv2's, MAE's, Google's npz. Every tensor of
    the file finds its place or a reason why it has none, or nothing is written."""

    file: Annotated[Positional[str], tyro.conf.arg(metavar="FILE", help=FILE)]
    out: Out
    overrides: Annotated[ImportConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=ImportConfig)
    classes: str = ""
    """File of class names, one a line, in the order of the head's outputs."""
    licence: Licence = ""
    json: Json = False


def checkpoint_import(words: list[str]) -> None:
    """A checkpoint of weights that others wrote."""
    flags = parse(ImportFlags, words, "checkpoint import")
    need("torch", "safetensors")
    from vitscale.adopt import adopt, lines

    names = None
    if flags.classes:
        try:
            names = tuple(Path(flags.classes).read_text(encoding="utf-8").splitlines())
        except UnicodeDecodeError:
            raise UsageError(f"classes={flags.classes} is no text file with a name a line") from None
        except OSError as error:
            raise UsageError(f"classes={flags.classes} cannot be read ({error.strerror}); a text file with a name a line can") from None
    with progress_bar("importing", quiet=flags.json, unit="bytes") as update:
        foreign = adopt(Path(flags.file), Path(flags.out), flags.overrides, class_names=names, licence=flags.licence, progress=update)
    if flags.json:
        print_json({"out": flags.out, "file": flags.file} | dataclasses.asdict(foreign.weights))
    else:
        print("\n".join(lines(Path(flags.file), foreign)))
        print(f"{flags.out}: a CHECKPOINT for every verb, with a certificate")


@dataclass(frozen=True)
class PruneFlags:
    """Removes checkpoints of a run that are not to be kept. The newest whole one stays, and the best as the run's settings say."""

    run: Annotated[Positional[str], tyro.conf.arg(metavar="RUN", help="Run directory.")]
    keep: int | None = None
    """Newest checkpoints to keep; 0 keeps all. As the run has it where it is not given."""
    keep_every: int | None = None
    """Keep those of every so many steps, too. As the run has it where it is not given."""
    dry_run: bool = False
    """Only tell what would go."""
    json: Json = False


def checkpoint_prune(words: list[str]) -> None:
    """Remove the checkpoints of a run that are not to be kept."""
    flags = parse(PruneFlags, words, "checkpoint prune")
    from vitscale import retention
    from vitscale.checkpoint import describe, newest_durable, step_folder, step_of
    from vitscale.errors import CheckpointError
    from vitscale.run import read_config, read_metrics

    run = Path(flags.run)
    policy = retention.policy_of(read_config(run), flags.keep, flags.keep_every)
    if policy.newest < 0 or policy.every < 0:
        raise UsageError(f"keep={policy.newest} and keep-every={policy.every} must be at least 0; 0 of keep keeps all")
    newest, faults = newest_durable(run)
    if newest is None:
        raise CheckpointError(f"{run} has no whole checkpoint, so none is removed; {faults[0] if faults else 'none is there'}")
    sizes = retention.sizes_up_to(run, step_of(newest))
    settled = {step: size for step, size in sizes.items() if step != step_of(newest) or not describe(newest).state.in_doubt}
    steps = retention.superfluous(settled, retention.goodness(read_metrics(run)), policy)
    if not flags.dry_run:
        retention.remove(run, steps)
    for fault in faults:
        print(f"warning: {fault}; it is left as it is", file=sys.stderr)
    if flags.json:
        kept = [step for step in sizes if step not in steps]
        print_json({"run": flags.run, "removed": steps, "kept": kept, "bytes": sum(sizes[s] for s in steps), "dry_run": flags.dry_run})
        return
    for step in steps:
        print(f"{step_folder(run, step)}: {sizes[step]:,} bytes")
    would = "would be removed" if flags.dry_run else "removed"
    print(f"{len(steps)} of {len(sizes)} checkpoints {would}, {sum(sizes[step] for step in steps):,} bytes")


CHECKPOINT_VERBS: dict[str, Verb] = {
    "checkpoint show": checkpoint_show,
    "checkpoint verify": checkpoint_verify,
    "checkpoint export": checkpoint_export,
    "checkpoint import": checkpoint_import,
    "checkpoint prune": checkpoint_prune,
}
