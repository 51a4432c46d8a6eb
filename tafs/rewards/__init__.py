"""What scores images."""
