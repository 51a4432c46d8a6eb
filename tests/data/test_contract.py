"""Every prompt set that is found keeps the contract of `tafs.data.prompt_sets.PromptSet`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from support import packages, tiny_hub

from tafs.assets import lockfile
from tafs.data import prompt_sets, prompts, template
from tafs.data.prompt_sets import PromptSet
from tafs.rewards.geneval import geneval_verdict

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Callable[[str], Path]:
    return tiny_hub.folders(tmp_path_factory.mktemp("resources"))


@pytest.fixture(params=list(prompt_sets.prompt_sets()))
def prompt_set(request) -> PromptSet:
    return prompt_sets.prompt_set(request.param)


def test_both_splits_hold_different_prompts_with_text(prompt_set, folder):
    splits = [prompt_set.prompts(split, folder) for split in ("train", "test")]
    texts = [[prompt.text for prompt in split] for split in splits]
    for split, found in zip(splits, texts, strict=True):
        assert found and all(text.strip() == text != "" for text in found)
        assert all(prompt.row.get("prompt", prompt.text) == prompt.text for prompt in split)
    assert len(set(texts[1])) == len(texts[1])
    assert not set(texts[0]) & set(texts[1])


def test_the_digest_is_stable(prompt_set, folder):
    for split in ("train", "test"):
        first, again = (prompts.digest(prompt_set.prompts(split, folder)) for _ in range(2))
        assert first == again


def test_the_description_is_complete(prompt_set, folder):
    assert prompt_set.assets and set(prompt_set.assets) <= {*get_args(prompt_sets.Assets)}
    assert set(prompt_set.resources) <= set(lockfile.read(ROOT / "resources.yaml"))
    assert not prompt_set.resources or prompt_set.assets == ("hub",)
    tags = {prompt.tag for prompt in prompt_set.train(folder)}
    if prompt_set.shares is not None:
        assert set(prompt_set.shares) == tags
        assert sum(prompt_set.shares.values()) == pytest.approx(1)
    for key in prompt_set.metadata:
        assert all(prompt.row[key] and prompt.tag for prompt in prompt_set.test(folder))
    if "include" in prompt_set.metadata:
        for split in ("train", "test"):
            for prompt in prompt_set.prompts(split, folder):
                assert not geneval_verdict([], prompt.row).correct and prompt.tag
    if prompt_set.quotes:
        everything = [*prompt_set.train(folder), *prompt_set.test(folder)]
        assert all(prompts.quoted(prompt.text) for prompt in everything)


def test_an_unknown_prompt_set_is_refused_with_those_available():
    with pytest.raises(
        ValueError, match="unknown prompt set 'genevl' .available: geneval, geneval2, pick"
    ):
        prompt_sets.prompt_set("genevl")


def test_the_template_is_a_prompt_set(tmp_path, folder):
    file = template.write("my_prompts", tmp_path)
    namespace = {"__file__": str(file), "__name__": "my_prompts"}
    exec(compile(file.read_text(), str(file), "exec"), namespace)  # noqa: S102
    stub = namespace["PROMPT_SET"]
    assert [len(stub.prompts(split, folder)) for split in ("train", "test")] == [8, 2]
    test_both_splits_hold_different_prompts_with_text(stub, folder)
    test_the_description_is_complete(stub, folder)
    before = prompts.digest(stub.train(folder))
    text = file.with_suffix(".txt")
    text.write_text(text.read_text().replace("a red circle", "a blue circle"))
    assert prompts.digest(stub.train(folder)) != before
    with pytest.raises(ValueError, match="'geneval' is taken"):
        template.write("geneval", tmp_path)


def test_a_prompt_set_of_an_installed_package_is_found(tmp_path):
    code = (
        "from tafs.assets.sources import *; "
        "source = of(AssetSettings(assets='shapes', lock='', device='cpu', dtype='float32', "
        "gradient_checkpointing=False)); print(prompt_sets_of('shapes'), "
        "len(source.prompts('extra', 'train')), 'geneval' in source.metrics('extra'), "
        "list(source.digests([], ['extra'])))"
    )
    files = {"animals.py": template.TEMPLATE, "animals.txt": template.EXAMPLE}
    points = {"tafs.prompts": {"extra": "their_package.animals"}}
    with packages.installed(tmp_path, files, points):
        out = packages.run_with(tmp_path, code)
    assert out == "('extra', 'shapes') 8 False ['prompts.extra']\n"
