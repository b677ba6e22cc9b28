import threading
import time

import pytest

from tinyr2.core.gate import Gate


def test_pressure_halves_the_limit_and_what_goes_well_raises_it_again():
    gate = Gate(8)
    gate.leave(gate.enter(), pressed=True)
    assert gate.limit == 4
    gate.leave(gate.enter(), pressed=False)
    assert gate.limit == 4.25  # one over the limit
    for _ in range(100):
        gate.leave(gate.enter(), pressed=False)
    assert gate.limit == 8  # never above what it was made for
    for _ in range(9):
        gate.leave(gate.enter(), pressed=True)
    assert gate.limit == 1  # something has to run


def test_requests_of_one_jam_halve_the_limit_once():
    gate = Gate(8)
    began = [gate.enter() for _ in range(5)]
    for at in began:
        gate.leave(at, pressed=True)
    assert gate.limit == 4


def test_no_more_than_the_limit_run_at_once():
    gate = Gate(2)
    first, second = gate.enter(), gate.enter()
    entered = threading.Event()
    third = threading.Thread(target=lambda: (gate.enter(), entered.set()), daemon=True)
    third.start()
    assert not entered.wait(0.05)
    gate.leave(first, pressed=False)
    assert entered.wait(1)
    gate.leave(second, pressed=False)


def test_busy_seconds_are_those_with_a_request_running_however_many():
    gate = Gate(4)
    time.sleep(0.02)
    a, b = gate.enter(), gate.enter()
    time.sleep(0.03)
    gate.leave(a, pressed=False)
    gate.leave(b, pressed=False)
    busy = gate.busy_seconds
    assert 0.03 <= busy < 0.05 + (time.monotonic() - b)
    time.sleep(0.02)
    assert gate.busy_seconds == busy


def test_a_hold_lets_nothing_begin_for_so_long():
    gate = Gate(4)
    start = time.monotonic()
    gate.hold(0.05)
    assert gate.enter() - start >= 0.05


def test_a_gate_lets_at_least_one_through():
    with pytest.raises(AssertionError):
        Gate(0)
