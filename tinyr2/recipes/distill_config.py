"""What `tinyr2 distill` can be told: who writes, who judges, and what the student makes of it."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from tinyr2.core.config import Config
from tinyr2.data.mixture import MixtureConfig
from tinyr2.data.problems import DataConfig
from tinyr2.eval.suite import EvalConfig
from tinyr2.models.load import HeldDType, ModelConfig
from tinyr2.recipes import setup
from tinyr2.recipes.answers import check_choices
from tinyr2.recipes.data_distillation import DataDistillationConfig
from tinyr2.rewards.grade import RewardConfig
from tinyr2.rollouts.remote import ChatConfig
from tinyr2.teachers.privileged import PrivilegeConfig
from tinyr2.teachers.remote import ServerConfig
from tinyr2.train.guard import GuardConfig
from tinyr2.train.hidden import HiddenConfig
from tinyr2.train.kd import KdConfig
from tinyr2.train.loop import TrainConfig
from tinyr2.train.loss import LossConfig

Signal = Literal["auto", "exact", "chunk", "chunk_debiased", "mapped", "marginal"]


class TeacherConfig(Config):
    """One teacher: a model (`path`), a server that scores, the student itself (`ema`), or a writer (`chat`)."""

    path: str | None = None
    revision: str | None = None
    dtype: HeldDType = "auto"
    server: ServerConfig | None = None
    tail: Literal["bucket", "none"] = "bucket"  # with server.top_k: what becomes of the tokens that it does not name
    chat: ChatConfig | None = None  # a server that gives text and nothing else; for method: data
    # the student's own weights: 0 as they are now, 1 as they were at the start, between them a moving average's decay
    ema: float | None = Field(None, ge=0.0, le=1.0)
    # in metrics, messages and file names: letters, digits, _ . -; None: teacher, or teacher0, teacher1, …
    name: str | None = None
    tasks: tuple[str, ...] | None = None  # whose answers it judges, by the problems' task; None: all
    weight: float = Field(1.0, ge=0.0)
    weight_end: float | None = Field(None, ge=0.0)  # the weight goes there linearly; None: it stays
    prompt: Literal["student", "own"] = "student"  # with one vocabulary: whose chat template writes its prompt
    privilege: PrivilegeConfig | None = None  # what it knows and the student does not
    # with another tokenizer: what it says of the student's tokens; auto: marginal, or chunk of a server
    signal: Signal = "auto"
    max_bias: float = Field(0.1, ge=0.0, le=1.0)  # chunk_debiased: probability that a span's boundary may rule out
    roles: dict[str, tuple[str, str]] = {}  # special tokens by role, the student's and its own: think_open, think_close

    @field_validator("name")
    @classmethod
    def _names_a_file(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise ValueError(f"{name!r} becomes a file's name; use letters, digits, _ . and -, a letter or digit first")
        return name

    @model_validator(mode="after")
    def _one_kind(self) -> "TeacherConfig":
        given = [k for k in ("path", "server", "ema", "chat") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError("a teacher is a path, a server, or the student itself (ema: 0); give one of the three"
                             + (f", not {' and '.join(given)}" if given else ", or for method: data a chat"))
        if self.server is not None and self.signal in ("mapped", "marginal", "chunk_debiased"):
            raise ValueError(f"signal {self.signal} needs the teacher's whole distribution, which a server does not "
                             "give; take chunk or exact")
        return self

    @property
    def model(self) -> ModelConfig | None:
        """The folder that its weights are read from, if any."""
        return None if self.path is None else ModelConfig(path=self.path, revision=self.revision, dtype=self.dtype)

    @property
    def source(self) -> str:
        """What messages call it."""
        served = self.server or self.chat
        return self.path or (served.url if served is not None else "the student itself")

    @property
    def has_files(self) -> bool:
        """Whether there is a tokenizer of its own to read, at least."""
        return self.path is not None or self.server is not None


class PanelConfig(Config):
    """What becomes of several teachers."""

    # sum: each divergence by its weight (DeepSeek-V4's merge of experts); average, product: of their distributions
    combine: Literal["sum", "average", "product"] = "sum"
    resident: Literal["all", "one"] = "all"  # one: they visit one after another, and leave their hidden states


class RolloutConfig(setup.WritingConfig):
    """Who answers how many of a step's prompts."""

    num_generations: int = Field(1, ge=0)  # by the student, per prompt
    num_teacher_generations: int = Field(0, ge=0)  # by the teacher, per prompt; for reward_loss: weighted_nll
    lmbda: float = Field(1.0, ge=0.0, le=1.0)  # share of prompts the student answers; the data's completions the rest
    importance_cap: float = Field(2.0, gt=0.0)  # of the weights that correct for bfloat16


class DistillConfig(Config):
    """Everything that `tinyr2 distill` can be told."""

    method: Literal["on_policy", "data"] = "on_policy"  # data: the teacher writes, the student is fine-tuned on it
    student: setup.StudentConfig
    teacher: TeacherConfig | None = None
    teachers: tuple[TeacherConfig, ...] = ()  # in place of one
    panel: PanelConfig = PanelConfig()
    data: DataConfig | None = None
    mixture: MixtureConfig | None = None  # in place of data: several sources at a ratio
    eval_data: DataConfig | None = None
    rollout: RolloutConfig = RolloutConfig()
    loss: LossConfig = LossConfig()
    kd: KdConfig | None = None
    hidden: HiddenConfig | None = None  # hidden states beside the loss
    data_distillation: DataDistillationConfig | None = None
    guard: GuardConfig | None = None  # None: GuardConfig() where a privileged teacher is the student itself
    rewards: tuple[RewardConfig, ...] = ()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    eval_kl_problems: int = Field(64, ge=0)  # held-out prompts whose KL is measured on the student's own answers
    compare_problems: int = Field(128, ge=0)  # held-out problems that student and teachers answer before the first step
    device: str = "auto"
    output_dir: str

    @property
    def trained_on(self) -> DataConfig | MixtureConfig:
        """Where the problems come from."""
        return self.data or self.mixture

    @property
    def staff(self) -> tuple[TeacherConfig, ...]:
        """The teachers, each with a name."""
        if self.teacher is not None:
            return (self.teacher.model_copy(update={"name": self.teacher.name or "teacher"}),)
        return tuple(t.model_copy(update={"name": t.name or f"teacher{i}"}) for i, t in enumerate(self.teachers))

    @property
    def teaching_temperature(self) -> float:
        """Of both sides' distributions, where teachers judge."""
        return self.rollout.temperature if self.kd is None else self.kd.temperature

    @property
    def guarding(self) -> GuardConfig | None:
        """The guard that stands: the configured one, or the usual one where the student teaches itself."""
        itself = any(t.privilege is not None and self._is_student(t) for t in self.staff)
        return self.guard or (GuardConfig() if itself else None)

    def _is_student(self, teacher: TeacherConfig) -> bool:
        """Whether its weights are the student's, as they are, were at the start, or lie in the same folder."""
        if teacher.path is None:
            return teacher.ema is not None
        mine, other = self.student.path, teacher.path
        return mine == other or Path(mine).expanduser().resolve() == Path(other).expanduser().resolve()

    @model_validator(mode="after")
    def _choices_fit(self) -> "DistillConfig":
        if self.data_distillation is not None:
            check_choices(self.data_distillation, self.rewards)
        for wrong, message in (*self._writing(), *self._judging(), *self._labelling(), *self._other_ways()):
            if wrong:
                raise ValueError(message)
        return self

    def _writing(self) -> list[tuple[bool, str]]:
        loss, rollout = self.loss, self.rollout
        sequence = loss.level == "sequence"
        return [
            (self.data is None and self.mixture is None, "data: missing; give data=…, or a mixture of several sources"),
            (self.data is not None and self.mixture is not None,
             "data and mixture: both are what is trained on; give one of the two"),
            (sequence and not self.rewards,
             "loss.level: sequence needs a reward; add rewards: [{name: exact_answer}], or your own file and function"),
            (sequence and loss.reward_loss == "reinforce" and rollout.num_generations < 2,
             "reward_loss: reinforce takes its baseline from the other answers to the same prompt; set "
             "rollout.num_generations to 2 or more"),
            (bool(rollout.num_teacher_generations) and not (sequence and loss.reward_loss == "weighted_nll"),
             "rollout.num_teacher_generations: only loss.level: sequence with reward_loss: weighted_nll may learn from "
             "answers that the teacher wrote"),
            (rollout.num_generations + rollout.num_teacher_generations < 1,
             "rollout: nobody writes; set num_generations to 1 or more"),
            (rollout.lmbda < 1 and (sequence or loss.estimator == "sampled"),
             "rollout.lmbda below 1 mixes in the data's completions, which only loss.level: token with estimator: full "
             "can learn from"),
        ]

    def _judging(self) -> list[tuple[bool, str]]:
        staff, names = self.staff, [t.name for t in self.staff]
        tempered = self.teaching_temperature
        key, does = ("rollout.temperature", "samples") if self.kd is None else ("kd.temperature", "compares")
        lists = any(t.server is not None and t.server.top_k for t in staff)
        tempers = any(t.server is not None and t.server.engine in ("vllm", "sglang") for t in staff)
        return [
            ((self.teacher is None) == (not self.teachers),
             "give either teacher, one, or teachers, a list"),
            (len(set(names)) < len(names), f"two teachers share a name ({', '.join(names)}); give each its own"),
            (self.panel.combine != "sum" and any(t.server is not None for t in staff),
             f"panel.combine: {self.panel.combine} needs whole distributions, which a server does not give; take sum"),
            (self.panel.combine != "sum" and self.loss.estimator == "sampled",
             f"panel.combine: {self.panel.combine} blends distributions; it needs loss.estimator: full"),
            (self.panel.combine != "sum" and len({t.tasks for t in staff}) > 1,
             f"panel.combine: {self.panel.combine} blends teachers of the same tasks; give all the same, or take sum"),
            (tempers and tempered != 1.0,
             f"a vLLM or SGLang server gives prompt log-probs at temperature 1 only, and this run {does} at "
             f"{tempered}; set {key}=1.0, or load the teacher here with path"),
            (lists and self.loss.estimator == "sampled",
             "server.top_k: loss.estimator: sampled reads the sampled tokens alone; set server.top_k to 0, or "
             "loss.estimator to full"),
            (lists and self.loss.divergence.kind == "jsd" and any(t.tail == "none" for t in staff),
             "tail: none has no JSD; set it to bucket, or loss.divergence.kind to reverse_kl or forward_kl"),
            (bool(self.rollout.num_teacher_generations) and (len(staff) > 1 or not any(t.path for t in staff)),
             "rollout.num_teacher_generations: one teacher with a path writes; give exactly that"),
        ]

    @property
    def _reads_other(self) -> bool:
        """Whether a teacher reads less, more or otherwise than the student."""
        return any(t.tasks is not None or t.privilege is not None or t.prompt == "own" for t in self.staff)

    def _labelling(self) -> list[tuple[bool, str]]:
        if self.kd is None:
            return []
        servers, by_entropy = [t.server for t in self.staff if t.server is not None], self.kd.by == "entropy"
        return [
            (any(s.top_k == 0 for s in servers),
             "kd compares distributions, and this server gives the log-probs of the data's tokens alone; set "
             "server.top_k to 20 or so, or load the teacher here with path"),
            (by_entropy and bool(servers),
             "kd.by: entropy needs the teacher's whole distribution, which a server does not give; take fixed or "
             "linear"),
            (self.rollout.lmbda > 0 or self.loss.level == "sequence",
             "kd has hard labels, which only the data's completions give; set rollout.lmbda=0 and loss.level=token"),
            (len(self.staff) > 1 and by_entropy,
             "kd.by: entropy asks how sure one teacher is; take one teacher, or kd.by: fixed or linear"),
            (by_entropy and self._reads_other,
             "kd.by: entropy asks how sure one teacher is of every token, where the student reads it; leave out tasks, "
             "privilege and prompt: own, or take kd.by: fixed or linear"),
        ]

    def _finds_no_success(self, teacher: TeacherConfig) -> bool:
        """Whether it is shown right answers alone, and none can ever be there."""
        shown = teacher.privilege
        alone = self.rollout.num_generations < 2 and not (shown and shown.own_success)
        return shown is not None and set(shown.shows) == {"success"} and (alone or not self.rewards)

    def _other_ways(self) -> list[tuple[bool, str]]:
        staff = self.staff
        plain = len(staff) == 1 and staff[0].path is not None and staff[0].privilege is None
        data, written = self.method == "data", len(staff) == 1 and staff[0].chat is not None
        visits, skips = self.panel.resident == "one", any(
            t.privilege is not None and t.privilege.without == "skip" for t in staff)
        return [
            (visits and self.hidden is not None, "hidden reads a teacher's layers with every micro-batch; set "
             "panel.resident=all"),
            (visits and bool(self.rollout.num_teacher_generations), "a teacher that writes stays; set "
             "panel.resident=all"),
            (self.panel.combine != "sum" and skips, f"panel.combine: {self.panel.combine} blends teachers that all "
             "judge the same answers; set privilege.without=plain, or panel.combine=sum"),
            (bool(staff) and not any(t.weight or t.weight_end for t in staff), "every teacher's weight is 0, so nobody "
             "teaches; give one a weight"),
            (any(self._finds_no_success(t) for t in staff), "privilege.shows: [success] shows another right answer of "
             "the group; set rollout.num_generations to 2 or more and give rewards that say what is right"),
            (any(t.name == "start" for t in staff), "a teacher cannot be called start: that is the guard's own, the "
             "student as it began; choose another name"),
            (not data and any(t.chat is not None for t in staff),
             "chat: such a server gives text and nothing else; set method: data with data_distillation, or give a "
             "server that scores"),
            (self.hidden is not None and (not plain or self._reads_other),
             "hidden compares the layers of one teacher that is loaded here and reads what the student reads; give one "
             "teacher with a path and without privilege, tasks or prompt: own"),
            (data and not (plain or written),
             "method: data needs one teacher that writes: a path, or a chat; and it has no privilege"),
            (data and self.mixture is not None,
             "method: data asks one source of problems; give data, and mix what was written with `tinyr2 sft`"),
            (data != (self.data_distillation is not None),
             "method: data and data_distillation belong together; give both or neither"),
        ]
