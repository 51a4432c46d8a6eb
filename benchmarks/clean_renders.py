"""How many clean images of the words world its recogniser reads without an error.

    python benchmarks/clean_renders.py
    python benchmarks/clean_renders.py --prompts 30

Every caption of both splits is rendered in every font, on one background and in one row each,
and scored by the metric `ocr`. The table has the share of images whose whole text is read, by font
and tag.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from tafs.data.plugins.words import PROMPT_SET
from tafs.data.prompts import first_of_each
from tafs.words import render, rewards
from tafs.words.captions import TAGS


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, help="the first so many of each tag and split")
    args = parser.parse_args()
    prompts = []
    for split in (PROMPT_SET.train(Path), PROMPT_SET.test(Path)):
        prompts += [split[i] for i in first_of_each(split, args.prompts)]
    tags = np.array([prompt.tag for prompt in prompts])
    ocr = rewards.ocr()
    print(f"{'font':24}{'all':>8}" + "".join(f"{tag:>10}" for tag in TAGS))
    for font in render.FONTS:
        rng = np.random.default_rng(0)
        drawn = [render.sample_sign(p.row["text"], p.row["color"], rng) for p in prompts]
        signs = [replace(sign, font=font) for sign in drawn]
        read = np.concatenate(
            [
                ocr.score(render.render(signs[i : i + 512]), prompts[i : i + 512]).numpy() == 1
                for i in range(0, len(signs), 512)
            ]
        )
        shares = "".join(f"{read[tags == tag].mean():10.4f}" for tag in TAGS)
        print(f"{font:24}{read.mean():8.4f}{shares}", flush=True)


if __name__ == "__main__":
    main()
