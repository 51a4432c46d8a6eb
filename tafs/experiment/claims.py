"""claims.yaml: the paper's claims as predicates over the rows of tables.

`check` refuses a claim about a table, row or metric that does not exist before anything runs;
tafs.report.claims assesses the claims from the finished runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tafs.common.yaml_files import ConfigError, first_problem, load_yaml, suggestion
from tafs.experiment.schema import Config, Name, Text
from tafs.experiment.specs import RowSpec, TableSpec
from tafs.rewards.metrics import METRICS
from tafs.runtime.run_dir import BASE

CLAIMS = Path("claims.yaml")  # beside config.yaml


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RowName(_Strict):
    """A row of the experiment's table; fields that are None match any row."""

    method: Name
    task: Name | None = None
    role: Name | None = None  # of the model
    nfe: int | Literal["few", "full"] | None = None  # few and full are the scale's

    def __str__(self) -> str:
        named = self.model_dump(exclude_none=True).items()
        return ", ".join(f"{key} {value}" for key, value in named)

    def among(self, table: TableSpec) -> list[RowSpec]:
        """The table's rows of this name."""
        wanted = self.model_dump(exclude_none=True)
        wanted["variant"] = wanted.pop("method")

        def fits(row: RowSpec) -> bool:
            steps = {"few": table.few_nfe, "full": row.full_steps}
            meant = {k: steps.get(v, v) if k == "nfe" else v for k, v in wanted.items()}
            return all(getattr(row, key) == value for key, value in meant.items())

        return [row for row in table.rows if fits(row)]


Metrics = Annotated[tuple[Name, ...], Field(min_length=1)]
Positive = Annotated[float, Field(gt=0)]


class Predicate(_Strict):
    """What a claim says about rows."""

    @property
    def pairs(self) -> Sequence[tuple[RowName, RowName]]:
        """The rows that are compared with each other."""
        return ()

    @property
    def named(self) -> Sequence[RowName]:
        """Every row that must be in the table."""
        return [name for pair in self.pairs for name in pair]


class Differences(Predicate):
    """Differences of metrics between the first and the second row of every pair."""

    metrics: Metrics

    @property
    def margins(self) -> tuple[float, float]:
        """In standard deviations of the prompts of the second row: the claim is supported if the
        difference is above the first of these, and contradicted if it is below the second."""
        raise NotImplementedError


class _Advantage(Differences):
    # An advantage of less counts as none, so that equal systems are a contradiction.
    negligible: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1

    @property
    def margins(self) -> tuple[float, float]:
        return 0.0, self.negligible


class Better(_Advantage):
    row: RowName
    than: Annotated[tuple[RowName, ...], Field(min_length=1)]

    @property
    def pairs(self) -> Sequence[tuple[RowName, RowName]]:
        return [(self.row, other) for other in self.than]


class Rising(_Advantage):
    rows: Annotated[tuple[RowName, ...], Field(min_length=2)]

    @property
    def pairs(self) -> Sequence[tuple[RowName, RowName]]:
        return list(zip(self.rows[1:], self.rows[:-1], strict=True))


class _TwoRows(Predicate):
    row: RowName
    than: RowName

    @property
    def pairs(self) -> Sequence[tuple[RowName, RowName]]:
        return [(self.row, self.than)]


class Holds(Differences, _TwoRows):
    margin: Positive  # standard deviations of the prompts of `than`

    @property
    def margins(self) -> tuple[float, float]:
        return -self.margin, -self.margin


class Faster(_TwoRows):
    """The ratio of median iteration times."""

    share: Positive  # of the other's iteration time, as published
    within: Positive  # of that share


class Correlated(Predicate):
    """Pearson's r of an earlier image's reward with the final image's, of a base model."""

    role: Name | None = None  # of the base model; None: the only one
    step: Annotated[int, Field(ge=1)]  # of the earlier image
    above: Annotated[float, Field(ge=-1, lt=1)]
    metrics: Metrics

    @property
    def named(self) -> Sequence[RowName]:
        return [RowName(method=BASE, role=self.role)]


class Claim(_Strict):
    id: Name
    claim: Text
    source: Text
    experiment: Name
    better: Better | None = None
    rising: Rising | None = None
    holds: Holds | None = None
    faster: Faster | None = None
    correlated: Correlated | None = None

    @property
    def tests(self) -> dict[str, Predicate]:
        """What is tested, by kind; `read` refuses a claim without exactly one."""
        return {kind: test for kind in KINDS if (test := getattr(self, kind))}

    @property
    def methods(self) -> set[str]:
        """The methods that it compares."""
        return {name.method for test in self.tests.values() for pair in test.pairs for name in pair}

    @property
    def trained(self) -> bool:
        """Whether more training seeds tell more about it."""
        return bool(self.methods - {BASE})

    @property
    def metrics(self) -> set[str]:
        return {m for test in self.tests.values() for m in getattr(test, "metrics", ())}

    def fits(self, table: TableSpec, assets: str) -> bool:
        """Whether a table has the claim's rows.

        Published times are of the paper's models; the embedded ones have other shares of the work.
        """
        excluded = self.methods & set(table.excluded_methods)
        timed_elsewhere = self.faster is not None and assets == "shapes"
        return self.experiment == table.name and not excluded and not timed_elsewhere


KINDS = ("better", "rising", "holds", "faster", "correlated")


def read(path: Path) -> list[Claim]:
    """The claims of a file.

    Raises:
        ConfigError: one line that names the file, the claim and the key.
    """
    found: dict[str, Claim] = {}
    for number, raw in enumerate(load_yaml(path, list), start=1):
        try:
            claim = Claim.model_validate(raw)
        except ValidationError as error:
            name = raw.get("id", number) if isinstance(raw, dict) else number
            problem = first_problem(error, Claim)
            raise ConfigError(f"{path}: claim {name}: {problem}") from None
        if len(claim.tests) != 1:
            said = " and ".join(claim.tests) or "nothing"
            raise ConfigError(
                f"{path}: claim {claim.id}: tests {said}; give exactly one of {', '.join(KINDS)}"
            )
        if claim.id in found:
            raise ConfigError(f"{path}: claim {claim.id}: its id is given twice; change one")
        found[claim.id] = claim
    return list(found.values())


def check(claims: Sequence[Claim], config: Config, tables: Sequence[TableSpec], path: Path) -> None:
    """Refuse claims about tables, rows or metrics that do not exist.

    Args:
        tables: of the active scale; a claim about another table is checked by names only, because
            it is not tested at this scale.
        path: the file of the claims.

    Raises:
        ConfigError: one line that names the file, the claim and the key.
    """
    built = {table.name: table for table in tables}
    for claim in claims:
        for problem in _problems(claim, config, built.get(claim.experiment)):
            raise ConfigError(f"{path}: claim {claim.id}: {problem}")


def _problems(claim: Claim, config: Config, table: TableSpec | None) -> Iterator[str]:
    ((kind, test),) = claim.tests.items()
    where = claim.experiment
    if where not in config.experiments:
        yield f"experiment: unknown table {where!r}{suggestion(where, list(config.experiments))}"
        return
    experiment = config.experiments[where]
    correlation = isinstance(test, Correlated)
    if correlation != (experiment.kind == "correlation"):
        needed = "only" if correlation else "not"
        yield f"{kind}: can {needed} be tested on a table of kind 'correlation', unlike {where}"
    for metric in sorted(claim.metrics - {*METRICS}):
        yield f"{kind}.metrics: unknown metric {metric!r}{suggestion(metric, list(METRICS))}"
    known = {
        "method": [*experiment.methods, BASE],
        "task": experiment.tasks,
        "role": experiment.model_roles,
    }
    for name in test.named:
        for key, names in known.items():
            value = getattr(name, key)
            if value is not None and value not in names:
                yield f"{kind}: {where} has no {key} {value!r}{suggestion(value, list(names))}"
    if table is None or claim.methods & set(table.excluded_methods):
        return
    for name in test.named:
        if (count := len(name.among(table))) != 1:
            yield f"{kind}: {count} rows of {where} have {name}; name one row of it"
    if isinstance(test, Correlated) and test.step > table.few_nfe:
        steps = f"the trajectories' {table.few_nfe} steps (correlation_nfe)"
        yield f"{kind}.step: {test.step} is above {steps}; lower it"
