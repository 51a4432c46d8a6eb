"""A method's search: its study, which is continued where it was stopped, and its files."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import FrozenTrial, TrialState

from tafs.common import errors, files, locks, seeding
from tafs.common.yaml_files import ConfigError
from tafs.experiment import Plan, RunSpec, needs
from tafs.experiment.schema import Range, Tuning
from tafs.experiment.variants import Variants
from tafs.runtime import gpus, journal, receipts
from tafs.tracking import mlflow_mirror, search_mirror
from tafs.tuning import measure
from tafs.tuning.space import Space

STATES = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}


@dataclass(frozen=True)
class Search:
    """The search for one method's hyperparameters; `search_of` makes it."""

    plan: Plan
    tuning: Tuning
    first: RunSpec  # a run of the tables, with the present values
    space: Space

    @property
    def variant(self) -> str:
        return self.first.variant

    @cached_property
    def folder(self) -> Path:
        return self.plan.root / "tuning"

    def _seed(self, stream: str, number: int) -> int:
        """Of a trial's draws; independent of the trials before it."""
        name = f"{stream} {self.variant}"
        return seeding.generator(self.tuning.seeds[0], name, number).initial_seed() % 2**32

    def spec(self, number: int, seed: int, values: Mapping[str, Any]) -> RunSpec:
        """The training of a trial with one seed."""
        name = f"{self.variant}.{self.first.task}.{self.first.backbone}.trial-{number}.{seed}"
        changes = {
            "name": name,
            "seed": seed,
            "hyperparameters": {**self.first.hyperparameters, **values},
            "snapshots": (),
        }
        return self.first.model_copy(update=changes)

    # -- the study ---------------------------------------------------------------------------------

    def needs(self) -> dict[str, Any]:
        """What the trials depend on besides their number; another study begins if it changes."""
        evaluation = self.plan.config.active.evaluation
        space = {
            key: searched.model_dump() if isinstance(searched, Range) else list(searched)
            for key, searched in self.space.searched.items()
        }
        return {
            **needs.training(self.spec(0, self.tuning.seeds[0], self.space.present)),
            "seeds": list(self.tuning.seeds),
            "space": space,
            "samplers": list(evaluation.samplers),
            "few_nfe": evaluation.few_nfe,
            "validation_prompts": measure.VALIDATION_PROMPTS,
        }

    @cached_property
    def storage(self) -> JournalStorage:
        """The method's file, which is created. The search's lock is held."""
        file = self.folder / f"{self.variant}.optuna.jsonl"
        # What a process that was killed may leave: an unfinished line, and Optuna's own lock.
        journal.cut_unfinished_line(file)
        Path(f"{file}.lock").unlink(missing_ok=True)
        return JournalStorage(JournalFileBackend(str(file)))

    @cached_property
    def study(self) -> optuna.Study:
        """The study with the present settings, which is created."""
        own = json.loads(json.dumps(self.needs()))
        name = receipts.fingerprint(own)[:16]
        known = self.storage.get_all_studies()
        if known and name not in [study.study_name for study in known]:
            changed = "; ".join(receipts.differences(known[-1].user_attrs.get("needs", {}), own))
            print(f"{self.variant}: a new search, since {changed}", flush=True)
        # A trial cannot be pruned before three have given the median.
        pruner = optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=0)
        study = optuna.create_study(
            storage=self.storage,
            study_name=name,
            direction="maximize",
            load_if_exists=True,
            pruner=pruner,
        )
        study.set_user_attr("needs", own)
        return study

    def base_scores(self) -> list[float]:
        """The base model's score with each seed."""
        kept = self.study.user_attrs.get("base_scores")
        if kept is None:
            evaluation = self.plan.config.active.evaluation
            specs = [self.spec(0, seed, self.space.present) for seed in self.tuning.seeds]
            kept = [measure.score(spec, evaluation) for spec in specs]
            self.study.set_user_attr("base_scores", kept)
        return kept

    def trial(self, number: int) -> optuna.Trial:
        """The trial of this number: a stopped one as it was left, or the next one."""
        study = self.study
        study.sampler = optuna.samplers.TPESampler(
            n_startup_trials=1,  # the design's trials are the start
            multivariate=True,
            constant_liar=False,  # one trial runs at a time
            seed=self._seed("trial", number),
        )
        trials = study.get_trials(deepcopy=False)
        for waiting in self.space.design(self._seed("design", 0))[len(trials) : self.tuning.trials]:
            study.enqueue_trial(waiting)
        if number < len(trials) and trials[number].state == TrialState.RUNNING:
            storage = self.storage
            identity = storage.get_study_id_from_name(study.study_name)
            stopped = storage.get_trial_id_from_study_id_trial_number(identity, number)
            return optuna.trial.Trial(study, stopped)
        return study.ask()

    def run(self) -> pd.DataFrame:
        """Run the trials that are not finished; return the table of all."""
        waiting = f"{self.variant}: waits for "
        with locks.held(
            self.folder / ".locks" / self.variant,
            lambda holder: print(f"{waiting}{holder}", file=sys.stderr, flush=True),
        ):
            base = self.base_scores()
            for number in range(self.tuning.trials):
                known = self.study.get_trials(deepcopy=False)
                if number < len(known) and known[number].state.is_finished():
                    continue
                self._run(self.trial(number), base)
                row = self.rows()[-1]
                print(f"{self.variant} {number + 1}/{self.tuning.trials} {row}", flush=True)
                self.track()
            # The table comes last, because it counts as a finished search.
            files.atomic_text(self.folder / f"{self.variant}.best.yaml", self.best())
            table = pd.DataFrame(self.rows(), columns=self.columns)
            files.atomic_text(self.folder / f"{self.variant}.csv", table.to_csv(index=False))
            self.track()
        print(self.best(), end="", flush=True)
        return table

    def _run(self, trial: optuna.Trial, base: Sequence[float]) -> None:
        """Run a trial to its end, or to the point where it is pruned or fails."""
        evaluation = self.plan.config.active.evaluation
        values = self.space.values(trial)
        trial.set_user_attr("values", values)
        gains = []
        for step, seed in enumerate(self.tuning.seeds):
            found = trial.user_attrs.get(str(seed))
            if found is None:
                if step and trial.should_prune():
                    self.study.tell(trial, state=TrialState.PRUNED)
                    return
                try:
                    spec = self.spec(trial.number, seed, values)
                    found = measure.measure(spec, self.folder, evaluation, base[step])
                except errors.RunFailed as error:
                    trial.set_user_attr("failure", str(error))
                    self.study.tell(trial, state=TrialState.FAIL)
                    print(f"{self.variant}: trial {trial.number} failed: {error}", file=sys.stderr)
                    return
                trial.set_user_attr(str(seed), found)
            gains.append(found["gain"])
            if step not in self.study.trials[trial.number].intermediate_values:
                trial.report(statistics.fmean(gains), step)
        self.study.tell(trial, measure.objective(gains))

    # -- what is shown -----------------------------------------------------------------------------

    @property
    def columns(self) -> list[str]:
        gains = [f"gain_{seed}" for seed in self.tuning.seeds]
        rest = ["mean", "se", "objective", "base_score", "iteration_s"]
        return ["number", "state", *self.space.searched, *gains, *rest]

    def finished(self) -> list[FrozenTrial]:
        trials = self.study.get_trials(deepcopy=False)[: self.tuning.trials]
        return [trial for trial in trials if trial.state.is_finished()]

    def rows(self) -> list[dict[str, Any]]:
        """A row per finished trial; what a trial does not have is left out."""
        return [dict(self._row(trial)) for trial in self.finished()]

    def _row(self, trial: FrozenTrial) -> Iterator[tuple[str, Any]]:
        yield from {"number": trial.number, "state": STATES[trial.state]}.items()
        yield from trial.user_attrs["values"].items()
        found = {seed: trial.user_attrs.get(str(seed)) for seed in self.tuning.seeds}
        measured = {seed: values for seed, values in found.items() if values is not None}
        gains = [values["gain"] for values in measured.values()]
        yield from ((f"gain_{seed}", round(values["gain"], 5)) for seed, values in measured.items())
        yield "base_score", round(statistics.fmean(self.base_scores()), 5)
        if gains:
            yield "mean", round(statistics.fmean(gains), 5)
            times = [values["iteration_s"] for values in measured.values()]
            yield "iteration_s", round(statistics.median(times), 3)
        if len(gains) > 1:
            yield "se", round(measure.standard_error(gains), 5)
        if trial.state == TrialState.COMPLETE:
            yield "objective", round(measure.objective(gains), 5)

    def best(self) -> str:
        """What to enter in config.yaml, as YAML with a comment."""
        complete = [row for row in self.rows() if row["state"] == "complete"]
        if not complete:
            return f"# {self.variant}: none of {self.tuning.trials} trials was completed.\n"
        best = max(complete, key=lambda row: row["objective"])
        values = ", ".join(f"{key}: {json.dumps(best[key])}" for key in self.space.searched)
        place = f"scales.{self.plan.config.scale}.methods"
        lines = [
            f"# To enter in config.yaml, {place}: trial {best['number']} of {self.tuning.trials}, "
            f"objective {best['objective']:g} (mean gain {best['mean']:g}, standard error "
            f"{best['se']:g})."
        ]
        if best["number"] == 0:
            lines.append("# These are the present values.")
        if best["objective"] <= 0:
            lines.append("# No trial beats the base model.")
        return "\n".join([*lines, f"{self.variant}: {{{values}}}"]) + "\n"

    def track(self) -> None:
        """Copy the finished trials to MLflow; a failure is reported and stops nothing."""
        try:
            search_mirror.sync(
                Path(self.plan.config.results) / "mlflow",
                search_mirror.Search(
                    name=f"{self.plan.config.scale}.{self.variant}",
                    key=self.study.study_name,
                    scale=self.plan.config.scale,
                    settings={
                        "task": self.first.task,
                        "trials": self.tuning.trials,
                        **self.needs(),
                    },
                    trials=[self._tracked(trial) for trial in self.finished()],
                    complete=len(self.finished()) == self.tuning.trials,
                ),
            )
        except Exception as error:  # MLflow passes on the errors of several packages
            print(f"tracking: {mlflow_mirror.brief(error, 500)}", file=sys.stderr, flush=True)

    def _tracked(self, trial: FrozenTrial) -> search_mirror.Trial:
        row = dict(self._row(trial))
        metrics = self.columns[2 + len(self.space.searched) :]
        started, ended = (
            int(time.timestamp() * 1000) if time else 0
            for time in (trial.datetime_start, trial.datetime_complete)
        )
        return search_mirror.Trial(
            number=trial.number,
            state=STATES[trial.state],
            parameters={key: row[key] for key in self.space.searched},
            metrics={key: row[key] for key in metrics if key in row},
            started_ms=started,
            ended_ms=ended,
            failure=trial.user_attrs.get("failure", ""),
        )


def search_of(plan: Plan, tuning: Tuning, variant: str) -> Search:
    """The search of a method.

    Raises:
        ConfigError: the scale does not train the method, or a present value is not in the space;
            names the key.
    """
    first = plan.searched_run(variant)
    if first is None:
        tasks = " or ".join(map(repr, tuning.tasks))
        raise ConfigError(
            f"tuning: scale {plan.config.scale!r} does not train {variant!r} on {tasks}; "
            "choose another scale"
        )
    space = Space(variant, tuning.space(variant), Variants(plan.config).method(variant))
    return Search(plan, tuning, first, space)


def search(plan: Plan, only: str | None = None) -> None:
    """Search the hyperparameters of all methods that the scale trains, or of one."""
    tuning = plan.config.tuning
    if tuning is None:
        raise ConfigError("config.yaml: missing key 'tuning'")
    if only is not None and only not in tuning.methods:
        raise ConfigError(
            f"--only: {only!r} is not searched (available: {', '.join(tuning.methods)})"
        )
    chosen = plan.searched_methods if only is None else [only]
    searches = [search_of(plan, tuning, variant) for variant in chosen]
    if plan.config.active.device == "cuda":
        gpus.claim(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for one in searches:
        one.run()
