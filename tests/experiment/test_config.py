"""config.yaml: what is read, and the one line that each mistake gets."""

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tafs.common import yaml_files
from tafs.experiment import evaluations, schema, tables, validate
from tafs.experiment import runs as runs_
from tafs.methods import registry
from tafs.orchestration import graph
from tafs.report import table_kinds

ROOT = Path(__file__).resolve().parents[2]
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
        assert runs_.runs(validate.read(SHIPPED, {"scale": scale}))


def test_runs_are_named_after_method_task_backbone_and_seed():
    runs = runs_.runs(validate.read(SHIPPED, {"scale": "shapes"}))
    assert "tafs_grpo.preference.shapes-flux.2" in runs
    assert "flow_grpo.preference.shapes-flux.0" in runs
    assert "step_distillation.composition.shapes-sd3.0" in runs
    assert {"base.shapes.shapes-sd3", "base.shapes.shapes-flux"} <= set(runs)
    # Two base models, Table 2's six methods on three seeds, and on one seed two of Table 1 on two
    # base models, five ablations and two more tasks.
    assert len(runs) == 2 + 6 * 3 + 2 * 2 + 5 + 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "iterations: 17",
            "iteratons: 25",
            "unknown key 'scales.shapes.iteratons'; did you mean 'iterations'",
        ),
        (
            "learning_rate:",
            "learning_rte:",
            "scales.smoke.methods.tafs_grpo: unknown hyperparameter 'learning_rte'",
        ),
        ("scale: shapes", "scale: shape", "scale: unknown scale 'shape'; did you mean 'shapes'"),
        ("clip: 2.0}", "clipp: 2.0}", "tasks.preference.rewards: unknown reward 'clipp'"),
        (
            "reward_instruct, tafs_grpo]",
            "reward_instruct, tafs]",
            "experiments.table2.methods: unknown method 'tafs'",
        ),
        ("tasks: [preference]", "tasks: [prefs]", "experiments.table2.tasks: unknown task 'prefs'"),
        ("figure1, steps", "figure1, step", "experiments.table2.figures: unknown figure 'step'"),
        ("backbones: [sd3,", "backbones: [sd2,", "table1.backbones: unknown backbone 'sd2'"),
        ("flux: shapes-flux}", "flox: shapes-flux}", "scale 'smoke' has no backbone for 'flux'"),
        ("experiments: [table2,", "experiments: [tabel2,", "did you mean 'table2'?"),
        (
            "reference: tafs_grpo",
            "reference: tafs_grp",
            "reference: unknown method 'tafs_grp'; did you mean 'tafs_grpo'?",
        ),
        (
            "kind: gains",
            "kind: gain",
            "experiments.gains.kind: input should be 'scores', 'compute'",
        ),
        (
            "kind: correlation",
            "kind: correlation\n    tasks: [preference]",
            "experiments.table7.tasks: a table of kind 'correlation' takes no tasks",
        ),
        (
            "kind: correlation",
            "kind: correlation\n    methods: [tafs_grpo]",
            "experiments.table7.methods: a table of kind 'correlation' takes no methods",
        ),
        (
            "kind: gains\n    tasks: [preference]",
            "kind: gains",
            "experiments.gains.tasks: a table of kind 'gains' needs at least one of its tasks",
        ),
        (
            "methods: *alignment\n    figures: {comp",
            "figures: {comp",
            "experiments.equal_compute.methods: a table of kind 'compute' needs at least one",
        ),
        (
            "methods: [tafs_grpo, tafs_without_annealing, tafs_final_advantage]",
            "methods: []",
            "experiments.table3.methods: a table of kind 'scores' needs at least one of its",
        ),
        ("iterations: 17", "iterations: -1", "scales.shapes.iterations: input should be greater"),
        (
            "iterations: 17",
            "iterations: many",
            "scales.shapes.iterations: input should be a valid integer",
        ),
        ("results: results", "scale: smoke", "'scale' is given twice"),
        ("  tafs_grpo: {", "  tafs_grp: {", "scales.smoke.methods: unknown method 'tafs_grp'"),
        (
            "pickscore: 1.0, clip: 2.0}\n  comp",
            "pickscore: -1, clip: 2.0}\n  comp",
            "tasks.preference.rewards.pickscore",
        ),
        ("processes: 8", "processes: 8\n    nodes: 3", "nodes: 3 cannot share 8 processes"),
        (
            "{preference: 1, composition: 4}",
            "{preference: 1}",
            "scales.paper.evaluation.images_per_prompt: none for 'composition'",
        ),
        ("sd3: sd35-medium", "sd3: sd35-large", "'sd35-large' cannot be trained, only compared"),
        ("      - sana-1-5", "      - sana-2", "scales.paper: unknown model 'sana-2'"),
        ("sd3: sd35-medium", "sd3: shapes-sd3", "'shapes-sd3' is not of the world 'hub'"),
        ("composition: geneval}", "composition: genevl}", "unknown prompt set 'genevl'"),
        ("without: [step", "without: [stop", "scales.paper.methods: unknown method 'stop_"),
    ],
)
def test_a_mistake_gets_one_line_that_names_its_key(tmp_path, old, new, message):
    with pytest.raises(yaml_files.ConfigError) as caught:
        validate.read(changed(tmp_path, old, new))
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    assert str(tmp_path) in text


def test_prompts_that_a_scales_processes_cannot_share_are_refused_there(tmp_path):
    path = changed(tmp_path, "processes: 8", "processes: 5")
    validate.read(path, {"scale": "shapes"})
    with pytest.raises(yaml_files.ConfigError) as caught:
        validate.read(path, {"scale": "paper"})
    assert str(caught.value) == (
        f"{path}: scales.paper: tafs_grpo: prompts_per_iteration: 24 prompts in 1 updates cannot "
        "be shared by 5 processes; choose a divisor of 24"
    )


def test_3e_4_is_a_number(tmp_path):
    path = changed(tmp_path, "tafs_grpo: {", "tafs_grpo: {weight_decay: 3e-4, ")
    run = runs_.runs(validate.read(path))["tafs_grpo.preference.shapes-flux.0"]
    assert run.hyperparameters["weight_decay"] == 3e-4


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[1, 2]", b"a: [", b"", b"{? [a]: 1}"])
def test_what_is_no_mapping_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(yaml_files.ConfigError) as caught:
        validate.read(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(yaml_files.ConfigError, match="nothing.yaml: cannot be read"):
        validate.read(tmp_path / "nothing.yaml")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=150)
@given(data=st.data(), value=json_values)
def test_any_value_anywhere_is_read_or_refused_in_one_line(data, value):
    raw = yaml_files.load_yaml(SHIPPED, dict)
    place = raw
    while True:
        key = data.draw(st.sampled_from(sorted(place)))
        if isinstance(place[key], dict) and data.draw(st.booleans()):
            place = place[key]
            continue
        place[key] = value
        break
    try:
        evaluations.evaluations(validate.check(raw))
    except yaml_files.ConfigError as error:
        assert "\n" not in str(error)


def test_changing_one_hyperparameter_changes_only_its_runs_fingerprints(tmp_path):
    before = runs_.runs(validate.read(SHIPPED))
    after = runs_.runs(validate.read(changed(tmp_path, "clip_range: 1e-2", "clip_range: 0.5")))
    differing = {name for name in before if before[name].describe() != after[name].describe()}
    assert differing == {name for name, run in before.items() if run.method == "tafs_grpo"}


def variant(name: str, **methods: Any) -> runs_.Run:
    raw = yaml_files.load_yaml(SHIPPED, dict)
    raw["methods"] |= methods
    for scale in raw["scales"].values():
        scale["methods"] = {}
        scale["prompts_per_iteration"] = 8 * scale.get("processes", 1)
    raw["experiments"]["table2"]["methods"] = [name]
    return runs_.runs(validate.check(raw))[f"{name}.preference.shapes-flux.0"]


def test_a_variant_starts_from_the_hyperparameters_of_the_one_it_names():
    run = variant(
        "second",
        tafs_grpo={"learning_rate": 3e-4, "updates": 2},
        first={"method": "tafs_grpo", "updates": 4, "n_adv": 2},
        second={"method": "first", "n_adv": 3},
    )
    assert run.method == "tafs_grpo"
    assert run.hyperparameters == {"learning_rate": 3e-4, "updates": 4, "n_adv": 3}


def test_what_a_scale_says_of_a_method_holds_there_and_for_its_variants():
    raw = yaml_files.load_yaml(SHIPPED, dict)
    raw["methods"]["tafs_grpo"] = {"learning_rate": 1e-4, "weight_decay": 0.5}
    raw["scales"]["shapes"]["methods"] = {"tafs_grpo": {"learning_rate": 5e-4}}
    runs = runs_.runs(validate.check(raw))
    for variant in ("tafs_grpo", "tafs_n_annealed_1"):
        found = runs[f"{variant}.preference.shapes-flux.0"].hyperparameters
        assert (found["learning_rate"], found["weight_decay"]) == (5e-4, 0.5)
    smoke = runs_.runs(validate.check({**raw, "scale": "smoke"}))
    found = smoke["tafs_grpo.preference.shapes-flux.0"].hyperparameters
    assert (found["learning_rate"], found["weight_decay"]) == (2e-3, 0.5)


def test_variants_that_name_each_other_are_refused():
    with pytest.raises(yaml_files.ConfigError, match="methods.a: method: a -> b -> a leads round"):
        variant("a", a={"method": "b"}, b={"method": "a"})


def test_reading_the_plan_imports_no_model_library():
    """A mistake in config.yaml is told before torch or anything built on it is imported."""
    code = (
        "import sys; from tafs import workflow; workflow.read({}); "
        "slow = {'torch', 'diffusers', 'transformers', 'mlflow', 'pandas'}; "
        "sys.exit(bool(slow & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_one_more_method_joins_the_tables_that_have_the_base_models():
    settings = validate.with_method(validate.read(SHIPPED), "step_distillation")
    names = set(runs_.runs(settings)) - set(runs_.runs(validate.read(SHIPPED)))
    assert names == {f"step_distillation.preference.shapes-flux.{seed}" for seed in (0, 1, 2)}
    joined = {
        table["name"]
        for table in tables.tables(settings)
        if "step_distillation" in [row["variant"] for row in table["rows"]]
    }
    assert joined == {"table1", "table2", "equal_compute", "gains"}


@pytest.mark.parametrize("name", ["nothing", "../x", "a;b"])
def test_a_method_that_is_not_there_cannot_join(name):
    with pytest.raises(yaml_files.ConfigError, match="--config method"):
        validate.with_method(validate.read(SHIPPED), name)


def test_what_runs_there_are_changes_no_run(tmp_path):
    """One more seed or experiment must not train again what is there."""
    before = runs_.runs(validate.read(SHIPPED))
    after = runs_.runs(validate.read(changed(tmp_path, "seeds: [0, 1, 2]", "seeds: [0, 1, 2, 3]")))
    assert len(after) > len(before)
    assert all(after[name].describe() == before[name].describe() for name in before)


def test_rewards_without_gradients_are_refused_to_methods_that_need_them(tmp_path):
    path = changed(tmp_path, "tasks: [preference]", "tasks: [composition]")
    six = "[dance_grpo, mix_grpo, flow_grpo, rg_lcd, reward_instruct, tafs_grpo]"
    assert six in path.read_text()
    path.write_text(path.read_text().replace(six, "[reward_instruct]"))
    with pytest.raises(
        yaml_files.ConfigError, match="'reward_instruct' needs .*'geneval'.* has none"
    ):
        validate.read(path)


def test_every_kind_of_table_has_a_function_that_builds_it():
    assert set(get_args(schema.Kind)) == set(table_kinds.BUILD)


def test_a_method_that_costs_nothing_or_does_not_say_what_is_refused_in_one_line(monkeypatch):
    raw = yaml_files.load_yaml(SHIPPED, dict)
    flow_grpo = registry.method_class("flow_grpo")
    for cost, problem in (
        (0, "its `forward_equivalents` is 0; it must be above 0"),
        (None, "define `forward_equivalents`"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(flow_grpo, "cost" if cost == 0 else "nfe_old", cost)
            with pytest.raises(
                yaml_files.ConfigError, match=f"methods.flow_grpo: .*{problem}"
            ) as caught:
                validate.check(raw)
        assert "\n" not in str(caught.value)


# -- seeds -----------------------------------------------------------------------------------------


def test_more_seeds_add_runs_and_change_none_that_is_there():
    before, after = validate.read(SHIPPED), graph.read({"seeds": 5}, SHIPPED).settings
    old, new = runs_.runs(before), runs_.runs(after)
    trained = {name.rpartition(".")[0] for name, run in old.items() if run.trained}
    bases = {name for name, run in old.items() if not run.trained}
    assert set(new) == bases | {f"{name}.{seed}" for name in trained for seed in range(5)}
    assert all(new[name].describe() == old[name].describe() for name in old)
    judged = evaluations.evaluations(after)
    assert all(judged[name] == how for name, how in evaluations.evaluations(before).items())


def test_fewer_seeds_leave_every_table_its_first():
    runs = graph.read({"seeds": 1}, SHIPPED).runs
    assert {run.seed for run in runs.values()} == {0}
    assert {run.variant for run in runs.values()} == {
        run.variant for run in runs_.runs(validate.read(SHIPPED)).values()
    }


def test_seeds_are_given_to_the_active_scale_alone():
    found = graph.read({"seeds": 4, "scale": "smoke"}, SHIPPED).settings
    assert found.scales["smoke"].seeds == found.scales["smoke"].ablation_seeds == (0, 1, 2, 3)
    assert found.scales["shapes"] == validate.read(SHIPPED).scales["shapes"]


@pytest.mark.parametrize("count", [0, -1, 1001, 2.5, "x", "3", True, None, [1]])
def test_what_is_no_number_of_seeds_is_refused_in_one_line(count):
    with pytest.raises(yaml_files.ConfigError) as caught:
        graph.read({"seeds": count}, SHIPPED)
    assert str(caught.value) == f"--config seeds={count}: give a number from 1 to 1000"


def test_seeds_that_reach_the_searchs_are_refused_in_one_line(tmp_path):
    path = changed(tmp_path, "  seed: 1000", "  seed: 5")
    assert len(graph.read({"seeds": 5}, path).runs) > 0
    with pytest.raises(yaml_files.ConfigError) as caught:
        graph.read({"seeds": 6}, path)
    problem = "tuning.seed: 5 is one of the tables' seeds; choose another"
    assert str(caught.value) == f"--config seeds=6: {problem}"


# -- equal compute ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "cost", "snapshots", "iteration"),
    [
        # 17 iterations of TAFS-GRPO cost 221; a quarter, a half, three quarters and all of it pay
        # for 1.97, 3.9, 5.9 and 7.9 iterations at 28.
        ("flow_grpo", 28, (1, 3, 5, 7), 7),
        # 0.82, which is one all the same, 1.6, 2.5 and 3.3.
        ("dance_grpo", 67, (1, 2, 3), 3),
        # 4.25, 8.5 and 12.75; all of it is the whole training.
        ("tafs_grpo", 13, (4, 8, 12), 17),
        # 5.5, 11.05, 16.6, and 22.1 where training ends after 17.
        ("reward_instruct", 10, (5, 11, 16), 17),
    ],
)
def test_models_are_kept_where_shares_of_the_references_compute_end(
    variant, cost, snapshots, iteration
):
    settings = validate.read(SHIPPED, {"scale": "shapes"})
    assert settings.active.iterations == 17
    run = runs_.runs(settings)[f"{variant}.preference.shapes-flux.0"]
    assert run.describe()["forward_equivalents"] == cost
    assert run.snapshots == snapshots
    assert run.describe()["snapshots"] == list(snapshots)
    table = next(t for t in tables.tables(settings) if t["kind"] == "compute")
    [row] = [row for row in table["rows"] if row["variant"] == variant]
    assert row["iteration"] == iteration


def test_snapshots_are_the_last_iterations_that_the_reference_pays_for():
    settings = validate.read(SHIPPED, {"scale": "shapes"})
    runs = runs_.runs(settings)
    whole = runs["tafs_grpo.preference.shapes-flux.0"].describe()["forward_equivalents"] * 17
    for run in runs.values():
        cost = Fraction(run.describe()["forward_equivalents"])
        paid = {
            max(n for n in range(1, 18) if n == 1 or n * cost <= Fraction(share) * Fraction(whole))
            for share in runs_.MARKS
        }
        assert set(run.snapshots) == (paid - {17} if run.trained else set())
        assert list(run.snapshots) == sorted(run.snapshots)


def test_a_share_that_pays_for_no_iteration_keeps_the_first():
    """Two iterations of TAFS-GRPO cost 26 and one of DanceGRPO 67."""
    runs = runs_.runs(validate.read(SHIPPED, {"scale": "smoke"}))
    assert runs["dance_grpo.preference.shapes-flux.0"].snapshots == (1,)


def test_another_reference_is_another_measure(tmp_path):
    path = changed(tmp_path, "reference: tafs_grpo", "reference: flow_grpo")
    runs = runs_.runs(validate.read(path, {"scale": "shapes"}))
    assert runs["flow_grpo.preference.shapes-flux.0"].snapshots == (4, 8, 12)
    # A quarter of 17 x 28 pays for 9.2 iterations at 13, and a half for more than there are.
    assert runs["tafs_grpo.preference.shapes-flux.0"].snapshots == (9,)


# -- how runs are judged ---------------------------------------------------------------------------


def setting(sampler: str, nfe: int, images: int, iteration: int | None = None) -> dict[str, Any]:
    return {"sampler": sampler, "nfe": nfe, "iteration": iteration, "images_per_prompt": images}


@pytest.fixture(scope="module")
def judged() -> dict[str, dict[str, Any]]:
    return evaluations.evaluations(validate.read(SHIPPED, {"scale": "shapes"}))


@pytest.mark.parametrize(
    ("run", "sampler"),
    [
        ("tafs_n_adv_2.preference.shapes-flux.0", "anneal"),
        ("tafs_grpo.clip_only.shapes-flux.0", "anneal"),
        ("tafs_without_annealing.preference.shapes-flux.0", "ode"),
    ],
)
def test_a_run_that_no_curve_needs_is_judged_at_its_tables_steps_alone(judged, run, sampler):
    assert judged[run]["settings"] == [setting(sampler, 4, images=4)]


def test_a_run_of_the_curves_is_judged_at_their_steps_on_fewer_images(judged):
    """And at its tables' steps on all of them, also after equal compute."""
    curve = [setting("ode", n, images=4 if n == 4 else 1) for n in range(1, 9)]
    kept = [setting("ode", 4, images=4 if n == 7 else 1, iteration=n) for n in (1, 3, 5, 7)]
    assert judged["flow_grpo.preference.shapes-flux.0"]["settings"] == curve + kept


def test_a_table_of_several_steps_judges_its_runs_at_each(judged):
    settings = judged["tafs_grpo.composition.shapes-sd3.0"]["settings"]
    assert [s["nfe"] for s in settings if s["images_per_prompt"] == 4] == [4, 8]
    assert {s["iteration"] for s in settings} == {None}


def test_a_base_model_is_judged_at_its_full_steps_by_eulers(judged):
    for name in ("base.shapes.shapes-sd3", "base.shapes.shapes-flux"):
        settings = judged[name]["settings"]
        assert {s["sampler"] for s in settings} == {"ode"}
        assert [s["nfe"] for s in settings if s["images_per_prompt"] == 4] == [4, 28]


def test_models_at_equal_compute_are_judged_without_a_curve_too(tmp_path):
    """The last iteration is the final model, and any other a snapshot."""
    every = "[table1, table2, equal_compute, gains, table3, table4, table5, table6, table7]"
    path = changed(tmp_path, every, "[equal_compute]")
    path.write_text(path.read_text().replace("    figures: {compute: compute}\n", ""))
    found = evaluations.evaluations(validate.read(path, {"scale": "shapes"}))
    assert found["flow_grpo.preference.shapes-flux.0"]["settings"] == [setting("ode", 4, 4, 7)]
    assert found["tafs_grpo.preference.shapes-flux.0"]["settings"] == [setting("anneal", 4, 4)]


def test_a_base_model_of_correlations_alone_is_not_judged(tmp_path):
    every = "[table1, table2, equal_compute, gains, table3, table4, table5, table6, table7]"
    path = changed(tmp_path, every, "[table7]")
    plan = graph.read({"scale": "shapes"}, path)
    [name] = plan.runs
    assert name == "base.shapes.shapes-flux"
    assert json.loads(plan.evaluation(name))["settings"] == []
    assert plan.files("scores.parquet", judged=True) == []
    assert plan.correlated == [
        "results/shapes/runs/base.shapes.shapes-flux/trajectory_rewards.parquet"
    ]


@pytest.mark.parametrize("key", sorted(schema.Evaluation.model_fields))
def test_how_runs_are_judged_changes_no_training(key):
    """run.json is the same: what it says is all that training reads."""
    raw = yaml_files.load_yaml(SHIPPED, dict)
    before = validate.check(raw)
    value = raw["scales"]["shapes"]["evaluation"].get(key)
    other = [1, 2] if isinstance(value, list) else (value or 0) + 1
    if key == "server":  # the embedded world has none
        with pytest.raises(
            yaml_files.ConfigError, match="server: the world 'shapes' needs no server"
        ):
            raw["scales"]["shapes"]["evaluation"][key] = ["serve"]
            validate.check(raw)
        return
    raw["scales"]["shapes"]["evaluation"][key] = other
    after = validate.check(raw)
    old, new = runs_.runs(before), runs_.runs(after)
    assert {n: r.describe() for n, r in new.items()} == {n: r.describe() for n, r in old.items()}
    assert evaluations.evaluations(after) != evaluations.evaluations(before)
