"""GenEval's own 553 prompts, rows to train on that share no content with them, and Pick-a-Pic's."""

import hashlib
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tafs.data import geneval, prompts
from tafs.data.geneval import content, evaluation_rows, pickapic, training_rows
from tafs.data.geneval_rows import TASKS

PUBLISHED = {
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
# Of the published evaluation_metadata.jsonl.
CHARACTERS = 85_209
# Of our rows, which have the published numbers, length and samples.
SHA256 = "ac3c481628128939793c13827f94fb83c9bc0a7efef1c29bfbe1c117c8c99e5e"
# Copied from it; the odd spellings are its own.
SAMPLE = {
    "two_object": """
        a bench and a sports ball; a toothbrush and a snowboard; a toaster and an oven
        a broccoli and a vase; a tennis racket and a wine glass; a fork and a knife
        a hair drier and a cake; a horse and a giraffe; a horse and a computer keyboard
        a toothbrush and a carrot; a cake and a zebra; a hair drier and a bear
        a knife and a zebra; a couch and a wine glass; a frisbee and a vase
        a book and a laptop; a dining table and a bear; a frisbee and a couch
        a couch and a horse; a toilet and a computer mouse; a bottle and a refrigerator
        a potted plant and a backpack; a skateboard and a cake; a broccoli and a parking meter
        a zebra and a bed; an oven and a bed; a baseball bat and a fork; a vase and a spoon
        a skateboard and a sink; a pizza and a bench; a bowl and a pizza; a person and an apple
        a stop sign and a motorcycle; a handbag and a refrigerator; a sports ball and a cow
    """,
    "counting": """
        two clocks; two backpacks; four handbags; two frisbees; three sports balls; two bears
        two ties; four sinks; two toothbrushs; three persons; three tennis rackets; four bowls
        four vases; three cups; four computer keyboards; three sinks; two ovens; two toilets
        two bicycles; two trains; three oranges; three buses; three handbags; three snowboards
        two snowboards; four dogs; three apples; two sheeps; three hot dogs; three kites
        four benchs; three benchs; two sandwichs; four knifes; four tvs; two wine glasses
        four apples; four microwaves; four traffic lights; two hair driers; three refrigerators
    """,
    "colors": """
        a blue fire hydrant; a pink car; a purple cup; a blue cow; a yellow boat; a blue umbrella
        a blue elephant; a yellow elephant; a red bicycle; a purple suitcase; a purple hair drier
        a white sandwich; a purple elephant; a green microwave; a red zebra; a red apple
        an orange tv; an orange orange; a white orange; a brown orange; a yellow orange
        a green traffic light; a black donut; a brown skis; a black skis; an orange scissors
        a yellow tv remote; a black tv remote; an orange computer mouse; a green computer mouse
        a purple potted plant; a red potted plant; a pink potted plant; a red backpack
    """,
    "position": """
        a dog right of a teddy bear; a wine glass above a kite; a couch below a cup
        a laptop left of a cow; a fork above a hair drier; a tie right of a baseball bat
        a stop sign above a fork; a bird below a skateboard; an apple above a tv
        a train above a potted plant; a truck left of a refrigerator; a tv remote below a cow
        a bottle right of a train; a dog above a cow; a skateboard above a person
        a baseball glove below an umbrella; a dining table right of an oven
        a hot dog left of a suitcase; a bus below a toothbrush; a backpack right of a sandwich
        a cake below a baseball bat; a dog right of a tie; a suitcase right of a boat
        a bear above a clock; a tv remote left of an umbrella; a sports ball left of an umbrella
        a bicycle above a parking meter; a tennis racket right of a spoon; a frisbee above a truck
    """,
    "color_attr": """
        a purple wine glass and a black apple; a green bus and a purple microwave
        a green skis and a brown airplane; a yellow computer keyboard and a black sink
        a pink oven and a green motorcycle; a purple parking meter and a red laptop
        a yellow skateboard and an orange computer mouse; a red skis and a brown tie
        a pink skateboard and a black train; a white handbag and a purple bed
        a purple elephant and a brown sports ball; a purple dog and a black dining table
        a white dining table and a red car; a blue cell phone and a green apple
        a red car and an orange potted plant; a brown carrot and a white potted plant
        a black kite and a green bear; a blue laptop and a brown bear
        a green teddy bear and a brown kite; a yellow stop sign and a blue potted plant
        an orange snowboard and a green cat; an orange truck and a pink sink
        a white boat and an orange hot dog; a purple backpack and a white umbrella
        a red bowl and a pink sink; a blue handbag and a white cell phone
    """,
}
WHOLE_ROWS = (
    '{"tag": "single_object", "include": [{"class": "skis", "count": 1}], '
    '"prompt": "a photo of a skis"}',
    '{"tag": "two_object", "include": [{"class": "frisbee", "count": 1}, '
    '{"class": "apple", "count": 1}], "prompt": "a photo of a frisbee and an apple"}',
    '{"tag": "counting", "include": [{"class": "bus", "count": 4}], '
    '"exclude": [{"class": "bus", "count": 5}], "prompt": "a photo of four buses"}',
    '{"tag": "colors", "include": [{"class": "toaster", "count": 1, "color": "orange"}], '
    '"prompt": "a photo of an orange toaster"}',
    '{"tag": "position", "include": [{"class": "oven", "count": 1}, {"class": "dining table", '
    '"count": 1, "position": ["right of", 0]}], '
    '"prompt": "a photo of a dining table right of an oven"}',
    '{"tag": "color_attr", "include": [{"class": "handbag", "count": 1, "color": "pink"}, '
    '{"class": "scissors", "count": 1, "color": "black"}], '
    '"prompt": "a photo of a pink handbag and a black scissors"}',
)


def sample() -> list[tuple[str, str]]:
    return [
        (tag, f"a photo of {text.strip()}")
        for tag, lines in SAMPLE.items()
        for line in lines.strip().splitlines()
        for text in line.split(";")
    ]


def test_the_set_has_the_published_number_of_rows_of_each_task():
    assert Counter(row["tag"] for row in evaluation_rows()) == PUBLISHED
    assert tuple(PUBLISHED) == TASKS


def test_the_set_has_the_published_length():
    assert sum(len(json.dumps(row)) + 1 for row in evaluation_rows()) == CHARACTERS


def test_the_set_stays_as_it_is():
    lines = sorted(json.dumps(row, sort_keys=True) for row in evaluation_rows())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == SHA256


def test_published_prompts_are_in_the_set():
    ours = {(row["tag"], row["prompt"]) for row in evaluation_rows()}
    assert len(sample()) > 160
    assert [pair for pair in sample() if pair not in ours] == []


@pytest.mark.parametrize("line", WHOLE_ROWS)
def test_published_rows_are_in_the_set(line):
    assert json.loads(line) in evaluation_rows()


def test_every_class_is_asked_for_alone():
    rows = [row for row in evaluation_rows() if row["tag"] == "single_object"]
    assert {row["include"][0]["class"] for row in rows} == set(geneval.CLASSES)
    assert len(geneval.CLASSES) == 80


def test_rows_survive_a_file(tmp_path):
    file = tmp_path / "test.jsonl"
    prompts.write(file, evaluation_rows())
    read = prompts.read(file)
    assert [dict(prompt.row) for prompt in read] == evaluation_rows()
    assert [prompt.tag for prompt in read] == [row["tag"] for row in evaluation_rows()]


# -- training --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def training() -> list[dict]:
    return training_rows(3000, seed=0)


def test_no_content_of_the_evaluation_is_trained_on(training):
    assert not {content(row) for row in training} & {content(row) for row in evaluation_rows()}


def test_no_content_is_trained_on_twice(training):
    assert len({content(row) for row in training}) == len(training) == 3000


def test_the_default_shares_are_flow_grpos(training):
    counts = Counter(row["tag"] for row in training_rows(500, seed=0))
    expected = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
    assert set(counts) == set(expected)
    for task, share in expected.items():
        assert counts[task] == pytest.approx(500 * share / 17, abs=45)


def test_a_task_that_is_exhausted_leaves_its_share_to_the_others(training):
    counts = Counter(row["tag"] for row in training)
    assert counts["counting"] == 80 * 3 - PUBLISHED["counting"]
    assert counts["position"] > 3000 * 7 / 17


def test_single_objects_are_all_in_the_evaluation():
    with pytest.raises(ValueError, match="count: 1 is too many; these shares have 0 rows"):
        training_rows(1, seed=0, shares={"single_object": 1})


@settings(max_examples=8)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(0, 60))
def test_a_smaller_count_gives_the_first_of_the_same_rows(seed, count):
    assert training_rows(count, seed) == training_rows(60, seed)[:count]


def test_another_seed_gives_other_rows(training):
    other = training_rows(300, seed=1)
    assert [row["prompt"] for row in other] != [row["prompt"] for row in training[:300]]


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"colours": 1}, "shares: unknown task 'colours'.*single_object"),
        ({"colors": -1}, "shares.colors: -1 is no share"),
        ({"colors": float("nan")}, "shares.colors: nan is no share"),
    ],
)
def test_wrong_shares_are_named(shares, message):
    with pytest.raises(ValueError, match=message):
        training_rows(1, seed=0, shares=shares)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (geneval._two_object(3, 9), geneval._two_object(9, 3)),
        (geneval._position(3, 9, 0), geneval._position(9, 3, 1)),
        (geneval._position(3, 9, 2), geneval._position(9, 3, 3)),
        (geneval._color_attr(3, 9, 1, 2), geneval._color_attr(9, 3, 2, 1)),
    ],
)
def test_a_content_is_the_same_under_another_wording(one, other):
    assert one["prompt"] != other["prompt"]
    assert content(one) == content(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (geneval._counting(3, 0), geneval._counting(3, 1)),
        (geneval._position(3, 9, 0), geneval._position(3, 9, 1)),
        (geneval._color_attr(3, 9, 1, 2), geneval._color_attr(3, 9, 2, 1)),
        (geneval._two_object(3, 9), geneval._position(3, 9, 0)),
    ],
)
def test_other_contents_differ(one, other):
    assert content(one) != content(other)


# -- Pick-a-Pic ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "test.txt").write_text("a cat\n\na dog, 4k\n", encoding="utf-8")
    (tmp_path / "train.txt").write_text("a bird\n a cat \na bird\nein Bär\n", encoding="utf-8")
    return tmp_path


def test_test_prompts_and_repeated_ones_are_not_trained_on(folder, capsys):
    assert pickapic(folder, "train") == [{"prompt": "a bird"}, {"prompt": "ein Bär"}]
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("2 of 4 prompts left out (1 repeated, 1 in test.txt)")


def test_the_test_prompts_are_the_files(folder, capsys):
    assert pickapic(folder, "test") == [{"prompt": "a cat"}, {"prompt": "a dog, 4k"}]
    assert capsys.readouterr().err == ""


def test_prompts_without_a_task_have_an_empty_tag(folder, tmp_path):
    prompts.write(tmp_path / "rows.jsonl", pickapic(folder, "test"))
    assert [p.tag for p in prompts.read(tmp_path / "rows.jsonl")] == ["", ""]


def test_what_is_wrong_with_the_files_is_named(folder):
    with pytest.raises(ValueError, match="unknown split 'val'.*train, test"):
        pickapic(folder, "val")
    (folder / "train.txt").write_text("\n \n", encoding="utf-8")
    with pytest.raises(ValueError, match="train.txt: holds no prompt"):
        pickapic(folder, "train")
    (folder / "test.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="test.txt: is not UTF-8"):
        pickapic(folder, "test")
    (folder / "test.txt").unlink()
    with pytest.raises(FileNotFoundError, match="test.txt: not found"):
        pickapic(folder, "train")
