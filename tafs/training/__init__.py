"""Training of a run: iterations (`trainer`), the loop (`train`), its files (`recorder`)."""
