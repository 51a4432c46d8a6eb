"""How a command ends that cannot do what it was asked for: one line, and an exit code."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Callable


class RunFailed(RuntimeError):
    """Work stopped for a reason that its input alone does not show, in one line."""


def fail_in_one_line(what: str, work: Callable[[], None]) -> None:
    """Do the work; a failure is one line and exit code 2 for bad input, else 1."""
    try:
        work()
    except (ValueError, FileNotFoundError) as error:
        print(f"{what}: {error}", file=sys.stderr)
        sys.exit(2)
    except (RunFailed, OSError) as error:
        print(f"{what}: {error}", file=sys.stderr)
        sys.exit(1)


def one_line(text: str, longest: int = 300) -> str:
    """The text with escapes for what cannot be printed, and cut where it is too long."""
    cut = text if len(text) <= longest else f"{text[: longest - 3]}..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut)


def shown(value: object) -> str:
    """The value as Python writes it, in a few words."""
    few = reprlib.Repr()
    few.maxstring = few.maxother = 60
    few.maxlevel = few.maxdict = few.maxlist = 3
    text = few.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
