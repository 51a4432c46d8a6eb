"""`tafs evaluate`, `score` and `sample`: any checkpoint, any images."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tafs.cli import output
from tafs.cli.app import AGAIN, app, command
from tafs.cli.options import JsonOption, ResultsOption, ScaleOption, above_zero, count, overrides

if TYPE_CHECKING:
    from tafs.assets.sources import AssetSettings

ModelOption = typer.Option(
    "--model",
    metavar="NAME",
    help="A name of models.yaml or of a plug-in, or a folder with a diffusers pipeline.",
)
AdapterOption = Annotated[
    Path | None,
    typer.Option("--adapter", metavar="PATH", help="A .safetensors file or a folder with one."),
]
PROTOCOL = "A name of tafs/evaluation/protocols/ or of a plug-in, or a .yaml file"


def _protocols() -> list[str]:
    from tafs.common.plugins import installed

    folder = Path(__file__).parents[1] / "evaluation" / "protocols"
    others = {plugin.name for plugin in installed("tafs.protocols")}
    return sorted({file.stem for file in folder.glob("*.yaml")} | others)


@command(
    app,
    [
        "tafs evaluate --base --model shapes-flux --protocol shapes",
        "tafs evaluate --adapter lora.safetensors --model flux-dev --protocol paper",
    ],
    again=f"{AGAIN}: it continues from the scores that are saved",
)
def evaluate(
    model: Annotated[str, ModelOption],
    protocol: Annotated[
        str,
        typer.Option("--protocol", metavar="NAME", help=f"{PROTOCOL}.", autocompletion=_protocols),
    ],
    adapter: AdapterOption = None,
    base: Annotated[
        bool, typer.Option("--base", help="Judge the model without an adapter.")
    ] = False,
    scale: ScaleOption = None,
    results: ResultsOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Default: a folder in RESULTS/evaluations."),
    ] = None,
    processes: Annotated[
        int | None,
        count("--processes", "N", "That share the images, with a GPU each; default: all GPUs."),
    ] = None,
    json_wanted: JsonOption = False,
) -> int:
    """Judge a model or an adapter under a pinned protocol."""
    if base == (adapter is not None):
        raise ValueError("--adapter, --base: give one of them")
    from tafs.evaluation import checkpoint
    from tafs.evaluation import protocol as protocols
    from tafs.report import judged

    assets, folder = None, Path(results or "results")
    if scale is not None:
        assets, folder = _assets(scale, results)
    chosen = protocols.read(protocol, assets)
    _prepare()
    with output.working(json_wanted):
        found = checkpoint.judge(model, chosen, folder, adapter, processes)
    to = out or folder / "evaluations" / found.runs[-1].name
    printed = judged.write(found, to)
    if json_wanted:
        output.as_json({"out": str(to), **json.loads((to / "evaluation.json").read_text("utf-8"))})
    else:
        print(printed)
    return 0


@command(
    app,
    [
        "tafs score --metric sharpness --images my_images --prompts prompts.txt",
        "tafs score --metric clip --images my_images --prompts prompts.txt --scale one-gpu "
        "--device cpu",
        "tafs score --metric geneval --images my_images --prompts metadata.jsonl --json",
    ],
)
def score(
    metric: Annotated[
        str, typer.Option("--metric", metavar="NAME", help="pickscore, geneval, ..., or vendi.")
    ],
    images: Annotated[
        Path,
        typer.Option("--images", metavar="DIR", help="A folder of .png, .jpg and .webp files."),
    ],
    prompts: Annotated[
        Path,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help=".txt with a prompt per line, or .jsonl with `prompt`, and `file_name` where it "
            "is known.",
        ),
    ],
    scale: ScaleOption = None,
    device: Annotated[
        Literal["cpu", "cuda", "auto"] | None,
        typer.Option("--device", help="Of the metric's model; default: the scale's."),
    ] = None,
    results: ResultsOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Default: METRIC_scores.csv.")
    ] = None,
    json_wanted: JsonOption = False,
) -> int:
    """Score the images of a folder with one metric.

    The default scale's embedded models score images of their own size only; --scale one-gpu or
    paper takes the published models, which have to be fetched.
    The metric `vendi` is the diversity of all images, and of those of each prompt.
    """
    from tafs.assets import sources
    from tafs.evaluation import image_scores
    from tafs.report import judged
    from tafs.runtime import gpus

    assets, _ = _assets(scale, results)
    if device is not None:
        assets = assets.model_copy(update={"device": device})
    _prepare()
    if assets.device == "cuda":
        gpus.claim(1)
    with output.working(json_wanted):
        source, to = sources.of(assets), out or Path(f"{metric}_scores.csv")
        if metric == image_scores.VENDI:
            found = image_scores.diversity(images, prompts, source)
        else:
            scores = image_scores.score_images(metric, images, prompts, source)
    if metric == image_scores.VENDI:
        printed = judged.write_diversity(found, to)
        if json_wanted:
            output.as_json(judged.diversity_record(found, to))
        else:
            print(printed)
        return 0
    printed = judged.write_images(metric, scores, images, to)
    if json_wanted:
        output.as_json(judged.images_record(metric, scores, to))
    else:
        print(printed)
    return 0


@command(
    app,
    [
        'tafs sample --model shapes-flux --prompt "a red ring" --steps 4 --out grid.png',
        "tafs sample --run results/shapes/runs/NAME --prompts prompts.txt --steps 1 --steps 8",
    ],
)
def sample(
    steps: Annotated[
        list[int],
        typer.Option(
            "--steps",
            metavar="N",
            parser=above_zero(int),
            help="Of the sampler; given several times, each is a column.",
        ),
    ],
    run_dir: Annotated[
        Path | None, typer.Option("--run", metavar="RUN_DIR", help="results/SCALE/runs/NAME.")
    ] = None,
    model: Annotated[str | None, ModelOption] = None,
    adapter: AdapterOption = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="TEXT", help="A prompt; may be given several times."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help=".txt with a prompt per line, or .jsonl."),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            "--sampler",
            metavar="NAME",
            help="ode, ode_uniform or anneal; default: what the run's evaluation chose, else ode.",
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            "--protocol",
            metavar="NAME",
            help=f"{PROTOCOL}: guidance and size of --model; default: shapes for embedded models, "
            "else paper.",
            autocompletion=_protocols,
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of the noise.")] = 0,
    scale: ScaleOption = None,
    results: ResultsOption = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="The grid, .png or .pdf.")
    ] = Path("grid.png"),
) -> int:
    """Sample a run or a model to a labelled grid of images."""
    if (run_dir is None) == (model is None):
        raise ValueError("--run, --model: give one of them")
    if run_dir is not None and (adapter or protocol):
        raise ValueError("--adapter, --protocol: belong to --model; a run has its own")
    if out.suffix not in (".png", ".pdf"):
        raise ValueError(f"--out {out}: give a .png or .pdf file")
    from tafs.evaluation import image_scores
    from tafs.evaluation import protocol as protocols
    from tafs.evaluation import sample as samples
    from tafs.models import catalog
    from tafs.report.figures import image_grid

    texts = list(prompt or ())
    if prompts is not None:
        texts += [one.text for one in image_scores.read_prompts(prompts)]
    if not texts:
        raise ValueError("--prompt, --prompts: give at least one prompt")
    _prepare()
    with output.working():
        if run_dir is not None:
            sampled = samples.of_run(run_dir)
        else:
            entry = catalog.read().get(str(model))
            default = "paper" if entry is None or entry.assets == "hub" else entry.assets
            assets = None if scale is None else _assets(scale, results)[0]
            chosen = protocols.read(protocol or default, assets)
            sampled = samples.of_model(str(model), chosen, adapter)
        titles, columns = [], []
        for count in steps:
            used = sampled.sampler(sampler, count)
            titles.append(f"{sampled.title}\n{count} step{'s' * (count > 1)}, {used}")
            columns.append(samples.images(sampled, texts, count, used, seed).numpy())
    image_grid.write(titles, columns, texts, out, bool(sampled.random_weights))
    print(out)
    return 0


def _assets(scale: str | None, results: str | None) -> tuple[AssetSettings, Path]:
    """(the assets, the results folder) of the scale; its server's command is set for `served`."""
    from tafs import experiment
    from tafs.experiment.expansion import asset_settings

    config = experiment.load(overrides(scale=scale, results=results)).config
    if servers := config.active.evaluation.servers:
        os.environ.setdefault("TAFS_SERVER", json.dumps(servers))
    return asset_settings(config), Path(config.results)


def _prepare() -> None:
    """Set up this process as the stages of a run are."""
    from tafs.models import loading
    from tafs.runtime.main import limit_threads

    loading.quiet()
    limit_threads()
