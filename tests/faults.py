"""Faults in the ranks of real runs: what `tests/planted/sitecustomize.py` does to them, as an environment for the command."""

import json
import os
from pathlib import Path

PLANTED = Path(__file__).parent / "planted"


def planted(folder: Path, what: str, *steps: int, rank: int = 0, times: int = 1) -> dict[str, str]:
    """The environment in which a rank has a fault.

    Args:
        folder: for the marks of what has happened.
        what: nan, spike (at each of the steps), flip, error, memory, memory in evaluation, late record, or the name of a signal.
        steps: at which, counted from 1.
        times: how often in the whole run, over all its starts.
    """
    marks = folder / "marks"
    marks.mkdir()
    plant = {"what": what, "steps": steps, "rank": rank, "times": times, "marks": str(marks)}
    path = os.pathsep.join([str(PLANTED), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "VITSCALE_TEST_PLANT": json.dumps(plant)}
