"""Tables of where the time of profiled steps went, from a trace that torch.profiler wrote. All of it is pure, and imports no torch.

On a GPU the time is the device's: that of its kernels, each told apart by its name and put down to the operator that launched it. On a CPU
it is the host's, in which an operator counts without those that it calls. A moment counts once: where kernels overlap, for the one that
began first, and for a collective only where nothing else ran.
"""

import math
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

# What the names of a profile's ranges begin with: of phases (`timing.py`), of modules
RANGE, MODULE = "vitscale:", "vitscale.module:"
AVERAGE, IDLE, PYTHON, OTHER = "average", "idle", "waiting and Python", "other"
_STEP = "ProfilerStep"  # begins the names of torch.profiler's steps
_MOST = 15  # operators that the table shows
# Kinds of work by what is in an operator's or a kernel's name, in lower case; the first that fits. Names are torch's (aten), cuBLAS's,
# CUTLASS's, cuDNN's, FlashAttention's, NCCL's and Triton's by inductor.
KINDS = {
    "collectives": r"nccl|gloo|c10d::|vitscale:communication",
    "attention": r"attention|flash|fmha|sdpa|scaleddotproduct",
    "optimizer": r"multi_tensor_apply|_foreach_|fused_adam|fusedadam|adamw",
    "matrix products": r"gemm|gemv|nvjet|splitk|xmma|cutlass|matmul|convol|conv2d|wgrad|dgrad|fprop|mkldnn_linear"
    r"|aten::(linear|_?addmm|mm|bmm|baddbmm|_scaled_mm)\b|triton_(tem|mm)",
    "norms": r"layer_?norm|rms_?norm|gammabeta",
    "copies": r"copy|memcpy|memset|fill|zero_|aten::(cat|clone|contiguous|stack)\b|catarray",
    "elementwise": r"elementwise|triton_(poi|red|per)|reduce_kernel|softmax|dropout|gelu|tanh|sigmoid|index|scatter|gather|random|bernoulli"
    r"|distribution|aten::(add|sub|mul|div|neg|sum|mean|where|exp|log|pow|sqrt|rsqrt|clamp|eq|ne|lt|gt|le|ge|lerp|abs|isfinite|isnan|isinf"
    r"|norm|linalg_vector_norm|any|all|max|min|rand|normal|uniform)\w*",
}


def kind_of(name: str) -> str:
    """The kind of work (`KINDS`) that an operator or a kernel of this name does, or OTHER. Pure."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower())), OTHER)


def operator_flops(name: str, shapes: Sequence[Sequence[int]]) -> int:
    """FLOPs of a call, two for each multiply-add, of the operators that model FLOPs are counted for; 0 for others. Pure.

    The backward of attention counts two products for each of the forward's, as `flops.train_flops` does: what it recomputes is left out.

    Args:
        shapes: of its inputs, as a trace has them.
    """
    name = name.removeprefix("aten::")
    if name in ("mm", "_scaled_mm", "bmm", "addmm", "baddbmm", "_addmm_activation"):
        a, b = shapes[1:3] if name in ("addmm", "baddbmm", "_addmm_activation") else shapes[:2]
        return 2 * math.prod(a) * b[-1]
    if name in ("convolution", "convolution_backward"):  # of patches: the stride is the kernel's size, and its input has no gradient
        images, kernel = shapes[:2] if name == "convolution" else shapes[1:3]
        patches = images[0] * (images[2] // kernel[2]) * (images[3] // kernel[3])
        return 2 * patches * math.prod(kernel)
    if re.fullmatch(r"_scaled_dot_product_\w*attention\w*", name):
        backward = name.endswith("_backward")
        q, k = shapes[1:3] if backward else shapes[:2]
        return 4 * math.prod(q) * k[-2] * (2 if backward else 1)
    return 0


# -- The tables ------------------------------------------------------------------------------------------------------------------------


@dataclass
class _Event:
    """An operator or a range on the host; times in microseconds."""

    name: str
    start: float
    end: float
    shapes: Sequence[Sequence[int]]
    parent: "_Event | None"
    inner: float = 0.0
    """Of what it calls."""
    phase: str = OTHER
    module: str = ""
    kind: str = OTHER


@dataclass
class _Row:
    microseconds: float = 0.0
    calls: int = 0
    flops: int = 0


@dataclass
class _Work:
    """What took time: an operator's own on the host, or a kernel."""

    name: str
    kind: str
    start: float
    end: float
    of: _Event | None
    own: float = 0.0
    """Microseconds that count for it and nothing else."""


def breakdown(trace: dict[str, Any]) -> dict[str, Any]:
    """The tables of a trace that torch.profiler wrote: milliseconds a step, share of the step, calls, TFLOP/s where FLOPs are known. Pure.

    Raises ValueError where it holds no step.
    """
    timed = [raw for raw in trace["traceEvents"] if raw.get("ph") == "X"]
    steps = [raw for raw in timed if raw.get("cat") == "user_annotation" and raw["name"].startswith(_STEP)]
    if not steps:
        raise ValueError("the trace holds no step of torch.profiler")
    begin, end = min(raw["ts"] for raw in steps), max(raw["ts"] + raw["dur"] for raw in steps)
    wall, rounds = end - begin, len(steps)
    timed = [raw for raw in timed if begin <= raw["ts"] < end]
    kernels, main = [raw for raw in timed if raw.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")], steps[0]["tid"]
    on_host = [raw for raw in timed if raw.get("cat") in ("cpu_op", "user_annotation") and (kernels or raw["tid"] == main)]
    events, by_id = _host_events(on_host, main)
    if kernels:
        work = [
            _Work(raw["name"], kind_of(raw["name"]), raw["ts"], raw["ts"] + raw["dur"], by_id.get(raw.get("args", {}).get("External id")))
            for raw in kernels
        ]
        _count_once(work)
    else:  # of a range only the waiting for collectives is work; the rest of its own time is Python's
        own = [event for event in events if event.kind == "collectives" or not event.name.startswith((RANGE, MODULE, _STEP))]
        work = [_Work(event.name, event.kind, event.start, event.end, event, event.end - event.start - event.inner) for event in own]
    phases, kinds, modules, operators = (defaultdict[str, _Row](_Row) for _ in range(4))
    for w in work:
        phase, module = (w.of.phase, w.of.module) if w.of else (OTHER, "")
        for rows, name in ((phases, phase), (kinds, w.kind), (modules, module or f"({phase})"), (operators, w.name)):
            rows[name].microseconds += w.own
            rows[name].calls += 1
    for event in events:
        if flops := operator_flops(event.name, event.shapes):
            kind = "attention" if "attention" in event.name else "matrix products"
            for rows, name in ((phases, event.phase), (kinds, kind), (modules, event.module or f"({event.phase})")):
                rows[name].flops += flops
    if not kernels:
        for name, microseconds in _phases_of_host(events).items():
            phases[name].microseconds = microseconds
    for rows in (phases, kinds, modules):
        rows[IDLE if kernels else PYTHON].microseconds += max(0.0, wall - sum(row.microseconds for row in rows.values()))
    tables = {"phases": phases, "kinds": kinds, "modules": modules, "operators": operators}
    return {
        "steps": rounds,
        "step_ms": wall / rounds / 1000,
        "busy": sum(w.own for w in work) / wall,
        "on": "device" if kernels else "host",
    } | {name: _table(rows, wall, rounds, _MOST if name == "operators" else None) for name, rows in tables.items()}


def _host_events(found: Iterable[dict[str, Any]], main: Any) -> tuple[list[_Event], dict[int, _Event]]:
    """The host's events with what they lie in, and those that an `External id` names."""
    by_thread: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for raw in found:
        by_thread[raw["tid"]].append(raw)
    events: list[_Event] = []
    by_id: dict[int, _Event] = {}
    module_of: dict[int, str] = {}  # a forward operator's, by the sequence number that it shares with its backward
    phases: list[_Event] = []  # of the main thread, which autograd's own thread works for
    for thread in sorted(by_thread, key=lambda thread: thread != main):
        stack: list[_Event] = []
        for raw in sorted(by_thread[thread], key=lambda raw: (raw["ts"], -raw["dur"])):
            name, start, args = raw["name"], raw["ts"], raw.get("args", {})
            while stack and stack[-1].end <= start:
                stack.pop()
            parent = stack[-1] if stack else None
            end = min(start + raw["dur"], parent.end if parent else math.inf)  # rounded, it may end after what it lies in
            event = _Event(name, start, end, args.get("Input Dims", ()), parent)
            if parent:
                parent.inner += end - start
                event.phase, event.module = parent.phase, parent.module
            elif thread != main:
                around = phases[: bisect_right(phases, start, key=lambda phase: phase.start)]
                event.phase = next((phase.phase for phase in reversed(around) if start < phase.end), OTHER)
            if name.startswith(RANGE):
                event.phase = name.removeprefix(RANGE)
                if thread == main:
                    phases.append(event)
            elif name.startswith(MODULE):
                event.module = name.removeprefix(MODULE)
            elif name.startswith("aten::_foreach_lerp"):
                event.phase = AVERAGE
            event.kind = OTHER if name.startswith((MODULE, _STEP)) else kind_of(name)
            if event.kind == OTHER and parent:  # views and allocations belong to what needs them
                event.kind = parent.kind
            if (sequence := args.get("Sequence number")) is not None:
                if "Backward" in name:
                    event.module = event.module or module_of.get(sequence, "")
                elif event.module:
                    module_of.setdefault(sequence, event.module)
            stack.append(event)
            events.append(event)
            if "External id" in args:
                by_id[args["External id"]] = event
    return events, by_id


def _phases_of_host(events: Iterable[_Event]) -> dict[str, float]:
    """Microseconds of each phase without those inside it, its Python included."""
    found: dict[str, float] = defaultdict(float)
    for event in events:
        around = event.parent.phase if event.parent else OTHER
        if event.phase != around:
            found[event.phase] += event.end - event.start
            if around != OTHER:
                found[around] -= event.end - event.start
    return found


def _count_once(work: list[_Work]) -> None:
    """Sets `own` so that no moment counts twice: of kernels that overlap the first to begin, of collectives where nothing else runs."""
    taken: list[tuple[float, float]] = []
    until = -math.inf
    for w in sorted((w for w in work if w.kind != "collectives"), key=lambda w: w.start):
        w.own = max(0.0, w.end - max(w.start, until))
        taken.append((max(w.start, until), max(w.end, until)))
        until = max(until, w.end)
    until, at = -math.inf, 0
    for w in sorted((w for w in work if w.kind == "collectives"), key=lambda w: w.start):
        start = max(w.start, until)
        until = max(until, w.end)
        while at < len(taken) and taken[at][1] <= start:
            at += 1
        hidden = 0.0
        for first, last in taken[at:]:
            if first >= w.end:
                break
            hidden += max(0.0, min(last, w.end) - max(first, start))
        w.own = max(0.0, w.end - start - hidden)


def _table(rows: dict[str, _Row], wall: float, steps: int, most: int | None) -> dict[str, dict[str, float]]:
    found = {}
    for name, row in sorted(rows.items(), key=lambda item: -item[1].microseconds)[:most]:
        found[name] = {"ms": row.microseconds / steps / 1000, "share": row.microseconds / wall, "calls": row.calls / steps}
        if row.flops and row.microseconds:
            found[name]["tflops"] = row.flops / row.microseconds / 1e6
            found[name]["flops"] = row.flops / steps
    return found


def format_breakdown(found: dict[str, Any], title: str) -> str:
    """The tables in Markdown, which reads as well on a terminal. Pure."""
    reached = f", {found['tflops']:.3g} TFLOP/s of the model" if "tflops" in found else ""
    lines = [
        f"# {title}", "",
        f"{found['step_ms']:.2f} ms a step over {found['steps']} steps, {found['busy']:.1%} of them busy on the {found['on']}{reached}; "
        f"at most {found['peak_bytes'] / 2**30:.2f} GiB {'allocated' if found['on'] == 'device' else 'resident'}.",
    ]  # fmt: skip
    titles = {"phases": "phase", "kinds": "kind of work", "modules": "module", "operators": "operator or kernel"}
    for table, heading in titles.items():
        names = [name if len(name) <= 64 else f"{name[:61]}..." for name in found[table]]
        wide = max(map(len, [heading, *names]))
        lines += ["", f"| {heading:{wide}} | {'ms':>9} | {'share':>6} | {'calls':>7} | {'TFLOP/s':>8} |"]
        lines += [f"|{'-' * (wide + 2)}|{'-' * 10}:|{'-' * 7}:|{'-' * 8}:|{'-' * 9}:|"]
        for name, row in zip(names, found[table].values(), strict=True):
            rate = f"{row['tflops']:.3g}" if "tflops" in row else ""
            told = name.replace("|", "/")
            lines.append(f"| {told:{wide}} | {row['ms']:9.3f} | {row['share']:6.1%} | {row['calls']:7g} | {rate:>8} |")
    return "\n".join(lines) + "\n"
