"""benchmarks/rehearse.py: published sizes, counts by hand, planning, the report, and a tiny run."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tafs import experiment
from tafs.common import errors
from tafs.methods import registry
from tafs.models import lora

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import rehearse  # noqa: E402
import rehearse_models as models  # noqa: E402
import rehearse_report as report  # noqa: E402

PLAN = experiment.load({"scale": rehearse.SCALE}, ROOT / "config.yaml")
META, CPU = torch.device("meta"), torch.device("cpu")
TINY = models.SIZES["tiny"]


def test_full_models_have_the_published_sizes_and_precisions():
    size = models.SIZES["full"]
    full = {name: models.build(name, size, PLAN, META) for name in size.backbones}
    sizes = {name: rehearse.flops.describe(backbone) for name, backbone in full.items()}
    assert sizes["flux"].parameters == 11_901_408_320
    # File sizes are published: 7.75 GB in 16 bits, and 4.94 GB with the position embeddings.
    assert 2 * sizes["klein"].parameters == pytest.approx(7.75e9, rel=0.001)
    positions = sum(b.numel() for b in full["sd3"].transformer.buffers())
    assert 2 * (sizes["sd3"].parameters + positions) == pytest.approx(4.94e9, rel=0.001)
    for name, backbone in full.items():
        decoder = sum(p.numel() for p in backbone.pipeline.vae.parameters())
        assert decoder == (84_046_115 if name == "klein" else 83_819_683)
        # Frozen weights need no gradients: about one product in the backward pass.
        assert 2 < sizes[name].trained / sizes[name].forward < 2.2
        adapter = {id(p) for p in backbone.lora_parameters().values()}
        base = {p.dtype for p in backbone.transformer.parameters() if id(p) not in adapter}
        assert base == {torch.bfloat16}
        assert {p.dtype for p in backbone.lora_parameters().values()} == {torch.float32}
        assert {p.dtype for p in backbone.pipeline.vae.parameters()} == {torch.float32}
    flux, sd3, klein = (full[name].embed([""]) for name in ("flux", "sd3", "klein"))
    assert (flux.embeds.shape, flux.pooled.shape) == ((1, 512, 4096), (1, 768))
    assert (sd3.embeds.shape, sd3.pooled.shape) == ((1, 333, 4096), (1, 2048))
    assert (klein.embeds.shape, klein.pooled.shape) == ((1, 512, 7680), (1, 0))


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("clip", 427_616_513),
        ("pickscore", 986_109_441),
        ("hpsv2", 986_109_441),
        ("geneval", pytest.approx(69e6, rel=0.01)),  # as printed in Mask2Former's Table 2
    ],
)
def test_full_reward_models_have_the_published_sizes(name, parameters):
    [reward] = models.reward_models([name], models.SIZES["full"], META).rewards
    assert reward.name == name
    scorer = reward.scorer.detector if name == "geneval" else reward.scorer
    assert sum(p.numel() for p in scorer.model.parameters()) == parameters


def test_full_text_encoders_have_the_published_sizes():
    found = {}
    for name, encoders in models.SIZES["full"].encoders.items():
        with META:
            built = [encoder.kind(encoder.config) for encoder in encoders]
        found[name] = {
            encoder.name: (sum(p.numel() for p in model.parameters()), encoder.tokens)
            for encoder, model in zip(encoders, built, strict=True)
        }
    t5 = 4_762_310_656
    assert found["flux"] == {"CLIP-L": (123_060_480, 77), "T5-XXL": (t5, 512)}
    assert found["sd3"] == {
        "CLIP-L": (123_060_480 + 768**2, 77),  # with its projection
        "CLIP-G": (694_659_840, 77),
        "T5-XXL": (t5, 256),
    }
    assert found["klein"] == {"Qwen3-4B": (4_022_468_096, 512)}


@pytest.mark.parametrize("name", ["flux", "sd3", "klein"])
def test_a_network_with_weights_computes_the_counted_flops(name):
    counted = rehearse.flops.describe(models.build(name, TINY, PLAN, META))
    backbone = models.build(name, TINY, PLAN, CPU)
    cond = backbone.encode(["a", "b"])
    x, t = torch.randn(2, *backbone.latent_shape), torch.full((2,), 0.5)
    counting = FlopCounterMode(display=False, custom_mapping=lora.FLOPS)
    with sdpa_kernel(SDPBackend.MATH), counting as counter:
        velocity = backbone.velocity(x, t, cond)
        assert counter.get_total_flops() == 2 * counted.forward
        velocity.sum().backward()
    assert counter.get_total_flops() == 2 * counted.trained
    before = backbone.lora_parameters()
    backbone.add_lora(4, 8, torch.Generator())  # one adapter serves all methods
    assert all(p is before[key] for key, p in backbone.lora_parameters().items())


def test_every_method_gets_the_micro_batches_that_fit():
    seconds = {"a": 1.0, "b": 2.0}
    assert [rehearse.affordable(seconds, available, 5) for available in (10, 100)] == [3, 5]
    with pytest.raises(ValueError, match="^--time-limit: .* about 3 s and 2.4 s are left"):
        rehearse.affordable(seconds, 2.4, 5)


def test_seconds_follow_from_single_calls():
    calls = rehearse.Calls(forward=1.0, trained=6.0, reward=0.5)
    expected = {
        "tafs_grpo": (13 + 2) * 2 + 3 * 0.5,  # 4 + 3 x 3 evaluations, and 2 for the KL
        "flow_grpo": (28 + 2) * 2 + 0.5,
        "rg_lcd": (16 + 2) * 2 + 16 * 0.5,
    }
    found = {name: rehearse.predict(registry.create(name, {}), calls) for name in expected}
    assert found == expected


def test_the_reference_runs_first_on_groups_of_one_micro_batch():
    runs = rehearse.runs_of(PLAN, ["flow_grpo", "tafs_grpo"])
    assert [run.variant for run in runs] == ["tafs_grpo", "flow_grpo"]
    found = rehearse.one_iteration(runs[1], micro_batch=12, images=36, keep_graphs=True)
    assert found.training.keep_graphs
    assert found.training.prompts_per_iteration * found.training.group_size == 36
    assert found.training.micro_batch == found.training.group_size == 12
    assert found.hyperparameters["updates"] == 1
    assert found.rewards == PLAN.config.tasks["preference"].rewards


@pytest.mark.parametrize("keep_graphs", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_evaluations_are_counted_once_in_sampling_and_once_in_the_update(compiled, keep_graphs):
    backbone = models.build("sd3", TINY, PLAN, CPU)
    backbone.compiled = compiled  # trained steps are then sampled with gradients
    task = PLAN.config.tasks[rehearse.TASK]
    rewards = models.reward_models(list(task.rewards), TINY, CPU)
    [run] = rehearse.runs_of(PLAN, ["tafs_grpo"])
    spec = rehearse.one_iteration(run, micro_batch=2, images=2, keep_graphs=keep_graphs)
    found = rehearse.rehearse(spec, backbone, rewards, [rehearse.Prompt("a", {})])
    assert (found.nfe_old, found.nfe_theta, found.others) == (4, 3, 0)
    assert found.deviation == 0  # the update rounds as sampling did


def row(variant: str, title: str, **values: Any) -> Any:
    shared = {"images": 24, "others": 0.0, "reward": 0.1, "kl": 0.5, "peak": 61.25}
    shared["deviation"] = 2e-3
    return report.Row(variant=variant, title=title, **shared | values)


TAFS = row("tafs_grpo", "TAFS-GRPO", nfe_old=4.0, nfe_theta=3.0, sample=0.2, update=0.5)
FLOW = row("flow_grpo", "Flow-GRPO", nfe_old=10.0, nfe_theta=6.0, sample=0.5, update=1.0)
SETTING = report.Setting(
    command="python benchmarks/rehearse.py",
    title="FLUX.1-dev",
    size="full",
    facts=("a GPU",),
    # 25e12 FLOPs per evaluation; with the gradients of frozen weights, twice as many.
    network=report.Network(parameters=10**9, adapter=2**20, forward=25e12, trained=50e12),
    peak=1000e12,
    share=144,
    iteration="24 prompts x 48 images on 8 GPUs",
    ahead=16,
    reference="tafs_grpo",
    published=rehearse.published_times(),
)


def table_of(text: str) -> list[dict[str, str]]:
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_the_rows_hold_the_derived_figures():
    first, second = table_of(report.render(SETTING, [TAFS, FLOW]))
    assert list(first.values()) == [
        *("TAFS-GRPO", "24", "4", "3", "0.2", "0.1", "0.5"),
        "50.0 %",  # 4 x 25 TFLOP in 0.2 s, of 1000 TFLOP/s
        "45.0 %",  # 3 x 3 x 25 TFLOP in 0.5 s
        "30.0 %",  # 2 x 3 x 25 TFLOP
        *("61.25", "115.2", "116", "1", "1", "0.002"),
    ]
    assert (second["s/iteration"], second["published s"]) == ("230.4", "248")
    assert (second["ratio"], second["published ratio"]) == ("2", "2.138")
    # Evaluations without gradients count once.
    other = row("rg_lcd", "RG-LCD", nfe_old=12, nfe_theta=1, others=1.0, sample=1, update=0.25)
    text = report.render(SETTING, [other], {"tafs_grpo": "out of GPU memory"}, ["flow_grpo"])
    [found] = table_of(text)
    assert (found["MFU update"], found["computed"]) == ("40.0 %", "30.0 %")
    assert found["ratio"] == found["published ratio"] == "-"
    assert "\nFailed:\n\n- tafs_grpo: out of GPU memory\n" in text
    assert "\nNot run: flow_grpo.\n" in text


def test_the_peak_follows_from_the_gpus_name():
    names = {"H100 80GB HBM3": 989e12, "H100 PCIe": None, "H100 80GB HBM3 MIG 3g.40gb": None}
    assert {name: rehearse.peak_of(f"NVIDIA {name}", None) for name in names} == names
    assert rehearse.peak_of("CPU", 5.0) == 5e12


OPTIONS = ("--size", "tiny", "--device", "cpu", "--micro-batch", "2", "--images", "4")


@pytest.mark.parametrize("backbone", ["flux", "sd3"])
def test_a_tiny_run_reports_its_measurements(backbone, tmp_path, capsys):
    out = tmp_path / "new" / "report.md"
    options = [*OPTIONS, "--backbone", backbone, "--methods", "reward_instruct", "tafs_grpo"]
    options += ["--peak-tflops", "0.01", "--out", str(out)]
    options += ["--checkpointing"] if backbone == "sd3" else []
    rehearse.main(options)
    printed = capsys.readouterr().out
    assert out.read_text() == printed
    assert f"`python benchmarks/rehearse.py {' '.join(options)}`" in printed
    assert f"- gradient checkpointing: {backbone == 'sd3'}; compiled: False" in printed
    [flops] = re.findall(r"; (\S+) TFLOP per evaluation", printed)
    rows = table_of(printed)
    assert [r["method"] for r in rows] == ["TAFS-GRPO", "Reward-Instruct"]
    assert [(r["NFE_old"], r["NFE_theta"]) for r in rows] == [("4", "3"), ("2.5", "2.5")]
    for found in rows:
        phases = {p: float(found[f"{p} s/image"]) for p in ("sample", "reward", "update")}
        assert float(found["s/iteration"]) == pytest.approx(144 * sum(phases.values()), rel=2e-3)
        computed = float(flops) * float(found["NFE_old"]) / (phases["sample"] * 0.01)
        shown = float(found["MFU sample"].removesuffix(" %"))
        assert shown == pytest.approx(100 * computed, rel=2e-3, abs=0.06)
        assert found["images"] == "4" and found["peak GiB"] == "-"


def test_composition_of_another_size_is_rehearsed_with_flux2_klein(capsys):
    options = ("--backbone", "klein", "--task", "composition", "--resolution", "24")
    rehearse.main([*OPTIONS[:-1], "2", *options, "--methods", "tafs_grpo"])
    text = capsys.readouterr().out
    [found] = table_of(text)
    assert (found["NFE_old"], found["NFE_theta"], found["published s"]) == ("4", "3", "-")
    assert found["max abs(ratio - 1)"] == "0"
    assert re.search(r"- text encoding, seconds per prompt: [\d.e-]+ \(Qwen3-4B, bfloat16\)", text)
    assert "- rewards: geneval, pickscore, clip, hpsv2\n" in text
    assert "- 24 x 24 pixels, 8 tokens per prompt, guidance 4," in text
    assert "(scale one-gpu: 8 prompts x 12 images on 1 GPUs)" in text


def test_by_default_the_methods_are_those_that_can_learn_from_the_rewards():
    assert [run.variant for run in rehearse.runs_of(PLAN, None, "composition")] == [
        *("tafs_grpo", "dance_grpo", "mix_grpo", "flow_grpo"),
    ]


def test_text_encoders_that_do_not_fit_are_not_timed(monkeypatch):
    def failing(*_: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(rehearse, "seconds_of", failing)
    assert rehearse.encoding_seconds(TINY.encoders["sd3"], CPU) is None


def test_a_method_out_of_memory_does_not_stop_the_others(monkeypatch, capsys):
    measure = rehearse.rehearse

    def failing(run: Any, *rest: Any) -> Any:
        if run.variant == "flow_grpo":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(run, *rest)

    monkeypatch.setattr(rehearse, "rehearse", failing)
    rehearse.main([*OPTIONS, "--methods", "flow_grpo", "tafs_grpo"])
    text = capsys.readouterr().out
    assert [r["method"] for r in table_of(text)] == ["TAFS-GRPO"]
    assert "- flow_grpo: out of GPU memory; give a smaller --micro-batch" in text
    with pytest.raises(SystemExit) as ended:
        rehearse.main([*OPTIONS, "--methods", "flow_grpo"])
    assert ended.value.code == 1
    assert "no method could be measured; flow_grpo: out of GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given, message",
    [
        (("--micro-batch", "150"), "--micro-batch: 150 does not divide the 4 images"),
        (("--images", "5"), "--micro-batch: 2 does not divide the 5 images"),
        (("--methods", "ppo"), "--methods: unknown 'ppo' (available: dance_grpo, "),
        (("--resolution", "17"), "resolution: 17 is not a multiple of 4"),
        (
            ("--task", "composition", "--methods", "rg_lcd"),
            "--methods: rg_lcd needs the rewards' gradients, and geneval has none; leave it out",
        ),
        (("--time-limit", "0.001"), "--time-limit: one micro-batch of each method takes about "),
    ],
)
def test_a_wrong_option_is_named(given, message, capsys):
    with pytest.raises(SystemExit) as ended:
        rehearse.main([*OPTIONS, *given])
    assert ended.value.code == errors.BAD_INPUT
    assert message in capsys.readouterr().err.splitlines()[-1]
