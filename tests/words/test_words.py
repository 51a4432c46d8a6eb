"""Captions, renderer and recogniser of the embedded words agree with each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tafs.assets import sources
from tafs.data import prompts
from tafs.data.plugins.words import FOLDER
from tafs.words import captions, pretrain, render, rewards


@pytest.fixture(scope="module")
def splits() -> dict[str, list[prompts.Prompt]]:
    return {split: prompts.read(FOLDER / f"{split}.jsonl") for split in ("train", "test")}


def test_the_shipped_split_is_reproduced_by_the_code(splits):
    train, test = captions.split()
    assert [p.row for p in splits["train"]] == train
    assert [p.row for p in splits["test"]] == test
    assert all({p.tag for p in split} == set(captions.TAGS) for split in splits.values())


def test_no_held_out_text_is_trained_on_in_any_colour_or_as_a_random_text(splits):
    held_out = {p.row["text"] for p in splits["test"]}
    assert len(held_out) == len(splits["test"]) == 3 * captions.TEST_PROMPTS
    drawn = pretrain.draw_texts(3000, seed=5)
    known = {p.row["text"] for p in splits["train"]}
    assert not held_out & (known | {row["text"] for row in drawn})
    assert 0.3 < np.mean([row["text"] not in known for row in drawn]) < 0.6
    assert all(captions.problem(row["prompt"]) is None for row in drawn)


def test_the_recogniser_reads_98_of_100_held_out_texts(splits):
    judged, rng = splits["test"], np.random.default_rng(0)
    signs = [render.sample_sign(p.row["text"], p.row["color"], rng) for p in judged]
    scores = rewards.ocr().score(render.render(signs), judged)
    assert (scores == 1).float().mean() >= 0.98


def test_a_sign_has_its_colour_on_its_background_and_each_letter_in_its_cell():
    background = render.BACKGROUNDS[1]
    [image] = render.render([render.Sign("HI", "DejaVuSans", "red", background)])
    cell = render.IMAGE_SIZE // render.CELLS
    plain = torch.tensor(background)[:, None, None]
    inked = [bool((image[:, :, i : i + cell] != plain).any()) for i in range(0, 24, cell)]
    assert inked == [True, True, False, False]
    darkest = image.flatten(1)[:, image.sum(0).flatten().argmin()]
    torch.testing.assert_close(darkest, torch.tensor(render.COLORS["red"]), atol=0.04, rtol=0)


@pytest.mark.parametrize(
    "text", ["LAMP", '"lamp" in red', '"LAMPS" in red', '"LAMP" in pink', '"LAMP" in red and']
)
def test_a_prompt_that_the_models_cannot_draw_is_refused(text):
    assert sources.text_problem('"LAMP" in red', "words") is None
    assert "is not a caption like" in str(sources.text_problem(text, "words"))


def test_a_quoted_text_is_read_character_by_character_in_both_tokenizers():
    clip, t5 = pretrain.tokenizers()
    for text in ("LAMP", "RED", "407"):
        prompt = f'"{text}" in red'
        pieces = t5.tokenize(prompt)
        assert pieces == ['▁"', *text, '"', "▁in", "▁red"]
        letters = clip.tokenize(prompt)[1 : 1 + len(text)]
        assert [letter.removesuffix("</w>") for letter in letters] == [*text.lower()]
        assert t5.unk_token_id not in t5(prompt).input_ids
        assert len(clip(prompt).input_ids) <= pretrain.MAX_TOKENS
