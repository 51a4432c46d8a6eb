"""`tafs doctor` and `tafs new`: this machine, and parts of your own."""

from __future__ import annotations

from typing import Annotated

import typer

from tafs.cli import output
from tafs.cli.app import app, command, new_app
from tafs.cli.options import JsonOption, ResultsOption, ScaleOption, overrides


@command(app, ["tafs doctor", "tafs doctor --scale paper --json"])
def doctor(
    scale: ScaleOption = None, results: ResultsOption = None, json_wanted: JsonOption = False
) -> int:
    """Check what a scale needs of this machine.

    The exit code is 1 if something is missing.
    """
    from tafs.cli import doctor as checks

    found = list(checks.checks(overrides(scale=scale, results=results)))
    problems = [check for check in found if check.state == checks.PROBLEM]
    if json_wanted:
        output.as_json({"ok": not problems, "checks": [check._asdict() for check in found]})
        return int(bool(problems))
    output.table(["check", "state", "found"], [check[:3] for check in found])
    print(f"\n{len(problems)} problem{'s' * (len(problems) != 1)}")
    for check in problems:
        print(f"  {check.name}: {check.remedy}")
    return int(bool(problems))


new = new_app(
    "new",
    "Write a method, reward, prompt set or model that works.",
    ["tafs new method my_method", "tafs new model my-model --pipeline SanaPipeline"],
)
app.add_typer(new)
UnderscoreName = Annotated[
    str, typer.Argument(metavar="NAME", help="Lower-case letters, digits and _.")
]


@command(new, ["tafs new method my_method"])
def new_method(name: UnderscoreName) -> int:
    """Write baselines/NAME.py, a method that runs as it is."""
    from tafs.methods import template

    print(template.create(name))
    return 0


@command(new, ["tafs new reward my_reward"])
def new_reward(name: UnderscoreName) -> int:
    """Write tafs/rewards/plugins/NAME.py, a reward that works."""
    from tafs.rewards import template

    print(template.create(name))
    return 0


@command(new, ["tafs new prompts my_prompts"])
def new_prompts(name: UnderscoreName) -> int:
    """Write tafs/data/plugins/NAME.py and NAME.txt, a prompt set that works."""
    from tafs.data import template

    print(template.create(name))
    return 0


@command(new, ["tafs new model my-model", "tafs new model my-model --pipeline SanaPipeline"])
def new_model(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Lower-case, with hyphens.")],
    pipeline: Annotated[
        str | None,
        typer.Option("--pipeline", help="A diffusers class; default: StableDiffusion3Pipeline."),
    ] = None,
) -> int:
    """Write tafs/models/plugins/NAME.py, a model that runs as it is."""
    from tafs.models import template

    print(template.create(name, pipeline or template.PIPELINE))
    return 0
