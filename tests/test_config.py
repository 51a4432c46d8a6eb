"""config.yaml: what is read, and the one line that each mistake gets."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tafs import config

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "config.yaml"


def changed(tmp_path: Path, old: str, new: str) -> Path:
    text = SHIPPED.read_text()
    assert old in text
    path = tmp_path / "config.yaml"
    path.write_text(text.replace(old, new, 1))
    return path


def test_the_shipped_configuration_is_valid_at_every_scale():
    names = yaml.safe_load(SHIPPED.read_text())["scales"]
    for scale in names:
        assert config.runs(config.read(SHIPPED, {"scale": scale}))


def test_runs_are_named_after_method_task_backbone_and_seed():
    runs = config.runs(config.read(SHIPPED, {"scale": "shapes"}))
    assert "tafs_grpo.preference.shapes-sd3.2" in runs
    assert "flow_grpo.preference.shapes-sd3.0" in runs
    assert "base.shapes-sd3" in runs
    assert len(runs) == 7


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "iterations: 38",
            "iteratons: 25",
            "unknown key 'scales.shapes.iteratons'; did you mean 'iterations'",
        ),
        (
            "learning_rate:",
            "learning_rte:",
            "methods.tafs_grpo: unknown hyperparameter 'learning_rte'",
        ),
        ("scale: shapes", "scale: shape", "scale: unknown scale 'shape'; did you mean 'shapes'"),
        ("clip: 2.0}", "clipp: 2.0}", "tasks.preference.rewards: unknown reward 'clipp'"),
        (
            "[flow_grpo, tafs_grpo]",
            "[flow_grpo, tafs]",
            "experiments.table2.methods: unknown method 'tafs'",
        ),
        ("tasks: [preference]", "tasks: [prefs]", "experiments.table2.tasks: unknown task 'prefs'"),
        ("figures: {steps", "figures: {step", "experiments.table2.figures: unknown figure 'step'"),
        ("backbones: [sd3]", "backbones: [sd2]", "table1.backbones: unknown backbone 'sd2'"),
        ("backbones: {sd3:", "backbones: {sd2:", "scale 'smoke' has no backbone for 'sd3'"),
        ("experiments: [table2]", "experiments: [tabel2]", "did you mean 'table2'?"),
        ("iterations: 38", "iterations: -1", "scales.shapes.iterations: input should be greater"),
        (
            "iterations: 38",
            "iterations: many",
            "scales.shapes.iterations: input should be a valid integer",
        ),
        ("results: results", "scale: smoke", "'scale' is given twice"),
        ("  tafs_grpo: {", "  tafs_grp: {", "methods.tafs_grp: unknown method 'tafs_grp'"),
        (
            "pickscore: 1.0, clip: 2.0}\n  comp",
            "pickscore: -1, clip: 2.0}\n  comp",
            "tasks.preference.rewards.pickscore",
        ),
    ],
)
def test_a_mistake_gets_one_line_that_names_its_key(tmp_path, old, new, message):
    with pytest.raises(config.ConfigError) as caught:
        config.read(changed(tmp_path, old, new))
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    assert str(tmp_path) in text


def test_3e_4_is_a_number(tmp_path):
    path = changed(tmp_path, "tafs_grpo: {", "tafs_grpo: {weight_decay: 3e-4, ")
    run = config.runs(config.read(path))["tafs_grpo.preference.shapes-sd3.0"]
    assert run.hyperparameters["weight_decay"] == 3e-4


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[1, 2]", b"a: [", b"", b"{? [a]: 1}"])
def test_what_is_no_mapping_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(config.ConfigError) as caught:
        config.read(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(config.ConfigError, match="nothing.yaml: cannot be read"):
        config.read(tmp_path / "nothing.yaml")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), value=json_values)
def test_any_value_anywhere_is_read_or_refused_in_one_line(data, value):
    raw = yaml.safe_load(SHIPPED.read_text())
    place = raw
    while True:
        key = data.draw(st.sampled_from(sorted(place)))
        if isinstance(place[key], dict) and data.draw(st.booleans()):
            place = place[key]
            continue
        place[key] = value
        break
    try:
        config.runs(config.check(raw))
    except config.ConfigError as error:
        assert "\n" not in str(error)


def test_changing_one_hyperparameter_changes_only_its_runs_fingerprints(tmp_path):
    before = config.runs(config.read(SHIPPED))
    after = config.runs(config.read(changed(tmp_path, "clip_range: 1e-2", "clip_range: 0.5")))
    differing = {name for name in before if before[name].describe() != after[name].describe()}
    assert differing == {name for name in before if name.startswith("tafs_grpo.")}


def test_reading_the_plan_imports_no_model_library():
    """A mistake in config.yaml is told before diffusers or transformers are imported."""
    code = (
        "import sys; from tafs import workflow; workflow.read({}); "
        "sys.exit(bool({'diffusers', 'transformers', 'mlflow', 'pandas'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_one_more_method_joins_the_tables_that_have_the_base_models():
    settings = config.with_method(config.read(SHIPPED), "dance_grpo")
    names = set(config.runs(settings)) - set(config.runs(config.read(SHIPPED)))
    assert names == {f"dance_grpo.preference.shapes-sd3.{seed}" for seed in (0, 1, 2)}
    table = next(t for t in config.tables(settings) if t["name"] == "table2")
    assert "dance_grpo" in [row["variant"] for row in table["rows"]]


@pytest.mark.parametrize("name", ["nothing", "../x", "a;b"])
def test_a_method_that_is_not_there_cannot_join(name):
    with pytest.raises(config.ConfigError, match="--config method"):
        config.with_method(config.read(SHIPPED), name)


def test_what_runs_there_are_changes_no_run(tmp_path):
    """One more seed or experiment must not train again what is there."""
    before = config.runs(config.read(SHIPPED))
    after = config.runs(config.read(changed(tmp_path, "seeds: [0, 1, 2]", "seeds: [0, 1, 2, 3]")))
    assert len(after) > len(before)
    assert all(after[name].describe() == before[name].describe() for name in before)


def test_rewards_without_gradients_are_refused_to_methods_that_need_them(tmp_path):
    path = changed(tmp_path, "tasks: [preference]", "tasks: [composition]")
    path.write_text(path.read_text().replace("[flow_grpo, tafs_grpo]", "[reward_instruct]"))
    path.write_text(path.read_text().replace("\nmethods:\n", "\nmethods:\n  reward_instruct:\n"))
    with pytest.raises(config.ConfigError, match="'reward_instruct' needs .*'geneval'.* has none"):
        config.read(path)
