"""Several looks at growing numbers of seeds, with one error rate over all of them.

A test that is repeated with more seeds at its full level is wrong more often at each look. Here
the looks share the level: a spending function says how much of it may be used up when a share of
the seeds has been trained (Lan & DeMets, 1983), and the level of a look is what this allows, given
that no earlier look has decided. The levels come from a normal test statistic and apply to the
p-values of Student's t (Jennison & Turnbull, 2000, chapter 3.8). Looks share their prompts, which
correlates them more than the normal model assumes and makes them err less.

The spending is Pocock's, nearly equal for all looks. O'Brien and Fleming's leaves 0.05 % for a
look at three of eight seeds: Student's t of so few seeds hardly ever reaches it, the p-values of
2,000 resamples end above it, and the coverage of intervals so wide has not been measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr

from tafs.report.bootstrap import LEVEL, Array

Spending = Callable[[float, float], float]  # of a share of the seeds and the whole level
NODES = 200  # of the integration over the statistic at a look
# Levels of the whole test at which those of the looks are computed; interpolated between them.
GRID = np.sort(np.append(np.geomspace(1e-6, 0.99, 80), 1 - LEVEL))


class Judge(NamedTuple):
    """How strictly differences are judged.

    `level` is that of intervals; `overall` turns a p-value into the level of the whole test at
    which it would just decide. By default there is one look.
    """

    level: float = LEVEL
    overall: Callable[[float], float] = float


ONCE = Judge()


def pocock(share: float, alpha: float) -> float:
    """The level that may be spent until a share of the seeds is trained (Lan & DeMets, 1983)."""
    return float(alpha * np.log1p((np.e - 1) * share))


def levels(shares: Sequence[float], alpha: float, spending: Spending = pocock) -> list[float]:
    """The two-sided level of each look.

    Args:
        shares: of the last look's seeds, increasing to 1.
        alpha: the level of all looks together.
    """
    found: list[float] = []
    spent, before = 0.0, 0.0
    # The statistic is a Brownian motion at times `shares`; `mass` is its distribution over
    # `places`, in so far as no earlier look has decided.
    places, mass = np.zeros(1), np.ones(1)
    roots, weights = np.polynomial.legendre.leggauss(NODES)
    for share in shares:
        step, ahead = np.sqrt(share - before), spending(share, alpha)
        edge = brentq(_excess, 0, 40, args=(places, mass, step, ahead - spent))
        found.append(float(2 * ndtr(-edge / np.sqrt(share))))
        density = np.exp(-0.5 * ((edge * roots[:, None] - places) / step) ** 2) @ mass
        mass = edge * weights * density / (step * np.sqrt(2 * np.pi))
        places, spent, before = edge * roots, ahead, share
    return found


def _excess(edge: float, places: Array, mass: Array, step: float, allowed: float) -> float:
    """How much more likely than allowed a look decides if it does so beyond an edge."""
    return float(2 * mass @ ndtr((places - edge) / step)) - allowed  # by symmetry, both sides


def judge(seeds: Sequence[int], look: int) -> Judge:
    """The strictness of a look, counted from 1, at each of the numbers of `seeds`."""
    table = _table(tuple(seeds))[:, look - 1]

    def overall(p_value: float) -> float:
        if p_value >= table[-1]:
            return 1.0
        return float(np.exp(np.interp(np.log(p_value), np.log(table), np.log(GRID))))

    return Judge(1 - level(seeds, look), overall)


@lru_cache(maxsize=8)
def _table(seeds: tuple[int, ...]) -> Array:
    """[GRID, looks]: the level of each look by the level of all of them."""
    return np.array([levels(_shares(seeds), float(alpha)) for alpha in GRID])


def level(seeds: Sequence[int], look: int) -> float:
    """The two-sided level of a look."""
    return _own_levels(tuple(seeds))[look - 1]


@lru_cache(maxsize=8)
def _own_levels(seeds: tuple[int, ...]) -> list[float]:
    return levels(_shares(seeds), 1 - LEVEL)


def _shares(seeds: Sequence[int]) -> list[float]:
    return [n / seeds[-1] for n in seeds]


def spent(seeds: Sequence[int], look: int) -> float:
    """The level that the looks up to this one use up together."""
    return pocock(seeds[look - 1] / seeds[-1], 1 - LEVEL)
