"""`tafs new prompts NAME` writes a prompt set, NAME.py and NAME.txt, that works."""

from __future__ import annotations

from pathlib import Path

from tafs.common import stubs
from tafs.data.prompt_sets import PLUGINS

FOLDER = Path(__file__).parent / "plugins"
TEMPLATE = '''"""The prompts of {name}.txt, one per line; every fifth is held out."""

from __future__ import annotations

from pathlib import Path

from tafs.data.prompt_sets import Folder, PromptSet
from tafs.data.prompts import Prompt, read_lines

FILE = Path(__file__).with_suffix(".txt")


def every() -> list[Prompt]:
    """All different prompts."""
    return list({prompt.text: prompt for prompt in read_lines(FILE)}.values())


def train(folder: Folder) -> list[Prompt]:
    """`folder(resource)` is where an entry of PROMPT_SET.resources is."""
    return [prompt for i, prompt in enumerate(every()) if i % 5 != 4]


def test(folder: Folder) -> list[Prompt]:
    return every()[4::5]


# The models of "shapes" know only the words of tafs/data/shapes/train.jsonl.
PROMPT_SET = PromptSet(train=train, test=test, assets=("shapes", "hub"))
'''
EXAMPLE = """a red circle
two blue squares
a green ring left of a black cross
a yellow triangle
three circles
a black ring
a square above a triangle
a red square and a blue ring
four crosses
a green triangle
"""


def write(name: str, folder: Path = FOLDER) -> Path:
    """Write the stub and its prompts; return the stub.

    Raises:
        ValueError: the name is invalid or taken, or the folder does not exist.
    """
    file = stubs.write(PLUGINS, name, folder, TEMPLATE.replace("{name}", name))
    file.with_suffix(".txt").write_text(EXAMPLE, encoding="utf-8")
    return file


def create(name: str) -> str:
    """Write the stub; return what was written and what to do next. The errors are `write`'s."""
    file = write(name)
    return (
        f"Wrote {file} and {file.with_suffix('.txt')}. Put one prompt per line into the text "
        "file, test the set, then select it in a scale's `prompts` in config.yaml:\n"
        f"  python -m pytest tests/data/test_contract.py -k {name}\n"
        "  snakemake all --config scale=smoke"
    )
