"""The command line: `tafs plan` before anything is submitted, `tafs status` and `tafs sync` while
it runs. All of them are called in a checkout and take snakemake's scale and results.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tafs.common import errors


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="tafs", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, words: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=words, description=words, allow_abbrev=False)
        made.add_argument("--scale", metavar="S", help="of config.yaml; by default its own")
        made.add_argument("--results", metavar="DIR", help="by default config.yaml's")
        return made

    plan = command("plan", "what would run, why, and what it takes: GPU-hours, disk, days")
    plan.add_argument("--method", metavar="NAME", help="as snakemake's --config method=NAME")
    plan.add_argument("--seeds", metavar="N", type=_count, help="as snakemake's --config seeds=N")
    plan.add_argument("--nodes", metavar="N", type=_count, help="machines that share the jobs")
    price = "of a GPU for an hour (of a core, at scales without GPUs), in any currency"
    plan.add_argument("--gpu-hour-price", metavar="X", type=_positive, help=price)
    rate = "sustained TFLOP/s of a GPU or core, in place of the assumed"
    plan.add_argument("--tflops", metavar="X", type=_positive, help=rate)
    plan.add_argument("--verbose", action="store_true", help="every job with its reason")
    status = command("status", "where every run stands; exit code 1 where one has failed")
    again = "look again so often until all is done"
    status.add_argument("--every", metavar="SECONDS", type=_positive, help=again)
    sync = command("sync", "show the runs in MLflow")
    sync.add_argument("run_dirs", nargs="*", metavar="RUN_DIR", help="by default the scale's all")
    sync.add_argument("--server", metavar="URL", help="a running MLflow server")
    sync.add_argument("--store", metavar="DIR", help="of a copy elsewhere than `make ui` has it")
    again = "again and again, until interrupted"
    sync.add_argument("--every", metavar="SECONDS", type=_positive, help=again)
    return parser


def _overrides(given: argparse.Namespace) -> dict[str, Any]:
    """What snakemake's --config would hold."""
    keys = ("scale", "results", "method", "seeds")
    values = {key: getattr(given, key, None) for key in keys}
    return {key: value for key, value in values.items() if value is not None}


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
    from tafs.orchestration import graph as workflow
    from tafs.orchestration import status

    return status.show(workflow.read(_overrides(given)), given.every)


def _sync(given: argparse.Namespace) -> int:
    from tafs.orchestration import graph as workflow
    from tafs.tracking import cli

    graph = workflow.read(_overrides(given))
    runs = Path(graph.root) / "runs"
    if not given.run_dirs and not given.every and not any(runs.glob("*/run.json")):
        raise ValueError(f"{graph.root}: no run is there yet; start it first")
    options = ["--store", given.store or f"{graph.results}/mlflow"]
    options += ["--server", given.server] if given.server is not None else []
    options += ["--every", str(given.every)] if given.every else []
    chosen = given.run_dirs or ["--runs", str(runs)]
    return cli.main(["sync", *options, *chosen])


def main(arguments: Sequence[str] | None = None) -> None:
    """Ends the process: 0, 1 where something failed, 2 where it was asked for wrongly."""
    parser = _parser()
    given = parser.parse_args(arguments)
    code = 0

    def work() -> None:
        nonlocal code
        if given.command == "plan":
            code = _plan(given)
        elif given.command == "status":
            code = _status(given)
        else:
            code = _sync(given)

    errors.run_cli(f"tafs {given.command}", work)
    sys.exit(code)


if __name__ == "__main__":
    main()
