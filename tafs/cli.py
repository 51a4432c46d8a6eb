"""The command `tafs`: `plan` before a run, `status` and `sync` during and after it.

Call it in a checkout. Its options --scale and --results are those of `snakemake --config`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tafs.common import errors

OVERRIDES = ("scale", "results", "method", "seeds")


class _Parser(argparse.ArgumentParser):
    """Reports bad arguments in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="tafs", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.add_argument("--scale", metavar="S", help="default: the scale of config.yaml")
        made.add_argument("--results", metavar="DIR", help="default: the folder of config.yaml")
        return made

    plan = command("plan", "estimate GPU-hours, disk space and days; list the jobs to run and why")
    plan.add_argument("--method", metavar="NAME", help="as in snakemake --config method=NAME")
    plan.add_argument("--seeds", metavar="N", type=_count, help="as in snakemake --config seeds=N")
    plan.add_argument("--nodes", metavar="N", type=_count, help="number of machines")
    price = "of a GPU (at scales without GPUs, a core) for an hour, in any currency"
    plan.add_argument("--gpu-hour-price", metavar="X", type=_positive, help=price)
    rate = "sustained TFLOP/s of a GPU or core; default: an assumption, which is printed"
    plan.add_argument("--tflops", metavar="X", type=_positive, help=rate)
    plan.add_argument("--verbose", action="store_true", help="list every job")
    status = command("status", "show the state of every run; exit code 1 if one has failed")
    again = "repeat until all runs are done"
    status.add_argument("--every", metavar="SECONDS", type=_positive, help=again)
    sync = command("sync", "mirror the runs to MLflow")
    sync.add_argument("run_dirs", nargs="*", metavar="RUN_DIR", help="default: all of the scale")
    sync.add_argument("--server", metavar="URL", help="a running MLflow server")
    sync.add_argument("--store", metavar="DIR", help="default: RESULTS/mlflow, as for `make ui`")
    again = "repeat until interrupted"
    sync.add_argument("--every", metavar="SECONDS", type=_positive, help=again)
    return parser


def _overrides(given: argparse.Namespace) -> dict[str, Any]:
    """The options that snakemake takes with --config."""
    values = {key: getattr(given, key, None) for key in OVERRIDES}
    return {key: value for key, value in values.items() if value is not None}


# The commands import what they need, so that --help is fast.


def _plan(given: argparse.Namespace) -> int:
    from tafs.orchestration.plan import report as plan_report

    report = plan_report.report(
        _overrides(given),
        nodes=given.nodes,
        price=given.gpu_hour_price,
        tflops=given.tflops,
        verbose=given.verbose,
    )
    print(report)
    return 0


def _status(given: argparse.Namespace) -> int:
    from tafs.orchestration import graph, status

    return status.show(graph.read(_overrides(given)), given.every)


def _sync(given: argparse.Namespace) -> int:
    from tafs.orchestration import graph
    from tafs.tracking import cli

    found = graph.read(_overrides(given))
    runs = Path(found.root) / "runs"
    if not given.run_dirs and not given.every and not any(runs.glob("*/run.json")):
        raise ValueError(f"{found.root}: contains no runs; start them with snakemake first")
    options = ["--store", given.store or f"{found.results}/mlflow"]
    options += ["--server", given.server] if given.server is not None else []
    options += ["--every", str(given.every)] if given.every else []
    chosen = given.run_dirs or ["--runs", str(runs)]
    return cli.main(["sync", *options, *chosen])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and end the process.

    Raises:
        SystemExit: always; 0, 1 if something failed, 2 for bad input.
    """
    given = _parser().parse_args(arguments)
    command = {"plan": _plan, "status": _status, "sync": _sync}[given.command]
    codes: list[int] = []
    errors.run_cli(f"tafs {given.command}", lambda: codes.append(command(given)))
    sys.exit(codes[0])


if __name__ == "__main__":
    main()
