"""What the Snakefile needs to know: the files, inputs and resources of every rule."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, compress
from pathlib import Path
from typing import Any

from tafs import experiment
from tafs.assets import cache, sources
from tafs.assets.sources import AssetSource
from tafs.experiment import Plan, looks, needs
from tafs.experiment.schema import Scale
from tafs.experiment.specs import EvalSpec, RunSpec
from tafs.models import catalog
from tafs.orchestration import host_memory
from tafs.runtime import gpus
from tafs.runtime.run_dir import STAGES

CPUS_PER_GPU = 8  # for decoding, writing PNG files and the processes of a server


@dataclass(frozen=True)
class Job:
    """A job of the graph."""

    rule: str
    target: str = ""  # the run or the resource; "" for jobs over all runs


class Graph:
    """The rules' view of a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.root = str(plan.root)
        self.results = plan.config.results
        budget = plan.budget
        # With the runs that only `snakemake decide` adds.
        self.runs: dict[str, RunSpec] = {**(budget.runs if budget else {}), **plan.runs}
        self.evaluations: dict[str, EvalSpec] = {
            **(budget.evaluations if budget else {}),
            **plan.evaluations,
        }
        self.looks = [f"look_{n + 1}" for n in range(len(plan.decide.seeds if plan.decide else ()))]

    @property
    def scale(self) -> Scale:
        return self.plan.config.active

    @cached_property
    def source(self) -> AssetSource:
        return sources.of(next(iter(self.plan.runs.values())).assets)

    def folder(self, run: str) -> str:
        return f"{self.root}/runs/{run}"

    @cached_property
    def tables(self) -> list[str]:
        return [table.name for table in self.plan.tables]

    @cached_property
    def figures(self) -> list[str]:
        return [name for table in self.plan.tables for name in table.figures.values()]

    def output(self, folder: str, names: Sequence[str], formats: Sequence[str]) -> list[str]:
        """The files of tables or figures."""
        return [f"{self.root}/{folder}/{name}.{suffix}" for name in names for suffix in formats]

    @property
    def images(self) -> list[str]:
        """The images that a server scores later, as a pattern of `run`."""
        return [f"{self.folder('{run}')}/images.json"] if self.scale.evaluation.served else []

    @property
    def searched_methods(self) -> list[str]:
        """The methods of the hyperparameter search."""
        return self.plan.searched_methods

    @cached_property
    def stages(self) -> dict[str, tuple[str, ...]]:
        """The stages of each run, in the order of STAGES."""
        correlated = {
            run for table in self.plan.tables if table.kind == "correlation" for run in table.runs
        }
        found = {}
        for name, run in self.runs.items():
            evaluation = self.evaluations[name]
            evaluated = bool(evaluation.settings)
            has = (run.trained, evaluated, name in correlated, evaluated and evaluation.served)
            found[name] = tuple(compress(STAGES, has))
        return found

    def jobs(self) -> Iterator[Job]:
        """All jobs of `snakemake all`, finished or not."""
        yield from self._jobs_of(self.plan.runs)
        yield from map(Job, ("report_spec", "compare", "track", "all"))

    def decide_jobs(self) -> Iterator[Job]:
        """All jobs of `snakemake decide` if every claim stays open to the last look."""
        if self.plan.decide:
            tables = self.plan.decide.tables
            yield from self._jobs_of(dict.fromkeys(n for table in tables for n in table.runs))
            yield from map(Job, ("decide_spec", *self.looks, "decide"))

    def _jobs_of(self, runs: Iterable[str]) -> Iterator[Job]:
        """The jobs of runs, and what these wait for."""
        fetched = set(self.check_inputs) if self.reward_check else set()
        for name in runs:
            yield from self._run_jobs(name)
            for stage in self.stages[name]:
                fetched |= {*self.fetched(name, judging=stage != "train")}
        yield from (Job("fetch", Path(mark).name) for mark in sorted(fetched))
        if self.reward_check:
            yield Job("check_rewards")
        if self.base_check:
            yield Job("check_base")

    def _run_jobs(self, run: str) -> Iterator[Job]:
        stages = self.stages[run]
        yield Job("describe", run)
        judged = set(stages) - {"train"}
        if judged or (self.reward_check and run == self.check_run):
            yield Job("describe_evaluation", run)
        yield from (Job(stage, run) for stage in stages)

    def outputs(self, job: Job) -> list[str]:
        """The files that a job writes, without those that are deleted later."""
        names = {
            "describe": ("run.json",),
            "describe_evaluation": ("evaluation.json",),
            "train": ("adapter.safetensors", "journal.jsonl", "snapshots"),
            "evaluate": ("scores.parquet", "samples.safetensors", "samplers.json"),
            "trajectory_rewards": ("trajectory_rewards.parquet", "trajectories.safetensors"),
            "score_served": ("served_scores.parquet",),
            "fetch": (job.target,),
            "check_rewards": ("reward_check.json",),
            "check_base": ("base_check.json",),
            "report_spec": ("report_spec.json",),
            "decide_spec": ("decide_spec.json",),
            "track": ("tracked.html",),
        }
        match job.rule:
            case "all" | "decide":
                return []
            case look if look in self.looks and self.plan.decide:
                number = 1 + self.looks.index(look)
                file = looks.result(self.plan.root, self.plan.decide, number)
                last = [file.with_suffix(".md")] if look == self.looks[-1] else []
                return list(map(str, [file, *last]))
            case "compare":
                return [
                    *self.output("tables", self.tables, ["html", "csv", "md", "parquet", "tex"]),
                    *self.output("figures", self.figures, ["png", "pdf"]),
                    *self.output("provenance", self.tables, ["json"]),
                    *(f"{self.root}/claims.{suffix}" for suffix in ("md", "json")),
                    f"{self.root}/report",
                ]
            case "fetch":
                folder = f"{self.root}/resources"
            case _:
                folder = self.folder(job.target) if job.target else self.root
        return [f"{folder}/{name}" for name in names[job.rule]]

    def output_files(self, rule: str) -> list[str]:
        """The files of `outputs` of a job over all runs."""
        return self.outputs(Job(rule))

    @cached_property
    def finished(self) -> dict[Job, list[str]]:
        """The files of all runs that report and tracking read, by the job that writes them."""
        return self.finished_of(self.plan.runs)

    def finished_of(self, runs: Iterable[str]) -> dict[Job, list[str]]:
        """The files of runs that are read when all of their stages are done."""
        names = {
            "describe": ("run.json",),
            "describe_evaluation": ("evaluation.json",),
            "train": ("journal.jsonl",),
            "evaluate": ("scores.parquet", "samples.safetensors", "samplers.json"),
            "trajectory_rewards": ("trajectory_rewards.parquet", "trajectories.safetensors"),
            "score_served": ("served_scores.parquet",),
        }
        return {
            job: [f"{self.folder(job.target)}/{name}" for name in names[job.rule]]
            for job in chain.from_iterable(map(self._run_jobs, runs))
        }

    def inputs(self, job: Job) -> dict[Job, list[str]]:
        """The files that a job reads, by the job that writes them."""

        def of(run: str, rule: str, *names: str) -> dict[Job, list[str]]:
            return {Job(rule, run): [f"{self.folder(run)}/{name}" for name in names]}

        def described(run: str) -> dict[Job, list[str]]:
            evaluation = of(run, "describe_evaluation", "evaluation.json")
            return of(run, "describe", "run.json") | evaluation

        def marks(files: Iterable[str]) -> dict[Job, list[str]]:
            return {Job("fetch", Path(file).name): [file] for file in files}

        run = job.target
        check = {Job("check_rewards"): self.reward_check} if self.reward_check else {}
        match job.rule:
            case "train":
                base = {Job("check_base"): self.base_check} if self.base_check else {}
                return of(run, "describe", "run.json") | marks(self.fetched(run)) | base
            case "evaluate" | "trajectory_rewards":
                names = ("adapter.safetensors", "snapshots")
                trained = of(run, "train", *names) if self.runs[run].trained else {}
                return described(run) | trained | marks(self.fetched(run, judging=True)) | check
            case "score_served":
                images = of(run, "evaluate", "images.json")
                return described(run) | images | marks(self.served_inputs) | check
            case "check_rewards":
                return described(self.check_run) | marks(self.check_inputs)
            case "check_base" if self.plan.base_check:
                return self.finished_of(self.plan.base_check.runs)
            case "compare":
                return {(spec := Job("report_spec")): self.outputs(spec), **self.finished}
            case "track":
                return self.finished
            case look if look in self.looks:
                return self._look_inputs(look)
            case "decide" if self.looks:
                return {(last := Job(self.looks[-1])): self.outputs(last)}
            case "all":
                return {other: self.outputs(other) for other in (Job("compare"), Job("track"))}
            case _:
                return {}

    def _look_inputs(self, look: str) -> dict[Job, list[str]]:
        """What a look reads; which runs it needs is in the result of the look before."""
        spec, number = self.plan.decide, 1 + self.looks.index(look)
        if spec is None:
            return {}
        before = [Job("decide_spec"), *map(Job, self.looks[number - 2 : number - 1])]
        tables = looks.report_spec(self.plan.root, spec, number, self.plan.claims).tables
        runs = dict.fromkeys(name for table in tables for name in table.runs)
        return {**{job: self.outputs(job) for job in before}, **self.finished_of(runs)}

    def input_files(self, rule: str, run: str = "") -> list[str]:
        """All files of `inputs`."""
        return list(chain.from_iterable(self.inputs(Job(rule, run)).values()))

    def fetched(self, run: str, judging: bool = False) -> list[str]:
        """The marks of the resources that a run's training, or its evaluation, reads."""
        if self.scale.assets != "hub":
            return []
        spec = self.runs[run]
        names = [spec.backbone, *self._scorers(spec, judging)]
        return self._marks(sources.resources_of(names, [spec.prompts]))

    def _scorers(self, spec: RunSpec, judging: bool) -> tuple[str, ...]:
        """The rewards of a run's training, or the metrics that its evaluation computes itself."""
        if not judging:
            return tuple(spec.rewards)
        return self.source.metrics(spec.prompts, self.evaluations[spec.name].optional_metrics)

    def _marks(self, resources: Iterable[str]) -> list[str]:
        """The files that mark resources as downloaded and verified."""
        return [f"{self.root}/resources/{name}" for name in resources]

    @property
    def reward_check(self) -> list[str]:
        """The result of check_rewards, which every evaluation waits for."""
        return [f"{self.root}/reward_check.json"] if self.scale.assets == "hub" else []

    @property
    def base_check(self) -> list[str]:
        """The comparison of the base models with the paper, which every training waits for."""
        return [f"{self.root}/base_check.json"] if self.plan.base_check else []

    @property
    def check_run(self) -> str:
        """The run whose specs tell check_rewards where the rewards are."""
        return next(iter(self.plan.runs))

    @property
    def check_inputs(self) -> list[str]:
        """The marks of the resources of all metrics that the scale can compute."""
        return self._marks(sources.resources_of(self._checked))

    @property
    def _checked(self) -> list[str]:
        """The metrics that check_rewards computes."""
        judged = self.evaluations[self.check_run]
        return needs.checked_metrics(self.source, judged, served=True)

    @property
    def served_inputs(self) -> list[str]:
        """The marks of the resources of the metric that a server scores."""
        return self._marks(sources.resources_of([self.scale.evaluation.judge]))

    def text(self, job: Job) -> str:
        """The spec that a job writes to its file."""
        match job.rule:
            case "describe":
                return self.runs[job.target].to_json()
            case "describe_evaluation":
                return self.evaluations[job.target].to_json()
            case "decide_spec":
                return self.plan.decide.to_json() if self.plan.decide else ""
            case _:
                return self.plan.report.to_json()

    def locked(self, resource: str) -> str:
        """SHA-256 of a resource's entry in the lock file; a new one downloads it again."""
        lock = Path(self.scale.lock)
        return cache.digest(resource, lock) if lock.is_file() else ""

    @property
    def environment(self) -> str:
        """Environment variables of all jobs, as shell assignments.

        They do not change results, so they are not part of specs or rules. Jobs read downloaded
        files only; without HF_HUB_OFFLINE each look-up of a missing file would retry for long.
        """
        server = json.dumps(self.scale.evaluation.servers)
        text = f"HF_HUB_OFFLINE=1 TAFS_SERVER={shlex.quote(server)}"
        if self.device == "cuda":  # trainings on several machines claim no GPUs
            given = f"${{{gpus.FORMER_ALLOCATOR}-{gpus.EXPANDABLE}}}"
            text += f' {gpus.ALLOCATOR}="${{{gpus.ALLOCATOR}-{given}}}"'
        return text.replace("{", "{{").replace("}", "}}")  # Snakemake formats shell.prefix

    def resources(self, stage: str) -> dict[str, Any]:
        """Snakemake's resources of a stage; only training uses several nodes.

        They decide nothing about what runs again.
        """
        processes, nodes = self._spread(stage)

        def growing(wildcards: Any, attempt: int) -> int:
            memory = self.memory(Job(stage, getattr(wildcards, "run", "")))
            return memory * (1 + attempt) // 2  # half as much more with each attempt

        found: dict[str, Any] = {"mem_mb": growing}
        if stage == "train":
            found |= {"train_processes": processes, "train_nodes": nodes}
        if stage == "evaluate":
            found |= {"evaluate_processes": processes}
        if self.device == "cuda":
            gpus = processes // nodes
            # Without a number of nodes Slurm may spread the GPUs over several.
            found |= {"nodes": nodes, "cpus_per_gpu": CPUS_PER_GPU}
            # A profile's defaults for the jobs without GPUs do not apply.
            found |= {"cpus_per_task": 0, "tasks_per_gpu": 0}
            found |= {"gres": f"gpu:{gpus}"} if nodes > 1 else {"gpu": gpus}
        if nodes > 1:
            found |= {"mpi": "srun", "tasks": nodes}
        return found

    def _spread(self, stage: str) -> tuple[int, int]:
        """(processes, nodes) of a job of a stage."""
        return self.scale.processes_of(stage), self.scale.nodes if stage == "train" else 1

    def memory(self, job: Job) -> int:
        """MB of host memory that a job asks for on each of its nodes, at the first attempt.

        The scale's `memory_mb` for each process, or where it names none, what the process loads.

        Raises:
            ConfigError, ValueError: the size of a resource is unknown, or a file of sizes is
                damaged; names it.
        """
        processes, nodes = self._spread(job.rule)
        each = self.scale.memory_mb or self._memory_of_process(job)
        return each * processes // nodes

    def largest_memory(self) -> tuple[int, str]:
        """(MB of host memory, name) of the job of `snakemake all` that asks for most."""
        stages = (*STAGES, "check_rewards")
        asking = [job for job in self.jobs() if job.rule in stages]
        if not asking:  # a scale without experiments
            return 0, "no job"
        largest = max(asking, key=self.memory)
        return self.memory(largest), f"{largest.rule} {largest.target}".strip()

    def _memory_of_process(self, job: Job) -> int:
        if self.scale.assets != "hub":
            return host_memory.of_process(0)
        size = self.sizes.of
        match job.rule:
            case "train" | "evaluate" | "trajectory_rewards":
                spec = self.runs[job.target]
                scorers = self._scorers(spec, judging=job.rule != "train")
                model = size(sources.resources_of([spec.backbone]))
                return host_memory.of_process(
                    model + size(sources.resources_of(scorers)),
                    # Published weights have 16 bits or more.
                    widened=model if self.scale.dtype == "float32" else 0.0,
                    keeps_embeddings=catalog.read()[spec.backbone].trainable,
                )
            case "tune_method":  # trains and judges in one process
                trained = [name for name, run in self.runs.items() if run.trained]
                return max(self._memory_of_process(Job("evaluate", name)) for name in trained)
            case "check_rewards":
                checked, serves = sources.resources_of(self._checked), self.scale.evaluation.served
                return host_memory.of_process(size(checked), serves=serves)
            case _:
                judge = sources.resources_of([self.scale.evaluation.judge])
                return host_memory.of_process(size(judge), serves=True)

    @cached_property
    def sizes(self) -> host_memory.Sizes:
        """The sizes of all resources."""
        return host_memory.Sizes(Path(self.scale.lock))

    @property
    def device(self) -> str:
        """The type of the devices that jobs claim and that plans count, "cpu" or "cuda"."""
        return "cuda" if self.scale.device == "cuda" else "cpu"

    @property
    def group(self) -> str | None:
        """The group of evaluations, several of which share a Slurm job where they are short."""
        return "evaluations" if self.device == "cpu" else None


def read(
    overrides: Mapping[str, Any] | None = None,
    path: Path = Path("config.yaml"),
    gpu_memory: float | None = None,
) -> Graph:
    """The graph of config.yaml; see `experiment.load`.

    Raises:
        ConfigError: one line that names the file, the key and the remedy.
    """
    return Graph(experiment.load(overrides, path, gpu_memory))
