"""GenEval's 553 evaluation rows, and training rows that share no content with them."""

import hashlib
import json
from collections import Counter

import pytest

from tafs.data import geneval
from tafs.data.geneval import evaluation_rows, training_rows
from tafs.data.geneval_rows import TASKS, content

PUBLISHED = {
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
# Length of the published evaluation_metadata.jsonl.
CHARACTERS = 85_209
# Digest of our rows, which agree with the published numbers, length and samples.
SHA256 = "ac3c481628128939793c13827f94fb83c9bc0a7efef1c29bfbe1c117c8c99e5e"
# Copied from the published file, with its spelling.
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


def test_the_rows_have_the_published_number_length_and_digest():
    assert Counter(row["tag"] for row in evaluation_rows()) == PUBLISHED
    assert tuple(PUBLISHED) == TASKS
    assert sum(len(json.dumps(row)) + 1 for row in evaluation_rows()) == CHARACTERS
    lines = sorted(json.dumps(row, sort_keys=True) for row in evaluation_rows())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == SHA256


def test_published_prompts_and_rows_are_in_the_set():
    ours = {(row["tag"], row["prompt"]) for row in evaluation_rows()}
    assert len(sample()) > 160
    assert [pair for pair in sample() if pair not in ours] == []
    assert all(json.loads(line) in evaluation_rows() for line in WHOLE_ROWS)


@pytest.fixture(scope="module")
def training() -> list[dict]:
    return training_rows(3000, seed=0)


def test_training_contents_are_unique_and_not_in_the_evaluation(training):
    contents = {content(row) for row in training}
    assert len(contents) == len(training) == 3000
    assert not contents & {content(row) for row in evaluation_rows()}


def test_the_default_shares_are_flow_grpos(training):
    counts = Counter(row["tag"] for row in training_rows(500, seed=0))
    expected = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
    assert set(counts) == set(expected)
    for task, share in expected.items():
        assert counts[task] == pytest.approx(500 * share / 17, abs=45)


def test_the_share_of_an_exhausted_task_goes_to_the_others(training):
    counts = Counter(row["tag"] for row in training)
    assert counts["counting"] == 80 * 3 - PUBLISHED["counting"]
    assert counts["position"] > 3000 * 7 / 17


@pytest.mark.parametrize("seed", [0, 7])
def test_a_smaller_count_gives_a_prefix_of_the_rows_of_its_seed(training, seed):
    rows = training_rows(60, seed)
    assert training_rows(25, seed) == rows[:25]
    assert (rows == training[:60]) == (seed == 0)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"colours": 1}, "shares: unknown task 'colours'.*single_object"),
        ({"colors": -1}, "shares.colors: -1 is not a share"),
        ({"colors": float("nan")}, "shares.colors: nan is not a share"),
        ({"single_object": 1}, "count: 1 is too many; these shares have 0 rows"),
    ],
)
def test_wrong_shares_are_refused_by_name(shares, message):
    with pytest.raises(ValueError, match=message):
        training_rows(1, seed=0, shares=shares)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (geneval._two_object(3, 9), geneval._two_object(9, 3), True),
        (geneval._position(3, 9, 0), geneval._position(9, 3, 1), True),
        (geneval._position(3, 9, 2), geneval._position(9, 3, 3), True),
        (geneval._color_attr(3, 9, 1, 2), geneval._color_attr(9, 3, 2, 1), True),
        (geneval._counting(3, 0), geneval._counting(3, 1), False),
        (geneval._position(3, 9, 0), geneval._position(3, 9, 1), False),
        (geneval._color_attr(3, 9, 1, 2), geneval._color_attr(3, 9, 2, 1), False),
        (geneval._two_object(3, 9), geneval._position(3, 9, 0), False),
    ],
)
def test_contents_ignore_wording_and_order_only(one, other, same):
    assert one["prompt"] != other["prompt"]
    assert (content(one) == content(other)) == same
