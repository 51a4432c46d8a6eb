"""TAFS-GRPO and its baselines: reinforcement learning of flow-matching text-to-image models."""
