"""Checkpoints survive damage, full disks and strangers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ctc_ray.errors import WeightsError
from ctc_ray.pretrain.checkpoint import CheckpointFolder
from ctc_ray.storage import StorageError, Store


def _folder(path: Path, identity: str = "run") -> CheckpointFolder:
    return CheckpointFolder(Store(path), "ckpt", identity=identity, keep=2)


def _tensors(value: float) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.full((3, 2), value), "counter": torch.tensor(7)}


def test_saved_checkpoint_reads_back_equal(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    folder.save(5, _tensors(1.5), {"metrics": [{"loss": 2.0}]})
    found = folder.latest()
    assert found is not None
    assert found.step == 5
    assert found.details == {"metrics": [{"loss": 2.0}]}
    assert torch.equal(found.tensors["a.weight"], _tensors(1.5)["a.weight"])
    assert int(found.tensors["counter"]) == 7


def test_latest_of_empty_folder_is_none(tmp_path: Path) -> None:
    assert _folder(tmp_path).latest() is None


def test_save_keeps_the_newest_two(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    for step in (2, 4, 10):
        folder.save(step, _tensors(step), {})
    assert folder.steps() == [4, 10]
    assert len(list((tmp_path / "ckpt").iterdir())) == 4


def test_tensors_without_description_are_no_checkpoint(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    folder.save(2, _tensors(2.0), {})
    folder.save(4, _tensors(4.0), {})
    (tmp_path / "ckpt" / "step-00000004.json").unlink()
    found = folder.latest()
    assert found is not None
    assert found.step == 2


def test_damaged_tensors_raise_and_name_the_remedy(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    folder.save(2, _tensors(2.0), {})
    folder.save(4, _tensors(4.0), {})
    file = tmp_path / "ckpt" / "step-00000004.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(WeightsError, match=r"step-00000004\.json.*before it"):
        folder.latest()
    (tmp_path / "ckpt" / "step-00000004.json").unlink()
    found = folder.latest()
    assert found is not None
    assert found.step == 2


def test_damaged_description_raises(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    folder.save(2, _tensors(2.0), {})
    (tmp_path / "ckpt" / "step-00000002.json").write_text("{")
    with pytest.raises(WeightsError, match="damaged"):
        folder.latest()


def test_checkpoint_of_another_run_raises(tmp_path: Path) -> None:
    _folder(tmp_path).save(2, _tensors(2.0), {})
    with pytest.raises(WeightsError, match="another run"):
        _folder(tmp_path, "other").latest()


def test_failed_write_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _folder(tmp_path)
    folder.save(2, _tensors(2.0), {})

    def full(path: str, data: bytes) -> int:
        raise StorageError("no space left on device")

    monkeypatch.setattr(folder.store, "write_bytes", full)
    with pytest.raises(StorageError, match="no space"):
        folder.save(4, _tensors(4.0), {})
    found = folder.latest()
    assert found is not None
    assert found.step == 2
