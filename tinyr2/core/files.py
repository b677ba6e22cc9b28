"""Durable files: what is written whole, what is proven unchanged, and who may write at all.

In: bytes, paths, folders. Out: files and folders that are either the old or the new ones after a crash at any
instant, and the list of faults of a folder that is not as it was written. POSIX only (`flock`, `fsync` of folders).
"""

import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO
from uuid import uuid4

from tinyr2.core.errors import RunError

MANIFEST = "manifest.json"
LOCK = "lock"
SCHEMA = 1  # of the manifest


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Replace the file `path` by `data` (text as UTF-8), durably: a reader sees the old file or the new one.

    Raises OSError (disk full, no such folder, …) with the old file intact and nothing left over.
    """
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        _write_synced(tmp, data)
        os.replace(tmp, path)
    except OSError:
        tmp.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sha256(path: str | Path) -> str:
    """The SHA-256 of the file's bytes, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(path: str | Path) -> None:
    """Make the folder's entries (files created, renamed, removed) survive a loss of power."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def commit_folder(tmp: str | Path, final: str | Path) -> None:
    """Publish the finished folder `tmp` under the name `final`, at once and durably.

    Every file is synced, `manifest.json` (size in bytes and SHA-256 of each) is written last, and one rename makes the
    folder visible; `final` must not exist, and lie on the same file system. Raises OSError, in which case `tmp` is
    the caller's to remove; once it has become `final`, it is complete.
    """
    tmp, final = Path(tmp), Path(final)
    inside = sorted(tmp.rglob("*"))
    files = {p.relative_to(tmp).as_posix(): _sync_and_hash(p) for p in inside if p.is_file()}
    _write_synced(tmp / MANIFEST, json.dumps({"schema": SCHEMA, "files": files}, indent=1))
    for folder in [*(p for p in inside if p.is_dir()), tmp]:
        sync_folder(folder)
    os.rename(tmp, final)
    sync_folder(final.parent)


def replace_folder(tmp: str | Path, final: str | Path) -> None:
    """Publish the finished folder `tmp` under the name `final`, durably, in the place of what stood there.

    The old folder is renamed to `.old-NAME` first and removed last; `recover_folders` mends a crash in between.
    """
    tmp, final = Path(tmp), Path(final)
    inside = sorted(tmp.rglob("*"))
    for path in inside:
        if path.is_file():
            _sync_and_hash(path)
    for folder in [*(p for p in inside if p.is_dir()), tmp]:
        sync_folder(folder)
    old = final.with_name(f".old-{final.name}")
    if final.exists():
        os.rename(final, old)
    os.rename(tmp, final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)  # what resists is harmless, and removed by `recover_folders`


def recover_folders(parent: str | Path) -> None:
    """Finish what `replace_folder` left: an old folder goes back where nothing took its place, and away elsewhere."""
    for old in Path(parent).glob(".old-*"):
        final = old.with_name(old.name.removeprefix(".old-"))
        if final.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, final)
    sync_folder(parent)


def verify_folder(folder: str | Path) -> list[str]:
    """What is wrong with a folder that `commit_folder` published; an empty list when every byte is as it was.

    Reads every file. Files that the manifest does not name are nobody's fault.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest["schema"] != SCHEMA:
            return [f"{MANIFEST}: schema {manifest['schema']!r}, this version reads {SCHEMA}"]
        files = [(name, entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()]
    except FileNotFoundError:
        return [f"{MANIFEST}: missing"]
    except OSError as error:
        return [f"{MANIFEST}: unreadable: {error.strerror}"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # zeroed or changed: any shape can turn up
        return [f"{MANIFEST}: changed, it is no manifest any more ({type(error).__name__}: {error})"]
    return [fault for name, size, digest in files if (fault := _fault(folder / name, name, size, digest))]


@contextmanager
def single_writer(folder: str | Path) -> Iterator[None]:
    """Hold `folder` against every other writer until the block ends or this process dies, however it dies.

    The file `lock` inside says who holds it: host, pid, boot id. Raises RunError, naming the holder, when another
    process (or another handle of this one) has it. Children made by fork keep the lock for as long as they live.
    """
    file = _take_lock(Path(folder) / LOCK)
    try:
        yield
    finally:
        file.close()  # gives the lock back; the record stays and says who was here last


def free_bytes(path: str | Path) -> int:
    """Bytes that this user may still write where `path` is, or would be made."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _write_synced(path: Path, data: bytes | str) -> None:
    with open(path, "xb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()  # fsync knows nothing of Python's own buffer
        os.fsync(file.fileno())


def _sync_and_hash(path: Path) -> dict[str, int | str]:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _fault(path: Path, name: str, size: int, digest: str) -> str | None:
    try:
        found = path.stat().st_size
        if found != size:
            return f"{name}: {'truncated' if found < size else 'grown'}, {found} bytes where {size} were written"
        return None if sha256(path) == digest else f"{name}: changed, its SHA-256 is not the one recorded"
    except FileNotFoundError:
        return f"{name}: missing"
    except OSError as error:
        return f"{name}: unreadable: {error.strerror}"


def _take_lock(path: Path) -> TextIO:
    """The lock file, held and signed. The caller closes it."""
    try:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (it outlives this function)
    except OSError as error:
        raise RunError(f"{path}: cannot be opened ({error.strerror}); is the folder there and writable?") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "boot_id": _boot_id()}, file)
        file.flush()
    except BlockingIOError as error:
        holder = _holder(file)
        file.close()
        raise RunError(f"{path.parent}: {holder} is writing here; wait for it, stop it, or choose another "
                       "folder") from error
    except OSError as error:
        file.close()
        raise RunError(f"{path}: cannot be locked ({error.strerror}); choose a folder on a local disk with some "
                       "space left") from error
    return file


def _holder(file: TextIO) -> str:
    file.seek(0)
    try:
        record = json.loads(file.read())
        return f"process {record['pid']} on host {record['host']!r}"
    except (ValueError, KeyError, TypeError):  # it took the lock this instant and has not signed yet
        return "another process"


def _boot_id() -> str | None:
    """What tells this start of the machine from the one before, where the system says so (Linux)."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else None
