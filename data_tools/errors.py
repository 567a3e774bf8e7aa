"""What all parts of the project raise for the person at the terminal, and how it is told."""

import os


class UserError(Exception):
    """Something that the user's input, files or machine caused; the message is one line: the value, the rule, and what would work."""


def message_of(error: Exception) -> str:
    """What an error says to a person: of the system's the path and the reason, without its number."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    paths = [os.fsdecode(path) for path in (error.filename, error.filename2) if isinstance(path, str | bytes | os.PathLike)]
    return ": ".join([*([" -> ".join(paths)] if paths else []), error.strerror])
