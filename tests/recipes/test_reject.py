"""Rejection sampling: what is refused, what the files hold, and that a kill changes nothing."""

import io
import json
from pathlib import Path

import pytest

from tests.recipes import tiny
from tinyr2.core.config import build
from tinyr2.core.errors import ConfigError, DataError, RunError
from tinyr2.data.pairs import PairsConfig, load_pairs
from tinyr2.data.problems import DataConfig, load_problems
from tinyr2.recipes import answers as room
from tinyr2.recipes.reject import RejectConfig, reject
from tinyr2.report.console import Console


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tiny.make_world(tmp_path_factory.mktemp("world"))
    # the untrained student is right by this one now and then
    (folder / "lenient.py").write_text(
        "def lenient(completion_ids, answer, **kwargs):\n"
        "    return [float(sum(ids) % 3 == 0) for ids in completion_ids]\n\n\n"
        "def dumb(completion_ids, **kwargs):\n    return [None] * len(completion_ids)\n\n\n"
        "def never(completion_ids, **kwargs):\n    return [0.0] * len(completion_ids)\n")
    return folder


def config(world: Path | None = None, **changes) -> RejectConfig:
    raw = {"model": {"path": str(world / "student") if world else "m"}, "device": "cpu", "output_dir": "o",
           "data": {"path": str(world / "data.jsonl") if world else "d.jsonl"}}
    if world:
        raw |= {"rewards": [{"file": str(world / "lenient.py"), "function": "lenient"}], "num_generations": 4,
                "max_completion_length": 12, "num_threads": 1, "problems_per_chunk": 8, "temperature": 1.0,
                "data": {"path": str(world / "data.jsonl"), "limit": 20}}
    return build(RejectConfig, raw | changes, "test")


@pytest.mark.parametrize(("changes", "message"), [
    ({"require": {"exact_anser": 1.0}}, "require.exact_anser: no reward of that name; did you mean 'exact_answer'"),
    ({"rewards": [{"name": "exact_answer", "weight": 0}]}, "every weight is 0"),
    ({"pairs": True, "num_generations": 1}, "set num_generations to 2 or more"),
    ({"temperature": 0}, "temperature"),
])
def test_choices_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


# --- the files


def go(settings: RejectConfig, out: Path, **options) -> dict:
    with tiny.torch_as_it_was():
        return reject(settings.model_copy(update={"output_dir": str(out)}),
                      Console(plain=True, stream=io.StringIO()), **options)


@pytest.fixture(scope="module")
def done(world, tmp_path_factory) -> tuple[dict, Path]:
    out = tmp_path_factory.mktemp("runs") / "rs"
    return go(config(world, pairs=True), out), out


def test_what_is_kept_is_ready_for_sft_and_the_figures_are_those_of_the_rows(world, done):
    result, out = done
    kept = load_problems(DataConfig(path=str(out / "data.jsonl")))
    asked = {p.messages: p for p in load_problems(DataConfig(path=str(world / "data.jsonl"), limit=20))}
    assert 3 < len(kept) == result["kept"] == result["solved"] < 20
    assert all(p.completion[0].content.strip() and p.answer == asked[p.messages].answer for p in kept)
    assert len({p.messages for p in kept}) == len(kept)
    assert (result["problems"], result["answers"], result["ending"]) == (20, 80, "finished")
    assert result["pass_rate"] == result["right"] / 80
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["num_generated_tokens"] == result["num_generated_tokens"]
    assert (out / "report.html").is_file()


def test_pairs_are_ready_for_a_reward_model(done):
    result, out = done
    pairs = load_pairs(PairsConfig(path=str(out / "pairs.jsonl")))
    assert 0 < len(pairs) == result["pairs"]
    kept = {(p.messages, p.completion) for p in load_problems(DataConfig(path=str(out / "data.jsonl")))}
    assert all((p.problem.messages, p.chosen) in kept and p.rejected != p.chosen for p in pairs)


def test_one_seed_gives_the_same_rows_and_another_others(world, done, tmp_path):
    go(config(world, pairs=True), tmp_path / "same")
    go(config(world, pairs=True, seed=1), tmp_path / "other")
    for name in ("data.jsonl", "pairs.jsonl"):
        assert (tmp_path / "same" / name).read_bytes() == (done[1] / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (done[1] / name).read_bytes()


def test_a_kill_loses_at_most_a_chunk_and_changes_nothing(world, done, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    calls, chunk = [], room._chunk

    def counted(run, work, write, numbered):
        calls.append(numbered[0])
        if calls == [0, 1, 2]:
            raise Killed
        return chunk(run, work, write, numbered)

    monkeypatch.setattr(room, "_chunk", counted)
    with pytest.raises(Killed):
        go(config(world, pairs=True), tmp_path / "rs")
    assert not (tmp_path / "rs/data.jsonl").exists()
    result = go(config(world, pairs=True), tmp_path / "rs", resume=True)
    assert calls == [0, 1, 2, 2]
    assert result["num_generated_tokens"] == done[0]["num_generated_tokens"]
    for name in ("data.jsonl", "pairs.jsonl", "metrics.jsonl"):
        assert (tmp_path / "rs" / name).read_bytes() == (done[1] / name).read_bytes()


def test_what_another_model_wrote_is_not_gone_on_with(world, done, tmp_path):
    own = tiny.make_world(tmp_path)
    (own / "lenient.py").write_text((world / "lenient.py").read_text())
    go(config(own), tmp_path / "rs")
    settings = json.loads((own / "student/config.json").read_text())
    (own / "student/config.json").write_text(json.dumps(settings | {"note": "another"}))
    with pytest.raises(RunError, match="begun with another model"):
        go(config(own), tmp_path / "rs", resume=True)


@pytest.mark.parametrize(("function", "message"), [
    ("never", "among 80 answers to 20 problems no answer was right.*train the model further"),
    ("dumb", "no answer of chunk 1 could be graded: no gold answers")])
def test_where_nothing_can_be_kept_it_says_so(function, message, world, tmp_path):
    rewards = [{"file": str(world / "lenient.py"), "function": function}]
    with pytest.raises(DataError, match=message):
        go(config(world, rewards=rewards), tmp_path / "rs")
