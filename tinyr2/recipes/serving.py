"""Servers in a distillation run: made sure of before the run folder is made, asked once per step, and accounted for.

In: the config's servers, tokenizers, and where the journals lie. Out: minds for the panel, a writer for data
distillation, and counts of what was asked and what became of it, which balance exactly.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tinyr2.core.errors import RunError
from tinyr2.core.ledger import Accounting
from tinyr2.core.rng import derive
from tinyr2.core.types import Problem, Rollout
from tinyr2.recipes.answers import Write
from tinyr2.recipes.data_distillation import DataDistillationConfig, Writer
from tinyr2.recipes.distill_config import DistillConfig, TeacherConfig
from tinyr2.recipes.findings import ModelFiles
from tinyr2.recipes.inputs import Inputs
from tinyr2.recipes.run import Run
from tinyr2.rollouts.remote import RemoteWriter, tokenized
from tinyr2.teachers.minds import Distant, Listing, Mind
from tinyr2.teachers.remote import RemoteTeacher, Said

ANSWERS = "answers"  # what servers said, in the run folder


@dataclass
class Served:
    """One teacher behind a server, and what became of what it was asked."""

    name: str
    server: RemoteTeacher | RemoteWriter
    _told: Accounting = field(default_factory=Accounting, init=False)  # at the last step's end

    def ask(self, papers: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Said]:
        """What the server says of all answers of a step. RunError where it has no opinion of any of them."""
        said = self.server.score(papers)
        asked = sum(bool(response) for _, response in papers)
        failed = [s.error for s in said if s.error is not None]
        if failed and len(failed) == asked:
            raise RunError(f"{self.name}: the server gave no opinion of any of a step's {asked} answers, the last time "
                           f"because of: {failed[-1]}; mend the server, or what it is asked, and resume")
        return said

    def step(self) -> tuple[dict[str, float], dict[str, float]]:
        """Since the last call: for the metrics the share of answers without an opinion; for the clock what the net did.

        The second of the two differs from run to run, as retries, answers known already and seconds do.
        """
        now, before = self.server.accounting, self._told
        assert now.balanced, f"{self.name}: {now}"
        self._told, name = now, f"teacher/{self.name}"
        net = {f"{name}/requests": now.requests - before.requests, f"{name}/retries": now.retried - before.retried,
               f"{name}/from_journal": now.from_journal - before.from_journal}
        if now.seconds > before.seconds:
            net[f"{name}/busy_share"] = (now.busy_seconds - before.busy_seconds) / (now.seconds - before.seconds)
        asked = now.asked - before.asked
        return {f"{name}/failed": (now.failed - before.failed) / asked} if asked else {}, net

    def tell(self, run: Run) -> None:
        """The whole run's account, on the console and as an event."""
        a = self.server.accounting
        busy = {"busy_share": a.busy_seconds / a.seconds} if a.seconds else {}
        run.event("served", teacher=self.name, asked=a.asked, answered=a.answered, failed=a.failed,
                  from_journal=a.from_journal, requests=a.requests, retried=a.retried, unsaid=a.unsaid,
                  not_finite=a.not_finite, tokens=a.tokens, faults=dict(a.faults), balanced=a.balanced, **busy)
        share = f"; a request was running {busy['busy_share']:.0%} of the scoring time" if busy else ""
        sign = "=" if a.balanced else "is not"
        run.console.note(f"{self.name}: asked for {a.asked:,} answers {sign} {a.answered:,} given + {a.failed:,} "
                         f"failed + {a.from_journal:,} known before; {a.requests:,} requests, {a.retried:,} of them "
                         f"sent again{share}")


def serve(teacher: TeacherConfig, files: ModelFiles, inputs: Inputs, temperature: float,
          journals: Path) -> tuple[Served, Mind]:
    """A teacher behind a server, checked, with its journal; and its mind."""
    journals.mkdir(parents=True, exist_ok=True)
    served = Served(teacher.name, RemoteTeacher(teacher.server, journals / f"{teacher.name}.jsonl"))
    served.server.check(files.tokenizer, temperature)
    if teacher.server.top_k:
        return served, Listing(lambda papers: [s.topk for s in served.ask(papers)], teacher.server.top_k, inputs.vocab,
                               teacher.tail)
    return served, Distant(lambda papers: [s.logp for s in served.ask(papers)])


def meet_servers(config: DistillConfig, files: Sequence[ModelFiles | None], temperature: float) -> None:
    """Servers that are not there, or others than configured, are the user's fault: before anything is made."""
    for teacher, own in zip(config.staff, files, strict=True):
        for server, check in _strangers(teacher, own, temperature):
            try:
                check()
            finally:
                server.close()


def _strangers(teacher: TeacherConfig, own: ModelFiles | None,
               temperature: float) -> Iterator[tuple[RemoteTeacher | RemoteWriter, Callable[[], None]]]:
    if teacher.chat is not None:
        writer = RemoteWriter(teacher.chat, None)
        yield writer, writer.check
    if teacher.server is not None:
        server = RemoteTeacher(teacher.server, None)
        yield server, partial(server.check, own.tokenizer, temperature)


class Scribe:
    """A server as the writer of data distillation; its journal, in the run folder, is opened when it has to write."""

    def __init__(self, teacher: TeacherConfig, choices: DataDistillationConfig, seed: int, inputs: Inputs,
                 folder: Path) -> None:
        self._teacher, self._choices, self._seed = teacher, choices, derive(seed, "data distillation")
        self._inputs, self._journals = inputs, folder / ANSWERS
        self._served: Served | None = None

    @property
    def writer(self) -> Writer:
        """For `distill_data`. Where the server is reached is not what tells one writer from another."""
        chat = self._teacher.chat
        return Writer(name=f"{chat.model} at {chat.url}", facts={"teacher": chat.model}, open=self._open,
                      close=self._close)

    def _open(self) -> Write:
        self._journals.mkdir(exist_ok=True)
        server = RemoteWriter(self._teacher.chat, self._journals / f"{self._teacher.name}.jsonl")
        self._served = Served(self._teacher.name, server)
        return partial(_written, server, self._choices, self._seed, self._inputs)

    def _close(self, run: Run) -> None:
        if self._served is not None:
            self._served.tell(run)
            self._served.server.close()


def _written(server: RemoteWriter, choices: DataDistillationConfig, seed: int, inputs: Inputs,
             problems: Sequence[Problem]) -> list[Rollout]:
    """Answers in the student's tokens: the server's own are not known."""
    rollouts = server.write(problems, n=choices.num_generations, sampling=choices, seed=seed)
    return tokenized(rollouts, inputs.tokenizer)
