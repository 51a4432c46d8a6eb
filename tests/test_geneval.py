"""GenEval's verdict and the graded credit on hand-made detections."""

import pytest

from tafs.rewards.geneval import Detection, judge, relations


def thing(label, x=0.0, y=0.0, color=None, score=0.9, size=10.0):
    return Detection(label, score, (x, y, x + size, y + size), color)


def include(label, count=1, **extra):
    return {"class": label, "count": count, **extra}


@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [
        (-30, 0, {"left of"}),
        (30, 0, {"right of"}),
        (0, -30, {"above"}),
        (0, 30, {"below"}),
        (30, 30, {"right of", "below"}),
        (1, 1, set()),
        (0, 0, set()),
    ],
)
def test_relations_are_those_of_the_centre_offsets(dx, dy, expected):
    assert relations(thing("a", 50 + dx, 50 + dy), thing("b", 50, 50)) == expected


def test_two_objects_need_both():
    row = {"tag": "two_object", "include": [include("ring"), include("cross")]}
    assert judge([thing("ring"), thing("cross")], row) == (True, 1.0)
    assert judge([thing("ring"), thing("ring")], row) == (False, 0.5)
    assert judge([], row) == (False, 0.0)


@pytest.mark.parametrize(
    ("found", "correct", "graded"),
    [(3, True, 1.0), (2, False, 2 / 3), (4, False, 2 / 3), (0, False, 0.0), (7, False, 0.0)],
)
def test_counting_gives_partial_credit_and_excludes_a_surplus(found, correct, graded):
    row = {
        "tag": "counting",
        "include": [include("ring", 3)],
        "exclude": [{"class": "ring", "count": 4}],
    }
    verdict = judge([thing("ring", 20 * i) for i in range(found)], row)
    assert verdict.correct is correct
    assert verdict.graded == pytest.approx(graded)


def test_a_surplus_costs_nothing_where_the_row_does_not_exclude_it():
    row = {"tag": "single_object", "include": [include("ring")]}
    assert judge([thing("ring"), thing("ring", 30)], row) == (True, 1.0)


def test_a_wrong_colour_keeps_the_credit_for_the_object():
    row = {"tag": "colors", "include": [include("ring", color="red")]}
    assert judge([thing("ring", color="red")], row) == (True, 1.0)
    assert judge([thing("ring", color="blue")], row) == (False, 0.5)


def test_swapped_colours_are_wrong():
    row = {
        "tag": "color_attr",
        "include": [include("ring", color="red"), include("cross", color="blue")],
    }
    assert judge([thing("ring", color="red"), thing("cross", color="blue")], row).correct
    assert judge([thing("ring", color="blue"), thing("cross", color="red")], row) == (False, 0.5)


def test_only_the_most_confident_objects_of_a_class_are_judged():
    row = {"tag": "colors", "include": [include("ring", color="red")]}
    confident_first = [
        thing("ring", color="blue", score=0.9),
        thing("ring", color="red", score=0.5),
    ]
    assert not judge(confident_first, row).correct


def test_a_relation_needs_its_target():
    row = {
        "tag": "position",
        "include": [include("ring"), include("cross", position=["left of", 0])],
    }
    assert judge([thing("ring", 50), thing("cross", 0)], row) == (True, 1.0)
    right = judge([thing("ring", 0), thing("cross", 50)], row)
    assert right.correct is False and right.graded == pytest.approx(2 / 3)
    assert judge([thing("cross", 0)], row).correct is False
