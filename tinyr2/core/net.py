"""Requests to a server that may be slow, busy, broken or gone: timeouts, retries, back-pressure, accounting, caps.

In: requests with a JSON body, and what reads the JSON of their answers. Out: what was read; a Fault that says why
nothing was, once the tries are used up; or a RunError for what no further try of any request can mend.
"""

import email.utils
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import httpx2

from tinyr2.core.errors import RunError, UserError
from tinyr2.core.gate import Gate
from tinyr2.core.ledger import Accounting, Ledger
from tinyr2.core.net_config import NetConfig, headers_of
from tinyr2.core.rng import generator

# busy: 429, 503    broken: other 5xx    timeout, connection: of the network    garbled: no JSON
# wrong: JSON that does not answer what was asked    refused: this request's fault    denied: every request's fault
Kind = Literal["busy", "broken", "timeout", "connection", "garbled", "wrong", "refused", "denied"]
TRANSIENT = frozenset({"busy", "broken", "timeout", "connection", "garbled"})
_STATUS: dict[int, Kind] = {408: "timeout", 425: "busy", 429: "busy", 503: "busy", 529: "busy",
                            401: "denied", 403: "denied", 404: "denied", 405: "denied", 407: "denied"}
_SHOWN = 300  # characters of what a server says

T = TypeVar("T")
Job = TypeVar("Job")


class Fault(Exception):
    """Why there is no answer: of one try, or at last."""

    def __init__(self, kind: Kind, text: str, *, status: int | None = None, wait: float = 0.0) -> None:
        super().__init__(text)
        self.kind, self.text, self.status, self.wait = kind, text, status, wait


@dataclass(frozen=True, kw_only=True)
class Request:
    """GET `path`, or POST `body` to it."""

    path: str
    body: Any = None
    key: str = ""  # what its pauses are derived from
    tokens: int = 0  # sent with it
    probe: bool = False  # brings no answer; counts against no cap


class Client:
    """One server, asked by up to `max_in_flight` threads."""

    def __init__(self, config: NetConfig) -> None:
        self.config = config
        self.ledger = Ledger()
        self.spent_before = 0  # tokens that count against the cap and were sent by an earlier process
        self.asked_before = 0  # requests likewise
        self.reconnecting: Callable[[float], None] = lambda since: None  # called before a try that follows a reset
        self._gate = Gate(config.max_in_flight)
        self._budget = threading.Lock()
        self._halt = threading.Event()
        local = urlsplit(config.url).hostname in ("127.0.0.1", "localhost", "::1")
        self._http = httpx2.Client(
            base_url=config.url, headers=headers_of(config), trust_env=not local,  # no proxy leads to this machine
            timeout=httpx2.Timeout(connect=config.connect_timeout, write=config.write_timeout,
                                   read=config.read_timeout, pool=config.pool_timeout),
            limits=httpx2.Limits(max_connections=config.max_in_flight, keepalive_expiry=30.0))

    @property
    def accounting(self) -> Accounting:
        """The counts so far."""
        return self.ledger.picture()

    @contextmanager
    def clocked(self) -> Iterator[None]:
        """A call: its seconds, and those of them in which a request was running, go into the accounting."""
        began, busy = time.monotonic(), self._gate.busy_seconds
        try:
            yield
        finally:
            self.ledger.add(seconds=time.monotonic() - began, busy_seconds=self._gate.busy_seconds - busy)

    def close(self) -> None:
        """Give the connections back."""
        self._http.close()

    def each(self, jobs: Sequence[Job], do: Callable[[Job], T]) -> Iterator[tuple[Job, T]]:
        """(job, do(job)) as they come, from `max_in_flight` threads.

        After a UserError no job begins; those that run are waited for and given out, and then it is raised.
        """
        todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[Job, T] | BaseException | None] = queue.SimpleQueue()  # None: a thread has left
        halt = self._halt = threading.Event()
        for job in jobs:
            todo.put(job)

        def work() -> None:
            try:
                while not halt.is_set():
                    job = todo.get_nowait()
                    done.put((job, do(job)))
            except queue.Empty:
                pass
            except BaseException as error:
                halt.set()
                done.put(error)
            finally:
                done.put(None)

        # daemons: an interrupted run does not wait for a server that hangs
        crew = [threading.Thread(target=work, daemon=True) for _ in range(min(len(jobs), self.config.max_in_flight))]
        try:
            yield from _gathered(crew, done)
        finally:
            halt.set()
            if not any(thread.is_alive() for thread in crew):
                self._halt = threading.Event()  # whoever asks next may try again

    def ask(self, request: Request, read: Callable[[Any], T]) -> T:
        """What `read` makes of the answer's JSON; it raises Fault("wrong", …) for one that is none.

        Fault: the tries are used up, or the request is at fault. RunError: a cap is reached, or nothing can be asked
        of this server (401, 403, 404, …), unless the request is a probe, whose sender judges that.
        """
        wrong = 0
        for attempt in range(self.config.max_retries + 1):
            self._count(request)
            try:
                value = self._try(request, read)
            except Fault as fault:
                wrong += fault.kind == "wrong"
                again = attempt < self.config.max_retries and self._passes(fault, request, wrong)
                count = {} if request.probe else {"retried" if again else "given_up": 1}
                self.ledger.add(fault=fault.kind, **count)
                if not again:
                    raise self._final(fault, request, attempt) from fault
                self._pause(fault, request, attempt)
            else:
                self.ledger.add(**({} if request.probe else {"succeeded": 1}))
                return value
        raise AssertionError("the last try returns or raises")

    def _count(self, request: Request) -> None:
        if request.probe:
            self.ledger.add(probes=1)
            return
        with self._budget:
            for name, spent, more in (("budget_requests", self.asked_before + self.ledger["requests"], 1),
                                      ("budget_tokens", self.spent_before + self.ledger["tokens"], request.tokens)):
                cap = getattr(self.config, name)
                if cap is not None and spent + more > cap:
                    raise RunError(f"{self.config.url}: {name} is {cap}, {int(spent)} are spent and the next request "
                                   f"needs {more}; raise {name} and resume: the answers so far are kept")
            self.ledger.add(requests=1, tokens=request.tokens)

    def _passes(self, fault: Fault, request: Request, wrong: int) -> bool:
        """Whether another try may go better."""
        if self._halt.is_set():
            return False
        # a wrong answer is asked for once more: it may have been another request's; a second one is the server's way
        return fault.kind in TRANSIENT or (fault.kind == "wrong" and (wrong == 1 or request.probe))

    def _final(self, fault: Fault, request: Request, attempt: int) -> Exception:
        tries = f" ({attempt + 1} tries)" if attempt else ""
        text = f"{self.config.url}{request.path}: {fault.text}{tries}"
        if fault.kind == "denied" and not request.probe:
            return RunError(f"{text}; mend the server, its url, model or api_key_env, and resume")
        return Fault(fault.kind, text, status=fault.status)

    def _pause(self, fault: Fault, request: Request, attempt: int) -> None:
        """Full jitter: a pause uniform in [0, backoff · 2^attempt], on top of what the server asked for."""
        most = min(self.config.max_backoff, self.config.backoff * 2**attempt)
        wait = min(fault.wait, self.config.max_backoff)
        if wait:
            self._gate.hold(wait)
        self._halt.wait(wait + float(generator(0, "backoff", request.key, attempt).uniform(0.0, most)))
        if fault.kind == "connection" and not request.probe:
            self.reconnecting(time.monotonic())

    def _try(self, request: Request, read: Callable[[Any], T]) -> T:
        status, headers, data = self._through_gate(request)
        if not 200 <= status < 300:
            raise Fault(_kind(status), f"the server answers {status}: {_said(data)}", status=status,
                        wait=_retry_after(headers.get("retry-after")))
        try:
            answer = json.loads(data)
        except ValueError as error:  # also UnicodeDecodeError
            raise Fault("garbled", f"the answer is no JSON: {error}") from error
        return read(answer)

    def _through_gate(self, request: Request) -> tuple[int, httpx2.Headers, bytes]:
        began = self._gate.enter()
        pressed = False
        try:
            reply = self._exchange(request, time.monotonic() + self.config.total_timeout)
            pressed = _kind(reply[0]) in ("busy", "timeout")
            return reply
        except Fault as fault:
            pressed = fault.kind == "timeout"
            raise
        finally:
            self._gate.leave(began, pressed=pressed)

    def _exchange(self, request: Request, deadline: float) -> tuple[int, httpx2.Headers, bytes]:
        body = None if request.body is None else json.dumps(request.body, allow_nan=False)
        data = bytearray()
        try:
            with self._http.stream("GET" if body is None else "POST", request.path, content=body) as response:
                for part in response.iter_bytes():
                    data += part
                    if time.monotonic() > deadline:
                        raise Fault("timeout", f"no whole answer within {self.config.total_timeout:g} s")
                return response.status_code, response.headers, bytes(data)
        except httpx2.ConnectTimeout as error:
            raise Fault("connection", f"no connection within {self.config.connect_timeout:g} s") from error
        except httpx2.TimeoutException as error:
            raise Fault("timeout", f"no answer in time ({type(error).__name__})") from error
        except httpx2.DecodingError as error:
            raise Fault("garbled", f"the answer cannot be unpacked: {error}") from error
        except httpx2.TransportError as error:
            raise Fault("connection", f"{type(error).__name__}: {error}") from error


def _gathered(crew: list[threading.Thread], done: queue.SimpleQueue) -> Iterator[tuple[Any, Any]]:
    """What the crew reports until all have left; then the first error, where there was one."""
    for thread in crew:
        thread.start()
    left, first = 0, None
    while left < len(crew):
        item = done.get()
        if item is None:
            left += 1
        elif isinstance(item, BaseException):
            if not isinstance(item, UserError):
                raise item
            first = first or item
        else:
            yield item
    for thread in crew:
        thread.join()
    if first is not None:
        raise first


def _kind(status: int) -> Kind:
    """What a status says; of success, nobody asks."""
    return _STATUS.get(status, "broken" if status >= 500 else "refused" if status >= 400 else "denied")


def _said(data: bytes) -> str:
    """A server's own words about an error, shortened: its message, or the whole text."""
    text = data.decode("utf-8", errors="replace").strip()
    try:
        inner = json.loads(text)
        while isinstance(inner, dict):
            inner = next((inner[key] for key in ("error", "message", "detail") if key in inner), text)
        text = inner if isinstance(inner, str) else text
    except ValueError:
        pass
    return text if len(text) <= _SHOWN else text[:_SHOWN] + " …"


def _retry_after(value: str | None) -> float:
    """Seconds that the header asks to wait: a number, or a date (RFC 9110, section 10.2.3)."""
    if value is None:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
