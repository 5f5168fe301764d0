"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
from pathlib import Path

import pytest

from usmlite.atomic import replacing, write_bytes, write_json
from usmlite.errors import OutputError


def test_writes_bytes(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a.bin", b"\0\1\2")
    assert (tmp_path / "a.bin").read_bytes() == b"\0\1\2"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"old and longer")
    write_bytes(tmp_path / "a.bin", b"new")
    assert (tmp_path / "a.bin").read_bytes() == b"new"


def test_writes_readable_json(tmp_path: Path) -> None:
    value = {"name": "Zoë", "wer": 0.057, "list": [1, None, True]}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "Zoë" in text
    assert text.endswith("}\n")


@pytest.mark.parametrize(("value", "error"), [(float("nan"), ValueError), ({1, 2}, TypeError)])
def test_what_json_cannot_hold_leaves_the_file(tmp_path: Path, value: object, error: type) -> None:
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(error):
        write_json(tmp_path / "a.json", {"value": value})
    assert (tmp_path / "a.json").read_text() == "1\n"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"a\.bin: cannot be written .*No space left") as caught:
        write_bytes(path, b"new")
    assert caught.value.exit_code == 2
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits")
def test_a_limit_reached_in_mid_write_leaves_the_old_file(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "a.bin"
    write_bytes(path, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(OutputError, match=r"a\.bin: cannot be written"):
            write_bytes(path, bytes(4_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="Permission denied"):
            write_bytes(tmp_path / "a.bin", b"new")
    finally:
        tmp_path.chmod(0o700)
    assert not os.listdir(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"a\.bin: cannot be written .*No such file"):
        write_bytes(tmp_path / "none" / "a.bin", b"new")
    assert not os.listdir(tmp_path)


def test_a_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "a.bin").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        write_bytes(tmp_path / "a.bin", b"new")
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_the_old_file(tmp_path: Path, interruption: type[BaseException]) -> None:
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")

    def write_half() -> None:
        with replacing(path) as file:
            file.write(b"half of the n")
            raise interruption

    with pytest.raises(interruption):
        write_half()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_the_destination_is_untouched_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.skipif(sys.platform == "win32", reason="no umask")
def test_the_file_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "a.bin", b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.bin").stat().st_mode) == 0o640


def test_a_name_of_the_greatest_length(tmp_path: Path) -> None:
    name = "a" * 250 + ".json"
    write_bytes(tmp_path / name, b"new")
    assert os.listdir(tmp_path) == [name]
