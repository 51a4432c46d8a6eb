"""The numbers that the environment gives to a process."""

from __future__ import annotations

import os


def whole_number(name: str, remedy: str, default: str = "", least: int = 0) -> int:
    """The value of an environment variable.

    Raises:
        ValueError: it is no whole number from `least` on; names it and the remedy.
    """
    given = os.environ.get(name, default)
    if not given.isdecimal() or int(given) < least:
        raise ValueError(f"{name}: {given!r} is no whole number from {least}; {remedy}")
    return int(given)
