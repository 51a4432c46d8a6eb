"""The embedded shapes: scenes of glyphs, captions, renderer, exact detector and tiny models."""
