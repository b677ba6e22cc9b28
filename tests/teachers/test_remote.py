import pytest
from pydantic import ValidationError

from tests.fake_server import Chaos, FakeServer, distribution, ids_of, truth
from tests.teachers.served import ENGINES, SEQUENCES, Always, config, hired, logps, right
from tinyr2.core.errors import ConfigError, DataError, RunError
from tinyr2.teachers.remote import RemoteTeacher, Said, ServerConfig
from tinyr2.tokens.build import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["0123456789 abcdefghijklmnop"], vocab_size=40, alphabet="corpus")


@pytest.fixture
def server(tokenizer):
    with FakeServer(tokenizer) as fake:
        yield fake


@pytest.mark.parametrize("engine", ENGINES)
def test_each_protocol_gives_the_log_prob_of_each_response_token(server, tokenizer, engine):
    teacher = hired(server, tokenizer, engine)
    sequences = [*SEQUENCES, ((), (3, 4))]  # nothing comes before the first token, so nothing is said of it
    said = teacher.score(sequences)
    assert logps(said[:-1]) == right()
    assert said[-1].logp[0] is None and said[-1].logp[1] == pytest.approx(truth((), (3, 4))[1])
    assert all(s.error is None and s.topk is None for s in said)
    account = teacher.accounting
    assert (account.asked, account.answered, account.failed, account.from_journal) == (41, 41, 0, 0)
    assert (account.requests, account.succeeded, account.unsaid, account.not_finite) == (41, 41, 1, 0)
    assert account.tokens == sum(len(p) + len(r) for p, r in sequences)
    assert account.balanced and 0 < account.busy_seconds <= account.seconds


@pytest.mark.parametrize("engine", ENGINES)
def test_a_server_is_asked_to_write_next_to_nothing_and_to_say_no_more_than_is_read(server, tokenizer, engine):
    teacher = hired(server, tokenizer, engine)
    teacher.score([((1, 2, 3, 4), (5, 6)), ((), (3, 4))])
    told = sorted(server.scored(), key=lambda body: -len(ids_of(body)))
    assert [ids_of(body) for body in told] == [(1, 2, 3, 4, 5, 6), (3, 4)]
    for body, start in zip(told, (3, 0), strict=True):
        if engine == "sglang":  # says nothing of the first it reports, so one token of the prompt more
            assert (body["sampling_params"]["max_new_tokens"], body["top_logprobs_num"]) == (0, 0)
            assert body["logprob_start_len"] == start
        else:
            assert (body["max_tokens"], body.get("prompt_logprobs", 0), body.get("logprobs", 1)) == (1, 0, 1)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_likeliest_tokens_come_best_first(server, tokenizer, engine):
    prompt, response = (3, 4), (5, 6, 7)
    [said] = hired(server, tokenizer, engine, top_k=3).score([(prompt, response)])
    assert said.logp == pytest.approx(tuple(truth(prompt, response)))
    for i, row in enumerate(said.topk):
        logp = distribution((*prompt, *response[:i]))
        best = sorted(range(len(logp)), key=lambda j: -logp[j])[:3]
        assert [token for token, _ in row] == best
        assert [x for _, x in row] == pytest.approx([logp[j] for j in best])


def test_an_endpoint_that_names_tokens_by_text_has_no_top_k(server):
    with pytest.raises(ConfigError, match="names its likeliest tokens by their text"):
        config(server, "openai", top_k=3)


@pytest.mark.parametrize("engine", ENGINES)
def test_in_chaos_two_hundred_sequences_are_scored_and_the_accounting_balances(tokenizer, engine, tmp_path):
    shares = {name: 0.03 for name in ("delay", "reset", "429", "500", "503", "truncated", "torn", "count", "ids", "nan",
                                      "inf")} | {"hang": 0.01}
    sequences = [((i % 40,), tuple((i * j + j + i // 40) % 40 for j in range(2, 12))) for i in range(200)]
    with FakeServer(tokenizer, chaos=Chaos(seed=5, shares=shares)) as fake:
        teacher = hired(fake, tokenizer, engine, tmp_path / "journal.jsonl", max_retries=12, read_timeout=0.3)
        said = teacher.score(sequences)
    account = teacher.accounting
    failed = [s for s in said if s.error is not None]
    assert set(fake.struck) == {*shares, "fine"}
    assert account.balanced
    assert (account.asked, account.from_journal, account.failed) == (200, 0, len(failed))
    assert len(failed) <= 4 and all("tokens" in s.error or "token" in s.error for s in failed)  # wrong twice
    assert account.requests == len(fake.scored())
    expected = [truth(*sequence) for sequence in sequences]
    for one, exact in zip(said, expected, strict=True):
        assert len(one.logp) == 10
        if one.error is None:
            assert one.logp[:-1] == pytest.approx(tuple(exact[:-1]))
            assert one.logp[-1] is None or one.logp[-1] == pytest.approx(exact[-1])
    missing = sum(s.logp[-1] is None for s in said if s.error is None)
    assert missing > 0 and account.unsaid + account.not_finite == missing


@pytest.mark.parametrize(("fate", "kind"), [
    ("429", "busy"), ("503", "busy"), ("500", "broken"), ("502", "broken"), ("504", "broken"),
    ("reset", "connection"), ("torn", "connection"), ("truncated", "garbled"), ("hang", "timeout"),
])
def test_a_passing_fault_is_tried_again(server, tokenizer, fate, kind):
    teacher = hired(server, tokenizer, read_timeout=0.15 if fate == "hang" else 5.0, max_retries=30)
    server.hang, server.chaos = 0.3, Chaos(seed=1, shares={fate: 0.5}, only="completions")
    assert logps(teacher.score(SEQUENCES[:4])) == right(SEQUENCES[:4])
    account = teacher.accounting
    assert account.balanced and account.answered == 4
    assert set(account.faults) == {kind} and account.retried > 0
    assert account.requests == 4 + account.retried


@pytest.mark.parametrize("fate", ["count", "ids"])
@pytest.mark.parametrize("engine", ENGINES)
def test_an_answer_about_other_tokens_is_asked_for_once_more_and_then_an_error(server, tokenizer, engine, fate):
    teacher = hired(server, tokenizer, engine)
    server.chaos = Always(fate)
    [said] = teacher.score([((1, 2), (3, 4, 5))])
    assert said.logp == (None, None, None) and "token" in said.error
    account = teacher.accounting
    assert (account.requests, account.retried, account.given_up, account.failed) == (2, 1, 1, 1)
    assert account.balanced


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fate", ["nan", "inf"])
def test_a_log_prob_that_is_not_finite_is_left_out_and_counted(server, tokenizer, engine, fate):
    teacher = hired(server, tokenizer, engine)
    server.chaos = Always(fate)
    [said] = teacher.score([((1, 2), (3, 4, 5))])
    assert said.error is None and said.logp == (*(pytest.approx(x) for x in truth((1, 2), (3, 4))), None)
    assert (teacher.accounting.not_finite, teacher.accounting.unsaid, teacher.accounting.answered) == (1, 0, 1)


def test_a_refused_request_is_not_repeated_and_says_what_the_server_said(server, tokenizer):
    server.context = 30
    teacher = hired(server, tokenizer)
    short, long = teacher.score([((1,), (2, 3)), ((1,), tuple(range(30)))])
    assert short.error is None
    assert "400: the context is 30 tokens" in long.error and set(long.logp) == {None}
    assert (teacher.accounting.requests, teacher.accounting.retried) == (2, 0)
    assert teacher.accounting.balanced


def test_a_server_that_answers_nothing_ends_the_run(server, tokenizer):
    teacher = hired(server, tokenizer, max_retries=2)
    server.chaos = Always("500")
    with pytest.raises(RunError, match=r"chaos 500 \(3 tries\); the server answered none of 3"):
        teacher.score(SEQUENCES[:3])
    assert teacher.accounting.failed == 3 and teacher.accounting.balanced


def test_a_server_that_is_gone_ends_the_run(server, tokenizer):
    teacher = hired(server, tokenizer, max_retries=1)
    server.stop()
    try:
        with pytest.raises(RunError, match="nobody can tell whether its weights are still the same"):
            teacher.score(SEQUENCES[:3])
    finally:
        server._start(server.port)
    assert teacher.accounting.failed == 3 and teacher.accounting.balanced


def test_pressure_lowers_the_number_of_requests_in_flight(server, tokenizer):
    teacher = hired(server, tokenizer, max_retries=50, max_in_flight=4)
    server.chaos = Chaos(seed=2, shares={"429": 0.4, "delay": 0.6}, only="completions")
    teacher.score(SEQUENCES[:16])
    assert server.most_at_once <= 4
    assert teacher._client._gate.limit < 4


def test_an_answer_is_asked_for_once_also_by_the_next_process(server, tokenizer, tmp_path):
    journal = tmp_path / "teacher.jsonl"
    first = hired(server, tokenizer, journal=journal, top_k=2)
    said = first.score([*SEQUENCES, SEQUENCES[0]])  # twice in one call: once at the server
    assert len(server.scored()) == 40
    account = first.accounting
    assert (account.asked, account.answered, account.from_journal) == (41, 40, 1)
    first.close()
    with open(journal, "ab") as file:
        file.write(b'{"key": "torn by a k')
    second = hired(server, tokenizer, journal=journal, top_k=2)
    assert second.score([*SEQUENCES, SEQUENCES[0]]) == said
    assert len(server.scored()) == 40
    account = second.accounting
    assert (account.asked, account.answered, account.from_journal, account.requests) == (41, 0, 41, 0)
    more = second.score([((9,), (8, 7))])
    second.close()
    third = hired(server, tokenizer, journal=journal, top_k=2)
    assert third.score([((9,), (8, 7))]) == more and third.accounting.requests == 0
    assert b"torn" not in journal.read_bytes()


def test_another_top_k_or_response_is_another_question(server, tokenizer, tmp_path):
    hired(server, tokenizer, journal=tmp_path / "j").score([((1,), (2, 3))])
    teacher = hired(server, tokenizer, journal=tmp_path / "j", top_k=1)
    teacher.score([((1,), (2, 3)), ((1, 2), (3,))])  # the same ids, cut elsewhere
    assert teacher.accounting.requests == 2


def test_a_journal_that_was_edited_is_refused_by_its_line(server, tokenizer, tmp_path):
    path = tmp_path / "j"
    hired(server, tokenizer, journal=path).score([((1,), (2, 3))])
    path.write_text("not a row\n" + path.read_text())
    with pytest.raises(DataError, match="j, line 1: no answer"):
        RemoteTeacher(config(server), path)


def test_a_cap_on_requests_ends_the_run_and_the_answers_stay(server, tokenizer, tmp_path):
    teacher = hired(server, tokenizer, journal=tmp_path / "j", budget_requests=10)
    with pytest.raises(RunError, match="budget_requests is 10, 10 are spent"):
        teacher.score(SEQUENCES)
    assert len(server.scored()) == 10 and teacher.accounting.balanced
    assert (teacher.accounting.answered, teacher.accounting.failed) == (10, 30)
    teacher.close()
    again = hired(server, tokenizer, journal=tmp_path / "j", budget_requests=10)
    with pytest.raises(RunError, match="budget_requests is 10, 10 are spent"):  # also over processes
        again.score(SEQUENCES)
    again.close()
    raised = hired(server, tokenizer, journal=tmp_path / "j", budget_requests=40)
    assert logps(raised.score(SEQUENCES)) == right()
    assert len(server.scored()) == 40 and raised.accounting.from_journal == 10


def test_a_cap_on_tokens_is_named_too(server, tokenizer):
    teacher = hired(server, tokenizer, budget_tokens=9)
    teacher.score([((1, 2), (3, 4, 5))])
    with pytest.raises(RunError, match="budget_tokens is 9, 5 are spent and the next request needs 6"):
        teacher.score([((1, 2), (3, 4, 5, 6))])


def test_other_weights_are_found_before_the_next_call(server, tokenizer, tmp_path):
    teacher = hired(server, tokenizer, journal=tmp_path / "j")
    teacher.score(SEQUENCES[:3])
    server.weights = 1
    with pytest.raises(RunError, match=r"weights are no longer those it began with: .* moved by \d\.\d+ nats"):
        teacher.score(SEQUENCES)
    assert len(server.scored()) == 3 and teacher.accounting.balanced
    teacher.close()
    with pytest.raises(RunError, match="not those of the journal"):
        hired(server, tokenizer, journal=tmp_path / "j")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_restart_with_other_weights_in_the_middle_of_a_call_is_found_and_nothing_of_them_is_kept(
        server, tokenizer, tmp_path, engine):
    teacher = hired(server, tokenizer, engine, journal=tmp_path / "j")
    server.swap_after = 20
    with pytest.raises(RunError, match="no longer those it began with"):
        teacher.score(SEQUENCES)
    assert teacher.accounting.balanced and teacher.accounting.faults["connection"] >= 1
    assert teacher.accounting.failed == 40  # the batch was not confirmed any more
    assert len((tmp_path / "j").read_text().splitlines()) == 1


def test_a_restart_with_the_same_weights_is_no_fault(server, tokenizer):
    teacher = hired(server, tokenizer, max_retries=12)
    teacher.score(SEQUENCES[:5])
    server.restart(weights=0)
    assert logps(teacher.score(SEQUENCES)) == right()


def test_an_empty_response_is_not_asked_about(server, tokenizer):
    teacher = hired(server, tokenizer)
    assert teacher.score([((1, 2), ())]) == [Said(())]
    assert teacher.accounting.asked == 0


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://me:key@host"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ValidationError):
        ServerConfig(url=url, model="m", tokenizer="t")


def test_the_path_of_the_api_may_be_part_of_the_address():
    assert ServerConfig(url="http://host:1/v1/", model="m", tokenizer="t").url == "http://host:1"
