"""The frame of the command `tafs`: its help, one-line errors, exit codes, and what Ctrl-C does."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer

from tafs.common import errors

INTERRUPTED = 130
EXIT_CODES = """
Exit codes: 0 done; 1 failed, or problems were found; 2 bad input; 75 stopped by a signal with the
state saved; 130 interrupted by Ctrl-C. An error is one line on stderr.
"""
AGAIN = "run the same command again"

# Boxes and colours of the help are for people; a pipe gets plain lines.
MARKUP: Any = "rich" if sys.stdout.isatty() else None


def new_app(name: str, text: str, examples: Sequence[str]) -> typer.Typer:
    """A group of commands."""
    return typer.Typer(
        name=name,
        help=text,
        epilog=_epilog(examples),
        rich_markup_mode=MARKUP,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        add_completion=name == "tafs",
    )


def command(
    group: typer.Typer, examples: Sequence[str], again: str = AGAIN, **settings: Any
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Add a function as the command of its name; it returns the exit code.

    Args:
        group: of `new_app`.
        examples: command lines that the help shows.
        again: how to go on after Ctrl-C.
        settings: further arguments of `Typer.command`.
    """

    def add(function: Callable[..., int]) -> Callable[..., int]:
        words = function.__name__.removeprefix(f"{group.info.name}_").replace("_", "-")
        what = words if group.info.name == "tafs" else f"{group.info.name} {words}"

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> int:
            codes: list[int] = []
            try:
                errors.run_cli(
                    f"tafs {what}", lambda: codes.append(_flushed(function, *args, **kwargs))
                )
            except KeyboardInterrupt:
                _interrupted(f"tafs {what}", again)
            return codes[0]

        group.command(words, epilog=_epilog(examples), **settings)(run)
        return function

    return add


def _epilog(examples: Sequence[str]) -> str:
    """Examples and exit codes, in lines that the help does not join."""
    lines = "\n".join(f"  {example}" for example in examples)
    return f"\b\nExamples:\n{lines}\n\n{' '.join(EXIT_CODES.split())}"


def _flushed(function: Callable[..., int], *args: Any, **kwargs: Any) -> int:
    """Call a command; a reader that closed the pipe, such as `head`, is not a failure."""
    try:
        code = function(*args, **kwargs)
        sys.stdout.flush()
    except BrokenPipeError:
        # Otherwise Python reports the pipe once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _interrupted(what: str, again: str) -> None:
    echoed = "\n" if sys.stderr.isatty() else ""  # the terminal shows ^C
    print(f"{echoed}{what}: interrupted; {again}", file=sys.stderr)
    sys.exit(INTERRUPTED)


app = new_app(
    "tafs",
    "Train, evaluate and compare RL alignment methods for flow-matching models. Call it in a "
    "checkout; docs/command-line.md describes every command.",
    ["tafs plan --scale smoke", "tafs run --scale smoke", "tafs leaderboard --scale smoke"],
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and end the process.

    Raises:
        SystemExit: always; EXIT_CODES lists the codes.
    """
    # In the order of the help.
    from tafs.cli import workflow, results, checkpoints, additions  # noqa: F401, I001

    given = None if arguments is None else list(arguments)
    try:
        code = app(args=given, prog_name="tafs", standalone_mode=False)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "tafs"
        line = " ".join(error.format_message().split()).removesuffix(".")
        print(f"{path}: {line} (see {path} --help)", file=sys.stderr)
        sys.exit(errors.BAD_INPUT)
    sys.exit(code or 0)
