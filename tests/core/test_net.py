import email.utils
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tinyr2.core.errors import ConfigError, RunError
from tinyr2.core.net import Client, Fault, Request
from tinyr2.core.net_check import check_model, find_version
from tinyr2.core.net_config import NetConfig

FAST = {"backoff": 0.0, "connect_timeout": 0.5, "read_timeout": 5.0, "model": "m"}


class Script:
    """A server that plays one reply after another: (status, body, headers), or a function of the handler."""

    def __init__(self, *replies):
        self.replies, self.seen, self.times = list(replies), [], []
        script = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                self.rfile.read(int(self.headers.get("content-length", 0)))
                script.times.append(time.monotonic())
                script.seen.append((self.path, dict(self.headers)))
                reply = script.replies.pop(0)
                if callable(reply):
                    return reply(self)
                status, body, headers = reply
                self.send_response(status)
                for name, value in ({"content-length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST

            def log_message(self, *_):
                """Says nothing."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.server_close()


def said(status=200, value=None, **headers):
    return status, json.dumps(value).encode(), headers


def client(script, **more):
    return Client(NetConfig(**FAST | {"url": script.url} | more))


def ask(one, **more):
    return one.ask(Request(path="/x", body={}, **more), lambda answer: answer)


def test_an_answer_is_read_and_counted():
    with Script(said(value=[1])) as script:
        one = client(script)
        assert ask(one, tokens=7) == [1]
        account = one.accounting
        assert (account.requests, account.succeeded, account.tokens, account.retried) == (1, 1, 7, 0)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 529])
def test_a_status_that_passes_is_tried_again(status):
    with Script(said(status), said(status), said(value=5)) as script:
        one = client(script)
        assert ask(one) == 5
        assert (one.accounting.requests, one.accounting.retried) == (3, 2)


@pytest.mark.parametrize(("value", "shown"), [
    ({"error": {"message": "bad ids"}}, "bad ids"), ({"detail": "no"}, "no"), ({"type": "x", "message": "m"}, "m"),
    ("plain", "plain"), ({"else": 1}, '{"else": 1}'), ("x" * 400, "x" * 300 + " …"),
])
@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_says_what_the_server_said_and_is_not_repeated(status, value, shown):
    with Script(said(status, value)) as script:
        one = client(script)
        with pytest.raises(Fault) as caught:
            ask(one)
        assert caught.value.kind == "refused" and caught.value.status == status
        assert str(caught.value) == f"{script.url}/x: the server answers {status}: {shown}"
        assert one.accounting.given_up == 1


@pytest.mark.parametrize("status", [301, 401, 403, 404, 405])
def test_what_holds_for_every_request_ends_the_run(status):
    with Script(said(status, "no")) as script, pytest.raises(RunError, match=f"{status}: no; mend the server"):
        ask(client(script))


def test_tries_are_used_up():
    with Script(*[said(500)] * 3) as script:
        one = client(script, max_retries=2)
        with pytest.raises(Fault, match=r"500: null \(3 tries\)") as caught:
            ask(one)
        assert caught.value.kind == "broken"
        assert (one.accounting.retried, one.accounting.given_up) == (2, 1)


def test_pauses_have_full_jitter_that_doubles_and_depend_on_the_key_alone(monkeypatch):
    paused = {}
    for key in ("a", "b", "a"):
        with Script(*[said(500)] * 5, said()) as script:
            one = client(script, backoff=1.0, max_backoff=4.0)
            waits = []
            monkeypatch.setattr(one._halt, "wait", waits.append)
            ask(one, key=key)
            assert paused.setdefault(key, waits) == waits
    assert paused["a"] != paused["b"]
    for waits in paused.values():
        assert all(0 <= w <= most for w, most in zip(waits, (1, 2, 4, 4, 4), strict=True))


@pytest.mark.parametrize("when", ["0.1", lambda: email.utils.formatdate(time.time() + 2, usegmt=True)])
def test_a_server_that_says_when_to_come_back_is_left_alone_until_then(when):
    value = when if isinstance(when, str) else when()
    with Script((429, b"{}", {"retry-after": value}), said()) as script:
        ask(client(script, max_backoff=0.2))
        pause = script.times[1] - script.times[0]
    assert pause >= (0.1 if value == "0.1" else 0.2)


def test_a_hint_that_is_none_is_left_out():
    with Script((429, b"{}", {"retry-after": "soon"}), said(value=1)) as script:
        assert ask(client(script)) == 1


def test_an_answer_whose_bytes_drip_is_cut_off_as_a_whole():
    def drip(handler):
        handler.send_response(200)
        handler.send_header("content-length", "1000")
        handler.end_headers()
        for _ in range(50):
            try:
                handler.wfile.write(b" ")
            except OSError:
                return
            time.sleep(0.02)

    with Script(drip) as script:
        start = time.monotonic()
        with pytest.raises(Fault, match="no whole answer within 0.15 s"):
            ask(client(script, total_timeout=0.15, max_retries=0))
        assert time.monotonic() - start < 0.9


def test_a_connection_that_nobody_takes_is_a_fault_of_the_connection():
    with Script() as script:
        url = script.url
    one = Client(NetConfig(**FAST | {"url": url, "max_retries": 1}))
    with pytest.raises(Fault, match="ConnectError") as caught:
        ask(one)
    assert caught.value.kind == "connection"


def test_an_error_of_the_reader_is_asked_again_once():
    def wrong(answer):
        raise Fault("wrong", "not about this")

    with Script(said(), said()) as script:
        one = client(script)
        with pytest.raises(Fault, match=r"not about this \(2 tries\)"):
            one.ask(Request(path="/x", body={}), wrong)


def test_a_wrong_answer_after_other_faults_is_still_asked_again():
    answers = iter([Fault("wrong", "no"), None])

    def read(answer):
        if (fault := next(answers)) is not None:
            raise fault
        return answer

    with Script(said(429), said(500), said(value=1), said(value=2)) as script:
        assert client(script).ask(Request(path="/x", body={}), read) == 2


def test_after_a_user_error_no_job_begins_and_those_that_run_are_given_out():
    started, gate = [], threading.Event()

    def do(job):
        started.append(job)
        if job == 1:
            gate.wait(1)
            raise RunError("the end")
        if job == 0:
            gate.set()
            time.sleep(0.05)
        return job * 10

    one = Client(NetConfig(**FAST | {"url": "http://127.0.0.1:1", "max_in_flight": 2}))
    got = []
    with pytest.raises(RunError, match="the end"):
        for item in one.each(range(20), do):
            got.append(item)
    assert got == [(0, 0)] and sorted(started) == [0, 1]
    assert sorted(one.each(range(5), lambda job: -job)) == [(i, -i) for i in range(5)]


def test_a_version_is_found_where_a_server_says_one():
    with Script(said(404), said(value={"version": "0.5"})) as script:
        assert find_version(client(script)) == "0.5"
        assert [path for path, _ in script.seen] == ["/version", "/server_info"]
    with Script(said(404), said(404), said(404)) as script:
        assert find_version(client(script)) is None


def test_a_server_without_a_list_of_models_is_asked_by_name_later():
    with Script(said(404)) as script:
        check_model(client(script))
    with Script(said(value={"data": [{"id": "a"}, {"id": "b"}]})) as script, \
            pytest.raises(ConfigError, match="no model 'm'; it serves a, b"):
        check_model(client(script))


def test_the_key_is_sent_as_a_bearer(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "k1")
    with Script(said()) as script:
        ask(client(script, api_key_env="SOME_KEY"))
        assert script.seen[0][1]["authorization"] == "Bearer k1"
