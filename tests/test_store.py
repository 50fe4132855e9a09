"""A step's folder is whole for its key, or it is made again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from slimdown.core import Score, Step
from slimdown.errors import BadInput
from slimdown.files import TEMPORARY
from slimdown.store import StepFolder, fingerprint_model, key_of


def test_a_folder_is_whole_only_for_its_own_key(tmp_path: Path) -> None:
    folder = StepFolder(tmp_path / "step", key="a")
    folder.begin()
    assert not folder.is_done
    folder.finish()
    assert folder.is_done
    assert not StepFolder(tmp_path / "step", key="b").is_done


def test_begin_keeps_what_the_same_key_began_and_empties_what_another_did(tmp_path: Path) -> None:
    folder = StepFolder(tmp_path / "step", key="a")
    folder.begin()
    folder.save_checkpoint({"step": 3})
    folder.begin()
    assert folder.load_checkpoint() == {"step": 3}
    other = StepFolder(tmp_path / "step", key="b")
    other.begin()
    assert other.load_checkpoint() is None


def test_a_kill_while_a_folder_is_emptied_leaves_one_that_can_be_begun(tmp_path: Path) -> None:
    folder = StepFolder(tmp_path / "step", key="a")
    folder.begin()
    folder.save_checkpoint({"step": 3})
    folder.finish()
    real, removed = Path.unlink, []

    def unlink_or_die(path: Path, missing_ok: bool = False) -> None:
        if len(removed) == 1:
            raise KeyboardInterrupt
        removed.append(path)
        real(path, missing_ok=missing_ok)

    (tmp_path / "step" / "model.bin").write_bytes(b"1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", unlink_or_die)
        with pytest.raises(KeyboardInterrupt):
            StepFolder(tmp_path / "step", key="b").begin()
    assert not folder.is_done
    other = StepFolder(tmp_path / "step", key="b")
    other.begin()
    other.finish()
    assert {path.name for path in (tmp_path / "step").iterdir()} == {"KEY", "DONE"}


def test_what_a_kill_left_half_written_is_not_in_the_way(tmp_path: Path) -> None:
    left = tmp_path / "step" / f"{TEMPORARY}abc"
    left.parent.mkdir()
    left.write_bytes(b"half a KEY")
    StepFolder(tmp_path / "step", key="a").begin()
    assert not left.exists()


def test_a_file_that_is_gone_is_told_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"step\.json is missing: remove .* and run again"):
        StepFolder(tmp_path, key="a").load_record("step.json", Step)


def test_finish_drops_the_checkpoint(tmp_path: Path) -> None:
    folder = StepFolder(tmp_path / "step", key="a")
    folder.begin()
    folder.save_checkpoint({"step": 3})
    folder.finish()
    assert folder.load_checkpoint() is None


def test_a_folder_of_someone_else_is_never_emptied(tmp_path: Path) -> None:
    mine = tmp_path / "step" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("years of work")
    with pytest.raises(BadInput, match="not written by slimdown"):
        StepFolder(tmp_path / "step", key="a").begin()
    assert mine.read_text() == "years of work"


def test_records_come_back_equal(tmp_path: Path) -> None:
    folder = StepFolder(tmp_path, key="a")
    step = Step(
        name="01-prune",
        kind="prune",
        parent="00-original",
        settings={"macs": 0.5},
        facts={"widths": {"conv": [16, 8]}, "none": None},
        num_parameters=3,
        macs=4,
        seconds=0.5,
    )
    folder.save_record("step.json", step)
    assert folder.load_record("step.json", Step) == step


def test_scores_come_back_with_each_sample(tmp_path: Path) -> None:
    folder = StepFolder(tmp_path, key="a")
    score = Score.from_outcomes(
        "top1", torch.tensor([1.0, 0.0, 1.0]), predictions=torch.tensor([2, 1, 0])
    )
    folder.save_score(score)
    loaded = folder.load_score()
    assert loaded == score
    assert loaded.outcomes is not None
    assert loaded.predictions is not None
    np.testing.assert_array_equal(loaded.outcomes, [1, 0, 1])
    np.testing.assert_array_equal(loaded.predictions, [2, 1, 0])


def test_a_score_without_samples_comes_back_without(tmp_path: Path) -> None:
    folder = StepFolder(tmp_path, key="a")
    folder.save_score(Score(metric="mAP50", value=41.5, num_samples=7))
    assert folder.load_score() == Score(metric="mAP50", value=41.5, num_samples=7)
    assert folder.load_score().outcomes is None


def test_tensors_that_share_storage_are_all_saved(tmp_path: Path) -> None:
    folder = StepFolder(tmp_path, key="a")
    weight = torch.arange(6.0).reshape(2, 3)
    folder.save_tensors("model", {"a": weight, "tied": weight, "t": weight.T})
    loaded = folder.load_tensors("model")
    assert torch.equal(loaded["tied"], weight)
    assert torch.equal(loaded["t"], weight.T)


def test_a_models_fingerprint_sees_each_weight_and_the_structure() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    before = fingerprint_model(model)
    assert fingerprint_model(model) == before
    with torch.no_grad():
        model[0].weight[1, 2] += 1e-6
    assert fingerprint_model(model) != before
    assert fingerprint_model(nn.Sequential(model[0], nn.SiLU())) != fingerprint_model(model)


def test_keys_do_not_depend_on_the_order_of_settings() -> None:
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 2})
