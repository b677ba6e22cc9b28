"""What the recipes share that learn from pairs of answers, of which one was preferred.

In: a config that names pairs. Out: checked inputs, answers as rollouts that stand two by two with the chosen one first,
and how often it is the one that scores higher.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tinyr2.core.config import Config
from tinyr2.core.types import Rollout
from tinyr2.data.pairs import Pair, PairsConfig, fingerprint, load_pairs, sides
from tinyr2.eval.intervals import wilson
from tinyr2.recipes import setup
from tinyr2.recipes.checks import check_training
from tinyr2.recipes.findings import Finding, Part, Reader, Setup, raise_faults
from tinyr2.recipes.graded import worked
from tinyr2.recipes.run import identity
from tinyr2.report.console import Console
from tinyr2.tokens.chat import fingerprint as tokenizer_fingerprint
from tinyr2.train.loop import TrainConfig


class PreferenceConfig(Config):
    """What every such recipe can be told."""

    model: setup.StudentConfig
    data: PairsConfig
    eval_data: PairsConfig | None = None
    pairs_per_step: int = Field(16, ge=1)
    train: TrainConfig = TrainConfig()
    device: str = "auto"
    output_dir: str


@dataclass(frozen=True, kw_only=True)
class Found:
    """A setup, and the pairs that its parts were made of."""

    setup: Setup
    pairs: list[Pair]  # empty: could not be read
    held_out: list[Pair]

    def with_findings(self, more: Sequence[Finding]) -> "Found":
        """The same, and `more` that was found on the way."""
        return replace(self, setup=replace(self.setup, unread=(*self.setup.unread, *more)))


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run reads, before any weight is loaded."""

    tokenizer: PreTrainedTokenizerBase
    pairs: list[Pair]
    held_out: list[Pair]
    vocab: int

    def facts(self, config: PreferenceConfig) -> dict[str, str]:
        """What must not change while the run is away."""
        return {"config": identity(config), "data": fingerprint(self.pairs), "eval_data": fingerprint(self.held_out),
                "tokenizer": tokenizer_fingerprint(self.tokenizer),
                "model": setup.model_fingerprint(config.model.path)}


def read(config: PreferenceConfig) -> Found:
    """Tokenizer, model config and pairs; what cannot be read is a fault in the setup."""
    reader = Reader()
    model = reader.model("model", config.model)
    pairs = _read_pairs(reader, "data", config.data)
    parts = [Part(key="data", path=config.data.path, problems=sides(pairs), completions="needed")]
    held_out = []
    if config.eval_data is not None:
        held_out = _read_pairs(reader, "eval_data", config.eval_data)
        parts.append(Part(key="eval_data", path=config.eval_data.path, problems=sides(held_out), completions="needed"))
    return Found(pairs=pairs, held_out=held_out, setup=Setup(
        student=model, parts=tuple(parts), train=config.train, evaluates=config.eval_data is not None,
        device=config.device, output_dir=config.output_dir, unread=tuple(reader.faults)))


def checked(found: Found, console: Console) -> Inputs:
    """What `found` holds, after every check that needs no compute; a ConfigError names all faults."""
    for warning in raise_faults(check_training(found.setup)):
        console.note(f"warning: {warning.line}")
    student = found.setup.student
    size = student.config.get_text_config().vocab_size
    return Inputs(tokenizer=student.tokenizer, pairs=found.pairs, held_out=found.held_out,
                  vocab=setup.shared_vocabulary(size, size, student.tokenizer))


def paths_read(config: PreferenceConfig) -> list[str]:
    """The files and folders that --overwrite must not delete."""
    return [config.model.path, config.data.path, *([config.eval_data.path] if config.eval_data is not None else [])]


def answers(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase) -> list[Rollout]:
    """Both answers of each pair, tokenized: 2P rollouts, chosen and rejected by turns; a pair is a group."""
    return [replace(r, group=i // 2, sample=i % 2) for i, r in enumerate(worked(sides(pairs), tokenizer))]


def remembered(known: dict[str, list[Rollout]], pairs: Sequence[Pair],
               make: Callable[[Sequence[Pair]], list[Rollout]]) -> list[Rollout]:
    """Both answers of each pair as `make` gives them, asked once for each problem id; `known` keeps them."""
    new = list({p.problem.id: p for p in pairs if p.problem.id not in known}.values())
    made = make(new)
    known |= {p.problem.id: made[2 * i:2 * i + 2] for i, p in enumerate(new)}
    return [replace(r, group=i) for i, pair in enumerate(pairs) for r in known[pair.problem.id]]


def by_pair(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values (2P,) of answers that stand two by two → chosen (P,), rejected (P,)."""
    return values.view(-1, 2).unbind(1)


def accuracy(chosen: Tensor, rejected: Tensor) -> float:
    """The share of pairs whose chosen answer scores higher; a tie counts half."""
    return float(((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).mean())


def held_out_figures(chosen: Tensor, rejected: Tensor, loss: float) -> dict[str, float]:
    """eval_loss, eval_accuracy with its interval (Wilson's, a tie being half a success), and eval_margin."""
    share, n = accuracy(chosen, rejected), len(chosen)
    low, high = wilson(share * n, n)
    return {"eval_loss": loss, "eval_accuracy": share, "eval_accuracy_low": low, "eval_accuracy_high": high,
            "eval_accuracy_n": n, "eval_margin": float((chosen - rejected).mean())}


def _read_pairs(reader: Reader, key: str, source: PairsConfig) -> list[Pair]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        pairs = reader.read(key, lambda: load_pairs(source)) or []
    reader.faults += [Finding("warn", f"{key}.pairs", str(w.message)) for w in told]
    return pairs
