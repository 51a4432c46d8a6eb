"""`tafs plan`, `run`, `status` and `sync`: before the workflow and while it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from tafs.cli import output
from tafs.cli.app import app, command
from tafs.cli.options import (
    EveryOption,
    JsonOption,
    ResultsOption,
    ScaleOption,
    count,
    number,
    overrides,
)


@command(
    app,
    [
        "tafs plan --scale paper --nodes 4 --gpu-hour-price 2.5",
        "tafs plan --scale smoke --json",
    ],
)
def plan(
    scale: ScaleOption = None,
    results: ResultsOption = None,
    method: Annotated[
        str | None,
        typer.Option("--method", metavar="NAME", help="As in snakemake --config method=NAME."),
    ] = None,
    seeds: Annotated[int | None, count("--seeds", "N", "As in snakemake --config seeds=N.")] = None,
    nodes: Annotated[int | None, count("--nodes", "N", "Number of machines.")] = None,
    gpu_hour_price: Annotated[
        float | None,
        number(
            "--gpu-hour-price",
            "X",
            "Of a GPU (at scales without GPUs, a core) for an hour, in any currency.",
        ),
    ] = None,
    tflops: Annotated[
        float | None,
        number(
            "--tflops",
            "X",
            "Sustained TFLOP/s of a GPU or core; default: an assumption, which is printed.",
        ),
    ] = None,
    gpu_memory: Annotated[
        float | None,
        number(
            "--gpu-memory",
            "GB",
            "Of a GPU, in place of the scale's `gpu_memory`: what fits, and takes how long.",
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="List every job.")] = False,
    json_wanted: JsonOption = False,
) -> int:
    """Estimate GPU-hours, disk space and days; list the jobs."""
    from tafs.orchestration.plan import report as plan_report

    given = overrides(scale=scale, results=results, method=method, seeds=seeds)
    options: dict[str, Any] = {"nodes": nodes, "price": gpu_hour_price, "tflops": tflops}
    options["gpu_memory"] = gpu_memory
    if json_wanted:
        output.as_json(plan_report.record(given, **options))
    else:
        print(plan_report.report(given, **options, verbose=verbose))
    return 0


class _Run(TyperCommand):
    """Keeps what follows `--` for snakemake."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        place = args.index("--") if "--" in args else len(args)
        ctx.meta["snakemake"] = args[place + 1 :]
        return super().parse_args(ctx, args[:place])


@command(
    app,
    [
        "tafs run --scale smoke --cores 2",
        "tafs run tune --scale shapes -- --dry-run",
        "tafs run --profile slurm",
    ],
    cls=_Run,
    options_metavar="[OPTIONS] [-- OPTIONS OF SNAKEMAKE]",
)
def run(
    context: typer.Context,
    targets: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TARGETS]...", help="Rules or files; default: all."),
    ] = None,
    scale: ScaleOption = None,
    results: ResultsOption = None,
    cores: Annotated[int | None, count("--cores", "N", "Default: all of the machine.")] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            "--profile", metavar="P", help="A folder of workflow/profiles (gpus), or slurm."
        ),
    ] = None,
) -> int:
    """Train, evaluate and compare, with snakemake.

    TARGETS are rules or files; the default is all. The exit code is snakemake's.
    """
    given = overrides(scale=scale, results=results)
    words = snakemake(targets or ["all"], given, cores, profile, context.meta["snakemake"])
    # The rules call `python` by name; busy-waiting threads would take the cores of other jobs.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.execv(words[0], words)


def snakemake(
    targets: Sequence[str],
    given: Mapping[str, str],
    cores: int | None,
    profile: str | None,
    options: Sequence[str],
) -> list[str]:
    """The command line of snakemake.

    Args:
        targets: rules or files.
        given: values of config.yaml to replace.
        cores: None: those of the profile.
        profile: a folder of workflow/profiles, or a profile that snakemake finds itself.
        options: further ones; what their --config sets is kept.
    """
    words = [sys.executable, "-m", "snakemake", *targets]
    words += ["--cores", str(cores)] if cores else []
    if profile is not None:
        own = Path("workflow/profiles") / profile
        words += ["--workflow-profile", str(own)] if own.is_dir() else ["--profile", profile]
    place = options.index("--config") if "--config" in options else len(options)
    # Snakemake heeds only the last --config, and reads everything after it as settings.
    settings = [f"{key}={value}" for key, value in given.items()] + [*options[place + 1 :]]
    return [*words, *options[:place], *(["--config", *settings] if settings else [])]


@command(app, ["tafs status", "tafs status --scale paper --every 60", "tafs status --json"])
def status(
    scale: ScaleOption = None,
    results: ResultsOption = None,
    every: EveryOption = None,
    json_wanted: JsonOption = False,
) -> int:
    """Show the state of every run; exit code 1 if one failed."""
    import time

    from tafs.orchestration import graph
    from tafs.orchestration import status as states

    found = graph.read(overrides(scale=scale, results=results))
    if not json_wanted:
        return states.show(found, every)
    if every is not None:
        raise ValueError("--every: cannot be combined with --json; leave one of them out")
    seen = states.look(found, time.time())
    output.as_json(states.record(found, seen))
    return int(any(state.state == "failed" for state in seen))


@command(app, ["tafs sync --scale shapes", "tafs sync --server http://127.0.0.1:5000 --every 60"])
def sync(
    run_dirs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN_DIR]...", help="Default: all of the scale."),
    ] = None,
    scale: ScaleOption = None,
    results: ResultsOption = None,
    server: Annotated[
        str | None, typer.Option("--server", metavar="URL", help="A running MLflow server.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option("--store", metavar="DIR", help="Default: RESULTS/mlflow, as for `make ui`."),
    ] = None,
    every: EveryOption = None,
) -> int:
    """Mirror the runs to MLflow."""
    from tafs.orchestration import graph
    from tafs.tracking import cli

    found = graph.read(overrides(scale=scale, results=results))
    runs = Path(found.root) / "runs"
    if not run_dirs and not every and not any(runs.glob("*/run.json")):
        raise ValueError(f"{found.root}: contains no runs; start them with snakemake first")
    options = ["--store", store or f"{found.results}/mlflow"]
    options += ["--server", server] if server is not None else []
    options += ["--every", str(every)] if every else []
    options += [] if run_dirs else ["--page", f"{found.root}/tracked.html"]
    return cli.main(["sync", *options, *(run_dirs or ["--runs", str(runs)])])
