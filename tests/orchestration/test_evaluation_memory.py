"""The memory of evaluations on a GPU, computed by hand, and the batches that fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tafs.orchestration import graph as graphs
from tafs.orchestration.plan import evaluation_memory
from tafs.orchestration.plan.estimate import Workload
from tafs.orchestration.plan.evaluation_memory import WEIGHTS, EvaluationMemory
from tafs.orchestration.plan.report import record, report

ROOT = Path(__file__).resolve().parents[2]
FLUX, VAE = 11_901_408_320, 83_819_683  # parameters
# On GenEval: the detector and its CLIP, PickScore and CLIP, ImageReward and HPSv2.1 in float32.
METRICS = 0.3e9 + 1.7e9 + 3.91e9 + 1.7e9 + 1.81e9 + 4 * 986_109_441
PIXELS = 1024**2
# In float32 and in one of 16 bits, the input of the last block and three copies: 256 channels.
DECODER = (2 + 3 * 4) * 256 * PIXELS
# In a single block at 4,096 + 512 tokens: ten streams and, for the rotation, 14 bytes per value.
SAMPLING = (10 * 2 + 3 * 4 + 2) * (4096 + 512) * 3072


@pytest.fixture(scope="module")
def paper() -> Workload:
    return Workload(graphs.read({"scale": "paper"}, ROOT / "config.yaml"))


def of(work: Workload, name: str) -> EvaluationMemory:
    found = evaluation_memory.of_run(work, work.runs[name])
    assert found is not None
    return found


def test_a_trained_models_encoders_leave_the_gpu_before_it_samples(paper):
    found = of(paper, "base.geneval.flux-dev")
    assert (found.batch, found.most) == (4, 553 * 4)
    phases = {phase: sum(parts.values()) for phase, parts in found.phases(4).items()}
    prompts = 4 * (512 * 4096 * 2 + 2 * 16 * 128**2 * 4)
    weights = 2 * FLUX + 4 * VAE + METRICS + prompts
    encoders = 33.7e9 - 2 * (FLUX + VAE)
    assert phases["encoding"] == pytest.approx(weights + encoders)
    assert phases["sampling"] == pytest.approx(weights + 4 * SAMPLING)
    # One image at a time goes through the decoder; all of them are kept.
    assert phases["decoding"] == pytest.approx(weights + DECODER + 4 * 3 * 4 * PIXELS)
    assert found.largest() == ("encoding", pytest.approx(weights + encoders))


def test_an_adapter_is_added_but_neither_its_average_nor_its_optimiser(paper):
    untrained, trained = (
        of(paper, name).phases(1)["sampling"]
        for name in ("base.geneval.flux-dev", "tafs_grpo.composition.flux-dev.0")
    )
    added = sum(trained.values()) - sum(untrained.values())
    assert added == pytest.approx(4 * paper.network("flux-dev", 1024).adapter)


def test_a_compared_models_encoders_stay_and_its_decoder_has_16_bits(paper):
    found = of(paper, "base.geneval.flux-schnell")
    parts = found.phases(4)
    assert set(parts) == {"sampling", "decoding"}
    network = FLUX - (256 + 1 + 3072 + 1) * 3072  # without the embedding of guidance
    known = {"network": 2 * network, "autoencoder": 2 * VAE, "rewards": METRICS}
    known |= {"text encoders": 33.7e9 - 2 * (network + VAE), "decoder": DECODER}
    assert {k: parts["decoding"][k] for k in known} == pytest.approx(known)


def test_other_models_are_known_by_their_weights(paper):
    found = of(paper, "base.geneval.hidream-full")
    weights = 48.2e9 + 16.1e9 + METRICS
    assert found.largest() == (WEIGHTS, pytest.approx(weights))
    assert found.fitting(weights - 1e6) == 0
    assert found.fitting(weights + 1e6) is None
    smoke = Workload(graphs.read({"scale": "smoke"}, ROOT / "config.yaml"))
    assert evaluation_memory.lines(smoke) == []


@pytest.mark.parametrize("name", ["base.geneval.flux-schnell", "tafs_grpo.composition.flux-dev.0"])
def test_the_largest_batch_fits_and_the_next_one_does_not(paper, name):
    found = of(paper, name)
    batch = found.fitting(60e9)
    fits, not_fits = (
        max(sum(parts.values()) for parts in found.phases(n).values()) for n in (batch, batch + 1)
    )
    assert 1 < batch < found.most
    assert fits <= 60e9 < not_fits
    assert found.fitting(1e9) == 0
    assert found.fitting(1e15) == found.most


def test_other_models_wait_on_the_host_where_text_encoders_need_the_gpu(paper):
    found = of(paper, "base.geneval.flux-dev")
    encoding = found.phases(1)["encoding"]
    waiting = encoding["network"] + encoding["autoencoder"] + encoding["rewards"]
    available = sum(found.phases(1)["decoding"].values()) + 1e6
    assert sum(encoding.values()) > available > sum(encoding.values()) - waiting
    assert found.fitting(available) == 1
    assert found.largest(available, 1) == ("decoding", pytest.approx(available - 1e6))


def test_a_plan_has_the_most_demanding_evaluation_of_each_model(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = record({"scale": "one-gpu"}, gpu_memory=24)["evaluation_memory"]
    assert [need["model"] for need in found] == ["flux2-klein-base-4b", "sd35-medium"]
    assert all((need["prompts"], need["batch"]) == ("geneval", 8) for need in found)
    # The metrics wait in host memory while SD3.5's text encoders work.
    assert [need["fitting"] for need in found] == [1, 41]
    lines = report({"scale": "one-gpu"}).splitlines()
    head = lines.index(next(line for line in lines if line.startswith("memory of evaluations ")))
    assert lines[head + 1].split()[-1] == "1" and lines[head + 2].split()[-1] == "41"
    assert lines[head + 3] == "  fits: the largest batch in 24 GB, 5 % of which stay free."
    assert not any(
        line.startswith("memory of eval") for line in report({"scale": "smoke"}).splitlines()
    )
