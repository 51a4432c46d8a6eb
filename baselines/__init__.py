"""The methods that TAFS-GRPO is compared with: one file each, named as in config.yaml."""
