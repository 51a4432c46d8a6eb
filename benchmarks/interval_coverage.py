"""How often the report's 95 % intervals cover the truth, by simulation.

    python benchmarks/interval_coverage.py
    python benchmarks/interval_coverage.py --gains results/shapes/provenance/gains.json

Scores are simulated as a crossed design: value = seed's effect + prompt's effect (shared by both
systems) + the system's own effect on the prompt + the rest. A trained system is compared with the
base model, which has one seed, and with another trained system; there is no difference between
them. `covers` should be 0.95 and `rejects`, the share of p-values up to 0.05, 0.05.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tafs.common import errors
from tafs.report import stats


class Variation(NamedTuple):
    """Standard deviations of a trained system's scores, in those of the prompts."""

    seeds: float
    residual: float  # of a seed's mean of a prompt's images

    @property
    def text(self) -> str:
        return f"{self.seeds:.2f}/{self.residual:.2f}"


# PickScore at four steps after training at the embedded scale, three seeds.
MEASURED = {
    "TAFS-GRPO": Variation(0.37, 0.55),
    "Flow-GRPO": Variation(0.13, 0.28),
    "RG-LCD": Variation(0.05, 0.47),
    "Reward-Instruct": Variation(0.0, 0.55),
}
PROMPTS, RESAMPLES = 105, 400
OWN = 0.3  # standard deviation of a system's own effects on the prompts, in that of the prompts


class Simulated(NamedTuple):
    covers: float
    rejects: float
    half_width: float  # median


def simulate(
    left: Variation,
    right: Variation | None,
    seeds: int,
    *,
    replicates: int,
    prompts: int = PROMPTS,
    own: float = OWN,
) -> Simulated:
    """The intervals of differences between systems that do not differ; None: the base model."""
    rng = np.random.default_rng([seeds, right is None])
    strata = ["all"] * prompts

    def drawn(of: Variation, seeds: int) -> stats.Array:
        """[replicates, seeds, prompts], without what both systems share."""
        means = of.seeds * rng.normal(size=(replicates, seeds, 1))
        effects = own * rng.normal(size=(replicates, 1, prompts))
        return means + effects + of.residual * rng.normal(size=(replicates, seeds, prompts))

    shared = rng.normal(size=(replicates, 1, prompts))
    a = shared + drawn(left, seeds)
    b = shared + drawn(right or Variation(0, 0), seeds if right else 1)
    found = [
        stats.paired_difference(
            a[i, :, :, None], b[i, :, :, None], strata, by=stats.Resampling(RESAMPLES, i % 8)
        )
        for i in range(replicates)
    ]
    return Simulated(
        float(np.mean([e.low <= 0 <= e.high for e in found])),
        float(np.mean([e.p_value <= 1 - stats.LEVEL for e in found])),
        float(np.median([(e.high - e.low) / 2 for e in found])),
    )


def measured(gains: Path, metric: str) -> dict[str, Variation]:
    """The variation of a report's trained systems.

    Raises:
        ValueError: the file has none of this metric, or one seed; names it.
    """
    variance = json.loads(gains.read_text(encoding="utf-8")).get("variance", {})
    found = {}
    for row, metrics in variance.items():
        parts = metrics.get(metric)
        if parts and parts["prompts"] > 0:
            scale = math.sqrt(parts["prompts"])
            found[row] = Variation(*(math.sqrt(parts[k]) / scale for k in ("seeds", "residual")))
    if not found:
        raise ValueError(f"{gains}: no variance of {metric} between seeds; give a report of two")
    return found


def pairs(
    systems: Mapping[str, Variation],
) -> Iterator[tuple[str, Variation, str, Variation | None]]:
    """Every system with the base model, and with the next system."""
    names = list(systems)
    for name in names:
        yield name, systems[name], "base", None
    for name, other in zip(names, names[1:] + names[:1], strict=True):
        yield name, systems[name], other, systems[other]


def show(options: argparse.Namespace) -> None:
    systems = measured(options.gains, options.metric) if options.gains else MEASURED
    print("seed and residual standard deviations, in those of the prompts:")
    print("  ".join(f"{name} {of.text}" for name, of in systems.items()))
    print(f"{'':42}{'seeds':>6}{'covers':>9}{'rejects':>9}{'+-':>8}")
    for name, left, other, right in pairs(systems):
        for seeds in options.seeds:
            found = simulate(left, right, seeds, replicates=options.replicates)
            numbers = "".join(f"{x:9.3f}" for x in found[:2])
            print(f"{name + ' - ' + other:42}{seeds:6}{numbers}{found.half_width:8.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gains", type=Path, metavar="FILE", help="provenance/gains.json")
    parser.add_argument("--metric", default="pickscore", help="of FILE; default: pickscore")
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 5, 8, 10], metavar="N")
    parser.add_argument("--replicates", type=int, default=500, metavar="N", help="default: 500")
    options = parser.parse_args()
    errors.run_cli("interval_coverage", lambda: show(options))


if __name__ == "__main__":
    main()
