"""The two errors a user of fastcircuit sees; the command line prints them as one line."""


class InputError(ValueError):
    """Bad usage or bad input: says what is wrong, where, what is accepted and how to mend it (exit code 2)."""


class RunError(RuntimeError):
    """A run that started well and could not finish: says at which step, why, and what was kept (exit code 1)."""
