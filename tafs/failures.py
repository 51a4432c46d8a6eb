"""How a command ends that cannot do what it was asked for: one line, and an exit code."""

from __future__ import annotations

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
