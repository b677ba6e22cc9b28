"""What the checks before a run look at, and what they find.

In: loaders of what a config names. Out: a `Setup`, in which whatever could be read stands, and `Finding`s: one for each
thing that is well, doubtful or wrong, with its cure.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tinyr2.core.errors import ConfigError, UserError
from tinyr2.core.types import Problem
from tinyr2.data.problems import DataConfig, load_problems
from tinyr2.models.load import ModelConfig, load_config, load_tokenizer
from tinyr2.recipes.build import read_tokenizer
from tinyr2.recipes.setup import StudentConfig
from tinyr2.rewards.grade import RewardConfig, RewardFunction
from tinyr2.train.loop import TrainConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Finding("fault", "student.vocabulary", "the model has 64 ids, the tokenizer 80", "take the model's own tokenizer")
    """

    level: Literal["ok", "warn", "fault"]
    name: str  # where: a key of the config, and what about it
    what: str
    cure: str = ""  # empty where nothing is wrong

    @property
    def line(self) -> str:
        """Where, what and how to fix it."""
        return f"{self.name}: {self.what}" + (f"; {self.cure}" if self.cure else "")


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A model as its folder describes it, without its weights. None: could not be read."""

    key: str  # in the config: model, student, teacher, teachers.0, …, reference, or value (the critic)
    source: ModelConfig
    config: PretrainedConfig | None  # None also where the model is behind a server
    tokenizer: PreTrainedTokenizerBase | None
    own_prompt: bool = False  # a teacher that renders its own prompt
    translated: bool = False  # its token ids mean others than the student's, and may

    @property
    def role(self) -> str:
        """What messages call it."""
        return {"value": "critic"}.get(self.key, self.key.replace("teachers.", "teacher "))


@dataclass(frozen=True, kw_only=True)
class Part:
    """Problems, and what the run will do with them."""

    key: str  # in the config: data or eval_data
    path: str
    problems: Sequence[Problem]  # empty: could not be read
    completions: Literal["needed", "read", "ignored"] = "ignored"  # read: tokenized where a problem has one
    answer_limit: tuple[str, int] | None = None  # the config's key and value; None: no model answers these
    rewards: tuple[RewardConfig, ...] = ()  # what judges the answers to these
    wanted: int | None = None  # so many problems are asked for


@dataclass(frozen=True, kw_only=True)
class Setup:
    """All that a run would stand on, read before any weight is loaded."""

    student: ModelFiles  # the model that is trained; its source is a StudentConfig
    teachers: tuple[ModelFiles, ...] = ()
    reference: ModelFiles | None = None  # of a KL, where it is not the student as it begins
    critic: ModelFiles | None = None  # one with a body of its own, and where that begins
    parts: tuple[Part, ...]  # what is trained on, then what is held out
    rewards: tuple[RewardFunction, ...] = ()
    train: TrainConfig
    evaluates: bool  # an evaluation gives at least one figure
    device: str
    output_dir: str
    unread: tuple[Finding, ...] = ()  # one fault for each thing that could not be read

    def __post_init__(self):
        assert isinstance(self.student.source, StudentConfig)

    @property
    def models(self) -> list[ModelFiles]:
        """Each model that is read, the student first; a critic that begins as the student is not another one."""
        return [self.student, *self.teachers, *(m for m in (self.reference, self.critic)
                                                if m is not None and m.source.path != self.student.source.path)]


class Reader:
    """Reads what a config names. What cannot be read becomes a fault, so that all of them come to light at once."""

    def __init__(self):
        self.faults: list[Finding] = []

    def read(self, key: str, load: Callable[[], T]) -> T | None:
        """What `load` returns; None where it raises the user's error."""
        try:
            return load()
        except UserError as error:
            fault = fault_of(key, error)
            if fault.what not in [f.what for f in self.faults]:  # a folder that is not there has no tokenizer either
                self.faults.append(fault)
            return None

    def model(self, key: str, source: ModelConfig) -> ModelFiles:
        """A model's config and tokenizer."""
        return ModelFiles(key=key, source=source, config=self.read(key, lambda: load_config(source)),
                          tokenizer=self.read(f"{key}.tokenizer", lambda: load_tokenizer(source)))

    def tokenizer(self, key: str, path: str) -> PreTrainedTokenizerBase | None:
        """A tokenizer alone: no model need lie beside it."""
        return self.read(f"{key}.tokenizer", lambda: read_tokenizer(path))

    def problems(self, key: str, source: DataConfig | None) -> list[Problem]:
        """The problems of `source`; none where there is no source or it cannot be read."""
        return (self.read(key, lambda: load_problems(source)) or []) if source is not None else []


def fault_of(name: str, error: UserError) -> Finding:
    """An error as a finding. The house's messages say what and where, then, after a semicolon, the cure."""
    what, _, cure = " ".join(str(error).split()).partition("; ")
    return Finding("fault", name, what.removeprefix(f"{name}: "), cure)


def raise_faults(findings: Sequence[Finding]) -> list[Finding]:
    """The warnings among `findings`, for the caller to show; ConfigError with all faults, one line each, if any."""
    faults = [f.line for f in findings if f.level == "fault"]
    if len(faults) == 1:
        raise ConfigError(faults[0])
    if faults:
        raise ConfigError("\n  ".join([f"{len(faults)} faults, found before any compute:", *faults]))
    return [f for f in findings if f.level == "warn"]
