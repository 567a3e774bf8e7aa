"""What reading and writing weights raises, whoever wrote them: below all that knows of files, formats and runs."""

from data_tools.errors import UserError


class CheckpointError(UserError):
    """A checkpoint that is not there, not whole or not the right one; the message is one line for the user."""
