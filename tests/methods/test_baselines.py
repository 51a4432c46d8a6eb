"""What is specific to each shipped method: windows, random steps, solvers, gradients."""

import pytest
import torch
from support.toy import ToyBackbone, streams, toy_run, toy_trainer

from tafs.methods import UpdateInputs, registry
from tafs.models import sampling


def toy() -> ToyBackbone:
    backbone = ToyBackbone()
    backbone.add_lora(1, 1, torch.Generator())
    return backbone


def roll(name: str, iteration: int = 0, count: int = 6, **hyperparameters: object):
    """Return the method, its network and a rollout of `count` images from the same noise."""
    algorithm = registry.create(name, hyperparameters)
    backbone = toy()
    noise = torch.randn(1, 2, generator=torch.Generator().manual_seed(0)).expand(count, 2)
    with torch.no_grad():
        trajectory = algorithm.rollout(
            backbone,  # type: ignore[arg-type]
            backbone.encode(["a red ring"] * count),
            noise,
            streams(count, 1),
            iteration,
        )
    return algorithm, backbone, trajectory


def test_mix_grpos_window_moves_and_never_shrinks_or_empties():
    algorithm = registry.create("mix_grpo", {"interval": 2})
    windows = [list(algorithm.trained_steps(i)) for i in range(200)]
    assert {len(w) for w in windows} == {4}
    assert [w[0] for w in windows[:6]] == [0, 0, 1, 1, 2, 2]
    assert max(w[-1] for w in windows) == 23  # the last step, to the clean image, has no noise
    assert windows[42] == windows[0]


def test_mix_grpo_is_the_ode_outside_its_window():
    """Images with the same start noise differ only from the window on."""
    algorithm, _, trajectory = roll("mix_grpo", iteration=25 * 5)
    assert list(algorithm.trained_steps(125)) == [5, 6, 7, 8]
    first = trajectory.x_t[0]
    torch.testing.assert_close(first, first[:1].expand_as(first))
    assert (trajectory.x_t[1].std(0) > 0).all()
    grid = torch.linspace(1, 0, 26)
    torch.testing.assert_close(trajectory.t[:, 0], grid[5:9])


def test_the_flash_solver_takes_few_steps_after_the_window():
    algorithm = registry.create("mix_grpo", {"flash_steps": 5})
    grid = algorithm.grid(toy(), 0)  # type: ignore[attr-defined]
    assert len(grid) == 4 + 5 + 1
    assert grid[-1] == 0
    torch.testing.assert_close(grid[:5], torch.linspace(1, 0, 26)[:5])
    assert (grid.diff() < 0).all()


def test_the_flash_solver_is_second_order_from_its_second_estimate_on():
    algorithm = registry.create("mix_grpo", {"flash_steps": 5})
    x, (earlier, later) = torch.ones(1, 2), (torch.tensor([t]) for t in (0.8, 0.6))
    past = [(torch.zeros(1, 2), earlier), (x / 2, later)]
    s = torch.tensor([0.4])
    expected = sampling.dpm_solver_to(x, x / 2, later, s, torch.zeros(1, 2), earlier)
    torch.testing.assert_close(algorithm.deterministic_step(past, x, s), expected)  # type: ignore[attr-defined]
    euler = sampling.ode_to(x, x / 2, later, s)
    torch.testing.assert_close(algorithm.deterministic_step(past[1:], x, s), euler)  # type: ignore[attr-defined]
    assert (expected - euler).abs().max() > 0.01


def test_dance_grpo_trains_a_random_60_percent_of_each_images_steps():
    _, _, trajectory = roll("dance_grpo", count=40)
    assert trajectory.t.shape == (14, 40)
    chosen = [frozenset(trajectory.t[:, i].tolist()) for i in range(40)]
    assert {len(steps) for steps in chosen} == {14}
    assert len(set(chosen)) > 35
    grid = sampling.shifted(torch.linspace(1, 0, 26), 3.0)[:-2].tolist()
    assert set().union(*chosen) <= set(grid)


def test_dance_grpo_selects_whole_records():
    algorithm, backbone, trajectory = roll("dance_grpo")
    for n in range(14):
        x_t, t, s = trajectory.x_t[n], trajectory.t[n], trajectory.s[n]
        v = backbone.velocity(x_t, t, trajectory.cond)
        transition = algorithm.transition(x_t, v, t, s)
        torch.testing.assert_close(transition.log_prob(trajectory.x_s[n]), trajectory.log_prob[n])


def test_cps_is_a_policy_for_grpo():
    algorithm, backbone, trajectory = roll("flow_grpo", sampler="cps", eta=0.5)
    x_t, t, s = trajectory.x_t[2], trajectory.t[2], trajectory.s[2]
    expected = sampling.cps(x_t, backbone.velocity(x_t, t, trajectory.cond), t, s, 0.5)
    torch.testing.assert_close(expected.log_prob(trajectory.x_s[2]), trajectory.log_prob[2])


def test_without_annealing_tafs_grpo_scores_only_the_final_image_of_an_sde():
    algorithm, _, trajectory = roll("tafs_grpo", sampler="flow_sde", credit_reading="final")
    assert (algorithm.nfe_old, algorithm.nfe_theta) == (4, 3)
    assert len(trajectory.scored) == 1


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_reward_instruct_normalises_the_gradient_of_each_reward(scale):
    algorithm = registry.create("reward_instruct", {})
    latents = torch.zeros(5, 2)
    inputs = UpdateInputs(
        torch.zeros(0, 5),
        lambda x, part: {"one": scale * x[:, 0], "both": x.sum(1) / scale, "none": 0 * x[:, 1]},
        {"one": 1.0, "both": 2.0, "none": 3.0},
        toy().reference,
    )
    direction = algorithm.direction(latents, slice(0, 5), inputs)
    torch.testing.assert_close(direction, torch.tensor([1 + 2**0.5, 2**0.5]).expand(5, 2))


def test_reward_instruct_draws_its_number_of_steps():
    algorithm = registry.create("reward_instruct", {})
    backbone = toy()
    counts = set()
    for seed in range(40):
        trajectory = algorithm.rollout(
            backbone,  # type: ignore[arg-type]
            backbone.encode(["a red ring"] * 2),
            torch.zeros(2, 2),
            streams(2, seed),
            0,
        )
        counts.add(len(trajectory.t))
    assert counts == {1, 2, 3, 4}


def test_consistency_distillation_alone_ignores_the_reward():
    run = toy_trainer(toy_run("rg_lcd", reward_weight=0.0))

    def unused(*_: object) -> None:
        raise AssertionError("the reward was differentiated")

    run._differentiable_rewards = unused  # type: ignore[method-assign, assignment]
    record = run.iterate(0)
    assert record["distillation"] >= 0
    assert not registry.create("rg_lcd", {"reward_weight": 0.0}).needs_reward_gradients


def test_the_distillation_loss_is_zero_where_estimates_agree_along_the_path():
    """The network whose x0_hat is the same for all x and t is consistent."""
    algorithm = registry.create("rg_lcd", {"reward_weight": 0.0})
    target = torch.tensor([0.3, -0.2])

    class Constant(ToyBackbone):
        def velocity(self, x_t, t, cond):
            return (x_t - target - 0 * self.bias) / t[:, None]

    backbone = Constant()
    backbone.add_lora(1, 1, torch.Generator())
    cond = backbone.encode(["a red ring"] * 16)
    with torch.no_grad():
        trajectory = algorithm.rollout(backbone, cond, torch.randn(16, 2), streams(16), 0)  # type: ignore[arg-type]
    inputs = UpdateInputs(torch.zeros(0, 16), lambda x, part: {}, {}, backbone.reference)
    for part in algorithm.losses(backbone, trajectory, inputs, 8):  # type: ignore[arg-type]
        assert part.metrics["distillation"].max() < 1e-4


def test_the_averaged_adapter_is_used_only_inside_its_block():
    run = toy_trainer(toy_run("rg_lcd"))
    run.iterate(0)
    live = run.parameters["bias"].detach().clone()
    average = run.averages["bias"].clone()
    assert not torch.equal(live, average)
    with run.averaged():
        assert torch.equal(run.parameters["bias"], average)
    assert torch.equal(run.parameters["bias"], live)
    assert torch.equal(run.averages["bias"], average)
