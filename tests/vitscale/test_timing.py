"""Where the time goes: from marks to shares, bytes of collectives, and real runs on two ranks whose shares answer to what is slow."""

import dataclasses
import itertools
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.conftest import with_engine
from tests.distributed import run_on_ranks
from vitscale import flops
from vitscale import train as loop
from vitscale.config import EngineConfig, OptimizerConfig, TrainConfig, ViTConfig, from_dict, to_dict
from vitscale.engine import Engine
from vitscale.gpus import GPUS
from vitscale.memory import Layout
from vitscale.metrics import SHARES, Pace, progress_line, what_bounds
from vitscale.model import ViT
from vitscale.report import time_spent
from vitscale.resolve import resolve
from vitscale.run import open_run, read_metrics
from vitscale.timing import BACKWARD, DATA, FORWARD, LOGGING, OUTSIDE, SHARE_OF, UPDATE, Clock, Mark, account, lead
from vitscale.traffic import collectives, ring_bytes

STEPS, DELAY = 6, 0.15  # seconds that what is slow takes more, a micro-batch


# -- Arithmetic -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_every_moment_on_the_device_counts_into_one_share(seed: int) -> None:
    draw = random.Random(seed)
    phases = [draw.choice([*SHARE_OF, OUTSIDE]) for _ in range(200)]
    device = list(itertools.accumulate(draw.random() for _ in phases))
    marks = [Mark(phase, at, 0.0) for phase, at in zip(phases, device, strict=True)]
    seconds = account(marks)
    outside = sum(b.device - a.device for a, b in itertools.pairwise(marks) if b.phase == OUTSIDE)
    assert tuple(seconds) == SHARES
    assert sum(seconds.values()) + outside == pytest.approx(device[-1] - device[0])
    halves = account(marks[:80]), account(marks[79:])
    assert [sum(of) for of in zip(*(half.values() for half in halves), strict=True)] == pytest.approx(list(seconds.values()))


def test_the_hosts_lead_is_what_the_device_is_behind_it() -> None:
    clocks_apart = 1234.5
    marks = [
        Mark(LOGGING, clocks_apart + 1.0, 1.0),  # found it idle
        Mark(BACKWARD, clocks_apart + 1.7, 1.2),
        Mark(BACKWARD, clocks_apart + 2.3, 1.4),
        Mark(BACKWARD, clocks_apart + 2.9, 1.6),
    ]
    assert lead(marks) == pytest.approx(0.9)
    assert lead([Mark(phase, clocks_apart + at, at) for at, phase in enumerate((DATA, FORWARD, BACKWARD))]) == pytest.approx(0.0)
    assert lead(marks[:1]) is None


class Device:
    """What CUDA promises of a GPU: work waits for what was asked for before, and runs while the host goes on. None is to be had here."""

    def __init__(self) -> None:
        self.now, self.free = 0.0, 0.0  # of the host, and when the device has done all that it was asked for

    def launch(self, seconds: float) -> None:
        self.free = max(self.free, self.now) + seconds

    def event(self, *, enable_timing: bool) -> Any:
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self._device, self._at = device, float("inf")

    def record(self, stream: str) -> None:
        assert stream == "computing"
        self._at = max(self._device.free, self._device.now)

    def query(self) -> bool:
        return self._at <= self._device.now

    def elapsed_time(self, later: "Event") -> float:
        assert self.query()
        assert later.query()
        return 1000 * (later._at - self._at)


def test_on_a_gpu_time_is_the_devices_and_nothing_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    device, streams = Device(), ["computing"]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: streams[-1])
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(time, "perf_counter", lambda: device.now)
    clock = Clock(torch.device("cuda"))
    clock.enter(LOGGING)

    def step(loading: float) -> None:
        clock.enter(DATA)
        device.now += loading
        for phase, seconds in ((FORWARD, 2.0), (BACKWARD, 4.0)):
            clock.enter(phase)
            device.launch(seconds)
            device.now += 0.25
        clock.enter(UPDATE)
        with clock.communicating():
            device.launch(1.0)
        streams.append("aside")
        with clock.communicating():  # hidden behind what computes
            pass
        streams.pop()
        device.launch(0.5)
        clock.enter(LOGGING)

    step(loading=1.0)
    assert clock.microseconds()["compute"] == 0, "the device has not come so far"
    step(loading=3.0)  # which the device, with 7.5 s of work to do, does not feel
    device.now = device.free + 0.5
    step(loading=0.0)
    device.now = device.free
    assert clock.microseconds() == {
        "data_wait": 1_000_000,
        "communication": 3_000_000,
        "compute": 3 * 6_500_000,
        "host": 500_000,
        "checkpoint": 0,
    }
    behind = [1.0 + 6.0 - 1.5, 8.5 + 6.0 - 5.0, 16.5 + 6.0 - 17.0]
    assert clock.lead() == pytest.approx(sorted(behind)[1])
    assert clock.lead() is None


def test_a_ring_sends_all_but_its_own_part_and_an_all_reduce_twice() -> None:
    assert ring_bytes("all-reduce", 800, 8) == 2 * 700
    assert ring_bytes("reduce-scatter", 800, 8) == ring_bytes("all-gather", 800, 8) == 700
    assert ring_bytes("all-reduce", 800, 1) == 0


def test_shares_are_of_the_steps_since_the_last_line() -> None:
    pace, samples_at = Pace(0), lambda step: 8 * step
    first = pace.measure(pace.moment(2, {"all_reduce": 80}), samples_at, dict(zip(SHARES, (10, 20, 60, 10, 0), strict=True)))
    assert [first[share] for share in SHARES] == [0.1, 0.2, 0.6, 0.1, 0.0]
    assert first["communication_bytes"] == {"all_reduce": 40}
    second = pace.measure(pace.moment(3, {"all_reduce": 180}), samples_at, dict(zip(SHARES, (40, 20, 60, 10, 10), strict=True)))
    assert [second[share] for share in SHARES] == [0.75, 0.0, 0.0, 0.0, 0.25]
    assert second["communication_bytes"] == {"all_reduce": 100}
    third = pace.measure(pace.moment(4, {}), samples_at, dict(zip(SHARES, (40, 20, 60, 10, 10), strict=True)))
    assert not set(third) & set(SHARES), "nothing of it counted, as in a profile"


def shares(**of: float) -> dict[str, float]:
    return dict.fromkeys(SHARES, 0.0) | of


def test_what_bounds_a_run_is_said_in_words() -> None:
    waits = what_bounds(shares(data_wait=0.31, compute=0.69), workers=4, images_per_second=1680.0, ranks=2)
    assert waits.startswith("waits for data 31% of the time: more --stream.workers")
    assert waits.endswith("4 workers a rank give 210 img/s each, and some 6 would keep up")
    assert "each" not in what_bounds(shares(data_wait=0.31, compute=0.69))
    assert what_bounds(shares(compute=0.97, host=0.03)) == "bound by computing, 97% of the time"
    for share, words in (("communication", "other ranks 40%"), ("host", "Python 40%"), ("checkpoint", "checkpoints 40%")):
        assert words in what_bounds(shares(compute=0.6, **{share: 0.4}))
    assert what_bounds({"data_wait": 0.5}) == "", "of a run of before, which told no other share"


def test_the_terminal_names_the_largest_share_that_is_not_computing() -> None:
    line = {"step": 3, "epoch": 0.1, "loss": 1.0, "lr": 0.1, "images_per_second": 10.0, "seconds_left": 5.0, "unusable": 0}
    assert "data 12%  5s left" in progress_line(line | shares(data_wait=0.12, host=0.06, compute=0.82), 10)
    assert progress_line(line | shares(data_wait=0.04, compute=0.96), 10) == progress_line(line, 10)


def test_mfu_is_held_against_both_ceilings() -> None:
    assert flops.measured_flops("NVIDIA H200", "bf16") == 790e12
    assert flops.measured_flops("NVIDIA H200", "fp32") is None
    assert flops.measured_flops("NVIDIA A100-SXM4-80GB", "bf16") is None
    for gpu in GPUS:
        assert gpu.reached is None or gpu.reached < gpu.bf16


# -- Real runs on two ranks ---------------------------------------------------------------------------------------------------------------


def spin(seconds: float) -> None:
    """Works for so long."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def slow(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        spin(DELAY)
        yield batch


def runs(payload: dict[str, Any]) -> None:
    """Of the loop: as it is, with a slow loader, and with a second rank that computes for longer."""
    on_device, compute_loss = loop.on_device, loop.compute_loss
    for name in ("plain", "loader", "rank"):
        config: TrainConfig = from_dict(TrainConfig, payload["config"])
        config = dataclasses.replace(config, out=str(Path(payload["folder"]) / name))
        if dist.get_rank() == 0:
            Path(config.out).mkdir()
            open_run(config, 2)
        dist.barrier()
        if name == "loader":
            loop.on_device = lambda *args: slow(on_device(*args))
        elif name == "rank" and dist.get_rank() == 1:
            loop.compute_loss = lambda *args: (spin(DELAY), compute_loss(*args))[1]
        try:
            loop.train(config)
        finally:
            loop.on_device, loop.compute_loss = on_device, compute_loss


def test_shares_answer_to_what_is_slow(config: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(with_engine(config, zero_stage=1), steps=STEPS, log_every=2, checkpoint_every=3, micro_batch_size=6)
    config = resolve(config, 2)
    run_on_ranks("tests.vitscale.test_timing:runs", 2, {"config": to_dict(config), "folder": str(tmp_path)}, tmp_path)
    found: dict[str, dict[str, float]] = {}
    for name in ("plain", "loader", "rank"):
        lines = [line for line in read_metrics(tmp_path / name) if "loss" in line]
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 6]
        for line in lines:
            assert sum(line[share] for share in SHARES) == pytest.approx(1)
            assert min(line[share] for share in SHARES) >= 0
        assert [line["checkpoint"] > 0 for line in lines] == [False, False, False, True, False], "of the steps after that of step 3"
        alike = [lines[1], lines[-1]]  # of three steps in all, no checkpoint among them
        found[name] = {share: sum(line[share] * line["samples_seen"] / line["step"] / line["images_per_second"] * n
                                  for line, n in zip(alike, (1, 2), strict=True)) for share in SHARES}  # fmt: skip
        parameters = flops.parameters(config.model)
        for line in lines:  # fp32 gradients are summed, and the weights' partitions gathered, padded to a multiple of the ranks
            sent = line["communication_bytes"]
            assert sent["all_gather_into_tensor"] == pytest.approx(4 * parameters / 2, rel=0.01)
            assert sum(sent.values()) == pytest.approx(3 * 4 * parameters / 2, rel=0.01)
    longer = 3 * 2 * DELAY  # three steps of two micro-batches
    assert found["loader"]["data_wait"] > 0.95 * longer
    assert found["rank"]["compute"] > 0.95 * longer / 2, "that of one rank of two"
    assert found["rank"]["communication"] > 0.5 * longer / 2, "the other waits for it, as far as it is not as slow itself"
    assert found["rank"]["data_wait"] < 0.95 * longer


def count(payload: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Bytes that a rank sent in a step of two micro-batches, by stage and collective, the mean of all."""
    sent, optimizer = {}, OptimizerConfig(payload["optimizer"])
    for stage in (0, 1, 2, 3):
        model, clock = ViT(from_dict(ViTConfig, payload["model"])), Clock(torch.device("cpu"))
        engine = Engine(
            model, EngineConfig(zero_stage=stage, precision="fp32"), optimizer, micro_batch_size=2, grad_accum_steps=2, clock=clock
        )
        for _ in range(2):  # the first step of stage 3 learns in which order weights are wanted
            clock.sent.clear()
            for _ in range(2):
                clock.enter(FORWARD)
                engine.backward(engine.forward(torch.ones(2, 3, 16, 16)).square().sum())
                engine.step(1e-3)
        assert not clock.seconds["data_wait"]
        of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, dict(clock.sent))
        sent[str(stage)] = {name: statistics.fmean(of_rank[name] for of_rank in of_ranks) for name in of_ranks[0]}
        engine.close()
    return sent


def test_bytes_are_those_of_each_stage(tmp_path: Path) -> None:
    model = ViTConfig(depth=2, width=32, mlp_dim=64, num_heads=2, patch_size=8, image_size=(16, 16), num_classes=5)
    sent = run_on_ranks("tests.vitscale.test_timing:count", 2, {"model": to_dict(model), "optimizer": "adamw"}, tmp_path)
    weights = 4 * flops.parameters(model) / 2  # half of the weights in fp32, which is what a rank of two sends to share them out
    for stage, times in (("0", 2), ("1", 3), ("2", 2 * 2 + 1)):  # stage 2 reduces after every micro-batch
        assert sum(sent[stage].values()) == pytest.approx(times * weights, rel=0.01), stage
    assert sent["3"]["reduce_scatter_tensor"] == pytest.approx(2 * weights, rel=0.01)
    assert sent["3"]["all_gather_into_tensor"] >= weights  # it keeps small weights whole from one micro-batch to the next


def test_muons_exchange_is_counted_and_foretold(tmp_path: Path) -> None:
    model = ViTConfig(depth=3, width=32, mlp_dim=64, num_heads=2, patch_size=8, image_size=(16, 16), num_classes=5)
    sent = run_on_ranks("tests.vitscale.test_timing:count", 3, {"model": to_dict(model), "optimizer": "muon"}, tmp_path)
    for stage, of in sent.items():
        layout = Layout(EngineConfig(zero_stage=int(stage), precision="fp32"), 3, 2, 2, device="cpu")  # type: ignore[arg-type]
        planned = [one.sent(3) for one in collectives(model, OptimizerConfig("muon"), layout) if one.what.startswith("exchange")]
        assert of["all_to_all_single"] == pytest.approx(sum(planned), rel=0.01), stage


def test_the_report_draws_shares_and_says_what_bounds() -> None:
    lines = [{"step": 1, **shares(compute=1.0)}, {"step": 2, "eval_loss": 1.0}]
    assert time_spent("Pre-training", lines) == ""
    lines += [{"step": 10, **shares(data_wait=0.5, compute=0.5)}, {"step": 30, **shares(data_wait=0.2, compute=0.8)}]
    drawn = time_spent("Pre-training", lines)
    assert "Waits for data 29% of the time" in drawn, "9 steps of 50% and 20 of 20%"
    assert drawn.count("<polyline") == len(SHARES)
