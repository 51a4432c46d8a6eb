"""Prompt-set plug-ins, a file each; a file that is added here is found by its name."""
