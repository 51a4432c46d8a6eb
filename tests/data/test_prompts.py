"""Reading prompts from files, and Pick-a-Pic's split."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tafs.data import prompts
from tafs.data.plugins import pickapic
from tafs.data.prompts import Prompt


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "dataset" / "pickscore"
    place.mkdir(parents=True)
    (place / "test.txt").write_text("a cat\n\na dog, 4k\n", encoding="utf-8")
    (place / "train.txt").write_text("a bird\n a cat \na bird\nein Bär\n", encoding="utf-8")
    return place


def read(folder, split):
    found = pickapic.PROMPT_SET.prompts(split, lambda _: folder.parents[1])
    assert all(prompt.tag == "" and prompt.row == {"prompt": prompt.text} for prompt in found)
    return [prompt.text for prompt in found]


def test_pickapics_training_prompts_exclude_test_prompts_and_duplicates(folder, capsys):
    assert read(folder, "test") == ["a cat", "a dog, 4k"]
    assert capsys.readouterr().err == ""
    assert read(folder, "train") == ["a bird", "ein Bär"]
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("2 of 4 prompts left out (1 repeated, 1 in test.txt)")


def test_wrong_text_files_are_refused_by_name(folder):
    (folder / "train.txt").write_text("\n \n", encoding="utf-8")
    with pytest.raises(ValueError, match="train.txt: holds no prompt; write one per line"):
        read(folder, "train")
    (folder / "test.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="test.txt: is not UTF-8"):
        read(folder, "test")
    (folder / "test.txt").unlink()
    with pytest.raises(FileNotFoundError, match="test.txt: not found"):
        read(folder, "train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", ":1: not a JSON object with a 'prompt'"),
        ('{"prompt": "a cat"}\n[1]', ":2: not a JSON object with a 'prompt'"),
        ('{"text": "a cat"}', ":1: not a JSON object with a 'prompt'"),
        ('{"prompt": 5}', ":1: not a JSON object with a 'prompt'"),
        ('{"prompt": "\\ud800"}', ":1: not a JSON object with a 'prompt'"),
        (None, ": holds no prompt"),
    ],
)
def test_wrong_json_lines_are_refused_by_file_and_line(tmp_path, line, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text("" if line is None else line + "\n")
    with pytest.raises(ValueError, match=f"{file}{message}"):
        prompts.read(file)


def test_draws_pick_a_tag_first_and_follow_the_shares():
    known = [prompts.Prompt(f"many {i}", {"tag": "many"}) for i in range(30)]
    known.append(prompts.Prompt("one", {"tag": "one"}))
    uniform = prompts.draw(known, 1000, np.random.default_rng(0))
    assert sum(prompt.tag == "one" for prompt in uniform) == pytest.approx(500, abs=60)
    shares = {"many": 0.9, "one": 0.1}
    drawn = prompts.draw(known, 1000, np.random.default_rng(0), shares)
    assert sum(prompt.tag == "one" for prompt in drawn) == pytest.approx(100, abs=40)
    assert prompts.first_of_each(known, 2) == [0, 1, 30]
    assert prompts.first_of_each(known, None) == list(range(31))


@given(
    count=st.integers(1, 40),
    weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=7),
    seed=st.integers(0, 99),
)
def test_balanced_draws_have_the_expected_number_of_each_tag(count, weights, seed):
    shares = {str(tag): weight / sum(weights) for tag, weight in enumerate(weights)}
    known = [Prompt(f"{tag} {n}", {"tag": tag}) for tag in shares for n in range(5)]
    drawn = prompts.draw_balanced(known, count, np.random.default_rng(seed), shares)
    assert len(drawn) == count
    for tag, share in shares.items():
        texts = [prompt.text for prompt in drawn if prompt.tag == tag]
        assert abs(len(texts) - count * share) < 1 + 1e-9
        assert len(set(texts)) == len(texts) or len(texts) > 5


def test_balanced_draws_are_unbiased():
    known = [Prompt(tag, {"tag": tag}) for tag in "abc"]
    shares = {"a": 0.55, "b": 0.15, "c": 0.3}
    rng = np.random.default_rng(0)
    texts = [p.text for _ in range(4000) for p in prompts.draw_balanced(known, 2, rng, shares)]
    for tag, share in shares.items():
        assert texts.count(tag) / len(texts) == pytest.approx(share, abs=0.015)
