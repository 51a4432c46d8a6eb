"""NaN and infinities at random places of training: masked, or a stop before any update."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.toy import call_of, spoil, toy_run, toy_trainer

from tafs.methods import registry
from tafs.methods.policy_gradient import PolicyGradient
from tafs.runtime import checkpoint
from tafs.training.rewards import NonFinite, tolerated
from tafs.training.trainer import Trainer

NAMES = registry.names()
CLASSES = {name: registry.method_class(name) for name in NAMES}
# Those whose advantages are computed again below.
POLICIES = [
    name
    for name, found in CLASSES.items()
    if issubclass(found, PolicyGradient) and found.advantages is PolicyGradient.advantages
]
BAD = (math.nan, math.inf, -math.inf)
REWARDS = {"clip": 1.0, "pickscore": 0.5}
ITERATIONS = 3
IMAGES = 64
UPDATES = 2


def trainer(name: str, group_size: int = 16, **hyperparameters: object) -> Trainer:
    """Create a trainer of 64 images in groups."""
    sizes = {"group_size": group_size, "prompts_per_iteration": IMAGES // group_size}
    return toy_trainer(toy_run(name, rewards=REWARDS, training=sizes, **hyperparameters))


def weights(run: Trainer) -> dict[str, torch.Tensor]:
    tensors, _ = checkpoint.pack_optimizer(run.optimizer)
    tensors |= {f"lora/{name}": p.detach() for name, p in run.parameters.items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def state(run: Trainer) -> dict[str, torch.Tensor]:
    """Copy everything that an update changes."""
    averages = {f"ema/{name}": average.clone() for name, average in run.averages.items()}
    return {**weights(run), **averages}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def contents(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def without(run: Trainer, invalid: np.ndarray) -> None:
    """Make a run without bad numbers compute its advantages without the invalid images.

    The advantages are computed with numpy, group by group. invalid: [groups, G].
    """
    algorithm: Any = run.method

    def advantages(rewards: np.ndarray) -> np.ndarray:
        found = np.zeros_like(rewards)
        for k, groups in enumerate(rewards):
            for group, valid in enumerate(~invalid):
                if valid.sum() < 2:
                    continue
                own = groups[group, valid]
                std = groups[~invalid].std() if algorithm.global_std else own.std()
                found[k, group, valid] = (own - own.mean()) / (std + 1e-4)
        limit = algorithm.advantage_limit or math.inf
        return found.clip(-limit, limit)

    def compute(rewards: dict[str, torch.Tensor], weights: dict[str, float]) -> torch.Tensor:
        values = {name: tensor.double().numpy() for name, tensor in rewards.items()}
        if algorithm.normalize_rewards:
            total = sum(weights[name] * advantages(values[name]) for name in weights)
        else:
            total = advantages(sum(weights[name] * values[name] for name in weights))
        return algorithm.assign_credit(torch.from_numpy(total).float(), algorithm.nfe_theta)

    object.__setattr__(run.method, "compute_advantages", compute)


def test_bad_rewards_are_masked_or_stop_the_run(trials):
    """Up to the tolerated number of images, or more; in any reward and step."""
    for number in trials("numbers: NaN or inf in a training reward", 3, 60):
        rng = np.random.default_rng([1, number])
        name = str(rng.choice(POLICIES))
        size, apart = int(rng.choice([4, 16])), bool(rng.random() < 0.5)
        run, expected = (trainer(name, size, normalize_rewards=apart) for _ in range(2))
        too_many = number % 3 == 2
        count = int(rng.integers(7, IMAGES + 1) if too_many else rng.integers(1, 7))
        # Half of the time in a row, which may leave a small group with one image or none.
        low = int(rng.integers(IMAGES - count + 1))
        pool = np.arange(low, low + count) if rng.random() < 0.5 else np.arange(IMAGES)
        lacking = sorted(int(image) for image in rng.choice(pool, count, replace=False))
        steps = len(run.method.scored_steps())
        spots: dict[str, dict[tuple[int, int], float]] = {reward: {} for reward in REWARDS}
        for image in lacking:
            for _ in range(int(rng.integers(1, 3))):
                place = call_of(run, image, int(rng.integers(steps)))
                spots[str(rng.choice(list(REWARDS)))][place] = BAD[rng.integers(3)]
        for reward, values in spots.items():
            spoil(run, values, reward)
        before = state(run)
        if too_many:
            with pytest.raises(NonFinite) as raised:
                run.iterate(0)
            assert re.fullmatch(
                rf"iteration 0: reward '(clip|pickscore)' is (nan|-?inf) for image {lacking[0]}, "
                rf"scored step \d+ of {steps}; {count} of {IMAGES} images \(.*%\) lack a finite "
                rf"reward, at most {tolerated(IMAGES)} may \(10%, or one\)",
                str(raised.value),
            )
            assert same(state(run), before)
            continue
        invalid = np.zeros(IMAGES, bool)
        invalid[lacking] = True
        without(expected, invalid.reshape(-1, size))
        record, clean = run.iterate(0), expected.iterate(0)
        assert (record["invalid"], clean["invalid"]) == (count, 0)
        for key in ("ratio_deviation", "clip_fraction", "grad_norm", "kl"):
            assert record[key] == pytest.approx(clean[key], rel=1e-3, abs=1e-6), key
        # Includes the optimizer's moments: its first steps depend on the gradients' signs only.
        torch.testing.assert_close(state(run), state(expected), rtol=1e-3, atol=1e-6)
        assert all(parameter.any() for parameter in run.parameters.values())


Break = Callable[[Trainer, int, np.random.Generator], None]


def break_loss(run: Trainer, update: int, rng: np.random.Generator) -> None:
    """Make one part of an update's loss bad."""
    losses, bad, seen = run.method.losses, BAD[rng.integers(3)], [0]
    trajectories = len(run.micro_batches()) // run.method.updates
    chosen = update * trajectories + int(rng.integers(trajectories))
    last = bool(rng.random() < 0.5)

    def broken(*given: Any) -> Iterator[Any]:
        chunk, seen[0] = seen[0], seen[0] + 1
        parts = list(losses(*given)) if chunk == chosen else losses(*given)
        for n, part in enumerate(parts):
            hit = chunk == chosen and n == (len(parts) - 1 if last else 0)
            yield dataclasses.replace(part, loss=part.loss + bad) if hit else part

    object.__setattr__(run.method, "losses", broken)


def break_gradient(run: Trainer, update: int, rng: np.random.Generator) -> None:
    """Make one element of one parameter's gradient bad from an update on."""
    parameter = run.parameters[str(rng.choice(list(run.parameters)))]
    bad, element = BAD[rng.integers(3)], int(rng.integers(parameter.numel()))

    def broken(gradient: torch.Tensor) -> torch.Tensor:
        spoilt = gradient.clone()
        spoilt.view(-1)[element] = bad
        return spoilt

    step = run.optimizer.step
    if update == 0:
        parameter.register_hook(broken)
        return

    def then(*given: Any) -> Any:
        parameter.register_hook(broken)
        return step(*given)

    run.optimizer.step = then  # type: ignore[method-assign]


def break_image(run: Trainer, update: int, rng: np.random.Generator) -> None:
    """Make one value of one image bad before it is scored."""
    decode, calls = run.backbone.decode, [0]
    bad, row, element = BAD[rng.integers(3)], int(rng.integers(16)), int(rng.integers(2))
    chosen = int(rng.integers(len(run.micro_batches())))

    def broken(x_0: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        pixels = decode(x_0, dtype).clone()
        if calls[0] == chosen:
            pixels[row, element] = bad
        calls[0] += 1
        return pixels

    run.backbone.decode = broken  # type: ignore[method-assign]


def break_differentiated(run: Trainer, update: int, rng: np.random.Generator) -> None:
    """Make one value of a differentiated reward bad, in the rollout or in the loss."""
    call = int(rng.integers(2 * len(run.micro_batches())))
    reward = str(rng.choice(list(REWARDS)))
    spoil(run, {(call, int(rng.integers(16))): BAD[rng.integers(3)]}, reward)


def stop_and_continue(
    name: str, fault: Break, line: str, rng: np.random.Generator, folder: Path
) -> None:
    """Train until the fault ends an iteration, and continue from the state before it."""
    undisturbed = trainer(name, updates=UPDATES)
    for iteration in range(ITERATIONS):
        undisturbed.iterate(iteration)
    run = trainer(name, updates=UPDATES)
    failing, update = int(rng.integers(ITERATIONS)), int(rng.integers(UPDATES))
    for iteration in range(failing):
        run.iterate(iteration)
    run.save(folder, {"run": "this one"}, failing, {})
    saved = contents(folder)
    made = [weights(run)]
    run.optimizer.register_step_post_hook(lambda *_: made.append(weights(run)))
    fault(run, update, rng)
    with pytest.raises(NonFinite) as raised:
        run.iterate(failing)
    assert re.fullmatch(
        rf"iteration {failing}, {line}|iteration {failing}: {line}", str(raised.value)
    )
    found = re.search(r"update (\d)", str(raised.value))
    # The updates before the bad one were made, and no others.
    assert len(made) - 1 == (int(found[1]) if found else 0)
    assert same(weights(run), made[-1])
    assert all(tensor.isfinite().all() for tensor in state(run).values())
    assert contents(folder) == saved
    kept = checkpoint.load(folder, {"run": "this one"})
    assert kept is not None and kept.iteration == failing
    continued = trainer(name, updates=UPDATES)
    continued.restore(kept)
    for iteration in range(failing, ITERATIONS):
        continued.iterate(iteration)
    assert same(state(continued), state(undisturbed))


NUMBER = r"(nan|-?inf)"
BAD_IMAGE = r"image \d+ holds NaN or infinity"
BAD_REWARD = rf"reward '\w+' is {NUMBER} for image \d+"


@pytest.mark.parametrize(
    ("fault", "what", "names", "line"),
    [
        (break_loss, "a loss", NAMES, rf"update \d: the loss is {NUMBER}"),
        (break_gradient, "a gradient", NAMES, rf"update \d: the gradient's norm is {NUMBER}"),
        (break_image, "an image", NAMES, rf"scored step \d+ of \d+: {BAD_IMAGE}"),
        (
            break_differentiated,
            "a differentiated reward",
            ["reward_instruct", "rg_lcd"],
            rf"(update \d: {BAD_REWARD}|{BAD_REWARD}, scored step 1 of 1; 1 of 64 images .*)",
        ),
    ],
    ids=["loss", "gradient", "image", "differentiated"],
)
def test_other_bad_numbers_stop_the_run_before_their_update(
    fault, what, names, line, trials, tmp_path
):
    for number in trials(f"numbers: NaN or inf in {what}", 2, 30):
        rng = np.random.default_rng([2, number])
        folder = tmp_path / str(number)
        stop_and_continue(str(rng.choice(names)), fault, line, rng, folder)
