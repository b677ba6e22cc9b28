"""The teachers of a distillation run: each one's mind, view and seat; and what is trained beside the student.

In: the config, tokenizers, and the student as it begins. Out: a `Staff`, which the steps ask.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tinyr2.core.types import Batch, Message, Rollout
from tinyr2.data.retrieval import Corpus, Retriever, mean_pooled
from tinyr2.models.head import head_of
from tinyr2.models.load import context_length, load_model
from tinyr2.models.pairs import Pairs
from tinyr2.objectives.divergence import Divergence
from tinyr2.recipes import setup
from tinyr2.recipes.check_staff import signal_of
from tinyr2.recipes.distill_config import DistillConfig, Signal, TeacherConfig
from tinyr2.recipes.findings import ModelFiles, Setup
from tinyr2.recipes.inputs import Inputs
from tinyr2.recipes.run import Run
from tinyr2.recipes.serving import Served, serve
from tinyr2.rollouts.sample import Policy
from tinyr2.teachers.boundaries import Boundaries, Order
from tinyr2.teachers.local import Teacher, hire
from tinyr2.teachers.marginal import Marginal
from tinyr2.teachers.member import Member, Seat
from tinyr2.teachers.minds import Mind, Resident, Visitor
from tinyr2.teachers.panel import Panel
from tinyr2.teachers.privileged import Kind, PrivilegeConfig, known, privilege_metrics, privileged_messages
from tinyr2.teachers.views import View
from tinyr2.tokens.byte_order import byte_order
from tinyr2.tokens.translate import Translator
from tinyr2.train.ema import Ema
from tinyr2.train.hidden import Apprentice, HiddenConfig, HiddenTerm, Projections, hire_layers, optimizer_of
from tinyr2.train.optim import Joint, Offloaded, Optimizer, make_optimizer
from tinyr2.train.step import Learner

START = "start"  # the guard's own teacher: the student as it began


class Pupil(Apprentice):
    """What a run's checkpoints hold: the student, the projections that are trained beside it, and moving averages."""

    def __init__(self, student: nn.Module, projections: Projections, averages: Sequence[Ema]):
        super().__init__(student, projections)
        self.averages = nn.ModuleList(averages)


@dataclass
class Layers:
    """The hidden-state term of one run, between a micro-batch's forward and its loss."""

    term: HiddenTerm
    _ours: dict[int, Tensor] = field(default_factory=dict)

    def reading(self, learner: Learner, tokens: int) -> dict[str, Callable]:
        """What `Reading` needs: a forward that keeps the mapped layers' states, and the term of the loss."""

        def forward(batch: Batch) -> Tensor:
            states, self._ours = self.term.read(learner.model, batch,
                                                gradient_checkpointing=learner.gradient_checkpointing)
            return states

        def also(batch: Batch, states: Tensor) -> Tensor:
            ours, self._ours = self._ours, {}
            return self.term.loss(ours, self.term.consult(batch), denom=tokens)

        return {"forward": forward, "also": also}


@dataclass
class Tutoring:
    """What one privileged teacher is shown; counts what there was to show."""

    config: PrivilegeConfig
    retrieve: Callable | None
    _shown: list[Mapping[Kind, str]] = field(default_factory=list)

    def __call__(self, rollout: Rollout, group: Sequence[Rollout]) -> tuple[Message, ...] | None:
        self._shown.append(known(rollout, group, self.config, self.retrieve))
        return privileged_messages(rollout, group, self.config, self.retrieve)

    def metrics(self) -> dict[str, float]:
        """The shares since the last call."""
        shown, self._shown = self._shown, []
        return privilege_metrics(shown, self.config)


@dataclass(frozen=True, kw_only=True)
class Staff:
    """Everyone beside the student."""

    panel: Panel
    averages: tuple[Ema, ...] = ()
    hidden: Layers | None = None
    servers: tuple[Served, ...] = ()
    tutoring: tuple[Tutoring, ...] = ()
    writer: Policy | None = None  # the teacher that may write
    shows_states: bool = False  # a member reads the student's states
    apart: Callable[[Rollout], Hashable] | None = None  # answers with other judges travel in other micro-batches

    def pupil(self, student: nn.Module, config: DistillConfig) -> tuple[nn.Module, Optimizer | Offloaded | Joint]:
        """What is trained and saved, the student itself where nothing is beside it; and its optimizer."""
        if self.hidden is None and not self.averages:
            return student, make_optimizer(student, config.train)
        projections = Projections({}, 1, 1, 0) if self.hidden is None else self.hidden.term.projections
        pupil = Pupil(student, projections, self.averages)
        return pupil, optimizer_of(pupil, config.train, config.hidden or HiddenConfig())

    def follow(self, student: nn.Module, t: int) -> None:
        """Before step `t`: moving averages follow the optimizer step that came before."""
        if t > 0:
            for average in self.averages:
                average.update(student)

    def metrics(self) -> dict[str, float]:
        """Of the step that just ended: what privileged teachers were shown."""
        shown = {name: value for one in self.tutoring for name, value in one.metrics().items()}
        return shown | self.panel.metrics()

    def served(self) -> tuple[dict[str, float], dict[str, float]]:
        """What servers were asked since the last call: for the metrics, and for the clock; see `Served.step`."""
        metrics, net = {}, {}
        for one in self.servers:
            for into, found in zip((metrics, net), one.step(), strict=True):
                into |= found
        return metrics, net

    def tell(self, run: Run) -> None:
        """What the servers were asked in the whole run, and what became of it."""
        for one in self.servers:
            one.tell(run)

    def close(self) -> None:
        """Give connections back."""
        for one in self.servers:
            one.server.close()


def load_teachers(config: DistillConfig, found: Setup, inputs: Inputs, device: torch.device) -> dict[str, Teacher]:
    """By name, the teachers that stay beside the learner; DataError where weights cannot be read."""
    return {t.name: _load(t, device, _size(files, inputs))
            for t, files in zip(config.staff, files_of(config, found), strict=True)
            if t.path is not None and config.panel.resident == "all"}


def hire_staff(config: DistillConfig, found: Setup, inputs: Inputs, learner: Learner, journals: Path,
               loaded: Mapping[str, Teacher]) -> Staff:
    """All teachers at work, those `loaded` among them; servers are checked. ConfigError: not what was configured."""
    hiring = Hiring(config, inputs, learner, journals, loaded)
    members = [hiring.member(t, files) for t, files in zip(config.staff, files_of(config, found), strict=True)]
    guard = config.guarding
    if guard is not None and guard.kl_to_start:
        start = TeacherConfig(ema=1.0, name=START, weight=guard.kl_to_start)
        members.append(hiring.member(start, None, anchor=Divergence()))
    student = head_of(learner.model, learner.vocab)
    panel = Panel(members, config.panel.combine, student)
    hidden = None
    if config.hidden is not None:
        (teacher,) = loaded.values()
        hidden = Layers(hire_layers(learner.model, teacher.model, config.hidden, config.train.seed))
    return Staff(panel=panel, averages=tuple(hiring.averages), servers=tuple(hiring.servers), hidden=hidden,
                 tutoring=tuple(hiring.tutoring), writer=hiring.writer(),
                 shows_states=any(m.seat.signal == "chunk_debiased" for m in members),
                 apart=panel.company if len({m.seat.tasks for m in members}) > 1 else None)


def files_of(config: DistillConfig, found: Setup) -> list[ModelFiles | None]:
    """Of each teacher its files; None for the student itself."""
    read = iter(found.teachers)
    return [next(read) if t.has_files else None for t in config.staff]


@dataclass
class Hiring:
    """One member after another; keeps what the staff needs beside the panel."""

    config: DistillConfig
    inputs: Inputs
    learner: Learner
    journals: Path
    loaded: Mapping[str, Teacher]
    averages: list[Ema] = field(default_factory=list)
    servers: list[Served] = field(default_factory=list)
    tutoring: list[Tutoring] = field(default_factory=list)

    def member(self, teacher: TeacherConfig, files: ModelFiles | None, *, anchor: Divergence | None = None) -> Member:
        """One teacher, ready to work; anchor: one that holds the student back by this divergence, beside the loss."""
        translator = None
        if files is not None and files.translated:
            translator = Translator(self.inputs.tokenizer, files.tokenizer, teacher.roles or None)
        signal = signal_of(teacher, self.config)
        mind = self._mind(teacher, files)
        seat = Seat(
            name=teacher.name, tasks=None if teacher.tasks is None else frozenset(teacher.tasks), weight=teacher.weight,
            weight_end=teacher.weight_end, signal=signal, speaks=self._speaks and anchor is None,
            temperature=self._temperature, anchor=anchor)
        aid = None if translator is None else self._aid(translator, signal, teacher.max_bias)
        return Member(seat, self._view(teacher, files, translator), mind, aid)

    def writer(self) -> Policy | None:
        """The one teacher, as a policy, where it writes too."""
        if not self.config.rollout.num_teacher_generations:
            return None
        return setup.policy_of(next(iter(self.loaded.values())).model, self.inputs.tokenizer, self.inputs.vocab,
                               exact=self.config.train.deterministic)

    @property
    def _device(self) -> torch.device:
        return next(self.learner.model.parameters()).device

    @property
    def _temperature(self) -> float:
        return self.config.teaching_temperature

    @property
    def _speaks(self) -> bool:
        loss = self.config.loss
        staff = self.config.staff
        # one teacher that reads every token is heard in the walk of the head itself
        partly = len(staff) > 1 or any(t.tasks or t.privilege or t.prompt == "own" for t in staff)
        return loss.estimator == "sampled" and (loss.position_weight > 0 or partly)

    def _mind(self, teacher: TeacherConfig, files: ModelFiles | None) -> Mind:
        if teacher.server is not None:
            served, mind = serve(teacher, files, self.inputs, self._temperature, self.journals)
            self.servers.append(served)
            return mind
        if teacher.ema is not None:
            return Resident(self._itself(teacher.ema))
        if teacher.name in self.loaded:
            return Resident(self.loaded[teacher.name])
        load = partial(_load, teacher, self._device, _size(files, self.inputs))
        return Visitor(load, self.learner.tokens_per_micro_batch)

    def _itself(self, decay: float) -> Teacher:
        model = self.learner.model
        if decay > 0:
            average = Ema(model, decay)
            self.averages.append(average)
            model = average.model
        return Teacher(model, head_of(model, self.inputs.vocab))

    def _view(self, teacher: TeacherConfig, files: ModelFiles | None, translator: Translator | None) -> View:
        privilege = None
        if teacher.privilege is not None:
            privilege = Tutoring(teacher.privilege, retriever_of(teacher.privilege))
            self.tutoring.append(privilege)
        own = files is not None and teacher.prompt == "own"
        tokenizer = files.tokenizer if own else self.inputs.tokenizer if privilege is not None else None
        model_config = self.learner.model.config if files is None else files.config
        context = None if model_config is None else context_length(model_config)
        if teacher.server is not None:
            context = None  # the server itself refuses what is too long
        return View(translator=translator, tokenizer=None if translator is not None else tokenizer,
                    privilege=privilege, context=context)

    def _aid(self, translator: Translator, signal: Signal, max_bias: float) -> Pairs | Boundaries | Marginal | None:
        """What a signal needs to know of the two vocabularies."""
        ours, theirs = translator.student, translator.teacher
        if signal == "mapped":
            return Pairs(*(torch.from_numpy(ids).to(self._device) for ids in translator.pairs))
        if signal == "chunk_debiased":
            return Boundaries(self._order(ours.pieces), self._order(theirs.pieces), threshold=max_bias)
        if signal == "marginal":
            return Marginal(translator.prefixes, ours.pieces, theirs.pieces, self.inputs.vocab)
        return None

    def _order(self, pieces: Sequence[bytes]) -> Order:
        return Order(*(torch.from_numpy(part).to(self._device) for part in byte_order(pieces)))


def retriever_of(privilege: PrivilegeConfig) -> Callable | None:
    """What finds passages in the config's corpus; None where none are shown."""
    if "passages" not in privilege.shows:
        return None
    # on the CPU: queries come one by one, and the learner's memory is its own
    embed = None if privilege.embedder is None else mean_pooled(privilege.embedder, torch.device("cpu"))
    retriever = Retriever(Corpus.read(privilege.corpus), embed=embed, dense_weight=privilege.dense_weight)

    @lru_cache(maxsize=1024)  # a group asks one question, and each of its answers twice
    def found(query: str, k: int) -> tuple[str, ...]:
        return tuple(retriever.texts(query, k))

    return found


def _size(files: ModelFiles, inputs: Inputs) -> int:
    """Of the teacher's head: its own tokenizer's ids, or those that it shares with the student."""
    return max(files.tokenizer.get_vocab().values()) + 1 if files.translated else inputs.vocab


def _load(teacher: TeacherConfig, device: torch.device, vocab: int) -> Teacher:
    return hire(load_model(teacher.model, device), vocab)


def worse_teachers(found: Mapping[str, float], student: float) -> list[str]:
    """A warning for each teacher that answers fewer held-out problems rightly than the student."""
    return [f"{name} solves {value:.1%} of the held-out problems, the student {student:.1%}: a student cannot learn "
            "from a worse teacher what it knows better; take another teacher, or train this one further"
            for name, value in found.items() if value < student]
