"""Checkpoints survive damage, full disks and strangers."""

from __future__ import annotations

import json
from collections.abc import Callable
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


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-5],
        lambda text: text.replace('"step": 2', '"step": 3'),
        lambda text: text.replace("0.25", "0.75"),
        lambda text: text.replace('"sha256": "', '"sha256": "0'),
        lambda text: "[]",
        lambda text: "{}",
        lambda text: "\x00\xff",
    ],
)
def test_damaged_description_raises(tmp_path: Path, damage: Callable[[str], str]) -> None:
    folder = _folder(tmp_path)
    folder.save(2, _tensors(2.0), {"metrics": [{"loss": 0.25}]})
    file = tmp_path / "ckpt" / "step-00000002.json"
    file.write_text(damage(file.read_text()), encoding="latin-1")
    with pytest.raises(WeightsError, match=r"step-00000002\.json is damaged.*delete"):
        folder.latest()


@pytest.mark.parametrize("position", [0, 9, 60, -1])
def test_single_flipped_bit_of_the_tensors_is_found(tmp_path: Path, position: int) -> None:
    folder = _folder(tmp_path)
    folder.save(2, _tensors(2.0), {})
    file = tmp_path / "ckpt" / "step-00000002.safetensors"
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(WeightsError, match="digest differs"):
        folder.latest()


def test_missing_tensors_raise(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    folder.save(2, _tensors(2.0), {})
    (tmp_path / "ckpt" / "step-00000002.safetensors").unlink()
    with pytest.raises(WeightsError, match="tensors are gone"):
        folder.latest()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite_are_not_saved(tmp_path: Path, value: float) -> None:
    folder = _folder(tmp_path)
    folder.save(2, _tensors(2.0), {})
    with pytest.raises(WeightsError, match=r"not finite at step 4 \(a\.weight\)"):
        folder.save(4, _tensors(value), {})
    assert folder.steps() == [2]


def test_checkpoint_of_an_earlier_version_without_its_own_digest_is_read(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    folder.save(2, _tensors(2.0), {})
    file = tmp_path / "ckpt" / "step-00000002.json"
    description = json.loads(file.read_text())
    del description["description_sha256"]
    file.write_text(json.dumps(description))
    found = folder.latest()
    assert found is not None
    assert found.step == 2


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


def test_failed_write_of_the_description_leaves_no_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _folder(tmp_path)
    folder.save(2, _tensors(2.0), {})
    write = folder.store.write_bytes

    def full(path: str, data: bytes) -> int:
        if path.endswith(".json"):
            raise StorageError("no space left on device")
        return write(path, data)

    monkeypatch.setattr(folder.store, "write_bytes", full)
    with pytest.raises(StorageError, match="no space"):
        folder.save(4, _tensors(4.0), {})
    assert {path.name for path in (tmp_path / "ckpt").iterdir()} == {"step-00000002.json", "step-00000002.safetensors"}
