"""The options that several commands share."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer


def above_zero(kind: type[int] | type[float]) -> Callable[[str], Any]:
    """A parser of numbers above 0; None, of an option that is not given, passes."""

    def parse(text: Any) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < math.inf:
            name = "whole number" if kind is int else "number"
            raise typer.BadParameter(f"{text!r} is not a {name} above 0")
        return value

    return parse


def count(name: str, metavar: str, text: str) -> Any:
    return typer.Option(name, metavar=metavar, parser=above_zero(int), help=text)


def number(name: str, metavar: str, text: str) -> Any:
    return typer.Option(name, metavar=metavar, parser=above_zero(float), help=text)


def _scales() -> list[str]:
    """For shell completion."""
    from tafs.common.yaml_files import load_yaml

    try:
        return list(load_yaml(Path("config.yaml"), dict)["scales"])
    except (ValueError, OSError, KeyError, TypeError):
        return []


ScaleOption = Annotated[
    str | None,
    typer.Option(
        "--scale",
        metavar="S",
        help="A scale of config.yaml; default: its `scale`.",
        autocompletion=_scales,
    ),
]
ResultsOption = Annotated[
    str | None,
    typer.Option("--results", metavar="DIR", help="Default: the `results` of config.yaml."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]
EveryOption = Annotated[
    float | None, number("--every", "SECONDS", "Repeat after so many seconds, until Ctrl-C.")
]


def overrides(**values: Any) -> dict[str, Any]:
    """The options that snakemake takes with --config."""
    return {key: value for key, value in values.items() if value is not None}
