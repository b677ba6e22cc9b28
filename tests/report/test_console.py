import io
import json

import pytest

from tinyr2.report.completions import Completion
from tinyr2.report.console import Console
from tinyr2.report.table import result_table

METRICS = {"loss": 0.12345, "kl": 0.0456, "completions/mean_length": 33.14}
HOSTILE = Completion(step=7, problem_id="p", author="student", prompt="2+2?\x1b]0;owned\x07",
                     completion="\x1b[2J[bold]4[/bold] :smile:\rfin", finish="stop", reward=1.0)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def plain(every=5.0):
    stream, clock = io.StringIO(), Clock()
    return Console(stream=stream, clock=clock, every=every), stream, clock


def test_plain_progress_prints_the_first_one_in_five_seconds_and_the_last():
    console, stream, clock = plain()
    for step in range(1, 13):
        clock.now = float(step)
        console.progress(step, 12, METRICS)
    shown = [line.split(" · ")[0] for line in stream.getvalue().splitlines()]
    assert shown == ["step 1/12", "step 6/12", "step 11/12", "step 12/12"]


def test_progress_shows_loss_kl_length_rate_and_time_left():
    console, stream, clock = plain(every=0.0)
    console.progress(10, 110, {**METRICS, "num_tokens": 1000.0}, name="distill")
    clock.now = 2.0
    console.progress(20, 110, {**METRICS, "num_tokens": 11_000.0}, name="distill")
    assert stream.getvalue().splitlines()[-1] == (
        "distill 20/110 · ETA 0:18 · loss 0.1235 · kl 0.0456 · length 33.1 · 5,000 tokens/s")


def test_a_progress_line_that_the_clock_held_back_is_printed_when_the_run_stops():
    console, stream, _ = plain()
    with console:
        console.progress(1, 9, {"loss": 3.0})
        console.progress(2, 9, {"loss": 2.0})
    assert [line.split(" · ")[:2] for line in stream.getvalue().splitlines()] == [["step 1/9", "loss 3.0000"],
                                                                               ["step 2/9", "loss 2.0000"]]


def test_a_new_stage_measures_its_own_rate():
    console, stream, clock = plain()
    for step in (1, 2):
        clock.now += 100.0
        console.progress(step, 2, {"loss": 1.0}, name="cold start")
    for step in (1, 2):
        clock.now += 10.0
        console.progress(step, 4, {"loss": 1.0}, name="distill")
    assert stream.getvalue().splitlines()[-1].startswith("distill 2/4 · ETA 0:20 · ")


def test_plain_output_has_no_control_characters_whatever_the_model_wrote():
    console, stream, _ = plain()
    console.progress(1, 2, METRICS)
    console.sample(HOSTILE)
    console.alarm({"level": "critical", "name": "\x1b[5mgap", "step": 3, "evidence": "\x9b31m",
                   "action": "\x1b]0;x\x07stop"})
    console.note("\x1b[31mnote")
    console.table(result_table({"\x1b[1mrow": {"n": 1}}))
    text = stream.getvalue()
    assert all(character == "\n" or character.isprintable() for character in text)
    assert "[bold]4[/bold] :smile:fin" in text and "owned" not in text
    assert "CRITICAL gap at step 3: \n  what to do: stop" in text


def test_on_a_terminal_model_text_is_neither_markup_nor_control_sequence():
    stream = Terminal()
    console = Console(plain=False, stream=stream, clock=Clock())
    with console:
        console.progress(1, 2, METRICS)
        console.sample(HOSTILE)
        console.alarm({"level": "warn", "name": "gap", "step": 3, "evidence": "[red]0.3[/red]", "action": "look"})
        console.table(result_table({"[blink]row": {"n": 1}}))
    text = stream.getvalue()
    assert "\x1b[2J" not in text and "\x1b]0;" not in text
    assert "[bold]4[/bold] :smile:fin" in text and "[red]0.3[/red]" in text and "[blink]row" in text
    assert "loss 0.1235" in text


def test_the_live_line_gives_the_cursor_back_also_after_an_error():
    stream = Terminal()
    with pytest.raises(RuntimeError), Console(plain=False, stream=stream) as console:
        console.progress(1, 5, METRICS)
        raise RuntimeError
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


def test_plain_is_chosen_by_the_stream_and_the_environment(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert Console(stream=io.StringIO()).plain and not Console(stream=Terminal()).plain
    monkeypatch.setenv("TERM", "dumb")
    assert Console(stream=Terminal()).plain
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert Console(stream=Terminal()).plain


@pytest.mark.parametrize("live", [True, False])
def test_in_json_mode_standard_output_holds_the_result_line_alone(capsys, live):
    console = Console(json_mode=True, plain=not live)
    console.progress(1, 3, METRICS)
    console.sample(HOSTILE)
    console.note("done")
    console.table(result_table({"teacher": {"n": 1}}))
    console.result({"rows": {"teacher": {"n": 1, "loss": float("nan")}}})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"rows": {"teacher": {"n": 1, "loss": "NaN"}}} and out.count("\n") == 1
    assert "done" in err and "teacher" in err and "loss 0.1235" in err


def test_in_json_mode_a_live_line_leaves_standard_output_alone(capsys):
    console = Console(json_mode=True, plain=False)
    console.progress(1, 3, METRICS)
    print("a line of somebody else's")
    console.close()
    assert capsys.readouterr().out == "a line of somebody else's\n"


def test_without_json_mode_result_prints_nothing(capsys):
    Console(plain=True).result({"a": 1})
    assert capsys.readouterr().out == ""


def test_a_stream_that_cannot_encode_a_character_gets_a_question_mark():
    raw = io.BytesIO()
    console = Console(stream=io.TextIOWrapper(raw, encoding="ascii"), plain=True)
    console.note("数 = 4")
    assert raw.getvalue() == b"? = 4\n"


def test_a_long_completion_is_shortened_in_the_middle():
    console, stream, _ = plain()
    console.sample(Completion(step=1, problem_id="p", author="student", prompt="q",
                              completion="a" * 5000 + "z", finish="length"))
    assert "… 3,801 characters …" in stream.getvalue() and stream.getvalue().rstrip().endswith("z")
