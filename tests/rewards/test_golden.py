"""Golden scores: fixed images, and the comparison of their scores with stored ones."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch

from tafs.common import errors
from tafs.rewards import golden
from tafs.rewards.metrics import METRICS, Reward


def test_the_images_do_not_change():
    drawn = golden.images()
    assert list(drawn) == list(golden.PROMPTS)
    content = np.stack(list(drawn.values()))
    assert (content.shape, content.dtype) == ((4, 224, 224, 3), np.uint8)
    assert hashlib.sha256(content.tobytes()).hexdigest().startswith("590605def64855be")


def constant(name: str, value: float) -> Reward:
    return Reward(METRICS[name], lambda images, _: torch.full((len(images),), value))


def test_scores_of_new_weights_are_stored_and_those_of_known_weights_checked(tmp_path):
    file = tmp_path / "golden.json"
    found = golden.record([constant("clip", 0.25)], {"clip": "aaa"}, file)
    assert found == {"clip": dict.fromkeys(golden.PROMPTS, 0.25)}
    golden.record([constant("clip", 0.5)], {"clip": "bbb"}, file)
    stored = {d: dict.fromkeys(golden.PROMPTS, v) for d, v in (("aaa", 0.25), ("bbb", 0.5))}
    assert json.loads(file.read_text()) == {"clip": stored}
    before = file.stat().st_mtime_ns
    message = "reward clip: the golden image 'gradient' scores 0.2505 instead of 0.25; restore"
    for compare in (golden.record, golden.verify):
        compare([constant("clip", 0.25)], {"clip": "aaa"}, file)
        with pytest.raises(errors.RunFailed, match=message):
            compare([constant("clip", 0.2505)], {"clip": "aaa"}, file)
    assert file.stat().st_mtime_ns == before


def test_weights_without_golden_scores_are_refused(tmp_path):
    with pytest.raises(errors.RunFailed, match="reward clip: .*golden.json has no golden scores"):
        golden.verify([constant("clip", 0.25)], {"clip": "aaa"}, tmp_path / "golden.json")


def test_an_optional_metrics_golden_scores_are_stored_when_it_is_first_used(tmp_path):
    file = tmp_path / "golden.json"
    golden.verify([constant("hpsv3", 0.25)], {"hpsv3": "aaa"}, file)
    with pytest.raises(errors.RunFailed, match="reward hpsv3: .* scores 0.5 instead of 0.25"):
        golden.verify([constant("hpsv3", 0.5)], {"hpsv3": "aaa"}, file)


def test_a_server_may_differ_by_half_a_grade(tmp_path):
    file = tmp_path / "golden.json"
    digest = {"unifiedreward": "aaa"}
    golden.record([constant("unifiedreward", 0.6)], digest, file)
    golden.verify([constant("unifiedreward", 0.7)], digest, file)
    with pytest.raises(errors.RunFailed, match="'gradient' scores 0.72 instead of 0.6"):
        golden.verify([constant("unifiedreward", 0.72)], digest, file)


@pytest.mark.parametrize(
    ("expected", "found", "passes"),
    [
        (0.25, 0.2502, True),
        (0.25, 0.2504, False),
        (-2.0, -2.0015, True),
        (-2.0, -2.003, False),
        (0.0, 0.00009, True),
        (0.0, 0.0002, False),
        (0.25, float("nan"), False),
    ],
)
def test_a_score_may_differ_by_a_thousandth(expected, found, passes):
    stored = dict.fromkeys(golden.PROMPTS, expected)
    scores = [expected, expected, found, expected]
    if passes:
        golden.check("clip", scores, stored)
    else:
        with pytest.raises(errors.RunFailed, match="'two discs'"):
            golden.check("clip", scores, stored)


def test_a_score_that_is_nan_is_not_stored(tmp_path):
    with pytest.raises(errors.RunFailed, match="reward clip: .*'gradient' scores nan"):
        golden.record([constant("clip", float("nan"))], {"clip": "aaa"}, tmp_path / "golden.json")
    assert not (tmp_path / "golden.json").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"clip": 1}', '{"clip": {"aaa": [1]}}'])
def test_a_file_without_golden_scores_is_refused_by_name(tmp_path, text):
    file = tmp_path / "golden.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="golden.json: does not hold golden scores; delete it"):
        golden.verify([constant("clip", 0.25)], {"clip": "aaa"}, file)
