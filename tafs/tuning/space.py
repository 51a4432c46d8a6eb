"""What is searched for a method, and the values of its trials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_type_hints

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from scipy.stats import qmc

from tafs.common.yaml_files import ConfigError
from tafs.experiment.schema import Range
from tafs.methods.base import Method

DESIGN = 4  # trials whose values do not depend on others


@dataclass(frozen=True)
class Space:
    """The ranges and choices of a method's hyperparameters.

    Raises:
        ConfigError: a present value is not in its range or choices; names it.
    """

    variant: str
    searched: Mapping[str, Range | tuple[Any, ...]]
    method: Method  # with the present values

    def __post_init__(self) -> None:
        for key, searched in self.searched.items():
            value = self.present[key]
            if isinstance(searched, Range):
                inside = searched.low <= value <= searched.high
            else:
                inside = value in searched
            if not inside:
                raise ConfigError(
                    f"tuning: {self.variant}: {key}: the present value, {value}, is not in what "
                    "is searched; extend it"
                )

    @cached_property
    def present(self) -> dict[str, Any]:
        """The present values of the searched hyperparameters."""
        return {key: getattr(self.method, key) for key in self.searched}

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's form of the space."""
        types = get_type_hints(type(self.method))
        found: dict[str, BaseDistribution] = {}
        for key, searched in self.searched.items():
            if not isinstance(searched, Range):
                found[key] = CategoricalDistribution(searched)
            elif types[key] is int:
                found[key] = IntDistribution(int(searched.low), int(searched.high), searched.log)
            else:
                found[key] = FloatDistribution(searched.low, searched.high, searched.log)
        return found

    def design(self, seed: int) -> list[dict[str, Any]]:
        """The values of the first trials: the present ones, then a Latin hypercube, DESIGN in all.

        A point of the hypercube that is the present values, as in a search that follows another, is
        left out, so that no trial repeats the first.
        """
        rng = np.random.default_rng(seed)
        units = qmc.LatinHypercube(len(self.searched), rng=rng).random(DESIGN - 1)
        spread = [
            {key: self._at(key, unit) for key, unit in zip(self.searched, row, strict=True)}
            for row in units
        ]
        return [self.present, *(one for one in spread if self._entered(one) != self.present)]

    def _entered(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: self._rounded(key, value) for key, value in values.items()}

    def _at(self, key: str, unit: float) -> Any:
        """The value at a position in [0, 1) of the hyperparameter's range or choices."""
        searched = self.searched[key]
        if not isinstance(searched, Range):
            return searched[int(unit * len(searched))]
        if searched.log:
            value = searched.low * (searched.high / searched.low) ** unit
        else:
            value = searched.low + (searched.high - searched.low) * unit
        whole = isinstance(self.distributions[key], IntDistribution)
        return round(value) if whole else float(value)

    def values(self, trial: optuna.Trial) -> dict[str, Any]:
        """The trial's values; those of ranges have three digits, so that they can be entered.

        The first trial has the present values as they are.
        """
        drawn = {key: _suggest(trial, key, kind) for key, kind in self.distributions.items()}
        if trial.number == 0:
            return drawn
        return self._entered(drawn)

    def _rounded(self, key: str, value: Any) -> Any:
        searched = self.searched[key]
        if not isinstance(searched, Range) or not isinstance(value, float):
            return value
        return min(max(float(f"{value:.3g}"), searched.low), searched.high)


def _suggest(trial: optuna.Trial, key: str, kind: BaseDistribution) -> Any:
    match kind:
        case FloatDistribution():
            return trial.suggest_float(key, kind.low, kind.high, log=kind.log)
        case IntDistribution():
            return trial.suggest_int(key, kind.low, kind.high, log=kind.log)
        case CategoricalDistribution():
            return trial.suggest_categorical(key, kind.choices)
        case _:
            raise TypeError(kind)
