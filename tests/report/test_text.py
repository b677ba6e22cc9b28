import time

import pytest

from tinyr2.report.text import clean


@pytest.mark.parametrize(("hostile", "safe"), [
    ("\x1b[31mred\x1b[0m", "red"),
    ("\x1b]0;owned\x07title", "title"),
    ("\x1b]8;;file:///etc\x1b\\link\x1b]8;;\x1b\\", "link"),
    ("\x9b2Jcleared\x9d0;t\x9c!", "cleared!"),
    ("\x1bP1$r\x1b\\dcs", "dcs"),
    ("\x1b]0;never ended", "0;never ended"),
    ("\x1b\x1b[0m[31mnested", "[31mnested"),
    ("bell\x07 back\x08 nul\x00 del\x7f", "bell back nul del"),
    ("over\rwritten\r\n", "overwritten\n"),
    ("turned \u202earound\u2066", "turned around"),
    ("lone \ud800 surrogate", "lone  surrogate"),
    ("tab\tand\nnewline, Ünï, 数学, 👩\u200d🚀", "tab\tand\nnewline, Ünï, 数学, 👩\u200d🚀"),
])
def test_control_sequences_go_whole_and_text_stays(hostile, safe):
    assert clean(hostile) == safe


@pytest.mark.parametrize("start", ["\x1b]", "\x9d", "\x1b[", "\x9b1;"])
def test_endless_unfinished_sequences_cost_linear_time(start):
    began = time.perf_counter()
    assert "\x1b" not in clean(start * 100_000)
    assert time.perf_counter() - began < 1.0
