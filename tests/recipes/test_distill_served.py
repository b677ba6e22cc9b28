"""`tinyr2 distill` with teachers behind servers: they say what a teacher in this process says, and are asked once."""

import json
import math
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from tests.fake_server import Chaos, FakeServer, ids_of
from tests.recipes import killing, tiny
from tinyr2.core.errors import ConfigError, RunError
from tinyr2.models.load import save_model
from tinyr2.recipes.run import Run
from tinyr2.report.jsonl import read_jsonl
from tinyr2.teachers.remote_check import probe_question
from tinyr2.tokens.build import train_tokenizer

FAST = {"connect_timeout": 0.5, "read_timeout": 5.0, "backoff": 0.002, "max_backoff": 0.05, "max_in_flight": 4}
SAMPLED = "loss.estimator=sampled"


class ModelServer(FakeServer):
    """Serves a model folder; refuses what `refuses` says, and writes down every answer that it was asked for."""

    def __init__(self, folder: Path, **more) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.net = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.refuses = lambda ids: False
        self.probe = probe_question(tokenizer).ids
        self.texts: dict[str, list[str]] = {}  # what it writes to a prompt, in turn by the seed
        self.busy = threading.Lock()
        super().__init__(tokenizer, **more)

    @property
    def asked(self) -> Counter:
        """How often each answer was asked for."""
        return Counter(ids_of(body) for body in self.scored() if not body.get("echo"))

    def scored(self) -> list[dict]:
        with self.lock:
            return [body for path, body in self.seen
                    if path == "/v1/completions" and ids_of(body) != self.probe]

    def fate(self, path: str, body: bytes) -> str:
        ids = ids_of(json.loads(body)) if path == "/v1/completions" else ()
        return "400" if ids and ids != self.probe and self.refuses(ids) else super().fate(path, body)

    def rows(self, ids):
        with self.busy, torch.no_grad():
            return self.net(torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def _logp(self, ids, fate, temperature=1.0):
        said = self.rows(ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0] - 0.1 * self.weights
        last = {"nan": math.nan, "inf": -math.inf}.get(fate)
        values = [None, *said.tolist()]
        return values if last is None else [*values[:-1], last]

    def _tops(self, ids, k):
        if k == 0:
            return [None] + [[]] * (len(ids) - 1)
        best = self.rows(ids)[:-1].topk(k)
        return [None] + [[(x, j, None) for x, j in zip(logp, tokens, strict=True)]
                         for logp, tokens in zip(best.values.tolist(), best.indices.tolist(), strict=True)]

    def _chat(self, body):
        texts = self.texts[body["messages"][-1]["content"]]
        return {"choices": [{"message": {"role": "assistant", "content": texts[body["seed"] % len(texts)]},
                             "finish_reason": "stop"}], "usage": {"prompt_tokens": 5, "completion_tokens": 7}}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The world of the recipe tests, and a teacher with a vocabulary of its own."""
    folder = tiny.make_world(tmp_path_factory.mktemp("world"))
    tokenizer = train_tokenizer([f"{i}+{i + 1}-{i + 2}={i + 3} ##" for i in range(99)], vocab_size=40,
                                alphabet="corpus")
    torch.manual_seed(5)
    save_model(Qwen3ForCausalLM(Qwen3Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        intermediate_size=32, vocab_size=len(tokenizer), max_position_embeddings=128, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)),
        tokenizer, folder / "foreign")
    return folder


@pytest.fixture
def server(world):
    with ModelServer(world / "teacher") as fake:
        yield fake


def served(world, out, fake, *overrides, teacher="teacher", kind="server", **more):
    """A config whose teacher is behind `fake`; `more` is the server's, `tail` the teacher's."""
    beside = {name: more.pop(name) for name in ("tail", "signal") if name in more}
    told = FAST | {"url": fake.url, "model": "m"} | more
    if kind == "server":
        told = {"tokenizer": str(world / teacher)} | told
    return tiny.settings("distill", world, out, f"teacher={json.dumps({kind: told} | beside)}", *overrides)


def local(world, out, *overrides, teacher="teacher"):
    return tiny.go(tiny.settings("distill", world, out, f"teacher={{path: {world / teacher}}}", *overrides))


def weights(folder: Path) -> dict:
    return load_file(folder / "final/model.safetensors")


def account(outcome_or_folder) -> dict:
    """The event that tells what the servers did."""
    folder = getattr(outcome_or_folder, "folder", outcome_or_folder)
    [row] = [e for e in read_jsonl(folder / "events.jsonl") if e["event"] == "served"]
    assert row["balanced"] and row["asked"] == row["answered"] + row["failed"] + row["from_journal"]
    return row


def same(one: Path, two: Path) -> None:
    for name, value in weights(one).items():
        torch.testing.assert_close(value, weights(two)[name], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> tuple[tiny.Outcome, Counter]:
    """An undisturbed run, and what it asked for."""
    with ModelServer(world / "teacher") as fake:
        return tiny.go(served(world, tmp_path_factory.mktemp("whole") / "run", fake, "train.save_steps=1")), fake.asked


@pytest.fixture(scope="module")
def near(world, tmp_path_factory) -> tiny.Outcome:
    """A run with the same teacher held here."""
    return local(world, tmp_path_factory.mktemp("near") / "run", SAMPLED)


# --- what is learned


@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_a_served_teacher_gives_the_losses_of_the_same_teacher_held_here(world, server, near, tmp_path, estimator):
    far = tiny.go(served(world, tmp_path / "far", server, f"loss.estimator={estimator}"))
    assert far.column("loss") == pytest.approx(near.column("loss"), abs=1e-4)
    same(far.folder, near.folder)
    assert far.column("teacher/teacher/unknown") == [0.0] * 3 and far.column("teacher/teacher/failed") == [0.0] * 3


@pytest.mark.parametrize("tail", ["bucket", "none"])
def test_a_list_of_the_whole_vocabulary_is_the_whole_distribution(world, server, tmp_path, tail):
    size = len(server.tokenizer)
    far = tiny.go(served(world, tmp_path / "far", server, top_k=size, tail=tail))
    near = local(world, tmp_path / "near")
    assert far.column("loss") == pytest.approx(near.column("loss"), abs=1e-4)
    assert far.column("kl") == pytest.approx(near.column("kl"), abs=1e-4)
    same(far.folder, near.folder)


def test_a_short_list_and_its_tail_say_less_than_the_whole_and_more_than_nothing(world, server, tmp_path):
    far = tiny.go(served(world, tmp_path / "far", server, "train.max_steps=1", top_k=3))
    whole = local(world, tmp_path / "near", "train.max_steps=1")
    assert 0 < far.column("loss")[0] < whole.column("loss")[0]
    assert account(far)["answered"] == 4


@pytest.mark.parametrize("signal", ["chunk", "exact"])
def test_a_served_teacher_with_another_tokenizer_is_translated(world, tmp_path, signal):
    with ModelServer(world / "foreign") as fake:
        far = tiny.go(served(world, tmp_path / "far", fake, teacher="foreign", signal=signal))
    near = tiny.go(tiny.settings("distill", world, tmp_path / "near", SAMPLED,
                                 f"teacher={{path: {world / 'foreign'}, signal: {signal}}}"))
    assert far.column("loss") == pytest.approx(near.column("loss"), abs=1e-4)
    assert 0 < far.column("teacher/teacher/kept")[0] <= 1
    same(far.folder, near.folder)


def test_a_served_teacher_may_know_more_than_the_student(world, server, near, tmp_path):
    knows = {"shows": ["answer"]}
    raw = {"server": FAST | {"url": server.url, "model": "m", "tokenizer": str(world / "teacher")}, "privilege": knows}
    far = tiny.go(tiny.settings("distill", world, tmp_path / "far", f"teacher={json.dumps(raw)}"))
    here = tiny.go(tiny.settings("distill", world, tmp_path / "here", SAMPLED,
                                 f"teacher.privilege={json.dumps(knows)}"))
    assert far.column("loss") == pytest.approx(here.column("loss"), abs=1e-4)
    assert abs(far.column("loss")[0] - near.column("loss")[0]) > 1e-3


def test_servers_and_local_teachers_share_a_panel_and_each_has_its_journal(world, server, near, tmp_path):
    raw = {"server": FAST | {"url": server.url, "model": "m", "tokenizer": str(world / "teacher")}, "weight": 0.25}
    panel = [raw, raw | {"name": "second"}, {"path": str(world / "teacher"), "weight": 0.5}]
    far = tiny.go(tiny.settings("distill", world, tmp_path / "far", SAMPLED, "teacher=null",
                                f"teachers={json.dumps(panel)}"))
    assert far.column("loss") == pytest.approx(near.column("loss"), abs=1e-4)
    assert sorted(p.name for p in (far.folder / "answers").iterdir()) == ["second.jsonl", "teacher0.jsonl"]
    told = [e for e in read_jsonl(far.folder / "events.jsonl") if e["event"] == "served"]
    assert [e["teacher"] for e in told] == ["teacher0", "second"] and {e["answered"] for e in told} == {12}


# --- what it costs


def test_what_an_evaluation_asks_is_in_the_runs_account_and_in_no_steps(world, server, tmp_path):
    run = tiny.go(served(world, tmp_path / "run", server, "eval_data={path: {world}/data.jsonl, limit: 5}",
                         "eval_kl_problems=5", "train.eval_steps=1", "train.eval_on_start=true"))
    assert account(run)["asked"] == 12 + 4 * 5
    clock = [row for row in read_jsonl(run.folder / "timing.jsonl") if row["step"]]
    assert [row["teacher/teacher/requests"] + row["teacher/teacher/from_journal"] for row in clock] == [4, 4, 4]
    assert len(run.column("eval_kl")) == 4


def test_all_answers_of_a_step_are_asked_at_once_and_each_once(world, server, tmp_path, monkeypatch):
    from tinyr2.teachers.remote import RemoteTeacher
    calls, score = [], RemoteTeacher.score
    monkeypatch.setattr(RemoteTeacher, "score", lambda self, papers: calls.append(len(papers)) or score(self, papers))
    run = tiny.go(served(world, tmp_path / "run", server, "train.tokens_per_micro_batch=20"))
    assert calls == [4, 4, 4]
    written = Counter((*r.prompt_ids, *r.response_ids) for step in run.steps for r in step.rollouts)
    assert set(server.asked) == set(written) and set(server.asked.values()) == {1}
    told, clock = account(run), read_jsonl(run.folder / "timing.jsonl")
    assert told["answered"] == len(written) == sum(row["teacher/teacher/requests"] for row in clock)
    assert all(0 < row["teacher/teacher/busy_share"] <= 1 for row in clock if row["teacher/teacher/requests"])
    assert f"teacher: asked for 12 answers = {told['answered']} given" in run.said


def test_in_chaos_a_run_finishes_and_its_account_balances(world, tmp_path):
    shares = {name: 0.04 for name in ("reset", "429", "500", "503", "truncated", "torn", "count", "ids", "nan", "inf")}
    with ModelServer(world / "teacher", chaos=Chaos(seed=3, shares=shares | {"hang": 0.02})) as fake:
        fake.hang = 0.3
        run = tiny.go(served(world, tmp_path / "run", fake, "rollout.prompts_per_step=16", max_retries=12,
                             read_timeout=0.2, max_in_flight=8))
    told = account(run)
    assert run.result["ending"] == "finished" and told["asked"] == 48
    assert told["retried"] > 0 and sum(n for fate, n in fake.struck.items() if fate != "fine") > 10
    assert 16 * sum(run.column("teacher/teacher/failed")) == told["failed"]
    assert all(math.isfinite(x) for x in run.column("loss"))


# --- what fails


def test_an_answer_that_the_server_refuses_has_no_opinion_and_is_counted(world, server, tmp_path):
    server.refuses = lambda ids: sum(ids) % 3 == 0
    run = tiny.go(served(world, tmp_path / "run", server, "rollout.prompts_per_step=8"))
    for step, row in zip(run.steps, run.rows, strict=True):
        refused = [r for r in step.rollouts if sum(r.prompt_ids + r.response_ids) % 3 == 0]
        tokens = sum(len(r.response_ids) for r in step.rollouts)
        assert row["teacher/teacher/failed"] == len(refused) / 8
        assert row["teacher/teacher/unknown"] == pytest.approx(sum(len(r.response_ids) for r in refused) / tokens)
    assert 0 < account(run)["failed"] == 8 * sum(run.column("teacher/teacher/failed"))


def test_lists_leave_out_the_answers_that_the_server_refuses(world, server, tmp_path):
    server.refuses = lambda ids: sum(ids) % 3 == 0
    run = tiny.go(served(world, tmp_path / "run", server, "rollout.prompts_per_step=8",
                         "train.tokens_per_micro_batch=1", top_k=5))
    for step, row in zip(run.steps, run.rows, strict=True):
        refused = [len(r.response_ids) for r in step.rollouts if sum(r.prompt_ids + r.response_ids) % 3 == 0]
        tokens = sum(len(r.response_ids) for r in step.rollouts)
        assert row["teacher/teacher/unknown"] == pytest.approx(sum(refused) / tokens)
        assert row["teacher/teacher/kl"] > 0 and math.isfinite(row["loss"])


def test_a_step_without_any_opinion_ends_the_run_and_another_server_takes_it_up(world, server, whole, tmp_path):
    whole, _ = whole
    written = [(*r.prompt_ids, *r.response_ids) for r in whole.steps[1].rollouts]
    server.refuses = written.__contains__
    with pytest.raises(RunError, match=r"teacher: the server gave no opinion of any of a step's 4 answers.*400.*mend"):
        tiny.go(served(world, tmp_path / "run", server, "train.save_steps=1"))
    assert account(tmp_path / "run")["failed"] == len(written)
    with ModelServer(world / "teacher") as elsewhere:
        run = tiny.go(served(world, tmp_path / "run", elsewhere, "train.save_steps=1"), resume=True)
    assert killing.outcome(run.folder)[0] == killing.outcome(whole.folder)[0]


class Killed(BaseException):
    """Nothing in a run catches it."""


def test_a_killed_run_asks_for_no_answer_twice_and_ends_as_the_undisturbed_one(world, whole, tmp_path, monkeypatch):
    (whole, asked), record = whole, Run.record

    def die(self, metrics, timing, alarms):
        record(self, metrics, timing, alarms)
        if metrics["step"] == 2:
            raise Killed

    with ModelServer(world / "teacher") as fake:
        config = served(world, tmp_path / "run", fake, "train.save_steps=1")
        with monkeypatch.context() as patch:
            patch.setattr(Run, "record", die)
            with pytest.raises(Killed):
                tiny.go(config)
        before = fake.asked
        run = tiny.go(config, resume=True)
        assert set(fake.asked.values()) == {1} and fake.asked.keys() == asked.keys()
    assert 8 - len(before) < 4 and account(run)["from_journal"] >= 4  # the second step was scored before
    assert killing.outcome(run.folder)[0] == killing.outcome(whole.folder)[0]
    assert run.column("loss") == whole.column("loss")


def test_a_cap_ends_the_run_and_a_higher_one_takes_it_up(world, whole, tmp_path):
    with ModelServer(world / "teacher") as fake:
        with pytest.raises(RunError, match="budget_requests is 6, 6 are spent.*; raise budget_requests and resume"):
            tiny.go(served(world, tmp_path / "run", fake, "train.save_steps=1", budget_requests=6))
        assert sum(fake.asked.values()) == 6
        run = tiny.go(served(world, tmp_path / "run", fake, "train.save_steps=1", budget_requests=60), resume=True)
        assert set(fake.asked.values()) == {1}
    assert "budget_requests: 60" in (run.folder / "config.resolved.yaml").read_text()
    assert killing.outcome(run.folder)[0] == killing.outcome(whole[0].folder)[0]


def test_a_run_is_not_resumed_with_another_served_model_or_list(world, server, tmp_path):
    tiny.go(served(world, tmp_path / "run", server, "train.max_steps=1"))
    for change in ({"top_k": 3}, {"model": "n"}, {"engine": "openai"}):
        server.model = change.get("model", "m")
        with pytest.raises(RunError, match=f"resumed with another config: teacher.server.{next(iter(change))}"):
            tiny.go(served(world, tmp_path / "run", server, "train.max_steps=1", **change), resume=True)


def test_a_server_that_restarts_with_other_weights_ends_the_run(world, server, tmp_path, monkeypatch):
    record = Run.record
    monkeypatch.setattr(Run, "record", lambda *args: record(*args) or server.restart(1))
    with pytest.raises(RunError, match="weights are no longer those it began with"):
        tiny.go(served(world, tmp_path / "run", server, "train.save_steps=1"))
    assert account(tmp_path / "run")["failed"] == 4
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000001"]


# --- what is refused before there is a run folder


@pytest.mark.parametrize("change, words", [
    ({"model": "other"}, "other"), ({"url": "http://127.0.0.1:9"}, "127.0.0.1:9"),
    ({"tokenizer": "{world}/foreign"}, "another tokenizer"),
    ({"tokenizer": "{world}/foreign", "top_k": 3}, "server.top_k to 0")])
def test_another_server_than_configured_leaves_no_folder(world, server, tmp_path, change, words):
    change = {k: v.replace("{world}", str(world)) if isinstance(v, str) else v for k, v in change.items()}
    with pytest.raises(ConfigError, match=words):
        tiny.go(served(world, tmp_path / "run", server, max_retries=1, **change))
    assert not (tmp_path / "run").exists() and not server.asked


@pytest.mark.parametrize("overrides, more, words", [
    (["rollout.temperature=0.7"], {}, r"0.7; set rollout.temperature=1.0, or load the teacher here with path"),
    (["rollout.lmbda=0", "kd={temperature: 2.0}"], {"top_k": 5}, r"2.0; set kd.temperature=1.0, or load the teacher"),
    (["rollout.lmbda=0", "kd={temperature: 1.0}"], {}, "set server.top_k to 20"),
    (["rollout.lmbda=0", "kd={temperature: 1.0, by: entropy}"], {"top_k": 5}, "take fixed or linear"),
    ([SAMPLED], {"top_k": 5}, "set server.top_k to 0"),
    (["loss.divergence={kind: jsd}"], {"top_k": 5, "tail": "none"}, "set it to bucket")])
def test_what_a_server_cannot_say_is_refused(world, server, tmp_path, overrides, more, words):
    with pytest.raises(ConfigError, match=words):
        served(world, tmp_path / "run", server, *overrides, **more)


def test_a_chat_writes_and_does_not_judge(world, server, tmp_path):
    with pytest.raises(ConfigError, match="set method: data"):
        served(world, tmp_path / "run", server, kind="chat")


# --- other ways


def test_logits_distillation_reads_the_lists_of_a_server(world, server, tmp_path):
    kd = ("rollout.lmbda=0", "kd={temperature: 1.0}")
    far = tiny.go(served(world, tmp_path / "far", server, *kd, top_k=len(server.tokenizer)))
    near = local(world, tmp_path / "near", *kd)
    assert far.column("loss") == pytest.approx(near.column("loss"), abs=1e-4)


def data_rows(world):
    return read_jsonl(world / "data.jsonl")


DATA = ("method=data", "rewards=[{name: exact_answer}]", "data.limit=12",
        "data_distillation={num_generations: 3, max_completion_length: 40, problems_per_chunk: 5, "
        "examples_per_step: 4}")


def test_a_chat_writes_data_the_verifier_filters_and_the_student_learns(world, server, tmp_path):
    right = {row["prompt"][0]["content"]: row["completion"][0]["content"] for row in data_rows(world)}
    server.texts = {prompt: [text, "7"] for prompt, text in right.items()}
    run = tiny.go(served(world, tmp_path / "run", server, *DATA, kind="chat"))
    kept = {row["prompt"][0]["content"]: row["completion"][0]["content"]
            for row in read_jsonl(run.folder / "data.jsonl")}
    assert 6 < len(kept) <= 12 and kept == {prompt: right[prompt] for prompt in kept}
    told = account(run)
    assert (told["asked"], told["answered"], told["tokens"]) == (36, 36, 36 * 12)
    assert run.result["written"]["num_generated_tokens"] > 36
    assert run.result["ending"] == "finished" and (run.folder / "final/model.safetensors").is_file()


def test_a_killed_writer_is_asked_for_no_answer_twice(world, server, tmp_path):
    right = {row["prompt"][0]["content"]: row["completion"][0]["content"] for row in data_rows(world)}
    server.texts = {prompt: [text, "7"] for prompt, text in right.items()}
    whole = tiny.go(served(world, tmp_path / "whole", server, *DATA, kind="chat"))
    with ModelServer(world / "teacher") as fake:
        fake.texts = server.texts
        with pytest.raises(RunError, match="budget_requests is 20"):
            tiny.go(served(world, tmp_path / "run", fake, *DATA, kind="chat", budget_requests=20))
        run = tiny.go(served(world, tmp_path / "run", fake, *DATA, kind="chat"), resume=True)
        bodies = Counter(json.dumps(body) for path, body in fake.seen if "chat" in path)
    assert len(bodies) == 36 and set(bodies.values()) == {1}
    assert (run.folder / "data.jsonl").read_bytes() == (whole.folder / "data.jsonl").read_bytes()
    assert killing.outcome(run.folder)[0] == killing.outcome(whole.folder)[0]


def test_a_chat_without_the_model_leaves_no_folder(world, server, tmp_path):
    with pytest.raises(ConfigError, match="other"):
        tiny.go(served(world, tmp_path / "run", server, *DATA, kind="chat", model="other"))
    assert not (tmp_path / "run").exists()
