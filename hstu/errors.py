"""The one exception that a person at the command line is meant to read."""


class UserError(ValueError):
    """A config, file, path or argument is wrong and the person who gave it can mend it.

    The message is one line: what is wrong, the value got, the value expected and, where known,
    what to do. The commands print it without a traceback and exit with status 1.
    """
