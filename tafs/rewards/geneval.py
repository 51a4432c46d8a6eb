"""GenEval's verdict on detections (Ghosh et al., 2023) and the graded score used as a reward.

The verdict depends only on the class, box and colour of objects, so that the embedded detector
and a real instance segmenter share this code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

POSITION_THRESHOLD = 0.1  # offsets up to this share of the summed box sizes are ignored
NO_OFFSET = 1e-3  # pixels; smaller remaining offsets are zero


class Detection(NamedTuple):
    """One object; `box` is (x0, y0, x1, y1) in pixels, with y pointing down."""

    label: str
    score: float
    box: tuple[float, float, float, float]
    color: str | None


class Verdict(NamedTuple):
    """`correct` is GenEval's strict verdict; `graded` in [0, 1] gives partial credit."""

    correct: bool
    graded: float


def relations(a: Detection, b: Detection) -> set[str]:
    """The relations of `a` to `b` in GenEval, from the direction of the centres' offset."""
    offset, revised = [], []
    for low, high in ((0, 2), (1, 3)):  # x, y
        step = (a.box[low] + a.box[high]) / 2 - (b.box[low] + b.box[high]) / 2
        sizes = abs(a.box[high] - a.box[low]) + abs(b.box[high] - b.box[low])
        magnitude = max(abs(step) - POSITION_THRESHOLD * sizes, 0.0)
        offset.append(step)
        revised.append(magnitude if step > 0 else -magnitude)
    if max(abs(value) for value in revised) < NO_OFFSET:
        return set()
    norm = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    dx, dy = (value / norm for value in revised)
    named = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in named.items() if holds}


def check_metadata(row: Mapping[str, Any]) -> None:
    """Refuse a row that is not GenEval's metadata, as in `geneval_verdict`.

    Raises:
        ValueError: names the prompt and the entry.
    """
    where = f"GenEval cannot judge {row.get('prompt', '')!r}"
    if not row.get("include"):
        raise ValueError(f"{where}: no 'include' metadata")
    for key in ("include", "exclude"):
        for index, item in enumerate(row.get(key, ())):
            match item:
                case {"class": str(), "count": int(count)} if count > 0:
                    pass
                case _:
                    raise ValueError(f"{where}: {key!r} needs a class and a count, not {item!r}")
            match item.get("position"):
                case None:
                    pass
                case [str(), int(target)] if 0 <= target < index:
                    pass
                case other:
                    raise ValueError(
                        f"{where}: a position is a relation and the index of an earlier entry of "
                        f"'include', not {other!r}"
                    )


def geneval_verdict(detections: Sequence[Detection], row: Mapping[str, Any]) -> Verdict:
    """GenEval's strict verdict and the graded credit of one image.

    The strict verdict is that of evaluate_images.py in https://github.com/djghosh13/geneval.
    The graded score is the mean credit of the row's requirements: 1 - |n - k| / n where k of n
    objects are found (a surplus counts only if the row excludes it), the share of correct colours,
    and the share of correct relations.

    Args:
        detections: the image's objects, most confident first.
        row: metadata {tag, prompt, include: [{class, count, color?, position?}], exclude?}.

    Raises:
        ValueError: the row has another format; names the prompt.
    """
    check_metadata(row)
    by_class: dict[str, list[Detection]] = {}
    for detection in detections:
        by_class.setdefault(detection.label, []).append(detection)
    limits = row.get("exclude", ())
    limited = {limit["class"] for limit in limits}
    correct = all(len(by_class.get(limit["class"], [])) < limit["count"] for limit in limits)
    credits: list[float] = []
    matched: list[list[Detection] | None] = []
    for item in row["include"]:
        objects = by_class.get(item["class"], [])
        wanted = item["count"]
        found = objects[:wanted]
        complete = len(found) == wanted
        counted = len(objects) if item["class"] in limited else len(found)
        credits.append(max(0.0, 1 - abs(wanted - counted) / wanted))
        if "color" in item:
            right = sum(d.color == item["color"] for d in found)
            credits.append(right / wanted)
            complete = complete and right == wanted
        if "position" in item:
            relation, target = item["position"]
            others = matched[target]
            pairs = [relation in relations(d, o) for d in found for o in (others or ())]
            credits.append(sum(pairs) / (wanted * len(others)) if others else 0.0)
            complete = complete and others is not None and all(pairs)
        matched.append(found if complete else None)
        correct = correct and complete
    return Verdict(correct, sum(credits) / len(credits))
