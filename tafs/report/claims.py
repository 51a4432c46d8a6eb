"""The verdicts on the paper's claims (tafs/experiment/claims.py) from the runs of tables.

A claim is a family of comparisons, each with an effect and an interval; their p-values are
corrected together (Holm, 1979). A claim is reproduced if every comparison supports it, not
reproduced if one contradicts it, and otherwise undecided. Models trained with one seed decide
nothing, because the effect of another seed is unknown.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import singledispatch
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tafs.experiment.claims import Claim, Correlated, Differences, Faster, Holds, Predicate, RowName
from tafs.report import stats
from tafs.report.formats import markdown
from tafs.report.results import LoadedTable, check_paired, step_correlation
from tafs.report.stats import Estimate
from tafs.report.tables import Row
from tafs.rewards.metrics import METRICS

REPRODUCED, NOT_REPRODUCED, UNDECIDED = "reproduced", "not reproduced", "undecided"
NOT_TESTED = "not tested"  # the scale does not have the claim's table, methods or metrics


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


def is_testable(claim: Claim, loaded: LoadedTable) -> bool:
    """Whether the scale has the table, the methods and the metrics of a claim."""
    if claim.experiment != loaded.spec.name or claim.methods & set(loaded.spec.excluded_methods):
        return False
    correlation = loaded.spec.kind == "correlation"
    rewards = loaded.results[0].trajectory_rewards if correlation else None
    measured = loaded.metrics if rewards is None else rewards["metric"]
    return claim.metrics <= set(measured)


def assess_claim(claim: Claim, loaded: LoadedTable) -> Verdict:
    """The verdict on a claim from the runs of its experiment.

    Raises:
        ValueError: a row or a metric is missing; names it.
    """
    (test,) = claim.tests.values()
    comparisons = tuple(_compare(test, _Rows(claim, loaded)))
    signs = {comparison.sign for comparison in comparisons}
    if -1 in signs:
        return Verdict(claim, NOT_REPRODUCED, comparisons)
    return Verdict(claim, REPRODUCED if signs == {1} else UNDECIDED, comparisons)


@singledispatch
def _compare(test: Predicate, rows: _Rows) -> list[Comparison]:
    raise TypeError(type(test))


@_compare.register(Differences)
def _differences(test: Differences, rows: _Rows) -> list[Comparison]:
    margin = test.margin if isinstance(test, Holds) else 0.0
    tested = [
        rows.difference(*pair, metric, margin) for metric in test.metrics for pair in test.pairs
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


@_compare.register(Faster)
def _faster(test: Faster, rows: _Rows) -> list[Comparison]:
    """The ratio of median iteration times; its interval resamples iterations."""
    systems = [rows.row(name).system for name in (test.row, test.than)]
    times = [np.array([t for r in s.results for t in r.seconds()]) for s in systems]
    rng = np.random.default_rng(0)
    draws = [
        np.median(t[rng.integers(len(t), size=(stats.RESAMPLES, len(t)))], axis=1) for t in times
    ]
    value = float(np.median(times[0]) / np.median(times[1]))
    low, high = np.quantile(draws[0] / draws[1], [(1 - stats.LEVEL) / 2, (1 + stats.LEVEL) / 2])
    least, most = test.share * (1 - test.within), test.share * (1 + test.within)
    sign = 1 if least <= low and high <= most else -1 if high < least or low > most else 0
    seeds = min(len(system.results) for system in systems)
    images = sum(len(t) for t in times)
    estimate = Estimate(value, float(low), float(high), seeds, images, 0, "iterations", 1.0)
    what = f"iteration time: published share {test.share:g} +- {100 * test.within:g} %"
    return [Comparison(what, estimate, 1.0, sign)]


@_compare.register(Correlated)
def _correlated(test: Correlated, rows: _Rows) -> list[Comparison]:
    """Supported if the interval of r lies above the threshold, and contradicted below it."""
    (base,) = test.named
    system = rows.row(base).system
    comparisons = []
    for metric in test.metrics:
        r = step_correlation(system.results[0], metric, test.step)
        sign = 1 if r.low > test.above else -1 if r.high < test.above else 0
        title = METRICS[metric].title
        what = f"{title}: r of image {test.step} with the last (above {test.above:g})"
        comparisons.append(Comparison(what, r, r.p_value, sign))
    return comparisons


class _Rows:
    """The rows of the claim's experiment, by the names that a claim uses."""

    def __init__(self, claim: Claim, loaded: LoadedTable) -> None:
        self.claim, self.loaded = claim, loaded

    def row(self, name: RowName) -> Row:
        """The one row of this name.

        Raises:
            ValueError: none or several rows have it; names the claim and the experiment.
        """
        found = name.among(self.loaded.spec)
        if len(found) != 1:
            where = self.claim.experiment
            raise ValueError(f"claim {self.claim.id}: {len(found)} rows of {where} have {name}")
        return Row(found[0], self.loaded.systems[found[0]])

    def difference(
        self, one: RowName, other: RowName, metric: str, margin: float
    ) -> tuple[str, Estimate]:
        """(what is compared, how much better one row is than another in a metric).

        Scores are on the reported scale; `margin`, in standard deviations of the other row's
        prompts, is added to the first.
        """
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
            f"{markdown(c.what)}: {c.estimate.value:+.3g} "
            f"[{c.estimate.low:+.3g}, {c.estimate.high:+.3g}]"
            for c in comparisons
        )
        seeds = min((c.estimate.n_seeds for c in comparisons), default="–")
        said, source = markdown(claim.claim), markdown(claim.source)
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
