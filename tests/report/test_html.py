import json
from html.parser import HTMLParser

import pytest

from tinyr2.core.errors import DataError, RunError
from tinyr2.report.completions import Completion, write_completions
from tinyr2.report.html import report_data, write_report
from tinyr2.report.jsonl import Journal

REST = ' <img src=https://evil.example/x> {{ 7*7 }} &amp; "q"'
HOSTILE = f"<script>alert(1)</script>\x1b[31mred\x1b[0m\x1b]0;owned\x07{REST}"
SEEN = f"<script>alert(1)</script>red{REST}"


class Page(HTMLParser):
    """Tags with their attributes, and the text as a reader sees it."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def of(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def completion(step, number=0, text=HOSTILE, **more):
    return Completion(step=step, problem_id=f"train:{number}", author="student", prompt=f"ask {HOSTILE}",
                      completion=text, finish="stop", reward=0.25, **more)


def full_run(run):
    run.mkdir()
    metrics, events = Journal(run / "metrics.jsonl"), Journal(run / "events.jsonl")
    for step in range(1, 11):
        row = {"step": step, "loss": 1.0 / step, "kl": 0.5 / step, "grad_norm": 1.0, "custom": step * 2.0}
        metrics.append({**row, "eval_pass@1": 0.5 + step / 100} if step % 5 == 0 else row)
    metrics.append({"step": 11, "loss": float("nan")})
    events.append({"event": "alarm", "step": 11, "name": "non_finite", "level": "warn", "evidence": HOSTILE,
                   "action": "lower <b>learning_rate</b>", "stop": False})
    events.append({"event": "ended", "name": "ended", "ending": "halted"})
    write_completions(run / "completions", 10, [completion(10, tokens=["a<b\x1b[5m", "\n"], disagreement=[1.5, -0.2])])
    (run / "result.json").write_text(json.dumps({"rows": {"<i>teacher": {"pass_at_1": 0.9734, "n": 1024}},
                                                 "seconds": 171.3}))
    (run / "env.json").write_text(json.dumps({"verb": "distill", "command": ["tinyr2", "distill"], "machine": {
        "platform": "Linux <x>", "cpu": {"model": None}, "versions": {"torch": "2.13.0"}}}))
    (run / "config.resolved.yaml").write_text("train:\n  note: </pre><script>1</script>\n")
    (run / "final").mkdir()
    (run / "final" / "config.json").write_text("{}")
    return run


@pytest.fixture
def page(tmp_path):
    path = write_report(full_run(tmp_path / "my run"))
    assert path == tmp_path / "my run" / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_model_text_is_text_and_never_a_tag_or_a_template(page):
    assert page.of("script") == [] and page.of("img") == [] and page.of("i") == [] and page.of("b") != []
    assert SEEN in page.text and "ask " + SEEN in page.text
    assert "lower <b>learning_rate</b>" in page.text and "</pre><script>1</script>" in page.text


def test_no_control_character_reaches_the_page(tmp_path):
    html = write_report(full_run(tmp_path / "run")).read_text(encoding="utf-8")
    assert all(character in "\n\t" or character >= " " and not "\x7f" <= character <= "\x9f" for character in html)
    assert "owned" not in html


def test_the_page_asks_for_nothing_outside_itself(tmp_path):
    run = full_run(tmp_path / "run")
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert all(not {"src", "href", "srcset", "style", "action", "xmlns"} & attrs.keys() for _, attrs in page.tags)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form"})
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    write_completions(run / "completions", 10, [completion(10, text="plain")])
    (run / "events.jsonl").unlink()
    html = write_report(run).read_text(encoding="utf-8").replace("https://evil.example/x", "")
    assert "http://" not in html and "https://" not in html and "url(" not in html and "@import" not in html
    policy = next(attrs["content"] for attrs in page.of("meta") if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")


def test_summary_table_and_alarms_show_their_values(page):
    for text in ("my run", "halted", "171.3", "tinyr2 distill", "Linux <x>", "<i>teacher", "97.3%", "1,024",
                 "non_finite", "machine.versions.torch", "2.13.0", "ending halted"):
        assert text in page.text


def test_tokens_carry_their_disagreement_as_color_and_tooltip(page):
    tokens = [attrs for attrs in page.of("span") if attrs.get("title")]
    assert [(attrs["class"], attrs["title"]) for attrs in tokens] == [("t p3", "+1.500 nats"), ("t n1", "-0.200 nats")]
    assert "a<b↵\n" in page.text and "mean disagreement +0.650" in page.text


def test_each_metric_has_one_chart_and_eval_points_stand_at_their_steps(page):
    names = [attrs["aria-label"].removesuffix(" by step") for attrs in page.of("svg")]
    assert names == ["loss", "KL, nats per token", "eval_pass@1", "gradient norm", "custom"]
    dots = [float(attrs["cx"]) for attrs in page.of("circle")]
    assert dots == [pytest.approx(48 + 302 * (step - 1) / 10, abs=0.06) for step in (5, 10)]
    assert "(1 not finite)" in page.text


@pytest.mark.parametrize("piece", ["result.json", "env.json", "config.resolved.yaml", "metrics.jsonl", "events.jsonl",
                                   "completions/step-00000010.parquet", "final/config.json"])
def test_any_piece_may_be_missing(tmp_path, piece):
    run = full_run(tmp_path / "run")
    (run / piece).unlink()
    assert "tinyr2 run report" in Page(write_report(run).read_text(encoding="utf-8")).text


def test_each_piece_alone_makes_a_page(tmp_path):
    full = full_run(tmp_path / "full")
    pieces = ["metrics.jsonl", "timing.jsonl", "result.json", "env.json", "config.resolved.yaml"]
    (full / "timing.jsonl").write_text("")
    for number, piece in enumerate(pieces):
        run = tmp_path / str(number)
        run.mkdir()
        (run / piece).write_bytes((full / piece).read_bytes())
        assert "unfinished" in Page(write_report(run).read_text(encoding="utf-8")).text


def test_a_killed_run_shows_how_far_it_came(tmp_path):
    run = full_run(tmp_path / "run")
    (run / "events.jsonl").unlink()
    (run / "checkpoints" / "step-00000010").mkdir(parents=True)
    (run / "result.json").unlink()
    (run / "timing.jsonl").write_bytes(b'{"step": 1, "step_s": 1.5, "eval_s": 0.5}\n{"step": 2, "step_s": 2.0}\n{"st')
    data = report_data(run)
    assert data["status"] == "unfinished · last step 11 · newest checkpoint step-00000010"
    assert data["seconds"] == 4.0


def test_samples_are_24_at_most_and_the_newest_steps_come_first(tmp_path):
    run = tmp_path / "run"
    for step in range(1, 8):
        write_completions(run / "completions", step, [completion(step, n, f"text {step}.{n}") for n in range(8)])
    data = report_data(run)
    assert [row["step"] for row in data["completions"]] == [7] * 6 + [6] * 6 + [5] * 6 + [4] * 6
    assert data["completions"][0]["completion"] == "text 7.0"


def test_a_very_long_completion_is_cut_and_says_so(tmp_path):
    run = tmp_path / "run"
    many = ["ab "] * 4000
    write_completions(run / "completions", 1, [completion(1, 0, "x" * 10_000),
                                               completion(1, 1, "y", tokens=many, disagreement=[0.0] * 4000)])
    html = write_report(run).read_text(encoding="utf-8")
    assert "2,000 more characters" in html and "2,500 more tokens" in html
    assert len(html) < 200_000


def test_the_json_twin_is_strict_and_holds_the_figures(tmp_path):
    data = report_data(full_run(tmp_path / "run"))
    assert data["metrics"]["kl"] == {"first": 0.5, "last": 0.05, "last_step": 10, "count": 10, "min": 0.05, "max": 0.5}
    assert data["metrics"]["loss"]["last"] == "NaN" and data["metrics"]["loss"]["min"] == 0.1
    assert data["result"]["rows"]["<i>teacher"]["n"] == 1024
    assert data["alarms"][0]["name"] == "non_finite" and data["events"] == [{"event": "ended", "name": "ended",
                                                                                   "ending": "halted"}]
    json.dumps(data, allow_nan=False)


def test_what_is_no_run_folder_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(RunError, match="no such run folder"):
        write_report(tmp_path / "none")
    with pytest.raises(RunError, match="not a run folder"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("piece", "content", "message"), [
    ("result.json", "{", "result.json: not valid JSON"), ("env.json", "[]", "env.json: holds a list"),
    ("metrics.jsonl", '{"loss": 1}\n', "metrics.jsonl, line 1: .*`step`"),
    ("events.jsonl", "{\n", "events.jsonl, line 1")])
def test_a_damaged_piece_is_named(tmp_path, piece, content, message):
    run = full_run(tmp_path / "run")
    (run / piece).write_text(content)
    with pytest.raises(DataError, match=message):
        write_report(run)


def test_the_same_run_gives_the_same_page(tmp_path):
    run = full_run(tmp_path / "run")
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
