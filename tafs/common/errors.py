"""Exit codes and one-line errors of the package's commands."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Callable

from tafs.common import collector

BAD_INPUT = 2
CONTINUE = 75  # EX_TEMPFAIL of sysexits.h: the same command continues the work


class RunFailed(RuntimeError):
    """Work stopped for a reason that its input alone does not show; the message is one line."""


class ToBeContinued(RuntimeError):
    """Work stopped with its state saved; the same command continues it. The message is one line."""


def exit_code(error: Exception) -> int | None:
    """Return the exit code of an error with a one-line message; None for a programming error."""
    if isinstance(error, ToBeContinued):
        return CONTINUE
    if isinstance(error, ValueError | FileNotFoundError):
        return BAD_INPUT
    return 1 if isinstance(error, RunFailed | OSError) else None


def run_cli(
    what: str, work: Callable[[], None], note: Callable[[int, str], None] | None = None
) -> None:
    """Run `work`; print an expected failure as one line and exit with its code.

    Any other error is raised, so that its traceback is printed.

    Args:
        what: the prefix of the line.
        work: what the command does.
        note: called with the exit code and the message before the process ends.
    """
    collector.spare()
    try:
        work()
    except Exception as error:
        code = exit_code(error)
        line = f"{type(error).__name__}: {error}" if code is None else str(error)
        if code is not None:
            print(f"{what}: {line}", file=sys.stderr)
        if note is not None:
            note(code or 1, line)
        if code is None:
            raise
        sys.exit(code)


def one_line(text: str, longest: int = 300) -> str:
    """Return the text with unprintable characters escaped, cut to a length of `longest`."""
    cut = text if len(text) <= longest else f"{text[: longest - 3]}..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut)


def shown(value: object) -> str:
    """Return `repr(value)`, shortened to at most 60 characters."""
    few = reprlib.Repr()
    few.maxstring = few.maxother = 60
    few.maxlevel = few.maxdict = few.maxlist = 3
    text = few.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
