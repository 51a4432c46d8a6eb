"""The embedded words: short words in open fonts, their captions and tiny models that draw them."""

from pathlib import Path

ROOT = Path(__file__).parent / "weights"
