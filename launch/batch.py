"""The batch script of a job: what runs on the host of its first node, starts the ranks, and decides what comes after them.

    srun: all ranks, `python -m launch.task` -> srun: one, `python -m launch.judge` -> again here | finished | scontrol requeue | stop

Who starts a run again, and why so; seen on SLURM 22.05, with and without `preempt_send_user_signal`:

- Preemption: the tasks get SIGCONT and SIGTERM (or the job's own signal, USR2), the batch shell nothing. The job stays RUNNING, now with a
  PreemptTime, until GraceTime is over. A script that ends meanwhile, with whatever status, ends its job for good (COMPLETED, FAILED): SLURM
  starts again only what it had to kill. So the script requeues the job itself, which also frees the nodes at once; where it cannot, it
  waits to be killed.
- Time limit: the tasks get USR2 `signal_lead_seconds` before it, up to a minute early; saved, they end, and the script requeues. At the
  limit itself tasks and shell get SIGCONT and SIGTERM, KillWait (30 s) later SIGKILL; the job is COMPLETING with the reason TimeLimit, and
  may still be requeued.
- scancel: the same signals, and COMPLETING without a reason. `scontrol requeue` would bring the job back even now, so a job that is not
  RUNNING, and not at its time limit, is left alone. The same holds at the end of a grace time, after a node's death and after a person's
  `scontrol requeue`: there SLURM has requeued the job already.
- scancel --signal=TERM or USR2: the tasks alone get it (with --batch the shell alone, which passes it on). The job is RUNNING: saved,
  then requeued.
- A node's death: nothing for up to SlurmdTimeout, then SLURM kills the job and requeues it. Ranks that miss their peer end earlier.
- A fault of a rank: srun --kill-on-bad-exit ends the others (SIGTERM, KillWait later SIGKILL) and gives the highest status, which is
  mostly a signal's. So a rank that ends well ends with 0, saved or finished: 75 would have the others killed while they still save.
- ExcNodeList cannot be set while a job runs, but right after `scontrol requeue`; the job starts only once this script has ended.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from launch.site import Site

GOES_ON, STOPPED = 11, 12  # exit status of a job that is not the run's last, and of one after which nothing is started again
RESTARTS_UNJUDGED = 3  # requeues in a row of a job whose judge cannot be run
_DEAF = ("sh", "-c", 'trap "" TERM USR1 USR2; exec "$@"', "sh")  # what a person or SLURM tells the job must not end its judge in mid-word
WAIT_SECONDS = 600  # for SLURM to end a job that cannot requeue itself: longer than most grace times


@dataclass(frozen=True)
class Job:
    """What a submission asks of SLURM."""

    name: str
    folder: Path
    """The submission's: code, config, logs of the job."""
    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    time: str
    sbatch: tuple[str, ...] = ()
    """Extra arguments, after the site's."""


def train_script(site: Site, job: Job, run: Path) -> str:
    """The whole script of a job that trains. Of a chain its first argument is the job before it."""
    ranks = [*_srun(site, job), "--kill-on-bad-exit=1", *_inside(site, job, run), "launch.task", str(job.folder)]
    one = ["srun", "--nodes=1", "--ntasks=1", "--overlap", "--export=ALL", *_inside(site, job, run, *_DEAF), "launch.judge", str(run)]
    judge = f'{shlex.join(one[:3])} --nodelist="$SLURMD_NODENAME" {shlex.join(one[3:])}'
    return "\n".join(
        [
            *_header(site, job, warned=True),
            *_set_up(site, job),
            _SUPERVISE.format(
                run=shlex.quote(str(run)),
                folder=shlex.quote(str(job.folder)),
                srun=shlex.join(ranks),
                judge=judge,
                may_requeue="yes" if site.requeue else "",
                goes_on=GOES_ON,
                stopped=STOPPED,
                unjudged=RESTARTS_UNJUDGED,
                wait_seconds=WAIT_SECONDS,
            ),
        ]
    )


def words_script(site: Site, job: Job, words: list[str], array: int = 0) -> str:
    """The script of a job that runs a verb in one task, or in one of each job of an `array`, which `--task` then tells its share.

    SLURM requeues it after a preemption or a node's death by itself; the verbs go on or begin anew.
    """
    share = f' --task "$SLURM_ARRAY_TASK_ID/{array}"' if array else ""
    command = shlex.join([*_srun(site, job), *_inside(site, job, None), "launch.main", *words]) + share
    return "\n".join([*_header(site, job, array=array), *_set_up(site, job), f"exec {command} </dev/null", ""])


def _header(site: Site, job: Job, *, warned: bool = False, array: int = 0) -> list[str]:
    options = {
        "job-name": job.name,
        "account": site.account,
        "partition": ",".join(site.partitions),
        "qos": site.qos,
        "nodes": job.nodes,
        "ntasks-per-node": job.tasks_per_node,
        "cpus-per-task": site.cpus_per_task,
        "gpus-per-node": _gpus(site, job),
        "mem": site.mem,
        "time": job.time,
        "array": f"0-{array - 1}" if array else "",
        "signal": f"USR2@{site.signal_lead_seconds}" if warned else "",  # to the tasks, not to this shell (B:)
        "open-mode": "append",
        "output": f"{str(job.folder).replace('%', '%%')}/{'job-%A_%a.log' if array else 'job-%j.log'}",
    }
    lines = [f"#SBATCH --{name}={shlex.quote(str(value))}" for name, value in options.items() if value]
    lines.append("#SBATCH --requeue" if site.requeue else "#SBATCH --no-requeue")
    return ["#!/bin/bash", *lines, *(f"#SBATCH {word}" for word in map(_as_directive, (*site.sbatch, *job.sbatch))), ""]


def _as_directive(word: str) -> str:
    name, given, value = word.partition("=")
    return f"{name}={shlex.quote(value)}" if given else word


def _set_up(site: Site, job: Job) -> list[str]:
    scratch = re.sub(r'(["`\\]|\$\()', r"\\\1", site.scratch)  # variables are the job's, commands are not run
    exports = [f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()]
    return [
        *(f"module load {shlex.quote(module)}" for module in site.modules),
        *site.setup,
        *exports,
        f"export PYTHONPATH={shlex.quote(str(job.folder / 'code'))} PYTHONSAFEPATH=1  # the code as it was when the job was submitted",
        "# Compiled kernels lie on each node's own disk: many ranks that compile into one shared folder wait for each other's locks.",
        f'export VITSCALE_KERNELS="{scratch}/vitscale-$(id -u)"',
        *(f'export {name}="$VITSCALE_KERNELS/{folder}"' for name, folder in _CACHES.items()),
        "",
    ]


_CACHES = {"TORCH_EXTENSIONS_DIR": "torch_extensions", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}


def _srun(site: Site, job: Job) -> list[str]:
    """srun for all tasks. What sbatch was told is repeated: since SLURM 22.05 srun does not inherit --cpus-per-task."""
    options = {
        "nodes": job.nodes,
        "ntasks": job.nodes * job.tasks_per_node,
        "ntasks-per-node": job.tasks_per_node,
        "cpus-per-task": site.cpus_per_task,
        "gpus-per-node": _gpus(site, job),
        "cpu-bind": site.cpu_bind,
        "distribution": "block",  # adjacent ranks on a node
        "export": "ALL",
    }
    return ["srun", *(f"--{name}={value}" for name, value in options.items() if value)]


def _gpus(site: Site, job: Job) -> str:
    if not job.gpus_per_node:
        return ""
    return f"{site.gpu_type}:{job.gpus_per_node}" if site.gpu_type else str(job.gpus_per_node)


def _inside(site: Site, job: Job, run: Path | None, *before: str) -> list[str]:
    """Python in the container of the site, as words after srun's own, and right before it what starts it."""
    python = [*before, *shlex.split(site.python), "-m"]
    if site.container is None:
        return python
    ours = dict.fromkeys(str(path) for path in (run, job.folder) if path)
    if run and job.folder.is_relative_to(run):
        ours.pop(str(job.folder))
    mounts = ",".join(one if ":" in one else f"{one}:{one}" for one in (*ours, *site.container.mounts))
    if site.container.runtime == "pyxis":
        return [f"--container-image={site.container.image}", f"--container-mounts={mounts}", *python]
    return ["apptainer", "exec", "--nv", f"--bind={mounts}", site.container.image, *python]


_SUPERVISE = """\
run={run}
folder={folder}
predecessor=${{1:-}}      # of a chain: the job before this one
may_requeue={may_requeue}
restarts=${{SLURM_RESTART_COUNT:-0}}
started_from=$(cat "$run/checkpoints/latest" 2>/dev/null)

say() {{ echo "$(date -u +%Y-%m-%dT%H:%M:%SZ) job $SLURM_JOB_ID: $*" >&2; }}
job() {{ scontrol --oneliner show job "${{1:-$SLURM_JOB_ID}}" 2>/dev/null; }}
end() {{ say "$2"; exit "$1"; }}
end_chain() {{ echo "$1" >"$folder/ended"; }}  # the jobs that wait for this one then do nothing

# scancel leaves the shell KillWait seconds at most, so that it is noted at once. A job that SLURM itself requeues has another count.
cancelled() {{
  local words; words=$(job)
  case $words in
    *' Reason=TimeLimit '* | *' JobState=RUNNING '* | '') return 1 ;;
    *" Restarts=$restarts "*) end_chain cancelled; return 0 ;;
  esac
  return 1
}}

# Ends the script of a job that is not its own any more: cancelled, or requeued by SLURM. Past its time limit it still is.
check_ours() {{
  case ${{1-$(job)}} in
    *' JobState=RUNNING '* | *' Reason=TimeLimit '* | '') ;;
    *) cancelled && end 0 "stop: the job was cancelled"
       end 0 "SLURM starts the job again" ;;
  esac
}}

requeue() {{
  check_ours
  if [ -z "$may_requeue" ]; then end {goes_on} "$1; the next job of the chain goes on"; fi
  say "requeue: $1"
  before=$(job | sed -n 's/.* ExcNodeList=\\([^ ]*\\) .*/\\1/p'); case $before in '(null)') before= ;; esac
  trap '' TERM  # a job that is requeued gets it at once, and so does what its script runs
  if scontrol requeue "$SLURM_JOB_ID"; then
    if [ -n "$without" ]; then
      scontrol update jobid="$SLURM_JOB_ID" ExcNodeList="${{before:+$before,}}$without" || say "$without could not be left out"
    fi
    exit 0
  fi
  trap heard TERM
  say "this job cannot be requeued from here; if it is being preempted SLURM does so when it kills it, so it waits for {wait_seconds} s"
  ended=; for _ in $(seq {wait_seconds}); do [ -n "$ended" ] && break; sleep 1; done
  exit {goes_on}
}}

if [ -n "$predecessor" ]; then
  if [ -e "$folder/ended" ]; then end 0 "nothing is left to do: $(cat "$folder/ended")"; fi
  case $(job "$predecessor") in *' JobState=CANCELLED '*) end_chain cancelled; end 0 "job $predecessor was cancelled" ;; esac
fi

# Signals end neither this shell before it has decided, nor the ranks without their knowledge.
srun= ended=
heard() {{ ended=TERM; [ -n "$srun" ] && kill -USR2 "$srun" 2>/dev/null; }}
trap heard TERM
trap '[ -n "$srun" ] && kill -USR2 "$srun" 2>/dev/null' USR1 USR2
trap : INT HUP CONT

while :; do
  {srun} </dev/null &
  srun=$!
  until wait "$srun"; status=$?; ! kill -0 "$srun" 2>/dev/null; do  # a signal ends the wait, not what it waits for
    if [ -n "$ended" ]; then cancelled; fi
  done
  wait "$srun"; status=$?
  srun= without=
  say "the ranks ended with status $status"

  words=$(job)  # without the client nothing is known, and the judge goes by what the ranks wrote
  check_ours "$words"
  case $words in
    *' JobState=RUNNING '*) ;;
    *' Reason=TimeLimit '*)
      if [ "$(cat "$run/checkpoints/latest" 2>/dev/null)" = "$started_from" ]; then
        end_chain "a whole time limit brought no checkpoint"
        end {stopped} "stop: a whole time limit brought no checkpoint; a smaller --checkpoint-every or a longer time limit would"
      fi
      requeue "the time limit came before the ranks had ended" ;;
  esac

  told=$({judge} --status "$status" --job "$words" </dev/null)
  check_ours  # a scancel ends the judge, too
  without=$(sed -n 's/^without=//p' <<<"$told")
  [ -n "$told" ] && rm -f "$folder/unjudged"
  case $(sed -n 's/^verdict=//p' <<<"$told") in
    again) say "again, on the same nodes" ;;
    finished) end_chain "the run is finished"; end 0 "the run is finished" ;;
    requeue) requeue "as judged" ;;
    stop) end_chain "the run was stopped"; end {stopped} "stop" ;;
    *) unjudged=$(($(cat "$folder/unjudged" 2>/dev/null || echo 0) + 1))
       echo "$unjudged" >"$folder/unjudged"
       if [ "$unjudged" -le {unjudged} ]; then requeue "the judge could not be asked"; fi
       end_chain "the judge could not be asked, $unjudged times in a row"
       end {stopped} "stop: the judge could not be asked, $unjudged times in a row" ;;
  esac
done
"""
