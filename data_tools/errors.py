"""What all parts of the project raise for the person at the terminal."""


class UserError(Exception):
    """Something that the user's input, files or machine caused; the message is one line: the value, the rule, and what would work."""
