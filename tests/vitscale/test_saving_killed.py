"""Kill -9 at random moments of saving, committing, rotating and loading: what is looked for next is always there."""

import mmap
import os
import random
import select
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.vitscale.savers import Held, about, step_of_state
from vitscale import checkpoint
from vitscale.retention import Policy
from vitscale.saving import Saver

KILLS = 200  # by `make soak`
SAMPLE = 25  # of them, each time
PHASES = ("beginning", "loading", "copying", "making room", "writing", "committing", "rotating")


class Noted(Saver):
    """A saver that notes what it is at where its parent can see it."""

    phase: mmap.mmap

    def _make_room(self) -> None:
        self.phase[0] = PHASES.index("making room")
        super()._make_room()

    def _write(self) -> None:
        self.phase[0] = PHASES.index("writing")
        super()._write()

    def _commit(self) -> None:
        self.phase[0] = PHASES.index("committing")
        super()._commit()

    def _remove(self, sizes: dict[int, int], coming: int | None = None) -> None:
        self.phase[0] = PHASES.index("rotating")
        super()._remove(sizes, coming)


def go_on(run: Path, phase: mmap.mmap, tell: int) -> None:
    """What ranks of many starts would do, until somebody ends it: takes the run up, saves every step, keeps one."""
    torch.set_num_threads(1)  # threads of the parent's are not here
    os.environ["LOCAL_RANK"] = "0"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    Noted.phase = phase
    held = Held(100_000)
    while True:
        phase[0] = PHASES.index("loading")
        folder, _ = checkpoint.newest_durable(run)
        step = step_of_state(folder) if folder else 0
        saver = Noted(run, held, Policy(newest=1), step)
        for _ in range(3):
            step += 1
            held.move_to(step)
            phase[0] = PHASES.index("copying")
            assert saver.snapshot(about(run, step))
            saver.finish()
            os.write(tell, step.to_bytes(8, "little"))


def walk_kills(run: Path, kills: int) -> Counter[str]:
    """What each of the killed was at."""
    at: Counter[str] = Counter()
    rng, phase = random.Random(0), mmap.mmap(-1, 1)
    for kill in range(kills):
        phase[0] = 0
        heard, tell = os.pipe()
        if (child := os.fork()) == 0:
            try:
                go_on(run, phase, tell)
            finally:
                os._exit(1)
        os.close(tell)
        assert os.read(heard, 8), "the child must save once before it is killed"
        end = os.pidfd_open(child)
        ended = select.poll()  # select(2) knows no descriptors above 1,023, which other tests may have left open
        ended.register(end, select.POLLIN)
        ready = ended.poll(rng.random() * 50)
        os.close(end)
        assert not ready, f"the child ended by itself before kill {kill}"
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with open(heard, "rb") as told:
            last = told.read()
        folder, faults = checkpoint.newest_durable(run)
        assert faults == [], kill
        newest = step_of_state(folder)
        if last:
            assert newest >= int.from_bytes(last[-8:], "little"), "what was told to be saved must be there"
        at[PHASES[phase[0]]] += 1
    return at


def test_a_durable_checkpoint_is_there_after_every_kill(tmp_path: Path) -> None:
    walk_kills(tmp_path, SAMPLE)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_durable_checkpoint_is_there_after_200_kills(tmp_path: Path) -> None:
    at = walk_kills(tmp_path, KILLS)
    print("killed while", dict(at))
    assert {"loading", "writing", "committing", "rotating"} <= at.keys()
