"""Work beside the caller's, in its order; on a GPU on a stream of its own."""

from __future__ import annotations

import threading

import pytest
import torch

from tafs.training.side_stream import SideStream

CPU = torch.device("cpu")


def test_work_waits_until_it_is_asked_for_or_begins_at_once():
    for ahead in (False, True):
        side, begun = SideStream(CPU, ahead=ahead), threading.Event()

        def work(begun: threading.Event = begun) -> dict[str, torch.Tensor]:
            begun.set()
            return {"thread": torch.tensor(threading.get_ident())}

        result = side.submit(work)
        assert begun.wait(timeout=30 if ahead else 0) == ahead
        assert (result()["thread"].item() != threading.get_ident()) == ahead


def test_work_is_done_in_its_order_and_its_errors_are_the_callers():
    side, done = SideStream(CPU, ahead=True), []

    def work(number: int) -> dict[str, torch.Tensor]:
        done.append(number)
        if number == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"number": torch.tensor(number)}

    results = [side.submit(lambda n=n: work(n)) for n in range(4)]
    assert [results[n]()["number"].item() for n in (3, 0, 1)] == [3, 0, 1]
    with pytest.raises(torch.OutOfMemoryError):
        results[2]()
    assert done == [0, 1, 2, 3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_work_on_a_gpu_reads_what_was_queued_before_and_is_finished_when_it_is_given():
    device = torch.device("cuda", 0)
    side, x = SideStream(device, ahead=True), torch.zeros(4096, 4096, device=device)
    results = []
    for number in range(20):
        x = (x @ x) * 0 + number  # queued, perhaps not computed yet
        results.append(side.submit(lambda x=x: {"value": x.amax() - x.amin() + x[0, 0]}))
    assert [r()["value"].item() for r in results] == [float(number) for number in range(20)]
