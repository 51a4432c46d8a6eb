"""The methods that TAFS-GRPO is compared with, one file each; imported as `tafs.baselines`."""
