"""Checkpoints written behind the training: it stalls only while each rank copies its own partition into memory that its node shares.

    saver.snapshot(about)             every rank, at a step's end: the copy, and nothing else
    saver.advance(unwritten, failed)  every rank, at later steps' ends, with what the ranks' `unwritten` and `failed` add up to by then
    saver.wait(), saver.finish()      every rank, at a stop and at the end: until what is under way is whole or given up

A checkpoint is a list of tasks: rank 0 makes room (task 1), each node's first rank writes the node's file (N tasks), rank 0 commits it or,
where something failed, clears it away (the last). `unwritten` is the number of a rank's tasks that are not done. Their sum tells all ranks
alike where things are: N + 1 and less, room has been made and everybody has copied; 1, the files are written; 0, it is over. Nothing else
is agreed on and no tensor is sent: what a rank must know of the others, the stretches that they hold, is exchanged once.

Ranks hold adjacent stretches of each parameter in rank order (`Engine.shares`), so a node's file has one piece of a parameter and is its
header and the shared buffer, written and hashed in one pass. Whatever the disk does the run goes on, and the next checkpoint is tried anew.
"""

import json
import math
import mmap
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from threading import Event, Thread

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from data_tools.durable import replace_file
from data_tools.errors import UserError, message_of
from vitscale import checkpoint, retention
from vitscale.checkpoint import Description, Piece, TensorEntry, partial_folder, piece_key, step_folder
from vitscale.engine import Engine, device
from vitscale.errors import CheckpointError
from vitscale.machine import available_memory
from vitscale.retention import Policy
from vitscale.run import read_metrics

_BLOCK = 1 << 22  # bytes written and hashed at a time
_ELEMENT = 4  # bytes of fp32
_SETTINGS_BYTES, _PIECE_BYTES = 20_000, 150  # more than checkpoint.json and COMMIT.json take, beside a piece and for each
_LOOK_EVERY = 20.0  # seconds between looks at one another while ranks wait for a disk: far less than a collective may take
PATIENCE = 5.0  # seconds that a run stands still for a checkpoint that is not written when the next one is due


# ---------------------------------------------------------------------------------------------------------------------------------------
# Who writes what
# ---------------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Which stretch of each parameter each node writes. Its file holds kind after kind, in each of them parameter after parameter."""

    shapes: Mapping[str, tuple[int, ...]]
    kinds: Mapping[str, tuple[str, ...]]
    """Kinds, and the parameters that there are tensors of each for."""
    starts_NP: np.ndarray
    lengths_NP: np.ndarray

    @property
    def num_nodes(self) -> int:
        """How many nodes write a file each."""
        return len(self.starts_NP)

    def body_bytes(self, node: int) -> int:
        """The size of a node's tensors."""
        lengths: dict[str, int] = dict(zip(self.shapes, self.lengths_NP[node].tolist(), strict=True))
        return sum(lengths[name] for names in self.kinds.values() for name in names) * _ELEMENT

    def offsets(self, node: int) -> dict[tuple[str, str], int]:
        """Where the pieces of a node begin, by name and kind, in elements from the first."""
        lengths = dict(zip(self.shapes, self.lengths_NP[node].tolist(), strict=True))
        tensors = [(name, kind) for kind, names in self.kinds.items() for name in names]
        begins = accumulate((lengths[name] for name, _ in tensors), initial=0)
        return dict(zip(tensors, begins, strict=False))

    def header(self, node: int) -> bytes:
        """The head of a node's safetensors file: its length, and where each tensor lies in what follows."""
        tensors: dict[str, object] = {"__metadata__": {"format": "pt"}}
        starts, lengths = (dict(zip(self.shapes, of[node].tolist(), strict=True)) for of in (self.starts_NP, self.lengths_NP))
        for (name, kind), offset in self.offsets(node).items():
            if length := lengths[name]:
                ends = [offset * _ELEMENT, (offset + length) * _ELEMENT]
                tensors[piece_key(name, kind, starts[name])] = {"dtype": "F32", "shape": [length], "data_offsets": ends}
        text = json.dumps(tensors, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
        return len(text).to_bytes(8, "little") + text

    def entries(self) -> tuple[TensorEntry, ...]:
        """What checkpoint.json says of the tensors."""
        files = [node_file(node) for node in range(self.num_nodes)]
        pieces = {}
        for name, starts, lengths in zip(self.shapes, self.starts_NP.T.tolist(), self.lengths_NP.T.tolist(), strict=True):
            pieces[name] = tuple(Piece(*piece) for piece in zip(files, starts, lengths, strict=True) if piece[2])
        tensors = ((name, kind) for kind, names in self.kinds.items() for name in names)
        return tuple(TensorEntry(name, kind, tuple(self.shapes[name]), pieces[name]) for name, kind in tensors)


def lay_out(
    shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, tuple[str, ...]], shares_RP2: np.ndarray, leaders: Sequence[int]
) -> Layout:
    """The layout where ranks hold these (start, length) of each parameter, in the order of `shapes`.

    Args:
        leaders: the first rank of each node; a node's ranks are those up to the next.
    """
    starts_RP, lengths_RP = shares_RP2[..., 0], shares_RP2[..., 1]
    before_RP = lengths_RP.cumsum(axis=0) - lengths_RP
    sizes_P = [int(np.prod(shape, dtype=np.int64)) for shape in shapes.values()]
    if ((starts_RP != before_RP) & (lengths_RP > 0)).any() or lengths_RP.sum(axis=0).tolist() != sizes_P:
        raise RuntimeError("ranks do not hold adjacent stretches of each parameter in their order, as deepspeed 0.19.8 has them")
    return Layout(dict(shapes), dict(kinds), before_RP[list(leaders)], np.add.reduceat(lengths_RP, list(leaders), axis=0))


def node_file(node: int) -> str:
    """The name of a node's file."""
    return f"node-{node:04d}.safetensors"


# ---------------------------------------------------------------------------------------------------------------------------------------
# The buffer
# ---------------------------------------------------------------------------------------------------------------------------------------


def map_shared(pid: int, descriptor: int, size: int) -> Tensor:
    """Memory that a process of this node has made with memfd_create, as fp32; it goes with the last tensor. Raises OSError."""
    shared = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR)
    try:
        os.ftruncate(shared, size)  # every rank to the same size, so that none waits for the first
        return torch.frombuffer(mmap.mmap(shared, size), dtype=torch.float32)
    finally:
        os.close(shared)


def pin(memory: Tensor) -> None:
    """Locks memory that a GPU copies to, so that it copies at full speed. Raises OSError."""
    error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)  # type: ignore[no-untyped-call]
    if int(error) != 0:
        raise OSError(f"cudaHostRegister of {memory.nbytes:,} bytes failed with error {int(error)}")


# ---------------------------------------------------------------------------------------------------------------------------------------
# The saver
# ---------------------------------------------------------------------------------------------------------------------------------------


class Saver:
    """Writes a run's checkpoints. All ranks make one, together, and call it at the same steps.

    Raises CheckpointError, on all ranks alike, where a node has no memory for the snapshots.

    Args:
        step: at which this start took the run up. Checkpoints of later steps were passed over; none is kept in the place of a whole one.
    """

    def __init__(self, run: Path, engine: Engine, policy: Policy, step: int) -> None:
        self._run, self._engine, self._policy = run, engine, policy
        self._rank = dist.get_rank()
        self._durable = {there for there in map(checkpoint.step_of, checkpoint.committed(run)) if there <= step}
        self._about: Description | None = None  # of the checkpoint under way; the same on all ranks
        self.newest: int | None = None  # the step of the newest that this saver has written; the same on all ranks
        self.seconds: float | None = None  # that it took from its snapshot on
        self._lost = False  # whether the last one that was begun was given up; the same on all ranks
        self._tasks: list[str] = []  # of this rank, those not done
        self._begun: set[str] = set()  # of this rank's tasks; only the loop's thread looks at it, so that no task ends in between
        self._thread: Thread | None = None
        self._given_up = Event()
        self._problem = ""  # what failed on this rank
        self._since = 0.0
        self._said: list[str] = []
        self._map_buffer()
        if self._rank == 0:  # what a kill left
            for leftover in (run / "checkpoints").glob(".step-*.partial"):
                shutil.rmtree(leftover, ignore_errors=True)

    def _map_buffer(self) -> None:
        """Exchanges who holds what, and maps and touches this rank's part of its node's buffer."""
        descriptor = os.memfd_create("vitscale-checkpoint")
        shares = self._engine.shares()
        mine = [int(os.environ["LOCAL_RANK"]), os.getpid(), descriptor, *(n for share in shares.values() for n in share)]
        told = torch.tensor(mine, device=device())
        of_ranks = [torch.empty_like(told) for _ in range(dist.get_world_size())]
        dist.all_gather(of_ranks, told)
        told_RX = torch.stack(of_ranks).cpu().numpy()
        leaders = np.flatnonzero(told_RX[:, 0] == 0).tolist()
        shapes = {name: tuple(shape) for name, shape in self._engine.shapes.items()}
        self._layout = lay_out(shapes, self._engine.kinds, told_RX[:, 3:].reshape(len(told_RX), -1, 2), leaders)
        self._node = int(np.searchsorted(leaders, self._rank, side="right")) - 1
        self._leads = leaders[self._node] == self._rank
        size, problem = max(_ELEMENT, self._layout.body_bytes(self._node)), ""
        try:
            if self._leads and size > available_memory():
                raise OSError(f"{size:,} bytes are needed, {available_memory():,} are available")
            leader, its_descriptor = told_RX[leaders[self._node], 1:3].tolist()
            self._memory = map_shared(leader, its_descriptor, size)
            self._places = self._place(shares)
            for *_, to in self._places:
                to.zero_()  # the pages are there from now on, and near the rank that copies to them
            if torch.cuda.is_available():
                pin(self._memory)
        except OSError as error:
            problem = f"node {self._node} has no memory for snapshots of checkpoints ({message_of(error)})"
            print(f"error: {problem}", file=sys.stderr, flush=True)
        failed = torch.tensor(bool(problem), device=device(), dtype=torch.int32)
        dist.all_reduce(failed)
        os.close(descriptor)  # all have mapped it
        if failed:
            raise CheckpointError(problem or "another node has no memory for snapshots of checkpoints; its log says more")

    def _place(self, shares: Mapping[str, tuple[int, int]]) -> list[tuple[str, str, int, int, Tensor]]:
        """Name, kind, start and length of the stretches that this rank copies, and where in the buffer to."""
        begins = dict(zip(self._layout.shapes, self._layout.starts_NP[self._node].tolist(), strict=True))
        places = []
        for (name, kind), offset in self._layout.offsets(self._node).items():
            start, length = shares[name]
            if length:
                places.append((name, kind, start, length, self._memory[offset + start - begins[name] :][:length]))
        return places

    # -- called by the loop -------------------------------------------------------------------------------------------------------------

    def snapshot(self, about: Description, *, patience: float = PATIENCE) -> bool:
        """Copies the state as it is for the checkpoint that `about` describes, without its tensors. All ranks, at the same step.

        False where the one before is still being written: this one is left out, with a word, for a disk must not hold up a run.

        Args:
            patience: seconds to wait for the one before, by rank 0's clock.
        """
        self.wait(patience)
        if self._about is not None:
            self._said.append(
                f"warning: no checkpoint of step {about.step}: that of step {self._about.step} is still being written, for "
                f"{time.monotonic() - self._since:.0f} s so far; a larger --checkpoint-every gives the disk more time"
            )
            return False
        self._about, self._since, self._problem, self._lost = about, time.monotonic(), "", False
        self._given_up.clear()
        self._tasks, self._begun = ["file"] if self._leads else [], set()
        if self._rank == 0:
            self._tasks = ["room", "file", "end"]
            self._begin("room", self._make_room)
        with torch.no_grad():
            for name, kind, start, length, to in self._places:
                to.copy_(self._engine.stretch(name, kind, start, length), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return True

    @property
    def unwritten(self) -> int:
        """How many of this rank's tasks for the checkpoint under way are not done; one that failed counts as done."""
        return len(self._tasks)

    @property
    def failed(self) -> int:
        """1 where one of this rank's tasks for the checkpoint under way failed."""
        return int(self._about is not None and bool(self._problem))

    def advance(self, unwritten: int, failed: int) -> None:
        """Begins what can be begun. All ranks, with the same sums over all ranks of what these two were after the snapshot."""
        if self._about is None:
            return
        if failed:
            self._given_up.set()
        if unwritten == 0:
            self._conclude(self._about.step, bool(failed))
        elif unwritten == 1 and self._rank == 0:
            self._begin("end", self._clear_away if failed else self._commit)
        elif unwritten <= self._layout.num_nodes + 1 and self._leads:
            self._begin("file", self._write)

    def wait(self, patience: float = math.inf) -> None:
        """Until the checkpoint under way is there or given up, or rank 0 has waited so many seconds. All ranks."""
        begun = time.monotonic()
        while self._about is not None:
            left = begun + patience - time.monotonic()
            if self._thread is not None:
                self._thread.join(min(_LOOK_EVERY, max(0, left)))
            sums = torch.tensor([self.unwritten, self.failed, self._rank == 0 and left <= 0], device=device())
            dist.all_reduce(sums)
            unwritten, failed, spent = map(int, sums.tolist())
            self.advance(unwritten, failed)
            if spent:
                return

    def finish(self) -> None:
        """Waits for the checkpoint under way. All ranks. Raises CheckpointError on all of them where the last one could not be written."""
        self.wait()
        if self._lost:
            raise CheckpointError(f"the last checkpoint could not be written: {self._reason()}; what was saved before it is whole")

    def news(self) -> list[str]:
        """What there is to tell since the last call: rank 0's is of the whole checkpoint."""
        said, self._said = self._said, []
        return said

    # -- what they are made of ----------------------------------------------------------------------------------------------------------

    def _conclude(self, step: int, lost: bool) -> None:
        """Every task is done: the checkpoint is there, or cleared away."""
        self._about, self._lost = None, lost
        if self._rank == 0 and lost:
            self._said.append(f"warning: no checkpoint of step {step}: {self._reason()}")
        elif self._rank == 0:
            self._durable.add(step)
            self._said.append(f"saved {step_folder(self._run, step)}")
        if not lost:
            self.newest, self.seconds = step, time.monotonic() - self._since

    def _reason(self) -> str:
        return self._problem or "another node could not write its file, and its log says why"

    def _begin(self, name: str, task: Callable[[], None]) -> None:
        """Does this rank's next task behind, unless that was begun already."""
        if name in self._begun:
            return
        if self._thread is not None:
            self._thread.join()  # it has done the task before, and is about to end
        self._begun.add(name)
        self._thread = Thread(target=self._do, args=(task,), name="checkpoint", daemon=True)
        self._thread.start()

    def _do(self, task: Callable[[], None]) -> None:
        try:
            task()
        except _GivenUpError:
            pass
        except (OSError, UserError) as error:
            self._problem = self._problem or message_of(error)
        except Exception as error:  # a fault of ours must not keep all ranks waiting for this task
            traceback.print_exc()
            self._problem = self._problem or f"{type(error).__name__}: {error}"
        finally:
            if self._problem and self._rank != 0:
                print(f"warning: no checkpoint can be written: {self._problem}", file=sys.stderr, flush=True)
            self._tasks.pop(0)  # after that: who sees that it is done must see a failure, too

    @property
    def _hidden(self) -> Path:
        assert self._about is not None
        return partial_folder(self._run, self._about.step)

    def _make_room(self) -> None:
        """Rank 0: an empty folder, on a disk and in a budget with room for what comes. Raises CheckpointError."""
        shutil.rmtree(self._hidden, ignore_errors=True)
        self._hidden.mkdir(parents=True)
        pieces = len(self._layout.kinds) * int((self._layout.lengths_NP > 0).sum())  # each has a line in a header and in checkpoint.json
        coming = sum(map(self._layout.body_bytes, range(self._layout.num_nodes))) + 2 * _PIECE_BYTES * pieces + _SETTINGS_BYTES
        policy, sizes = self._policy, self._sizes()
        if self._lacks(coming) or (policy.max_bytes is not None and sum(sizes.values()) + coming > policy.max_bytes):
            self._remove(sizes, coming)
            taken = sum(self._sizes().values())
            if policy.max_bytes is not None and taken + coming > policy.max_bytes:
                raise CheckpointError(
                    f"it takes {coming:,} bytes beside {taken:,} of those that are kept, over checkpoint_bytes={policy.max_bytes:,}; "
                    f"--checkpoint-bytes {taken + coming} has room for it"
                )
            if lacking := self._lacks(coming):
                raise CheckpointError(lacking)

    def _lacks(self, coming: int) -> str:
        """What the disk lacks for a checkpoint of so many bytes; empty where it has room."""
        disk = os.statvfs(self._hidden)
        if disk.f_bavail * disk.f_frsize < coming:
            return f"it takes {coming:,} bytes, and {self._run} has {disk.f_bavail * disk.f_frsize:,} left; remove something there"
        files = 2 * self._layout.num_nodes + 4
        if disk.f_files and disk.f_favail < files:  # some file systems do not count files
            return f"it takes {files} files, and {self._run} has {disk.f_favail} left; remove something there"
        return ""

    def _sizes(self) -> dict[int, int]:
        folders = [folder for folder in checkpoint.committed(self._run) if checkpoint.step_of(folder) in self._durable]
        return {checkpoint.step_of(folder): retention.folder_bytes(folder) for folder in folders}

    def _remove(self, sizes: Mapping[int, int], coming: int | None = None) -> None:
        """Rank 0: removes what the policy does not keep."""
        goodness = retention.goodness(read_metrics(self._run)) if self._policy.best else {}
        retention.remove(self._run, retention.superfluous(sizes, goodness, self._policy, coming))

    def _write(self) -> None:
        """A node's first rank: the node's file, and beside it what rank 0 must know to commit it. Raises CheckpointError."""
        if self._given_up.is_set():
            raise _GivenUpError
        file = self._hidden / node_file(self._node)
        digest, size = xxhash.xxh3_128(), 0
        body = memoryview(self._memory.numpy()).cast("B")[: self._layout.body_bytes(self._node)]  # type: ignore[arg-type]
        try:
            with open(file, "wb", buffering=0) as opened:
                for part in (memoryview(self._layout.header(self._node)), body):
                    for start in range(0, len(part), _BLOCK):
                        block = part[start : start + _BLOCK]
                        digest.update(block)
                        size += len(block)
                        while block:
                            if self._given_up.is_set():
                                raise _GivenUpError
                            block = block[opened.write(block) :]
                os.fsync(opened.fileno())
            replace_file(self._hidden / _sidecar(self._node), json.dumps({"size": size, "xxh3_128": digest.hexdigest()}))
        except OSError as error:
            raise CheckpointError(f"{file} cannot be written ({error.strerror or error})") from None

    def _commit(self) -> None:
        """Rank 0: all files are there; the checkpoint becomes one, and what is not kept goes. Raises OSError or CheckpointError."""
        assert self._about is not None
        try:
            checksums = {}
            for node in range(self._layout.num_nodes):
                sidecar, file = self._hidden / _sidecar(node), self._hidden / node_file(node)
                written = json.loads(sidecar.read_bytes())
                if file.stat().st_size != written["size"]:
                    raise CheckpointError(f"{file} has {file.stat().st_size:,} bytes, and {written['size']:,} were written")
                checksums[file.name] = written["xxh3_128"]
                sidecar.unlink()
            description = self._hidden / "checkpoint.json"
            checkpoint.write_description(description, replace(self._about, tensors=self._layout.entries()))
            checkpoint.commit(self._run, self._about.step, checksums | {description.name: checkpoint.file_checksum(description)})
        except BaseException:
            self._clear_away()
            raise
        own = {self._about.step: retention.folder_bytes(step_folder(self._run, self._about.step))}
        try:
            self._remove(self._sizes() | ({} if self._about.state.in_doubt else own))  # what may be rolled back takes the place of none
        except (OSError, UserError) as error:  # the checkpoint is there all the same
            self._said.append(f"warning: older checkpoints could not be removed: {message_of(error)}")

    def _clear_away(self) -> None:
        """Rank 0: nobody writes any more."""
        shutil.rmtree(self._hidden, ignore_errors=True)


class _GivenUpError(Exception):
    """Another rank failed, so this one need not go on."""


def _sidecar(node: int) -> str:
    """The name of the file in which a node tells rank 0 what it wrote."""
    return f"node-{node:04d}.json"
