"""Durable files: old or new after any failure, every changed bit noticed, one writer at a time."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tinyr2.core import files
from tinyr2.core.errors import RunError
from tinyr2.core.files import commit_folder, free_bytes, sha256, single_writer, verify_folder, write_atomic

HOLDER = """
import sys
from tinyr2.core.files import single_writer
with single_writer(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def published(folder: Path) -> Path:
    """A committed folder with two files, one of them in a folder inside."""
    tmp = folder / ".tmp"
    (tmp / "inner").mkdir(parents=True)
    (tmp / "a.bin").write_bytes(bytes(range(64)))
    (tmp / "inner" / "b.txt").write_text("zwei")
    commit_folder(tmp, folder / "final")
    return folder / "final"


def record_operations(monkeypatch) -> list[str]:
    """The names, in order, of what is synced and renamed from now on."""
    seen = []
    sync, rename, replace = os.fsync, os.rename, os.replace

    def fsync(handle):
        seen.append(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", lambda a, b: (seen.append("rename"), rename(a, b)))
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append("rename"), replace(a, b)))
    return seen


def test_write_atomic_replaces_the_whole_file(tmp_path):
    path = tmp_path / "result.json"
    write_atomic(path, b"a long first content")
    write_atomic(path, "grün")
    assert path.read_bytes() == "grün".encode()
    assert os.listdir(tmp_path) == ["result.json"]


@pytest.mark.parametrize("operation", ["os.fsync", "os.replace", "builtins.open"])
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_over(tmp_path, monkeypatch, operation):
    path = tmp_path / "result.json"
    write_atomic(path, "old")

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(operation, fail)
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["result.json"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names open files through /proc")
def test_write_atomic_syncs_the_file_before_and_the_folder_after_the_rename(tmp_path, monkeypatch):
    seen = record_operations(monkeypatch)
    write_atomic(tmp_path / "x", "1")
    assert seen[0].startswith("sync .x.") and seen[1:] == ["rename", f"sync {tmp_path.name}"]


def test_sha256_is_the_published_digest_of_abc(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_committed_folder_is_found_whole(tmp_path):
    final = published(tmp_path)
    assert verify_folder(final) == []
    assert json.loads((final / "manifest.json").read_text()) == {"schema": 1, "files": {
        "a.bin": {"size": 64, "sha256": sha256(final / "a.bin")},
        "inner/b.txt": {"size": 4, "sha256": sha256(final / "inner" / "b.txt")}}}
    assert os.listdir(tmp_path) == ["final"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names open files through /proc")
def test_commit_syncs_everything_before_the_rename_and_the_manifest_last(tmp_path, monkeypatch):
    seen = record_operations(monkeypatch)
    published(tmp_path)
    assert seen == ["sync a.bin", "sync b.txt", "sync manifest.json", "sync inner", "sync .tmp", "rename",
                    f"sync {tmp_path.name}"]


def test_commit_never_overwrites_a_folder_that_stands(tmp_path):
    final = published(tmp_path)
    (tmp_path / "other").mkdir()
    with pytest.raises(OSError):
        commit_folder(tmp_path / "other", final)
    assert verify_folder(final) == []


def test_each_kind_of_damage_is_named_with_its_file(tmp_path):
    final = published(tmp_path)
    path, good = final / "a.bin", bytes(range(64))
    path.write_bytes(good[:10])
    assert verify_folder(final) == ["a.bin: truncated, 10 bytes where 64 were written"]
    path.write_bytes(good + b"x")
    assert verify_folder(final) == ["a.bin: grown, 65 bytes where 64 were written"]
    path.write_bytes(bytes(64))
    assert verify_folder(final) == ["a.bin: changed, its SHA-256 is not the one recorded"]
    path.unlink()
    (final / "inner" / "b.txt").unlink()
    assert verify_folder(final) == ["a.bin: missing", "inner/b.txt: missing"]
    (final / "manifest.json").unlink()
    assert verify_folder(final) == ["manifest.json: missing"]


def test_a_file_that_cannot_be_read_is_a_fault_and_no_crash(tmp_path, monkeypatch):
    final = published(tmp_path)

    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "sha256", fail)
    assert verify_folder(final)[0] == "a.bin: unreadable: Input/output error"
    assert verify_folder(final / "a.bin") == ["manifest.json: unreadable: Not a directory"]


@pytest.mark.parametrize("content", [b"", b"\0" * 200, b"[]", b"{}", b"null", b"\xff", b'{"schema": 1}',
                                     b'{"schema": 1, "files": 3}', b'{"schema": 1, "files": {"a": []}}',
                                     b'{"schema": 1, "files": {"a": {}}}'])
def test_a_manifest_of_another_shape_is_a_fault_and_no_crash(tmp_path, content):
    final = published(tmp_path)
    (final / "manifest.json").write_bytes(content)
    assert [fault.split(",")[0] for fault in verify_folder(final)] == ["manifest.json: changed"]


def test_a_manifest_of_another_schema_is_refused(tmp_path):
    final = published(tmp_path)
    (final / "manifest.json").write_text('{"schema": 2, "files": {}}')
    assert verify_folder(final) == ["manifest.json: schema 2, this version reads 1"]


@pytest.mark.parametrize("name", ["a.bin", "manifest.json"])
def test_every_single_flipped_bit_is_noticed(tmp_path, name):
    final = tmp_path / "final"
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / "a.bin").write_bytes(bytes(range(64)))
    commit_folder(tmp_path / "tmp", final)
    path = final / name
    good = path.read_bytes()
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        path.write_bytes(bad)
        assert verify_folder(final), f"bit {place % 8} of byte {place} of {name}"
    path.write_bytes(good)
    assert verify_folder(final) == []


def test_a_second_handle_is_refused_until_the_first_lets_go(tmp_path):
    with single_writer(tmp_path):
        with pytest.raises(RunError, match=f"process {os.getpid()} on host"), single_writer(tmp_path):
            pytest.fail("two writers at once")
        record = json.loads((tmp_path / "lock").read_text())
        assert record["pid"] == os.getpid() and set(record) == {"host", "pid", "boot_id"}
    with single_writer(tmp_path):
        pass


def test_the_lock_is_given_back_when_the_block_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), single_writer(tmp_path):
        1 / 0  # noqa: B018
    with single_writer(tmp_path):
        pass


def test_a_second_process_is_refused_by_name_and_let_in_after_a_kill(tmp_path):
    root = Path(files.__file__).parents[2]
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              env={**os.environ, "PYTHONPATH": str(root)})
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match=f"process {holder.pid} on host"), single_writer(tmp_path):
            pytest.fail("two writers at once")
    finally:
        holder.kill()
        holder.communicate()
    with single_writer(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_holder_that_has_not_signed_yet_is_still_respected(tmp_path):
    with single_writer(tmp_path):
        (tmp_path / "lock").write_text("")
        with pytest.raises(RunError, match="another process is writing here"), single_writer(tmp_path):
            pytest.fail("two writers at once")


def test_a_folder_that_is_not_there_cannot_be_locked(tmp_path):
    with pytest.raises(RunError, match="cannot be opened"), single_writer(tmp_path / "none"):
        pytest.fail("locked nothing")


def test_free_bytes_asks_the_nearest_folder_that_exists(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1) if path == tmp_path else 0)
    assert free_bytes(tmp_path / "runs" / "not" / "yet") == 1


def make_folder(path, text):
    path.mkdir()
    (path / "inner").mkdir()
    (path / "inner" / "file").write_text(text)


def test_a_folder_is_replaced_whole(tmp_path):
    make_folder(tmp_path / "final", "old")
    make_folder(tmp_path / "tmp", "new")
    files.replace_folder(tmp_path / "tmp", tmp_path / "final")
    assert (tmp_path / "final/inner/file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


class Crash(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("after", [False, True])
def test_a_crash_around_a_rename_leaves_the_old_folder_or_the_new_one(tmp_path, monkeypatch, at, after):
    make_folder(tmp_path / "final", "old")
    make_folder(tmp_path / "tmp", "new")
    rename, calls = os.rename, []

    def crash(*names):
        calls.append(names)
        if len(calls) == at + 1 and not after:
            raise Crash
        rename(*names)
        if len(calls) == at + 1:
            raise Crash

    monkeypatch.setattr(os, "rename", crash)
    with pytest.raises(Crash):
        files.replace_folder(tmp_path / "tmp", tmp_path / "final")
    monkeypatch.undo()
    files.recover_folders(tmp_path)
    expected = "new" if (at, after) == (1, True) else "old"
    assert (tmp_path / "final/inner/file").read_text() == expected
    assert not list(tmp_path.glob(".old-*"))
