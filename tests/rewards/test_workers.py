import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tinyr2.core.errors import RunError
from tinyr2.rewards.workers import Workers

# What the workers need of a program: a null first, then a verdict for each question; it may hang, or end.
PROGRAM = """
import json, os, struct, sys, time
def send(value):
    data = json.dumps(value).encode()
    os.write(1, struct.pack(">I", len(data)) + data)
time.sleep({start_s})
send(None)
while header := sys.stdin.buffer.read(4):
    gold, given, _ = json.loads(sys.stdin.buffer.read(struct.unpack(">I", header)[0]))
    while given == "hangs":
        pass
    if given == "ends":
        os._exit(1)
    send(None if given == "unread" else gold == given)
"""
SAME, OTHER, HANGS, ENDS, UNREAD = [("4", given) for given in ("4", "5", "hangs", "ends", "unread")]


@pytest.fixture
def start(tmp_path):
    """Workers that run the program above."""
    made = []

    def make(count, timeout_s, start_s=0.0):
        program = tmp_path / f"{len(made)}.py"
        program.write_text(PROGRAM.replace("{start_s}", str(start_s)))
        made.append(Workers(count, timeout_s, program))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


@pytest.fixture
def pool(start):
    made = start(2, 0.5)
    assert made.ask([SAME, SAME]) == [True, True]
    return made


def pids(pool):
    return [worker._process.pid for worker in pool._workers]


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_that_hangs_is_killed_within_its_time_and_the_others_go_on(pool):
    pool.ask([SAME] * 20)
    before, began = set(pids(pool)), time.monotonic()
    assert pool.ask([SAME, HANGS, OTHER, SAME, SAME]) == [True, None, False, True, True]
    assert 0.5 <= time.monotonic() - began < 1.5
    assert (pool.asked, pool.killed) == (27, 1)
    assert len(before & set(pids(pool))) == 1
    assert sum(is_alive(pid) for pid in before) == 1
    assert pool.ask([OTHER, SAME]) == [False, True]


def test_as_many_that_hang_as_there_are_workers_stop_nothing(pool):
    assert pool.ask([HANGS, HANGS, SAME, HANGS, OTHER]) == [None, None, True, None, False]
    assert pool.killed == 3


def test_a_worker_that_ends_over_a_question_leaves_it_undecided(pool):
    assert pool.ask([ENDS, SAME, ENDS, OTHER]) == [None, True, None, False]
    assert pool.killed == 2


def test_undecided_is_no_fault_of_the_worker(pool):
    before = pids(pool)
    assert pool.ask([UNREAD, SAME, UNREAD]) == [None, True, None]
    assert pids(pool) == before
    assert pool.killed == 0


def test_a_question_s_time_does_not_count_the_start(start):
    slow = start(1, 0.3, start_s=0.6)
    assert slow.ask([SAME]) == [True]
    assert slow.killed == 0


def test_a_worker_that_was_killed_from_outside_is_replaced_and_its_question_asked_again(pool):
    for pid in pids(pool):
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert pool.ask([SAME, OTHER, SAME]) == [True, False, True]
    assert pool.killed == 0


def test_no_question_starts_no_process(start):
    idle = start(2, 1.0)
    assert idle.ask([]) == []
    assert pids(idle) == []


def test_threads_may_share_the_workers(pool):
    found = {}
    asking = [threading.Thread(target=lambda i=i: found.update({i: pool.ask([SAME, OTHER])})) for i in range(3)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert found == {i: [True, False] for i in range(3)}


def test_an_interrupted_batch_leaves_no_answer_to_the_next(pool, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("tinyr2.rewards.workers.wait", interrupted)
        pool.ask([SAME, SAME])
    assert pool.ask([OTHER, OTHER]) == [False, False]


def test_a_program_that_does_not_start_is_a_run_error(tmp_path):
    program = tmp_path / "judge.py"
    program.write_text("import no_such_thing\n")
    broken = Workers(1, 0.5, program)
    with pytest.raises(RunError, match=f"did not start; see why with: .* {program}"):
        broken.ask([SAME])
    assert pids(broken) == []


def test_workers_end_when_nobody_holds_them_any_more(tmp_path):
    program = tmp_path / "own.py"
    program.write_text(PROGRAM.replace("{start_s}", "0"))
    own = Workers(1, 1.0, program)
    own.ask([SAME])
    pid, = pids(own)
    assert is_alive(pid)
    del own
    assert not is_alive(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("question", [("x+1", "1+x"), ("5", "9999999999!")], ids=["idle", "busy inside C"])
def test_judges_end_when_the_parent_is_killed(question):
    if not os.environ.get("CI"):  # there a missing package is a failure
        pytest.importorskip("math_verify")
    program = (f"import threading, time\nfrom tinyr2.rewards.workers import Workers\npool = Workers(1, 0.4)\n"
               f"pool.ask([('x', 'x')])\npid = pool._workers[0]._process.pid\n"
               f"threading.Thread(target=pool.ask, args=([{question!r}],), daemon=True).start()\n"
               f"time.sleep(0.05)\nprint(pid, flush=True)\ntime.sleep(60)\n")
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(pid)
