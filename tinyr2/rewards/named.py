"""The rewards that a config can name: the options of each, and the function that they make.

In: a name and its options. Out: a reward function with TRL's signature, or a ConfigError before anything runs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from tinyr2.core.config import Config, build
from tinyr2.core.errors import ConfigError
from tinyr2.rewards import arithmetic, learned, shaping, verify
from tinyr2.rewards.answer import exact_answer

Name = Literal["exact_answer", "accuracy", "think_format", "language", "cosine", "repetition", "soft_overlong",
               "countdown", "reward_model"]

_OPTIONS: dict[str, type[Config]] = {
    "exact_answer": Config,
    "accuracy": verify.AccuracyOptions,
    "think_format": shaping.ThinkFormatOptions,
    "language": shaping.LanguageOptions,
    "cosine": shaping.CosineOptions,
    "repetition": shaping.RepetitionOptions,
    "soft_overlong": shaping.SoftOverlongOptions,
    "countdown": arithmetic.CountdownOptions,
    "reward_model": learned.RewardModelOptions,
}
_MAKERS: dict[str, Callable[[Any], Callable[..., Sequence[float | None]]]] = {
    "exact_answer": lambda options: exact_answer,
    "accuracy": verify.accuracy,
    "think_format": shaping.think_format,
    "language": shaping.language,
    "cosine": lambda options: shaping.cosine(options, make(options.verdict, options.verdict_options)),
    "repetition": shaping.repetition,
    "soft_overlong": shaping.soft_overlong,
    "countdown": arithmetic.countdown,
    "reward_model": learned.reward_model,
}
# What a reward compares with, and has no word without: `answer`, or a column; the answer will do in place of `target`.
_NEEDS: dict[str, tuple[str, ...]] = {"exact_answer": ("answer",), "accuracy": ("answer",),
                                      "countdown": ("numbers", "target")}


def read_options(name: Name, raw: Mapping[str, Any]) -> Config:
    """The options of the reward, validated; a ValueError with every fault, for the config's own validator to raise."""
    try:
        options = build(_OPTIONS[name], dict(raw), name)
    except ConfigError as error:
        faults = [line.strip() for line in str(error).splitlines()[1:]]
        raise ValueError("; ".join(f"{name}: options.{fault}" for fault in faults)) from error
    if isinstance(options, shaping.CosineOptions):
        read_options(options.verdict, options.verdict_options)
    return options


def needs(name: Name, raw: Mapping[str, Any]) -> tuple[str, ...]:
    """What of a problem the reward cannot do without: `answer`, or names of columns; cosine's are its verdict's."""
    options = read_options(name, raw)
    return _NEEDS.get(options.verdict if isinstance(options, shaping.CosineOptions) else name, ())


def make(name: Name, raw: Mapping[str, Any], max_completion_length: int | None = None
         ) -> Callable[..., Sequence[float | None]]:
    """The reward function `name` with its options.

    max_completion_length, in tokens, stands in for a `max_length` that the options leave out; ConfigError where a
    reward needs one and neither is given.
    """
    options = read_options(name, raw)
    if "max_length" in type(options).model_fields and options.max_length is None:
        if max_completion_length is None:
            raise ConfigError(f"rewards: {name} scales with the longest answer, and no length is known here; add "
                              f"options: {{max_length: …}}, in tokens")
        options = options.model_copy(update={"max_length": max_completion_length})
    return _MAKERS[name](options)
