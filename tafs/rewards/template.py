"""`tafs new reward NAME` writes the plug-in NAME.py, a reward that works."""

from __future__ import annotations

from pathlib import Path

from tafs.common import stubs
from tafs.rewards.metrics import PLUGINS

FOLDER = Path(__file__).parent / "plugins"
TEMPLATE = '''"""{title}: how well an image compresses (authors, year, arXiv number)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tafs.data.prompts import Prompt
from tafs.rewards.metrics import Folder, Metric, Reward, RewardPlugin

if TYPE_CHECKING:
    from torch import Tensor

METRIC = Metric(
    name="{name}",
    title="{title}",
    unit="kB",
    digits=3,
    higher_is_better=False,
    scale=-1.0,  # the published score is the size, the training score its negative
    version="JPEG, quality 95",
)


# Heavy imports belong into the functions: planning a run imports this file, but scores nothing.
def build(device: str, folder: Folder) -> Reward:
    """Load the reward; `folder(resource)` is where an entry of METRIC.resources is."""
    import torch
    from PIL import Image

    def score(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> training scores [B], float32; higher is better."""
        sizes = []
        pixels = (images.detach().clamp(0, 1) * 255).round().to(torch.uint8)
        for image in pixels.permute(0, 2, 3, 1).cpu().numpy():
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG", quality=95)
            sizes.append(len(file.getvalue()) / 1000)
        return -torch.tensor(sizes, dtype=torch.float32, device=images.device)

    return Reward(METRIC, score)


REWARD = RewardPlugin(METRIC, build)
'''


def write(name: str, folder: Path = FOLDER) -> Path:
    """Write the stub and return its file.

    Raises:
        ValueError: the name is invalid or taken, or the folder does not exist.
    """
    title = name.replace("_", " ").capitalize()
    text = TEMPLATE.replace("{title}", title).replace("{name}", name)
    return stubs.write(PLUGINS, name, folder, text)


def create(name: str) -> str:
    """Write the stub; return what was written and what to do next. The errors are `write`'s."""
    return (
        f"Wrote {write(name)}. Test it, then add it to a task's `rewards` in config.yaml:\n"
        f"  python -m pytest tests/rewards/test_contract.py -k {name}\n"
        "  snakemake all --config scale=smoke"
    )
