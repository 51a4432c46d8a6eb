"""Win rates from the votes that people cast blindly in the report's gallery."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tafs.common.errors import one_line
from tafs.common.files import check_readable
from tafs.common.yaml_files import first_problem
from tafs.report import stats
from tafs.report.stats import Estimate


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Vote(_Strict):
    """A vote between two images of one prompt and start noise."""

    prompt: str
    task: str
    nfe: int
    left: str  # the system's key
    right: str
    left_run: str
    right_run: str
    winner: Literal["left", "right", "tie"]

    def share(self, system: str) -> float:
        """What a system gets of the vote: 1, 0 or, of a tie, a half."""
        if self.winner == "tie":
            return 0.5
        return float(getattr(self, self.winner) == system)


class Votes(_Strict):
    """A file of votes, as the page saves it."""

    kind: Literal["tafs votes"]
    scale: str
    votes: tuple[Vote, ...] = Field(min_length=1)


def read(file: Path) -> Votes:
    """The votes of a file.

    Raises:
        FileNotFoundError, ValueError: the file is missing or does not hold votes; names it.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; save votes in the report's gallery")
    check_readable(file)
    try:
        return Votes.model_validate_json(file.read_bytes())
    except ValidationError as error:
        problem = first_problem(error, Votes).removesuffix("; add it")
        raise ValueError(
            f"{file}: is not a file of votes ({problem}); save votes in the report's gallery"
        ) from None


def win_rate(votes: Sequence[Vote], system: str) -> Estimate:
    """The share of its votes that a system wins, and its interval over prompts.

    Votes on one prompt are not independent, so prompts are resampled, each with all its votes.
    """
    by_prompt: dict[str, list[float]] = {}
    for vote in votes:
        by_prompt.setdefault(vote.prompt, []).append(vote.share(system))
    width = max(map(len, by_prompt.values()))
    values = np.full((1, len(by_prompt), width), np.nan)
    for row, shares in enumerate(by_prompt.values()):
        values[0, row, : len(shares)] = shares
    found = stats.mean_interval(values, [""] * len(by_prompt))
    low, high = (float(np.clip(bound, 0, 1)) for bound in (found.low, found.high))
    return found._replace(low=low, high=high)


def summary(files: Sequence[Path]) -> str:
    """Win rates of every system and of every pair, in percent.

    Raises:
        FileNotFoundError, ValueError: see `read`; or the files are of several scales.
    """
    read_files = {file: read(file) for file in files}
    scales = {found.scale for found in read_files.values()}
    if len(scales) > 1:
        raise ValueError(
            f"{', '.join(map(str, files))}: are of the scales {', '.join(sorted(scales))}; "
            "give files of one scale"
        )
    votes = [vote for found in read_files.values() for vote in found.votes]
    systems = sorted({name for vote in votes for name in (vote.left, vote.right)})
    of = {s: [v for v in votes if s in (v.left, v.right)] for s in systems}
    rates = {system: win_rate(of[system], system) for system in systems}
    ranked = sorted(systems, key=lambda system: -rates[system].value)
    lines = [f"{len(votes)} votes on {len({v.prompt for v in votes})} prompts; ties count half"]
    lines += [
        f"{one_line(system)}: {_percent(rates[system], len(of[system]))}" for system in ranked
    ]
    for place, one in enumerate(ranked):
        for other in ranked[place + 1 :]:
            if both := [vote for vote in of[one] if other in (vote.left, vote.right)]:
                rate = _percent(win_rate(both, one), len(both))
                lines.append(f"  {one_line(one)} over {one_line(other)}: {rate}")
    return "\n".join(lines)


def _percent(rate: Estimate, votes: int) -> str:
    known = np.isfinite(rate.low)
    interval = f" [{100 * rate.low:.0f}, {100 * rate.high:.0f}]" if known else ""
    return f"{100 * rate.value:.0f} %{interval} of {votes} vote{'s' * (votes != 1)}"
