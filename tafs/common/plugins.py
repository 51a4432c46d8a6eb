"""Find plug-ins by name: modules of a shipped package, and entry points of installed packages.

A plug-in is an object that a module defines. Methods, rewards, prompt sets, models and protocols
each have a `Group`, which finds two kinds of plug-ins:

- shipped: every module of `package` is one, and its name is the file's name;
- installed: every entry point of the group, by the entry point's name. In a package's
  pyproject.toml:

      [project.entry-points."tafs.methods"]
      my_method = "my_package.my_method"

  A value "my_package.module:OBJECT" names the object; without ":OBJECT" it is the group's
  `attribute`, as in a shipped module.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from tafs.common.errors import one_line
from tafs.common.yaml_files import suggestion


@cache
def installed(group: str) -> tuple[EntryPoint, ...]:
    """Return the entry points of installed packages, read once per process."""
    return tuple(entry_points(group=group))


@dataclass(frozen=True)
class Group:
    """The plug-ins of one kind.

    Args:
        kind: in messages, "method"; the entry-point group is then "tafs.methods".
        attribute: the name of the object that a plug-in's module defines, "METHOD".
        package: the package whose modules are the shipped plug-ins, except modules whose names
            begin with "_"; "": there are none.
        modules: further shipped plug-ins, (name, module) each.
    """

    kind: str
    attribute: str
    package: str = ""
    modules: tuple[tuple[str, str], ...] = ()

    def names(self) -> list[str]:
        """Return the names of all plug-ins, sorted; imports none of them.

        Raises:
            ValueError: two plug-ins have the same name; names both.
        """
        return sorted(listed(self))

    def source(self, name: str) -> Path:
        """Return the file of the plug-in's module.

        Raises:
            ValueError: there is no such plug-in, or its module was not found; names it.
        """
        return self._source(self._plugin(name))

    def load(self, name: str) -> Any:
        """Import the plug-in's module and return its object.

        Raises:
            ValueError: there is no such plug-in, its module cannot be imported or does not define
                the object; names the file or the module and the package.
        """
        plugin = self._plugin(name)
        where = f"{self._source(plugin)} ({_origin(plugin)})"
        try:
            found: Any = importlib.import_module(plugin.module)
        except Exception as error:  # a plug-in's module may raise anything
            raise self._broken(plugin, where, error) from error
        attribute = plugin.attr or self.attribute
        for part in attribute.split("."):
            if not hasattr(found, part):
                raise ValueError(
                    f"{self.kind} {name!r}: {where} defines no {attribute}; define it there"
                )
            found = getattr(found, part)
        return found

    def _plugin(self, name: str) -> EntryPoint:
        available = listed(self)
        if name not in available:
            hint = suggestion(name, sorted(available))
            raise ValueError(one_line(f"unknown {self.kind} {name!r}{hint}", 600))
        return available[name]

    def _source(self, plugin: EntryPoint) -> Path:
        try:
            spec = importlib.util.find_spec(plugin.module)  # imports the packages around it
        except Exception as error:
            raise self._broken(plugin, _location(plugin), error) from error
        if spec is None or spec.origin is None:
            raise ValueError(
                f"{self.kind} {plugin.name!r}: {_location(plugin)} was not found; reinstall the "
                "package"
            )
        return Path(spec.origin)

    def _broken(self, plugin: EntryPoint, where: str, error: Exception) -> ValueError:
        problem = f"cannot be imported ({type(error).__name__}: {error})"
        return ValueError(one_line(f"{self.kind} {plugin.name!r}: {where} {problem}", 600))


@cache
def listed(group: Group) -> Mapping[str, EntryPoint]:
    """Return the plug-ins of a group by name, listed once per process.

    Raises:
        ValueError: two plug-ins have the same name; names both.
    """
    points = f"tafs.{group.kind}s"
    path = importlib.import_module(group.package).__path__ if group.package else []
    files = [info.name for info in pkgutil.iter_modules(path) if info.name[0] != "_"]
    shipped = {**dict(group.modules), **{name: f"{group.package}.{name}" for name in files}}
    found = {name: EntryPoint(name, module, points) for name, module in shipped.items()}
    for plugin in installed(points):
        other = found.setdefault(plugin.name, plugin)
        if other.value != plugin.value:
            raise ValueError(
                f"{group.kind} {plugin.name!r} is defined twice, by {_location(other)} and by "
                f"{_location(plugin)}; rename or uninstall one of them"
            )
    return found


def _origin(plugin: EntryPoint) -> str:
    dist = plugin.dist
    return "this project" if dist is None else f"package {dist.name} {dist.version}"


def _location(plugin: EntryPoint) -> str:
    return f"{plugin.module} of {_origin(plugin)}"
