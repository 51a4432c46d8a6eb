"""The command `tafs`: `plan` before a run, `status` and `sync` during it, then `claims`, `votes`.

`evaluate` judges any checkpoint and `score` any images. Call the others in a checkout. The options
--scale and --results are those of `snakemake --config`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tafs.common import errors

if TYPE_CHECKING:
    from tafs.assets.sources import AssetSettings

OVERRIDES = ("scale", "results", "method", "seeds")


class _Parser(argparse.ArgumentParser):
    """Reports bad arguments in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _above_zero(kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < math.inf:
            name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {name} above 0")
        return value

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="tafs", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    count, number = _above_zero(int), _above_zero(float)

    def command(name: str, text: str) -> Callable[..., argparse.Action]:
        made = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.add_argument("--scale", metavar="S", help="default: the scale of config.yaml")
        made.add_argument("--results", metavar="DIR", help="default: the folder of config.yaml")
        return made.add_argument

    add = command("plan", "estimate GPU-hours, disk space and days; list the jobs to run and why")
    add("--method", metavar="NAME", help="as in snakemake --config method=NAME")
    add("--seeds", metavar="N", type=count, help="as in snakemake --config seeds=N")
    add("--nodes", metavar="N", type=count, help="number of machines")
    price = "of a GPU (at scales without GPUs, a core) for an hour, in any currency"
    add("--gpu-hour-price", metavar="X", type=number, help=price)
    rate = "sustained TFLOP/s of a GPU or core; default: an assumption, which is printed"
    add("--tflops", metavar="X", type=number, help=rate)
    text = "GB of a GPU: show the largest micro-batch that fits, with and without checkpointing"
    add("--gpu-memory", metavar="GB", type=number, help=text)
    add("--verbose", action="store_true", help="list every job")
    add = command("status", "show the state of every run; exit code 1 if one has failed")
    add("--every", metavar="SECONDS", type=number, help="repeat until all runs are done")
    add = command("claims", "show the verdicts on the paper's claims")
    text = "also what each comparison shows with a power of 80 %%, and how many seeds it needs"
    add("--power", action="store_true", help=text)
    add = command("evaluate", "judge a model, or a LoRA adapter on it, under a pinned protocol")
    judged = commands.choices["evaluate"].add_mutually_exclusive_group(required=True).add_argument
    judged("--adapter", metavar="PATH", type=Path, help="a .safetensors file or a folder with one")
    judged("--base", action="store_true", help="judge the model without an adapter")
    text = "a name of models.yaml or of a plug-in, or a folder with a diffusers pipeline"
    add("--model", metavar="NAME", required=True, help=text)
    text = "a name of tafs/evaluation/protocols/, or a .yaml file"
    add("--protocol", metavar="NAME", required=True, help=text)
    add("--out", metavar="DIR", type=Path, help="default: a folder in RESULTS/evaluations")
    add = command("score", "score the images of a folder with one metric")
    add("--metric", metavar="NAME", required=True, help="pickscore, geneval, ...")
    text = "a folder of .png, .jpg and .webp files"
    add("--images", metavar="DIR", type=Path, required=True, help=text)
    text = ".txt with a prompt per line, or .jsonl with `prompt`, and `file_name` where it is known"
    add("--prompts", metavar="FILE", type=Path, required=True, help=text)
    add("--out", metavar="FILE", type=Path, help="default: METRIC_scores.csv")
    text = "show the win rates of blind votes that the report's gallery saved"
    votes = commands.add_parser("votes", help=text, description=text, allow_abbrev=False)
    votes.add_argument("files", nargs="+", metavar="FILE", type=Path)
    add = command("sync", "mirror the runs to MLflow")
    add("run_dirs", nargs="*", metavar="RUN_DIR", help="default: all of the scale")
    add("--server", metavar="URL", help="a running MLflow server")
    add("--store", metavar="DIR", help="default: RESULTS/mlflow, as for `make ui`")
    add("--every", metavar="SECONDS", type=number, help="repeat until interrupted")
    return parser


def _overrides(given: argparse.Namespace) -> dict[str, Any]:
    """The options that snakemake takes with --config."""
    values = {key: getattr(given, key, None) for key in OVERRIDES}
    return {key: value for key, value in values.items() if value is not None}


# The commands import what they need, so that --help is fast.


def _plan(given: argparse.Namespace) -> int:
    from tafs.orchestration.plan import report as plan_report

    options = {key: getattr(given, key) for key in ("nodes", "tflops", "gpu_memory", "verbose")}
    print(plan_report.report(_overrides(given), price=given.gpu_hour_price, **options))
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


def _claims(given: argparse.Namespace) -> int:
    from tafs import experiment

    file = experiment.load(_overrides(given)).root / "claims.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; the workflow's rule compare writes it")
    signs = {1: "supports", -1: "contradicts", 0: "open"}
    try:
        lines = []
        for claim in json.loads(file.read_bytes()):
            lines.append(f"{claim['id']}: {claim['verdict']}")
            for found in claim["comparisons"] if given.power else ():
                half = "?" if found["half_width"] is None else f"{found['half_width']:.3g}"
                said = "; ".join(filter(None, [signs[found["supports"]], found["needed"]]))
                lines.append(f"  {found['value']:+.3g} +- {half}  {found['what']} ({said})")
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{file}: not the claims of this version; build the report again"
        ) from None
    print("\n".join(lines))
    return 0


def _evaluate(given: argparse.Namespace) -> int:
    from tafs.evaluation import checkpoint, protocol
    from tafs.report import judged

    assets, results = None, Path(given.results or "results")
    if given.scale is not None:
        assets, results = _scale(given)
    chosen = protocol.read(given.protocol, assets)
    _prepare()
    found = checkpoint.judge(given.model, chosen, results, given.adapter)
    out = given.out or results / "evaluations" / found.runs[-1].name
    print(judged.write(found, out))
    return 0


def _score(given: argparse.Namespace) -> int:
    from tafs.assets import sources
    from tafs.evaluation import image_scores
    from tafs.report import judged
    from tafs.runtime import gpus

    assets, _ = _scale(given)
    _prepare()
    if assets.device == "cuda":
        gpus.claim(1)
    source = sources.of(assets)
    scores = image_scores.score_images(given.metric, given.images, given.prompts, source)
    out = given.out or Path(f"{given.metric}_scores.csv")
    print(judged.write_images(given.metric, scores, given.images, out))
    return 0


def _scale(given: argparse.Namespace) -> tuple[AssetSettings, Path]:
    """(the assets, the results folder) of the scale; its server's command is set for `served`."""
    from tafs import experiment
    from tafs.experiment.expansion import asset_settings

    config = experiment.load(_overrides(given)).config
    if server := config.active.evaluation.server:
        os.environ.setdefault("TAFS_SERVER", json.dumps(server))
    return asset_settings(config), Path(config.results)


def _prepare() -> None:
    """Set up this process as the stages of a run are."""
    import tafs.common.torchvision_patch  # noqa: F401  # isort: skip
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    from tafs.runtime.main import limit_threads

    # It reports the parts of a model that an adapter leaves alone.
    of_diffusers.set_verbosity_error()
    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()
    limit_threads()


def _votes(given: argparse.Namespace) -> int:
    from tafs.report import votes

    print(votes.summary(given.files))
    return 0


COMMANDS = {
    "plan": _plan,
    "status": _status,
    "claims": _claims,
    "evaluate": _evaluate,
    "score": _score,
    "sync": _sync,
    "votes": _votes,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and end the process.

    Raises:
        SystemExit: always; 0, 1 if something failed, 2 for bad input.
    """
    given = _parser().parse_args(arguments)
    command = COMMANDS[given.command]
    codes: list[int] = []
    errors.run_cli(f"tafs {given.command}", lambda: codes.append(command(given)))
    sys.exit(codes[0])


if __name__ == "__main__":
    main()
