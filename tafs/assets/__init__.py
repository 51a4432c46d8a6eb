"""Where models, rewards and prompts come from: shipped with the package, or pinned downloads."""
