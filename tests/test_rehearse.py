"""The rehearsal of the paper's iterations: sizes, counts and plans by hand, and a tiny run."""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tafs.data.prompts import Prompt
from tafs.experiment import validate
from tafs.methods import registry

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "rehearse.py"
META = torch.device("meta")


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rehearse", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["rehearse"] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


rehearse = load()
PAPER = validate.read(ROOT / "config.yaml", {"scale": rehearse.SCALE})


# -- what is built ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full() -> dict[str, Any]:
    """The full-size backbones, without storage."""
    size = rehearse.SIZES["full"]
    return {name: rehearse.build(name, size, PAPER.active, META) for name in size.backbones}


@pytest.fixture(scope="module")
def networks(full) -> dict[str, Any]:
    return {name: rehearse.describe(backbone) for name, backbone in full.items()}


def test_the_full_networks_have_the_published_numbers_of_parameters(full, networks):
    assert networks["flux"].parameters == 11_901_408_320
    # Of SD3.5-M the file's size is published, 4.94 GB in 16 bits, its positions included.
    positions = sum(b.numel() for b in full["sd3"].transformer.buffers())
    assert networks["sd3"].parameters == pytest.approx(2.24e9, rel=0.01)
    assert 2 * (networks["sd3"].parameters + positions) == pytest.approx(4.94e9, rel=0.001)


def test_the_full_models_are_in_bfloat16_but_for_decoder_and_adapter(full):
    for backbone in full.values():
        adapter = {id(p) for p in backbone.lora_parameters().values()}
        base = {p.dtype for p in backbone.transformer.parameters() if id(p) not in adapter}
        assert base == {torch.bfloat16}
        assert {p.dtype for p in backbone.lora_parameters().values()} == {torch.float32}
        assert {p.dtype for p in backbone.pipeline.vae.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_the_full_autoencoders_have_the_published_number_of_parameters(full, name):
    vae = full[name].pipeline.vae
    assert sum(p.numel() for p in vae.parameters()) == 83_819_683


@pytest.mark.parametrize("name, parameters", [("clip", 427_616_513), ("pickscore", 986_109_441)])
def test_the_full_reward_models_have_the_published_numbers_of_parameters(name, parameters):
    [reward] = rehearse.reward_models([name], rehearse.SIZES["full"], META).rewards
    assert reward.name == name
    assert sum(p.numel() for p in reward.score.model.parameters()) == parameters


def test_the_embeddings_have_the_published_shapes(full):
    flux, sd3 = (full[name].embed([""]) for name in ("flux", "sd3"))
    assert (flux.embeds.shape, flux.pooled.shape) == ((1, 512, 4096), (1, 768))
    assert (sd3.embeds.shape, sd3.pooled.shape) == ((1, 333, 4096), (1, 2048))


def test_fluxs_evaluation_has_the_flops_of_its_products(networks):
    d, image, text, r = 3072, 32 * 32, 512, PAPER.active.lora.rank
    tokens = image + text
    attention = 2 * 2 * tokens**2 * d
    # Per token: queries, keys, values, output, and a feed-forward layer four times as wide; each
    # stream's modulation is computed once.
    double = 2 * tokens * 12 * d**2 + 2 * 2 * 6 * d**2 + attention
    single = 2 * tokens * 12 * d**2 + 2 * 3 * d**2 + attention
    adapter = 2 * tokens * 2 * d * r * (19 * 4 + 38 * 3)
    ends = 2 * image * 64 * d * 2 + 2 * text * 4096 * d
    conditions = 2 * (2 * (256 + d) + 768 + d + 2 * d) * d
    assert networks["flux"].forward == 19 * double + 38 * single + adapter + ends + conditions


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_frozen_weights_need_no_gradients(networks, name):
    """Backward takes two products for one in attention and adapter alone, else one for one."""
    assert 2 < networks[name].trained / networks[name].forward < 2.2


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_a_network_with_weights_computes_what_is_counted_without(name):
    tiny = rehearse.SIZES["tiny"]
    counted = rehearse.describe(rehearse.build(name, tiny, PAPER.active, META))
    backbone = rehearse.build(name, tiny, PAPER.active, torch.device("cpu"))
    cond = backbone.encode(["a", "b"])
    x, t = torch.randn(2, *backbone.latent_shape), torch.full((2,), 0.5)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        velocity = backbone.velocity(x, t, cond)
        assert counter.get_total_flops() == 2 * counted.forward
        velocity.sum().backward()
    assert counter.get_total_flops() == 2 * counted.trained


def test_one_adapter_serves_all_methods():
    backbone = rehearse.build("flux", rehearse.SIZES["tiny"], PAPER.active, torch.device("cpu"))
    before = backbone.lora_parameters()
    backbone.add_lora(4, 8, torch.Generator())
    assert all(p is before[name] for name, p in backbone.lora_parameters().items())


def test_the_reward_models_score_images_with_gradients():
    size = rehearse.SIZES["tiny"]
    rewards = rehearse.reward_models(["pickscore", "clip"], size, torch.device("cpu"))
    images = torch.rand(2, 3, size.resolution, size.resolution, requires_grad=True)
    scores = rewards.differentiate(images, [Prompt("a", {}), Prompt("b", {})])
    assert {name: len(values) for name, values in scores.items()} == {"pickscore": 2, "clip": 2}
    sum(values.sum() for values in scores.values()).backward()
    assert images.grad.abs().sum() > 0


# -- planning --------------------------------------------------------------------------------------


def test_what_has_the_fewest_micro_batches_gets_the_next():
    # One of each takes 3 of 10 s; then a, b, a, b and a, until nothing is left.
    assert rehearse.plan({"b": 2.0, "a": 1.0}, 10.0, 5) == {"b": 3, "a": 4}


def test_a_costly_method_stands_back_where_it_no_longer_fits():
    assert rehearse.plan({"a": 1.0, "b": 5.0}, 9.0, 12) == {"a": 4, "b": 1}


def test_no_method_gets_more_than_it_may_have():
    assert rehearse.plan({"a": 1.0, "b": 2.0}, 100.0, 2) == {"a": 2, "b": 2}


def test_a_time_limit_under_one_micro_batch_each_is_refused():
    with pytest.raises(ValueError, match=r"^--time-limit: .* about 3 s and 2 s are left"):
        rehearse.plan({"a": 1.0, "b": 2.0}, 2.4, 5)


@pytest.mark.parametrize(
    "name, seconds",
    [
        ("tafs_grpo", (13 + 2) * 2 + 3 * 0.5),  # 4 + 3 x 3 evaluations, the divergence's 2
        ("flow_grpo", (28 + 2) * 2 + 0.5),
        ("rg_lcd", (16 + 2) * 2 + 16 * 0.5),
    ],
)
def test_seconds_follow_from_single_calls(name, seconds):
    calls = rehearse.Calls(forward=1.0, trained=6.0, reward=0.5)
    assert rehearse.predict(registry.create(name, {}), calls) == seconds


def test_an_iteration_has_the_planned_images_in_whole_micro_batches():
    [run] = rehearse.runs_of(PAPER, ["flow_grpo"])
    found = rehearse.settings_of(run, micro_batch=12, images=36)
    settings = found["settings"]
    assert settings["prompts_per_iteration"] * settings["group_size"] == 36
    assert settings["micro_batch"] == settings["group_size"] == 12
    assert found["hyperparameters"] == {"eta": 0.9, "updates": 1}
    assert found["rewards"] == {"pickscore": 1.0, "clip": 2.0}


def test_a_gpus_share_of_the_papers_iteration():
    assert rehearse.share_of(PAPER.active) == 144


# -- the report ------------------------------------------------------------------------------------


def row(variant: str, title: str, **values: Any) -> Any:
    shared = {"images": 24, "others": 0.0, "reward": 0.1, "watch": 0.5, "peak": 61.25}
    return rehearse.Row(variant=variant, title=title, **shared | values)


TAFS = row("tafs_grpo", "TAFS-GRPO", nfe_old=4.0, nfe_theta=3.0, sample=0.2, update=0.5)
FLOW = row("flow_grpo", "Flow-GRPO", nfe_old=10.0, nfe_theta=6.0, sample=0.5, update=1.0)
# An evaluation of 25e12 FLOPs; forward and backward with frozen weights takes two of them.
NETWORK = rehearse.Network(parameters=10**9, adapter=2**20, forward=25e12, trained=50e12)


def setting(**values: Any) -> Any:
    shared = {
        "command": "python benchmarks/rehearse.py",
        "title": "FLUX.1-dev",
        "size": "full",
        "facts": ("a GPU",),
        "network": NETWORK,
        "peak": 1000e12,
        "share": 144,
        "iteration": "24 prompts x 48 images on 8 GPUs",
        "reference": "tafs_grpo",
        "published": rehearse.published_times(),
        "targeted": True,
    }
    return rehearse.Setting(**shared | values)


def table_of(report: str) -> list[dict[str, str]]:
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in report.splitlines()
        if line.startswith("|")
    ]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_the_rows_hold_what_their_numbers_say():
    first, second = table_of(rehearse.render(setting(), [TAFS, FLOW]))
    assert first == {
        "method": "TAFS-GRPO",
        "images": "24",
        "NFE_old": "4",
        "NFE_theta": "3",
        "sample s/image": "0.2",
        "reward s/image": "0.1",
        "update s/image": "0.5",
        "MFU sample": "50.0 %",  # 4 x 25 TFLOP in 0.2 s, of 1000 TFLOP/s
        "MFU update": "45.0 %",  # 3 x 3 x 25 TFLOP in 0.5 s
        "computed": "30.0 %",  # 2 x 3 x 25 TFLOP
        "peak GiB": "61.25",
        "s/iteration": "115.2",
        "published s": "116",
        "ratio": "1",
        "published ratio": "1",
    }
    assert (second["s/iteration"], second["published s"]) == ("230.4", "248")
    assert (second["ratio"], second["published ratio"]) == ("2", "2.138")


def test_evaluations_without_gradients_count_once_in_the_update():
    other = row("rg_lcd", "RG-LCD", nfe_old=12, nfe_theta=1, others=1.0, sample=1, update=0.25)
    [found] = table_of(rehearse.render(setting(), [other]))
    assert (found["MFU update"], found["computed"]) == ("40.0 %", "30.0 %")
    assert found["ratio"] == found["published ratio"] == "-"  # without TAFS-GRPO beside it


def test_the_targets_are_judged():
    lines = rehearse.render(setting(), [TAFS, FLOW]).splitlines()
    start = lines.index("Targets (tafs_grpo):") + 2
    assert lines[start : start + 4] == [
        "- MFU in sampling: 50.0 % (at least 45 %: met)",
        "- MFU in the update: 45.0 % (at least 40 %: met)",
        "- s/iteration: 115.2 (at most 116: met)",
        "- ratio to flow_grpo: 0.5 (at most 0.47: not met)",
    ]


def test_what_was_not_measured_is_no_target_met():
    report = rehearse.render(setting(peak=None), [TAFS], ["flow_grpo"])
    assert "- MFU in sampling: - (at least 45 %: -)" in report
    assert "- ratio to flow_grpo: - (at most 0.47: -)" in report
    assert "\nNot run: flow_grpo.\n" in report


def test_other_models_have_no_published_times_and_no_targets():
    report = rehearse.render(setting(published={}, targeted=False), [TAFS])
    assert table_of(report)[0]["published s"] == "-"
    assert "Targets" not in report


def test_the_published_times_are_the_papers():
    assert rehearse.published_times() == {
        "TAFS-GRPO": 116,
        "Flow-GRPO": 248,
        "MixGRPO": 334,
        "DanceGRPO": 646,
        "RG-LCD": 466,
        "Reward-Instruct": 206,
    }


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("CPU", None),
    ],
)
def test_the_peak_follows_from_the_gpus_name(name, peak):
    assert rehearse.peak_of(name, None) == peak
    assert rehearse.peak_of(name, 5.0) == 5e12


# -- the command -----------------------------------------------------------------------------------

PEAK = 0.01  # TFLOP/s, so that a processor's utilisation has digits


@pytest.mark.parametrize(
    "backbone, evaluations",
    [
        ("flux", {"flow_grpo": ("10", "6"), "tafs_grpo": ("4", "3")}),
        ("sd3", {"tafs_grpo": ("4", "3"), "reward_instruct": ("2.5", "2.5")}),
    ],
)
def test_a_tiny_run_reports_what_its_numbers_say(backbone, evaluations, tmp_path):
    out = tmp_path / "new" / "report.md"
    options = [
        *("--size", "tiny", "--device", "cpu", "--backbone", backbone),
        *("--methods", *evaluations, "--micro-batch", "2", "--images", "4"),
        *("--peak-tflops", str(PEAK), "--time-limit", "600", "--out", str(out)),
    ]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert out.read_text() == done.stdout
    assert f"`python benchmarks/rehearse.py {' '.join(options)}`" in done.stdout
    assert "Not run" not in done.stdout
    rows = table_of(done.stdout)
    titles = {v: registry.method_class(v).TITLE for v in evaluations}
    assert [r["method"] for r in rows] == list(titles.values())
    [flops] = re.findall(r"; (\S+) TFLOP an evaluation", done.stdout)
    by_title = {r["method"]: r for r in rows}
    iteration = {title: float(r["s/iteration"]) for title, r in by_title.items()}
    for variant, title in titles.items():
        found = by_title[title]
        assert found["images"] == "4"
        assert (found["NFE_old"], found["NFE_theta"]) == evaluations[variant]
        phases = {p: float(found[f"{p} s/image"]) for p in ("sample", "reward", "update")}
        assert iteration[title] == pytest.approx(144 * sum(phases.values()), rel=2e-3)
        ratio = iteration[title] / iteration["TAFS-GRPO"]
        assert float(found["ratio"]) == pytest.approx(ratio, rel=2e-3)
        computed = float(flops) * float(found["NFE_old"]) / (phases["sample"] * PEAK)
        shown = float(found["MFU sample"].removesuffix(" %"))
        assert shown == pytest.approx(100 * computed, rel=2e-3, abs=0.06)
        assert found["peak GiB"] == "-"
        published = {"TAFS-GRPO": "116", "Flow-GRPO": "248"} if backbone == "flux" else {}
        assert found["published s"] == published.get(title, "-")


TINY = ("--size", "tiny", "--device", "cpu", "--micro-batch", "2")


@pytest.mark.parametrize(
    "given, message",
    [
        (("--backbone", "sdxl"), "argument --backbone: invalid choice: 'sdxl'"),
        (("--micro-batch", "0"), "argument --micro-batch: '0' is no whole number above 0"),
        (("--time-limit", "soon"), "argument --time-limit: 'soon' is no number above 0"),
        (("--peak-tflops", "nan"), "argument --peak-tflops: 'nan' is no number above 0"),
        (("--methods", "ppo"), "--methods: unknown 'ppo' (available: dance_grpo, "),
        (("--methods", "base"), "--methods: unknown 'base' (available: dance_grpo, "),
        (("--images", "5"), "--images: 5 is no multiple of the micro-batch's 2"),
        (("--micro-batch", "150"), "--micro-batch: 150 is above the 144 images of a GPU"),
        (("--device", "gpu"), "--device: 'gpu' is no device; give cpu or cuda"),
        (("--device", "meta"), "--device: 'meta' cannot be used; give cpu or cuda"),
        (("--device", "cuda:99"), "--device: 'cuda:99' is not there, this machine shows "),
        (("--attention", "slow"), "--attention: unknown 'slow' (available: flash, "),
        (("--time-limit", "0.001"), "--time-limit: one micro-batch of each method takes about "),
    ],
)
def test_a_wrong_option_is_one_line(given, message, capsys):
    with pytest.raises(SystemExit) as ended:
        rehearse.main([*TINY, *given])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    problems = [line for line in printed.err.splitlines() if message in line]
    assert len(problems) == 1 and printed.err.endswith(problems[0] + "\n")
    assert "Traceback" not in printed.err and printed.out == ""


@pytest.mark.parametrize(
    "micro_batch, no_checkpointing, remedy",
    [
        (12, False, "give fewer images than 12 to --micro-batch"),
        (12, True, "leave out --no-checkpointing"),
        (1, False, "run it on a GPU with more memory"),
    ],
)
def test_memory_that_does_not_suffice_names_the_option(
    micro_batch, no_checkpointing, remedy, monkeypatch
):
    gpu = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    options = argparse.Namespace(micro_batch=micro_batch, no_checkpointing=no_checkpointing)
    message = f"^tafs_grpo: the GPU's 80 GiB do not suffice; {remedy}$"
    within = rehearse.within_memory(options, torch.device("cuda"), "tafs_grpo")
    with pytest.raises(ValueError, match=message), within:
        raise torch.OutOfMemoryError("CUDA out of memory")
