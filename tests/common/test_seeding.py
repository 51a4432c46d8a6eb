"""Random numbers of images, which do not depend on the batch."""

import torch

from tafs.common import seeding

IMAGES = [(prompt, image) for prompt in range(3) for image in range(2)]


def test_an_image_draws_the_same_numbers_in_every_batch():
    whole = seeding.generators(5, "step", 2, images=IMAGES)
    halves = [seeding.generators(5, "step", 2, images=part) for part in (IMAGES[:2], IMAGES[2:])]
    for draw in (lambda g: g.randn([4, 3]), lambda g: g.rand(), lambda g: g.randint(7)):
        assert torch.equal(draw(whole), torch.cat([draw(half) for half in halves]))


def test_images_streams_and_indices_draw_different_numbers():
    first = seeding.generators(5, "step", 2, images=IMAGES).randn([8])
    assert len(first.unique()) == first.numel()
    for seed, stream, index in ((6, "step", 2), (5, "start", 2), (5, "step", 3)):
        other = seeding.generators(seed, stream, index, images=IMAGES).randn([8])
        assert not torch.isin(other, first).any()


def test_batches_have_the_numbers_of_their_shared_position_in_common():
    def shared(position: int, images: list[tuple[int, int]]) -> float:
        found = seeding.generators(5, "step", 2, images=images, shared=position)
        return torch.rand((), generator=found.shared).item()

    assert shared(0, IMAGES[:2]) == shared(0, IMAGES[2:]) != shared(1, IMAGES[2:])
