"""`python -m tafs.cli` is the command `tafs`."""

from tafs.cli import main

if __name__ == "__main__":
    main()
