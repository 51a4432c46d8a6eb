"""The paper's claims as predicates over the runs of tables.

A claim is a family of comparisons, each with an effect and an interval; their p-values are
corrected together (Holm, 1979). A claim is reproduced if every comparison supports it, not
reproduced if one contradicts it, and otherwise undecided. Models trained with one seed decide
nothing, because the effect of another seed is unknown.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tafs.common.yaml_files import ConfigError, first_problem, load_yaml
from tafs.experiment.schema import Name, Text
from tafs.experiment.specs import RowSpec
from tafs.report import stats
from tafs.report.formats import MARKDOWN, escape
from tafs.report.results import LoadedTable, System, check_paired, step_correlation
from tafs.report.stats import Estimate
from tafs.report.tables import Row
from tafs.rewards.metrics import METRICS
from tafs.runtime.run_dir import BASE

REPRODUCED, NOT_REPRODUCED, UNDECIDED = "reproduced", "not reproduced", "undecided"
NOT_TESTED = "not tested"  # the scale does not build the claim's table


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RowName(_Strict):
    """A row of the experiment's table; fields that are None match any row."""

    method: Name
    task: Name | None = None
    role: Name | None = None  # of the model
    nfe: int | Literal["few", "full"] | None = None  # few and full are the scale's


class Better(_Strict):
    row: RowName
    than: Annotated[tuple[RowName, ...], Field(min_length=1)]
    metrics: Annotated[tuple[Name, ...], Field(min_length=1)]


class Rising(_Strict):
    rows: Annotated[tuple[RowName, ...], Field(min_length=2)]
    metrics: Annotated[tuple[Name, ...], Field(min_length=1)]


class Holds(_Strict):
    row: RowName
    than: RowName
    metrics: Annotated[tuple[Name, ...], Field(min_length=1)]
    margin: Annotated[float, Field(gt=0)]  # standard deviations of the prompts of `than`


class Faster(_Strict):
    row: RowName
    than: RowName
    share: Annotated[float, Field(gt=0)]  # of the other's iteration time, as published
    within: Annotated[float, Field(gt=0)]  # of that share


class Correlated(_Strict):
    """Pearson's r of an earlier image's reward with the final image's, of a base model."""

    role: Name | None = None  # of the base model; None: the only one
    step: Annotated[int, Field(ge=1)]  # of the earlier image
    above: Annotated[float, Field(ge=-1, lt=1)]
    metrics: Annotated[tuple[Name, ...], Field(min_length=1)]


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
    def methods(self) -> set[str]:
        """The methods that it compares."""

        def named(value: Any) -> Iterator[str]:
            if isinstance(value, RowName):
                yield value.method
            elif isinstance(value, BaseModel):
                for field in type(value).model_fields:
                    yield from named(getattr(value, field))
            elif isinstance(value, tuple):
                for part in value:
                    yield from named(part)

        return set(named(self))


KINDS = ("better", "rising", "holds", "faster", "correlated")


class Comparison(NamedTuple):
    """One comparison of a claim; `sign` is 1 for support, -1 for contradiction, 0 for neither."""

    what: str
    estimate: Estimate
    p_value: float  # adjusted for the claim's comparisons
    sign: int


class Verdict(NamedTuple):
    claim: Claim
    verdict: str
    comparisons: tuple[Comparison, ...]


def read(path: Path) -> list[Claim]:
    """The claims of a file.

    Raises:
        ConfigError: one line that names the file, the claim and the key.
    """
    found = []
    for number, raw in enumerate(load_yaml(path, list), start=1):
        try:
            claim = Claim.model_validate(raw)
        except ValidationError as error:
            name = raw.get("id", number) if isinstance(raw, dict) else number
            problem = first_problem(error, Claim)
            raise ConfigError(f"{path}: claim {name}: {problem}") from None
        kinds = [k for k in KINDS if getattr(claim, k)]
        if len(kinds) != 1:
            said = " and ".join(kinds) or "nothing"
            raise ConfigError(
                f"{path}: claim {claim.id}: tests {said}; give exactly one of {', '.join(KINDS)}"
            )
        found.append(claim)
    return found


def assess_claim(claim: Claim, loaded: LoadedTable) -> Verdict:
    """The verdict on a claim from the runs of its experiment.

    Raises:
        ValueError: a row or a metric is missing; names it.
    """
    table = _Rows(claim, loaded)
    if claim.faster:
        return _assess_times(claim, claim.faster, table)
    if claim.correlated:
        return _assess_correlations(claim, claim.correlated, table)
    tested = list(_differences(claim, table))
    adjusted = stats.holm([estimate.p_value for _, estimate, _ in tested])
    comparisons = []
    for (what, estimate, sides), p_value in zip(tested, adjusted, strict=True):
        sure = p_value <= 1 - stats.LEVEL
        sign = int(np.sign(estimate.value)) if sure else 0
        if sides == 1:  # non-inferiority: only failing to reach the margin contradicts
            sign = 1 if sure and estimate.value > 0 else -1 if estimate.high < 0 else 0
        if estimate.n_seeds < 2:
            sign = 0
        comparisons.append(Comparison(what, estimate, p_value, sign))
    return Verdict(claim, _verdict(comparisons), tuple(comparisons))


class _Rows:
    """The rows of the claim's experiment, by the names that a claim uses."""

    def __init__(self, claim: Claim, loaded: LoadedTable) -> None:
        self.claim, self.loaded = claim, loaded

    def row(self, name: RowName) -> Row:
        """The one row of this name.

        Raises:
            ValueError: none or several rows have it; names the claim and the experiment.
        """
        wanted = {key: value for key, value in name.model_dump().items() if value is not None}
        wanted["variant"] = wanted.pop("method")
        few = self.loaded.spec.few_nfe

        def fits(row: RowSpec) -> bool:
            steps = {"few": few, "full": row.full_steps}
            meant = {k: steps.get(v, v) if k == "nfe" else v for k, v in wanted.items()}
            return all(getattr(row, key) == value for key, value in meant.items())

        found = [Row(row, system) for row, system in self.loaded.systems.items() if fits(row)]
        if len(found) != 1:
            said = ", ".join(f"{key} {value}" for key, value in wanted.items())
            raise ValueError(
                f"claim {self.claim.id}: {len(found)} rows of {self.claim.experiment} have {said}"
            )
        return found[0]

    def values(self, name: RowName, metric: str) -> tuple[System, stats.Array, str]:
        """(system, its scores on the reported scale with higher better, the row in words)."""
        row = self.row(name)
        said = f"{row.spec.label} at {row.spec.nfe} steps"
        if row.spec.iteration is not None:
            said += f" after {row.spec.iteration} iterations"
        return row.system, METRICS[metric].factor * row.quality(metric), said


def _differences(claim: Claim, table: _Rows) -> Iterator[tuple[str, Estimate, int]]:
    """(what, difference, 2 for a two-sided test and 1 for non-inferiority) of every comparison."""
    pairs: list[tuple[RowName, RowName]] = []
    metrics: tuple[str, ...] = ()
    margin = 0.0
    if claim.better:
        pairs = [(claim.better.row, other) for other in claim.better.than]
        metrics = claim.better.metrics
    elif claim.rising:
        rows = claim.rising.rows
        pairs, metrics = list(zip(rows[1:], rows[:-1], strict=True)), claim.rising.metrics
    elif claim.holds:
        pairs, metrics = [(claim.holds.row, claim.holds.than)], claim.holds.metrics
        margin = claim.holds.margin
    for metric in metrics:
        if metric not in METRICS:
            known = ", ".join(METRICS)
            raise ValueError(f"claim {claim.id}: unknown metric {metric!r} (available: {known})")
        for one, other in pairs:
            (a, left, said), (b, right, than) = (table.values(n, metric) for n in (one, other))
            spread = float(np.nanstd(np.nanmean(right, axis=(0, 2))))
            tags = a.scores.tags
            check_paired(a.scores, b.scores)
            difference = stats.paired_difference(
                left + margin * spread,
                right,
                tags,
                same_seeds=[r.run.folder for r in a.results] == [r.run.folder for r in b.results],
                macro=METRICS[metric].macro,
            )
            # A base model is not trained, so it has no seeds to vary.
            seeds = min(
                len(s.results)
                for s in (a, b)
                if s.spec.trained or not (a.spec.trained or b.spec.trained)
            )
            difference = difference._replace(n_seeds=seeds)
            allowed = f" + {margin:g} sd" if margin else ""
            what = f"{METRICS[metric].title}: {said}{allowed} - {than}"
            yield what, difference, 1 if margin else 2


def _assess_correlations(claim: Claim, test: Correlated, table: _Rows) -> Verdict:
    """Reproduced if every interval lies above the threshold, not reproduced if one lies below."""
    base = table.row(RowName(method=BASE, role=test.role)).system
    comparisons = []
    for metric in test.metrics:
        r = step_correlation(base.results[0], metric, test.step)
        sign = 1 if r.low > test.above else -1 if r.high < test.above else 0
        what = (
            f"{METRICS[metric].title}: r of image {test.step} with the last (above {test.above:g})"
        )
        comparisons.append(Comparison(what, r, r.p_value, sign))
    return Verdict(claim, _verdict(comparisons), tuple(comparisons))


def _assess_times(claim: Claim, test: Faster, table: _Rows) -> Verdict:
    """The ratio of median iteration times; its interval resamples iterations."""
    times = [
        np.array([t for r in table.row(n).system.results for t in r.seconds()])
        for n in (test.row, test.than)
    ]
    rng = np.random.default_rng(0)
    draws = [
        np.median(t[rng.integers(len(t), size=(stats.RESAMPLES, len(t)))], axis=1) for t in times
    ]
    value = float(np.median(times[0]) / np.median(times[1]))
    low, high = np.quantile(draws[0] / draws[1], [(1 - stats.LEVEL) / 2, (1 + stats.LEVEL) / 2])
    bounds = (test.share * (1 - test.within), test.share * (1 + test.within))
    inside, outside = bounds[0] <= low and high <= bounds[1], high < bounds[0] or low > bounds[1]
    seeds = min(len(table.row(n).system.results) for n in (test.row, test.than))
    images = sum(len(t) for t in times)
    estimate = Estimate(value, float(low), float(high), seeds, images, 0, "iterations", 1.0)
    sign = 1 if inside else -1 if outside else 0
    what = f"iteration time: published share {test.share:g} +- {100 * test.within:g} %"
    comparison = Comparison(what, estimate, 1.0, sign)
    return Verdict(claim, _verdict([comparison]), (comparison,))


def _verdict(comparisons: Sequence[Comparison]) -> str:
    signs = {comparison.sign for comparison in comparisons}
    if -1 in signs:
        return NOT_REPRODUCED
    return REPRODUCED if signs == {1} else UNDECIDED


# -- reporting -----------------------------------------------------------------------------------


def write(
    verdicts: Sequence[Verdict], scale: str, out_dir: Path, random: Sequence[str] = ()
) -> list[Path]:
    """Write claims.md and claims.json; `random` names what is randomly initialised."""
    out_dir.mkdir(parents=True, exist_ok=True)
    lines = [
        f"The paper's claims, tested at the scale `{scale}`. A comparison of trained models with "
        "one seed is shown and decides nothing.",
        *([f"RANDOM WEIGHTS: {', '.join(random)}. These verdicts mean nothing."] if random else []),
        "",
        "| Claim | Source | Verdict | Effects with 95 % intervals | Seeds |",
        "| --- | --- | --- | --- | ---: |",
    ]
    for claim, verdict, comparisons in verdicts:
        effects = "<br>".join(
            f"{escape(c.what, MARKDOWN)}: {c.estimate.value:+.3g} "
            f"[{c.estimate.low:+.3g}, {c.estimate.high:+.3g}]"
            for c in comparisons
        )
        seeds = min((c.estimate.n_seeds for c in comparisons), default="–")
        said, source = escape(claim.claim, MARKDOWN), escape(claim.source, MARKDOWN)
        lines.append(f"| {said} | {source} | **{verdict}** | {effects} | {seeds} |")
    record = [
        {
            "id": claim.id,
            "claim": claim.claim,
            "source": claim.source,
            "scale": scale,
            **({"random_weights": list(random)} if random else {}),
            "verdict": verdict,
            "comparisons": [
                {
                    "what": c.what,
                    **{k: getattr(c.estimate, k) for k in ("value", "low", "high", "n_seeds")},
                    "p_adjusted": c.p_value,
                    "supports": c.sign,
                }
                for c in comparisons
            ],
        }
        for claim, verdict, comparisons in verdicts
    ]
    files = [out_dir / "claims.md", out_dir / "claims.json"]
    files[0].write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    files[1].write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8", newline="\n")
    return files
