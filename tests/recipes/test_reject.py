"""Rejection sampling: which answers are kept, what the files hold, and that a kill changes nothing."""

import io
import json
from pathlib import Path

import pytest

from tests.recipes import tiny
from tinyr2.core.config import build
from tinyr2.core.errors import ConfigError, DataError, RunError
from tinyr2.core.types import Message, Problem, Rollout
from tinyr2.data.pairs import PairsConfig, load_pairs
from tinyr2.data.problems import DataConfig, load_problems
from tinyr2.recipes import reject as room
from tinyr2.recipes.reject import Judged, RejectConfig, choose, judge, pair, reject
from tinyr2.report.console import Console
from tinyr2.rewards.grade import load_rewards

PROBLEM = Problem(id="p", task="sums", messages=(Message("user", "1+1="),), answer="2", columns={"level": 3})


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


def answer(text: str, *, length: int | None = None, finish: str = "stop", **parts) -> Rollout:
    return Rollout(problem=PROBLEM, group=0, sample=0, author="student", prompt_ids=(1,), text=text, finish=finish,
                   response_ids=(7,) * (length or len(text)), reward_parts=parts)


def texts(rollouts) -> list[str]:
    return [r.text for r in rollouts]


# --- which answers


GROUP = [Judged(answer("ccc"), True, True), Judged(answer("bb"), True, True), Judged(answer("x"), False, True),
         Judged(answer("bb "), True, True), Judged(answer("a"), True, False), Judged(answer("dd"), True, True),
         Judged(answer("y"), None, True), Judged(answer("zz"), False, True)]


def test_right_whole_and_different_answers_are_kept_the_preferred_first():
    assert texts(choose(GROUP, config(keep=9))) == ["bb", "dd", "ccc"]
    assert texts(choose(GROUP, config())) == ["bb"]
    assert texts(choose(GROUP, config(prefer="longest", keep=2))) == ["ccc", "bb"]
    assert choose(GROUP[2:3], config()) == []


def test_a_random_choice_follows_from_the_seed_and_reaches_every_right_answer():
    drawn = [texts(choose(GROUP, config(prefer="random", seed=seed)))[0] for seed in range(20)]
    assert set(drawn) == {"bb", "ccc", "dd"}
    assert drawn == [texts(choose(GROUP, config(prefer="random", seed=seed)))[0] for seed in range(20)]


def test_a_pair_is_a_right_and_a_decidedly_wrong_answer():
    found = pair(GROUP, config(pairs=True, keep=5))
    assert [r.text for r, _ in found] == ["bb", "dd"]  # two wrong ones, so two pairs
    assert sorted(w.text for _, w in found) == ["x", "zz"]
    cut = [Judged(answer("x", finish="length"), False, True), *GROUP[:2]]
    assert pair(cut, config(pairs=True)) == []


def test_an_answer_is_right_by_the_weighted_sum_and_good_where_it_is_whole_short_and_as_required():
    rewards = [{"name": "exact_answer"}, {"name": "language", "weight": 0}, {"name": "think_format", "weight": 0.5}]
    settings = config(rewards=rewards, require={"language": 0.5}, max_tokens=4)
    functions = load_rewards(settings.rewards)

    def verdict(rollout: Rollout) -> tuple[bool | None, bool]:
        found = judge(rollout, functions, settings)
        return found.right, found.good

    assert verdict(answer("abcd", exact_answer=1.0, language=0.5, think_format=0.0)) == (True, True)
    assert verdict(answer("abcd", exact_answer=1.0, language=0.4, think_format=0.0)) == (True, False)
    assert verdict(answer("abcde", exact_answer=0.5, language=1.0, think_format=1.0)) == (True, False)
    assert verdict(answer("abcd", exact_answer=0.0, language=1.0, think_format=1.0)) == (False, True)
    assert verdict(answer("ab", finish="length", exact_answer=1.0, language=1.0)) == (True, False)
    assert verdict(answer(" \n", exact_answer=1.0, language=None)) == (True, False)
    # a reward of no weight says nothing about right and wrong, and one without a word requires nothing
    assert verdict(answer("ab", exact_answer=None, language=1.0, think_format=None)) == (None, True)
    assert verdict(answer("ab", exact_answer=1.0, language=None, think_format=None)) == (True, True)


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

    def counted(run, settings, policy, rewards, numbered):
        calls.append(numbered[0])
        if calls == [0, 1, 2]:
            raise Killed
        return chunk(run, settings, policy, rewards, numbered)

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
