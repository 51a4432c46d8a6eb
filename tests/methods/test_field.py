"""The field's methods against their published formulas, on numbers that are worked out by hand."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.toy import ToyBackbone, streams, toy_run, toy_trainer

from tafs import experiment
from tafs.experiment.variants import Variants
from tafs.methods import Branching, Method, Trajectory, UpdateInputs, registry
from tafs.methods.forward_process import VELOCITY, target
from tafs.models import Conditioning, sampling

ROOT = Path(__file__).resolve().parents[2]
COND = Conditioning(torch.zeros(1, 1, 1), torch.zeros(1, 1))
FIRST = (0, slice(0, 1))  # the first step of the first image


def toy(weight: float = 0.0) -> ToyBackbone:
    backbone = ToyBackbone()
    backbone.add_lora(1, 1, torch.Generator())
    backbone.weight.data.fill_(weight)
    return backbone


def start(count: int = 5) -> torch.Tensor:
    """The noise of `count` images, the same for all."""
    return torch.randn(1, 2, generator=torch.Generator().manual_seed(0)).expand(count, 2)


def roll(method: Method, backbone: ToyBackbone, count: int = 5) -> Trajectory:
    """A rollout of `count` images from the same noise."""
    cond = backbone.encode(["a red ring"] * count)
    with torch.no_grad():
        return method.rollout(backbone, cond, start(count), streams(count, 1), 0)  # type: ignore[arg-type]


def copy_of(x_0: list[float], e: list[float], t: float, old: list[float]) -> Trajectory:
    """One noised copy of one image."""
    one = [torch.tensor([[values]]) for values in (x_0, e, old)]
    time = torch.full((1, 1), t)
    return Trajectory(
        x_t=(1 - t) * one[0] + t * one[1],
        x_s=one[0],
        t=time,
        s=torch.zeros(1, 1),
        log_prob=torch.zeros(1, 1),
        scored=one[0],
        cond=COND,
        records={VELOCITY: one[2]},
    )


def test_the_forward_process_noises_the_odes_images_at_distinct_times_of_the_grid():
    method, backbone = registry.create("diffusion_nft", {"steps": 6, "copies": 4}), toy(0.1)
    found = roll(method, backbone)
    x, grid = start(), torch.linspace(1, 0, 7)
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        x = x + (s - t) * backbone.velocity(x, t.expand(5), COND)
    torch.testing.assert_close(found.scored[0], x.detach())
    assert found.t.shape == (4, 5)
    for image in range(5):
        times = found.t[:, image].tolist()
        assert len(set(times)) == 4 and set(times) <= set(grid[:-1].tolist())
    assert len({tuple(found.t[:, image].tolist()) for image in range(5)}) > 1
    draws = streams(5, 1)  # the ODE draws nothing
    torch.testing.assert_close(found.t, grid[draws.rand([6]).argsort(1)[:, :4].T])
    for n in range(4):
        e, t = draws.randn([2]), found.t[n, :, None]
        torch.testing.assert_close(found.x_t[n], ((1 - t) * x + t * e).detach())
        torch.testing.assert_close(target(found, (n, slice(0, 5))), (e - x).detach())
        assert len({tuple(row) for row in e.tolist()}) == 5  # not the noise of the rollout
        v = backbone.velocity(found.x_t[n], found.t[n], COND).detach()
        assert torch.equal(found.records[VELOCITY][n], v)


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        # v+ = (2, -1.5), v- = (0, -0.5); x+ - x_0 = (0, -0.25), x- - x_0 = (1, -0.75).
        # Mean squares 0.03125 and 0.78125 over means 0.125 and 0.875: 0.25 and 0.892857.
        (5.0, 0.25),
        (-5.0, 0.892857),
        (0.0, (0.25 + 0.892857) / 2),
        (2.5, 0.75 * 0.25 + 0.25 * 0.892857),
        (9.0, 0.25),  # beyond the limit of 5
    ],
)
def test_diffusion_nft_weighs_the_errors_of_both_implicit_policies(advantage, expected):
    method = registry.create("diffusion_nft", {"mixing": 0.5})
    trajectory = copy_of([1.0, 2.0], [3.0, 0.0], 0.5, old=[1.0, -1.0])
    v = torch.tensor([[3.0, -2.0]])
    loss = method.loss(v, trajectory, FIRST, torch.tensor([advantage]))  # type: ignore[attr-defined]
    assert loss.item() == pytest.approx(5 / 0.5 * expected, rel=1e-5)


def test_diffusion_nfts_weights_have_no_gradients():
    """d (error^2 / 2w) / d v = -t b error / w for the positive policy, with w = mean |error|."""
    method = registry.create("diffusion_nft", {})
    trajectory = copy_of([1.0, 2.0], [3.0, 0.0], 0.5, old=[0.0, 0.0])
    v = torch.tensor([[1.0, -1.0]], requires_grad=True)
    loss = method.loss(v, trajectory, FIRST, torch.tensor([5.0]))  # type: ignore[attr-defined]
    (gradient,) = torch.autograd.grad(loss, v)
    # x+ = (2 - 0.5, 1 + 0.5) = (1.5, 1.5): errors (0.5, -0.5), w = 0.5; times A_max = 5.
    torch.testing.assert_close(gradient, 5 * torch.tensor([[-0.5, 0.5]]))


def test_diffusion_nft_samples_with_the_old_policy_which_moves_after_each_iteration():
    method = registry.create("diffusion_nft", {"old_rate": 0.1, "old_limit": 0.25})
    decays = [method.decay(updates) for updates in range(8)]
    assert decays == pytest.approx([1, 0.1, 1, 0.2, 1, 0.25, 1, 0.25])
    still = toy_trainer(toy_run("diffusion_nft", old_rate=1.0, old_limit=1.0))
    untrained = toy_trainer(toy_run("diffusion_nft", learning_rate=0.0))
    for iteration in range(3):
        rewards = [run.iterate(iteration)["rewards"] for run in (still, untrained)]
        assert rewards[0] == rewards[1]
    assert still.parameters["bias"].any() and not still.averages["bias"].any()


def path(backbone: ToyBackbone, x: torch.Tensor, times: list[float]) -> torch.Tensor:
    """Euler steps from x at times[0] to times[-1]."""
    for t, s in itertools.pairwise(times):
        x = x + (s - t) * backbone.velocity(x, torch.full((len(x),), t), COND)
    return x.detach()


def flow_sde(
    x: torch.Tensor, v: torch.Tensor, t: torch.Tensor, s: torch.Tensor
) -> torch.distributions.Normal:
    """Flow-GRPO's step with eta = 0.7, for t and s [B]."""
    t, s = t[:, None], s[:, None]
    # The first step has the noise level of the second time: that of t = 1 is infinite.
    level = 0.7 * (t / (1 - torch.where(t == 1, s, t))).sqrt()
    mean = x + (v + level**2 / (2 * t) * (x + (1 - t) * v)) * (s - t)
    return torch.distributions.Normal(mean, level * (t - s).sqrt())


@pytest.mark.parametrize(
    ("name", "suffixes"),
    [
        ("tempflow_grpo", [[[1, 2, 3, 4, 5]], [[2, 3, 4, 5]], [[3, 4, 5]]]),
        # Every second time; where the last interval does not fit, the one before ends at 0.
        ("g2rpo", [[[1, 2, 3, 4, 5], [1, 2, 5]], [[2, 3, 4, 5], [2, 3, 5]], [[3, 4, 5], [3, 5]]]),
    ],
)
def test_branches_leave_one_ode_trajectory_and_end_on_the_ode(name, suffixes):
    """`suffixes` are the indices of the grid's times that each image of a branch passes."""
    method, backbone = registry.create(name, {"steps": 5, "trained": 3}), toy(0.1)
    found = roll(method, backbone)
    grid = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
    draws = streams(5, 1)
    expected = []
    for n in range(3):
        anchor = path(backbone, found.x_t[0], grid[: n + 1])
        torch.testing.assert_close(found.x_t[n], anchor)
        assert (found.x_t[n] == found.x_t[n][:1]).all()  # shared by the group
        t, s = torch.full((5,), grid[n]), torch.full((5,), grid[n + 1])
        torch.testing.assert_close((found.t[n], found.s[n]), (t, s))
        step = flow_sde(anchor, backbone.velocity(anchor, t, COND).detach(), t, s)
        torch.testing.assert_close(found.x_s[n], step.mean + step.stddev * draws.randn([2]))
        torch.testing.assert_close(found.log_prob[n], step.log_prob(found.x_s[n]).mean(1))
        assert len({tuple(row) for row in found.x_s[n].tolist()}) == 5
        expected += [path(backbone, found.x_s[n], [grid[i] for i in rest]) for rest in suffixes[n]]
    torch.testing.assert_close(found.scored, torch.stack(expected))
    evaluations = 3 + sum(len(times) - 1 for step in suffixes for times in step)
    assert (method.nfe_old, method.nfe_theta) == (evaluations, 3)
    assert method.forward_equivalents == evaluations + 9
    assert method.cost(4) == (evaluations - 3) + (3 + 9) / 4  # a group shares the ODE's states
    assert replace(method, shared_noise=False).cost(4) == evaluations + 9


@pytest.mark.parametrize("name", ["tempflow_grpo", "g2rpo"])
@pytest.mark.parametrize("micro_batch", [64, 5])  # whole groups, and parts of them
def test_states_that_images_share_give_the_gradients_of_separate_evaluations(
    name, micro_batch, monkeypatch
):
    def trained() -> list[torch.Tensor]:
        run = toy_trainer(toy_run(name, training={"micro_batch": micro_batch}, beta=0.1))
        for iteration in range(3):
            run.iterate(iteration)
        return [p.detach().clone() for p in run.parameters.values()]

    shared = trained()
    monkeypatch.delattr(Branching, "velocity")
    monkeypatch.delattr(Branching, "parts")
    assert all(p.any() for p in shared)
    torch.testing.assert_close(shared, trained(), rtol=1e-4, atol=1e-6)


def test_each_state_is_evaluated_once_with_its_own_time_and_prompt():
    evaluated: list[list[float]] = []

    class Network:
        def velocity(self, x_t: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
            evaluated.append(x_t[:, 0].tolist())
            return x_t * t[:, None] + cond.pooled

    states = torch.tensor([0, 0, 0, 1, 2, 2, 3])  # of each image
    x_t, t, pooled = torch.tensor([[1.0, 3, 2, 1], [2, 1, 2, 1], [5, 6, 7, 8]])[:, states]
    rows, cond = x_t[:, None].repeat(1, 2), Conditioning(torch.zeros(7, 1, 1), pooled[:, None])
    method = registry.create("tempflow_grpo", {})
    assert isinstance(method, Branching)
    v = method.velocity(Network(), rows, t, cond)  # type: ignore[arg-type]
    assert v[:, 0].tolist() == (x_t * t + pooled).tolist()
    assert evaluated == [[1, 3, 2, 1]]
    assert method.parts(rows, 3) == [slice(0, 6), slice(6, 7)]


def test_a_branching_step_is_credited_with_the_sum_over_its_own_images_granularities():
    rewards = torch.tensor([[1.0, 3.0], [5.0, 1.0], [2.0, 2.0], [0.0, 8.0]])[:, None]
    method = registry.create("g2rpo", {"steps": 4, "trained": 2})
    advantages = method.compute_advantages({"clip": rewards}, {"clip": 1.0})
    # z-scores (-1, 1) and (1, -1) of the first step, (0, 0) and (-1, 1) of the second.
    expected = torch.tensor([[[0.0, 0.0]], [[-1.0, 1.0]]])
    torch.testing.assert_close(advantages, expected, atol=2e-4, rtol=0)
    method = registry.create("tempflow_grpo", {"steps": 5, "trained": 4})
    advantages = method.compute_advantages({"clip": rewards}, {"clip": 1.0})
    expected = torch.tensor([[-1.0, 1.0], [1.0, -1.0], [0.0, 0.0], [-1.0, 1.0]])[:, None]
    torch.testing.assert_close(advantages, expected, atol=2e-4, rtol=0)


def test_g2rpo_clamps_each_rewards_advantages_before_their_sum():
    one = torch.zeros(2, 1, 64)  # two granularities of one step
    one[..., 0] = 1  # (1 - 1 / 64) / sqrt(63 / 64^2) = 7.9 standard deviations
    method = registry.create("g2rpo", {"steps": 4, "trained": 1})
    advantages = method.compute_advantages({"clip": one, "hpsv2": one}, {"clip": 1, "hpsv2": 1})
    assert advantages.shape == (1, 1, 64)
    assert advantages[0, 0, 0].item() == pytest.approx(2 * 2 * 5)


BRANCHES = {"steps": 5, "trained": 3, "splits": 2, "interval": 1, "shift": 2.0}


def test_branch_grpos_paths_share_their_states_before_each_split():
    method, backbone = registry.create("branch_grpo", BRANCHES), toy(0.1)
    found = roll(method, backbone)
    # u -> 2u / (1 + u) of the uniform times. Edges: one of step 0, two of step 1, four of step 2.
    grid = [1.0, 8 / 9, 3 / 4, 4 / 7, 1 / 3, 0.0]
    steps, parents = [0, 1, 1, 2, 2, 2, 2], [None, 0, 0, 1, 1, 2, 2]
    assert len(found.t) == method.nfe_theta == 7
    for edge, (n, parent) in enumerate(zip(steps, parents, strict=True)):
        assert found.t[edge].tolist() == pytest.approx([grid[n]] * 5)
        assert found.s[edge].tolist() == pytest.approx([grid[n + 1]] * 5)
        if parent is not None:
            assert torch.equal(found.x_t[edge], found.x_s[parent])
        x_t, t, s = found.x_t[edge], found.t[edge], found.s[edge]
        v = backbone.velocity(x_t, t, COND).detach()
        t, s = t[:, None], s[:, None]
        mean = x_t + (v + 0.3**2 / (2 * t) * (x_t + (1 - t) * v)) * (s - t)
        std = 4 * 0.3 * (t - s).sqrt()  # all three steps split
        normal = torch.distributions.Normal(mean, std)
        torch.testing.assert_close(found.log_prob[edge], normal.log_prob(found.x_s[edge]).mean(1))
        assert len({tuple(row) for row in found.x_s[edge].tolist()}) == 5  # the group's children
    assert (found.x_t[0] == found.x_t[0][:1]).all()  # the root
    assert not torch.equal(found.x_s[1], found.x_s[2])
    assert len(found.scored) == 4 and len({leaf[0, 0].item() for leaf in found.scored}) == 4


def test_branch_grpos_leaves_are_in_the_order_of_their_last_edges():
    found = roll(registry.create("branch_grpo", {**BRANCHES, "trained": 4}), toy(0.1))
    assert len(found.x_s) == 1 + 2 + 4 + 4
    for leaf, x, t in zip(found.scored, found.x_s[7:], found.s[7:], strict=True):
        torch.testing.assert_close(leaf, x / 2 + 0.1 * t[:, None])  # the last step has no noise


def test_branch_grpo_has_the_split_noise_at_splits_only():
    method = registry.create("branch_grpo", {**BRANCHES, "splits": 1, "interval": 2, "trained": 4})
    found = roll(method, toy(0.1))
    # Split at steps 0 and 2: the edges 0, 2 and 3; the leaves' noise and the last step are plain.
    for edge, scale in enumerate([4, 1, 4, 4, 1, 1]):
        given = found.x_t[edge], torch.zeros(5, 2), found.t[edge], found.s[edge]
        std = method.transition(*given).std  # type: ignore[attr-defined]
        expected = scale * 0.3 * (found.t[edge] - found.s[edge]).sqrt()
        torch.testing.assert_close(std[:, 0], expected)
    assert len(found.scored) == 2


def test_branch_grpo_normalises_the_means_of_the_leaves_over_each_depth():
    method = registry.create("branch_grpo", {**BRANCHES, "splits": 1})
    # Two leaves of each of two images; the nodes of step 0 are (2, 5), those of steps 1 and 2
    # the leaves (1, 3) and (4, 6), with mean 3.5 and std sqrt(13) / 2.
    rewards = torch.tensor([[1.0, 4.0], [3.0, 6.0]])[:, None]
    advantages = method.compute_advantages({"clip": rewards}, {"clip": 1.0})
    leaves = (torch.tensor([[1.0, 4.0], [3.0, 6.0]]) - 3.5) / (13**0.5 / 2)
    expected = torch.stack([torch.tensor([-1.0, 1.0]), *leaves, *leaves])[:, None]
    torch.testing.assert_close(advantages, expected, atol=2e-4, rtol=0)


def test_branch_grpos_nodes_have_the_means_of_their_own_leaves():
    method = registry.create("branch_grpo", BRANCHES)
    # Four leaves of each of two images, two below each node of step 1.
    rewards = torch.tensor([[1.0, 3.0], [2.0, 4.0], [5.0, 6.0], [8.0, 7.0]])[:, None]
    advantages = method.compute_advantages({"clip": rewards}, {"clip": 1.0})

    def normalised(nodes: list[list[float]]) -> torch.Tensor:
        values = torch.tensor(nodes)
        return (values - values.mean()) / values.std(correction=0)

    depths = [[[4.0, 5.0]], [[1.5, 3.5], [6.5, 6.5]], rewards[:, 0].tolist()]
    expected = torch.cat([normalised(nodes) for nodes in depths])[:, None]
    torch.testing.assert_close(advantages, expected, atol=2e-4, rtol=0)


def test_tempflow_weighs_each_step_by_its_noise():
    method = registry.create("tempflow_grpo", {"steps": 4, "trained": 3, "clip_range": 0.2})
    found = roll(method, toy(), count=2)
    # g sqrt(t - s) for t = 1, 3/4, 1/2 with g = 0.7 sqrt(t / (1 - t)), 1 - t of the next point at 1
    std = [0.7 * (t / rest) ** 0.5 * 0.25**0.5 for t, rest in ((1, 0.25), (0.75, 0.25), (0.5, 0.5))]
    advantages = torch.tensor([1.0, -0.5])
    for n in range(3):
        v = toy().velocity(found.x_t[n], found.t[n], COND)
        transition = method.transition(found.x_t[n], v, found.t[n], found.s[n])  # type: ignore[attr-defined]
        given = transition, found, (n, slice(0, 2)), advantages
        loss = method.objective(*given).loss  # type: ignore[attr-defined]
        # The ratio is 1, so that the loss is minus the weighted mean advantage, 1/4.
        assert loss.item() == pytest.approx(-0.25 * std[n] / (sum(std) / 3), rel=1e-5)


@pytest.mark.parametrize(("power", "ratio"), [({"power": 0.5}, 0.493069), ({}, 0.498265)])
@pytest.mark.parametrize(
    ("advantage", "clip_range", "objective"),
    [
        (5.0, 1.0, lambda r: r),
        (-2.5, 1.0, lambda r: -0.5 * r),
        (-5.0, 0.2, lambda r: -0.8),  # clipped
        (5.0, 0.2, lambda r: r),
    ],
)
def test_awm_takes_the_flow_matching_loss_as_the_log_likelihood(
    advantage, clip_range, objective, power, ratio
):
    """The target is (2, -2), so that v and v_old have mean squares 2 and 1/2, and t is 1/2.

    The ratio is exp(-2 (sqrt(2) - sqrt(1/2)) / 2) for p = 1/2, and for p = 1/4, the default,
    exp(-4 (2^(1/4) - 2^(-1/4)) / 2).
    """
    method = registry.create("awm", {**power, "clip_range": clip_range, "old_weight": 3.0})
    trajectory = copy_of([1.0, 2.0], [3.0, 0.0], 0.5, old=[2.0, -1.0])
    v = torch.tensor([[4.0, -2.0]])
    found = method.loss(v, trajectory, FIRST, torch.tensor([advantage]))  # type: ignore[attr-defined]
    assert found.ratio.item() == pytest.approx(ratio, rel=1e-5)
    assert found.clipped.item() == ((advantage, clip_range) == (-5.0, 0.2))
    # The mean square of v - v_old = (2, -1) is 2.5.
    assert found.loss.item() == pytest.approx(-objective(ratio) + 3 * 2.5, rel=1e-5)


def nft_loss(
    v: torch.Tensor, old: torch.Tensor, x_0: torch.Tensor, e: torch.Tensor, t: float, a: float
) -> torch.Tensor:
    """The loss of one copy with b = 1/2 and A_max = 1."""
    x_t, r = (1 - t) * x_0 + t * e, 0.5 + a / 2
    errors = [x_t - t * mix - x_0 for mix in (0.5 * old + 0.5 * v, 1.5 * old - 0.5 * v)]
    positive, negative = (d.square().mean() / d.abs().mean() for d in errors)
    return 1 / 0.5 * (r * positive + (1 - r) * negative)


def awm_loss(
    v: torch.Tensor, old: torch.Tensor, x_0: torch.Tensor, e: torch.Tensor, t: float, a: float
) -> torch.Tensor:
    """The loss of one copy with p = 1/4, eps = 0.01 and w = 3."""
    new, before = (-4 * (u - (e - x_0)).square().mean() ** 0.25 * t for u in (v, old))
    r = (new - before).exp()
    return -torch.minimum(r * a, r.clamp(0.99, 1.01) * a) + 3 * (v - old).square().mean()


@pytest.mark.parametrize(
    ("name", "own", "loss"),
    [
        ("diffusion_nft", {"mixing": 0.5}, nft_loss),
        ("awm", {"clip_range": 0.01, "old_weight": 3.0}, awm_loss),
    ],
)
def test_rewards_weigh_the_loss_of_noised_copies(name, own, loss):
    method = registry.create(name, {"steps": 3, "copies": 2, "advantage_limit": 1.0, **own})
    backbone = toy(0.1)
    found = roll(method, backbone, count=4)
    backbone.weight.data.fill_(0.3)
    # Sums (1, 3) and (2, 8): group means 2 and 5, and the batch's variance is 7.25.
    rewards = {
        "clip": torch.tensor([[[0.0, 3.0], [2.0, 6.0]]]),
        "pickscore": torch.tensor([[[2.0, 0.0], [0.0, 4.0]]]),
    }
    advantages = method.compute_advantages(rewards, {"clip": 1.0, "pickscore": 0.5}).flatten(1)
    small = 1 / (7.25**0.5 + 1e-4)
    each = [-small, small, -1.0, 1.0]  # the last two, 3 / 2.69, are clamped
    inputs = UpdateInputs(advantages, lambda x, part: {}, {}, backbone.reference)
    parts = [part.loss.item() for part in method.losses(backbone, found, inputs, 3)]  # type: ignore[arg-type]
    expected = 0.0
    for n, image in itertools.product(range(2), range(4)):
        t, x_t, x_0 = found.t[n, image].item(), found.x_t[n, image], found.x_s[n, image]
        old, v = ((x_t - (x_t / 2 + weight * t)) / t for weight in (0.1, 0.3))
        e = (x_t - (1 - t) * x_0) / t
        expected += loss(v, old, x_0, e, t, each[image]).item()
    assert sum(parts) == pytest.approx(expected / 8, rel=1e-4)


@pytest.mark.parametrize("name", ["diffusion_nft", "awm"])
def test_beta_weighs_the_squared_difference_from_the_base_models_velocity(name):
    def total(beta: float) -> tuple[float, Trajectory]:
        method, backbone = registry.create(name, {"beta": beta}), toy(0.1)
        backbone.bias.data.fill_(0.2)
        found = roll(method, backbone)
        advantages = torch.linspace(-1, 1, 5).expand(len(found.t), 5)
        inputs = UpdateInputs(advantages, lambda x, part: {}, {}, backbone.reference)
        parts = method.losses(backbone, found, inputs, 2)  # type: ignore[arg-type]
        return sum(part.loss.item() for part in parts), found

    without, found = total(0.0)
    # The adapter adds 0.1 t + 0.2 to x0_hat = x_t - t v, so that v differs by 0.1 + 0.2 / t.
    expected = 3 * (0.1 + 0.2 / found.t).square().mean().item()
    assert total(3.0)[0] - without == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["pref_grpo", "stepwise_flow_grpo", "grpo_guard"])
def test_rivals_of_flow_grpo_train_its_first_steps(name):
    method, backbone = registry.create(name, {"eta": 0.7}), toy(0.1)
    found = roll(method, backbone)
    torch.testing.assert_close(found.t[:, 0], torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6, 0.5]))
    draws = streams(5, 1)
    for n in range(6):
        x = found.x_t[n]
        v = backbone.velocity(x, found.t[n], COND).detach()
        step = flow_sde(x, v, found.t[n], found.s[n])
        torch.testing.assert_close(found.x_s[n], step.mean + step.stddev * draws.randn([2]))
        torch.testing.assert_close(found.log_prob[n], step.log_prob(found.x_s[n]).mean(1))
        if n:
            assert torch.equal(x, found.x_s[n - 1])
        if name == "grpo_guard":
            torch.testing.assert_close(found.records["mean"][n], step.mean)


def test_pref_grpo_normalises_win_rates():
    nan = float("nan")
    rewards = torch.tensor([[[0.1, 0.5, 0.5, 900.0], [2.0, nan, 1.0, nan]]])
    method = registry.create("pref_grpo", {})
    advantages = method.compute_advantages({"clip": rewards}, {"clip": 1.0})
    # Win rates (0, 1/2, 1/2, 1) with std sqrt(1/8), and (1, 0) of the two known images.
    first, second = torch.tensor([-0.5, 0.0, 0.0, 0.5]) / 0.125**0.5, torch.tensor([1.0, 0, -1, 0])
    expected = torch.stack([first, second]).expand(6, 2, 4)
    torch.testing.assert_close(advantages, expected, atol=5e-4, rtol=0)


@pytest.mark.parametrize(
    ("hyperparameters", "scored"),
    [({"steps": 5, "trained": 2}, 3), ({"steps": 3, "trained": 2, "sampler": "anneal"}, 3)],
)
def test_the_gain_credits_a_step_with_what_it_adds_to_the_reward(hyperparameters, scored):
    method, backbone = registry.create("stepwise_flow_grpo", hyperparameters), toy(0.1)
    found = roll(method, backbone)
    assert len(found.scored) == scored
    # The images before and after each trained step: the toy model estimates x / 2 + 0.1 t.
    states = [*zip(found.x_t[:2], found.t[:2], strict=True), (found.x_s[1], found.s[1])]
    for image, (x, t) in zip(found.scored, states, strict=True):
        torch.testing.assert_close(image, x / 2 + 0.1 * t[:, None])
    rewards = torch.tensor([[1.0, 5.0], [3.0, 6.0], [4.0, 9.0]])[:, None]
    # Gains (2, 1) and (1, 3), although the second image is the better one at every step.
    advantages = method.compute_advantages({"clip": rewards}, {"clip": 1.0})
    expected = torch.tensor([[[1.0, -1.0]], [[-1.0, 1.0]]])
    torch.testing.assert_close(advantages, expected, atol=3e-4, rtol=0)


def test_tafs_grpo_with_gain_credit_differs_from_it_in_credit_alone():
    plans = [
        experiment.load({"scale": scale}, ROOT / "config.yaml") for scale in ("field", "paper")
    ]
    for method in (Variants(plan.config).method for plan in plans):
        gain, plain = method("tafs_gain"), method("tafs_grpo")
        assert replace(gain, credit_reading="step") == plain
    found = roll(gain, toy(0.1))
    assert len(found.scored) == 4  # the first image too
    rewards = torch.tensor([[1.0, 5.0], [3.0, 6.0], [4.0, 9.0], [4.0, 8.0]])[:, None]
    # Gains (2, 1), (1, 3) and (0, -1).
    advantages = gain.compute_advantages({"clip": rewards}, {"clip": 1.0})
    expected = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0]])[:, None]
    torch.testing.assert_close(advantages, expected, atol=4e-4, rtol=0)


def test_grpo_guards_ratio_is_centred_and_scaled_and_its_loss_divided_by_the_steps_length():
    method = registry.create("grpo_guard", {"clip_range": 0.1})
    mean = torch.tensor([[1.0, 2.0]], requires_grad=True)
    old, x_s, std = torch.tensor([[0.5, 2.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([[0.5]])
    before, after = sampling.Transition(old, std), sampling.Transition(mean, std)
    trajectory = Trajectory(
        x_t=x_s[None],
        x_s=x_s[None],
        t=torch.tensor([[0.6]]),
        s=torch.tensor([[0.4]]),
        log_prob=before.log_prob(x_s)[None],
        scored=x_s[None],
        cond=COND,
        records={name: value[None] for name, value in method.record(before).items()},  # type: ignore[attr-defined]
    )
    # log p - log p_old = 0.25 and m = 0.25: (x_s - mu_old)(mu - mu_old) / sigma is 0.25 on average.
    for advantage, value in ((1.0, -1.1), (-1.0, math.exp(0.25))):
        given = after, trajectory, FIRST, torch.tensor([advantage])
        found = method.objective(*given)  # type: ignore[attr-defined]
        assert found.ratio.item() == pytest.approx(math.exp(0.25), rel=1e-5)
        assert found.loss.item() == pytest.approx(value / 0.2, rel=1e-5)
    (gradient,) = torch.autograd.grad(found.loss, mean)
    # d r / d mu = r (x_s - mu_old) / (2 sigma)
    torch.testing.assert_close(gradient, math.exp(0.25) / 0.2 * torch.tensor([[0.5, -1.0]]))


@pytest.mark.parametrize(
    ("last", "weight", "bias"),
    # x_0 = x / 2 + 0.1 w + b; a step before, x = x' / 2 + (x' / 2 + 0.2 w + b) / 2.
    [(1, 0.1, 1.0), (2, 0.1 + 0.05, 1.25)],
)
def test_draft_differentiates_the_reward_through_the_last_steps(last, weight, bias):
    method, backbone = registry.create("draft_k", {"last": last}), toy(0.1)
    found = roll(method, backbone)
    grid = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    x_t = path(backbone, start(), grid[: 11 - last])
    x_0 = path(backbone, x_t, grid[10 - last :])
    torch.testing.assert_close((found.x_t[0], found.x_s[0], found.scored[0]), (x_t, x_0, x_0))
    assert found.t[0, 0].item() == pytest.approx(0.1 * last)
    inputs = UpdateInputs(
        torch.zeros(0, 5), lambda x, part: {"clip": x[:, 0]}, {"clip": 2.0}, backbone.reference
    )
    for part in method.losses(backbone, found, inputs, 2):  # type: ignore[arg-type]
        part.loss.backward()
    expected = {"weight": [-2 * weight, 0], "bias": [-2 * bias, 0]}
    for name, parameter in backbone.lora_parameters().items():
        torch.testing.assert_close(parameter.grad, torch.tensor(expected[name]), atol=1e-6, rtol=0)


def test_refl_differentiates_the_reward_of_a_late_steps_estimate():
    """The toy estimates x_t / 2 + 0.1 t; the derivatives are t by its weight and 1 by its bias."""
    method, backbone = registry.create("refl", {"steps": 5, "late": 3}), toy(0.1)
    grid, drawn = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0], set()
    cond = backbone.encode(["a red ring"] * 5)
    for seed in range(12):
        with torch.no_grad():
            found = method.rollout(backbone, cond, start(), streams(5, seed), 0)  # type: ignore[arg-type]
        n = round(5 * (1 - found.t[0, 0].item()))
        drawn.add(n)
        x_t = path(backbone, start(), grid[: n + 1])
        torch.testing.assert_close(found.t[0], torch.full((5,), grid[n]))
        torch.testing.assert_close(found.x_t[0], x_t)
        torch.testing.assert_close(found.scored[0], x_t / 2 + 0.1 * grid[n])
        inputs = UpdateInputs(
            torch.zeros(0, 5), lambda x, part: {"clip": x[:, 0]}, {"clip": 2.0}, backbone.reference
        )
        parts = list(method.losses(backbone, found, inputs, 2))  # type: ignore[arg-type]
        loss = sum(part.loss for part in parts)
        assert loss.item() == pytest.approx(-2 * (x_t[0, 0].item() / 2 + 0.1 * grid[n]), rel=1e-5)
        gradients = torch.autograd.grad(loss, [backbone.weight, backbone.bias])
        for gradient, expected in zip(gradients, [-2 * grid[n], -2.0], strict=True):
            torch.testing.assert_close(gradient, torch.tensor([expected, 0.0]))
    assert drawn == {2, 3, 4}


def test_online_dpo_marks_the_best_and_the_worst_image_of_groups_with_a_preference():
    nan = float("nan")
    rewards = torch.tensor([[[3.0, 9.0, 1.0, nan], [5.0, 5.0, 5.0, 5.0], [nan, 2.0, nan, nan]]])
    method = registry.create("online_dpo", {"copies": 2})
    marks = method.compute_advantages({"clip": rewards}, {"clip": 1.0})
    expected = torch.tensor([[0.0, 1.0, -1.0, 0.0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert torch.equal(marks, expected.expand(2, 3, 4))
    assert (method.cost(4), method.cost(36)) == (10 + 4 * 2 * 2 / 4, 10 + 4 * 2 * 2 / 36)


@pytest.mark.parametrize("micro_batch", [1, 4, 64])
def test_online_dpo_compares_pairs_at_the_winners_time_and_noise(micro_batch):
    method, backbone = registry.create("online_dpo", {"copies": 2, "sharpness": 3.0}), toy(0.1)
    found = roll(method, backbone, count=6)
    marks = torch.tensor([0.0, 1, -1, -1, 0, 1]).expand(2, 6)
    inputs = UpdateInputs(marks, lambda x, part: {}, {}, backbone.reference)
    parts = [p.loss.item() for p in method.losses(backbone, found, inputs, micro_batch)]  # type: ignore[arg-type]
    assert len(parts) == (4 if micro_batch == 1 else 2)
    expected = 0.0
    for n, (won, lost) in itertools.product(range(2), [(1, 2), (5, 3)]):
        t = found.t[n, won].item()
        e = (found.x_t[n, won] - (1 - t) * found.x_s[n, won]) / t
        gains = []
        for x_0 in (found.x_s[n, won], found.x_s[n, lost]):
            x_t = (1 - t) * x_0 + t * e
            base = x_t / 2 / t  # the toy's velocity (x_t - x0_hat) / t, where x0_hat = x_t / 2
            trained = (x_t / 2 - 0.1 * t) / t  # and x_t / 2 + 0.1 t with the adapter
            errors = [(v - (e - x_0)).square().mean().item() for v in (trained, base)]
            gains.append(errors[0] - errors[1])
        expected += math.log1p(math.exp(1.5 * (gains[0] - gains[1])))
    assert sum(parts) == pytest.approx(expected * 2 / (2 * 6), rel=1e-4)
