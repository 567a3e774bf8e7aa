"""A profile of a few steps: a trace that Perfetto opens, and the tables that `breakdown.py` makes of it.

    RUN/profile/step-00000020-rank-0.json.gz    the trace (Chrome's format, by torch.profiler): https://ui.perfetto.dev
    RUN/profile/step-00000020-rank-0.md, .json  the tables

The profiler changes nothing that is computed, but lengthens what it looks at, small operators most: shares are nearer the truth than
milliseconds, and the steps that it sees count into no share and no pace of the run.
"""

import gzip
import json
import platform
import resource
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function, schedule
from torch.utils.hooks import RemovableHandle

from data_tools.durable import replace_file
from vitscale.breakdown import MODULE, breakdown, format_breakdown
from vitscale.config import ProfileConfig
from vitscale.timing import LOGGING, OUTSIDE, Clock

WARM_UP = 20  # steps of a start before its profile, where the user names none


class Profile:
    """Some steps of a start, on this rank.

    Args:
        step: that the start begins after.
        clock: marks the phases while the profile is made.
        module: whose submodules are told apart, as far as they are not compiled.
    """

    def __init__(self, config: ProfileConfig, run: Path, step: int, rank: int, clock: Clock, module: nn.Module) -> None:
        self._first, self._steps = config.first_step or step + WARM_UP, config.steps
        self._begins, self._begun = self._first - 2, step  # one step warms up the profiler
        self._writes, self._rank, self._folder = rank in config.ranks, rank, run / "profile"
        self._clock, self._module = clock, module
        self._profiler: torch.profiler.profile | None = None
        self._hooks: list[RemovableHandle] = []
        self._on = False

    def too_late(self) -> str:
        """A warning where the steps to profile have been made."""
        if not self._steps or self._begins >= self._begun:
            return ""
        begun = f"warning: profile.first_step={self._first} is not profiled, for this start begins at step {self._begun}"
        return f"{begun}; {self._begun + 2} would be, and 0 takes the 20th of a start"

    def covers(self, step: int) -> bool:
        """Whether a step is one of those that are profiled, the warm-up included."""
        return self._steps > 0 and self._begins >= self._begun and self._begins < step < self._first + self._steps

    def between(self, step: int) -> bool:
        """Call between steps, with those made; True, on all ranks alike, once the profile is to be written."""
        if not self.covers(step + 1):
            whole, self._on = self._on, False
            return whole
        if not self._on:
            self._begin()
        elif self._profiler:
            self._clock.enter(OUTSIDE)  # no phase lies across the end of a step
            self._profiler.step()
        self._clock.enter(LOGGING)
        return False

    def write(self, model_flops: float) -> str:
        """Writes what was seen; returns the tables, or nothing where this rank is not asked for them.

        Args:
            model_flops: of a step on this rank.
        """
        profiler = self._end()
        if profiler is None:
            return ""
        name = f"step-{self._first:08d}-rank-{self._rank}"
        beside = self._folder / f".{name}"
        shutil.rmtree(beside, ignore_errors=True)  # of a start that was killed here
        beside.mkdir(parents=True)
        try:
            profiler.export_chrome_trace(str(beside / "trace.json"))
            trace = (beside / "trace.json").read_bytes()
        finally:
            shutil.rmtree(beside)
        found = breakdown(json.loads(trace))
        on_gpu = torch.cuda.is_available()
        found |= {
            "first_step": self._first, "rank": self._rank, "torch": torch.__version__,
            "device_name": torch.cuda.get_device_name() if on_gpu else platform.processor() or "cpu",
            "tflops": model_flops / found["step_ms"] / 1e9,
            "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }  # fmt: skip
        last = self._first + self._steps - 1
        text = format_breakdown(found, f"Steps {self._first} to {last}, rank {self._rank}")
        replace_file(self._folder / f"{name}.json.gz", gzip.compress(trace, 6))
        replace_file(self._folder / f"{name}.json", json.dumps(found, indent=1) + "\n")
        replace_file(self._folder / f"{name}.md", text)
        return f"{text}\nin {self._folder}/{name}.md; {name}.json.gz opens in https://ui.perfetto.dev"

    def close(self) -> None:
        """Lets go of a profile whose last step was not made."""
        self._end()

    def _begin(self) -> None:
        self._on = True
        self._clock.profile(True)
        if not self._writes:
            return
        self._hooks = list(_mark_modules(self._module))
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        once = schedule(wait=0, warmup=1, active=self._steps, repeat=1)
        self._profiler = torch.profiler.profile(activities=activities, schedule=once, record_shapes=True, acc_events=True)
        self._profiler.start()

    def _end(self) -> torch.profiler.profile | None:
        profiler, self._profiler, self._on = self._profiler, None, False
        self._clock.profile(False)
        if profiler:
            profiler.stop()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        return profiler


def _mark_modules(model: nn.Module) -> Iterable[RemovableHandle]:
    """Makes ranges of the forward passes of a model's parts: its children, and theirs where they are in a list."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            for block in child:
                yield from _mark(block, f"{name} (rest)")
                for of, part in block.named_children():
                    yield from _mark(part, f"{name}.{of}")
        else:
            yield from _mark(child, name)


def _mark(module: nn.Module, name: str) -> Iterable[RemovableHandle]:
    opened: list[record_function] = []

    def before(*_: Any) -> None:
        opened.append(record_function(MODULE + name))
        opened[-1].__enter__()  # type: ignore[no-untyped-call]

    def after(*_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    return module.register_forward_pre_hook(before, prepend=True), module.register_forward_hook(after, always_call=True)
