from __future__ import annotations

import pytest

from slimdown.errors import RecipeError
from slimdown.quantize import PROFILES
from slimdown.store import settings_of
from slimdown.targets import TARGETS, find_target


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_has_its_name_a_profile_and_settings_to_hash(name: str) -> None:
    target = find_target(name)
    assert target.name == name
    assert target.profile in PROFILES
    assert isinstance(settings_of(target), dict)


def test_an_unknown_name_gets_a_suggestion_or_the_list() -> None:
    with pytest.raises(RecipeError, match="'onnxrunime'; did you mean 'onnxruntime'"):
        find_target("onnxrunime")
    with pytest.raises(RecipeError, match="choose among onnxruntime, openvino"):
        find_target("abacus")
