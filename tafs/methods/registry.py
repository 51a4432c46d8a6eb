"""Methods by name: baselines/*.py, `tafs_grpo`, and the entry points of installed packages."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from tafs.common.errors import shown
from tafs.common.plugins import Group
from tafs.common.yaml_files import suggestion
from tafs.methods.base import Method

METHODS = Group(
    kind="method",
    attribute="METHOD",
    package="tafs.baselines",
    modules=(("tafs_grpo", "tafs.methods.tafs_grpo"),),
)
STRICT = ConfigDict(strict=True, allow_inf_nan=False)
LARGEST = 10**6  # largest integer hyperparameter; larger numbers of steps or updates are typos


names = METHODS.names
source_file = METHODS.source  # when this file changes, the method's runs are trained again


def method_class(name: str) -> type[Method]:
    """Return the class that a method's file calls METHOD.

    Raises:
        ValueError: there is no such method, its file cannot be imported, or METHOD is not a
            subclass of `Method`; names the file.
    """
    found = METHODS.load(name)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ValueError(
            f"method {name!r}: METHOD in {source_file(name)} is not a subclass of "
            "tafs.methods.Method; derive it from that class"
        )
    return found


def create(name: str, hyperparameters: Mapping[str, Any]) -> Method:
    """Return a method with these hyperparameters, and its defaults for all others.

    Raises:
        ValueError: a hyperparameter is unknown, or its value has another type or is out of range;
            names it.
    """
    found = method_class(name)
    types = _types(found)  # type: ignore[arg-type]  # mypy looks at the instances' __hash__
    for key, value in hyperparameters.items():
        if key not in types:
            hint = suggestion(str(key), list(types))
            raise ValueError(f"unknown hyperparameter {shown(key)}{hint}")
        # Without this check `true` would pass as 1.
        try:
            types[key].validate_python(value)
        except ValidationError as error:
            problem = error.errors()[0]["msg"].replace("Input", "input", 1)
            raise ValueError(f"{key}: {problem} (got {shown(value)})") from None
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError(f"{key}: {value} is too large; the maximum is {LARGEST}")
    return found(**hyperparameters)


@cache
def _types(method: type[Method]) -> Mapping[str, TypeAdapter[Any]]:
    """What checks the values of a method's hyperparameters, by name."""
    types = get_type_hints(method)
    return {
        field.name: TypeAdapter(types[field.name], config=STRICT)
        for field in dataclasses.fields(method)
    }
