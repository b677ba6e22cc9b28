"""Work in a child process: what comes back, and what signals and deaths do."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import tinyr2
from tests.recipes import killing
from tinyr2.core.errors import DataError
from tinyr2.recipes.child import Ended, run_in_child


@pytest.fixture(scope="module", autouse=True)
def server():
    killing.warm()


def answer(text: str, console) -> dict:
    return {"said": text, "json": console.json_mode, "pid": os.getpid()}


def fail(console) -> None:
    raise DataError("no such file; give another")


def kill_self(console) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave(console) -> None:
    os._exit(7)


def wait_for_sigterm(started: str, console) -> str:
    came = []
    signal.signal(signal.SIGTERM, lambda *_: came.append(1))
    Path(started).touch()
    while not came:
        time.sleep(0.005)
    return "saved"


def sleep(started: str, console) -> None:
    Path(started).write_text(str(os.getpid()))
    time.sleep(60)


def when(path: Path) -> None:
    end = time.monotonic() + 20
    while not (path.exists() and (path.stat().st_size or path.suffix == ".touched")) and time.monotonic() < end:
        time.sleep(0.005)


def test_what_the_work_returns_comes_back_from_another_process():
    ended = run_in_child(answer, "hello", json_mode=True)
    pid = ended.value.pop("pid")
    assert ended == Ended(value={"said": "hello", "json": True}) and pid != os.getpid()


@pytest.mark.parametrize(("work", "fault"), [
    (fail, "could not go on: no such file; give another"), (kill_self, "was ended by SIGKILL"),
    (leave, "ended with exit code 7")])
def test_work_that_fails_says_how(work, fault):
    assert run_in_child(work) == Ended(fault=fault)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_what_the_child_saved_comes_back(number, tmp_path):
    started = tmp_path / "a.touched"

    def send():
        when(started)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    threading.Thread(target=send).start()
    assert run_in_child(wait_for_sigterm, str(started)) == Ended(value="saved", interrupted=True)
    assert signal.getsignal(number) == before


def test_a_child_that_cannot_save_ends_with_the_signal_and_it_is_told(tmp_path):
    started = tmp_path / "pid"
    threading.Thread(target=lambda: (when(started), os.kill(os.getpid(), signal.SIGTERM))).start()
    assert run_in_child(sleep, str(started)) == Ended(fault="was ended by SIGTERM", interrupted=True)


def test_a_child_dies_with_its_parent(tmp_path):
    (tmp_path / "sleeper.py").write_text(
        "import os, pathlib, time\nfrom tinyr2.recipes.child import run_in_child\n\n\n"
        "def sleep(console):\n    pathlib.Path('pid').write_text(str(os.getpid()))\n    time.sleep(60)\n")
    environment = os.environ | {"PYTHONPATH": f"{Path(tinyr2.__file__).parents[1]}"}
    parent = subprocess.Popen([sys.executable, "-c", "import sleeper; sleeper.run_in_child(sleeper.sleep)"],
                              cwd=tmp_path, env=environment)
    when(tmp_path / "pid")
    pid = int((tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    end = time.monotonic() + 5
    while _lives(pid) and time.monotonic() < end:
        time.sleep(0.005)
    assert not _lives(pid)


def _lives(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
