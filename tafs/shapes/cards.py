"""Model cards of the embedded models, generated from the measurements in facts.json."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from tafs.data.geneval_rows import TASKS
from tafs.models.sampling import SAMPLERS
from tafs.shapes import annotators, weights

SCORERS = {
    "clip": "A dual encoder (transformers' CLIPModel): the cosine of image and caption.",
    "pickscore": "A preference model, fine-tuned from `clip` as PickScore is from CLIP.",
    "hpsv2": "A preference model, fine-tuned from `clip` as HPSv2 is from CLIP.",
    "imagereward": "A preference model in which caption tokens attend to image patches.",
    "unifiedreward": "A classifier that grades images from 1 to 5.",
}
BASES = {
    "shapes-sd3": "Stable Diffusion 3's layout (SD3Transformer2DModel of width 128 and 5 layers, "
    "two CLIP text encoders, a T5, three tokenizers, AutoencoderKL, flow-matching scheduler)",
    "shapes-flux": "FLUX.1-dev's layout (FluxTransformer2DModel of width 128 with 5 double and 4 "
    "single layers, packed latents, a guidance input that was always 1 in training, a CLIP text "
    "encoder, a T5, two tokenizers, AutoencoderKL, flow-matching scheduler with dynamic shift)",
}
USE = "24 x 24 images of glyphs and the words of the shipped captions"


def write(root: Path = weights.ROOT) -> None:
    """Write README.md of every model, and the manifest."""
    cards = {weights.VAE: _vae(root / weights.VAE)}
    present = {name: layout for name, layout in BASES.items() if (root / name).is_dir()}
    cards |= {name: _base(name, layout, root / name) for name, layout in present.items()}
    cards |= {name: _scorer(name, text, root / name) for name, text in SCORERS.items()}
    for name, card in cards.items():
        (root / name / "README.md").write_text(card, encoding="utf-8")
    weights.write_manifest(root)


def _vae(folder: Path) -> str:
    facts = weights.read_facts(folder)
    return card(
        "vae",
        folder,
        "The autoencoder of the embedded models (diffusers' AutoencoderKL): 24 x 24 pixels to "
        "6 x 6 latents with 8 channels.",
        f"L1 and L2 loss and a small KL term on rendered scenes of the training captions, "
        f"{facts['steps']} steps of batch size 32 ({facts['seconds']} s on two cores).",
        f"For {100 * facts['reconstruction_accuracy']:.1f} % of 1,000 scenes of held-out captions, "
        "the detector finds the same objects and colours before and after reconstruction.",
    )


def _base(name: str, layout: str, folder: Path) -> str:
    facts = weights.read_facts(folder)
    cycles, more = facts["cycles"], facts["strict_geneval_other_noise"]
    steps_taken = ", ".join(_cycle(cycle, "scenes") for cycle in cycles)
    recipe, seconds = cycles[0]["recipe"], sum(c["seconds"] for c in cycles)
    header = "| steps | sampler | overall | " + " | ".join(TASKS) + " |"
    rows = [header, "|---" * (len(TASKS) + 3) + "|"]
    for steps, samplers in facts["strict_geneval"].items():
        for sampler, scores in samplers.items():
            cells = [f"{scores[task]:.3f}" for task in ("overall", *TASKS)]
            rows.append(f"| {steps} | {SAMPLERS[sampler].title} | " + " | ".join(cells) + " |")
    full, few = (max(more[steps].values()) for steps in ("28", "4"))
    return card(
        name,
        folder,
        f"An embedded base model: a diffusers pipeline with {layout}.",
        f"Flow matching on rendered scenes of the training captions, batch size "
        f"{recipe['batch']}, AdamW, {len(cycles)} cosine cycles: {steps_taken}; the weights are "
        f"averaged ({seconds / 60:.0f} minutes on one core).",
        "Strict GenEval accuracy of the shipped weights on held-out captions, four images each:\n\n"
        + "\n".join(rows)
        + "\n\nWith ten images each, different noise and the best of these samplers: "
        + f"{full:.3f} at 28 steps, {few:.3f} at 4.",
    )


def _scorer(name: str, text: str, folder: Path) -> str:
    facts = weights.read_facts(folder)
    if name == "clip":
        data = "scenes, each with a copy that differs in one requirement"
        result = (
            f"It prefers the matching image to the altered one for "
            f"{100 * facts['pair_accuracy']:.1f} % of {facts['pairs']:,} held-out captions."
        )
    else:
        taste = asdict(annotators.TASTES[name])
        cares = ", ".join(f"{q} {taste[q]:g}" for q in annotators.QUALITIES if taste[q])
        data = f"pairs of images judged by an annotator with the weights {cares}"
        result = (
            f"It agrees with the annotator on {100 * facts['pair_accuracy']:.1f} % of "
            f"{facts['pairs']:,} pairs of held-out captions; the annotator's noise allows at most "
            f"{100 * facts['annotator_consistency']:.1f} %."
        )
    cycles = "; ".join(_cycle(cycle, "data") for cycle in facts["cycles"])
    seconds = sum(cycle["seconds"] for cycle in facts["cycles"])
    training = (
        f"{data[0].upper()}{data[1:]}. Cycles: {cycles} ({seconds / 60:.0f} minutes on one core)."
    )
    return card(name, folder, text, training, result)


def _cycle(cycle: dict[str, Any], data: str) -> str:
    recipe = cycle["recipe"]
    learned_from = f"{recipe[data]:,} {recipe['layout']} scenes"
    return f"{recipe['steps']:,} steps from {recipe['lr']:g} on {learned_from}"


def card(
    name: str,
    folder: Path,
    what: str,
    training: str,
    result: str,
    use: str = USE,
    target: str = "shapes-weights",
) -> str:
    """A model card; `target` of make trains the model, and `use` is all that it is for."""
    count, size = _size(folder)
    return (
        f"# {name}\n\n{what} {count:,} parameters, {size / 2**20:.1f} MiB in float16.\n\n"
        f"**Training.** {training} Reproduce with `make {target}`; the last digits depend on the "
        f"processor.\n\n**Held out.** {result}\n\n"
        f"**Use.** Only for {use}. Files "
        "are verified against `manifest.json` before they are loaded. Licence: that of this "
        "repository.\n"
    )


def _size(folder: Path) -> tuple[int, int]:
    """Numbers of parameters and bytes in the folder's safetensors files."""
    files = sorted(folder.rglob("*.safetensors"))
    count = sum(tensor.size for file in files for tensor in load_file(file).values())
    return count, sum(file.stat().st_size for file in files)
