"""What the start of a large run costs rank 0: thousands of ranks that meet at its store, and a question that all of them answer.

    python benchmarks/rendezvous.py                # 1,000, 2,000, 4,000 and 8,000 ranks
    python benchmarks/rendezvous.py 1000

The store, the connections and the messages are real; the ranks are connections of a few processes rather than processes of their own, and
all are on this machine, so the network's latency is not in it. Each process goes through the steps of `Meeting.ask` for its ranks one after
the other. Told are the seconds until all have spoken, what rank 0 does then (it decides on what all say, and answers), and until all have
heard the answer.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import resource
import time
from datetime import timedelta

import torch
from torch.distributed import TCPStore

from launch.ranks import free_port
from vitscale.rendezvous import Meeting, check_alike, who

PROCESSES = 4
PATIENCE = timedelta(minutes=10)


def ranks_of(process: int, world_size: int, port: int, said: dict, ready, go) -> None:
    """Some of the ranks: connect, say, and read the answer."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (20_000, 20_000))
    ranks = range(1 + process, world_size, PROCESSES)
    stores = {rank: TCPStore("127.0.0.1", port, None, False, PATIENCE, wait_for_workers=False) for rank in ranks}
    ready.wait()
    go.wait()
    text = json.dumps([f"node-{process}", said])
    for rank, store in stores.items():
        round_ = f"rendezvous/{store.add(f'rendezvous/asked/{rank}', 1)}"
        store.set(f"{round_}/{rank}", text)
        if store.add(f"{round_}/said", 1) == world_size:
            store.set(f"{round_}/all", "")
    for store in stores.values():
        store.wait([f"{round_}/answer"], PATIENCE)
        store.get(f"{round_}/answer")
    ready.wait()


def measure(world_size: int) -> dict[str, float]:
    """One world size."""
    context = multiprocessing.get_context("fork")
    ready, go = context.Barrier(PROCESSES + 1), context.Event()
    port, said = free_port(), who()
    store = TCPStore("127.0.0.1", port, None, True, PATIENCE, wait_for_workers=False)
    processes = [context.Process(target=ranks_of, args=(i, world_size, port, said, ready, go)) for i in range(PROCESSES)]
    for process in processes:
        process.start()
    ready.wait()
    go.set()
    started = time.perf_counter()
    decided: list[float] = []

    def decide(all_said: list) -> None:
        decided.append(time.perf_counter())
        check_alike(all_said, 1)

    Meeting(store, 0, world_size, 1).ask("rendezvous", said, decide, PATIENCE)
    answered = time.perf_counter()
    ready.wait()
    heard = time.perf_counter()
    for process in processes:
        process.join()
    return {
        "ranks": world_size,
        "all_said_seconds": round(decided[0] - started, 3),
        "decide_and_answer_seconds": round(answered - decided[0], 3),
        "all_heard_seconds": round(heard - started, 3),
        "bytes_a_rank": len(json.dumps(["node-0000", said])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ranks", nargs="*", type=int, default=[1000, 2000, 4000, 8000])
    resource.setrlimit(resource.RLIMIT_NOFILE, (20_000, 20_000))
    found = [measure(world_size) for world_size in parser.parse_args().ranks]
    machine = {"cores": os.cpu_count(), "machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    print(json.dumps({"date": datetime.date.today().isoformat(), **machine, "measured": found}, indent=1))


if __name__ == "__main__":
    main()
