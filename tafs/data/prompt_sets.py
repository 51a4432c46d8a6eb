"""The prompt sets: plug-ins that provide prompts to train on and prompts to evaluate on.

Every prompt set is a plug-in with one object, `PROMPT_SET = PromptSet(...)`: a file of
tafs/data/plugins/ or an entry point of the group `tafs.prompts`. docs/adding-prompts.md says how to
add one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

from tafs.common.plugins import Group
from tafs.data.prompts import Prompt

# Where models, rewards and prompts come from: shipped with this project, or resources.yaml.
Assets = Literal["shapes", "words", "hub"]
Folder = Callable[[str], Path]  # an entry of resources.yaml -> the folder of its verified files


@dataclass(frozen=True)
class PromptSet:
    """A prompt set.

    Args:
        train: folder -> the prompts to train on.
        test: folder -> the prompts to evaluate on; none of them is in `train`.
        assets: asset sources whose models can draw these prompts, of `Assets`.
        shares: how often training draws each tag, adding up to 1; None: all tags equally often.
        resources: entries of resources.yaml that `train` and `test` read.
        metadata: entries that every row of `test` has and metrics need: "include" is GenEval's.
        quotes: whether every prompt has a text in double quotes, which the metric `ocr` needs.
        files: where a set of tafs.data.prompt_files comes from.
        places: the file and line of each prompt of such a set, by its text.
    """

    train: Callable[[Folder], list[Prompt]]
    test: Callable[[Folder], list[Prompt]]
    assets: tuple[str, ...] = ("hub",)
    shares: Mapping[str, float] | None = None
    resources: tuple[str, ...] = ()
    metadata: tuple[str, ...] = ()
    quotes: bool = False
    files: tuple[str, ...] = ()
    places: Mapping[str, str] = field(default_factory=dict)

    def prompts(self, split: str, folder: Folder) -> list[Prompt]:
        """The prompts of a split, "train" or "test"."""
        return {"train": self.train, "test": self.test}[split](folder)


# Sets of files that config.yaml names, by name; tafs.data.prompt_files adds them.
FROM_FILES: dict[str, PromptSet] = {}
PLUGINS = Group(kind="prompt", attribute="PROMPT_SET", package="tafs.data.plugins")


@cache
def prompt_sets() -> dict[str, PromptSet]:
    """Every prompt set by name, sorted.

    Raises:
        ValueError: a plug-in is broken; names its file.
    """
    found = {name: PLUGINS.load(name) for name in PLUGINS.names()}
    for name, prompt_set in found.items():
        if not isinstance(prompt_set, PromptSet):
            raise ValueError(
                f"prompt set {name!r}: PROMPT_SET in {PLUGINS.source(name)} is not a PromptSet; "
                "correct it there"
            )
    return found


def prompt_set(name: str) -> PromptSet:
    """A prompt set by name.

    Raises:
        ValueError: an unknown prompt set; lists those available.
    """
    if name in FROM_FILES:
        return FROM_FILES[name]
    if name not in prompt_sets():
        raise ValueError(f"unknown prompt set {name!r} (available: {', '.join(prompt_sets())})")
    return prompt_sets()[name]
