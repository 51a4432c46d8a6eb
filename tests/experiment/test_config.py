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
from tafs.experiment import json_schema, run_inputs, validate
from tafs.experiment.plan import as_typed
from tafs.experiment.schema import RENAMED_KEYS
from tafs.methods import registry
from tafs.models import quantization

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


def test_quantised_weights_decide_an_outcome_and_whole_ones_change_no_earlier_run(changed):
    old, new = "    resolution: 24\n", "    resolution: 24\n    quantize: nf4\n"
    whole, quantized = (
        next(iter(experiment.load({"scale": "smoke"}, path).runs.values()))
        for path in (SHIPPED, changed(old, new))
    )
    assert quantized.decisive() == {**whole.decisive(), "assets.quantize": "nf4"}
    assert "quantize" not in whole.to_json()


def test_a_length_of_prompts_decides_an_outcome_and_an_attention_backend_does_not(changed):
    old = "    resolution: 24\n"
    new = f"{old}    max_sequence_length: 6\n    attention: _native_math\n"
    own, chosen = (
        next(iter(experiment.load({"scale": "smoke"}, path).runs.values()))
        for path in (SHIPPED, changed(old, new))
    )
    assert chosen.decisive() == {**own.decisive(), "assets.max_sequence_length": 6}
    assert chosen.assets.attention == "_native_math"
    assert not {"attention", "max_sequence_length"} & own.assets.model_dump().keys()


def test_a_dtype_of_reward_models_decides_no_outcome(changed):
    old = "    resolution: 24\n"
    own, chosen = (
        next(iter(experiment.load({"scale": "smoke"}, path).runs.values()))
        for path in (SHIPPED, changed(old, f"{old}    rewards_dtype: bfloat16\n"))
    )
    assert chosen.decisive() == own.decisive()
    assert chosen.assets.rewards_dtype == "bfloat16"
    assert "rewards_dtype" not in own.to_json()


def test_a_missing_library_is_one_line_when_a_scale_needs_it(changed, monkeypatch):
    path = changed("    resolution: 24\n", "    resolution: 24\n    quantize: int8\n")
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    assert experiment.load({"scale": "shapes"}, path).config.active.quantize == "none"
    with pytest.raises(ConfigError) as caught:
        experiment.load({"scale": "smoke"}, path)
    message = str(caught.value)
    assert message.endswith(
        "scales.smoke.quantize: 'int8' needs torchao; run "
        "`pip install -c constraints.txt -e '.[quantize]'`"
    )
    assert "\n" not in message


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
        ("{extends:", "{method:", "tafs_gain: 'method' is now called 'extends'; rename it"),
        # Wrong values.
        ("iterations: 17", "iterations: -1", "scales.shapes.iterations: input should be greater"),
        ("iterations: 17", "iterations: many", "iterations: input should be a valid integer"),
        ("kind: gains", "kind: gain", "experiments.gains.kind: input should be 'scores', 'compute"),
        ("score: 1.0, cl", "score: -1, cl", "tasks.preference.rewards.pickscore: input"),
        ("results: results", "results: '-rf'", "results: should be a path of letters"),
        ("results: results", "scale: smoke", "line 6: 'scale' is given twice; keep one of them"),
        ("=127.0.0.1", "={host}", "should have no braces except those of {folder} and {port}"),
        ("title: CLIP-only", 'title: "a\\u202eb"', "tasks.clip_only.title: should not contain"),
        (
            ": 24\n",
            ": 24\n    attention: sage\n",
            "scales.smoke.attention: input should be 'native'",
        ),
        # Contradictions.
        (
            ": 24\n",
            ": 24\n    max_sequence_length: 11\n",
            "scales.smoke.max_sequence_length: 11 is more than the 10 tokens of 'shapes-sd3'",
        ),
        ("kind: correlation", "methods: [tafs_grpo]", "table7.tasks: a table of kind 'scores' ne"),
        ("n\n    header", "n\n    tasks: [clip_only]\n    header", "'correlation' takes no tasks"),
        ("    prompts: preference\n\n# The", "\n# The", "table7.prompts: a table of kind 'correl"),
        (
            "[tafs_grpo, tafs_without_annealing, tafs_flow_sde, tafs_final_advantage]",
            "[]",
            "table3.methods: a tab",
        ),
        ("tasks: [clip_only,", "tasks: [composition,", "table6.tasks: they have different prompts"),
        ("processes: 8", "processes: 8\n    nodes: 3", "nodes: 3 nodes cannot share 8 processes"),
        ("device: cuda", "device: auto", "device: 'auto' is for trainings of one process"),
        ("sd3: sd35-medium", "sd3: sd35-large", "'sd35-large' cannot be trained, only compared"),
        ("sd3: sd35-medium", "sd3: shapes-sd3", "the assets of 'shapes-sd3' are not 'hub'"),
        ("batch: 105", "batch: 105\n      server: [serve]", "the assets 'shapes' need no server"),
        (
            "batch: 105",
            "batch: 105\n      metrics: [clip]",
            "metrics: unknown optional metric 'clip'",
        ),
        (
            "batch: 105",
            "batch: 105\n      judge: clip",
            "judge: 'clip' has no command in judges (there",
        ),
        ("judges:\n", "judges:\n        hpsv3: [a]\n", "judges: unknown served metric 'hpsv3'"),
        (
            "judges:\n",
            "judge: geneval2\n      judges:\n",
            "preference: have no 'vqa_list', which the ju",
        ),
        ("  tafs_grpo:\n", "  base:\n  tafs_grpo:\n", "methods.base: the name is reserved"),
        ("  tafs_grpo:\n", "  a: {extends: b}\n  b: {extends: a}\n  tafs_grpo:\n", "a -> b -> a"),
        ("s: rg_lcd,", "s: tafs_n_adv_2, n_adv: x,", "methods.step_distillation: "),
        ("[1000, 1001, 1", "[2, 1001, 1", "tuning.seeds: 2 is one of the tables' seeds; choose"),
        ("1001, 1002]", "1001]", "tuning.seeds: tuple should have at least 3 items"),
        ("1001, 1002]", "1001, 1001]", "tuning.seeds: should be different values"),
        ("warmup: [0,", "warm_up: [0,", "tuning.common: tafs_grpo: unknown hyperparameter 'warm_"),
        ("warmup: [0,", "warmup: [0.5,", "tuning.common: tafs_grpo: warmup: input should be a va"),
        ("warmup: [0, 4, 12]", "warmup: []", "tuning.common.warmup: tuple should have at least 1"),
        ("{low: 0.3, high: 1.2}", "{low: 2, high: 1}", "flow_grpo.eta: low should be less than"),
        ("{low: 0.3, high: 1.2}", "{low: -1, high: 1}", "tuning.methods.flow_grpo: eta: -1"),
        ("{low: 0.3, high: 1.2}", "{low: 0.3}", "missing key 'tuning.methods.flow_grpo.eta.high'"),
        ("{low: 0.3, high: 1.2}", "{low: 0, high: 1, log: true}", "eta: low should be above 0"),
        ("  trials: 8", "  grids: {}\n  trials: 8", "unknown key 'tuning.grids'"),
        ("[1000, 1001, 1", "[7, 1001, 1", "tuning.seeds: 7 is one of the tables' seeds; choose"),
        (
            "decide: {seeds: [3, 5, 8]",
            "decide: {seeds: [3, 3]",
            "shapes.decide.seeds: [3, 3] should",
        ),
        ("decide: {seeds: [3, 5, 8]", "decide: {seeds: [1, 5]", "scales.shapes.decide.seeds.0: "),
        (
            "tasks: [preference, text]",
            "tasks: [clip_only]",
            "no experiment trains 'flow_grpo' on 'c",
        ),
        (
            "methods: [step_distillation, tafs_grpo]",
            "methods: [reward_instruct]",
            "table1.methods: 'reward_instruct' needs the rewards' gradients, but 'geneval' is not",
        ),
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
    problem = "24 prompts in 3 updates cannot be divided among 5 processes; choose a divisor of 8"
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
        (
            "iterations",
            3,
            ": only scale, results, method, seeds can be set on the command line",
        ),
        ("method", "nothing", "=nothing: methods.nothing: unknown method"),
        ("method", "../x", ": '../x' is not a method's name"),
        ("method", "base", "=base: methods.base: the name is reserved for the untrained model"),
        *(("seeds", count, f"={count}: {SEEDS}") for count in (0, 1001, 2.5, "3", True, [1])),
        ("seeds", 9, "=9: tuning.seeds: 8 is one of the tables' seeds; choose another"),
    ],
)
def test_a_wrong_override_is_refused_in_one_line(
    changed: Callable[..., Path], key: str, value: Any, message: str
) -> None:
    path = changed("seeds: [1000,", "seeds: [8,")
    assert experiment.load({"seeds": 8}, path).runs
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


OWN = "a red circle\na black ring\nfour crosses\n"
ROW = '{"prompt": "a red circle", "tag": "colors", "include": [{"class": "circle", "count": 1}]}\n'
SMOKE = "prompts: {preference: shapes, composition: shapes}"


@pytest.fixture
def with_prompts(changed: Callable[..., Path]) -> Callable[[str], Path]:
    """Writes a configuration whose scale smoke has these prompts, with files beside it."""

    def write(prompts: str) -> Path:
        path = changed(SMOKE, f"prompts: {{preference: {prompts}, composition: shapes}}")
        small = path.read_text(encoding="utf-8").replace("ion_prompts: 12", "ion_prompts: 2", 1)
        path.write_text(small, encoding="utf-8")
        for name, text in {"own.txt": OWN, "b.txt": "a ring\n", "Bad.txt": "a red cat\n"}.items():
            (path.parent / name).write_text(text, encoding="utf-8")
        rows = ROW + ROW.replace("a red", "one red")
        (path.parent / "own.jsonl").write_text(rows, encoding="utf-8")
        (path.parent / "cat.jsonl").write_text(rows.replace('"circle"', '"cat"'), encoding="utf-8")
        (path.parent / "long.txt").write_text("a " * 9 + "\na\n", encoding="utf-8")
        return path

    return write


def test_prompts_come_from_files_beside_the_configuration(
    with_prompts: Callable[[str], Path],
) -> None:
    path = with_prompts("own.txt")
    run = experiment.load({"scale": "smoke"}, path).runs["tafs_grpo.preference.shapes-flux.0"]
    assert run.prompt_files == (str(path.parent / "own.txt"),)
    known = [run_inputs.asset_source(run).prompts(run.prompts, s) for s in ("train", "test")]
    assert sorted(p.text for split in known for p in split) == sorted(OWN.splitlines())
    assert len(run.weights[f"prompts.{run.prompts}"]) == 64
    (path.parent / "own.txt").rename(path.parent / "moved file.txt")
    again = path.read_text(encoding="utf-8").replace("own.txt", "moved file.txt")
    path.write_text(again, encoding="utf-8")
    moved = experiment.load({"scale": "smoke"}, path).runs[run.name]
    assert moved.prompt_files != run.prompt_files and moved.decisive() == run.decisive()
    (path.parent / "moved file.txt").write_text(OWN + "a ring", encoding="utf-8")
    assert experiment.load({"scale": "smoke"}, path).runs[run.name].decisive() != run.decisive()
    with pytest.raises(ValueError, match="moved file.txt: changed since run.json was written; run"):
        run_inputs.asset_source(moved)


def test_two_files_train_and_test_and_json_lines_have_metadata(
    with_prompts: Callable[[str], Path],
) -> None:
    path = with_prompts("{train: own.txt, test: b.txt}")
    run = experiment.load({"scale": "smoke"}, path).runs["tafs_grpo.preference.shapes-flux.0"]
    source = run_inputs.asset_source(run)
    assert [p.text for p in source.prompts(run.prompts, "test")] == ["a ring"]
    assert "geneval" not in source.metrics(run.prompts)


@pytest.mark.parametrize(
    ("prompts", "problem"),
    [
        ("missing.txt", "prompts.preference: the file {}/missing.txt cannot be read (No such file"),
        ("own.csv", "prompts.preference: should be a prompt set, a file .txt or .jsonl, or {tra"),
        ("{train: own.txt}", "prompts.preference: input should be a valid string"),
        ("{train: own.txt, test: [a]}", "prompts.preference: should be a prompt set, a file .txt"),
        ("'-rf.txt'", "prompts.preference: should be a path of letters"),
        ("{train: own.txt, test: own.txt}", "prompts.preference: line 1 of {}/own.txt is also li"),
        (
            "{train: own.txt, test: Bad.txt}",
            "prompts.preference: line 1 of {}/Bad.txt has 'cat', which is not in tafs/data/shapes",
        ),
        ("long.txt", "prompts.preference: line 1 of {}/long.txt has more than 8 words, which"),
        ("cat.jsonl", "prompts.preference: line 1 of {}/cat.jsonl has the class 'cat', which the"),
        ("own.jsonl", "evaluation.correlation_prompts: 2 is more than the 1 training prompts of"),
        (
            "shapes, composition: own.txt",
            "prompts.composition: the reward 'geneval' of task 'composition' needs GenEval's meta",
        ),
    ],
)
def test_prompts_that_do_not_fit_the_scale_are_refused_in_one_line(
    with_prompts: Callable[[str], Path], prompts: str, problem: str
) -> None:
    path = with_prompts(prompts)
    if "composition: " in prompts:
        text = path.read_text(encoding="utf-8").replace("txt, composition: shapes}", "txt}")
        text = text.replace("experiments: [table2,", "experiments: [table1, table2,", 1)
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        experiment.load({"scale": "smoke"}, path)
    expected = problem.replace("{}", str(path.parent))
    assert str(caught.value).startswith(f"{path}: scales.smoke.{expected}")
    assert "\n" not in str(caught.value)


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
