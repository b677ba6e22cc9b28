import json

import pytest

from tests.fake_server import Chaos, FakeServer
from tinyr2.core.config import build
from tinyr2.core.errors import ConfigError, RunError
from tinyr2.core.types import Message, Problem
from tinyr2.rollouts.remote import ChatConfig, RemoteWriter, tokenized, write
from tinyr2.rollouts.sampling import SamplingConfig
from tinyr2.tokens.build import train_tokenizer
from tinyr2.tokens.chat import decode

FAST = {"connect_timeout": 0.5, "read_timeout": 5.0, "backoff": 0.002, "max_backoff": 0.05, "max_in_flight": 8}
LONG = SamplingConfig(max_completion_length=100, temperature=0.8)


@pytest.fixture
def server():
    with FakeServer() as fake:
        yield fake


def config(server, **more):
    return build(ChatConfig, FAST | {"url": server.url, "model": "m"} | more, "c")


def problems(count):
    return [Problem(id=f"p{i}", task="t", messages=(Message("system", "be short"), Message("user", f"what is {i}?")))
            for i in range(count)]


def chats(server):
    return [body for path, body in server.seen if path == "/v1/chat/completions"]


def test_every_problem_gets_n_answers_in_order_each_with_a_seed_of_its_own(server):
    rollouts = write(config(server), problems(3), n=2, sampling=LONG, seed=4, journal=None)
    assert [(r.problem.id, r.group, r.sample) for r in rollouts] == [
        (f"p{i}", i, j) for i in range(3) for j in range(2)]
    assert all(r.text.startswith(f"what is {r.group}? seed ") and r.finish == "stop" for r in rollouts)
    assert all(r.author == "teacher" and r.temperature == 0.8 and r.response_ids == () for r in rollouts)
    bodies = chats(server)
    assert len({body["seed"] for body in bodies}) == 6
    assert {len(body["messages"]) for body in bodies} == {2}
    assert {(body["max_tokens"], body["temperature"], body["top_p"]) for body in bodies} == {(100, 0.8, 1.0)}
    assert write(config(server), problems(3), n=2, sampling=LONG, seed=4, journal=None) == rollouts
    other = write(config(server), problems(3), n=2, sampling=LONG, seed=5, journal=None)
    assert not {r.text for r in other} & {r.text for r in rollouts}


def test_what_a_server_may_not_know_is_said_only_where_it_does_something(server):
    write(config(server), problems(1), n=1, sampling=LONG, seed=0, journal=None)
    sampling = SamplingConfig(top_k=5, min_p=0.1, stop_strings=("END",))
    write(config(server), problems(1), n=1, sampling=sampling, seed=0, journal=None)
    plain, full = chats(server)
    assert not {"top_k", "min_p", "stop"} & plain.keys()
    assert (full["top_k"], full["min_p"], full["stop"]) == (5, 0.1, ["END"])


def test_an_answer_that_was_cut_says_so_and_has_no_end_token(server):
    tokenizer = train_tokenizer(["what is seed be short 0123456789?"], vocab_size=300)
    cut, whole = (write(config(server), problems(1), n=1, sampling=SamplingConfig(max_completion_length=length),
                        seed=0, journal=None)[0] for length in (4, 100))
    assert (cut.finish, cut.text, whole.finish) == ("length", "what", "stop")
    cut, whole = tokenized([cut, whole], tokenizer)
    assert decode(tokenizer, cut.response_ids) == "what" and tokenizer.eos_token_id not in cut.response_ids
    assert whole.response_ids[-1] == tokenizer.eos_token_id
    assert decode(tokenizer, whole.response_ids) == whole.text
    assert "be short" in tokenizer.decode(whole.prompt_ids)


def test_thoughts_that_the_server_keeps_apart_come_back_to_their_place(server):
    server.model = "thinker"
    kept, dropped = (write(config(server, model="thinker", **more), problems(1), n=1, sampling=LONG, seed=0,
                           journal=None)[0].text for more in ({}, {"think_tags": None}))
    assert kept == "<think>\nhm\n</think>\n\n" + dropped and dropped.startswith("what is 0?")


def test_an_answer_is_asked_for_once_also_by_the_next_process(server, tmp_path):
    path = tmp_path / "written.jsonl"
    first = write(config(server), problems(5), n=2, sampling=LONG, seed=0, journal=path)
    path.write_bytes(path.read_bytes()[:-20])  # killed in the middle of the last line
    writer = RemoteWriter(config(server), path)
    assert writer.write(problems(5), n=2, sampling=LONG, seed=0) == first
    account = writer.accounting
    assert (account.asked, account.from_journal, account.answered, account.requests) == (10, 9, 1, 1)
    assert account.balanced and len(chats(server)) == 11


def test_in_chaos_every_answer_comes_or_has_an_error_and_the_accounting_balances(server, tmp_path):
    shares = dict.fromkeys(("delay", "reset", "429", "500", "503", "truncated", "torn"), 0.05)
    server.chaos = Chaos(seed=1, shares=shares, only="chat")
    writer = RemoteWriter(config(server, max_retries=10), tmp_path / "j")
    rollouts = writer.write(problems(50), n=2, sampling=LONG, seed=0)
    assert all(r.error is None and r.text.startswith(f"what is {r.group}?") for r in rollouts)
    account = writer.accounting
    assert account.balanced and account.answered == 100 and account.retried > 10
    assert account.requests == len(chats(server)) and account.tokens == 700


def test_a_refusal_is_an_error_of_its_rollout(server):
    answer = server.answer

    def refuse(path, body, fate):
        if "what is 1?" in json.dumps(body):
            return 400, {"error": {"message": "too rude"}}
        status, said = answer(path, body, fate)
        if "what is 2?" in json.dumps(body):
            said["choices"][0]["finish_reason"] = "content_filter"
        return status, said

    server.answer = refuse
    fine, rude, filtered = write(config(server), problems(3), n=1, sampling=LONG, seed=0, journal=None)
    assert fine.error is None
    assert "400: too rude" in rude.error and rude.text is None
    assert "ended the answer by 'content_filter'" in filtered.error
    assert tokenized([rude], None) == [rude]


def test_a_cap_ends_the_run_and_the_answers_stay(server, tmp_path):
    with pytest.raises(RunError, match="budget_requests is 4"):
        write(config(server, budget_requests=4), problems(9), n=1, sampling=LONG, seed=0, journal=tmp_path / "j")
    assert len(write(config(server), problems(9), n=1, sampling=LONG, seed=0, journal=tmp_path / "j")) == 9
    assert len(chats(server)) == 9


def test_a_cap_on_tokens_counts_what_the_server_says(server):
    writer = RemoteWriter(config(server, budget_tokens=20, max_in_flight=1), None)
    with pytest.raises(RunError, match="budget_tokens is 20, 21 are spent"):
        writer.write(problems(9), n=1, sampling=LONG, seed=0)
    assert writer.accounting.answered == 3 and writer.accounting.balanced


def test_a_wrong_model_name_and_a_dead_server_are_said_first(server):
    with pytest.raises(ConfigError, match="it serves m"):
        write(config(server, model="gpt"), problems(1), n=1, sampling=LONG, seed=0, journal=None)
    server.chaos = Chaos(shares={"500": 1.0}, only="chat")
    with pytest.raises(RunError, match="answered none of 2"):
        write(config(server, max_retries=1), problems(2), n=1, sampling=LONG, seed=0, journal=None)
