"""`tinyr2 report`: the page is written again, its path printed, its data returned."""

import io
import json

import pytest

from tinyr2.core.errors import RunError
from tinyr2.recipes import report as recipe
from tinyr2.recipes.report import report
from tinyr2.report.console import Console


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": 3.0 - s}) + "\n" for s in (1, 2)))
    return folder


def test_the_page_is_written_again_and_its_path_is_the_only_output(run):
    (run / "report.html").write_text("stale")
    stream = io.StringIO()
    result = report(run, Console(stream=stream, plain=True))
    assert stream.getvalue() == f"{run / 'report.html'}\n"
    assert "<svg" in (run / "report.html").read_text()
    assert result["report"] == str(run / "report.html")
    assert (result["steps"], result["metrics"]["loss"]["last"]) == (2, 1.0)


def test_the_page_is_opened_on_demand_and_a_missing_browser_is_said(run, monkeypatch):
    opened = []
    monkeypatch.setattr(recipe.webbrowser, "open", lambda url: opened.append(url))
    stream = io.StringIO()
    report(run, Console(stream=stream, plain=True), show=True)
    assert opened == [(run / "report.html").as_uri()]
    assert "no browser could be started" in stream.getvalue()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="not a run folder"):
        report(tmp_path, Console(stream=io.StringIO(), plain=True))
