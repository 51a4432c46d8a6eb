"""config.yaml -> an immutable plan of typed specs."""

from tafs.experiment.plan import Plan, expand, load
from tafs.experiment.specs import EvalSpec, ReportSpec, RowSpec, RunSpec, TableSpec

__all__ = ["EvalSpec", "Plan", "ReportSpec", "RowSpec", "RunSpec", "TableSpec", "expand", "load"]
