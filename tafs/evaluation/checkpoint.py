"""Judges any checkpoint under a protocol: a model, with or without a LoRA adapter.

Every judged model is a run folder, like those of the workflow, in RESULTS/evaluations/runs/. Its
name holds the digests of protocol, model and adapter, so that a base model is scored once for all
of its adapters, and an interrupted evaluation continues.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue

from tafs.common.errors import one_line
from tafs.common.files import atomic_text, sha256
from tafs.common.yaml_files import ConfigError, suggestion
from tafs.data.prompt_sets import prompt_set
from tafs.evaluation import scoring, served
from tafs.evaluation.evaluate import judge as judge_run
from tafs.evaluation.evaluate import verified_rewards
from tafs.evaluation.protocol import Protocol
from tafs.experiment import needs
from tafs.experiment.specs import RunSpec
from tafs.models import Backbone, adapters, catalog, loading
from tafs.models.adapters import Adapter
from tafs.rewards.metrics import METRICS
from tafs.runtime import checkpoint, gpus, memory, receipts
from tafs.runtime.receipts import Needs
from tafs.runtime.run_dir import BASE, RunDir

NAMED = 12  # characters of a digest in the names of folders


@dataclass(frozen=True)
class Target:
    """The model that is judged.

    A model that can be trained, and a folder, are sampled by their backbone as the protocol says. A
    model that is only compared is called as published, with its own pipeline and steps.
    """

    name: str
    title: str
    files: Mapping[str, str]  # SHA-256 by resource or file
    settings: Mapping[str, JsonValue]
    random_weights: tuple[str, ...]
    published_steps: int | None
    load: Callable[[], Any]  # a Backbone or a ReferencePipeline; can be pickled

    @property
    def sha256(self) -> str:
        content = json.dumps([dict(self.files), dict(self.settings)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def target(given: str, protocol: Protocol) -> Target:
    """A model of the catalogue, or of a folder with a diffusers pipeline.

    Raises:
        ConfigError: there is no such model, or the protocol does not fit it; names both.
        FileNotFoundError, ValueError: the folder does not hold a pipeline that a backbone loads.
    """
    entry = catalog.read().get(given)
    if entry is None:
        if not Path(given).is_dir():
            raise ConfigError(
                f"--model: unknown model {given!r}, and not a pipeline's folder"
                f"{suggestion(given, list(catalog.read()))}"
            )
        return _folder(Path(given), protocol)
    content = protocol.content
    if entry.assets != content.assets:
        raise ConfigError(
            f"--model {given}: its assets are {entry.assets!r}, but those of protocol "
            f"{protocol.name} are {content.assets!r}; choose another protocol"
        )
    published, files = not entry.trainable, protocol.source.digests([given])
    return Target(
        name=given,
        title=entry.title,
        files=files,
        settings=entry.settings() if published else {"pipeline": entry.pipeline},
        random_weights=tuple(protocol.source.random([given])),
        published_steps=entry.steps if published else None,
        load=functools.partial(_known, given, files, protocol),
    )


def _known(name: str, files: Mapping[str, str], protocol: Protocol) -> Any:
    """Load a model of the catalogue."""
    entry, source = catalog.read()[name], protocol.source
    if not entry.trainable:
        return source.model(name, protocol.content.resolution)
    return _backbone(source.pipeline_folder(entry), entry.pipeline, files, protocol)


def _folder(folder: Path, protocol: Protocol) -> Target:
    index = folder / "model_index.json"
    kind = loading.pipeline_class(folder)
    if kind not in catalog.backbones():
        known = ", ".join(sorted(catalog.backbones()))
        raise ConfigError(f"{index}: no backbone samples a {kind!r} (available: {known})")
    parts = [part for part in json.loads(index.read_bytes()) if re.fullmatch(r"\w+", part)]
    inside = [file for part in parts for file in (folder / part).rglob("*") if file.is_file()]
    files = {f.relative_to(folder).as_posix(): sha256(f) for f in sorted({index, *inside})}
    return Target(
        name=re.sub(r"[^A-Za-z0-9_-]+", "-", folder.resolve().name)[:40],
        title=one_line(folder.resolve().name, 60),
        files=files,
        settings={"pipeline": kind},
        random_weights=(),
        published_steps=None,
        load=functools.partial(_backbone, folder, kind, files, protocol),
    )


def _backbone(folder: Path, kind: str, files: Mapping[str, str], protocol: Protocol) -> Any:
    guided = protocol.content.pipelines.get(kind)
    if guided is None:
        raise ConfigError(
            f"protocol {protocol.name}: pipelines: has no {kind!r}; add its guidance and "
            "max_sequence_length"
        )
    length = guided.max_sequence_length
    stored = protocol.source.embeddings(files, kind, length)
    try:
        return protocol.source.backbone(
            folder, protocol.content.resolution, guided.guidance, length, stored
        )
    except OSError as error:  # of diffusers; its text has many lines
        raise ValueError(f"{folder}: cannot be loaded ({one_line(str(error))})") from None


def label_of(adapter: Path) -> str:
    """What tables call an adapter: the name of its file or folder."""
    path = adapter.resolve()
    return one_line(path.stem if path.suffix == ".safetensors" else path.name, 60)


@dataclass
class Judged:
    """A judged model and its base model, which are the same without an adapter."""

    protocol: Protocol
    target: Target
    adapter: Adapter | None
    results: Path

    def needs(self, adapted: bool) -> Needs:
        """What the scores depend on."""
        found: dict[str, JsonValue] = {"numerics": needs.NUMERICS, "protocol": self.protocol.sha256}
        found["model"] = self.target.sha256
        if adapted and self.adapter:
            found["adapter"] = self.adapter.sha256
        return found

    def run(self, adapted: bool) -> RunDir:
        """The folder of the adapted model's scores, or of its base model's."""
        parts = [self.target.name, self.protocol.sha256[:NAMED], self.target.sha256[:NAMED]]
        if adapted and self.adapter:
            name = ".".join(["adapter", *parts, self.adapter.sha256[:NAMED]])
        else:
            name = ".".join([BASE, *parts])
        return RunDir(self.results / "evaluations" / "runs" / name)

    @functools.cached_property
    def label(self) -> str:
        """What tables call the judged model."""
        return self.target.title if self.adapter is None else label_of(self.adapter.path)

    @property
    def runs(self) -> list[RunDir]:
        """The base model's, and the adapted model's if there is an adapter."""
        return [self.run(adapted) for adapted in (False, True)[: 2 if self.adapter else 1]]


def judge(
    given: str,
    protocol: Protocol,
    results: Path,
    adapter: Path | None = None,
    processes: int | None = None,
) -> Judged:
    """Score a model and, with an adapter, its base model, unless their scores exist already.

    Args:
        given: the name of a model of the catalogue, or a folder with a diffusers pipeline.
        results: the folder under which scores are kept.
        adapter: a LoRA adapter, see `adapters.read`; None: the model itself is judged.
        processes: that share the images, with a GPU each; they decide no result. None: one for each
            visible GPU, or one on a CPU.

    Raises:
        ValueError, FileNotFoundError: wrong input; one line that names it.
        RunFailed, ToBeContinued: as for `evaluate.judge`.
    """
    content = None if adapter is None else adapters.read(adapter)
    found = Judged(protocol, target(given, protocol), content, results)
    if content is not None:
        print(f"alpha: {content.alpha}", flush=True)
    if protocol.served and not os.environ.get("TAFS_SERVER"):
        raise ConfigError(
            f"protocol {protocol.name}: metrics.{protocol.served[0]}: a server computes it; give a "
            "--scale whose evaluation.server or evaluation.judges starts one"
        )
    stale = [
        adapted
        for adapted in (False, True)[: len(found.runs)]
        if not _done(found.run(adapted), "evaluate", found.needs(adapted))
    ]
    unserved = [run for run in found.runs if protocol.served and not _is_served(run)]
    count = processes or 1
    if (stale or unserved) and protocol.source.settings.device == "cuda":
        count = gpus.claim(processes if stale else 1)
    with memory.reported("use a larger GPU"):
        for adapted in stale:
            _score(found, adapted, count)
    for run in found.runs if protocol.served else ():
        if not _is_served(run):
            served.score_served(run)
        run.images.unlink(missing_ok=True)
    return found


def _score(found: Judged, adapted: bool, processes: int) -> None:
    """Score the adapted model or its base model."""
    protocol, run, needed = found.protocol, found.run(adapted), found.needs(adapted)
    own = [name for name in protocol.metrics if name not in protocol.served]
    given = None if found.adapter is None else (found.adapter.path, found.adapter.sha256)
    to = run.adapter if adapted and given else None
    make = functools.partial(_local, protocol, found.target, own, given, to)

    def attempt() -> None:
        """With models of its own: their memory is free after it."""
        with scoring.scorer(make, processes) as scorer:
            judge_run(run, needed, scorer, own, seeds=protocol.seeds)

    _describe(found, run, adapted)
    with run.alone("evaluate"):
        while not _done(run, "evaluate", needed):  # by another process
            try:
                attempt()
            except memory.Reduced as reduced:
                print(reduced, flush=True)
            gc.collect()
            torch.cuda.empty_cache()
        if not protocol.served:
            checkpoint.clear(run.eval_state)


def _local(
    protocol: Protocol,
    target: Target,
    metrics: Sequence[str],
    adapter: tuple[Path, str] | None,
    to: Path | None,
) -> scoring.Local:
    """The metrics and the model in this process.

    Args:
        adapter: its path and SHA-256; refused here, before hours of work for the base model.
        to: where the converted adapter is written; None: the base model is judged.
    """
    loading.quiet()
    rewards = verified_rewards(protocol.source, metrics)
    records = [METRICS[name].record() for name in protocol.served]
    protocol.check_versions([*(reward.record() for reward in rewards.rewards), *records])
    model = target.load()
    if isinstance(model, Backbone):
        model.waiting = rewards.networks
    if adapter is not None:
        path, digest = adapter
        content = adapters.read(path)
        if content.sha256 != digest:
            raise ValueError(f"{path}: has changed since the evaluation began; start it again")
        converted = adapters.convert(content, model.pipeline)
        if to is not None:
            adapters.write(converted, to)
            model.load_adapter(to)
    return scoring.Local(rewards, lambda _: model)


def _describe(found: Judged, run: RunDir, adapted: bool) -> None:
    """Write run.json and evaluation.json, which the other rooms read."""
    protocol, chosen = found.protocol, found.target
    content = protocol.content
    evaluation = protocol.eval_spec(chosen.published_steps)
    spec = RunSpec(
        name=run.name,
        variant=BASE,
        method=BASE,  # nothing is known about its training
        title=found.label if adapted else chosen.title,
        task="",
        prompts=content.prompts,
        prompt_files=prompt_set(content.prompts).files,
        backbone=chosen.name,
        model=dict(chosen.settings),
        seed=0,
        scale=f"protocol {protocol.name}",
        assets=protocol.source.settings,
        resolution=content.resolution,
        sampler=evaluation.settings[0].sampler,
        weights=dict(chosen.files),
        random_weights=chosen.random_weights,
    )
    atomic_text(run.folder / "run.json", spec.to_json())
    atomic_text(run.folder / "evaluation.json", evaluation.to_json())


def _is_served(run: RunDir) -> bool:
    """Whether a server has scored the run's present images."""
    described = (run.folder / "run.json").is_file()
    return described and _done(run, "score_served", served.needs_of(run))


def _done(run: RunDir, stage: str, own: Needs) -> bool:
    receipt = receipts.read(run.folder, stage)
    return receipt is not None and receipt.needs == own and not receipt.missing(run.folder)
