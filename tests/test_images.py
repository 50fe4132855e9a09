from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from slimdown.capture import capture
from slimdown.images import as_input, take_images


def test_takes_exactly_what_was_asked_for_and_makes_no_more() -> None:
    made = []

    def batches() -> Iterator[Tensor]:
        for index in range(5):
            made.append(index)
            yield torch.full((4, 3, 2, 2), float(index))

    taken = take_images(batches(), 6)
    assert [len(batch) for batch in taken] == [4, 2]
    assert made == [0, 1]


def test_gives_all_where_there_are_fewer() -> None:
    assert sum(map(len, take_images([torch.zeros(3, 1, 2, 2)], 100))) == 3


def test_images_come_in_the_precision_of_the_graph() -> None:
    graph_module = capture(nn.Linear(3, 2).bfloat16(), torch.zeros(1, 3))
    assert as_input(torch.zeros(4, 3), graph_module).dtype == torch.bfloat16
