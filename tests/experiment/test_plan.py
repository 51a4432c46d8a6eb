"""The plan: which runs, tables and evaluations config.yaml expands into."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from tafs import experiment
from tafs.common.yaml_files import ConfigError, load_yaml
from tafs.experiment import EvalSpec, Plan, ReportSpec, RunSpec, TableSpec
from tafs.experiment.schema import FIGURES, Evaluation, Kind
from tafs.experiment.specs import EvalSetting
from tafs.experiment.validate import check
from tafs.models import catalog
from tafs.report import figures, table_kinds

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "config.yaml"


def plan_with(**scale: Any) -> Plan:
    """The plan of the scale `shapes` with changed settings."""
    raw = load_yaml(SHIPPED, dict)
    raw["scales"]["shapes"] |= scale
    return experiment.expand(check(raw))


def table(plan: Plan, name: str) -> TableSpec:
    (found,) = (table for table in plan.tables if table.name == name)
    return found


@pytest.fixture(scope="module")
def shapes() -> Plan:
    return experiment.load({"scale": "shapes"}, SHIPPED)


@pytest.mark.parametrize(
    "scale", ["smoke", "shapes", "shapes-long", "field", "words", "one-gpu", "paper", "paper-trial"]
)
def test_every_scale_expands_into_consistent_specs(scale: str, tmp_path: Path) -> None:
    plan = experiment.load({"scale": scale}, SHIPPED)
    for spec in [*plan.runs.values(), *plan.evaluations.values(), plan.report]:
        (tmp_path / "spec.json").write_text(spec.to_json(), encoding="utf-8")
        assert type(spec).read(tmp_path / "spec.json") == spec
    assert list(plan.evaluations) == list(plan.runs)
    assert all(run.name == name and run.scale == scale for name, run in plan.runs.items())
    assert [t.name for t in plan.tables] == list(plan.config.active.experiments)
    assert {name for t in plan.tables for name in t.runs} == set(plan.runs)
    for found in plan.tables:
        # Every cell is scored: the row's steps, sampler and snapshot are settings of each run.
        for row in found.rows if found.kind != "correlation" else ():
            for name in row.runs:
                run = plan.runs[name]
                at = row.iteration if row.iteration in run.snapshots else None
                scored = {(s.sampler, s.nfe, s.iteration) for s in plan.evaluations[name].settings}
                assert (row.sampler, row.nfe, at) in scored
                assert (run.variant, run.task) == (row.variant, row.task)
        # A label belongs to one system.
        assert len({row.label for row in found.rows}) == len({row.runs for row in found.rows})


@pytest.mark.parametrize("method", ["rg_lcd", "reward_instruct", "draft_k", "refl"])
def test_the_words_refuse_a_method_that_differentiates_rewards_by_name(method: str) -> None:
    assert experiment.load({"scale": "words"}, SHIPPED).tables[0].rows
    message = f"method={method}: .*'{method}' needs the rewards' gradients, but 'ocr' is not diff"
    with pytest.raises(ConfigError, match=message):
        experiment.load({"scale": "words", "method": method}, SHIPPED)


def test_runs_are_named_by_method_task_backbone_and_seed(shapes: Plan) -> None:
    runs = shapes.runs
    assert {"tafs_grpo.preference.shapes-flux.2", "flow_grpo.preference.shapes-flux.0"} < set(runs)
    assert {"base.shapes.shapes-sd3", "base.shapes.shapes-flux"} < set(runs)
    # Two base models, Table 2's six methods with three seeds, and with one seed Table 1's two
    # methods on two base models, six ablations and two more tasks.
    assert len(runs) == 2 + 6 * 3 + 2 * 2 + 6 + 2


def test_equal_compute_pays_for_few_iterations_of_the_fields_costly_methods() -> None:
    plan = experiment.load({"scale": "field"}, SHIPPED)
    iterations = {row.variant: row.iteration for row in table(plan, "field_compute").rows}
    expected = dict(draft_k=17, online_dpo=12, awm=5, diffusion_nft=4, tempflow_grpo=4, g2rpo=1)
    assert iterations["tafs_grpo"] == plan.config.active.iterations == 17
    assert expected.items() <= iterations.items()


def test_rows_are_the_untrained_models_and_then_the_methods_with_all_seeds(shapes: Plan) -> None:
    rows = [(row.label, row.nfe, row.rule) for row in table(shapes, "table1").rows]
    models = ("shapes-sd3", "shapes-flux")
    assert rows[:4] == [(model, nfe, False) for model in models for nfe in (28, 4)]
    assert rows[4:] == [
        (f"{title} + {model}", nfe, (title, nfe) == ("Step distillation", 4))
        for model in models
        for title in ("Step distillation", "TAFS-GRPO")
        for nfe in (4, 8)
    ]
    (tafs,) = (row for row in table(shapes, "table2").rows if row.variant == "tafs_grpo")
    assert tafs.runs == tuple(f"tafs_grpo.preference.shapes-flux.{seed}" for seed in range(3))
    assert [row.label for row in table(shapes, "table4").rows] == ["1", "3", "5"]
    assert [row.label for row in table(shapes, "table6").rows][1:] == ["PickScore-only", "Combined"]


def test_the_papers_table_compares_published_models_and_leaves_out_excluded_methods() -> None:
    plan = experiment.load({"scale": "paper"}, SHIPPED)
    found = table(plan, "table1")
    assert found.excluded_methods == ("step_distillation",)
    compared = [row for row in found.rows if row.sampler == "pipeline"]
    assert [row.backbone for row in compared] == list(plan.config.active.models)
    assert all(row.nfe == row.full_steps == catalog.read()[row.backbone].steps for row in compared)
    labels = {row.label for row in found.rows if row.variant == "tafs_grpo"}
    assert labels == {"TAFS-GRPO + SD3.5M", "TAFS-GRPO + Flux"}


def test_equal_labels_of_different_systems_name_the_variant() -> None:
    raw = load_yaml(SHIPPED, dict)
    raw["experiments"]["table5"]["labels"] = {"tafs_n_adv_2": "2", "tafs_grpo": "2"}
    found = table(experiment.expand(check(raw)), "table5")
    assert [row.label for row in found.rows][1:] == ["2 (tafs_n_adv_2)", "2 (tafs_grpo)"]


def test_rewards_are_summed_in_the_order_of_their_names(shapes: Plan) -> None:
    assert all(list(run.rewards) == sorted(run.rewards) for run in shapes.runs.values())


def test_hyperparameters_come_from_the_variant_the_scale_and_what_it_extends() -> None:
    raw = load_yaml(SHIPPED, dict)
    raw["methods"] |= {
        "tafs_grpo": {"learning_rate": 1e-4, "weight_decay": 0.5, "updates": 2},
        "first": {"extends": "tafs_grpo", "updates": 4, "n_adv": 2},
        "second": {"extends": "first", "n_adv": 3},
    }
    raw["scales"]["shapes"]["methods"]["tafs_grpo"] = {"learning_rate": 5e-4}
    raw["experiments"]["table2"]["methods"] = ["second"]
    run = experiment.expand(check(raw)).runs["second.preference.shapes-flux.0"]
    assert run.method == "tafs_grpo"
    expected = {"learning_rate": 5e-4, "weight_decay": 0.5, "updates": 4, "n_adv": 3}
    assert run.hyperparameters == expected


def test_a_normalised_task_normalises_the_rewards_of_policy_gradient_methods(shapes: Plan) -> None:
    found = {
        (run.method, run.task): run.hyperparameters.get("normalize_rewards")
        for run in shapes.runs.values()
        if run.trained and run.task in ("composition", "preference")
    }
    assert found["tafs_grpo", "composition"] is True
    assert found["tafs_grpo", "preference"] is None
    assert found["rg_lcd", "composition"] is None  # it differentiates the plain sum


def test_a_hyperparameter_changes_only_the_runs_that_use_it(shapes: Plan) -> None:
    methods = {**load_yaml(SHIPPED, dict)["scales"]["shapes"]["methods"]}
    after = plan_with(methods=methods | {"tafs_grpo": {"clip_range": 0.5}}).runs
    differing = {name for name in after if after[name] != shapes.runs[name]}
    assert differing == {name for name, run in after.items() if run.method == "tafs_grpo"}


def test_an_added_method_joins_the_tables_that_have_the_base_models(shapes: Plan) -> None:
    plan = experiment.load({"scale": "shapes", "method": "step_distillation"}, SHIPPED)
    assert plan.added_method == "step_distillation"
    assert set(plan.runs) - set(shapes.runs) == {
        f"step_distillation.preference.shapes-flux.{seed}" for seed in (0, 1, 2)
    }
    joined = {t.name for t in plan.tables if "step_distillation" in [r.variant for r in t.rows]}
    assert joined == {"table1", "table2", "equal_compute", "gains", "one_sampler"}


def test_more_seeds_add_runs_and_change_none(shapes: Plan) -> None:
    more = experiment.load({"scale": "shapes", "seeds": 5}, SHIPPED)
    trained = {name.rpartition(".")[0] for name, run in shapes.runs.items() if run.trained}
    bases = {name for name, run in shapes.runs.items() if not run.trained}
    assert set(more.runs) == bases | {f"{name}.{seed}" for name in trained for seed in range(5)}
    assert all(more.runs[name] == run for name, run in shapes.runs.items())
    assert all(more.evaluations[name] == spec for name, spec in shapes.evaluations.items())
    fewer = experiment.load({"scale": "shapes", "seeds": 1}, SHIPPED)
    assert {run.seed for run in fewer.runs.values()} == {0}


@pytest.mark.parametrize(
    ("variant", "cost", "snapshots", "iteration"),
    [
        # 17 iterations of TAFS-GRPO cost 221; a quarter, a half, three quarters and all of it pay
        # for 1.97, 3.9, 5.9 and 7.9 iterations at 28.
        ("flow_grpo", 28, (1, 3, 5, 7), 7),
        # 0.82, which is raised to one, 1.6, 2.5 and 3.3.
        ("dance_grpo", 67, (1, 2, 3), 3),
        # 4.25, 8.5 and 12.75; all of it pays for the whole training.
        ("tafs_grpo", 13, (4, 8, 12), 17),
        # 5.5, 11.05, 16.6, and 22.1, which is limited to 17.
        ("reward_instruct", 10, (5, 11, 16), 17),
    ],
)
def test_snapshots_are_kept_where_shares_of_the_references_compute_end(
    shapes: Plan, variant: str, cost: float, snapshots: tuple[int, ...], iteration: int
) -> None:
    run = shapes.runs[f"{variant}.preference.shapes-flux.0"]
    assert (run.iterations, run.forward_equivalents, run.snapshots) == (17, cost, snapshots)
    (row,) = (r for r in table(shapes, "equal_compute").rows if r.variant == variant)
    assert row.iteration == iteration


def test_another_compute_reference_gives_another_budget() -> None:
    raw = load_yaml(SHIPPED, dict) | {"compute_reference": "flow_grpo"}
    runs = experiment.expand(check(raw)).runs
    assert runs["flow_grpo.preference.shapes-flux.0"].snapshots == (4, 8, 12)
    # A quarter of 17 x 28 pays for 9.2 iterations at 13, and a half for more than 17.
    assert runs["tafs_grpo.preference.shapes-flux.0"].snapshots == (9,)


def setting(sampler: str, nfe: int, images: int, iteration: int | None = None) -> EvalSetting:
    return EvalSetting(sampler=sampler, nfe=nfe, images_per_prompt=images, iteration=iteration)


CURVE = [setting("best", n, images=4 if n == 4 else 1) for n in range(1, 9)]
KEPT = [setting("best", 4, images=4 if n == 7 else 1, iteration=n) for n in (1, 3, 5, 7)]

COMMON = setting("ode_uniform", 4, 4)
FULL = [setting("best", 28, 4), setting("ode_uniform", 28, 4)]


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ("tafs_n_adv_2.preference.shapes-flux.0", [setting("best", 4, 4)]),
        ("tafs_grpo.clip_only.shapes-flux.0", [setting("best", 4, 4)]),
        # The points of curves are evaluated on fewer images, and so are snapshots.
        ("flow_grpo.preference.shapes-flux.0", [*CURVE, COMMON, *KEPT]),
        ("base.shapes.shapes-flux", [*CURVE, FULL[0], COMMON, FULL[1]]),
    ],
)
def test_a_run_is_evaluated_with_what_its_tables_and_figures_show(
    shapes: Plan, run: str, expected: list[EvalSetting]
) -> None:
    assert list(shapes.evaluations[run].settings) == expected


def test_equal_compute_evaluates_snapshots_without_a_figure_too() -> None:
    raw = load_yaml(SHIPPED, dict)
    raw["scales"]["shapes"]["experiments"] = ["equal_compute"]
    raw["experiments"]["equal_compute"]["figures"] = {}
    found = experiment.expand(check(raw)).evaluations
    assert found["flow_grpo.preference.shapes-flux.0"].settings == (setting("best", 4, 4, 7),)
    assert found["tafs_grpo.preference.shapes-flux.0"].settings == (setting("best", 4, 4),)


def test_a_base_model_of_correlations_only_has_no_images_to_score() -> None:
    plan = plan_with(experiments=["table7"])
    assert list(plan.runs) == ["base.shapes.shapes-flux"]
    assert plan.evaluations["base.shapes.shapes-flux"].settings == ()


def test_the_papers_images_per_prompt_depend_on_the_prompts_and_a_server_scores_them() -> None:
    plan = experiment.load({"scale": "paper"}, SHIPPED)
    for name, run in plan.runs.items():
        evaluation = plan.evaluations[name]
        assert evaluation.served
        most = {"pickapic": 1, "geneval": 4}[run.prompts]
        assert max(s.images_per_prompt for s in evaluation.settings) == most


def test_one_gpu_trains_all_methods_in_one_process_and_no_server_scores_their_images() -> None:
    plan = experiment.load({"scale": "one-gpu"}, SHIPPED)
    trained = {run.variant for run in plan.runs.values() if run.training}
    assert trained == set(plan.config.experiments["table2"].methods)
    assert plan.config.active.processes == 1
    assert not any(evaluation.served for evaluation in plan.evaluations.values())
    untrained = [row for row in table(plan, "table1").rows if row.variant == "base"]
    assert {row.backbone for row in untrained} == set(plan.config.active.model_roles.values())
    assert {row.nfe for row in untrained} == {8, 40, 50}  # few, and each model's own


# These say who computes the scores, and not which.
RUNNERS = {"server", "judge", "judges", "processes"}


@pytest.mark.parametrize("key", sorted({*Evaluation.model_fields} - RUNNERS))
def test_settings_of_the_evaluation_change_no_training(shapes: Plan, key: str) -> None:
    evaluation = dict(load_yaml(SHIPPED, dict)["scales"]["shapes"]["evaluation"])
    value = evaluation.get(key)
    others = {"samplers": ["ode"], "common_sampler": "anneal", "curve_nfe": [1, 2]}
    others |= {"correlation_nfe": 3, "metrics": ["saturation"]}
    evaluation[key] = others[key] if key in others else (value or 0) + 1
    after = plan_with(evaluation=evaluation)
    assert after.runs == shapes.runs
    assert after.evaluations != shapes.evaluations


def test_an_optional_metric_is_computed_where_the_scale_or_a_reward_names_it(shapes: Plan) -> None:
    assert not any("saturation" in key for e in shapes.evaluations.values() for key in e.weights)
    evaluation = dict(load_yaml(SHIPPED, dict)["scales"]["shapes"]["evaluation"])
    named = plan_with(evaluation=evaluation | {"metrics": ["saturation"]})
    for found in named.evaluations.values():
        assert found.optional_metrics == ("saturation",)
        assert "rewards.saturation" in found.weights
    content = load_yaml(SHIPPED, dict)
    content["tasks"]["preference"]["rewards"] = {"sharpness": 1.0}
    rewarded = experiment.expand(check(content))
    assert {e.optional_metrics for e in rewarded.evaluations.values()} == {("sharpness",)}


@pytest.mark.parametrize("judge", ["unifiedreward", "unifiedreward2"])
def test_evaluations_compute_the_served_metric_that_the_scale_names(judge: str) -> None:
    content = load_yaml(SHIPPED, dict)
    content["scales"]["paper"]["evaluation"]["judge"] = judge
    plan = experiment.expand(check(content | {"scale": "paper"}))
    for found in plan.evaluations.values():
        assert found.served and found.judge == judge
        assert ("judge" in found.to_json()) == (judge != "unifiedreward")


@pytest.mark.parametrize(
    ("kind", "content", "problem"),
    [
        (RunSpec, '{"name": "a", "settings": {"world": "shapes"}}', "unknown key 'settings'"),
        (EvalSpec, '{"full": 28}', "unknown key 'full'"),
        (ReportSpec, '{"tables": []}', "missing key 'scale'"),
        (RunSpec, "{", "invalid JSON"),
    ],
)
def test_a_file_of_another_version_is_refused_in_one_line_with_the_remedy(
    kind: type[RunSpec], content: str, problem: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.json"
    with pytest.raises(FileNotFoundError, match="run.json: not found; snakemake writes it from"):
        kind.read(file)
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=problem) as caught:
        kind.read(file)
    text = str(caught.value)
    assert text.startswith(f"{file}: ") and "\n" not in text
    assert text.endswith("or choose another with --config results=FOLDER")


def test_every_kind_of_table_and_figure_can_be_built() -> None:
    assert set(get_args(Kind)) == set(table_kinds.BUILD)
    assert tuple(figures.DRAW) == FIGURES
