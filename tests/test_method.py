"""The contract of every method that is found, a user's own too."""

import dataclasses
import itertools
import statistics
import sys

import pytest
import torch
from toy import toy_run, toy_trainer

from tafs import checkpoint, config, method
from tafs.method import Method, PolicyGradient
from tafs.train import NonFinite, Trainer

NAMES = list(method.sources())
POLICIES = [n for n in NAMES if issubclass(method.method_class(n), PolicyGradient)]


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
    object.__setattr__(run.method, "divergence", lambda *_: None)  # only watches: not counted
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
        assert run.method.cost == pytest.approx(found[0], rel=1e-12)
        return
    found = costs(run, 200)
    error = statistics.stdev(found) / len(found) ** 0.5
    assert abs(run.method.cost - statistics.fmean(found)) <= 4 * error


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
    algorithm = method.create(name, {"normalize_rewards": normalize})
    scored = len(algorithm.scored_steps())
    generator = torch.Generator().manual_seed(0)
    rewards = {n: torch.randn(scored, 5, 8, generator=generator) for n in ("clip", "pickscore")}
    advantages = algorithm.credit(rewards, {"clip": 1.0, "pickscore": 0.5})
    assert advantages.shape == (algorithm.nfe_theta, 5, 8)
    assert advantages.mean(-1).abs().max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_hyperparameter_is_refused_by_name(name):
    with pytest.raises(ValueError, match="unknown hyperparameter 'learningrate'.*learning_rate"):
        method.create(name, {"learningrate": 1.0})


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
    assert run.method.cost == pytest.approx(statistics.fmean(found), rel=1e-12)


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
    assert method.create(name, parameters).cost == cost


def test_a_method_without_a_cost_is_told_to_define_it():
    with pytest.raises(NotImplementedError, match="^Method: define `cost`, the network eval"):
        _ = Method().cost


def test_an_unknown_method_is_refused_with_those_available():
    with pytest.raises(ValueError, match="unknown method 'mixgrpo'.*flow_grpo.*tafs_grpo"):
        method.create("mixgrpo", {})


@pytest.mark.parametrize(
    ("annealed", "n"), [(1, 2), (3, 4), (5, 6)], ids=["1 step", "3 steps", "5 steps"]
)
def test_annealed_steps_are_evaluations_less_one(annealed, n):
    algorithm = method.create("tafs_grpo", {"steps": n})
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
    algorithm = method.create(name, {})
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
        method.create(name, parameters)


def test_rewards_normalised_apart_do_not_depend_on_their_scale():
    algorithm = method.create("tafs_grpo", {"normalize_rewards": True})
    rewards = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(1))
    small, large = (algorithm.credit({"clip": k * rewards}, {"clip": 1.0}) for k in (1.0, 1000.0))
    torch.testing.assert_close(small, large, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_reward_stops_before_the_update_and_is_named(value):
    run = trainer("tafs_grpo")
    reward = run.rewards.rewards[0]
    broken = dataclasses.replace(
        reward, score=lambda images, prompts: torch.full((len(images),), value)
    )
    run.rewards.rewards = (broken,)
    before = {name: p.detach().clone() for name, p in run.parameters.items()}
    with pytest.raises(
        NonFinite, match="iteration 3: reward 'clip' is (nan|inf) for image 0, scored step 1 of 3"
    ):
        run.iterate(3)
    for name, parameter in run.parameters.items():
        assert torch.equal(parameter, before[name])


def test_a_non_finite_gradient_stops_before_the_update():
    run = trainer("tafs_grpo")
    run.parameters["bias"].register_hook(lambda gradient: gradient * float("nan"))
    before = run.parameters["bias"].detach().clone()
    with pytest.raises(NonFinite, match="iteration 0, update 0: the gradient's norm is nan"):
        run.iterate(0)
    assert torch.equal(run.parameters["bias"], before)


def test_every_method_file_is_its_name():
    for name, module in method.sources().items():
        assert method.source_file(name).stem == name
        assert module.endswith(f".{name}")
        assert config.NAME.fullmatch(name)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("def broken(:", "cannot be imported (SyntaxError: invalid syntax"),
        ("import torch\ntorch.no_such_thing", "cannot be imported (AttributeError: "),
        ("METHOD = 3", "defines no METHOD derived from tafs.method.Method"),
    ],
)
def test_a_broken_method_file_is_named_in_one_line(source, problem, tmp_path, monkeypatch):
    (tmp_path / "broken_method.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_method", raising=False)
    monkeypatch.setattr(method, "sources", lambda: {"broken_method": "broken_method"})
    with pytest.raises(ValueError) as raised:
        method.create("broken_method", {})
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
    stopped.save(tmp_path, "of this run", 2, seconds=0.0)
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
