"""TAFS-GRPO and its baselines: RL alignment of flow-matching text-to-image models."""
