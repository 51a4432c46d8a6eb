"""The report of benchmarks/rehearse.py: measurements and the figures derived from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tafs.models.flops import Network


@dataclass(frozen=True)
class Row:
    """The measurements of one method; evaluations and seconds are per image."""

    variant: str
    title: str
    images: int
    nfe_old: float  # network evaluations in sampling
    nfe_theta: float  # network evaluations with gradients in the update
    others: float  # network evaluations without gradients in the update
    sample: float
    reward: float
    update: float
    kl: float  # seconds per iteration of the journal's KL divergence
    peak: float | None  # GiB; None: the device does not report it
    deviation: float | None  # the largest |ratio - 1| of an image; None: the method has no ratio

    @property
    def total(self) -> float:
        return self.sample + self.reward + self.update


@dataclass(frozen=True)
class Setting:
    """What all rows of a report have in common."""

    command: str
    title: str  # of the model
    size: str
    facts: Sequence[str]  # lines about the machine and the options
    network: Network
    peak: float | None  # FLOP/s of the GPU
    share: int  # images of one GPU in the scale's iteration
    iteration: str  # describes an iteration of the scale
    ahead: int  # iterations whose prompts are encoded together
    reference: str  # the variant that the others are compared with
    published: Mapping[str, float]  # seconds of the paper's iteration, by title

    @property
    def trained_cost(self) -> float:
        """Forward passes that cost as much as an evaluation with gradients."""
        return self.network.trained / self.network.forward

    def utilisation(self, evaluations: float, seconds: float) -> float | None:
        """Model FLOP/s utilisation of evaluations, in units of one forward pass."""
        flops = evaluations * self.network.forward
        return None if self.peak is None else flops / seconds / self.peak


NOTES = """\
- s/iteration: {share} images, one GPU's share of an iteration ({iteration}), at the
  measured seconds per image. Not included: the exchange between GPUs ({adapter:.3g} MiB of
  gradients per optimiser step), the text encoders, which run once in {ahead} iterations, and the
  KL divergence in the journal (up to {kl:.3g} s in every fifth iteration).
- Ratios are relative to {reference}.
- MFU: model FLOP/s utilisation, the network's FLOPs over the phase's seconds and the GPU's peak. An
  evaluation counts as one forward pass in sampling and as three in the update; recomputation for
  gradient checkpointing, autoencoder and rewards do not count.
- computed: the update's MFU with the FLOPs that are computed. The base weights are frozen and need
  no gradients, so an evaluation with gradients costs {trained:.2f} forward passes.
- peak GiB: the maximum of allocated tensors in the iteration.
- max abs(ratio - 1): over images and trained steps, before the optimiser's step. It is 0 where the
  update rounds as sampling did.
- A method that draws its number of steps is scaled from the drawn number to the mean."""


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def cells(row: Row, setting: Setting, reference: Row | None) -> dict[str, str]:
    """A table row by column."""
    mfu = setting.utilisation
    published = setting.published.get(row.title)
    compared = setting.published.get(reference.title) if reference else None
    return {
        "method": row.title,
        "images": str(row.images),
        "NFE_old": number(row.nfe_old),
        "NFE_theta": number(row.nfe_theta),
        "sample s/image": number(row.sample),
        "reward s/image": number(row.reward),
        "update s/image": number(row.update),
        "MFU sample": percent(mfu(row.nfe_old, row.sample)),
        "MFU update": percent(mfu(row.others + 3 * row.nfe_theta, row.update)),
        "computed": percent(mfu(row.others + setting.trained_cost * row.nfe_theta, row.update)),
        "peak GiB": number(row.peak),
        "s/iteration": number(setting.share * row.total),
        "published s": number(published),
        "ratio": number(row.total / reference.total if reference else None),
        "published ratio": number(published / compared if published and compared else None),
        "max abs(ratio - 1)": number(row.deviation),
    }


def render(
    setting: Setting,
    rows: Sequence[Row],
    failed: Mapping[str, str] | None = None,
    pending: Sequence[str] = (),
) -> str:
    """The report in Markdown; `failed` are reasons by variant, `pending` has not run yet."""
    reference = next((row for row in rows if row.variant == setting.reference), None)
    table = [cells(row, setting, reference) for row in rows]
    lines = [list(table[0]), ["---", *["---:"] * (len(table[0]) - 1)]]
    lines += [list(line.values()) for line in table]
    network = setting.network
    text = [
        f"# Rehearsal: {setting.title}, {setting.size} size, random weights",
        "",
        f"`{setting.command}`",
        "",
        *(f"- {fact}" for fact in setting.facts),
        f"- network: {network.parameters / 1e9:.4g} billion parameters, adapter "
        f"{network.adapter / 1e6:.4g} million; {network.forward / 1e12:.4g} TFLOP per evaluation "
        f"of an image, {network.trained / 1e12:.4g} with the adapter's gradients",
        "",
        *(f"| {' | '.join(line)} |" for line in lines),
        "",
    ]
    if failed:
        text += ["Failed:", "", *(f"- {name}: {why}" for name, why in failed.items()), ""]
    if pending:
        text += [f"Not run: {', '.join(pending)}.", ""]
    notes = NOTES.format(
        share=setting.share,
        iteration=setting.iteration,
        ahead=setting.ahead,
        adapter=network.adapter * 4 / 2**20,
        kl=max(row.kl for row in rows),
        reference=setting.reference,
        trained=setting.trained_cost,
    )
    return "\n".join([*text, notes, ""])
