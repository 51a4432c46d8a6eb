"""Work beside the network's: in another thread, on a GPU on a stream of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


class SideStream:
    """Computes tensors in the order in which they are asked for.

    Args:
        device: of the tensors.
        ahead: whether work begins at once, beside what the caller does meanwhile; otherwise it
            waits until its result is asked for.
    """

    def __init__(self, device: torch.device, *, ahead: bool) -> None:
        self._pool = ThreadPoolExecutor(1) if ahead else None
        self._stream = torch.cuda.Stream(device) if ahead and device.type == "cuda" else None

    def submit(self, work: Callable[[], Tensors]) -> Callable[[], Tensors]:
        """Return what gives the result of `work`, or raises its error.

        The work may read what the caller has queued on the device before.
        """
        if self._pool is None:
            return work
        if self._stream is None:
            return self._pool.submit(work).result
        queued = torch.cuda.current_stream(self._stream.device).record_event()
        return self._pool.submit(self._beside, self._stream, queued, work).result

    @staticmethod
    def _beside(
        stream: torch.cuda.Stream, queued: torch.cuda.Event, work: Callable[[], Tensors]
    ) -> Tensors:
        caller = torch.cuda.default_stream(stream.device)
        with torch.cuda.stream(stream):
            stream.wait_event(queued)
            found = work()
            stream.synchronize()
        for tensor in found.values():
            tensor.record_stream(caller)  # its memory stays until the caller's work has read it
        return found
