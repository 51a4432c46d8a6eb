"""GenEval 2's 800 prompts (Kamath et al., 2025, arXiv 2512.16853), tagged by their atoms; CC BY-NC.

They are downloaded, never shipped. GenEval 2 has no prompts to train on: these are GenEval's, none
of which is among them.
"""

from __future__ import annotations

from dataclasses import replace

from tafs.data import prompts
from tafs.data.plugins import geneval
from tafs.data.prompt_sets import Folder, PromptSet
from tafs.data.prompts import Prompt

RESOURCE = "geneval2"


def _test(folder: Folder) -> list[Prompt]:
    found = prompts.read(folder(RESOURCE) / "geneval2_data.jsonl")
    return [replace(p, row={**p.row, "tag": f"{p.row['atom_count']} atoms"}) for p in found]


PROMPT_SET = PromptSet(
    train=geneval.PROMPT_SET.train,
    test=_test,
    shares=geneval.PROMPT_SET.shares,
    resources=(RESOURCE,),
    metadata=("vqa_list",),
)
