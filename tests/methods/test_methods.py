"""The contract of every method that is found, also of a user's own."""

import dataclasses
import itertools
import math
import re
import statistics
from collections import Counter

import pytest
import torch
from support.toy import call_of, spoil, toy_run, toy_trainer

from tafs.common import errors, yaml_files
from tafs.methods import Branching, GroupRelative, Method, PolicyGradient, registry
from tafs.runtime import checkpoint
from tafs.training.rewards import NonFinite, tolerated
from tafs.training.trainer import Trainer

NAMES = registry.names()
POLICIES = [n for n in NAMES if issubclass(registry.method_class(n), PolicyGradient)]
WITH_RATIO = [*POLICIES, "awm"]
RELATIVE = [n for n in NAMES if issubclass(registry.method_class(n), GroupRelative)]


def trainer(name: str, **hyperparameters: object) -> Trainer:
    return toy_trainer(toy_run(name, **hyperparameters))


def count(run: Trainer) -> dict[str, int]:
    """Count evaluations of images with ("grad") and without ("free") gradients from now on."""
    calls = {"grad": 0, "free": 0}
    inner = run.backbone.velocity

    def counted(x_t, t, cond):
        calls["grad" if torch.is_grad_enabled() else "free"] += len(x_t)
        return inner(x_t, t, cond)

    run.backbone.velocity = counted  # type: ignore[method-assign]
    return calls


def costs(run: Trainer, iterations: int) -> list[float]:
    """Count the evaluations of each iteration, per image and in forward equivalents."""
    object.__setattr__(run.method, "kl_to_base", lambda *_: None)  # not part of the cost
    calls = count(run)
    totals = [0]
    for iteration in range(iterations):
        run.iterate(iteration)
        totals.append(calls["free"] + 3 * calls["grad"])
    images = run.groups * run.group_size
    return [(after - before) / images for before, after in itertools.pairwise(totals)]


def test_the_methods_of_the_paper_are_found():
    shipped = "dance_grpo flow_grpo mix_grpo reward_instruct rg_lcd tafs_grpo"
    assert set(shipped.split()) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_named_as_its_file(name):
    assert registry.source_file(name).stem == name
    assert registry.method_class(name).__module__.endswith(f".{name}")
    assert yaml_files.NAME.fullmatch(name)


@pytest.mark.parametrize("name", WITH_RATIO)
def test_the_ratio_is_exactly_1_before_the_first_update(name):
    record = trainer(name, updates=1).iterate(0)
    assert record["ratio_deviation"] == 0.0
    assert record["clip_fraction"] == 0.0


@pytest.mark.parametrize("name", WITH_RATIO)
def test_the_ratio_leaves_1_after_the_first_update(name):
    """One of two optimiser steps per iteration learns from images of an older policy."""
    record = trainer(name, updates=2, clip_range=0.0).iterate(0)
    assert record["ratio_deviation"] > 0
    assert 0 < record["clip_fraction"] <= 0.5


def rounding(run: Trainer, by: float) -> Trainer:
    """Let the network round otherwise with gradients than without them."""
    evaluate = run.backbone.velocity

    def velocity(*args: torch.Tensor) -> torch.Tensor:
        return evaluate(*args) * (1 + by * torch.is_grad_enabled())

    run.backbone.velocity = velocity  # type: ignore[method-assign]
    return run


@pytest.mark.parametrize("name", POLICIES)
def test_a_network_whose_rounding_would_be_clipped_is_not_trained(name):
    run = rounding(trainer(name, clip_range=1e-6), 1e-2)
    before = [parameter.clone() for parameter in run.parameters.values()]
    remedy = r"iteration 0, update 0: a ratio differs from 1 by .* clip range of 1e-06: .* compile"
    with pytest.raises(errors.RunFailed, match=remedy):
        run.iterate(0)
    assert all(map(torch.equal, before, run.parameters.values()))
    rounding(trainer(name, clip_range=1.0, updates=2), 1e-6).iterate(0)


def test_ratios_are_checked_in_the_first_iteration_of_a_process():
    run = trainer("flow_grpo", clip_range=1e-6, learning_rate=0.0)
    run.iterate(0)
    rounding(run, 1e-2).iterate(1)
    resumed = rounding(trainer("flow_grpo", clip_range=1e-6), 1e-2)
    with pytest.raises(errors.RunFailed, match="iteration 1, update 0: a ratio differs"):
        resumed.iterate(1)


@pytest.mark.parametrize("name", NAMES)
def test_a_toy_reward_rises(name):
    """It falls if a step is credited with the image before it, which other tests do not notice."""
    run = trainer(name)
    first = run.iterate(0)["rewards"]["clip"][-1]
    for iteration in range(1, 30):
        last = run.iterate(iteration)["rewards"]["clip"][-1]
    assert last > first + 0.3


@pytest.mark.parametrize("name", NAMES)
def test_the_micro_batch_changes_the_rounding_alone(name):
    def adapter(micro_batch: int) -> torch.Tensor:
        run = toy_trainer(toy_run(name, training={"micro_batch": micro_batch}))
        for iteration in range(3):
            run.iterate(iteration)
        return torch.cat([p.detach().flatten() for p in run.parameters.values()])

    whole = adapter(64)
    for micro_batch in (32, 16, 5):
        torch.testing.assert_close(adapter(micro_batch), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_images_that_are_scored_while_the_next_ones_are_sampled_give_the_same_adapter(name):
    adapters = []
    for ahead in (False, True):
        run = toy_trainer(toy_run(name, training={"micro_batch": 5, "score_ahead": ahead}))
        for iteration in range(3):
            run.iterate(iteration)
        adapters.append([p.detach() for p in run.parameters.values()])
    assert all(map(torch.equal, *adapters))


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("name", POLICIES)
def test_kept_graphs_give_the_same_adapter_with_fewer_evaluations(name, updates, beta):
    def trained(keep_graphs: bool) -> tuple[list[torch.Tensor], int]:
        settings = {"keep_graphs": keep_graphs}
        run = toy_trainer(toy_run(name, training=settings, updates=updates, beta=beta))
        evaluate, calls = run.backbone.velocity, Counter()
        run.backbone.velocity = lambda *args: calls.update(["evaluations"]) or evaluate(*args)
        for iteration in range(3):
            run.iterate(iteration)
        return [p.detach() for p in run.parameters.values()], calls["evaluations"]

    (repeated, more), (kept, fewer) = trained(False), trained(True)
    assert all(torch.equal(a, b) for a, b in zip(repeated, kept, strict=True))
    method = registry.create(name, {})
    first_updates = 3 * 2 / updates  # micro-batches of three iterations
    saved = first_updates * len(method.trained_steps(0)) if method.keeps_graphs else 0
    assert more - fewer == saved


@pytest.mark.parametrize("name", POLICIES)
def test_a_compiled_network_samples_trained_steps_as_it_is_trained(name):
    run = trainer(name)
    run.backbone.compiled = True
    evaluate, with_gradients = run.backbone.velocity, []

    def velocity(*args: torch.Tensor) -> torch.Tensor:
        with_gradients.append(torch.is_grad_enabled())
        return evaluate(*args)

    run.backbone.velocity = velocity
    [first, *_] = run._rollout(["a", "b", "c", "d"], 0)
    steps = len(with_gradients) // len(run.micro_batches())
    trained = run.method.trained_steps(0)
    paths = getattr(run.method, "paths", lambda n: 1)  # evaluations of each step
    expected = [n in trained for n in range(steps) for _ in range(paths(n))]
    assert with_gradients[:steps] == expected[:steps]
    assert not (first.log_prob.requires_grad or first.x_s.requires_grad or first.kept)


def test_graphs_are_not_kept_where_each_image_trains_other_steps():
    assert registry.create("tafs_grpo", {}).keeps_graphs
    assert not registry.create("dance_grpo", {}).keeps_graphs


def test_the_learning_rate_rises_linearly_to_its_value():
    run = trainer("tafs_grpo", learning_rate=0.4, warmup=3, updates=2)
    rates = []
    for iteration in range(3):
        run.iterate(iteration)
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.2, 0.4, 0.4])
    assert [run.method.rate(n) for n in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert registry.create("tafs_grpo", {"learning_rate": 0.4}).rate(0) == 0.4


@pytest.mark.parametrize("name", RELATIVE)
@pytest.mark.parametrize("normalize", [False, True])
def test_advantages_have_zero_mean_in_each_group_and_step(name, normalize):
    algorithm = registry.create(name, {"normalize_rewards": normalize})
    scored = len(algorithm.scored_steps())
    generator = torch.Generator().manual_seed(0)
    rewards = {n: torch.randn(scored, 5, 8, generator=generator) for n in ("clip", "pickscore")}
    advantages = algorithm.compute_advantages(rewards, {"clip": 1.0, "pickscore": 0.5})
    assert advantages.shape == (algorithm.nfe_theta, 5, 8)
    # A step has as many rows as paths, where these branch.
    paths = getattr(algorithm, "paths", lambda n: 1)
    rest, n = advantages, 0
    while len(rest):
        n += 1
        step, rest = rest[: paths(n)], rest[paths(n) :]
        assert step.mean((0, -1)).abs().max() < 1e-5


@pytest.mark.parametrize("name", RELATIVE)
@pytest.mark.parametrize("parameters", [{}, {"normalize_rewards": True}, {"global_std": True}])
def test_an_image_without_a_reward_has_no_advantage_and_changes_no_others(name, parameters):
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


@pytest.mark.parametrize("name", RELATIVE)
@pytest.mark.parametrize("parameters", [{}, {"normalize_rewards": True}, {"global_std": True}])
@pytest.mark.parametrize("weight", [1e-30, 1.0, 50.0, 1e29])
def test_images_with_equal_rewards_have_no_advantage(name, parameters, weight):
    """Their float32 mean may differ from them; one of the images lacks its rewards."""
    algorithm = registry.create(name, parameters)
    equal = torch.full((len(algorithm.scored_steps()), 5, 8), 5 / 6)
    equal[..., 0, 3] = float("nan")
    weights = {"clip": weight, "pickscore": 2 * weight}
    advantages = algorithm.compute_advantages({"clip": equal, "pickscore": -3 * equal}, weights)
    assert not advantages.any()


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
    nfe_old, kl = run.method.nfe_old, 2 * run.group_size  # of one group
    states, shared = images, 0
    if isinstance(run.method, Branching):  # all images of a group are at the same states
        states, kl = run.groups, 2
        shared = run.method.trained_steps(0)[-1] + 1
    assert calls["grad"] == run.method.nfe_theta * states
    assert calls["free"] == (nfe_old - shared) * images + shared * states + kl


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        *((name, {}) for name in NAMES),
        ("flow_grpo", {"beta": 0.1}),
        ("dance_grpo", {"beta": 0.1, "fraction": 0.5}),
        ("tafs_grpo", {"steps": 6, "n_adv": 2}),
        ("rg_lcd", {"reward_weight": 0.0, "teacher_steps": 3}),
        ("awm", {"beta": 0.1}),
        ("draft_k", {"last": 3}),
        ("refl", {"steps": 7, "late": 1}),
        ("reward_instruct", {"steps": 1}),
        ("reward_instruct", {"steps": 2}),
    ],
)
def test_an_iteration_costs_what_the_method_says(name, parameters):
    """Exactly if all iterations cost the same.

    If a method draws its number of evaluations, the mean of 200 independent iterations has to be
    within 4 standard errors.
    """
    run = trainer(name, **parameters)
    expected = run.method.cost(run.group_size)
    found = costs(run, 10)
    if len(set(found)) == 1:
        assert expected == pytest.approx(found[0], rel=1e-12)
        return
    found = costs(run, 200)
    error = statistics.stdev(found) / len(found) ** 0.5
    assert abs(expected - statistics.fmean(found)) <= 4 * error


@pytest.mark.parametrize("flash_steps", [1, 5, 12, 40])
def test_mix_grpo_flash_costs_the_mean_over_its_windows_positions(flash_steps):
    run = trainer("mix_grpo", steps=12, window=3, interval=1, flash_steps=flash_steps, beta=0.1)
    found = costs(run, 12 - 3)  # one iteration at each position
    assert run.method.forward_equivalents == pytest.approx(statistics.fmean(found), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "parameters", "counts", "cost"),
    [
        ("tafs_grpo", {}, (4, 3), 13),
        ("tafs_grpo", {"steps": 2}, (2, 1), 5),
        ("tafs_grpo", {"steps": 6}, (6, 5), 21),
        ("flow_grpo", {}, (10, 6), 28),
        ("flow_grpo", {"beta": 0.04}, (10, 6), 34),
        ("mix_grpo", {}, (25, 4), 37),
        ("dance_grpo", {}, (25, 14), 67),
        ("rg_lcd", {}, (None, None), 16),
        ("reward_instruct", {}, (None, None), 10),
        # 10 Euler steps, 9 copies by the old policy, and 9 with gradients.
        ("diffusion_nft", {}, (10, 9), 46),
        ("diffusion_nft", {"beta": 1e-4}, (10, 9), 55),
        # 9 states and 9 + ... + 1 evaluations of the branches.
        ("tempflow_grpo", {}, (54, 9), 81),
        # 8 states, 15 + ... + 8 evaluations at all times, 8 + 7 + 7 + 6 + 6 + 5 + 5 + 4 at others.
        ("g2rpo", {}, (148, 8), 172),
        ("awm", {}, (14, 6), 38),
        ("pref_grpo", {}, (10, 6), 28),
        ("stepwise_flow_grpo", {}, (10, 6), 28),
        ("grpo_guard", {}, (10, 6), 28),
        # Paths before steps 0-3, 4-6, 7-9 and 10-19; edges of steps 0-2, 3-5, 6-8 and 9.
        ("branch_grpo", {}, (4 + 2 * 3 + 4 * 3 + 8 * 10, 3 + 2 * 3 + 4 * 3 + 8), 102 + 3 * 29),
        ("draft_k", {}, (10, 1), 13),
        # 9, 10 or 11 steps and the scored estimate.
        ("refl", {}, (11, 1), 14),
    ],
)
def test_evaluation_counts_and_costs_are_those_of_tables_2_and_4(name, parameters, counts, cost):
    algorithm = registry.create(name, parameters)
    assert (algorithm.nfe_old, algorithm.nfe_theta) == counts
    assert algorithm.forward_equivalents == cost


def test_a_method_without_a_cost_has_to_define_it():
    with pytest.raises(NotImplementedError, match="^Method: define `forward_equivalents`"):
        _ = Method().forward_equivalents


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
        ("dance_grpo", {"fraction": 0.01}, "fraction: 0.01 of 25 steps is less than one step"),
        ("rg_lcd", {"ema": 0.0}, "ema: 0.0 is not between 0 and 1"),
        ("reward_instruct", {"steps": 0}, "steps: 0 is less than 1"),
        ("diffusion_nft", {"copies": 11}, "copies: 11 is not between 1 and 10"),
        ("diffusion_nft", {"mixing": 0.0}, "mixing: 0.0 is not above 0"),
        ("diffusion_nft", {"old_limit": 1.5}, "old_limit: 1.5 is not between 0 and 1"),
        ("diffusion_nft", {"advantage_limit": 0.0}, "advantage_limit: 0.0 is not above 0"),
        ("diffusion_nft", {"ema": 0.9}, "ema: 0.9 has no effect, .* set old_rate and old_limit"),
        ("g2rpo", {"trained": 16}, "trained: 16 is not between 1 and 15"),
        ("g2rpo", {"granularities": 0}, "granularities: 0 is not between 1 and 16"),
        ("tempflow_grpo", {"trained": 10}, "trained: 10 is not between 1 and 9"),
        ("awm", {"power": 0.0}, "power: 0.0 is not above 0"),
        ("awm", {"old_weight": -1.0}, "old_weight: -1.0 is less than 0"),
        ("pref_grpo", {"trained": 10}, "trained: 10 is not between 1 and 9"),
        ("stepwise_flow_grpo", {"trained": 10}, "trained: 10 is not between 1 and 9"),
        ("grpo_guard", {"trained": 10}, "trained: 10 is not between 1 and 9"),
        ("branch_grpo", {"trained": 20}, "trained: 20 is not between 1 and 19"),
        ("branch_grpo", {"splits": 7}, "splits: 7 is not between 0 and 6"),
        ("branch_grpo", {"split_noise": 0.5}, "split_noise: 0.5 is less than 1"),
        ("draft_k", {"last": 11}, "last: 11 is not between 1 and 10"),
        ("refl", {"late": 13}, "late: 13 is not between 1 and 12"),
        ("online_dpo", {"sharpness": 0.0}, "sharpness: 0.0 is not above 0"),
        ("online_dpo", {"beta": 0.1}, "beta: 0.1 has no effect, .* set sharpness"),
    ],
)
def test_hyperparameters_out_of_range_are_refused_by_name(name, parameters, problem):
    with pytest.raises(ValueError, match=problem):
        registry.create(name, parameters)


@pytest.mark.parametrize("name", NAMES)
def test_stopped_training_continues_to_the_same_adapter(name, tmp_path):
    undisturbed = trainer(name)
    for iteration in range(4):
        undisturbed.iterate(iteration)
    stopped = trainer(name)
    for iteration in range(2):
        stopped.iterate(iteration)
    stopped.save(tmp_path, {"run": "this one"}, 2, {})
    state = checkpoint.load(tmp_path, {"run": "this one"})
    assert state is not None
    continued = trainer(name)
    continued.restore(state)
    for iteration in range(2, 4):
        continued.iterate(iteration)
    for key, parameter in undisturbed.parameters.items():
        assert torch.equal(continued.parameters[key], parameter)
        assert torch.equal(continued.averages[key], undisturbed.averages[key])
        assert not torch.equal(stopped.parameters[key], parameter)


# tests/faults/test_bad_numbers.py has bad numbers at random places.
BAD = [math.nan, math.inf, -math.inf]
DIFFERENTIABLE = ["draft_k", "refl", "reward_instruct", "rg_lcd"]


def stops(run: Trainer, iteration: int = 0) -> str:
    """Return the message of the iteration that stops, and check that nothing has changed."""
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


@pytest.mark.parametrize("name", RELATIVE)
def test_an_image_without_a_finite_reward_is_counted_and_left_out_of_all_means(name):
    """The record leaves it out at all steps and for all rewards, whichever is missing."""
    weights = {"clip": 1.0, "pickscore": 0.5}
    sound, run = (toy_trainer(toy_run(name, rewards=weights)) for _ in range(2))
    clean: list[dict[str, torch.Tensor]] = []
    compute = sound.method.compute_advantages
    spied = lambda rewards, w: clean.append(rewards) or compute(rewards, w)  # noqa: E731
    object.__setattr__(sound.method, "compute_advantages", spied)
    assert sound.iterate(0)["invalid"] == 0
    spoil(run, {call_of(run, 5, len(run.method.scored_steps()) - 1): math.inf}, "pickscore")
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


def test_a_method_that_ranks_a_missing_reward_first_cannot_learn_from_it():
    run = trainer("tafs_grpo")
    spoil(run, {call_of(run, 5): math.nan})
    seen: list[torch.Tensor] = []
    losses = run.method.losses

    def ranks(rewards):
        return rewards.argsort(-1).argsort(-1) - 7.5  # NaN counts as the largest

    def watched(backbone, trajectory, inputs, micro_batch):
        seen.append(inputs.advantages)
        return losses(backbone, trajectory, inputs, micro_batch)

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


@pytest.mark.parametrize(
    ("group_size", "lacking", "message"),
    [
        (
            16,
            [9, 17, 30, 31, 33, 50, 63],
            "iteration 3: reward 'clip' is inf for image 9, scored step 2 of 3; 7 of 64 images "
            "(10.9%) lack a finite reward, at most 6 may (10%, or one)",
        ),
        (
            2,
            [0, 1],
            "iteration 3: reward 'clip' is inf for image 0, scored step 2 of 3; 2 of 8 images "
            "(25.0%) lack a finite reward, at most 1 may (10%, or one)",
        ),
    ],
)
def test_more_images_without_a_reward_than_tolerated_stop_before_the_update(
    group_size, lacking, message
):
    def run_without(images):
        run = toy_trainer(toy_run("tafs_grpo", training={"group_size": group_size}))
        spoil(run, {call_of(run, image, step=1): math.inf for image in images})
        return run

    assert run_without(lacking[1:]).iterate(0)["invalid"] == len(lacking) - 1
    assert stops(run_without(lacking), 3) == message


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("bad", BAD)
def test_a_differentiated_reward_has_to_be_finite_for_all_images(name, bad):
    run = trainer(name)
    spoil(run, {call_of(run, 40): bad})
    assert stops(run, 2) == (
        f"iteration 2: reward 'clip' is {bad} for image 40, scored step 1 of 1; 1 of 64 images "
        "(1.6%) lack a finite reward, none may where the method differentiates it"
    )
    run = trainer(name)
    spoil(run, {(2, 7): bad})  # the loss's first call, after the two of the rollout
    assert stops(run) == f"iteration 0, update 0: reward 'clip' is {bad} for image 7"


def test_a_reward_of_weight_0_may_be_missing_for_an_image():
    run = trainer("rg_lcd", reward_weight=0.0)
    spoil(run, {call_of(run, 40): math.nan})
    assert run.iterate(0)["invalid"] == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_image_stops_before_the_update_and_is_named(name):
    run = trainer(name)
    decode, calls = run.backbone.decode, itertools.count()

    def broken(x_0, dtype=None):
        images = decode(x_0, dtype).clone()
        if next(calls) == call_of(run, 40)[0]:
            images[8, 1] = math.inf
        return images

    run.backbone.decode = broken  # type: ignore[method-assign]
    line = r"iteration 4, scored step 1 of \d+: image 40 holds NaN or infinity"
    assert re.fullmatch(line, stops(run, 4))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_loss_or_gradient_stops_before_the_update(name, bad):
    run = trainer(name)
    run.parameters["bias"].register_hook(lambda gradient: torch.full_like(gradient, bad))
    norm = "nan" if math.isnan(bad) else "inf"
    assert stops(run) == f"iteration 0, update 0: the gradient's norm is {norm}"
    run = trainer(name)
    losses = run.method.losses

    def broken(*given):
        for part in losses(*given):
            yield dataclasses.replace(part, loss=part.loss + bad)

    object.__setattr__(run.method, "losses", broken)
    assert stops(run) == f"iteration 0, update 0: the loss is {bad}"
