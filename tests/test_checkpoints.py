"""Checkpoints: whole or not there, whatever operation their write is killed at; verified; pruned; the previous one where the last is damaged."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest
import torch
from survivor import started, write_until

from diffusers_ctrl import checkpoints
from diffusers_ctrl.checkpoints import (
    MANIFEST_NAME,
    STATE_NAME,
    TENSORS_NAME,
    differences,
    find_checkpoints,
    fingerprint,
    read_checkpoint,
    read_latest,
    write_checkpoint,
    write_file,
)


def contents(update: int, version: int = 0) -> dict:
    """Arguments of a write whose every byte says which it is."""
    generator = torch.Generator().manual_seed(1000 * version + update)
    tensors = {"parameter.a": torch.randn(40, generator=generator), "baseline.mean": torch.randn(3, dtype=torch.float64)}
    return {"state": {"update": update, "version": version, "history": list(range(update))}, "tensors": tensors}


def write(root, update: int, version: int = 0, keep: int = 2, best: int | None = None):
    return write_checkpoint(root, **contents(update, version), keep=keep, best=best)


def names(root) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_what_is_written_is_read(tmp_path):
    given = contents(7)
    found = read_checkpoint(write_checkpoint(tmp_path / "deep" / "down", **given, keep=1))
    assert found.state == given["state"] and found.folder == tmp_path / "deep" / "down" / "checkpoint-000007"
    assert {name: value.dtype for name, value in found.tensors.items()} == {n: v.dtype for n, v in given["tensors"].items()}
    assert all(torch.equal(found.tensors[name], value) for name, value in given["tensors"].items())


def test_the_oldest_go_and_the_best_stays(tmp_path):
    for update in range(1, 7):
        write(tmp_path, update, keep=2, best=2 if update > 1 else None)
    assert names(tmp_path) == ["checkpoint-000002", "checkpoint-000005", "checkpoint-000006"]
    write(tmp_path, 1_000_000, keep=1, best=None)
    assert names(tmp_path) == ["checkpoint-1000000"]


def test_checkpoints_are_in_the_order_of_their_numbers(tmp_path):
    for update in (999_999, 1_000_000):
        write(tmp_path, update)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-999999", "checkpoint-1000000"]


def test_a_run_that_went_back_leaves_no_later_checkpoint_of_the_other_one(tmp_path):
    for update in (10, 20):
        write(tmp_path, update)
    write(tmp_path, 15, version=1)
    assert names(tmp_path) == ["checkpoint-000010", "checkpoint-000015"]
    assert read_latest(tmp_path)[0].state["version"] == 1


def test_leftovers_are_not_read_and_cleared_away(tmp_path):
    write(tmp_path, 3)
    shutil.copytree(tmp_path / "checkpoint-000003", tmp_path / "checkpoint-000004.tmp")
    (tmp_path / "best.json.tmp").write_text("{")
    (tmp_path / "checkpoint-notes").mkdir()
    assert read_latest(tmp_path)[0].state["update"] == 3
    write(tmp_path, 5)
    assert names(tmp_path) == ["checkpoint-000003", "checkpoint-000005", "checkpoint-notes"]


def killed_write(root, update: int, version: int, operation: int, **options) -> bool:
    """Whether the write was killed at that operation; False where it has fewer and so was done."""
    arguments = contents(update, version) | {"keep": 2} | options
    process = started(write_until, str(root), arguments, operation)
    process.join(120)
    assert process.exitcode in (-9, 7)
    return process.exitcode == -9


@pytest.mark.parametrize(
    "update, keep, best, offset",
    [
        pytest.param(3, 2, None, None, id="a new one", marks=pytest.mark.slow),
        pytest.param(2, 2, 1, None, id="over one of the same number", marks=pytest.mark.slow),
        pytest.param(3, 1, 1, None, id="and two to prune", marks=pytest.mark.slow),
        pytest.param(2, 1, 1, 0, id="some of all"),
    ],
)
def test_killed_at_every_operation_of_a_write(tmp_path, update, keep, best, offset):
    """What is there after is the last one as it was, or the new one as it should be; never neither, and never a part of one."""
    operation, killed = offset or 0, 0
    while True:
        root = tmp_path / str(operation)
        for before in (1, 2):
            write(root, before)
        done = not killed_write(root, update, 1, operation, keep=keep, best=best)
        found, damaged = read_latest(root)
        assert damaged == []
        assert (found.state["update"], found.state["version"]) in ((2, 0), (update, 1))
        expected = contents(found.state["update"], found.state["version"])
        assert torch.equal(found.tensors["parameter.a"], expected["tensors"]["parameter.a"])
        if best is not None:
            assert best in [read_checkpoint(path).state["update"] for path in find_checkpoints(root)]
        write(root, 4, version=2)  # the next write clears up
        assert not [name for name in names(root) if not name.startswith("checkpoint-0") or "." in name]
        assert read_latest(root)[0].state["version"] == 2
        if done:
            break
        killed += 1
        operation += 1 if offset is None else 5
    assert killed > (15 if offset is None else 3)


def test_the_order_of_a_write(tmp_path, monkeypatch):
    """Every file and the folder are on the disk before the name is given, and the name before anything older goes."""
    write(tmp_path, 1)
    write(tmp_path, 2)
    events = []
    paths = lambda handle: os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))  # noqa: E731
    flush, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(("flush", paths(handle))), flush(handle)))
    monkeypatch.setattr(
        os, "replace", lambda a, b: (events.append(("rename", os.path.basename(a), os.path.basename(b))), rename(a, b))
    )
    write(tmp_path, 3)
    new = events.index(("rename", "checkpoint-000003.tmp", "checkpoint-000003"))
    for name in (STATE_NAME, TENSORS_NAME, MANIFEST_NAME, "checkpoint-000003.tmp"):
        assert ("flush", name) in events[:new]
    assert events[new + 1] == ("flush", tmp_path.name)
    assert events[new + 2][:2] == ("rename", "checkpoint-000001") and len(events) == new + 3


DAMAGES = {
    "a file cut short": lambda folder: (folder / TENSORS_NAME).write_bytes((folder / TENSORS_NAME).read_bytes()[:-8]),
    "a bit flipped": lambda folder: (folder / TENSORS_NAME).write_bytes(
        (folder / TENSORS_NAME).read_bytes()[:-1] + bytes([(folder / TENSORS_NAME).read_bytes()[-1] ^ 1])
    ),
    "a number changed": lambda folder: (folder / STATE_NAME).write_text((folder / STATE_NAME).read_text().replace("20", "21")),
    "no weights": lambda folder: (folder / TENSORS_NAME).unlink(),
    "no manifest": lambda folder: (folder / MANIFEST_NAME).unlink(),
    "a manifest that is no JSON": lambda folder: (folder / MANIFEST_NAME).write_bytes(b"\x00" * 40),
    "a manifest of other things": lambda folder: (folder / MANIFEST_NAME).write_text("[]"),
    "a newer format": lambda folder: (folder / MANIFEST_NAME).write_text('{"format_version": 2, "files": {}}'),
    "nothing in it": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_used(tmp_path, damage):
    for update in (10, 20):
        write(tmp_path, update)
    DAMAGES[damage](tmp_path / "checkpoint-000020")
    with pytest.raises(ValueError, match="checkpoint-000020 is not a whole checkpoint: ") as raised:
        read_checkpoint(tmp_path / "checkpoint-000020")
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")
    found, damaged = read_latest(tmp_path)
    assert found.state["update"] == 10 and damaged == [str(raised.value)]
    DAMAGES["nothing in it"](tmp_path / "checkpoint-000010")
    with pytest.raises(ValueError, match="None of the 2 checkpoints .* is whole: .*000020.*000010"):
        read_latest(tmp_path)
    write(tmp_path, 20, version=1)  # and it can be written over
    assert read_latest(tmp_path)[0].state["version"] == 1


def test_no_checkpoint_at_all(tmp_path):
    assert read_latest(tmp_path / "nowhere") == (None, [])
    with pytest.raises(ValueError, match="nowhere is not a whole checkpoint"):
        read_checkpoint(tmp_path / "nowhere")


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(
        OSError, match="checkpoint-000002 could not be written .*No space left.*; the last one is .*checkpoint-000001"
    ):
        write(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-000001"] and read_latest(tmp_path)[0].state["update"] == 1


def test_small_files_are_whole_too(tmp_path, monkeypatch):
    write_file(tmp_path / "best.json", "one")
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "best.json", "another")
    assert (tmp_path / "best.json").read_text() == "one"


def test_differences_are_named():
    saved = json.loads(json.dumps({"gamma": 1.0, "range": (0.5, 2.0), "same": [1, 2], "gone": True}))
    ours = {"gamma": 2.0, "range": (0.5, 2.0), "same": (1, 2), "new": "x" * 200}
    assert differences(saved, ours) == [
        "gamma = 2.0 (1.0 in the checkpoint)",
        f"new = '{'x' * 79}… (None in the checkpoint)",
        "gone = None (True in the checkpoint)",
    ]
    assert differences(saved, ours, ["same", "range"]) == []


def test_a_fingerprint_sees_any_number_or_some():
    tensors = {"a": torch.randn(1000, dtype=torch.bfloat16), "b": torch.zeros(3, 5), "c": torch.tensor(2)}
    whole, some = fingerprint(tensors.items()), fingerprint(tensors.items(), numbers=64)
    assert fingerprint(list(tensors.items())[::-1]) == whole
    changed = tensors | {"a": torch.cat([tensors["a"][:-1], tensors["a"][-1:] + 1])}
    assert fingerprint(changed.items()) != whole
    assert fingerprint((tensors | {"a": tensors["a"] + 1}).items(), numbers=64) != some
    assert fingerprint((tensors | {"b": torch.zeros(5, 3)}).items(), numbers=64) != some
