"""The sampler of a model is chosen on training prompts, by all metrics together."""

from __future__ import annotations

import pytest
import torch

from tafs.data.prompts import Prompt
from tafs.evaluation import choose

PROMPTS = [Prompt(f"prompt {n}", {"tag": "colors"}) for n in range(50)]


def test_a_metric_counts_in_units_of_its_own_spread():
    """PickScore differs by two and CLIP by one of its standard deviations, the other way."""
    scores = {
        "ode": {"pickscore": torch.tensor([0.0, 0.0]), "clip": torch.tensor([1.0, 3.0])},
        "anneal": {"pickscore": torch.tensor([8.0, 8.0]), "clip": torch.tensor([1.0, 1.0])},
    }
    found = choose.quality(scores)
    spread = torch.tensor([1.0, 3.0, 1.0, 1.0]).std(correction=0).item()
    assert found["anneal"] - found["ode"] == pytest.approx((8 / 4 - 1 / spread) / 2)


def test_missing_scores_and_metrics_that_do_not_vary_are_left_out():
    nan = float("nan")
    scores = {
        "ode": {"geneval": torch.tensor([1.0, 1.0]), "clip": torch.tensor([1.0, nan])},
        "anneal": {"geneval": torch.tensor([1.0, 1.0]), "clip": torch.tensor([2.0, nan])},
    }
    assert choose.quality(scores) == {"ode": 2.0, "anneal": 4.0}
    assert choose.quality({"ode": {"geneval": torch.ones(2)}}) == {"ode": 0.0}


def test_validation_prompts_are_the_same_for_every_run_and_in_order():
    found = choose.validation_prompts(PROMPTS, 7)
    assert found == choose.validation_prompts(PROMPTS, 7)
    places = [PROMPTS.index(prompt) for prompt in found]
    assert len(set(places)) == 7
    assert places == sorted(places)
    assert choose.validation_prompts(PROMPTS, 99) == PROMPTS


def test_a_sampler_whose_images_have_no_scores_is_not_preferred_for_it():
    nan = float("nan")
    scores = {
        "ode": {"clip": torch.tensor([nan, nan]), "pickscore": torch.tensor([1.0, 1.0])},
        "anneal": {"clip": torch.tensor([9.0, 9.0]), "pickscore": torch.tensor([3.0, 3.0])},
    }
    assert choose.quality(scores) == {"ode": 1.0, "anneal": 3.0}
