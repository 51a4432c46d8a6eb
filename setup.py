"""List the packages: `tafs` with its rooms, and the folder baselines/ installed as `tafs.baselines`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["tafs", "tafs.*"]), "tafs.baselines"],
    package_dir={"tafs.baselines": "baselines"},
)
