"""Rewards for how an answer is written: its form, its language, its length, its repetitions.

In: completions as text or as token ids. Out: one reward each. Lengths and n-grams are in tokens, never in characters or
in words between spaces, so that they mean the same in every language.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from tinyr2.core.config import Config
from tinyr2.core.errors import ConfigError
from tinyr2.rewards.answer import Completion, text_of

Tag = Annotated[str, Field(min_length=1)]
Verdict = Callable[..., Sequence[float | None]]

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]{2,}(?:['\u2019-][A-Za-z\u00c0-\u024f]+)*")  # one letter is a variable
_LETTERS = re.compile(r"[^\W\d_A-Za-z\u00c0-\u024f]+")  # of any script but Latin
_NO_WORDS = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$[^$]*\$\$|\$[^$\n]*\$"
    r"|\\\[(?:(?!\\[\[\]]).)*\\\]|\\\((?:(?!\\[()]).)*\\\)|\\[A-Za-z]+|</?\w+>", re.DOTALL)


class ThinkFormatOptions(Config):
    """Which tags the form has."""

    think: tuple[Tag, Tag] = ("<think>", "</think>")
    answer: tuple[Tag, Tag] | None = None  # R1-Zero's is ["<answer>", "</answer>"]; null: any text is an answer
    opened: bool = False  # the chat template has already written the first tag


class LanguageOptions(Config):
    """The language that the reasoning should be in, and where the reasoning stands."""

    language: Literal["en", "zh"] = "en"
    think: tuple[Tag, Tag] = ("<think>", "</think>")


class CosineOptions(Config):
    """Rewards at length 0 and at max_length; the paper's own run has correct [2, 1], wrong [-10, 0], exceed -10."""

    max_length: int | None = Field(None, ge=1)  # tokens; null: max_completion_length
    correct: tuple[float, float] = (1.0, 0.5)
    wrong: tuple[float, float] = (-1.0, -0.5)
    exceed: float | None = -1.0  # at max_length and beyond, right or wrong; null: the cosine's last value
    verdict: Literal["exact_answer", "accuracy", "countdown"] = "exact_answer"  # the reward that says what is right
    verdict_options: dict[str, Any] = {}  # its options


class RepetitionOptions(Config):
    """TRL's names and defaults; the paper's own run has n-grams of 40."""

    ngram_size: int = Field(3, ge=1)
    max_penalty: float = Field(-1.0, le=0.0)


class SoftOverlongOptions(Config):
    """DAPO's run: 20,480 tokens, of which the last 4,096 are punished."""

    max_length: int | None = Field(None, ge=1)  # tokens; null: max_completion_length
    soft_punish_cache: int | None = Field(None, ge=0)  # tokens; null: a fifth of max_length, as DAPO has it


def think_format(options: ThinkFormatOptions) -> Verdict:
    """A reward function: 1.0 where the whole completion is one thought in tags and a non-empty answer, else 0.0.

    Each tag stands exactly once, in order, nothing before the first. With `answer` tags nothing stands outside them
    but white space (DeepSeek-R1, 2501.12948, section 2.2.2).
    """
    def score(completions: Sequence[Completion], **_) -> list[float]:
        return [float(_well_formed(text_of(completion).strip(), options)) for completion in completions]
    return score


def language(options: LanguageOptions) -> Verdict:
    """A reward function: the share of the reasoning's words that are of the language, 0.0 to 1.0.

    A Chinese character is a word, so is a run of two or more Latin letters, so is a run of any other script's. Digits,
    operators, single letters, LaTeX and code are none. No words: 1.0. The reasoning is what stands between the tags;
    without tags, the completion. DeepSeek-R1 (2501.12948), section 2.3.2.
    """
    def score(completions: Sequence[Completion], **_) -> list[float]:
        return [_share(_reasoning(text_of(completion), options.think), options.language) for completion in completions]
    return score


def cosine(options: CosineOptions, verdict: Verdict) -> Verdict:
    """A reward function: correctness scaled by length, in tokens; None where `verdict` could not decide.

    CosFn(L, L_max, r_L, r_0) = r_L + (r_0 - r_L)/2 · (1 + cos(pi L/L_max)), L clamped to L_max; `exceed` from L_max on.
    Right means a verdict of at least 1. Yeo et al. 2025 (2502.03373), appendix C.1.
    """
    limit = options.max_length
    assert limit is not None

    def score(completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]], **columns
              ) -> list[float | None]:
        verdicts = verdict(completions=completions, completion_ids=completion_ids, **columns)
        return [None if right is None else _cosine(len(ids), limit, right >= 1, options)
                for right, ids in zip(verdicts, completion_ids, strict=True)]
    return score


def repetition(options: RepetitionOptions) -> Verdict:
    """A reward function: max_penalty · (1 - distinct n-grams/all n-grams), over token ids; 0.0 below n tokens.

    Yeo et al. 2025 (2502.03373), appendix C.2, in the sparse form (one value for each answer).
    """
    def score(completion_ids: Sequence[Sequence[int]], **_) -> list[float]:
        shares = [_repeated(ids, options.ngram_size) for ids in completion_ids]
        return [options.max_penalty * share if share else 0.0 for share in shares]
    return score


def soft_overlong(options: SoftOverlongOptions) -> Verdict:
    """A reward function: 0 up to L_max - L_cache tokens, then falling in a line to -1 at L_max, then -1.

    Yu et al. 2025 (DAPO, 2503.14476), equation 13. ConfigError: a cache longer than L_max.
    """
    limit = options.max_length
    assert limit is not None
    cache = math.ceil(limit / 5) if options.soft_punish_cache is None else options.soft_punish_cache
    if cache > limit:
        raise ConfigError(f"rewards: soft_overlong: soft_punish_cache {cache} is beyond max_length {limit}; lower it")

    def score(completion_ids: Sequence[Sequence[int]], **_) -> list[float]:
        return [_overlong(len(ids), limit, cache) for ids in completion_ids]
    return score


def _well_formed(text: str, options: ThinkFormatOptions) -> bool:
    opening, closing = options.think
    if not options.opened:
        if not text.startswith(opening):
            return False
        text = text[len(opening):]
    thought, closed, answer = text.partition(closing)
    if not closed or opening in text or closing in answer:
        return False
    return bool(thought.strip()) and _answered(answer.strip(), thought, options.answer)


def _answered(answer: str, thought: str, tags: tuple[str, str] | None) -> bool:
    if tags is None:
        return bool(answer)
    opening, closing = tags
    if any(tag in thought or answer.count(tag) != 1 for tag in tags):
        return False
    inside = answer.removeprefix(opening).removesuffix(closing)
    return answer.startswith(opening) and answer.endswith(closing) and bool(inside.strip())


def _reasoning(text: str, think: tuple[str, str]) -> str:
    opening, closing = think
    before, closed, _ = text.partition(closing)
    inside = before if closed else text
    return inside.partition(opening)[2] if opening in inside else inside


def _share(text: str, wanted: str) -> float:
    # Only Latin words can be LaTeX or code: other scripts count wherever they stand.
    latin = len(_LATIN.findall(_NO_WORDS.sub(" ", text)))
    han = len(_HAN.findall(text))
    other = len(_LETTERS.findall(_HAN.sub(" ", text)))
    total = latin + han + other
    return (latin if wanted == "en" else han) / total if total else 1.0


def _cosine(length: int, limit: int, right: bool, options: CosineOptions) -> float:
    if length >= limit and options.exceed is not None:
        return options.exceed
    at_zero, at_limit = options.correct if right else options.wrong
    return at_limit + 0.5 * (at_zero - at_limit) * (1 + math.cos(math.pi * min(length / limit, 1.0)))


def _repeated(ids: Sequence[int], n: int) -> float:
    """The share of n-grams that have occurred before; 0.0 where there are none."""
    grams = [tuple(ids[i:i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _overlong(length: int, limit: int, cache: int) -> float:
    if length <= limit - cache:
        return 0.0
    return max((limit - cache - length) / cache, -1.0) if cache else -1.0
