"""The `vitscale` command: finds the verb, and turns every failure into one line and an exit status.

Exit status: 0 success, 1 a failure (one line; a traceback with --debug), 2 words that make no sense, 75 a run that
was stopped on request and can be gone on with, 130 Ctrl-C.
"""

import difflib
import importlib.metadata
import os
import sys
import traceback

from data_tools.errors import UserError, message_of
from data_tools.processes import spin_little
from launch import terminal, verbs
from launch.flags import UsageError, parse
from launch.terminal import LaunchError
from vitscale.ending import EXIT_INTERRUPTED


def main() -> None:
    """The entry point of the `vitscale` command."""
    debug = "--debug" in sys.argv
    os.environ.update(spin_little(os.environ))
    try:
        dispatch([word for word in sys.argv[1:] if word != "--debug"])
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # `vitscale ... | head`
        sys.stderr.close()
        sys.exit(1)
    except (UserError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(error if isinstance(error, LaunchError) else f"error: {message_of(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except Exception:
        traceback.print_exc()
        sys.exit("error: this is a fault of vitscale, not of what you gave it; please report the lines above")


def quickstart(words: list[str]) -> None:
    """The whole road on this machine in minutes, on real images."""
    from launch.quickstart import QuickstartFlags
    from launch.quickstart import quickstart as go

    flags = parse(QuickstartFlags, words, "quickstart")
    terminal.need("torch", "deepspeed", "safetensors", "sklearn")
    go(flags)


def submit(words: list[str]) -> None:
    """Train, evaluate or pack as a job of SLURM, which starts a run again by itself until it is finished."""
    from launch.submit import submit as go

    go(words)


def doctor(words: list[str]) -> None:
    """This machine or allocation: what works, what does not, and what to do."""
    from launch.doctor import doctor as look

    look(words)


VERBS = verbs.VERBS | {"submit": submit, "doctor": doctor, "quickstart": quickstart}  # apart from the others: they go through them


def dispatch(words: list[str]) -> None:
    """Runs the verb that the words begin with."""
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return
    if words[0] == "--version":
        print(importlib.metadata.version("vitscale"))
        return
    for length in (2, 1):  # `checkpoint show` is two words
        verb = VERBS.get(" ".join(words[:length]))
        if verb:
            verb(words[length:])
            return
    family = [name for name in VERBS if name.startswith(f"{words[0]} ")]
    if family and (len(words) == 1 or words[1] in ("-h", "--help")):
        print("\n".join(f"vitscale {name:<20} {_summary(name)}" for name in family))
        return
    typed = " ".join(words[: 2 if family else 1])
    near = difflib.get_close_matches(typed, VERBS, n=1)
    guess = f" (perhaps `vitscale {near[0]}` was meant)" if near else ""
    raise UsageError(f"`vitscale {typed}` is not a verb{guess}; there are {', '.join(family or VERBS)}")


def overview() -> str:
    """What `vitscale --help` prints."""
    head = "usage: vitscale VERB [FLAGS]\n\nPre-trains Vision Transformers: images to tar shards to checkpoints that others load.\n"
    tail = "\n`vitscale VERB --help` tells a verb's flags. --debug shows the traceback of an error."
    return "\n".join([head, *(f"  {name:<20} {_summary(name)}" for name in VERBS), tail])


def _summary(verb: str) -> str:
    return (VERBS[verb].__doc__ or "").partition("\n")[0]


if __name__ == "__main__":
    main()
