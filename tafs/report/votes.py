"""Win rates from the votes that people cast blindly in the report's gallery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

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


def record(files: Sequence[Path]) -> dict[str, Any]:
    """Win rates of every system and of every pair, as shares; the best systems come first.

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
    rates = {system: _rate(of[system], system) for system in systems}
    ranked = sorted(systems, key=lambda system: -rates[system]["rate"])
    pairs = []
    for place, one in enumerate(ranked):
        for other in ranked[place + 1 :]:
            if both := [vote for vote in of[one] if other in (vote.left, vote.right)]:
                pairs.append({"system": one, "over": other, **_rate(both, one)})
    return {
        "scale": scales.pop(),
        "votes": len(votes),
        "prompts": len({vote.prompt for vote in votes}),
        "systems": [{"system": system, **rates[system]} for system in ranked],
        "pairs": pairs,
    }


def _rate(votes: Sequence[Vote], system: str) -> dict[str, Any]:
    found = win_rate(votes, system)
    known = np.isfinite(found.low)
    low, high = (found.low, found.high) if known else (None, None)
    return {"votes": len(votes), "rate": found.value, "low": low, "high": high}


def summary(found: Mapping[str, Any]) -> str:
    """The text of a `record`, in percent."""
    lines = [f"{found['votes']} votes on {found['prompts']} prompts; ties count half"]
    lines += [f"{one_line(one['system'])}: {_percent(one)}" for one in found["systems"]]
    lines += [
        f"  {one_line(one['system'])} over {one_line(one['over'])}: {_percent(one)}"
        for one in found["pairs"]
    ]
    return "\n".join(lines)


def _percent(found: Mapping[str, Any]) -> str:
    rate, low, high, votes = (found[key] for key in ("rate", "low", "high", "votes"))
    interval = "" if low is None else f" [{100 * low:.0f}, {100 * high:.0f}]"
    return f"{100 * rate:.0f} %{interval} of {votes} vote{'s' * (votes != 1)}"
