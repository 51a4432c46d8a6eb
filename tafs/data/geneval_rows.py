"""GenEval's vocabulary and metadata rows, and the content that a row asks for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

# GenEval's object_names.txt: COCO's classes in COCO's order, three of them with longer names.
CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat"),
    *("traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat"),
    *("dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack"),
    *("umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball"),
    *("kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket"),
    *("bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair"),
    *("couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop"),
    *("computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven"),
    *("toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear"),
    *("hair drier", "toothbrush"),
)

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
NUMBERS = {2: "two", 3: "three", 4: "four"}

Row = dict[str, Any]
_ENCODER = json.JSONEncoder(sort_keys=True)


def content(row: Mapping[str, Any]) -> str:
    """What a row asks for: its task and objects, whatever its wording and the objects' order."""
    return f"{row['tag']}: {objects(row)}"


def objects(row: Mapping[str, Any]) -> str:
    """The objects that a row asks for, whatever its wording and their order."""
    include = row["include"]
    if any("position" in item for item in include):
        target, subject = include
        relation = subject["position"][0]
        mirror = {"left of": "right of", "above": "below"}
        if relation in mirror:
            return f"{subject['class']} {relation} {target['class']}"
        back = {v: k for k, v in mirror.items()}[relation]
        return f"{target['class']} {back} {subject['class']}"
    return json.dumps(sorted(map(_ENCODER.encode, include)))


def plural(noun: str) -> str:
    """The plural in GenEval's spelling: "buses", "benchs"."""
    return noun + ("es" if noun.endswith("s") else "s")
