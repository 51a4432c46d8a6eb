"""The embedded world: scenes of glyphs, captions, renderer, exact detector, tiny real models."""
