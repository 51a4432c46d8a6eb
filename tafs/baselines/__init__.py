"""Make the folder baselines/ of a checkout importable as `tafs.baselines`.

An installed package holds the files of baselines/ here instead of this one.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "baselines")]
