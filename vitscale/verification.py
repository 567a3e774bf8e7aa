"""Whether an export gives what was trained: in this program, and in the library that it is for, where that is installed.

The export may be a stranger's: no code that lies in it is run but what this program would have put there, and how much of a difference is
rounding is this program's to say.
"""

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from vitscale.certificate import FOLDER, TOLERANCES, outputs
from vitscale.checkpoint import Description
from vitscale.config import ConfigError
from vitscale.errors import CheckpointError
from vitscale.exported import verify
from vitscale.exported.verify import OF_THIS_MACHINE, device_problem, differences_of, in_a_line, replay, result, wrong_sums
from vitscale.images import evaluation_view
from vitscale.model import normalize
from vitscale.tensorfiles import read_json
from vitscale.weights import load_model

_STATED = ("mean", "std", "interpolation")  # of preprocessing, as the certificate states it
LIBRARIES = {"timm": "timm", "npz": "timm", "hf": "transformers", "safetensors": "torch"}


def verify_export(description: Description, device: str, precision: str) -> list[dict[str, Any]]:
    """What is found, by each that loads it, as a `result` of `exported/verify.py`.

    Args:
        device: that the library computes on; this program computes on the CPU, in fp32.
        precision: fp32, tf32 or bf16.

    Raises CheckpointError where the export has no certificate, or none that can be read, and ConfigError where the device is not here.
    """
    if problem := device_problem(device):
        raise ConfigError(problem)
    folder = description.path
    file = folder / FOLDER / "certificate.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} has no certificate; export the checkpoint again, and it will have one")
    try:
        about = read_json(file)
        for name, most in TOLERANCES.items():
            if not about["tolerances"][name] <= most:
                raise CheckpointError(f"{file} says that {about['tolerances'][name]!r:.50} is rounding in {name}; {most:g} is the most")
        return [_ours(description, about), _theirs(folder, about, device, precision)]
    except CheckpointError:
        raise
    except OF_THIS_MACHINE as error:
        words = f"{type(error).__name__}: {in_a_line(error)}"
        raise CheckpointError(f"{folder}: its certificate cannot be replayed on this machine ({words}), which says nothing of it") from None
    except Exception as error:  # of safetensors, Pillow, timm and transformers on what a stranger wrote
        words = f"{type(error).__name__}: {in_a_line(error)}"
        raise CheckpointError(f"{folder}: its certificate cannot be replayed ({words})") from None


def _theirs(folder: Path, about: dict[str, Any], device: str, precision: str) -> dict[str, Any]:
    """The library that the export is for loads and computes it; where it cannot here, the files' sums alone are looked at."""
    library = LIBRARIES[about["library"]]
    found: dict[str, Any]
    if why_not := _why_not_run(folder, about, library):
        faults = [f"FAILED {fault}" for fault in wrong_sums(folder)]  # which a replay looks at first
        found = result(faults or [f"NOT CHECKED: {why_not}"], holds=False if faults else None, precision=precision)
    else:
        with _quiet():
            found = replay(folder, device, precision)
    return found | {"library": found["library"] or library}


def _why_not_run(folder: Path, about: dict[str, Any], library: str) -> str:
    """Why nothing of the export's is to be computed here, if so."""
    if importlib.util.find_spec(library) is None:
        return f"{library} is not installed here: `python {folder}/verify.py` where it is"
    if about["library"] == "safetensors" and not _is_our_code(folder / "vit.py"):
        return f"vit.py is not this version's and is not run; where you trust it: `python {folder}/verify.py`"
    return ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Warnings are not logged: packages that transformers looks for tell of what they lack themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _is_our_code(file: Path) -> bool:
    """Whether the model in plain torch is the one that this program writes."""
    return file.is_file() and file.read_bytes() == Path(verify.__file__).with_name("vit.py").read_bytes()


@torch.no_grad()
def _ours(description: Description, about: dict[str, Any]) -> dict[str, Any]:
    """This program reads the export's own files, the images as well, and computes them anew."""
    expected = load_file(description.path / FOLDER / "expected.safetensors")
    model, size = load_model(description, "weight"), description.model.image_size
    paths = sorted((description.path / FOLDER).glob("*.jpg"))
    views_BHWC = torch.from_numpy(np.stack([evaluation_view(path.read_bytes(), size, description.preprocess) for path in paths]))
    differences = {"pixels": float((views_BHWC.float() - expected["image_views_BHWC"]).abs().max())}
    for images_BCHW, prefix in ((expected["inputs_BCHW"], ""), (normalize(views_BHWC, description.preprocess), "image_")):
        differences |= differences_of(lambda image_1CHW: outputs(model, image_1CHW), images_BCHW, expected, prefix)
    stated = {"class_names": description.class_names, **{name: getattr(description.preprocess, name) for name in _STATED}}
    other = [name for name, value in stated.items() if about.get(name) and value != _as_tuple(about[name])]
    worst = max(value for name, value in differences.items() if name != "pixels")
    holds = differences["pixels"] == 0 and worst <= about["tolerances"]["fp32"] and not other
    said = f"vitscale: {len(paths)} images {'to the bit' if not differences['pixels'] else 'otherwise'}, outputs within {worst:.1e}"
    said += f", and vitscale.json has another {other[0]} than was trained" if other else ""
    found: dict[str, Any] = result([said], holds=holds, precision="fp32", differences=differences, library="vitscale")
    return found


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
