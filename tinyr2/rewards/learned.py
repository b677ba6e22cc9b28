"""A learned reward: a reward model reads prompt and completion as text, through its own template and tokenizer.

In: prompts and completions as turns, never the student's token ids. Out: the model's number for each, read at the token
that ends the turn. Also: in what the student's way of reading differs from the reward model's.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tinyr2.core.config import Config
from tinyr2.core.errors import ConfigError, DataError
from tinyr2.core.types import Message
from tinyr2.models.load import HeldDType, ModelConfig, context_length, load_config, load_tokenizer, pick_device
from tinyr2.models.packed import hidden_states, is_steady
from tinyr2.models.scalar import load_scalar, scalars
from tinyr2.rewards.answer import Completion, text_of
from tinyr2.tokens.chat import end_of_turn, render_example

_HELLO = (Message("user", "hello"),)
_REPLY = (Message("assistant", "zqx"),)  # what no template's own text contains


class RewardModelOptions(Config):
    """Which model, and how to hold it."""

    path: str  # a folder or hub name, saved as AutoModelForSequenceClassification with one label
    revision: str | None = None
    dtype: HeldDType = "auto"
    device: str = "auto"
    batch_tokens: int = Field(16_384, ge=1)  # in one forward pass; a longer text travels alone


def reward_model(options: RewardModelOptions) -> "RewardModel":
    """The reward function; its weights are loaded at the first call.

    ConfigError: no such model or tokenizer, a model that gives no single number, a chat template that cannot write an
    answer, rotary positions that a pack cannot have.
    """
    model = ModelConfig(path=options.path, revision=options.revision, dtype=options.dtype)
    try:
        config, tokenizer = load_config(model), load_tokenizer(model)
        render_example(tokenizer, _HELLO, _REPLY)
    except DataError as error:
        raise ConfigError(f"rewards: reward_model: {error}") from error
    if not any("ForSequenceClassification" in name for name in config.architectures or ()) or config.num_labels != 1:
        raise ConfigError(f"rewards: reward_model: {options.path} gives no single number for a text; give a model "
                          f"saved as AutoModelForSequenceClassification with num_labels=1")
    if not is_steady(config):
        raise ConfigError(f"rewards: reward_model: {options.path}: its rope_type ties a text's score to the longest "
                          f"text of the batch; give another model")
    return RewardModel(options, config, tokenizer)


class RewardModel:
    """A reward function with TRL's signature: the number that the model gives at the end of the answer's turn.

    None for a text that is longer than the model's context, or that its template cannot write; `unread` counts these.
    """

    def __init__(self, options: RewardModelOptions, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.unread = 0
        self._options = options
        self._limit = context_length(config)

    def __call__(self, prompts: Sequence[Sequence[dict[str, str]]], completions: Sequence[Completion], **_
                 ) -> list[float | None]:
        rows = self._read(prompts, completions)
        readable = [i for i, row in enumerate(rows) if row is not None]
        self.unread += len(rows) - len(readable)
        scores: list[float | None] = [None] * len(rows)
        for batch in _batches([(i, len(rows[i])) for i in readable], self._options.batch_tokens):
            for i, score in zip(batch, _score(self._model, [rows[i] for i in batch]), strict=True):
                scores[i] = score
        return scores

    @cached_property
    def _model(self) -> nn.Module:
        options = self._options
        model = ModelConfig(path=options.path, revision=options.revision, dtype=options.dtype)
        return load_scalar(model, pick_device(options.device)).requires_grad_(False)

    def _read(self, prompts: Sequence[Sequence[dict[str, str]]], completions: Sequence[Completion]
              ) -> list[list[int] | None]:
        """Token ids of each whole chat; DataError where not one of them can be written."""
        rows: list[list[int] | None] = []
        fault: DataError | None = None
        for prompt, completion in zip(prompts, completions, strict=True):
            messages = [Message(turn["role"], turn["content"]) for turn in prompt]
            try:
                before, after = render_example(self.tokenizer, messages, [Message("assistant", text_of(completion))])
            except DataError as error:
                fault = error
                rows.append(None)
                continue
            row = [*before, *after]
            rows.append(row if self._limit is None or len(row) <= self._limit else None)
        if fault is not None and all(row is None for row in rows):
            raise fault
        return rows


def compare_readers(student: PreTrainedTokenizerBase, reward: PreTrainedTokenizerBase,
                    samples: Sequence[Sequence[Message]]) -> list[str]:
    """In words: how the reward model reads otherwise than the student, in ids, special tokens, and the samples' text.

    samples: prompts, each of which ends with a user turn. No difference is a fault, for a reward model reads text; but
    one that was meant to be the student's twin shows here that it is none. Empty where both read alike.
    """
    return [*_other_ids(student, reward), *_other_roles(student, reward), *_other_texts(student, reward, samples)]


def _batches(sizes: list[tuple[int, int]], most: int) -> list[list[int]]:
    """Places, by rising length, in groups of at most `most` tokens."""
    groups: list[list[int]] = []
    room = 0
    for place, size in sorted(sizes, key=lambda pair: pair[1]):
        if size > room:
            groups.append([])
            room = most
        groups[-1].append(place)
        room -= size
    return groups


@torch.no_grad()
def _score(model: nn.Module, rows: list[list[int]]) -> list[float]:
    """The model's number at the last token of each row."""
    device = next(model.parameters()).device
    lengths = [len(row) for row in rows]
    tokens = torch.tensor([token for row in rows for token in row], device=device)
    position = torch.cat([torch.arange(n, device=device) for n in lengths])
    last: Tensor = torch.tensor(lengths, device=device).cumsum(0) - 1
    return scalars(model, hidden_states(model, tokens, position, lengths)[last]).tolist()


def _other_ids(student: PreTrainedTokenizerBase, reward: PreTrainedTokenizerBase) -> list[str]:
    ours, theirs = student.get_vocab(), reward.get_vocab()
    found = []
    if moved := sorted((i, t) for t, i in ours.items() if theirs.get(t, i) != i):
        i, token = moved[0]
        found.append(f"{len(moved)} tokens have other ids, e.g. {token!r}: {i} for the student, {theirs[token]} for "
                     f"the reward model")
    for name, mine, other in (("student", ours, theirs), ("reward model", theirs, ours)):
        if alone := sorted((i, t) for t, i in mine.items() if t not in other):
            found.append(f"{len(alone)} tokens are in the {name}'s vocabulary alone, e.g. {alone[0][1]!r}")
    return found


def _other_roles(student: PreTrainedTokenizerBase, reward: PreTrainedTokenizerBase) -> list[str]:
    roles = [(role, getattr(student, role), getattr(reward, role)) for role in ("bos_token", "eos_token", "pad_token")]
    ends = [tokenizer.convert_ids_to_tokens(end) if (end := end_of_turn(tokenizer)) is not None else None
            for tokenizer in (student, reward)]
    return [f"{role} is {ours!r} for the student, {theirs!r} for the reward model"
            for role, ours, theirs in (*roles, ("the end of a turn", *ends)) if ours != theirs]


def _other_texts(student: PreTrainedTokenizerBase, reward: PreTrainedTokenizerBase,
                 samples: Sequence[Sequence[Message]]) -> list[str]:
    """The first sample of which the templates make different texts."""
    for messages in samples:
        try:
            ours, theirs = (tokenizer.decode(list(sum(render_example(tokenizer, messages, _REPLY), ())))
                            for tokenizer in (student, reward))
        except DataError as error:
            return [f"one of the chat templates cannot write a sample: {error}"]
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                      min(len(ours), len(theirs)))
            start = max(0, at - 10)
            return [f"the chat templates differ from character {at + 1} on: {ours[start:at + 30]!r} for the student, "
                    f"{theirs[start:at + 30]!r} for the reward model"]
    return []
