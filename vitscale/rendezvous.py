"""How the ranks of a start meet: each says who it is, rank 0 waits for all, and all hear the same answer.

The ranks talk through a store that rank 0 opens at MASTER_ADDR:MASTER_PORT, before there is a process group, because on a machine that is
broken it is the process group that fails, or hangs, without telling which machine it is. `engine.init_distributed` makes the group with the
same store, and `preflight.py` asks its questions through it.

A question costs each rank a handful of messages, and rank 0 one answer from the store with what all say, some hundred bytes a rank: its
work is linear in ranks; `benchmarks/rendezvous.py` measures it.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from vitscale.ending import Cause, Ended
from vitscale.machine import expand_nodes, this_host, this_place

ARRIVAL = timedelta(minutes=10)  # between the first rank's coming and the last's: a thousand nodes import torch from one file system
_GRACE = timedelta(seconds=60)  # that the other ranks wait longer than rank 0, which is who can tell what is wrong
_HEARD = timedelta(seconds=10)  # that rank 0, and with it the store, stays for the others to hear that the start is over


@dataclass(frozen=True)
class Meeting:
    """The ranks of a start, which reach one store."""

    store: Store
    rank: int
    world_size: int
    local_world_size: int
    nodes: tuple[str, ...] = ()
    """The names of the nodes in the order of their ranks, where they are known beforehand."""

    def ask(self, topic: str, mine: Any, decide: Callable[[list[Any]], Any], patience: timedelta) -> Any:
        """Every rank says something (JSON), rank 0 makes an answer of what all say, and all get that. All ranks must ask the same.

        Raises Ended on all ranks where `decide` does and where a rank has said nothing after rank 0's `patience`, and alone where rank 0
        went away.
        """
        try:
            round_ = f"{topic}/{self.store.add(f'{topic}/asked/{self.rank}', 1)}"  # a process may ask the same again
            self.store.set(f"{round_}/{self.rank}", json.dumps([this_host(), mine]))
            if self.store.add(f"{round_}/said", 1) == self.world_size:
                self.store.set(f"{round_}/all", "")
            if self.rank == 0:
                return self._answer(round_, topic, decide, patience)
            self.store.wait([f"{round_}/answer"], patience + _GRACE)
            answer = json.loads(self.store.get(f"{round_}/answer"))
            if "ended" in answer and self.store.add(f"{round_}/heard", 1) == answer["hearers"]:
                self.store.set(f"{round_}/all-heard", "")
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            words = f"rank {self.rank} asked of {topic} and lost rank 0 ({_first_line(error)})"
            raise Ended(Cause.LOST_PEER, words, alone=True) from None
        if "ended" in answer:
            raise Ended(Cause(answer["ended"]), answer["words"], bad_nodes=tuple(answer["bad_nodes"]))
        return answer["says"]

    def _answer(self, round_: str, topic: str, decide: Callable[[list[Any]], Any], patience: timedelta) -> Any:
        """Rank 0's part: waits for all, decides, and tells."""
        keys = [f"{round_}/{rank}" for rank in range(self.world_size)]
        hearers = self.world_size - 1
        try:
            try:
                self.store.wait([f"{round_}/all"], patience)
            except dist.DistStoreError:
                came = [rank for rank, key in enumerate(keys) if self.store.check([key])]
                hearers = len(came) - 1
                hosts = {rank: json.loads(self.store.get(keys[rank]))[0] for rank in came}
                raise absent(hosts, self.world_size, self.local_world_size, self.nodes, topic, patience) from None
            says = decide([json.loads(said)[1] for said in self.store.multi_get(keys)])
        except Ended as ended:
            answer = {"ended": ended.cause, "words": ended.words, "bad_nodes": ended.bad_nodes, "hearers": hearers}
            self.store.set(f"{round_}/answer", json.dumps(answer))
            if hearers > 0:
                with contextlib.suppress(dist.DistStoreError):  # one of them has gone meanwhile
                    self.store.wait([f"{round_}/all-heard"], _HEARD)
            raise
        self.store.set(f"{round_}/answer", json.dumps({"says": says}))
        return says


def join(arrival: timedelta = ARRIVAL) -> Meeting:
    """Meets the other ranks that RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe, all of one kind.

    Raises Ended where some do not come, and where versions, code or devices differ.
    """
    place, nodes = this_place(), _nodes()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(host, port, None, place.rank == 0, arrival, wait_for_workers=False)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        _no_store(place.rank, f"{host}:{port}", nodes, arrival, error)
    meeting = Meeting(store, place.rank, place.world_size, place.local_world_size, nodes)
    meeting.ask("rendezvous", who(), lambda said: check_alike(said, place.local_world_size), arrival)
    return meeting


def of_process_group() -> Meeting:
    """The same ranks again, once there is a process group."""
    store = dist.distributed_c10d._get_default_store()  # there is no public way to it
    place = this_place()
    return Meeting(store, place.rank, place.world_size, place.local_world_size, _nodes())


def _nodes() -> tuple[str, ...]:
    return expand_nodes(os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", ""))


def _no_store(rank: int, where: str, nodes: Sequence[str], arrival: timedelta, error: Exception) -> NoReturn:
    if rank == 0:  # a port that another program has; the next start takes another
        raise Ended(Cause.LOST_PEER, f"rank 0 cannot open the ranks' store at {where} ({_first_line(error)})", alone=True) from None
    words = f"rank 0{f' on {nodes[0]}' if nodes else ''} was not there at {where} within {_span(arrival)} ({_first_line(error)})"
    raise Ended(Cause.BAD_NODE if nodes else Cause.LOST_PEER, words, bad_nodes=tuple(nodes[:1]), alone=True) from None


# ---------------------------------------------------------------------------------------------------------------------------------------
# Who is there
# ---------------------------------------------------------------------------------------------------------------------------------------


def who() -> dict[str, Any]:
    """What a rank says of itself."""
    versions = {package: importlib.metadata.version(package) for package in ("deepspeed", "vitscale")}
    return {
        "host": this_host(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__} | versions,
        "code": code_hash(),
        "devices": _devices(),
        "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0,
    }


def code_hash() -> str:
    """Of the modules of our three packages, as they lie where this process found them."""
    digest = hashlib.sha256()
    for package in ("data_tools", "launch", "vitscale"):
        found = importlib.util.find_spec(package)
        for folder in found.submodule_search_locations or () if found else ():
            for file in sorted([*Path(folder).glob("*.py"), *Path(folder).glob("*.so")]):
                digest.update(f"{package}/{file.name}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _devices() -> str:
    if not torch.cuda.is_available():
        return "no GPU"
    try:
        kinds = Counter(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    except RuntimeError as error:
        return f"a GPU that fails ({_first_line(error)})"
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def check_alike(said: Sequence[Mapping[str, Any]], local_world_size: int) -> None:
    """Pure. Raises Ended where ranks are laid out otherwise than node by node, where their versions, code or devices differ, naming the
    minority (of two halves, the one that rank 0 is not in), and where a node has too few devices.
    """
    hosts = [of["host"] for of in said]
    for first in range(0, len(hosts), local_world_size):
        node = hosts[first : first + local_world_size]
        if len(set(node)) > 1:
            raise Ended(
                Cause.INPUT,
                f"ranks {first} to {first + len(node) - 1} should be one node's, {local_world_size} a node, and are on "
                f"{', '.join(dict.fromkeys(node))}; start them node by node (srun --distribution=block)",
            )
    for what in ("versions", "code", "devices"):
        each = [json.dumps(of[what], sort_keys=True) for of in said]
        counts = Counter(each)
        if len(counts) > 1:
            usual = max(counts, key=lambda value: (counts[value], value == each[0]))
            odd = {value: [rank for rank, one in enumerate(each) if one == value] for value in counts if value != usual}
            told = []
            for value, ranks in odd.items():
                places = ", ".join(_unique(hosts[rank] for rank in ranks))
                told.append(f"{_told(json.loads(value), json.loads(usual))} on {places} (rank {spans(ranks)})")
            rest = _told(json.loads(usual), json.loads(next(iter(odd))))
            bad = _unique(hosts[rank] for ranks in odd.values() for rank in ranks)
            raise Ended(Cause.BAD_NODE, f"the ranks' {what} differ: {'; '.join(told)}; {rest} on all others", bad_nodes=bad)
    if 0 < said[0]["gpus"] < local_world_size:
        raise Ended(Cause.INPUT, f"{local_world_size} ranks a node need as many visible GPUs, and each node has {said[0]['devices']}")


def _told(value: Any, other: Any) -> str:
    """A value in words; of a mapping, only what differs from the other."""
    return ", ".join(f"{name} {one}" for name, one in value.items() if one != other.get(name)) if isinstance(value, dict) else str(value)


def absent(
    hosts: Mapping[int, str], world_size: int, local_world_size: int, nodes: Sequence[str], topic: str, patience: timedelta
) -> Ended:  # fmt: skip
    """What ends a start whose ranks did not all come: `hosts` are of those that did, `nodes` the names that are known beforehand. Pure.

    Where more than half of the nodes are not there in full, it is not the nodes, and none is to be left out.
    """
    missing = [rank for rank in range(world_size) if rank not in hosts]
    words, bad = [], []
    for index, ranks in groupby(missing, key=lambda rank: rank // local_world_size):
        block = range(index * local_world_size, min((index + 1) * local_world_size, world_size))
        name = next((hosts[rank] for rank in block if rank in hosts), nodes[index] if index < len(nodes) else "")
        bad += [name] if name else []
        gone = list(ranks)
        words.append(f"{name or f'node {index}'} ({'none of ranks' if len(gone) == len(block) > 1 else 'not rank'} {spans(gone)})")
    said = f"{len(missing)} of {world_size} ranks did not come to the {topic} within {_span(patience)}: {', '.join(words)}"
    if 2 * len(words) * local_world_size > world_size:
        return Ended(Cause.LOST_PEER, f"{said}; of so many nodes none is left out")
    return Ended(Cause.BAD_NODE if bad else Cause.LOST_PEER, said, bad_nodes=_unique(bad))


def spans(numbers: Sequence[int]) -> str:
    """Rising numbers in words: 1-3, 7."""
    runs = [[of for _, of in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _unique(names: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _span(time: timedelta) -> str:
    return f"{time.total_seconds():g} s"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
