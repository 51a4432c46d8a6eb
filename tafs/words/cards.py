"""Model cards of the embedded words' models, generated from the measurements in facts.json."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tafs.models.sampling import SAMPLERS
from tafs.shapes import cards, weights
from tafs.words import ROOT
from tafs.words.captions import TAGS

BASES = {
    "words-sd3": "Stable Diffusion 3's layout (SD3Transformer2DModel of width 128 and 4 layers, "
    "two CLIP text encoders, a T5, three tokenizers, AutoencoderKL, flow-matching scheduler)",
    "words-flux": "FLUX.1-dev's layout (FluxTransformer2DModel of width 128 with 3 double and 3 "
    "single layers, packed latents, a guidance input that was always 1 in training, a CLIP text "
    "encoder, a T5, two tokenizers, AutoencoderKL, flow-matching scheduler with dynamic shift)",
}
USE = "24 x 24 images of up to four capitals or digits, and captions like the shipped ones"
_card = partial(cards.card, use=USE, target="words-weights")


def write(root: Path = ROOT) -> None:
    """Write README.md of every model, and the manifest."""
    found = {"words-sd3/vae": _vae(root / "words-sd3" / "vae")}
    for name, layout in BASES.items():
        if (root / name / weights.FACTS).is_file():
            found[name] = _base(name, layout, root / name)
    for name, text in found.items():
        (root / name / "README.md").write_text(text, encoding="utf-8")
    weights.write_manifest(root)


def _vae(folder: Path) -> str:
    facts = weights.read_facts(folder)
    return _card(
        "vae",
        folder,
        "The autoencoder of the embedded words' models (diffusers' AutoencoderKL): 24 x 24 pixels "
        "to 6 x 6 latents with 8 channels.",
        f"L1 and L2 loss and a small KL term on rendered texts of the training captions and random "
        f"strings, {facts['steps']} steps of batch size 32 ({facts['seconds']} s on one core).",
        f"PP-OCRv6 reads {100 * facts['reconstruction_accuracy']:.1f} % of the texts of held-out "
        "captions after reconstruction.",
    )


def _base(name: str, layout: str, folder: Path) -> str:
    facts = weights.read_facts(folder)
    cycles = facts["cycles"]
    recipes = [cycle["recipe"] for cycle in cycles]
    taken = ", ".join(f"{r['steps']:,} steps from {r['lr']:g}" for r in recipes)
    columns = ("overall", "exact", *TAGS)
    rows = ["| steps | sampler | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]
    for steps, samplers in facts["ocr"].items():
        for sampler, scores in samplers.items():
            cells = " | ".join(f"{scores[column]:.3f}" for column in columns)
            rows.append(f"| {steps} | {SAMPLERS[sampler].title} | {cells} |")
    seconds = sum(cycle["seconds"] for cycle in cycles)
    return _card(
        name,
        folder,
        f"An embedded base model: a diffusers pipeline with {layout}.",
        f"Flow matching on {recipes[0]['scenes']:,} rendered texts of the training captions and "
        f"random strings per cycle, batch size {recipes[0]['batch']}, AdamW, a cosine "
        f"cycle each: {taken}; the weights are averaged ({seconds / 60:.0f} minutes).",
        "Text accuracy (`ocr`) of the shipped weights on held-out captions, four images each; "
        "`exact` is the share of images whose text is read without an error:\n\n" + "\n".join(rows),
    )
