"""Captions, scenes, renderer and detector of the embedded models agree with each other."""

import numpy as np
import pytest
import torch

from tafs.data import prompts
from tafs.data.geneval_rows import TASKS, objects
from tafs.data.plugins.shapes import FOLDER
from tafs.rewards.geneval import geneval_verdict
from tafs.shapes import annotators, captions, scenes
from tafs.shapes.detector import detect
from tafs.shapes.render import UNIT_AREA, coverage, render


@pytest.fixture(scope="module")
def splits() -> dict[str, list[prompts.Prompt]]:
    return {split: prompts.read(FOLDER / f"{split}.jsonl") for split in ("train", "test")}


@pytest.fixture(scope="module")
def rendered(splits):
    """5,000 scenes; all prompts are equally likely."""
    rng = np.random.default_rng(11)
    everything = splits["train"] + splits["test"]
    drawn = [everything[i] for i in rng.integers(len(everything), size=5000)]
    drawn_scenes = [scenes.sample_scene(p.row, rng) for p in drawn]
    return drawn, drawn_scenes, render(drawn_scenes)


def test_the_shipped_split_is_reproduced_by_the_code(splits):
    train, test = captions.split()
    assert [p.row for p in splits["train"]] == train
    assert [p.row for p in splits["test"]] == test
    assert all({p.tag for p in split} == set(TASKS) for split in splits.values())
    assert len({p.text for split in splits.values() for p in split}) == len(train + test) >= 1000


def test_no_test_content_is_in_the_training_split_under_any_wording(splits):
    def contents(split):
        return {objects(p.row) for p in splits[split] if p.tag != "single_object"}

    assert not contents("train") & contents("test")


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_coverage_sums_to_the_area_of_the_shape(shape):
    r = 4.0
    covered = coverage(
        torch.tensor([scenes.SHAPES.index(shape)]), *(torch.tensor([v]) for v in (12.3, 11.6, r))
    )
    assert covered.sum().item() == pytest.approx(UNIT_AREA[shape] * r**2, rel=0.03)


def test_glyphs_are_inside_the_image_and_do_not_touch(rendered):
    gap = scenes.LAYOUTS["dense"].gap
    for scene in rendered[1]:
        for i, a in enumerate(scene):
            assert a.r <= a.x <= scenes.IMAGE_SIZE - a.r and a.r <= a.y <= scenes.IMAGE_SIZE - a.r
            for b in scene[i + 1 :]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.r + b.r + gap


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.04])
def test_the_detector_is_right_on_clean_scenes_and_on_999_of_1000_noisy_ones(rendered, noise):
    """Noise may join two glyphs of a dense scene to one component, which fits no template."""
    drawn, drawn_scenes, images = rendered
    grain = torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    wrong = [
        (prompt.text, scene)
        for prompt, scene, found in zip(
            drawn, drawn_scenes, detect(images + noise * grain), strict=True
        )
        if not geneval_verdict(found, prompt.row).correct
        or sorted((d.label, d.color) for d in found) != sorted((g.shape, g.color) for g in scene)
    ]
    assert len(wrong) <= (len(drawn) // 1000 if noise else 0), wrong


def test_detection_does_not_depend_on_the_batch(rendered):
    images = rendered[2][:20]
    alone = [detect(image[None])[0] for image in images]
    assert detect(images) == alone
    assert detect(torch.ones(2, 3, 24, 24)) == [[], []]


def test_the_detector_refuses_images_of_other_sizes():
    with pytest.raises(ValueError, match=r"\[1, 3, 32, 32\]"):
        detect(torch.ones(1, 3, 32, 32))


@pytest.mark.parametrize("tag", TASKS)
def test_an_altered_row_has_other_requirements(splits, tag):
    rng = np.random.default_rng(0)
    rows = [p.row for p in splits["train"] if p.tag == tag][:40]
    for row in rows:
        altered = annotators.alter(dict(row), rng)
        assert altered["include"] != row["include"]
        scene = scenes.sample_scene(altered, rng)
        if tag != "position":  # a diagonal offset satisfies two relations
            assert not geneval_verdict(annotators.boxes(scene), row).correct
