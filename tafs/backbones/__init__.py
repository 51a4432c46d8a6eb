"""Flow-matching text-to-image models behind one interface: encode, velocity, decode, LoRA."""
