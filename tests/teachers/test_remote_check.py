import pytest

from tests.fake_server import FakeServer
from tests.teachers.served import ENGINES, SEQUENCES, config, hired, logps, right
from tinyr2.core.errors import ConfigError, RunError
from tinyr2.teachers.remote import RemoteTeacher
from tinyr2.tokens.build import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["0123456789 abcdefghijklmnop"], vocab_size=40, alphabet="corpus")


@pytest.fixture
def server(tokenizer):
    with FakeServer(tokenizer) as fake:
        yield fake


def test_a_temperature_that_the_engine_cannot_give_is_refused(server, tokenizer):
    for engine in ("vllm", "sglang"):
        with pytest.raises(ConfigError, match=f"temperature 0.7: {engine} gives the log-probs of a prompt at"):
            RemoteTeacher(config(server, engine), None).check(tokenizer, 0.7)
    assert server.seen == []
    with pytest.raises(ConfigError, match="temperature 0.7: .* at temperature 1, whatever it is told"):
        RemoteTeacher(config(server, "openai"), None).check(tokenizer, 0.7)


def test_an_endpoint_that_tempers_is_asked_at_the_temperature(server, tokenizer):
    server.tempers = True
    teacher = RemoteTeacher(config(server, "openai"), None)
    teacher.check(tokenizer, 0.7)
    assert logps(teacher.score(SEQUENCES)) == right(temperature=0.7)


def test_a_wrong_model_name_names_what_is_served(server, tokenizer):
    with pytest.raises(ConfigError, match="has no model 'mm'; did you mean 'm'\\? it serves m; set model"):
        hired(server, tokenizer, model="mm")


def test_a_vocabulary_that_differs_in_its_merges_alone_is_found_by_their_text():
    ours, theirs = (train_tokenizer([text], vocab_size=290) for text in ("the cat sat on the mat", "0 1 quite else"))
    with FakeServer(theirs, model="m") as fake:
        hired(fake, theirs, "openai")
        with pytest.raises(ConfigError, match="where our ids say .* it reads"):
            hired(fake, ours, "openai")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tokenizes", [True, False])
def test_another_tokenizer_than_configured_is_found(server, tokenizer, engine, tokenizes):
    server.tokenizes = tokenizes
    hired(server, tokenizer, engine)
    other = train_tokenizer(["9876543210 ponmlkjihgfedcba the cats"], vocab_size=40, alphabet="corpus")
    with pytest.raises(ConfigError, match="the server has another tokenizer than"):
        hired(server, other, engine)


def test_a_server_that_is_not_there_is_named_before_the_first_step(tokenizer):
    with FakeServer(tokenizer) as fake:
        url = fake.url
    with pytest.raises(ConfigError, match=f"{url}/version: .*; start the server, or mend url"):
        hired(type("S", (), {"url": url}), tokenizer, max_retries=1)


def test_another_engine_than_configured_is_found(server, tokenizer):
    answer = server.answer
    server.answer = lambda path, body, fate: (404, {}) if path == "/generate" else answer(path, body, fate)
    with pytest.raises(ConfigError, match="404.*mend engine"):
        hired(server, tokenizer, "sglang")


def test_the_key_comes_from_the_environment_and_is_never_shown(server, tokenizer, monkeypatch):
    server.key = "s3cret"
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    with pytest.raises(ConfigError, match="TEACHER_KEY is not set"):
        hired(server, tokenizer, api_key_env="TEACHER_KEY")
    monkeypatch.setenv("TEACHER_KEY", "wrong")
    with pytest.raises(ConfigError, match="401: no such key; mend api_key_env") as caught:
        hired(server, tokenizer, api_key_env="TEACHER_KEY")
    assert "wrong" not in str(caught.value)
    monkeypatch.setenv("TEACHER_KEY", "s3cret")
    teacher = hired(server, tokenizer, api_key_env="TEACHER_KEY")
    assert logps(teacher.score(SEQUENCES[:2])) == right(SEQUENCES[:2])
    server.key = "changed"
    with pytest.raises(RunError, match="401"):
        teacher.score(SEQUENCES)
