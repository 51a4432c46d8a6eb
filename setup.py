"""List the packages: `tafs` with its rooms, and the folder baselines/ as `tafs.baselines`.

tafs/baselines/ only makes that folder importable in a checkout, so it is not installed.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["tafs", "tafs.*"], exclude=["tafs.baselines"]),
        "tafs.baselines",
    ],
    package_dir={"tafs.baselines": "baselines"},
)
