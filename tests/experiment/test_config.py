"""config.yaml: what is read, and the one line that every mistake gets."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tafs import experiment
from tafs.common.yaml_files import ConfigError
from tafs.experiment import json_schema, validate
from tafs.experiment.plan import as_typed
from tafs.experiment.schema import RENAMED_KEYS
from tafs.methods import registry

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "config.yaml"
SCHEMA = ROOT / "workflow" / "schemas" / "config.schema.json"


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """Writes the shipped configuration with one text replaced."""

    def write(old: str, new: str) -> Path:
        text = SHIPPED.read_text(encoding="utf-8")
        assert old in text
        path = tmp_path / "config.yaml"
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
        shutil.copy(ROOT / "claims.yaml", tmp_path)
        return path

    return write


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # Names that do not exist.
        ("iterations: 17", "iteratons: 2", "unknown key 'scales.shapes.iteratons'; did you mean"),
        ("rate:", "rte:", "scales.smoke.methods.tafs_grpo: unknown hyperparameter 'learning_rte'"),
        ("scale: shapes", "scale: shape", "scale: unknown scale 'shape'; did you mean 'shapes'?"),
        ("clip: 2.0}", "clipp: 2.0}", "tasks.preference.rewards: unknown reward 'clipp'"),
        ("*alignment", "[tafs]", "experiments.equal_compute.methods: unknown method 'tafs'"),
        ("tasks: [preference]", "tasks: [prefs]", "experiments.table2.tasks: unknown task 'prefs'"),
        ("figure1, steps", "figure1, step", "experiments.table2.figures: unknown figure 'step'"),
        ("s: [sd3, flux]", "s: [sd2]", "experiments.table1.model_roles: unknown model role 'sd2'"),
        ("flux: sh", "flox: sh", "scales.smoke.model_roles: no model for 'flux' of experiment"),
        ("experiments: [table2,", "experiments: [tabel2,", "did you mean 'table2'?"),
        ("ence: tafs_grpo", "ence: tafs_grp", "compute_reference: unknown method 'tafs_grp'"),
        ("  tafs_grpo: {", "  tafs_grp: {", "scales.smoke.methods: unknown method 'tafs_grp'"),
        ("methods: [step", "methods: [stop", "scales.paper.methods: unknown method 'stop_"),
        ("      - sana-1-5", "      - sana-2", "scales.paper: unknown model 'sana-2'"),
        ("composition: geneval}", "composition: genevl}", "unknown prompt set 'genevl'"),
        ("preference: 1, comp", "pref: 1, comp", "images_per_prompt: no number for 'preference'"),
        ("{extends:", "{method:", "step_distillation: 'method' is now called 'extends'; rename it"),
        # Wrong values.
        ("iterations: 17", "iterations: -1", "scales.shapes.iterations: input should be greater"),
        ("iterations: 17", "iterations: many", "iterations: input should be a valid integer"),
        ("kind: gains", "kind: gain", "experiments.gains.kind: input should be 'scores', 'compute"),
        ("score: 1.0, cl", "score: -1, cl", "tasks.preference.rewards.pickscore: input"),
        ("results: results", "results: '-rf'", "results: should be a path of letters"),
        ("results: results", "scale: smoke", "line 6: 'scale' is given twice; keep one of them"),
        ("=127.0.0.1", "={host}", "should have no braces except those of {folder} and {port}"),
        ("title: CLIP-only", 'title: "a\\u202eb"', "tasks.clip_only.title: should not contain"),
        # Contradictions.
        ("kind: correlation", "methods: [tafs_grpo]", "table7.tasks: a table of kind 'scores' ne"),
        ("n\n    header", "n\n    tasks: [clip_only]\n    header", "'correlation' takes no tasks"),
        ("    prompts: preference\n\n# The", "\n# The", "table7.prompts: a table of kind 'correl"),
        (
            "[tafs_grpo, tafs_without_annealing, tafs_final_advantage]",
            "[]",
            "table3.methods: a tab",
        ),
        ("tasks: [clip_only,", "tasks: [composition,", "table6.tasks: they have different prompts"),
        ("processes: 8", "processes: 8\n    nodes: 3", "nodes: 3 nodes cannot share 8 processes"),
        ("sd3: sd35-medium", "sd3: sd35-large", "'sd35-large' cannot be trained, only compared"),
        ("sd3: sd35-medium", "sd3: shapes-sd3", "the assets of 'shapes-sd3' are not 'hub'"),
        ("batch: 105", "batch: 105\n      server: [serve]", "the assets 'shapes' need no server"),
        ("  tafs_grpo:\n", "  base:\n  tafs_grpo:\n", "methods.base: the name is reserved"),
        ("  tafs_grpo:\n", "  a: {extends: b}\n  b: {extends: a}\n  tafs_grpo:\n", "a -> b -> a"),
        ("s: rg_lcd,", "s: tafs_n_adv_2, n_adv: x,", "methods.step_distillation: "),
        ("seed: 1000", "seed: 2", "tuning.seed: 2 is one of the tables' seeds; choose another"),
        ("  task: preference", "  task: clip_only", "no experiment trains 'flow_grpo' on 'clip_o"),
        (
            "methods: [step_distillation, tafs_grpo]",
            "methods: [reward_instruct]",
            "table1.methods: 'reward_instruct' needs the rewards' gradients, but 'geneval' is not",
        ),
        ("[2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3]", "[1e-3]", "should give every method the same number"),
    ],
)
def test_a_mistake_is_reported_in_one_line_that_names_its_key(
    changed: Callable[..., Path], old: str, new: str, message: str
) -> None:
    path = changed(old, new)
    with pytest.raises(ConfigError) as caught:
        validate.read(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("assets: shapes", "world: shapes", "scales.smoke.world"),
        ("model_roles: [sd3", "backbones: [sd3", "experiments.table1.backbones"),
        ("exclude_methods:", "without:", "scales.paper.without"),
        ("compute_reference:", "reference:", "reference"),
    ],
)
def test_a_renamed_key_is_reported_with_its_present_name(
    changed: Callable[..., Path], old: str, new: str, key: str
) -> None:
    path = changed(old, new)
    present = RENAMED_KEYS[key.rpartition(".")[2]]
    with pytest.raises(ConfigError) as caught:
        validate.read(path)
    assert str(caught.value) == f"{path}: {key}: is now called {present!r}; rename it"


def test_prompts_that_the_processes_cannot_share_are_refused_at_that_scale_only(
    changed: Callable[..., Path],
) -> None:
    path = changed("processes: 8", "processes: 5")
    validate.read(path, {"scale": "shapes"})
    problem = "24 prompts in 1 updates cannot be divided among 5 processes; choose a divisor of 24"
    with pytest.raises(ConfigError, match=f"scales.paper: tafs_grpo: .*: {problem}"):
        validate.read(path, {"scale": "paper"})


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[1, 2]", b"a: [", b"", b"{? [a]: 1}"])
def test_a_file_that_is_not_a_mapping_is_refused_in_one_line(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    for file in (path, tmp_path / "missing.yaml"):
        with pytest.raises(ConfigError, match=f"^{file}: ") as caught:
            validate.read(file)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("attribute", "value", "problem"),
    [
        ("forward_equivalents", 0, "its `forward_equivalents` is 0; it must be above 0"),
        ("nfe_old", None, "define `forward_equivalents`"),
    ],
)
def test_a_method_without_a_training_cost_is_refused_in_one_line(
    attribute: str, value: Any, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry.method_class("flow_grpo"), attribute, value)
    with pytest.raises(ConfigError, match=f"methods.flow_grpo: .*{problem}") as caught:
        validate.read(SHIPPED)
    assert "\n" not in str(caught.value)


SEEDS = "give a number from 1 to 1000"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("iterations", 3, ": only scale, results, method, seeds can be set on the command line"),
        ("method", "nothing", "=nothing: methods.nothing: unknown method"),
        ("method", "../x", ": '../x' is not a method's name"),
        ("method", "base", "=base: methods.base: the name is reserved for the untrained model"),
        *(("seeds", count, f"={count}: {SEEDS}") for count in (0, 1001, 2.5, "3", True, [1])),
        ("seeds", 6, "=6: tuning.seed: 5 is one of the tables' seeds; choose another"),
    ],
)
def test_a_wrong_override_is_refused_in_one_line(
    changed: Callable[..., Path], key: str, value: Any, message: str
) -> None:
    path = changed("  seed: 1000", "  seed: 5")
    assert experiment.load({"seeds": 5}, path).runs
    with pytest.raises(ConfigError) as caught:
        experiment.load({key: value}, path)
    assert str(caught.value).startswith(f"--config {key}{message}")
    assert "\n" not in str(caught.value)


def test_results_below_a_file_or_a_protected_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert experiment.load({"results": 2026}, SHIPPED).root == Path("2026/shapes")
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(ConfigError, match=f"{SHIPPED}: results: file is not a folder; choose an"):
        experiment.load({"results": "file/below"}, SHIPPED)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ConfigError, match="results: . is not writable; choose another path"):
        experiment.load({"results": "below"}, SHIPPED)


PATHS = ["2026", "1e3", "007", "0x10", "true", "null", "2026-01-02", "1_000", "a b", "ünï/名"]


@pytest.mark.parametrize("text", [*PATHS, "a=b", "a@b,c+d", "x" * 200])
def test_a_path_is_taken_as_it_is_typed(text: str) -> None:
    typed = as_typed([f"results={text}", "scale=smoke", "seeds=1"])
    assert typed == {"results": text, "scale": "smoke"}
    assert experiment.load(typed, SHIPPED).root == Path(text) / "smoke"


@pytest.mark.parametrize(
    "text",
    ["", "-rf", " a", "a ", "'a'", '"a"', "a$b", "a\nb", "{run}", "[a]", "x" * 201, ".."],
)
def test_a_path_that_a_shell_or_a_pattern_would_change_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="results: should ") as caught:
        experiment.load(as_typed([f"results={text}"]), SHIPPED)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["scale", "method"])
def test_a_number_in_place_of_a_name_is_refused_as_a_name(key: str) -> None:
    for value in (1, 1.5, True, None):
        with pytest.raises(ConfigError, match=f"{key}.*name") as caught:
            experiment.load({key: value}, SHIPPED)
        assert "valid string" not in str(caught.value)


def test_the_published_json_schema_is_current() -> None:
    assert SCHEMA.read_text(encoding="utf-8") == json_schema.schema(), (
        f"run `python -m tafs.experiment.json_schema > {SCHEMA.relative_to(ROOT)}`"
    )


def test_checking_a_configuration_imports_no_model_library() -> None:
    """A mistake in config.yaml is reported before the libraries that take seconds to import."""
    code = (
        "import sys; from tafs import experiment; experiment.load(); "
        "print(*{'diffusers', 'transformers', 'mlflow', 'pandas', 'matplotlib'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == []
