"""N:M is exactly N of every M, and shares are met to the weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimdown.errors import RecipeError
from slimdown.sparsify import Pattern, keep_largest


@settings(deadline=None, max_examples=50)
@given(data=st.data(), kept=st.integers(1, 5), more=st.integers(1, 4), rows=st.integers(1, 4))
def test_exactly_n_of_every_m_stay_and_they_are_the_largest(
    data: st.DataObject, kept: int, more: int, rows: int
) -> None:
    group = kept + more
    count = rows * 3 * group
    values = data.draw(st.lists(st.integers(-3, 3), min_size=count, max_size=count))
    scores = torch.tensor(values).float().view(rows, 3 * group).abs()
    mask = Pattern(kept, group).mask(scores)
    for score, chosen in zip(scores.view(-1, group), mask.view(-1, group), strict=True):
        assert int(chosen.sum()) == kept
        assert sorted(score[chosen].tolist()) == sorted(score.tolist())[-kept:]


@pytest.mark.parametrize("sparsity", [0.01, 0.25, 0.5, 0.9])
def test_shares_are_met_to_the_weight(sparsity: float) -> None:
    scores = torch.rand(7, 30)
    whole, rows = keep_largest(scores, sparsity), keep_largest(scores, sparsity, dim=1)
    assert int((~whole).sum()) == round(sparsity * 210)
    assert ((~rows).sum(1) == round(sparsity * 30)).all()
    if bool((~whole).any()):
        assert scores[~whole].max() < scores[whole].min()
    for row, kept in zip(scores, rows, strict=True):
        assert not bool((~kept).any()) or row[~kept].max() < row[kept].min()


def test_of_equals_the_first_stay() -> None:
    assert keep_largest(torch.ones(4), 0.5).tolist() == [True, True, False, False]
    assert Pattern(1, 2).mask(torch.zeros(4)).tolist() == [True, False, True, False]


@pytest.mark.parametrize("text", ["4:2", "2:2", "0:4", "2-4", "", "2:4:8", "-1:4", "two:four"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="N:M"):
        Pattern.parse(text)
    assert Pattern.parse("2:4") == Pattern(2, 4)
