"""Pick-a-Pic's prompts in Flow-GRPO's split: 25,432 to train on and 2,048 to evaluate on."""

from __future__ import annotations

import sys
from pathlib import Path

from tafs.data.prompt_sets import Folder, PromptSet
from tafs.data.prompts import Prompt, read_lines


def train(folder: Folder) -> list[Prompt]:
    """The prompts of train.txt, without repeated ones and those of test.txt.

    Prints to stderr how many are left out.

    Raises:
        FileNotFoundError, ValueError: a file is missing or holds no prompt; names it.
    """
    file = _place(folder) / "train.txt"
    held_out = {prompt.text for prompt in test(folder)}
    every = [prompt.text for prompt in read_lines(file)]
    different = list(dict.fromkeys(every))
    kept = [text for text in different if text not in held_out]
    if len(kept) < len(every):
        print(
            f"{file}: {len(every) - len(kept)} of {len(every)} prompts left out "
            f"({len(every) - len(different)} repeated, {len(different) - len(kept)} in test.txt)",
            file=sys.stderr,
        )
    return [Prompt(text, {"prompt": text}) for text in kept]


def test(folder: Folder) -> list[Prompt]:
    """The prompts of test.txt.

    Raises:
        FileNotFoundError, ValueError: the file is missing or holds no prompt; names it.
    """
    return read_lines(_place(folder) / "test.txt")


def _place(folder: Folder) -> Path:
    return folder("pickapic") / "dataset" / "pickscore"


PROMPT_SET = PromptSet(train=train, test=test, resources=("pickapic",))
