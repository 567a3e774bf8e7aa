"""Words of the command line into a dataclass, through tyro; what is wrong with them becomes one line. And flags that verbs share."""

import contextlib
import io
import re
from typing import Annotated, Any, Literal, TypeVar

import tyro
from tyro.conf import Positional

from data_tools.errors import UserError
from vitscale.recipes import Recipe, recipe_name

Flags = TypeVar("Flags")
CHECKPOINT = "A run (its newest durable checkpoint), RUN@STEP, RUN@best, a step's folder, or an exported or imported folder."
Checkpoint = Annotated[Positional[str], tyro.conf.arg(metavar="CHECKPOINT", help=CHECKPOINT)]
Weights = Annotated[Literal["average", "weight"], tyro.conf.arg(help="The average of the weights where there is one, or the raw weights.")]
Processes = Annotated[int, tyro.conf.arg(help="Processes; 0 starts one a GPU, or one on a machine without.")]


class UsageError(UserError):
    """Words on the command line that make no sense; the message is one line for the user."""


def parse(flags: type[Flags], words: list[str], verb: str, default: Flags | None = None, description: str | None = None) -> Flags:
    """The flags of a verb. Prints help and exits where that is asked for; raises UsageError."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            options = {} if default is None else {"default": default}
            return tyro.cli(flags, args=words, prog=f"vitscale {verb}", description=description, **options)  # type: ignore[call-overload,no-any-return]
    except SystemExit as exit_:
        if exit_.code in (0, None):
            raise
    raise UsageError(f"{first_sentence(box.getvalue())}; `vitscale {verb} --help` lists the flags")


def take_recipe(words: list[str], verb: str, recipes: tuple[Recipe[Any], ...]) -> tuple[str, list[str]]:
    """The recipe's name, which comes first, and the other words. Prints the recipes and exits where help is asked for without one."""
    if words and not words[0].startswith("-"):
        return words[0], words[1:]
    if words[:1] in (["-h"], ["--help"]):
        print(f"usage: vitscale {verb} RECIPE [FLAGS]; `vitscale {verb} RECIPE --help` tells the flags and the recipe's values\n")
        for recipe in recipes:
            print(f"  {recipe_name(recipe):<28} {(recipe.__doc__ or '').partition(chr(10))[0]}")
        raise SystemExit(0)
    names = ", ".join(recipe_name(recipe) for recipe in recipes)
    raise UsageError(f"`vitscale {verb}` needs a recipe as its first word; there are {names}")


def given(words: list[str], *flags: str) -> set[str]:
    """Which of the flags stand among the words."""
    named = {word.partition("=")[0].replace("_", "-") for word in words}  # the parser takes either
    return {flag for flag in flags if f"--{flag}" in named}


def first_sentence(box: str) -> str:
    """What tyro's framed message says before its first rule, and the flag that it guesses was meant."""
    lines = [line.strip("│ \n") for line in box.splitlines()[1:]]
    end = next((i for i, line in enumerate(lines) if line.startswith(("─", "╰"))), len(lines))
    said = " ".join(line for line in lines[:end] if line).rstrip(".")
    guess = next((lines[i + 1] for i, line in enumerate(lines[:-1]) if line.startswith("Perhaps you meant")), "")
    if meant := re.match(r"--[\w.-]+", guess):
        said += f" (perhaps {meant.group()} was meant)"
    return said or "the flags cannot be read"
