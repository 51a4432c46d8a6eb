"""The paper's claims as predicates over the runs of tables.

A claim is a family of comparisons, each with an effect and an interval; their p-values are
corrected together (Holm, 1979). A claim is reproduced if every comparison supports it, not
reproduced if one contradicts it, and otherwise undecided. Models trained with one seed decide
nothing, because the effect of another seed is unknown.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tafs.common.yaml_files import ConfigError, first_problem, load_yaml
from tafs.experiment.schema import Name, Text
from tafs.experiment.specs import RowSpec
from tafs.report import stats
from tafs.report.formats import MARKDOWN, escape
from tafs.report.results import LoadedTable, check_paired, step_correlation
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


Metrics = Annotated[tuple[Name, ...], Field(min_length=1)]
Positive = Annotated[float, Field(gt=0)]


class _Test(_Strict):
    """What a claim says about rows."""

    @property
    def pairs(self) -> Sequence[tuple[RowName, RowName]]:
        """The rows that are compared with each other."""
        return ()

    def compare(self, rows: _Rows) -> list[Comparison]:
        raise NotImplementedError


class _Differences(_Test):
    """Differences of metrics between the first and the second row of every pair."""

    metrics: Metrics

    def compare(self, rows: _Rows) -> list[Comparison]:
        margin = self.margin if isinstance(self, Holds) else 0.0
        tested = [
            rows.difference(*pair, metric, margin) for metric in self.metrics for pair in self.pairs
        ]
        adjusted = stats.holm([estimate.p_value for _, estimate in tested])
        comparisons = []
        for (what, estimate), p_value in zip(tested, adjusted, strict=True):
            sure = p_value <= 1 - stats.LEVEL
            sign = int(np.sign(estimate.value)) if sure else 0
            if margin:  # non-inferiority: only failing to reach the margin contradicts
                sign = 1 if sure and estimate.value > 0 else -1 if estimate.high < 0 else 0
            decided = sign if estimate.n_seeds > 1 else 0
            comparisons.append(Comparison(what, estimate, p_value, decided))
        return comparisons


class Better(_Differences):
    row: RowName
    than: Annotated[tuple[RowName, ...], Field(min_length=1)]

    @property
    def pairs(self) -> Sequence[tuple[RowName, RowName]]:
        return [(self.row, other) for other in self.than]


class Rising(_Differences):
    rows: Annotated[tuple[RowName, ...], Field(min_length=2)]

    @property
    def pairs(self) -> Sequence[tuple[RowName, RowName]]:
        return list(zip(self.rows[1:], self.rows[:-1], strict=True))


class _TwoRows(_Test):
    row: RowName
    than: RowName

    @property
    def pairs(self) -> Sequence[tuple[RowName, RowName]]:
        return [(self.row, self.than)]


class Holds(_Differences, _TwoRows):
    margin: Positive  # standard deviations of the prompts of `than`


class Faster(_TwoRows):
    """The ratio of median iteration times; its interval resamples iterations."""

    share: Positive  # of the other's iteration time, as published
    within: Positive  # of that share

    def compare(self, rows: _Rows) -> list[Comparison]:
        systems = [rows.row(name).system for name in (self.row, self.than)]
        times = [np.array([t for r in s.results for t in r.seconds()]) for s in systems]
        rng = np.random.default_rng(0)
        draws = [
            np.median(t[rng.integers(len(t), size=(stats.RESAMPLES, len(t)))], axis=1)
            for t in times
        ]
        value = float(np.median(times[0]) / np.median(times[1]))
        low, high = np.quantile(draws[0] / draws[1], [(1 - stats.LEVEL) / 2, (1 + stats.LEVEL) / 2])
        least, most = self.share * (1 - self.within), self.share * (1 + self.within)
        sign = 1 if least <= low and high <= most else -1 if high < least or low > most else 0
        seeds = min(len(system.results) for system in systems)
        images = sum(len(t) for t in times)
        estimate = Estimate(value, float(low), float(high), seeds, images, 0, "iterations", 1.0)
        what = f"iteration time: published share {self.share:g} +- {100 * self.within:g} %"
        return [Comparison(what, estimate, 1.0, sign)]


class Correlated(_Test):
    """Pearson's r of an earlier image's reward with the final image's, of a base model.

    It supports the claim if its interval lies above the threshold, and contradicts it below.
    """

    role: Name | None = None  # of the base model; None: the only one
    step: Annotated[int, Field(ge=1)]  # of the earlier image
    above: Annotated[float, Field(ge=-1, lt=1)]
    metrics: Metrics

    def compare(self, rows: _Rows) -> list[Comparison]:
        base = rows.row(RowName(method=BASE, role=self.role)).system
        comparisons = []
        for metric in self.metrics:
            r = step_correlation(base.results[0], metric, self.step)
            sign = 1 if r.low > self.above else -1 if r.high < self.above else 0
            title = METRICS[metric].title
            what = f"{title}: r of image {self.step} with the last (above {self.above:g})"
            comparisons.append(Comparison(what, r, r.p_value, sign))
        return comparisons


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
    def tests(self) -> dict[str, _Test]:
        """What is tested, by kind; `read` refuses a claim without exactly one."""
        return {kind: test for kind in KINDS if (test := getattr(self, kind))}

    @property
    def methods(self) -> set[str]:
        """The methods that it compares."""
        return {name.method for test in self.tests.values() for pair in test.pairs for name in pair}


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
        if len(claim.tests) != 1:
            said = " and ".join(claim.tests) or "nothing"
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
    (test,) = claim.tests.values()
    comparisons = tuple(test.compare(_Rows(claim, loaded)))
    signs = {comparison.sign for comparison in comparisons}
    if -1 in signs:
        return Verdict(claim, NOT_REPRODUCED, comparisons)
    return Verdict(claim, REPRODUCED if signs == {1} else UNDECIDED, comparisons)


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

    def difference(
        self, one: RowName, other: RowName, metric: str, margin: float
    ) -> tuple[str, Estimate]:
        """(what is compared, how much better one row is than another in a metric).

        Scores are on the reported scale; `margin`, in standard deviations of the other row's
        prompts, is added to the first.
        """
        if metric not in METRICS:
            known = ", ".join(METRICS)
            raise ValueError(
                f"claim {self.claim.id}: unknown metric {metric!r} (available: {known})"
            )
        left, right = self.row(one), self.row(other)
        a, b = left.system, right.system
        reference = METRICS[metric].factor * right.quality(metric)
        spread = float(np.nanstd(np.nanmean(reference, axis=(0, 2))))
        check_paired(a.scores, b.scores)
        difference = stats.paired_difference(
            METRICS[metric].factor * left.quality(metric) + margin * spread,
            reference,
            a.scores.tags,
            same_seeds=[r.run.folder for r in a.results] == [r.run.folder for r in b.results],
            macro=METRICS[metric].macro,
        )
        # A base model is not trained, so it has no seeds to vary.
        trained = [system for system in (a, b) if system.spec.trained] or [a, b]
        seeds = min(len(system.results) for system in trained)
        allowed = f" + {margin:g} sd" if margin else ""
        what = f"{METRICS[metric].title}: {_in_words(left)}{allowed} - {_in_words(right)}"
        return what, difference._replace(n_seeds=seeds)


def _in_words(row: Row) -> str:
    after = "" if row.spec.iteration is None else f" after {row.spec.iteration} iterations"
    return f"{row.spec.label} at {row.spec.nfe} steps{after}"


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
            **claim.model_dump(include={"id", "claim", "source"}),
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
