"""The catalogue: models.yaml, entries of plug-ins, and the stub of a model."""

import json
from pathlib import Path

import pytest
from support import tiny_pipelines
from support.packages import assert_clean, installed

from tafs.common.yaml_files import ConfigError, load_yaml
from tafs.models import catalog, template

ROOT = Path(__file__).resolve().parents[2]
MODELS = catalog.read()
ENTRY = {
    "title": "Theirs",
    "resource": "flux-dev",
    "pipeline": "FluxPipeline",
    "trainable": True,
    "steps": 8,
    "guidance": 3.5,
    "max_sequence_length": 64,
    "licence": "MIT",
}


def plugin(entry: str, more: str = "") -> str:
    return f"from tafs.models import ModelPlugin\nPLUGIN = ModelPlugin(models={entry}{more})\n"


@pytest.fixture
def install(tmp_path):
    def of(text: str, files: dict[str, str] | None = None):
        points = {"tafs.models": {"theirs": "their_package.theirs"}}
        return installed(tmp_path, {"theirs.py": text, **(files or {})}, points)

    return of


def test_the_shipped_models_are_those_of_table_1_and_one_for_one_gpu():
    shipped = catalog.read_file(catalog.FILE).values()
    assert {model.title: model.steps for model in shipped if model.assets == "hub"} == {
        "SD3.5-Medium": 40,
        "SD3.5-Large": 28,
        "FLUX.1-dev": 28,
        "SANA-1.5 1.6B": 20,
        "HiDream-I1-Full": 50,
        "SD3.5-Large-Turbo": 4,
        "FLUX.1-schnell": 4,
        "Flux-Turbo-Alpha": 4,
        "Hyper-Flux": 8,
        "SANA-Sprint 1.6B": 4,
        "HiDream-I1-Fast": 16,
        "FLUX.2-klein-base-4B": 50,
    }
    assert MODELS["hyper-flux"].resources == ("flux-dev", "hyper-flux")
    assert MODELS["hidream-fast"].resources == ("hidream-fast", "llama-3.1-8b-instruct")


def test_each_resource_of_a_model_is_in_resources_yaml_and_has_a_tiny_checkpoint():
    known = load_yaml(ROOT / "resources.yaml", dict)
    for models in (MODELS, catalog.read_file(catalog.FILE)):
        hub = [model for model in models.values() if model.assets == "hub"]
        needed = {resource for model in hub for resource in model.resources}
        assert needed <= set(known)
    assert needed == set(tiny_pipelines.RESOURCES)


def changed(tmp_path: Path, **changes) -> Path:
    """A catalogue with only Flux-Turbo-Alpha in it, changed; None removes a key."""
    entry = load_yaml(catalog.FILE, dict)["flux-turbo-alpha"] | changes
    file = tmp_path / "models.yaml"
    file.write_text(json.dumps({"flux": {k: v for k, v in entry.items() if v is not None}}))
    return file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidence": 1.0}, "unknown key 'flux.guidence'; did you mean 'guidance'"),
        (
            {"lora": {"resource": "a", "file": "b.safetensors", "scales": 1.0}},
            "unknown key 'flux.lora.scales'; did you mean 'scale'",
        ),
        ({"pipeline": "Flux Pipeline"}, "flux.pipeline: "),
        ({"assets": "disk"}, "flux.assets: .*'words' or 'hub'"),
        ({"steps": None}, "missing key 'flux.steps'"),
        ({"steps": 0}, "flux.steps: .*greater than or equal to 1"),
        ({"guidance": -1}, "flux.guidance: "),
        ({"resource": "../flux"}, "flux.resource: "),
        ({"lora": {"resource": "a", "file": "../b.safetensors", "scale": 1}}, "flux.lora.file: "),
        ({"lora": {"resource": "a", "file": "b.bin", "scale": 1}}, "flux.lora.file: "),
    ],
)
def test_a_mistake_is_named_in_one_line(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message) as raised:
        catalog.read_file(changed(tmp_path, **changes))
    assert len(str(raised.value).splitlines()) == 1
    assert str(raised.value).startswith(f"{tmp_path / 'models.yaml'}: ")


@pytest.mark.parametrize("key", ["guidance", "max_sequence_length"])
def test_only_models_that_are_compared_may_leave_guidance_and_length_to_the_pipeline(key, tmp_path):
    entry = load_yaml(catalog.FILE, dict)["flux-dev"] | {key: None}
    file = tmp_path / "models.yaml"
    file.write_text(json.dumps({"flux": entry | {"trainable": False}}))
    found = catalog.read_file(file)["flux"]
    with pytest.raises(ValueError, match="max_sequence_length: FLUX.1-dev needs numbers for its b"):
        _ = found.conditioning
    file.write_text(json.dumps({"flux": entry}))
    with pytest.raises(ConfigError, match="flux: .*max_sequence_length: training needs numbers"):
        catalog.read_file(file)


@pytest.mark.parametrize("as_file", [False, True])
def test_an_installed_package_adds_models_as_a_mapping_or_a_file(install, as_file):
    entry, files = repr({"theirs": ENTRY}), {}
    if as_file:
        entry = "Path(__file__).parent / 'models.yaml'"
        files = {"models.yaml": json.dumps({"theirs": ENTRY})}
    with install("from pathlib import Path\n" + plugin(entry), files):
        found = catalog.read()
        assert list(found)[-1] == "theirs"
        assert found["theirs"].title == "Theirs"
    assert "theirs" not in catalog.read()


def test_an_installed_package_adds_a_backbone_for_a_pipeline_class(install, tmp_path):
    text = template.write("theirs", "OtherPipeline", tmp_path).read_text()
    with install(text):
        assert catalog.read()["theirs"].trainable
        backbone = catalog.backbones()["OtherPipeline"]
        assert str(backbone) == "<class 'their_package.theirs.TheirsBackbone'>"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (plugin(repr({"flux-dev": ENTRY})), "theirs.py: models: 'flux-dev' is also defined in .*y"),
        (plugin(repr({"theirs": {}})), "theirs.py: models: missing key 'theirs.title'; add it"),
        (
            plugin(repr({"theirs": ENTRY | {"pipeline": "OtherPipeline"}})),
            "theirs.trainable: no backbone trains a OtherPipeline .available: .*, FluxPipeline, ",
        ),
        (
            plugin("{}", ", backbones={'FluxPipeline': int}"),
            "FluxPipeline has two backbones, .*.FluxBackbone and builtins.int of the model",
        ),
        ("PLUGIN = 3", "PLUGIN in .*theirs.py is not a tafs.models.ModelPlugin"),
        ("import nothing_here", r"theirs.py \(package their-package 1.0\) cannot be imported"),
    ],
)
def test_a_wrong_plugin_is_named_in_one_line(install, text, message):
    with install(text), pytest.raises(ValueError, match=message) as raised:
        catalog.read()
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("pipeline", ["StableDiffusion3Pipeline", "SanaPipeline", "OtherPipeline"])
def test_the_stub_is_clean_code_and_a_model(install, tmp_path, pipeline):
    file = template.write("my-model", pipeline, tmp_path)
    assert_clean(file)
    with install(file.read_text()):
        assert catalog.read()["my-model"].pipeline == pipeline
        assert pipeline in catalog.backbones()


@pytest.mark.parametrize(
    ("name", "pipeline", "message"),
    [
        *((name, "X", "is not a valid name") for name in ("", "My", "a_b", "../x", "1a", "a-")),
        ("x" * 65, template.PIPELINE, "is not a valid name"),
        ("flux-dev", template.PIPELINE, "is taken"),
        ("flux", template.PIPELINE, "is taken"),
        ("my-model", "Flux", "--pipeline 'Flux': is not a pipeline class"),
    ],
)
def test_an_invalid_or_taken_name_and_an_unlikely_class_are_refused(
    tmp_path, name, pipeline, message
):
    with pytest.raises(ValueError, match=message):
        template.write(name, pipeline, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="run this command in the project's folder"):
        template.write("my-model", folder=tmp_path / "absent")
