"""Every method trains an adapter of each embedded base model, with a reward of its images.

Some also with tiny random checkpoints of published rewards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import tiny_hub

from tafs import experiment
from tafs.assets.sources import ShapesAssets
from tafs.experiment.specs import RunSpec
from tafs.methods import registry
from tafs.models import base as models
from tafs.rewards import metrics
from tafs.training.trainer import trainer_of

ROOT = Path(__file__).resolve().parents[2]
UPDATES = 2  # of one iteration; the second one learns from images of the adapter before the first

# Fewer steps than by default, so that all trainings together take half a minute.
THREE = {"steps": 3, "trained": 2}
FEW: dict[str, dict[str, Any]] = {
    "awm": {"steps": 3, "copies": 2},
    "branch_grpo": {**THREE, "splits": 1, "interval": 1},
    "dance_grpo": {"steps": 3},
    "diffusion_nft": {"steps": 3, "copies": 2},
    "draft_k": {"steps": 3},
    "flow_grpo": THREE,
    "g2rpo": THREE,
    "grpo_guard": THREE,
    "mix_grpo": {"steps": 3, "window": 2},
    "online_dpo": {"steps": 3, "copies": 2},
    "pref_grpo": THREE,
    "refl": {"steps": 3, "late": 2},
    "rg_lcd": {"teacher_steps": 3},
    "stepwise_flow_grpo": THREE,
    "tafs_grpo": {"steps": 3},
    "tempflow_grpo": THREE,
}


@pytest.fixture(scope="module")
def base() -> RunSpec:
    """A smoke-scale run with the fewest images: one group of two for each optimiser step."""
    runs = experiment.load({"scale": "smoke"}, ROOT / "config.yaml").runs
    spec = runs["flow_grpo.preference.shapes-flux.0"]
    assert spec.training is not None
    fewest = {"iterations": 1, "prompts_per_iteration": UPDATES, "group_size": 2}
    training = spec.training.model_copy(update=fewest)
    return spec.model_copy(update={"training": training, "rewards": {"clip": 1.0}})


@pytest.mark.parametrize("backbone", ["shapes-sd3", "shapes-flux"])
@pytest.mark.parametrize("method", registry.names())
def test_a_method_trains_the_whole_adapter_of_an_embedded_model(
    method: str, backbone: str, base: RunSpec, tmp_path: Path
) -> None:
    hyperparameters = {"learning_rate": 1e-3, "updates": UPDATES, **FEW.get(method, {})}
    changed = {"method": method, "backbone": backbone, "hyperparameters": hyperparameters}
    trainer = trainer_of(base.model_copy(update=changed))
    record = trainer.iterate(0)
    assert record["invalid"] == 0 and record["grad_norm"] > 0
    steps = {state["step"].item() for state in trainer.optimizer.state.values()}
    assert trainer.updates == UPDATES and steps == {UPDATES}
    trainer.export(tmp_path / "adapter.safetensors")
    adapter = load_file(tmp_path / "adapter.safetensors")
    assert len(adapter) == len(trainer.parameters) == len(trainer.optimizer.state)
    assert all(tensor.isfinite().all() for tensor in adapter.values())
    # B is 0 before training. The last block of SD3 returns no text, so its text asks nothing.
    last = "transformer.transformer_blocks.4.attn.add_q_proj.lora_B.weight"
    untrained = {name for name, tensor in adapter.items() if "lora_B" in name and not tensor.any()}
    assert untrained == ({last} if backbone == "shapes-sd3" else set())


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedded models are trained with tiny random checkpoints of the published rewards."""
    folder = tiny_hub.folders(tmp_path)
    monkeypatch.setattr(
        ShapesAssets, "_reward", lambda _, name, strict: metrics.plugin(name).build("cpu", folder)
    )


def adapter(spec: RunSpec) -> dict[str, torch.Tensor]:
    """The adapter after an iteration, whose rewards have been finite."""
    trainer = trainer_of(spec)
    record = trainer.iterate(0)
    assert record["invalid"] == 0 and record["grad_norm"] > 0
    return {name: p.detach().clone() for name, p in trainer.parameters.items()}


@pytest.mark.parametrize("method", ["draft_k", "refl", "reward_instruct", "tafs_grpo"])
def test_a_method_trains_with_rewards_in_bfloat16(
    method: str, base: RunSpec, published: None
) -> None:
    spec = base.model_copy(update={"method": method, "hyperparameters": FEW.get(method, {})})
    half = spec.assets.model_copy(update={"rewards_dtype": "bfloat16"})
    trainer = trainer_of(spec.model_copy(update={"assets": half}))
    weights = [p for network in trainer.rewards.networks for p in network.parameters()]
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    record, whole = trainer.iterate(0), trainer_of(spec).iterate(0)
    assert record["invalid"] == 0
    # tests/rewards/test_bfloat16.py derives the largest errors: of a cosine, here times 100, 0.017.
    assert record["rewards"]["clip"] == pytest.approx(whole["rewards"]["clip"], abs=1.7)
    assert record["rewards"] != whole["rewards"]
    # Advantages are of the size of these errors where a group's scores are about equal.
    if trainer.method.needs_reward_gradients:
        assert record["grad_norm"] == pytest.approx(whole["grad_norm"], rel=0.083)


def test_adapters_do_not_depend_on_where_networks_and_rewards_wait(
    base: RunSpec, published: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = base.model_copy(update={"method": "reward_instruct", "hyperparameters": {}})
    expected = adapter(spec)
    moved: list[int] = []
    to = torch.nn.Module.to

    def counted(module: torch.nn.Module, *given: Any, **named: Any) -> torch.nn.Module:
        moved.append(id(module))
        return to(module, *given, **named)

    monkeypatch.setattr(models, "_fit", lambda *_: False)
    trainer = trainer_of(spec)
    [clip] = trainer.backbone.waiting
    assert clip is trainer.rewards.rewards[0].scorer.model  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.nn.Module, "to", counted)
    trainer.iterate(0)
    assert moved.count(id(clip)) == 2
    for name, parameter in trainer.parameters.items():
        assert torch.equal(parameter, expected[name]), name
