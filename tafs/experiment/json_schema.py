"""Prints the JSON Schema of config.yaml, for editors: `python -m tafs.experiment.json_schema`."""

from __future__ import annotations

import json

from tafs.experiment.schema import Config


def schema() -> str:
    """The schema as JSON text."""
    found = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps({**found, **Config.model_json_schema()}, indent=2) + "\n"


if __name__ == "__main__":
    print(schema(), end="")
