"""GenEval's strict verdict and the graded credit on constructed detections."""

import numpy as np
import pytest

from tafs.rewards.geneval import Detection, geneval_verdict, relations


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
def test_relations_follow_the_offset_of_the_centres(dx, dy, expected):
    assert relations(thing("a", 50 + dx, 50 + dy), thing("b", 50, 50)) == expected


TWO = {"tag": "two_object", "include": [include("ring"), include("cross")]}
THREE = {"tag": "counting", "include": [include("ring", 3)], "exclude": [include("ring", 4)]}
ONE = {"tag": "single_object", "include": [include("ring")]}
RED = {"tag": "colors", "include": [include("ring", color="red")]}
BOTH = {
    "tag": "color_attr",
    "include": [include("ring", color="red"), include("cross", color="blue")],
}
LEFT = {"tag": "position", "include": [include("ring"), include("cross", position=["left of", 0])]}
rings = [thing("ring", 20 * i) for i in range(7)]
red, blue = thing("ring", color="red"), thing("ring", color="blue")


@pytest.mark.parametrize(
    ("row", "found", "correct", "graded"),
    [
        (TWO, [thing("ring"), thing("cross")], True, 1.0),
        (TWO, [thing("ring"), thing("ring")], False, 0.5),
        (TWO, [], False, 0.0),
        (THREE, rings[:3], True, 1.0),
        (THREE, rings[:2], False, 2 / 3),
        (THREE, rings[:4], False, 2 / 3),
        (THREE, [], False, 0.0),
        (THREE, rings, False, 0.0),
        (ONE, rings[:2], True, 1.0),  # a surplus counts only if the row excludes it
        (RED, [red], True, 1.0),
        (RED, [blue], False, 0.5),
        (RED, [blue, red], False, 0.5),  # only the most confident object counts
        (BOTH, [red, thing("cross", color="blue")], True, 1.0),
        (BOTH, [blue, thing("cross", color="red")], False, 0.5),
        (LEFT, [thing("ring", 50), thing("cross", 0)], True, 1.0),
        (LEFT, [thing("ring", 0), thing("cross", 50)], False, 2 / 3),
        (LEFT, [thing("cross", 0)], False, 1 / 3),
    ],
)
def test_the_verdict_of_constructed_detections(row, found, correct, graded):
    assert geneval_verdict(found, row) == (correct, pytest.approx(graded))


def test_offsets_below_a_thousandth_of_a_pixel_are_ignored():
    a, b = (Detection("a", 0.9, (x, 0.0, x, 0.0), None) for x in (0.0, 0.0009))
    assert relations(a, b) == set()
    far = a._replace(box=(0.002, 0.0, 0.002, 0.0))
    assert relations(far, a) == {"right of"}


def test_a_prompt_without_metadata_is_refused_by_its_text():
    with pytest.raises(ValueError, match="GenEval cannot judge 'a fine day': no 'include'"):
        geneval_verdict([thing("ring")], {"prompt": "a fine day"})


RING = include("ring")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"include": []}, "no 'include' metadata"),
        ({"include": ["ring"]}, "'include' needs a class and a count, not 'ring'"),
        ({"include": [{"class": "ring"}]}, "'include' needs a class and a count, not {'class'"),
        ({"include": [include("ring", 0)]}, "'include' needs a class and a count, not"),
        (
            {"include": [RING], "exclude": [{"count": 1}]},
            "'exclude' needs a class and a count, not",
        ),
        ({"include": [include("ring", position=["above", 0])]}, "a position is a relation and"),
        ({"include": [RING, include("ring", position=["above", -1])]}, "a position is a relation"),
        ({"include": [RING, include("ring", position="above")]}, "of 'include', not 'above'"),
    ],
)
def test_malformed_metadata_is_refused_in_one_line(row, message):
    with pytest.raises(ValueError, match=f"^GenEval cannot judge 'a': .*{message}") as error:
        geneval_verdict([thing("ring")], {"prompt": "a", **row})
    assert "\n" not in str(error.value)


# -- an independent implementation of evaluate_images.py in https://github.com/djghosh13/geneval ---
# A requirement holds if there are enough objects, if the most confident of them have the required
# colour, and if each has the required relation to each object of an earlier requirement that holds.
# An image is correct if all requirements hold and no excluded class reaches its count.


def direction(box, other):
    """The relations of two boxes [2 corners, xy], in numpy."""
    offset = box.mean(0) - other.mean(0)
    slack = 0.1 * (np.ptp(box, axis=0) + np.ptp(other, axis=0))
    rest = np.sign(offset) * np.clip(np.abs(offset) - slack, 0, None)
    if np.abs(rest).max() < 1e-3:
        return ()
    x, y = rest / np.hypot(*offset)
    named = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return [name for name, holds in named.items() if holds]


def is_correct(found, row):
    holds = []
    for need in row["include"]:
        first = [d for d in found if d.label == need["class"]][: need["count"]]
        fine = len(first) == need["count"]
        if fine and "color" in need:
            fine = {d.color for d in first} == {need["color"]}
        if fine and "position" in need:
            relation, target = need["position"]
            fine = holds[target] is not None and all(
                relation in direction(np.reshape(a.box, (2, 2)), np.reshape(b.box, (2, 2)))
                for a in first
                for b in holds[target]
            )
        holds.append(first if fine else None)
    surplus = any(
        sum(d.label == limit["class"] for d in found) >= limit["count"]
        for limit in row.get("exclude", ())
    )
    return None not in holds and not surplus


def draw_row(rng):
    """One to three requirements of classes, counts, colours and relations in any mixture."""
    needs = []
    for i in range(rng.integers(1, 4)):
        need = include(str(rng.choice(["ring", "cross"])), int(rng.choice([1, 1, 1, 2])))
        if rng.random() < 0.3:
            need["color"] = str(rng.choice(["red", "blue"]))
        if i and rng.random() < 0.6:
            relation = str(rng.choice(["left of", "right of", "above", "below"]))
            need["position"] = [relation, int(rng.integers(i))]
        needs.append(need)
    limits = [
        {"class": str(rng.choice(["ring", "cross"])), "count": int(rng.integers(2, 5))}
        for _ in range(rng.integers(3))
    ]
    return {"tag": "mixed", "include": needs, **({"exclude": limits} if limits else {})}


def draw_detections(rng):
    """Up to five objects on a coarse grid, so that centres and thresholds often coincide."""
    found = []
    for _ in range(rng.integers(1, 6)):
        x, y, width, height = (float(v) for v in rng.integers(0, 5, 4) * 5)
        color = "red" if rng.random() < 0.8 else "blue"
        box = (x, y, x + width, y + height)
        found.append(Detection(str(rng.choice(["ring", "cross"])), 0.5, box, color))
    return found


def test_the_strict_verdict_equals_an_independent_implementation_on_1000_cases():
    rng = np.random.default_rng(0)
    cases = [(draw_detections(rng), draw_row(rng)) for _ in range(1000)]
    verdicts = [geneval_verdict(found, row).correct for found, row in cases]
    assert verdicts == [is_correct(found, row) for found, row in cases]
    assert 150 < sum(verdicts) < 850


def test_correct_images_have_full_credit_if_nothing_is_excluded():
    rng = np.random.default_rng(1)
    for _ in range(500):
        found, row = draw_detections(rng), draw_row(rng)
        row.pop("exclude", None)
        verdict = geneval_verdict(found, row)
        assert verdict.correct == (verdict.graded == pytest.approx(1))
