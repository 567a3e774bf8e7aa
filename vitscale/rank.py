"""One rank of a run: a process from its first line to its exit status.

    python -m vitscale.rank RUN     what the launcher starts on this machine, once a rank; on a cluster `launch.task` calls `run_rank`

All ranks meet (`rendezvous.py`), look their machines over (`preflight.py`) and train (`train.py`), while a heartbeat watches them.
A rank that ends before the run does writes why (`ending.py`), from which whoever started it decides what follows.
"""

import contextlib
import os
import resource
import sys
from pathlib import Path
from typing import NoReturn

from data_tools.errors import UserError
from data_tools.processes import die_with
from vitscale import stopping
from vitscale.machine import DESCRIPTORS, this_place


def run_rank(run: Path, log: Path | None = None) -> int:
    """Trains as the rank that the environment tells, in a run that `run.open_run` has prepared by the time all ranks meet.

    A node's `log`, made before the start had a number, then gets its name.
    Returns the exit status: finished, stopped (saved, to be gone on with later) or failed, as `ending.py` has them.
    """
    from vitscale.ending import EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED, Cause, Ended, end_of_this_rank, is_its_own, words_of, write_end
    from vitscale.run import newest_start

    place = this_place()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < DESCRIPTORS:
        resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS if hard < 0 else min(hard, DESCRIPTORS), hard))
    heartbeat = None
    try:
        import torch.distributed as dist  # which takes seconds, in which signals are listened for already

        from vitscale.engine import init_distributed
        from vitscale.heartbeat import Heartbeat
        from vitscale.preflight import preflight
        from vitscale.run import log_file, read_config
        from vitscale.train import train

        init_distributed()
        config, start = read_config(run), newest_start(run)
        if log and place.local_rank == 0:
            log.rename(log_file(run, start, place.node))
        heartbeat = Heartbeat(run, start, place, hang_seconds=config.guard.hang_seconds, data_seconds=config.stream.read_timeout)
        said = preflight(config)
        if place.rank == 0:
            print(said, flush=True)
        train(config, beat=heartbeat.beat)
        dist.destroy_process_group()
        return EXIT_FINISHED
    except BaseException as error:
        print(words_of(error), file=sys.stderr, flush=True)
        tells = place.rank == 0 or is_its_own(error)
        if tells:
            with contextlib.suppress(UserError, OSError):  # nothing may be there yet to write it in
                step, stood_still = (heartbeat.step, heartbeat.stood_still()) if heartbeat else (0, 0.0)
                write_end(run, end_of_this_rank(error, start=newest_start(run), step=step, stood_still=stood_still))
        saved = isinstance(error, Ended) and error.cause in (Cause.SIGNAL, Cause.REQUEST)
        # At the first rank that fails the others are killed: where rank 0 tells for all, it alone may fail, once its record is written
        return EXIT_STOPPED if saved or not tells else EXIT_FAILED
    finally:
        if heartbeat:
            heartbeat.close()


def leave(status: int) -> NoReturn:
    """Ends this process, not by the front door: all files are closed by now.

    Peers may hang in a collective that it will never join, and even after a good end threads of torch now and then abort the interpreter's
    exit ("terminate called without an active exception").
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> NoReturn:
    """The entry of a rank whose launcher has set its environment."""
    stopping.listen()
    die_with(int(os.environ.get("VITSCALE_LAUNCHER_PID", os.getppid())))  # a run that is started again has no second writer
    leave(run_rank(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
