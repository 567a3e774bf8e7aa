"""A task of a SLURM job becomes a rank of a run: `python -m launch.task SUBMISSION`, which the batch script's srun starts on all nodes.

Rank 0 takes the run's lock, which its process keeps for the life of the start, and opens the run before the others meet it at the
rendezvous. A rank that ended well, finished or saved, ends with 0: at the first other status srun ends all ranks.
"""

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from data_tools.processes import spin_little
from vitscale import stopping


def main() -> None:
    """The entry of a task."""
    stopping.listen()  # before anything else is imported: a stop that comes meanwhile is heard at the first step
    from data_tools.errors import UserError
    from launch.sweep import at_best
    from vitscale.config import TrainConfig, from_dict
    from vitscale.ending import EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED, words_of
    from vitscale.rank import leave, run_rank
    from vitscale.run import LOCK_SECONDS, locked, open_run

    submission = Path(sys.argv[1])
    config: TrainConfig = from_dict(TrainConfig, json.loads((submission / "config.json").read_bytes()))
    run = Path(config.out)
    place = environment(os.environ, len(os.sched_getaffinity(0)))
    os.environ.update(place)
    own_folder(os.environ.get("VITSCALE_KERNELS", ""))
    with ExitStack() as start:
        if place["RANK"] == "0":
            try:
                start.enter_context(locked(run, LOCK_SECONDS))
                finished = open_run(at_best(config, submission), int(place["WORLD_SIZE"]))
            except (UserError, OSError) as error:
                print(words_of(error), file=sys.stderr, flush=True)
                sys.exit(EXIT_FAILED)
            if finished:
                print(f"{run} is finished", file=sys.stderr, flush=True)
                sys.exit(EXIT_STOPPED)  # another status than 0 ends the others, who wait for this rank
            os.environ["VITSCALE_TERMINAL_FD"] = str(os.dup(sys.stdout.fileno()))  # progress goes to the job's own log
        status = run_rank(run, write_to_log(run, os.environ))
        leave(EXIT_FINISHED if status == EXIT_STOPPED else status)  # the lock goes with the process


def environment(slurm: Mapping[str, str], cpus: int) -> dict[str, str]:
    """What the rendezvous, DeepSpeed and the loader read, from what SLURM tells a task that has `cpus`."""
    local_world_size = int(slurm["SLURM_NTASKS"]) // int(slurm["SLURM_STEP_NUM_NODES"])
    threads = int(slurm.get("SLURM_CPUS_PER_TASK") or cpus // local_world_size)
    return {
        "RANK": slurm["SLURM_PROCID"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "WORLD_SIZE": slurm["SLURM_NTASKS"],
        "LOCAL_WORLD_SIZE": str(local_world_size),
        "MASTER_ADDR": slurm["SLURM_LAUNCH_NODE_IPADDR"],  # of the first node, whose batch shell runs srun and whose first task is rank 0
        "MASTER_PORT": str(rendezvous_port(*(slurm.get(name, "") for name in _START))),
        "OMP_NUM_THREADS": slurm.get("OMP_NUM_THREADS", str(max(1, threads))),
    } | spin_little(slurm)


# What all ranks of a start share and no other start has; the port is srun's own, so that clusters on one machine differ, too
_START = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID", "SLURM_SRUN_COMM_PORT")


def rendezvous_port(*start: str) -> int:
    """Where the ranks of one start meet: another one for each start, so that no rank of an older one is let in.

    Below the range from which the system hands out ports, so that nobody takes it meanwhile.
    """
    digest = hashlib.sha256(" ".join(start).encode()).digest()
    return 10_000 + int.from_bytes(digest[:8]) % 22_000


def write_to_log(run: Path, place: Mapping[str, str]) -> Path:
    """Lets all output of this process go to its node's log, which is named by job and step until the start's number is known."""
    node = int(place["RANK"]) // int(place["LOCAL_WORLD_SIZE"])
    start = f"{place['SLURM_JOB_ID']}-{place.get('SLURM_RESTART_COUNT', '0')}-{place['SLURM_STEP_ID']}"
    log = run / "logs" / f"node-{node:04d}-job-{start}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    return log


def own_folder(folder: str) -> None:
    """Makes the folder for compiled kernels, which are loaded and run: one in /tmp that somebody else made is not used."""
    if not folder:
        return
    from data_tools.errors import message_of

    path = Path(folder)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        ours = path.stat(follow_symlinks=False)
        safe = path.is_dir() and not path.is_symlink() and ours.st_uid == os.getuid() and not ours.st_mode & 0o022
    except OSError as error:
        safe, why = False, message_of(error)
    else:
        why = f"{folder} is not this user's alone"
    if not safe:
        sys.exit(f"error: {why}, and compiled kernels cannot lie there; another `scratch` in the site file works")


if __name__ == "__main__":
    main()
