"""Prompts and prompt sets."""
