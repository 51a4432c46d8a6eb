"""The contract of every method that is found, a user's own too."""

import dataclasses
import itertools
import math
import re
import statistics
import sys

import pytest
import torch
from support.toy import call_of, spoil, toy_run, toy_trainer

from tafs.common import yaml_files
from tafs.methods import base, registry
from tafs.methods.base import Method
from tafs.methods.policy_gradient import PolicyGradient
from tafs.runtime import checkpoint
from tafs.training.rewards import NonFinite, tolerated
from tafs.training.trainer import Trainer

NAMES = list(registry.sources())
POLICIES = [n for n in NAMES if issubclass(registry.method_class(n), PolicyGradient)]


def trainer(name: str, **hyperparameters: object) -> Trainer:
    return toy_trainer(toy_run(name, **hyperparameters))


def count(run: Trainer) -> dict[str, int]:
    """Evaluations with ("grad") and without ("free") gradients from now on, over all images."""
    calls = {"grad": 0, "free": 0}
    inner = run.backbone.velocity

    def counted(x_t, t, cond):
        calls["grad" if torch.is_grad_enabled() else "free"] += len(x_t)
        return inner(x_t, t, cond)

    run.backbone.velocity = counted  # type: ignore[method-assign]
    return calls


def costs(run: Trainer, iterations: int) -> list[float]:
    """Of each iteration, per image and in forward passes: what the network was really asked."""
    object.__setattr__(run.method, "kl_to_base", lambda *_: None)  # only watches: not counted
    calls = count(run)
    totals = [0]
    for iteration in range(iterations):
        run.iterate(iteration)
        totals.append(calls["free"] + 3 * calls["grad"])
    images = run.groups * run.group_size
    return [(after - before) / images for before, after in itertools.pairwise(totals)]


def assert_costs_what_it_says(run: Trainer) -> None:
    """Exactly, if every iteration costs the same.

    A method that draws how often it evaluates is held to 4 standard errors of the mean of 200
    iterations, whose draws are independent.
    """
    found = costs(run, 10)
    if len(set(found)) == 1:
        assert run.method.forward_equivalents == pytest.approx(found[0], rel=1e-12)
        return
    found = costs(run, 200)
    error = statistics.stdev(found) / len(found) ** 0.5
    assert abs(run.method.forward_equivalents - statistics.fmean(found)) <= 4 * error


def test_the_methods_of_the_paper_are_found():
    assert {
        "tafs_grpo",
        "flow_grpo",
        "mix_grpo",
        "dance_grpo",
        "rg_lcd",
        "reward_instruct",
    } <= set(NAMES)


@pytest.mark.parametrize("name", POLICIES)
def test_the_ratio_is_exactly_1_before_the_first_update(name):
    record = trainer(name, updates=1).iterate(0)
    assert record["ratio_deviation"] == 0.0
    assert record["clip_fraction"] == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_a_toy_reward_rises(name):
    """Crediting a step with the image before its action makes this one fall."""
    run = trainer(name)
    first = run.iterate(0)["rewards"]["clip"][-1]
    for iteration in range(1, 30):
        last = run.iterate(iteration)["rewards"]["clip"][-1]
    assert last > first + 0.3


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("normalize", [False, True])
def test_advantages_have_zero_mean_in_each_group_and_step(name, normalize):
    algorithm = registry.create(name, {"normalize_rewards": normalize})
    scored = len(algorithm.scored_steps())
    generator = torch.Generator().manual_seed(0)
    rewards = {n: torch.randn(scored, 5, 8, generator=generator) for n in ("clip", "pickscore")}
    advantages = algorithm.compute_advantages(rewards, {"clip": 1.0, "pickscore": 0.5})
    assert advantages.shape == (algorithm.nfe_theta, 5, 8)
    assert advantages.mean(-1).abs().max() < 1e-5


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("parameters", [{}, {"normalize_rewards": True}, {"global_std": True}])
def test_an_image_without_a_reward_has_no_advantage_and_changes_no_others(name, parameters):
    """Whatever a method makes of the missing reward, the training loop sets its own to 0."""
    algorithm = registry.create(name, parameters)
    scored = len(algorithm.scored_steps())
    generator = torch.Generator().manual_seed(0)
    rewards = {n: torch.randn(scored, 5, 8, generator=generator) for n in ("clip", "pickscore")}
    weights = {"clip": 1.0, "pickscore": 0.5}
    known = [image for image in range(8) if image != 3]
    without = algorithm.compute_advantages({n: r[..., known] for n, r in rewards.items()}, weights)
    for values in rewards.values():
        values[..., 3] = float("nan")
    advantages = algorithm.compute_advantages(rewards, weights)
    assert not advantages[..., 3].any()
    torch.testing.assert_close(advantages[..., known], without)


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_hyperparameter_is_refused_by_name(name):
    with pytest.raises(ValueError, match="unknown hyperparameter 'learningrate'.*learning_rate"):
        registry.create(name, {"learningrate": 1.0})


@pytest.mark.parametrize("name", POLICIES)
def test_evaluation_counts_are_those_of_the_rollout(name):
    run = trainer(name)
    calls = count(run)
    run.iterate(0)
    images = run.groups * run.group_size
    watching = 2 * run.group_size  # the KL of one group
    assert calls["grad"] == run.method.nfe_theta * images
    assert calls["free"] == run.method.nfe_old * images + watching


@pytest.mark.parametrize("name", NAMES)
def test_an_iteration_costs_what_the_method_says(name):
    assert_costs_what_it_says(trainer(name))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("flow_grpo", {"beta": 0.1}),
        ("dance_grpo", {"beta": 0.1, "fraction": 0.5}),
        ("tafs_grpo", {"steps": 6, "n_adv": 2}),
        ("rg_lcd", {"reward_weight": 0.0, "teacher_steps": 3}),
        ("reward_instruct", {"steps": 1}),  # nothing is drawn: exact
        ("reward_instruct", {"steps": 2}),
    ],
)
def test_the_cost_follows_the_hyperparameters(name, parameters):
    assert_costs_what_it_says(trainer(name, **parameters))


@pytest.mark.parametrize("flash_steps", [1, 5, 12, 40])
def test_mix_grpo_flash_costs_the_mean_over_its_windows_places(flash_steps):
    run = trainer("mix_grpo", steps=12, window=3, interval=1, flash_steps=flash_steps, beta=0.1)
    found = costs(run, 12 - 3)  # one iteration at each place
    assert run.method.forward_equivalents == pytest.approx(statistics.fmean(found), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "parameters", "cost"),
    [
        ("tafs_grpo", {}, 13),
        ("tafs_grpo", {"steps": 2}, 5),
        ("tafs_grpo", {"steps": 6}, 21),
        ("flow_grpo", {}, 28),
        ("flow_grpo", {"beta": 0.04}, 34),
        ("mix_grpo", {}, 37),
        ("dance_grpo", {}, 67),
        ("rg_lcd", {}, 16),
        ("reward_instruct", {}, 10),
    ],
)
def test_costs_are_those_of_the_paper_where_it_counts(name, parameters, cost):
    assert registry.create(name, parameters).forward_equivalents == cost


def test_a_method_without_a_cost_is_told_to_define_it():
    with pytest.raises(
        NotImplementedError, match="^Method: define `forward_equivalents`, the network eval"
    ):
        _ = Method().forward_equivalents


def test_an_unknown_method_is_refused_with_those_available():
    with pytest.raises(ValueError, match="unknown method 'mixgrpo'.*flow_grpo.*tafs_grpo"):
        registry.create("mixgrpo", {})


@pytest.mark.parametrize(
    ("annealed", "n"), [(1, 2), (3, 4), (5, 6)], ids=["1 step", "3 steps", "5 steps"]
)
def test_annealed_steps_are_evaluations_less_one(annealed, n):
    algorithm = registry.create("tafs_grpo", {"steps": n})
    assert (algorithm.nfe_old, algorithm.nfe_theta) == (n, annealed)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("dance_grpo", (25, 14)),
        ("mix_grpo", (25, 4)),
        ("flow_grpo", (10, 6)),
        ("tafs_grpo", (4, 3)),
        ("rg_lcd", (None, None)),
        ("reward_instruct", (None, None)),
    ],
)
def test_evaluation_counts_are_those_of_table_2(name, counts):
    algorithm = registry.create(name, {})
    assert (algorithm.nfe_old, algorithm.nfe_theta) == counts


@pytest.mark.parametrize(
    ("name", "parameters", "problem"),
    [
        ("tafs_grpo", {"steps": 1}, "steps: 1"),
        ("tafs_grpo", {"credit_reading": "both"}, "credit_reading: unknown 'both'"),
        ("tafs_grpo", {"n_adv": 4}, "n_adv: 4 is not between 1 and 3"),
        ("flow_grpo", {"trained": 10}, "trained: 10 is not between 1 and 9"),
        ("flow_grpo", {"time_grid": "log"}, "time_grid: 'log'"),
        ("flow_grpo", {"sampler": "ode"}, "sampler: unknown 'ode' .*cps"),
        ("flow_grpo", {"learning_rate": -1.0}, "learning_rate: -1.0 is less than 0"),
        ("mix_grpo", {"window": 25}, "window: 25 is not between 1 and 24"),
        ("mix_grpo", {"interval": 0}, "interval: 0 is less than 1"),
        ("dance_grpo", {"fraction": 0.01}, "fraction: 0.01 of 25 steps is none"),
        ("rg_lcd", {"ema": 0.0}, "ema: 0.0 is not between 0 and 1"),
        ("reward_instruct", {"steps": 0}, "steps: 0 is less than 1"),
    ],
)
def test_hyperparameters_out_of_range_are_refused_by_name(name, parameters, problem):
    with pytest.raises(ValueError, match=problem):
        registry.create(name, parameters)


def test_rewards_normalised_apart_do_not_depend_on_their_scale():
    algorithm = registry.create("tafs_grpo", {"normalize_rewards": True})
    rewards = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(1))
    small, large = (
        algorithm.compute_advantages({"clip": k * rewards}, {"clip": 1.0}) for k in (1.0, 1000.0)
    )
    torch.testing.assert_close(small, large, atol=1e-3, rtol=1e-3)


# -- bad numbers -----------------------------------------------------------------------------------

BAD = [float("nan"), float("inf"), float("-inf")]
DIFFERENTIABLE = ["reward_instruct", "rg_lcd"]


def stops(run: Trainer, iteration: int = 0) -> str:
    """The line with which an iteration stops, having changed nothing."""
    before = {name: p.detach().clone() for name, p in run.parameters.items()}
    averages = {name: average.clone() for name, average in run.averages.items()}
    with pytest.raises(NonFinite) as raised:
        run.iterate(iteration)
    for name, parameter in run.parameters.items():
        assert torch.equal(parameter, before[name])
        assert torch.equal(run.averages[name], averages[name])
    assert not run.optimizer.state
    line = str(raised.value)
    assert "\n" not in line
    return line


def two_rewards(name: str, **hyperparameters: object) -> Trainer:
    return toy_trainer(toy_run(name, rewards={"clip": 1.0, "pickscore": 0.5}, **hyperparameters))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", POLICIES)
def test_an_image_without_a_finite_reward_is_counted_and_in_no_mean(name, bad):
    """Any reward, any scored step: neither of its rewards counts at any step."""
    sound = two_rewards(name)
    clean: list[dict[str, torch.Tensor]] = []
    score = sound.method.credit
    object.__setattr__(sound.method, "credit", lambda r, w: clean.append(r) or score(r, w))
    assert sound.iterate(0)["invalid"] == 0
    run = two_rewards(name)
    spoil(run, {call_of(run, 5, len(run.method.scored_steps()) - 1): bad}, "pickscore")
    record = run.iterate(0)
    assert record["invalid"] == 1
    left = [image for image in range(64) if image != 5]
    for reward, values in clean[0].items():
        expected = values.flatten(1)[:, left].mean(1).tolist()
        assert record["rewards"][reward] == pytest.approx(expected, rel=1e-5)
    total = (clean[0]["clip"] + 0.5 * clean[0]["pickscore"])[-1]
    groups = [total[0][[image for image in range(16) if image != 5]], *total[1:]]
    spread = statistics.fmean(group.std().item() for group in groups)
    assert record["reward_std"] == pytest.approx(spread, rel=1e-5)


@pytest.mark.parametrize("name", POLICIES)
def test_an_image_without_a_reward_moves_the_adapter_as_one_of_advantage_0_does(name):
    run, told = trainer(name), trainer(name)
    spoil(run, {call_of(run, 5): float("nan")})

    def credit(rewards, weights):
        [values] = rewards.values()
        values = values.masked_fill(torch.arange(64).view(4, 16) == 5, torch.nan)
        advantages = told.method.assign_credit(
            told.method.advantages(values), told.method.nfe_theta
        )
        assert not advantages.flatten(1)[:, 5].any()
        return advantages

    object.__setattr__(told.method, "credit", credit)
    assert run.iterate(0)["grad_norm"] == told.iterate(0)["grad_norm"] > 0
    for key, parameter in run.parameters.items():
        assert parameter.any()
        assert torch.equal(parameter, told.parameters[key])


def test_a_method_that_ranks_a_missing_reward_first_cannot_teach_it():
    run = trainer("tafs_grpo")
    spoil(run, {call_of(run, 5): float("nan")})
    seen: list[torch.Tensor] = []
    losses = run.method.losses

    def ranks(rewards):
        return rewards.argsort(-1).argsort(-1) - 7.5  # NaN counts as the largest

    def watched(backbone, trajectory, feedback, micro_batch):
        seen.append(feedback.advantages)
        return losses(backbone, trajectory, feedback, micro_batch)

    object.__setattr__(run.method, "advantages", ranks)
    object.__setattr__(run.method, "losses", watched)
    run.iterate(0)
    advantages = torch.cat(seen, dim=1)
    assert not advantages[:, 5].any()
    assert advantages[:, :16].any(0).sum() == 15


@pytest.mark.parametrize(
    ("images", "count"), [(1, 0), (2, 1), (8, 1), (10, 1), (19, 1), (20, 2), (64, 6), (1152, 115)]
)
def test_a_tenth_of_the_images_may_lack_a_reward_but_always_one_and_never_all(images, count):
    assert tolerated(images) == count


def test_more_images_without_a_reward_than_tolerated_stop_before_the_update():
    run = trainer("tafs_grpo")
    lacking = [9, 17, 30, 31, 33, 50, 63]
    spoil(run, {call_of(run, image, step=1): float("inf") for image in lacking[1:]})
    assert run.iterate(0)["invalid"] == 6
    run = trainer("tafs_grpo")
    spoil(run, {call_of(run, image, step=1): float("inf") for image in lacking})
    assert stops(run, 3) == (
        "iteration 3: reward 'clip' is inf for image 9, scored step 2 of 3; 7 of 64 images (10.9%) "
        "lack a finite reward, at most 6 may (10%, or one)"
    )


def test_a_small_batch_may_lack_one_reward():
    """Of eight images, of which one is more than a tenth; its group of two is left with one."""
    spec = toy_run("tafs_grpo", training={"group_size": 2})
    run = toy_trainer(spec)
    spoil(run, {call_of(run, 0): float("nan")})
    assert run.iterate(0)["invalid"] == 1
    run = toy_trainer(spec)
    spoil(run, {call_of(run, 0): float("nan"), call_of(run, 1): float("nan")})
    assert stops(run).endswith(
        "; 2 of 8 images (25.0%) lack a finite reward, at most 1 may (10%, or one)"
    )


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("bad", BAD)
def test_a_reward_that_is_differentiated_may_not_lack_for_any_image(name, bad):
    run = trainer(name)
    spoil(run, {call_of(run, 40): bad})
    assert stops(run, 2) == (
        f"iteration 2: reward 'clip' is {bad} for image 40, scored step 1 of 1; 1 of 64 images "
        "(1.6%) lack a finite reward, none may where the method differentiates it"
    )


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_value_of_a_differentiated_reward_stops_although_its_gradient_is_finite(name, bad):
    run = trainer(name)
    spoil(run, {(2, 7): bad})  # the first call for the loss, after those for two micro-batches
    assert stops(run) == f"iteration 0, update 0: reward 'clip' is {bad} for image 7"


def test_a_reward_that_is_only_watched_may_lack_for_an_image():
    run = trainer("rg_lcd", reward_weight=0.0)
    spoil(run, {call_of(run, 40): float("nan")})
    assert run.iterate(0)["invalid"] == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_image_stops_before_the_update_and_is_named(name, bad):
    run = trainer(name)
    decode, calls = run.backbone.decode, itertools.count()

    def broken(x_0, dtype=None):
        images = decode(x_0, dtype).clone()
        if next(calls) == call_of(run, 40)[0]:
            images[8, 1] = bad
        return images

    run.backbone.decode = broken  # type: ignore[method-assign]
    assert re.fullmatch(
        r"iteration 4, scored step 1 of \d+: image 40 holds NaN or infinity", stops(run, 4)
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_loss_stops_before_the_update(name, bad):
    run = trainer(name)
    losses = run.method.losses

    def broken(*given):
        for part in losses(*given):
            yield dataclasses.replace(part, loss=part.loss + bad)

    object.__setattr__(run.method, "losses", broken)
    assert stops(run) == f"iteration 0, update 0: the loss is {bad}"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_gradient_stops_before_the_update(name, bad):
    run = trainer(name)
    run.parameters["bias"].register_hook(lambda gradient: torch.full_like(gradient, bad))
    norm = "nan" if math.isnan(bad) else "inf"
    assert stops(run) == f"iteration 0, update 0: the gradient's norm is {norm}"


# -- files -----------------------------------------------------------------------------------------


def test_every_method_file_is_its_name():
    for name, module in registry.sources().items():
        assert registry.source_file(name).stem == name
        assert module.endswith(f".{name}")
        assert yaml_files.NAME.fullmatch(name)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("def broken(:", "cannot be imported (SyntaxError: invalid syntax"),
        ("import torch\ntorch.no_such_thing", "cannot be imported (AttributeError: "),
        ("METHOD = 3", "defines no METHOD derived from tafs.methods.base.Method"),
    ],
)
def test_a_broken_method_file_is_named_in_one_line(source, problem, tmp_path, monkeypatch):
    (tmp_path / "broken_method.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_method", raising=False)
    monkeypatch.setattr(base, "sources", lambda: {"broken_method": "broken_method"})
    with pytest.raises(ValueError) as raised:
        registry.create("broken_method", {})
    message = str(raised.value)
    assert message.startswith(f"{tmp_path / 'broken_method.py'}: {problem}")
    assert "\n" not in message


@pytest.mark.parametrize("name", NAMES)
def test_training_that_stopped_ends_as_if_it_had_not(name, tmp_path):
    undisturbed = trainer(name)
    for iteration in range(4):
        undisturbed.iterate(iteration)
    stopped = trainer(name)
    for iteration in range(2):
        stopped.iterate(iteration)
    stopped.save(tmp_path, "of this run", 2, {})
    state = checkpoint.load(tmp_path, "of this run")
    assert state is not None
    continued = trainer(name)
    continued.restore(state)
    for iteration in range(2, 4):
        continued.iterate(iteration)
    for key, parameter in undisturbed.parameters.items():
        assert torch.equal(continued.parameters[key], parameter)
        assert torch.equal(continued.averages[key], undisturbed.averages[key])
        assert not torch.equal(stopped.parameters[key], parameter)
