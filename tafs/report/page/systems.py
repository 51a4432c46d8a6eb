"""The systems of a report: one name, colour and identifier of each, in all views."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from tafs.report.figures import style
from tafs.report.results import Report, Result, System

Runs = tuple[str, ...]  # the names of a system's runs, by which it is found


def runs_of(system: System) -> Runs:
    return tuple(result.spec.name for result in system.results)


class Systems:
    """The distinct systems of all tables; those of tables with more figures come first."""

    def __init__(self, report: Report) -> None:
        # The methods' own colours go to the tables that the figures show.
        tables = sorted(report.tables, key=lambda table: -len(table.spec.figures))
        found: dict[Runs, System] = {}
        for table in tables:
            for system in table.distinct:
                found.setdefault(runs_of(system), system)
        self.found: Mapping[Runs, System] = found

    @cached_property
    def keys(self) -> Mapping[Runs, str]:
        """The identifier of each system in links and in the page's data."""
        taken: dict[str, Runs] = {}
        for runs, system in self.found.items():
            spec = system.spec
            key = ".".join(filter(None, (spec.variant, spec.task or spec.prompts, spec.backbone)))
            if key in taken:  # the same method with other seeds
                key = ".".join([key, *(str(result.spec.seed) for result in system.results)])
            taken[key] = runs
        return {runs: key for key, runs in taken.items()}

    def key(self, system: System) -> str:
        return self.keys[runs_of(system)]

    @cached_property
    def names(self) -> Mapping[Runs, str]:
        """The title of each system, with what tells it from the first one of its title."""
        kinds = ("variant", "task", "backbone", "prompts")
        first: dict[str, System] = {}
        named = {}
        for runs, system in self.found.items():
            spec = system.spec
            main = first.setdefault(spec.title, system).spec
            apart = [getattr(spec, k) for k in kinds if getattr(spec, k) != getattr(main, k)]
            if spec.variant in apart:  # tafs_n_adv_2 of tafs_grpo: "n adv 2"
                shared = os.path.commonprefix([spec.variant, main.variant]).rpartition("_")
                apart[0] = spec.variant.removeprefix("".join(shared[:2]))
            if system is not first[spec.title] and not apart:
                apart = [f"seeds {', '.join(str(r.spec.seed) for r in system.results)}"]
            named[runs] = " · ".join(
                [spec.title, *(part.replace("_", " ") for part in apart if part)]
            )
        return named

    def name(self, system: System) -> str:
        return self.names[runs_of(system)]

    @cached_property
    def looks(self) -> Mapping[str, style.Look]:
        looks = style.looks(list(self.found.values()))
        return {self.key(system): look for system, look in looks.items()}

    @property
    def results(self) -> list[tuple[Result, str]]:
        """Every run once, with its system's identifier."""
        seen: dict[str, tuple[Result, str]] = {}
        for system in self.found.values():
            for result in system.results:
                seen.setdefault(result.spec.name, (result, self.key(system)))
        return list(seen.values())

    def record(self) -> dict[str, dict[str, Any]]:
        """What the page's scripts know of each system."""
        record = {}
        for runs, system in self.found.items():
            key, spec = self.keys[runs], system.spec
            record[key] = {
                "name": self.names[runs],
                "colour": self.looks[key].colour,
                "dash": {"-": "", "--": "5 3", "-.": "6 3 1 3", ":": "1 3"}[self.looks[key].line],
                "variant": spec.variant,
                "task": spec.task,
                "model": spec.backbone,
                "prompts": spec.prompts,
                "trained": spec.trained,
                "rewards": sorted(spec.rewards),
                "sampler": spec.sampler,
                "runs": list(runs),
            }
        return record
