"""The command `tafs`; docs/command-line.md describes it."""

from tafs.cli.app import main

__all__ = ["main"]
