"""The variants of config.yaml's `methods`, resolved to methods with hyperparameters."""

from __future__ import annotations

from functools import cache
from typing import Any

from tafs.experiment.schema import Config, Scale, Variant
from tafs.methods import registry
from tafs.methods.base import Method


class Variants:
    """The variants at one scale, each method created once."""

    def __init__(self, config: Config, scale: Scale | None = None) -> None:
        self.config = config
        self.scale = scale or config.active

    @cache  # noqa: B019 - one object per expansion
    def resolve(self, variant: str) -> tuple[str, dict[str, Any]]:
        """(method, hyperparameters) of a variant.

        A variant's own hyperparameters override those of the variant it extends, and those of
        the scale override those of `methods`.

        Raises:
            ValueError: its `extends` leads back to itself.
        """
        name, parameters = variant, dict[str, Any]()
        chain: list[str] = []
        while name in self.config.methods and name not in chain:
            chain.append(name)
            settings = self.config.methods[name] or Variant()
            at_scale = self.scale.methods.get(name, {})
            parameters = {**(settings.model_extra or {}), **at_scale, **parameters}
            name = settings.extends or name
        if chain and name in chain[:-1]:
            raise ValueError(f"extends: {' -> '.join([*chain, name])} is circular")
        return name, parameters

    @cache  # noqa: B019
    def method(self, variant: str) -> Method:
        """The method object of a variant.

        Raises:
            ValueError: no such method, or a wrong hyperparameter; names it.
        """
        name, parameters = self.resolve(variant)
        return registry.create(name, parameters)

    def title(self, variant: str) -> str:
        """What tables and figures call the variant."""
        settings = self.config.methods.get(variant)
        return (settings.title if settings else "") or self.method(variant).TITLE or variant

    def cost(self, variant: str) -> float:
        """The variant's network evaluations per image and iteration; see `Method.cost`."""
        return self.method(variant).cost(self.scale.group_size)

    def iterations_at(self, variant: str, share: float) -> int:
        """How many iterations a share of the compute reference's training compute pays for."""
        total = self.scale.iterations
        budget = total * share * self.cost(self.config.compute_reference)
        # The small term absorbs the rounding of a ratio that should be a whole number.
        paid = int(budget / self.cost(variant) + 1e-9)
        return max(1, min(total, paid))
