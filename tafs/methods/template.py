"""`python -m tafs.methods.template NAME` writes baselines/NAME.py: a method that runs as it stands."""

from __future__ import annotations

import keyword
import sys
from pathlib import Path

from tafs.common import errors, yaml_files
from tafs.runtime import run_dir

FOLDER = Path("baselines")
TEMPLATE = '''"""{title} (authors, year, arXiv number).

As published, except:
- (list where this differs from its source, and why)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tafs.method import PolicyGradient


@dataclass(frozen=True, kw_only=True)
class {title}(PolicyGradient):
    """Its fields are its hyperparameters: config.yaml may set them, and no others."""

    steps: int = 6
    sampler: str = "cps"  # one of tafs.models.sampling.TRANSITIONS, or override `transition`
    eta: float = 0.7
    updates: int = 2

    TITLE: ClassVar[str] = "{title}"

    def trained_steps(self, iteration: int) -> Sequence[int]:
        """All but the last step, which is taken without noise."""
        return range(self.steps - 1)


METHOD = {title}
'''


def write(name: str, folder: Path = FOLDER) -> Path:
    """The stub's file.

    Raises:
        ValueError: the name cannot be a key of config.yaml, or is taken; names it.
    """
    from tafs.methods import registry

    if not yaml_files.NAME.fullmatch(name) or "-" in name:
        raise ValueError(
            f"{errors.shown(name)} is no name: use lower-case letters, digits and underscores"
        )
    title = "".join(part.capitalize() for part in name.split("_"))
    if keyword.iskeyword(name) or keyword.iskeyword(title):
        raise ValueError(f"{name!r} is a word of Python's; choose another name")
    if name in registry.sources() or name == run_dir.BASE:
        raise ValueError(f"{name!r} is taken; choose another name")
    if not folder.is_dir():
        raise ValueError(f"{folder}/ is not here; call this in the project's folder")
    file = folder / f"{name}.py"
    with file.open("x", encoding="utf-8") as out:
        out.write(TEMPLATE.replace("{title}", title))
    return file


def main() -> None:
    if len(sys.argv) != 2:
        print("usage: python -m tafs.methods.template NAME", file=sys.stderr)
        sys.exit(2)
    name = sys.argv[1]

    def work() -> None:
        file = write(name)
        print(
            f"{file} is written. In config.yaml, add `{name}:` to methods and {name} to an "
            f"experiment's methods, then:\n"
            f"  python -m pytest tests/test_method.py -k {name}\n"
            f"  snakemake all --config scale=smoke"
        )

    errors.run_cli("new-method", work)


if __name__ == "__main__":
    main()
