"""Generated tasks by their names, as a config gives them: "signed_sums", "countdown", "reasoning_gym/gcd".

In: a name, options, a split, a number and a seed. Out: problems, or a ConfigError that names the nearest task or
option.
"""

from collections.abc import Mapping
from typing import Any, get_args

from tinyr2.core.config import Config, build, nearest
from tinyr2.core.errors import ConfigError
from tinyr2.core.types import Problem
from tinyr2.data.countdown import Countdown, countdown
from tinyr2.data.gym import GYM, check_gym, gym_problems
from tinyr2.data.tasks import SignedSums, Split, signed_sums

SPLITS: tuple[Split, ...] = get_args(Split)
_LEVELS: dict[str, type[Config]] = {"signed_sums": SignedSums, "countdown": Countdown}


def check_task(task: str, options: Mapping[str, Any]) -> None:
    """ConfigError where there is no such task, or it has no such options."""
    if task.startswith(GYM):
        check_gym(task, options)
    elif task in _LEVELS:
        _level(task, options)
    else:
        hint = nearest(task, [*_LEVELS, GYM])
        cure = f"did you mean {hint!r}? " if hint else ""
        raise ConfigError(f"{task!r} is no task; {cure}there are {', '.join(_LEVELS)} and {GYM}<name>")


def generate(task: str, options: Mapping[str, Any], split: Split, n: int, seed: int) -> list[Problem]:
    """n different problems of a task; `check_task` has found no fault. ConfigError where there are not so many."""
    if task.startswith(GYM):
        return gym_problems(task, options, split, n, seed)
    level = _level(task, options)
    return (signed_sums if isinstance(level, SignedSums) else countdown)(level, split, n, seed)


def _level(task: str, options: Mapping[str, Any]) -> Config:
    try:
        return build(_LEVELS[task], dict(options), f"options of {task}")
    except ConfigError as error:
        raise ConfigError(" ".join(str(error).split())) from error
