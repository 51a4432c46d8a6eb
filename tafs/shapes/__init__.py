"""The embedded world: scenes of glyphs, their captions, a renderer, an exact detector, tiny real models."""
