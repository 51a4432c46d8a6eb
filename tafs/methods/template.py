"""`tafs new method NAME` writes baselines/NAME.py, a method that runs as it is."""

from __future__ import annotations

from pathlib import Path

from tafs.common import stubs
from tafs.methods import registry
from tafs.runtime import run_dir

FOLDER = Path("baselines")
TEMPLATE = '''"""{title} (authors, year, arXiv number): one line about the method.

(The method's equations, in the notation of the other files.)

As published, except:
- (each difference from the source, and its reason)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tafs.methods import PolicyGradient


@dataclass(frozen=True, kw_only=True)
class {title}(PolicyGradient):
    """The fields are the hyperparameters; config.yaml can set these and no others."""

    steps: int = 6
    sampler: str = "cps"  # a key of tafs.models.sampling.TRANSITIONS; or override `transition`
    eta: float = 0.7
    updates: int = 2

    TITLE: ClassVar[str] = "{title}"

    def trained_steps(self, iteration: int) -> Sequence[int]:
        """Train all steps except the last one, which has no noise."""
        return range(self.steps - 1)


METHOD = {title}
'''


def write(name: str, folder: Path = FOLDER) -> Path:
    """Write the stub and return its file; "my_method" gives the class MyMethod.

    Raises:
        ValueError: the name is invalid or taken, or the folder does not exist.
    """
    if name == run_dir.BASE:
        raise ValueError(f"{name!r} is taken; choose another name")
    title = "".join(part.capitalize() for part in name.split("_"))
    return stubs.write(registry.METHODS, name, folder, TEMPLATE.replace("{title}", title))


def create(name: str) -> str:
    """Write the stub; return what was written and what to do next. The errors are `write`'s."""
    file = write(name)
    return (
        f"Wrote {file}. Test it, then compare it with the other methods:\n"
        f"  python -m pytest tests/methods -k {name}\n"
        f"  snakemake compare --config method={name} scale=smoke"
    )
