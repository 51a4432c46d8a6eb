"""Golden scores: fixed images, and the comparison of their scores with stored ones."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch

from tafs.assets import shipped_scores
from tafs.common import errors
from tafs.data.prompts import quoted
from tafs.rewards import golden, statistics
from tafs.rewards.metrics import METRICS, Reward
from tafs.rewards.ocr import OCR


def test_the_images_do_not_change():
    drawn = golden.images()
    assert list(drawn) == list(golden.PROMPTS)
    content = np.stack(list(drawn.values()))
    assert (content.shape, content.dtype) == ((5, 224, 224, 3), np.uint8)
    digests = {n: hashlib.sha256(content[:n].tobytes()).hexdigest()[:16] for n in (4, 5)}
    assert digests == {4: "590605def64855be", 5: "b6f5d21eceee0e0b"}


@pytest.mark.parametrize("line", [None, (48, 96)])
def test_the_text_of_the_last_image_is_what_its_prompt_quotes(line):
    [*_, (name, image)] = golden.images().items()
    shown = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    prompt = golden.PROMPTS[name]
    assert (name, quoted(prompt.text)) == ("text", "STOP")
    assert OCR(line)(shown, [prompt]).tolist() == [1]


def constant(name: str, value: float) -> Reward:
    return Reward(METRICS[name], lambda images, _: torch.full((len(images),), value))


def test_scores_of_new_weights_are_stored_and_those_of_known_weights_checked(tmp_path, capsys):
    file = tmp_path / "golden.json"
    found = golden.record([constant("clip", 0.25)], {"clip": "aaa"}, file)
    assert found == {"clip": dict.fromkeys(golden.PROMPTS, 0.25)}
    said = f"reward clip: stored the golden scores of its weights in {file}\n"
    assert capsys.readouterr().out == said
    golden.record([constant("clip", 0.5)], {"clip": "bbb"}, file)
    stored = {d: dict.fromkeys(golden.PROMPTS, v) for d, v in (("aaa", 0.25), ("bbb", 0.5))}
    assert json.loads(file.read_text()) == {"clip": stored}
    before = file.stat().st_mtime_ns
    message = "reward clip: the golden image 'gradient' scores 0.2505 instead of 0.25; restore"
    golden.record([constant("clip", 0.25)], {"clip": "aaa"}, file)
    with pytest.raises(errors.RunFailed, match=message):
        golden.record([constant("clip", 0.2505)], {"clip": "aaa"}, file)
    assert file.stat().st_mtime_ns == before
    assert golden.stored(file, {"clip": "aaa", "hpsv3": "aaa"}) == {
        "clip": stored["aaa"],
        "hpsv3": {},
    }


def test_images_that_an_earlier_file_does_not_have_are_added_to_it(tmp_path, capsys):
    file = tmp_path / "golden.json"
    earlier = dict.fromkeys(list(golden.PROMPTS)[:-1], 0.25)
    file.write_text(json.dumps({"clip": {"aaa": earlier}}))
    with pytest.raises(errors.RunFailed, match="'gradient' scores 0.5 instead of 0.25"):
        golden.record([constant("clip", 0.5)], {"clip": "aaa"}, file)
    assert json.loads(file.read_text()) == {"clip": {"aaa": earlier}}
    golden.record([constant("clip", 0.25)], {"clip": "aaa"}, file)
    assert json.loads(file.read_text()) == {"clip": {"aaa": {**earlier, "text": 0.25}}}
    said = f"reward clip: stored the golden scores of 'text' in {file}\n"
    assert capsys.readouterr().out == said


def test_of_two_processes_that_store_at_once_the_second_is_checked(tmp_path, monkeypatch):
    file, read = tmp_path / "golden.json", golden._read
    answers = [{}]  # what the file held before the other process wrote it
    monkeypatch.setattr(golden, "_read", lambda path: answers.pop() if answers else read(path))
    file.write_text(json.dumps({"clip": {"aaa": dict.fromkeys(golden.PROMPTS, 0.25)}}))
    with pytest.raises(errors.RunFailed, match="scores 0.5 instead of 0.25"):
        golden.record([constant("clip", 0.5)], {"clip": "aaa"}, file)
    answers.append({})
    golden.record([constant("hpsv3", 0.5)], {"hpsv3": "aaa"}, file)
    assert set(json.loads(file.read_text())) == {"clip", "hpsv3"}


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(golden, "_verified", {})


def test_every_reward_without_a_download_gives_its_shipped_scores(unverified):
    found = list(shipped_scores.rewards())
    assert all(golden.verify_shipped(reward) for reward in found)
    assert {(reward.name, reward.metric.version) for reward in found} == {
        (name, version) for name, of in golden._shipped().items() for version in of
    }
    assert {"ocr", "jpeg_compressibility", "sharpness"} <= {reward.name for reward in found}


def test_a_reward_with_shipped_scores_is_checked_once_per_process_and_not_stored(
    unverified, tmp_path
):
    calls = []

    def altered(images: torch.Tensor, _: object) -> torch.Tensor:
        calls.append(len(images))
        return 1.002 * statistics.saturation(images)

    broken = Reward(METRICS["saturation"], altered)
    with pytest.raises(errors.RunFailed, match="reward saturation: the golden image 'gradient'"):
        golden.verify_shipped(broken)
    kept = Reward(METRICS["saturation"], lambda images, _: altered(images, _) / 1.002)
    golden.verify_shipped(kept)
    assert golden.record([kept], {"saturation": "aaa"}, tmp_path / "golden.json")["saturation"]
    assert calls == [len(golden.PROMPTS)] * 2 and not list(tmp_path.iterdir())


def test_another_version_has_no_shipped_scores():
    metric = dataclasses.replace(METRICS["saturation"], version="another")
    assert golden.verify_shipped(Reward(metric, lambda images, _: images.mean((1, 2, 3)))) is None


def test_a_letter_read_into_an_image_without_text_passes_and_a_misread_text_does_not():
    stored = golden._shipped()["ocr"][METRICS["ocr"].version]
    golden.check(METRICS["ocr"], {**stored, "rings": 0.0, "disc": 1 / 19}, stored)
    with pytest.raises(errors.RunFailed, match="reward ocr: the golden image 'text' scores 0.75"):
        golden.check(METRICS["ocr"], {**stored, "text": 0.75}, stored)


def test_a_server_may_differ_by_half_a_grade(tmp_path):
    file = tmp_path / "golden.json"
    digest = {"unifiedreward": "aaa"}
    golden.record([constant("unifiedreward", 0.6)], digest, file)
    golden.record([constant("unifiedreward", 0.7)], digest, file)
    with pytest.raises(errors.RunFailed, match="'gradient' scores 0.72 instead of 0.6"):
        golden.record([constant("unifiedreward", 0.72)], digest, file)


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
    scores = {**stored, "two discs": found}
    if passes:
        golden.check(METRICS["clip"], scores, stored)
    else:
        with pytest.raises(errors.RunFailed, match="'two discs'"):
            golden.check(METRICS["clip"], scores, stored)


def test_a_score_that_is_nan_is_not_stored(tmp_path):
    with pytest.raises(errors.RunFailed, match="reward clip: .*'gradient' scores nan"):
        golden.record([constant("clip", float("nan"))], {"clip": "aaa"}, tmp_path / "golden.json")
    assert not (tmp_path / "golden.json").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"clip": 1}', '{"clip": {"aaa": [1]}}'])
def test_a_file_without_golden_scores_is_refused_by_name(tmp_path, text):
    file = tmp_path / "golden.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="golden.json: does not hold golden scores; delete it"):
        golden.record([constant("clip", 0.25)], {"clip": "aaa"}, file)
