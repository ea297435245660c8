"""The two errors a user of fastcircuit sees; the command line prints them as one line. And a check of many parts."""


class InputError(ValueError):
    """Bad usage or bad input: says what is wrong, where, what is accepted and how to mend it (exit code 2)."""


class RunError(RuntimeError):
    """A run that started well and could not finish: says at which step, why, and what was kept (exit code 1)."""


def check_seed(seed: int) -> None:
    """InputError unless every generator that is used takes this seed."""
    if not 0 <= seed < 2**63:
        raise InputError(f"seed is {seed}; it must be 0 or more, and less than 2^63")
