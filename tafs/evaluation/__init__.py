"""Evaluation of a run: images (`generate`), scores (`evaluate`), server scores (`served`)."""
