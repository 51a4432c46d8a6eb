"""The page's cards: methods, models, metrics and prompts, with versions and licences."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tafs.assets import lockfile
from tafs.common.yaml_files import load_yaml
from tafs.data.prompt_sets import PLUGINS as PROMPT_SETS
from tafs.methods import registry
from tafs.models import catalog
from tafs.report.results import Report, Result
from tafs.rewards.metrics import METRICS, PLUGINS
from tafs.shapes.cards import SCORERS

CITATION = Path("CITATION.cff")  # beside config.yaml
OWN = "Apache-2.0, with this project"  # the licence of embedded material


def read(report: Report) -> dict[str, Any]:
    """The cards of everything that the report's runs use."""
    results = list({r.spec.name: r for t in report.tables for r in t.results}.values())
    methods = dict.fromkeys(r.spec.method for r in results if r.spec.trained)
    used = {name for r in results for name in (*r.spec.rewards, *_metrics(r))}
    return {
        "methods": [_method(name, results) for name in methods],
        "models": [
            _model(name, results) for name in dict.fromkeys(r.spec.backbone for r in results)
        ],
        "metrics": [_metric(name, results) for name in METRICS if name in used],
        "prompts": [
            _prompts(name, results) for name in dict.fromkeys(r.spec.prompts for r in results)
        ],
        "citation": _citation(),
    }


def _metrics(result: Result) -> Iterable[str]:
    return result.scores.metrics() if result.evaluation.settings else ()


def _docstring(file: Path) -> tuple[str, str]:
    """(the first line, the rest) of a module's docstring."""
    text = ast.get_docstring(ast.parse(file.read_bytes())) or ""
    first, _, rest = text.partition("\n")
    return first, rest.strip("\n")


def _method(name: str, results: Sequence[Result]) -> dict[str, Any]:
    summary, text = _docstring(registry.source_file(name))
    specs = [r.spec for r in results if r.spec.method == name]
    costs = sorted({spec.forward_equivalents for spec in specs})
    facts = {
        "Variants": ", ".join(dict.fromkeys(spec.variant for spec in specs)),
        "Forward passes per image and iteration": ", ".join(f"{cost:g}" for cost in costs),
        "Trained on": "; ".join(dict.fromkeys(", ".join(sorted(s.rewards)) for s in specs)),
    }
    return {"name": name, "title": summary, "text": text, "facts": facts}


def _model(name: str, results: Sequence[Result]) -> dict[str, Any]:
    model = catalog.read()[name]
    digests = {r.spec.weights[name] for r in results if name in r.spec.weights}
    facts = {
        "Pipeline": model.pipeline,
        "Steps": str(model.steps),
        "Guidance": "the pipeline's" if model.guidance is None else f"{model.guidance:g}",
        "Licence": model.licence,
        **_published(model.resources if model.assets == "hub" else ()),
        "SHA-256": ", ".join(sorted(digests)),
    }
    return {"name": name, "title": model.title, "text": "", "facts": facts}


def _metric(name: str, results: Sequence[Result]) -> dict[str, Any]:
    metric = METRICS[name]
    embedded = {r.spec.assets.assets for r in results} == {"shapes"} and (
        name in SCORERS or metric.resources
    )
    summary, text = _docstring(PLUGINS.source(name))
    digests = {r.evaluation.weights[name] for r in results if name in r.evaluation.weights}
    rewards = [r.spec.title for r in results if name in r.spec.rewards]
    facts = {
        "Shown as": f"{metric.unit}, {'higher' if metric.higher_is_better else 'lower'} is better",
        "Reward of": "; ".join(dict.fromkeys(rewards)) or "no run; held out",
        "Licence": OWN if embedded else "",
        **({} if embedded else {"Version": metric.version, **_published(metric.resources)}),
        "SHA-256": ", ".join(sorted(digests)),
    }
    if embedded:
        kind = SCORERS.get(name, "Exact: a detector that knows how the scenes are drawn.")
        text = f"Here its embedded counterpart: {kind}\n\n{text}".strip()
    return {
        "name": name,
        "title": metric.title,
        "text": f"{summary}\n\n{text}".strip(),
        "facts": facts,
    }


def _prompts(name: str, results: Sequence[Result]) -> dict[str, Any]:
    judged = [r for r in results if r.spec.prompts == name and r.evaluation.settings]
    scores = judged[0].scores if judged else None
    files = judged[0].spec.prompt_files if judged else ()
    shipped = name in PROMPT_SETS.names()
    summary, text = _docstring(PROMPT_SETS.source(name)) if shipped else (", ".join(files), "")
    digests = {r.spec.weights.get(f"prompts.{name}", "") for r in judged}
    facts = {
        "Held-out prompts": str(len(scores.prompts)) if scores else "",
        "Tasks": ", ".join(dict.fromkeys(scores.tags)).replace("_", " ") if scores else "",
        "SHA-256": ", ".join(sorted(filter(None, digests))),
    }
    return {"name": name, "title": summary, "text": text, "facts": facts}


def _published(resources: Sequence[str]) -> dict[str, str]:
    """Where resources are published, and under which licences."""
    if not resources:
        return {}
    known = lockfile.read()
    entries = [known[name] for name in resources if name in known]
    return {
        "Published": ", ".join(entry.hub or f"github: {entry.github}" for entry in entries),
        "Licences": ", ".join(dict.fromkeys(entry.licence for entry in entries)),
    }


def _citation() -> str:
    """BibTeX of the paper and of this software; "" without CITATION.cff."""
    if not CITATION.is_file():
        return ""
    cited = load_yaml(CITATION, dict)
    paper = cited["preferred-citation"]
    authors = " and ".join(f"{a['family-names']}, {a['given-names']}" for a in paper["authors"])
    return (
        f"@article{{{paper['authors'][0]['family-names'].lower()}{paper['year']},\n"
        f"  title = {{{paper['title']}}},\n"
        f"  author = {{{authors}}},\n"
        f"  journal = {{{paper['identifiers'][0]['value']}}},\n"
        f"  year = {{{paper['year']}}},\n"
        f"  url = {{{paper['url']}}}\n}}\n\n"
        f"@software{{tafs,\n"
        f"  title = {{{cited['title']}}},\n"
        f"  author = {{{{{cited['authors'][0]['name']}}}}},\n"
        f"  version = {{{cited['version']}}},\n"
        f"  license = {{{cited['license']}}}\n}}\n"
    )
