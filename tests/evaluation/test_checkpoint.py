"""Any checkpoint is judged under a protocol, whose SHA-256 stands beside its numbers."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import cache as cached
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file
from support import packages, tiny_hub
from support.checkpoints import EMBEDDED, embedded

from tafs import cli, experiment
from tafs.assets import cache, sources
from tafs.assets.sources import AssetSource, HubAssets, ShapesAssets
from tafs.common import errors
from tafs.common.yaml_files import ConfigError
from tafs.evaluation import checkpoint, generate, protocol
from tafs.evaluation.choose import DEFAULT_SEEDS
from tafs.experiment.specs import EvalSetting
from tafs.models import adapters, catalog
from tafs.report import judged
from tafs.rewards.metrics import METRICS
from tafs.runtime.deadline import Deadline
from tafs.shapes import weights

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"prompts_per_tag": 2, "images_per_prompt": 1, "nfe": 2, "samplers": ["ode_uniform"]}
SMALL |= {"batch": 8, "metrics": {"clip": "shapes clip", "geneval": "shapes geneval"}}


def small(folder: Path, **changes: Any) -> str:
    """The path of a quick protocol."""
    content = YAML(typ="safe").load(protocol.FOLDER / "shapes.yaml") | SMALL | changes
    file = folder / "small.yaml"
    with file.open("w") as out:
        YAML(typ="safe").dump(content, out)
    return str(file)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


@cached
def trained(name: str) -> dict[str, torch.Tensor]:
    """A random adapter's matrices by layer; its factor alpha / rank is 1 / 2."""
    model = embedded(name).adapted(alpha=2)
    return {
        key.replace(".default.", "."): parameter.detach()
        for key, parameter in model.lora_parameters().items()
    }


def peft_folder(name: str, folder: Path, alpha: float = 2) -> Path:
    folder.mkdir()
    state = {f"base_model.model.{key}": tensor for key, tensor in trained(name).items()}
    save_file(state, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": alpha, "target_modules": ["to_q"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def kohya_file(name: str, folder: Path, alpha: float = 2) -> Path:
    folder.mkdir()
    state = {}
    for key, tensor in trained(name).items():
        layer, kind, _ = key.rsplit(".", 2)
        stem = "lora_unet_" + layer.replace(".", "_")
        state[f"{stem}.{'lora_down' if kind == 'lora_A' else 'lora_up'}.weight"] = tensor
        state[f"{stem}.alpha"] = torch.tensor(float(alpha))
    save_file(state, folder / "kohya.safetensors")
    return folder / "kohya.safetensors"


def diffusers_folder(name: str, folder: Path, alpha: float = 2) -> Path:
    folder.mkdir()
    header = {"transformer.r": 4, "transformer.lora_alpha": alpha}
    file = folder / adapters.DIFFUSERS_FILE
    state = {f"transformer.{key}": tensor for key, tensor in trained(name).items()}
    save_file(state, file, {adapters.HEADER: json.dumps(header)})
    return folder


def applied_directly(name: str, chosen: protocol.Protocol) -> pd.Series:
    """The scores of W + alpha / rank B A, written into the weights by hand."""
    content = chosen.content
    model = embedded(name).load(guidance=content.pipelines["FluxPipeline"].guidance)
    state = trained(name)
    for key in [key for key in state if key.endswith(".lora_A.weight")]:
        layer = model.transformer.get_submodule(key.removesuffix(".lora_A.weight"))
        layer.weight.data += 0.5 * state[key.replace("lora_A", "lora_B")] @ state[key]
    setting = EvalSetting(sampler="ode_uniform", nfe=content.nfe, images_per_prompt=1)
    texts = [prompt.text for prompt in chosen.prompts]
    images = generate.generate(model, texts, setting, content.batch, content.seed)
    rewards = chosen.source.rewards(["clip", "geneval"], strict_geneval=True)
    found = rewards.report(rewards.score(images, chosen.prompts))
    return pd.concat([pd.Series(values.double().numpy()) for values in found.values()])


def scores_of(out: Path, kind: str) -> pd.Series:
    table = pd.read_parquet(out / "scores.parquet")
    return table[table["run"].str.startswith(kind)].sort_values(["metric", "prompt"])["value"]


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_adapter_of_any_layout_has_the_scores_of_its_weights_applied_directly(
    name, tmp_path, capsys
):
    chosen = small(tmp_path)
    expected = applied_directly(name, protocol.read(chosen))
    writers = {"peft": peft_folder, "kohya": kohya_file, "diffusers": diffusers_folder}
    for layout, write in writers.items():
        path = write(name, tmp_path / layout)
        given = ("--adapter", path, "--model", name, "--protocol", chosen)
        more = ("--results", tmp_path, "--out", tmp_path / "out" / layout)
        code, printed, refused = run(capsys, "evaluate", *given, *more)
        assert (code, refused) == (0, "")
        assert printed.startswith("alpha: of the file's ")
        found = scores_of(tmp_path / "out" / layout, "adapter")
        np.testing.assert_allclose(found, expected, atol=1e-4)
    base = scores_of(tmp_path / "out" / "peft", "base")
    assert np.abs(base.to_numpy() - expected.to_numpy()).max() > 0.1
    doubled = kohya_file(name, tmp_path / "doubled", alpha=4)
    found = checkpoint.judge(name, protocol.read(chosen), tmp_path, doubled)
    wrong = pd.read_parquet(found.runs[-1].scores).sort_values(["metric", "prompt"])["value"]
    assert np.abs(wrong.to_numpy() - expected.to_numpy()).max() > 0.01
    runs = [folder.name for folder in (tmp_path / "evaluations" / "runs").iterdir()]
    assert sum(folder.startswith("base.") for folder in runs) == 1


@pytest.fixture(scope="module")
def judged_zero(tmp_path_factory) -> tuple[Path, Path, Path]:
    """(results, adapter, output) of an adapter that changes nothing, with choice of a sampler."""
    folder = tmp_path_factory.mktemp("zero")
    file = kohya_file("shapes-flux", folder / "zero")
    save_file({k: 0 * v if "lora_up" in k else v for k, v in load_file(file).items()}, file)
    chosen = small(folder, samplers=["ode", "anneal"], validation_prompts=2)
    judge = checkpoint.judge("shapes-flux", protocol.read(chosen), folder, file)
    judged.write(judge, folder / "out")
    return folder, file, folder / "out"


def test_an_adapter_of_zeros_differs_from_its_base_by_exactly_nothing(judged_zero):
    record = json.loads((judged_zero[2] / "evaluation.json").read_text())
    assert record["sampler"] == record["base_sampler"]
    for found in record["metrics"].values():
        assert [found["difference"][key] for key in ("value", "low", "high")] == [0, 0, 0]
        assert found["value"] == found["base"]["value"]
        assert found["low"] < found["value"] < found["high"]


def test_a_base_model_is_scored_once_and_a_second_call_scores_nothing(judged_zero, monkeypatch):
    folder, file, _ = judged_zero
    chosen = str(folder / "small.yaml")
    loaded = []
    backbone = AssetSource.backbone
    monkeypatch.setattr(
        AssetSource, "backbone", lambda *given: loaded.append(given) or backbone(*given)
    )
    first = checkpoint.judge("shapes-flux", protocol.read(chosen), folder, file)
    [alone] = checkpoint.judge("shapes-flux", protocol.read(chosen), folder).runs
    assert alone.folder == first.runs[0].folder
    assert not loaded
    written = first.runs[0].scores.stat().st_mtime_ns
    other = checkpoint.judge(
        "shapes-flux", protocol.read(chosen), folder, peft_folder("shapes-flux", folder / "peft")
    )
    assert len(loaded) == 1
    assert other.runs[0].scores.stat().st_mtime_ns == written


def test_two_processes_write_the_same_files_as_one(judged_zero, tmp_path, capsys):
    folder = judged_zero[0]
    file = kohya_file("shapes-flux", folder / "shared")
    chosen = protocol.read(str(folder / "small.yaml"))
    base, alone = checkpoint.judge("shapes-flux", chosen, folder, file).runs
    shutil.copytree(base.folder, tmp_path / base.folder.relative_to(folder))
    given = ("--model", "shapes-flux", "--protocol", folder / "small.yaml", "--adapter", file)
    code, printed, _ = run(
        capsys, "evaluate", *given, "--results", tmp_path, "--processes", 2, "--json"
    )
    assert code == 0 and json.loads(printed)["metrics"]["clip"]["difference"]["value"] != 0
    shared = tmp_path / alone.folder.relative_to(folder)
    for path in (alone.adapter, alone.scores, alone.samples, alone.samplers):
        assert (shared / path.name).read_bytes() == path.read_bytes()


def test_every_file_and_every_printed_number_has_the_protocols_sha256(judged_zero, capsys):
    folder, file, out = judged_zero
    sha256 = protocol.read(str(folder / "small.yaml")).sha256
    record = json.loads((out / "evaluation.json").read_text())
    assert record["protocol"]["sha256"] == sha256
    assert {found["protocol"] for found in record["metrics"].values()} == {sha256}
    assert set(pd.read_parquet(out / "scores.parquet")["protocol"]) == {sha256}
    assert set(pd.read_csv(out / "row.csv")["protocol"]) == {sha256}
    assert f"SHA-256 {sha256}." in (out / "row.md").read_text()
    given = ("--model", "shapes-flux", "--protocol", folder / "small.yaml", "--results", folder)
    code, printed, _ = run(capsys, "evaluate", "--adapter", file, *given)
    lines = printed.splitlines()
    assert code == 0 and f"protocol small, SHA-256 {sha256}" in lines
    numbers = [line for line in lines if line.startswith(("CLIP", "GenEval"))]
    assert len(numbers) == 2 and all(line.endswith(f"  {sha256[:12]}") for line in numbers)


def test_the_leaderboard_lists_evaluations(judged_zero, capsys):
    record = json.loads((judged_zero[2] / "evaluation.json").read_text())
    code, printed, _ = run(capsys, "leaderboard", judged_zero[2], "--metric", "clip", "--json")
    [found] = json.loads(printed)["protocols"]
    assert (code, found["sha256"]) == (0, record["protocol"]["sha256"])
    value = record["metrics"]["clip"]["value"]
    assert [row["metrics"]["clip"]["value"] for row in found["rows"]] == [value, value]
    assert {row["variant"] for row in found["rows"]} == {"adapter", "base"}


def test_the_base_of_a_folder_is_that_of_the_same_model_by_name(judged_zero, capsys, tmp_path):
    folder = judged_zero[0]
    copy = shutil.copytree(weights.verify("shapes-flux"), tmp_path / "my model")
    given = ("--base", "--protocol", folder / "small.yaml", "--results", tmp_path)
    code, printed, _ = run(capsys, "evaluate", "--model", copy, *given, "--out", tmp_path / "o")
    assert code == 0 and printed.startswith("my model on my model, 2 steps, sampler ")
    values = scores_of(tmp_path / "o", "base").to_numpy()
    assert np.array_equal(values, scores_of(judged_zero[2], "base").to_numpy())
    [row] = pd.read_csv(tmp_path / "o" / "row.csv").to_dict("records")
    assert (row["row"], row["backbone"]) == ("my model", "my-model")
    altered = copy / "transformer" / "config.json"
    before = checkpoint.target(str(copy), protocol.read(str(folder / "small.yaml"))).sha256
    altered.write_text(altered.read_text() + " ")
    assert checkpoint.target(str(copy), protocol.read(str(folder / "small.yaml"))).sha256 != before


CHANGES: dict[str, Any] = {
    "dtype": "bfloat16",
    "quantize": "nf4",
    "prompts_per_tag": 3,
    "images_per_prompt": 2,
    "metrics": {"clip": "shapes clip"},
    "nfe": 3,
    "samplers": ["anneal"],
    "validation_prompts": 3,
    "pipelines": {"FluxPipeline": {"guidance": 2.0, "max_sequence_length": 10}},
    "resolution": 48,
    "seed": 1,
    "validation_seed": 1,
}


@pytest.mark.parametrize("key", [*CHANGES, "version", "prompts", "assets", "title", "batch"])
def test_every_value_changes_the_sha256_but_title_and_batch(key, tmp_path):
    before = protocol.read(small(tmp_path)).sha256
    (tmp_path / "mine.jsonl").write_text(
        '{"prompt": "a circle", "tag": "a", "include": [{"class": "circle", "count": 1}]}\n'
        '{"prompt": "a ring", "tag": "a", "include": [{"class": "ring", "count": 1}]}\n'
    )
    if key == "assets":  # judges other models with other metrics
        assert {protocol.read(name).content.assets for name in protocol.names()} == {
            "shapes",
            "words",
            "hub",
        }
        return
    others = {"prompts": {"prompts": "mine.jsonl"}, "title": {"title": "Other"}}
    others["batch"] = {"batch": 9}
    others["version"] = {"metrics": SMALL["metrics"] | {"clip": "other"}}
    changes = others.get(key, {key: CHANGES.get(key)})
    after = protocol.read(small(tmp_path, **changes)).sha256
    assert (after == before) == (key in protocol.UNPINNED)


def test_prompts_and_weights_of_metrics_change_the_sha256(tmp_path, monkeypatch):
    lines = [f'{{"prompt": "{n} {{}}"}}'.replace("{}", "circles") for n in ("two", "three")]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(lines))
    chosen = small(tmp_path, prompts="mine.jsonl", metrics={"clip": "shapes clip"})
    before = protocol.read(chosen).sha256
    file.write_text("\n".join(lines).replace("circles", "rings"))
    other = protocol.read(chosen).sha256
    assert other != before
    monkeypatch.setattr(ShapesAssets, "reward_digest", lambda *_: "0" * 64)
    assert protocol.read(chosen).sha256 not in (before, other)


@pytest.mark.parametrize("value", ["FILE", "YAML(typ='safe').load(FILE)"])
def test_a_protocol_of_an_installed_package_has_the_sha256_of_its_values(value, tmp_path):
    text = "from pathlib import Path\n\nfrom ruamel.yaml import YAML\n\n"
    text += f"FILE = Path(__file__).with_name('shapes.yaml')\nPROTOCOL = {value}\n"
    files = {"theirs.py": text}
    files["shapes.yaml"] = (protocol.FOLDER / "shapes.yaml").read_text()
    groups = {"tafs.protocols": {"their_protocol": "their_package.theirs"}}
    with packages.installed(tmp_path, files, groups):
        found = protocol.read("their_protocol")
        assert "their_protocol" in protocol.names()
        assert (found.name, found.sha256) == ("their_protocol", protocol.read("shapes").sha256)
    with pytest.raises(ConfigError, match="unknown protocol 'their_protocol'"):
        protocol.read("their_protocol")


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("shapes", "{}", "protocol 'shapes' is defined twice, by .*shapes.yaml and by .*theirs.py"),
        ("theirs", "3", "theirs.py is neither the path of a YAML file nor its content; define one"),
        ("theirs", "{'assets': 'shapes'}", "theirs.py: missing key 'dtype'; add it"),
    ],
)
def test_a_wrong_protocol_of_an_installed_package_is_named(name, value, said, tmp_path):
    files = {"theirs.py": f"PROTOCOL = {value}\n"}
    groups = {"tafs.protocols": {name: "their_package.theirs"}}
    with packages.installed(tmp_path, files, groups), pytest.raises(ConfigError, match=said):
        protocol.read(name)


def test_the_shipped_protocols_are_those_of_config_yaml():
    for name, scale, role, table in (
        ("shapes", "shapes", "preference", "table2"),
        ("words", "words", "text", "words"),
        ("paper", "paper", "preference", "table2"),
        ("paper-composition", "paper", "composition", "table1"),
        ("one-gpu", "one-gpu", "preference", "table2"),
        ("one-gpu-composition", "one-gpu", "composition", "table1"),
    ):
        plan = experiment.load({"scale": scale}, ROOT / "config.yaml")
        active, content = plan.config.active, protocol.read(name).content
        evaluation = active.evaluation
        spec = next(e for n, e in plan.evaluations.items() if f".{role}." in n)
        images = evaluation.images_per_prompt
        assert content.images_per_prompt == (images if isinstance(images, int) else images[role])
        assert (content.assets, content.dtype) == (active.assets, active.dtype)
        assert content.prompts == active.prompts[role]
        for key in ("samplers", "validation_prompts", "batch", "resolution", "prompts_per_tag"):
            assert getattr(content, key) == getattr(spec, key)
        assert content.nfe in {row.nfe for t in plan.tables if t.name == table for row in t.rows}
        assert content.nfe == evaluation.few_nfe
        assert (content.seed, content.validation_seed) == tuple(DEFAULT_SEEDS)
        models = [catalog.read()[model] for model in active.model_roles.values()]
        assert content.pipelines == {
            m.pipeline: protocol.Guided(
                guidance=m.guidance, max_sequence_length=m.max_sequence_length
            )
            for m in models
        }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Callable[[str], Path]:
    """From a resource to its tiny checkpoint."""
    return tiny_hub.folders(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def one_gpu(tiny, tmp_path, monkeypatch) -> Callable[..., protocol.Protocol]:
    """The protocol `one-gpu` on tiny checkpoints, with changed keys and metrics of its versions."""
    monkeypatch.setattr(HubAssets, "folder", lambda self, resource: tiny(resource))
    digests = lambda self, names, *_: dict.fromkeys(names, "")  # noqa: E731
    monkeypatch.setattr(HubAssets, "_file_digests", digests)
    monkeypatch.setattr(HubAssets, "random", lambda *_: [])
    monkeypatch.setattr(HubAssets, "golden_scores", tmp_path / "golden.json")
    monkeypatch.setattr(cache, "home", lambda: tmp_path)
    plan = experiment.load({"scale": "one-gpu"}, ROOT / "config.yaml")
    assets = next(iter(plan.runs.values())).assets.model_copy(update={"device": "cpu"})

    def read(*metrics: str, **changes: Any) -> protocol.Protocol:
        content = YAML(typ="safe").load(protocol.FOLDER / "one-gpu.yaml") | SMALL | changes
        content["metrics"] = {name: METRICS[name].version for name in metrics}
        file = tmp_path / "tiny.yaml"
        with file.open("w") as out:
            YAML(typ="safe").dump(content | {"resolution": 64}, out)
        return protocol.read(str(file), assets)

    return read


def test_a_file_of_quoted_prompts_is_judged_by_ocr_and_first_golden_scores_are_stored(
    one_gpu, tmp_path, capsys
):
    texts = [f'a sign that says "{text}"' for text in ("STOP", "OPEN", "EXIT", "TAXI", "BANK")]
    (tmp_path / "signs.txt").write_text("\n".join(texts))
    chosen = one_gpu("clip", "ocr", prompts="signs.txt", validation_prompts=2)
    assert {"clip", "ocr"} <= {*chosen.source.metrics(chosen.content.prompts)}
    found = checkpoint.judge("sd35-medium", chosen, tmp_path)
    scores = pd.read_parquet(found.runs[0].scores)
    assert scores.groupby("metric", observed=True)["value"].count().to_dict() == {
        "clip": len(chosen.prompts),
        "ocr": len(chosen.prompts),
    }
    stored = tmp_path / "golden.json"
    said = [line for line in capsys.readouterr().out.splitlines() if "golden" in line]
    assert said == [f"reward clip: stored the golden scores of its weights in {stored}"]
    assert list(json.loads(stored.read_text())) == ["clip"]


@pytest.mark.parametrize("name", ["flux2-klein-base-4b", "sd35-medium"])
def test_the_models_of_one_card_are_judged_with_an_adapter(name, one_gpu, tiny, tmp_path):
    chosen = one_gpu("clip")
    entry = catalog.read()[name]
    backbone = catalog.backbones()[entry.pipeline].load(
        tiny(entry.resource), resolution=64, guidance=entry.guidance, max_sequence_length=16
    )
    backbone.add_lora(4, 4, torch.Generator())
    for parameter in backbone.lora_parameters().values():
        torch.nn.init.normal_(parameter)
    backbone.save_adapter(tmp_path / "adapter.safetensors")
    found = checkpoint.judge(name, chosen, tmp_path, tmp_path / "adapter.safetensors")
    base, adapted = (pd.read_parquet(run.scores)["value"] for run in found.runs)
    assert len(base) == 2 and base.notna().all() and adapted.notna().all()
    assert not np.array_equal(base, adapted)
    # The prompts', the validation prompts' and the negative prompt's embeddings are read again.
    [stored] = (tmp_path / "embeddings").iterdir()
    assert len(list(stored.iterdir())) >= 2
    model = checkpoint.target(name, chosen).load()
    model.prepare([prompt.text for prompt in chosen.prompts])
    assert model.pipeline.text_encoder is None


def test_models_of_the_hub_share_the_embeddings_of_the_same_weights(tiny, tmp_path, monkeypatch):
    digests = ["one lock entry"]
    monkeypatch.setattr(HubAssets, "folder", lambda self, resource: tiny(resource))
    monkeypatch.setattr(cache, "home", lambda: tmp_path)
    monkeypatch.setattr(cache, "digest", lambda *_: digests[-1])
    plan = experiment.load({"scale": "one-gpu"}, ROOT / "config.yaml")
    assets = next(iter(plan.runs.values())).assets.model_copy(update={"device": "cpu"})

    def loaded(**changes: Any) -> bool:
        """Whether a model has loaded text encoders to encode a prompt."""
        model = sources.of(assets.model_copy(update=changes)).model("sd35-medium", 64)
        model.prepare(["a red ring"])
        return model.pipeline.text_encoder is not None

    assert [loaded(), loaded(), loaded(quantize="int8")] == [True, False, False]
    assert loaded(dtype="float32")
    digests.append("another lock entry")
    assert loaded()
    assert len(list((tmp_path / "embeddings").iterdir())) == 3


BASE = ["--base", "--model", "shapes-flux", "--protocol"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--model", "shapes-flux", "--protocol", "shapes"], "--adapter, --base: give one of them"),
        ([*BASE, "shape"], "--protocol: unknown protocol 'shape'"),
        ([*BASE, "none.yaml"], "none.yaml: cannot be read"),
        (
            ["--base", "--model", "shapes-flu", "--protocol", "shapes"],
            "did you mean 'shapes-flux'?",
        ),
        (["--base", "--model", "flux-dev", "--protocol", "shapes"], "choose another protocol"),
        (["--base", "--model", ".", "--protocol", "shapes"], "model_index.json: not found"),
        (["--base", "--model", "flux-dev", "--protocol", "paper"], "run `make lock`"),
        ([*BASE, "shapes", "--scale", "smok"], "did you mean 'smoke'?"),
        ([*BASE, "paper", "--scale", "smoke"], "assets: 'hub' are not the 'shapes' of the scale"),
        (["--adapter", "x.ckpt", "--model", "shapes-flux", "--protocol", "shapes"], "not found"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, said, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, printed, line = run(capsys, "evaluate", *arguments)
    assert (code, printed) == (2, "")
    assert said in line and line.startswith("tafs evaluate: ") and line.count("\n") == 1


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"nfe": 0}, "nfe: input should be greater than or equal to 1 (got 0)"),
        ({"steps": 4}, "unknown key 'steps'"),
        ({"samplers": ["ode", "dpm"]}, "samplers.1: should be one of ode,"),
        ({"metrics": {"clipp": ""}}, "metrics: unknown metric 'clipp'; did you mean 'clip'?"),
        ({"metrics": {"clip": "v9"}}, "pins the version 'v9', but 'shapes clip' is installed"),
        ({"prompts": "pickapic"}, "prompts: unknown prompt set 'pickapic'"),
        ({"prompts": "none.txt"}, "none.txt cannot be read"),
        ({"pipelines": {"SanaPipeline": {"guidance": 1, "max_sequence_length": 9}}}, "has no 'Fl"),
    ],
)
def test_a_wrong_protocol_is_one_line(changes, said, tmp_path, capsys):
    code, printed, line = run(capsys, "evaluate", *BASE, small(tmp_path, **changes))
    assert (code, printed) == (2, "")
    assert said in line and "small" in line and line.count("\n") == 1


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("  geneval2: ", "  unifiedreward: a\n  geneval2: ", "geneval2: needs a server, as unifie"),
        (
            "prompts: geneval2",
            "prompts: pickapic",
            "geneval2: needs prompts with the metadata 'vqa",
        ),
    ],
)
def test_a_protocol_has_one_served_metric_and_prompts_that_it_can_judge(old, new, said, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text((protocol.FOLDER / "geneval2.yaml").read_text().replace(old, new))
    with pytest.raises(ConfigError, match=f"metrics.{said}"):
        protocol.read(str(file))


def test_a_served_metric_joins_the_others_and_the_images_are_deleted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    metrics = SMALL["metrics"] | {"unifiedreward": "UnifiedReward-7b-v1.5"}
    chosen = protocol.read(small(tmp_path, metrics=metrics))
    monkeypatch.setattr(protocol.Protocol, "served", ("unifiedreward",))
    monkeypatch.setattr(ShapesAssets, "folder", lambda self, resource: tmp_path / resource)
    monkeypatch.delenv("TAFS_SERVER", raising=False)
    with pytest.raises(ConfigError, match="metrics.unifiedreward: a server computes it"):
        checkpoint.judge("shapes-flux", chosen, tmp_path)
    script = ROOT / "tests" / "support" / "chat_server.py"
    monkeypatch.setenv("TAFS_SERVER", json.dumps([sys.executable, str(script), "{port}"]))
    file = kohya_file("shapes-flux", tmp_path / "mine")
    found = checkpoint.judge("shapes-flux", chosen, tmp_path, file)
    assert "UnifiedReward" in judged.write(found, tmp_path / "out")
    table = pd.read_parquet(tmp_path / "out" / "scores.parquet")
    counts = table.groupby(["run", "metric"], observed=True)["value"].count()
    assert len(counts) == 6 and set(counts) == {len(chosen.prompts)}
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert record["metrics"]["unifiedreward"]["difference"]["value"] != 0
    assert not any(run.images.exists() or run.eval_state.exists() for run in found.runs)
    monkeypatch.setenv("TAFS_SERVER", json.dumps(["not started"]))
    checkpoint.judge("shapes-flux", chosen, tmp_path, file)


def test_an_interrupted_evaluation_continues(tmp_path, monkeypatch):
    chosen = protocol.read(small(tmp_path, images_per_prompt=2))
    whole = checkpoint.judge("shapes-flux", chosen, tmp_path / "whole").runs[0]
    monkeypatch.setattr(Deadline, "expired", "SIGTERM")
    for _ in range(50):
        try:
            [again] = checkpoint.judge("shapes-flux", chosen, tmp_path / "parts").runs
            break
        except errors.ToBeContinued:
            continue
    assert again.scores.read_bytes() == whole.scores.read_bytes()
