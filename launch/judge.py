"""What the batch script asks after the ranks have ended: `python -m launch.judge RUN --status N --job WORDS`.

It answers with lines on standard output: `verdict=again|finished|requeue|stop`, and `without=NODE,NODE`, the nodes to be left out. Not
with its exit status, which srun mixes with its own and reports as an error. Why it judges so goes to the error stream, for people.
"""

import argparse
import os
import re
import sys
from pathlib import Path

from data_tools.errors import UserError, message_of
from vitscale.run import LOCK_SECONDS, is_finished, locked, newest_start, read_record
from vitscale.verdict import conclude


def main() -> None:
    """Answers the batch script."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--status", type=int, required=True, help="of srun")
    parser.add_argument("--job", default="", help="what `scontrol show job` says; empty without the client")
    flags = parser.parse_args()
    try:
        start, job = newest_start(flags.run), os.environ.get("SLURM_JOB_ID", "")
        if start < 0:
            raise UserError(f"{flags.run} has no start; what its ranks said is above")
        theirs = read_record(flags.run)["starts"][start].get("job", job)
        if theirs != job and not is_finished(flags.run):  # a finished run has no start of this job
            raise UserError(f"job {theirs or 'none'} has taken up {flags.run} meanwhile; this one leaves it to that")
        with locked(flags.run, LOCK_SECONDS):
            verdict = conclude(flags.run, start, flags.status, cluster=True, preempted=was_preempted(flags.job))
    except UserError as error:  # no start came so far as to make the run: another would fail alike
        print(f"error: {error}", file=sys.stderr)
        print("verdict=stop")
        return
    except OSError as error:  # of the file system, which another node or moment may not have: the script takes no answer for a requeue
        print(f"error: {message_of(error)}", file=sys.stderr)
        return
    print(f"start {start}: {verdict.action}: {verdict.why}", file=sys.stderr)
    print(f"verdict={verdict.action}\nwithout={','.join(verdict.without)}")


def was_preempted(job: str) -> bool:
    """Whether SLURM wants the machines back, from what `scontrol show job` says: the PreemptTime of a job that still runs has come."""
    told = re.search(r"\bPreemptTime=(\S*)", job)
    return told is not None and told[1] not in ("None", "N/A", "Unknown", "")


if __name__ == "__main__":
    main()
