"""Python's garbage collector in a process whose objects live until its end."""

from __future__ import annotations

import atexit
import gc

RARELY = 100  # searches of the middle generation for one of all objects; Python's default is 10


def spare() -> None:
    """Search all objects of this process more rarely for garbage, and not at its end.

    The libraries of a stage are half a million objects, which searches during start-up and at exit
    find again and again; that took a fifth of a short job's time. Young garbage is found as
    before. For the processes of commands only: the settings of a library's user are their own.
    """
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, RARELY)
    atexit.register(gc.freeze)
