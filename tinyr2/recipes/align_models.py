"""What a teacher with another tokenizer says of a student's answers, by signal: the second half of `tinyr2 align`.

In: two models, their tokenizers and problems. Out: of each signal the share of the answers' tokens, bytes and spans
that it keeps, and of the sum of |advantage|. `marginal` treats every span, with a distribution or as `chunk` does; it
is counted where there is a distribution.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tinyr2.core.config import Config
from tinyr2.core.errors import ConfigError, DataError
from tinyr2.core.packing import pack, split
from tinyr2.core.types import Batch, Rollout
from tinyr2.data.problems import DataConfig, load_problems
from tinyr2.models.head import head_of, score_tokens
from tinyr2.models.load import ModelConfig, context_length, load_model, pick_device
from tinyr2.models.pairs import Pairs
from tinyr2.recipes.setup import policy_of
from tinyr2.report.console import Console
from tinyr2.report.table import Row, Table
from tinyr2.rollouts.sample import sample
from tinyr2.rollouts.sampling import SamplingConfig
from tinyr2.teachers.boundaries import Boundaries, Order
from tinyr2.teachers.local import hire
from tinyr2.teachers.marginal import Marginal
from tinyr2.teachers.member import Member, Seat, Signal
from tinyr2.teachers.minds import Mind, Resident, Thoughts
from tinyr2.teachers.opinion import Opinion
from tinyr2.teachers.panel import Panel
from tinyr2.teachers.views import View
from tinyr2.tokens.byte_order import byte_order
from tinyr2.tokens.translate import Translator
from tinyr2.train.step import Learner, predicting

SIGNALS: tuple[Signal, ...] = ("exact", "chunk", "chunk_debiased", "mapped", "marginal")
UNITS = ("tokens", "bytes", "spans", "advantage")
TOKENS = 16384  # of a micro-batch


class ModelsConfig(Config):
    """Who answers, who reads it, and what is asked."""

    student: ModelConfig
    teacher: ModelConfig
    data: DataConfig
    sampling: SamplingConfig = SamplingConfig()
    max_bias: float = Field(0.1, ge=0.0, le=1.0)  # chunk_debiased: probability that a span's boundary may rule out
    seed: int = 0
    device: str = "auto"

    @model_validator(mode="after")
    def _drawn_from_the_whole(self) -> "ModelsConfig":
        if self.sampling.temperature == 0:
            raise ValueError("temperature 0 draws nothing: an advantage is of answers that the student sampled; set "
                             "it to 1")
        return self


@dataclass
class _Remembered:
    """A mind that several members ask about one micro-batch: it thinks once."""

    mind: Mind
    _asked: Tensor | None = None
    _thought: Thoughts | None = None

    def visit(self, papers: Sequence[Rollout]) -> None:
        self.mind.visit(papers)

    def think(self, papers: Sequence[Rollout], batch: Batch) -> Thoughts:
        if self._asked is None or not torch.equal(self._asked, batch.tokens):
            self._asked, self._thought = batch.tokens, self.mind.think(papers, batch)
        return self._thought


@torch.no_grad()
def compare_models(config: ModelsConfig, translator: Translator,
                   tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
                   console: Console) -> dict[str, Any]:
    """The student answers, the teacher reads; prints the table and returns the shares (0 to 1) by signal.

    `advantage`: of the sum over spans of |log p_teacher − log p_student|, each span once, relative to `chunk`, which
    has every span; None where that sum is 0. Of `marginal`: `tokens` and `bytes` are those with a distribution, special
    tokens that the teacher has no counterpart for included; `spans` and `advantage` are of the spans that have one.
    Answers that do not fit the teacher's context are left out.
    ConfigError: a model with fewer ids than its tokenizer. DataError: no answer fits.
    """
    problems, device = load_problems(config.data), pick_device(config.device)
    student, teacher = (_load(*each, device) for each in ((config.student, translator.student.vocab),
                                                          (config.teacher, translator.teacher.vocab)))
    console.note(f"{config.student.path} answers {len(problems):,} problems of {config.data.source}, "
                 f"{config.teacher.path} reads the answers, {device}")
    learner = Learner(model=student, vocab=translator.student.vocab, tokens_per_micro_batch=TOKENS)
    written = sample(policy_of(student, tokenizers[0], learner.vocab), problems, n=1, sampling=config.sampling,
                     seed=config.seed)
    view = View(translator=translator, context=context_length(teacher.config))
    read = [r for r, paper in zip(written, view.papers(written), strict=True) if paper is not None]
    if not read:
        raise DataError(f"{config.teacher.path}: no answer fits its context of {view.context} tokens; lower "
                        "--max-completion-length, or take a teacher with a longer context")
    mind = _Remembered(Resident(hire(teacher, translator.teacher.vocab)))
    panel = Panel([_member(signal, config, view, mind, device) for signal in SIGNALS],
                  student=head_of(student, learner.vocab))
    sums = _sums(learner, panel, read, translator, config.sampling.temperature)
    result = {"student": config.student.path, "teacher": config.teacher.path, "problems": len(problems),
              "answers": len(read), "tokens": int(sums["all"]["tokens"]), "bytes": int(sums["all"]["bytes"]),
              "max_bias": config.max_bias, "mean_abs_advantage": _share(sums["chunk"], sums["chunk"], "advantage",
                                                                        "spans")}
    result |= {signal: {"tokens": _share(sums[signal], sums["all"], "tokens"),
                        "bytes": _share(sums[signal], sums["all"], "bytes"),
                        "spans": _share(sums[signal], sums["chunk"], "spans"),
                        "advantage": _share(sums[signal], sums["chunk"], "advantage")} for signal in SIGNALS}
    _show(result, console)
    return result


def _load(config: ModelConfig, written: int, device: torch.device) -> nn.Module:
    model = load_model(config, device)
    held = model.get_output_embeddings().weight.shape[0]
    if held < written:
        raise ConfigError(f"{config.path}: the model has {held:,} ids, its tokenizer writes {written:,}; give the "
                          "tokenizer that the model was made with, or leave A and B out")
    return model


def _member(signal: Signal, config: ModelsConfig, view: View, mind: Mind, device: torch.device) -> Member:
    # a special token that the teacher has no counterpart for is in no span, so nothing is to be said of it
    seat = Seat(name=signal, signal=signal, temperature=config.sampling.temperature, never=float("nan"))
    return Member(seat, view, mind, _aid(signal, view.translator, config.max_bias, device))


def _aid(signal: Signal, translator: Translator, max_bias: float,
         device: torch.device) -> Pairs | Boundaries | Marginal | None:
    ours, theirs = translator.student, translator.teacher
    if signal == "mapped":
        return Pairs(*(torch.from_numpy(ids).to(device) for ids in translator.pairs))
    if signal == "chunk_debiased":
        orders = [Order(*(torch.from_numpy(part).to(device) for part in byte_order(side.pieces)))
                  for side in (ours, theirs)]
        return Boundaries(*orders, threshold=max_bias)
    if signal == "marginal":
        return Marginal(translator.prefixes, ours.pieces, theirs.pieces, ours.vocab)
    return None


def _sums(learner: Learner, panel: Panel, rollouts: Sequence[Rollout], translator: Translator,
          temperature: float) -> dict[str, dict[str, float]]:
    """By signal, and for `all` answers that were read: tokens, bytes, spans, |advantage|."""
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    head = head_of(learner.model, learner.vocab)
    device = head.weight.device
    shared = torch.zeros(learner.vocab, dtype=torch.bool, device=device)
    shared[torch.from_numpy(translator.pairs[0])] = True
    panel.prepare(rollouts, 0.0)
    for some in split(rollouts, learner.tokens_per_micro_batch):
        batch = pack(some, device)
        states = predicting(learner, batch)
        opinions = {o.name: o for o in panel(some, batch, states)}
        logp = score_tokens(states, head, batch.targets, temperature=temperature).learner_logp
        sizes = torch.from_numpy(np.concatenate([_sizes(r, translator) for r in some])).to(device)
        _add(sums["all"], torch.ones_like(sizes, dtype=torch.bool), sizes)
        for name, opinion in opinions.items():
            kept, span = _kept(opinion, opinions["chunk"], shared[batch.targets])
            gaps = _gaps(opinion.spoken.logp, span, logp)
            _add(sums[name], kept, sizes)
            sums[name]["spans"] += len(gaps)
            sums[name]["advantage"] += float(gaps.abs().sum())
    return sums


def _kept(opinion: Opinion, chunk: Opinion, shared: Tensor) -> tuple[Tensor, Tensor]:
    """((N,) bool, the tokens that a signal keeps; (N,) their spans, -1 for other tokens and where there is none).

    Of `mapped` and `marginal` these are the tokens with a distribution, of `mapped` those in both vocabularies: shared
    (N,) bool.
    """
    if opinion.name not in ("mapped", "marginal"):
        span = _known(opinion)
        return span >= 0, span
    kept = torch.zeros_like(shared)
    if opinion.whole is not None:
        kept[opinion.whole.at] = True
    if opinion.name == "mapped":
        kept &= shared
    return kept, _known(chunk).where(kept, -1)


def _known(opinion: Opinion) -> Tensor:
    """(N,) the span of each token that the teacher says something of."""
    span, logp = opinion.spoken.span, opinion.spoken.logp
    return span.where((span >= 0) & torch.cat([logp, logp.new_zeros(1)])[span].isfinite(), -1)


def _gaps(teacher: Tensor, span: Tensor, learner_logp: Tensor) -> Tensor:
    """log p_teacher − log p_student in nats, of each span that has a token here."""
    named, inside = span[span >= 0].unique(), span >= 0
    student = learner_logp.new_zeros(len(teacher)).index_add_(0, span[inside], learner_logp[inside])
    return (teacher - student)[named]


def _sizes(rollout: Rollout, translator: Translator) -> np.ndarray:
    """(n,) the bytes of each token of an answer; those with a role in the chat have none."""
    return np.diff(translator.student.spell(rollout.response_ids)[1], prepend=0)


def _add(sums: dict[str, float], kept: Tensor, sizes: Tensor) -> None:
    sums["tokens"] += int(kept.sum())
    sums["bytes"] += int(sizes[kept].sum())


def _share(part: Mapping[str, float], whole: Mapping[str, float], unit: str, of: str | None = None) -> float | None:
    """None where there is nothing to have a share of."""
    total = whole[of or unit]
    return part[unit] / total if total else None


def _show(result: Mapping[str, Any], console: Console) -> None:
    rows = tuple(Row(signal, tuple("–" if result[signal][unit] is None else f"{result[signal][unit]:.1%}"
                                   for unit in UNITS)) for signal in SIGNALS)
    console.table(Table(("tokens", "bytes", "spans", "Σ|advantage|"), rows,
                        f"{result['answers']:,} answers, {result['tokens']:,} tokens: what each signal keeps "
                        "(marginal: with a distribution); spans and Σ|advantage| beside chunk's"))
