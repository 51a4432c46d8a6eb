"""How a command ends that cannot do what it was asked for: one line, and an exit code."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Callable

BAD_INPUT = 2
CONTINUE = 75  # sysexits.h's EX_TEMPFAIL: the same command, called again, goes on


class RunFailed(RuntimeError):
    """Work stopped for a reason that its input alone does not show, in one line."""


class ToBeContinued(RuntimeError):
    """Work stopped before its end with its state saved, in one line: the same command goes on."""


def run_cli(
    what: str, work: Callable[[], None], note: Callable[[int, str], None] | None = None
) -> None:
    """Do the work; a failure is one line and exit code 2 for bad input, 75 for what is to be
    continued, else 1.

    Args:
        note: called with the exit code and the line before the process ends.
    """
    try:
        work()
    except ToBeContinued as error:
        code, line = CONTINUE, str(error)
    except (ValueError, FileNotFoundError) as error:
        code, line = BAD_INPUT, str(error)
    except (RunFailed, OSError) as error:
        code, line = 1, str(error)
    except Exception as error:  # a mistake in the code: its traceback says where
        if note is not None:
            note(1, f"{type(error).__name__}: {error}")
        raise
    else:
        return
    print(f"{what}: {line}", file=sys.stderr)
    if note is not None:
        note(code, line)
    sys.exit(code)


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
