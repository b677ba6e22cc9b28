"""Grading: reward functions over rollouts, the user's own among them.

In: rollouts with text, reward functions with TRL's signature. Out: the same rollouts with `reward` and `reward_parts`,
or with `error` where a function failed. What a function does wrong is data here and never stops a run; what can be
seen before a run (no such file, no such function, a file that cannot be imported) is a ConfigError.
"""

import inspect
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from pydantic import Field, model_validator

from tinyr2.core.config import Config, nearest
from tinyr2.core.errors import ConfigError
from tinyr2.core.types import Rollout
from tinyr2.rewards.named import Name, make, read_options

PASSED = ("prompts", "completions", "completion_ids", "answer")  # what every reward function is given


class RewardConfig(Config):
    """One reward: `name` for a built-in one, or `file` and `function` for the user's own."""

    name: Name | None = None
    file: str | None = None  # a Python file
    function: str | None = None  # def function(prompts, completions, completion_ids, **columns) -> list[float | None]
    weight: float = Field(1.0, allow_inf_nan=False)
    # this reward's own discount, back over the tokens (2502.03373); None: advantage.gamma, as all the others
    gamma: float | None = Field(None, gt=0.0, le=1.0)
    tasks: tuple[str, ...] | None = Field(None, min_length=1)  # whose rollouts it grades; null: all
    options: dict[str, Any] = {}  # of the built-in reward; a user's function takes them as keyword arguments

    @model_validator(mode="after")
    def _one_source(self) -> "RewardConfig":
        if (self.name is None) != (self.file is not None and self.function is not None) or (
                self.name is not None and (self.file or self.function)):
            raise ValueError("a reward is either `name: exact_answer`, or `file: my.py` with `function: score`")
        if self.name is not None:
            read_options(self.name, self.options)
        return self


@dataclass(frozen=True, kw_only=True)
class RewardFunction:
    """A function to grade with, what its part is called, what its part weighs, and whose rollouts it grades."""

    name: str
    weight: float
    call: Callable[..., Sequence[float | None]]
    gamma: float | None = None  # a token t steps before the last gets gamma**t of the reward; None: training's own
    tasks: tuple[str, ...] | None = None  # None: all


def load_reward(config: RewardConfig, *, max_completion_length: int | None = None) -> RewardFunction:
    """The function that `config` names; the user's file is run once.

    max_completion_length, in tokens, is the `max_length` of a length reward whose options leave it out.
    ConfigError: no such file or function, a syntax error, an exception while the file is imported (with the line), a
    function that does not take what TRL passes, or options that it does not take.
    """
    call = (_user_function(config) if config.name is None
            else make(config.name, config.options, max_completion_length))
    name = config.name or config.function
    assert name is not None
    return RewardFunction(name=name, weight=config.weight, call=call, gamma=config.gamma, tasks=config.tasks)


def _user_function(config: RewardConfig) -> Callable[..., Sequence[float | None]]:
    assert config.file is not None and config.function is not None
    path = Path(config.file).expanduser()
    if not path.is_file():
        raise ConfigError(f"rewards: {path}: no such file; looked in {path.absolute().parent}")
    module = _imported(path)
    call = getattr(module, config.function, None)
    if not callable(call):
        known = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        hint = nearest(config.function, known)
        cure = f"did you mean {hint!r}? " if hint else ""
        raise ConfigError(f"rewards: {path}: no function {config.function!r}; {cure}it defines "
                          f"{', '.join(known) or 'none'}")
    _check_signature(call, f"{path}: {config.function}")
    _check_options(call, config.options, f"{path}: {config.function}")
    options = config.options
    return (lambda **columns: call(**columns, **options)) if options else call


def load_rewards(configs: Sequence[RewardConfig], *, max_completion_length: int | None = None
                 ) -> list[RewardFunction]:
    """`load_reward` for each; ConfigError where two have one name, which their parts could not share."""
    rewards = [load_reward(config, max_completion_length=max_completion_length) for config in configs]
    names = [reward.name for reward in rewards]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"rewards: two functions are called {twice!r}; rename one, the parts are logged by name")
    return rewards


R = TypeVar("R", RewardConfig, RewardFunction)


def verdict_of(rewards: Sequence[R], task: str) -> R | None:
    """The reward that says whether an answer to `task` is right: the first that grades it. None: none does."""
    return next((r for r in rewards if r.tasks is None or task in r.tasks), None)


def verdicts(rewards: Sequence[RewardConfig], tasks: Iterable[str]) -> tuple[RewardConfig, ...]:
    """What a share of right answers is measured by: each task's verdict, alone and with weight 1."""
    judged: dict[int, list[str]] = {}
    for task in dict.fromkeys(tasks):
        if (found := verdict_of(rewards, task)) is not None:
            judged.setdefault(next(i for i, r in enumerate(rewards) if r is found), []).append(task)
    return tuple(rewards[i].model_copy(update={"weight": 1.0, "tasks": tuple(of)}) for i, of in judged.items())


def grade(rollouts: Sequence[Rollout], rewards: Sequence[RewardFunction]) -> list[Rollout]:
    """The rollouts with `reward_parts` by function name, and `reward`, the weighted sum of the parts that are not None.

    Each function is called once, with all rollouts of its tasks that carry no error yet: prompts and completions as
    lists of turns (`[{"role": "assistant", "content": text}]`), completion_ids, answer, and every other column of
    these rows' data (None where one lacks it). The part of a rollout of another task is None. A part of weight 0 is
    shown and decides nothing: where all others are None, reward is None. A function that raises or returns the wrong
    number of rewards fills `error` of all that it was called with, a reward that is no finite number that of its
    rollout; then reward is None.
    """
    graded = [i for i, rollout in enumerate(rollouts) if rollout.error is None]
    result = list(rollouts)
    parts = {reward.name: _parts(reward, rollouts, graded) for reward in rewards}
    for i in graded:
        given = {name: values.get(i) for name, values in parts.items()}
        errors = [value for value in given.values() if isinstance(value, str)]
        scores = {name: None if isinstance(value, str) else value for name, value in given.items()}
        known = [reward.weight * scores[reward.name] for reward in rewards
                 if reward.weight and scores[reward.name] is not None]
        result[i] = replace(rollouts[i], reward_parts=scores, error="; ".join(errors) or None,
                            reward=math.fsum(known) if known and not errors else None)
    return result


def _parts(reward: RewardFunction, rollouts: Sequence[Rollout], graded: list[int]) -> dict[int, float | None | str]:
    """By place: what the function says to the rollouts of its tasks; it is not called where there are none."""
    own = [i for i in graded if reward.tasks is None or rollouts[i].problem.task in reward.tasks]
    return dict(zip(own, _called(reward, _columns([rollouts[i] for i in own]), len(own)), strict=True)) if own else {}


def _columns(rollouts: list[Rollout]) -> dict[str, list[Any]]:
    """The keyword arguments of a reward function."""
    assert all(r.text is not None for r in rollouts), "rollouts are decoded before they are graded"
    names = dict.fromkeys(name for r in rollouts for name in r.problem.columns)
    data = {name: [r.problem.columns.get(name) for r in rollouts] for name in names}
    return data | {
        "prompts": [[{"role": m.role, "content": m.content} for m in r.problem.messages] for r in rollouts],
        "completions": [[{"role": "assistant", "content": r.text}] for r in rollouts],
        "completion_ids": [list(r.response_ids) for r in rollouts],
        "answer": [r.problem.answer for r in rollouts],
    }


def _called(reward: RewardFunction, columns: dict[str, list[Any]], count: int) -> list[float | None | str]:
    """One value for each rollout: a reward, None, or, as text, what went wrong."""
    try:
        # Copies: what one function does to its lists must not reach the next.
        values = reward.call(**{name: list(column) for name, column in columns.items()})
    except (Exception, SystemExit) as error:  # the border: a grader's fault is data
        return [f"reward {reward.name}: {_described(error)}"] * count
    if not isinstance(values, list | tuple):
        return [f"reward {reward.name}: returned a {type(values).__name__}, not a list"] * count
    if len(values) != count:
        return [f"reward {reward.name}: returned {len(values)} rewards for {count} completions"] * count
    return [_checked(reward.name, value) for value in values]


def _checked(name: str, value: Any) -> float | None | str:
    if value is None:
        return None
    if not isinstance(value, Real):
        return f"reward {name}: returned a {type(value).__name__}, not a number"
    try:
        number = float(value)
    except OverflowError:
        return f"reward {name}: returned an integer beyond any float"
    return number if math.isfinite(number) else f"reward {name}: returned {number}"


def _described(error: BaseException) -> str:
    _, *inside = traceback.extract_tb(error.__traceback__)  # the first frame is the call in this file
    at = f" ({Path(inside[-1].filename).name}, line {inside[-1].lineno})" if inside else ""
    return f"{type(error).__name__}: {error}{at}"


def _imported(path: Path) -> ModuleType:
    """The module in `path`, run once for as long as the file stays the same."""
    source = path.read_bytes()
    name = f"tinyr2_reward_{blake2b(str(path.resolve()).encode() + source, digest_size=8).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    module = sys.modules[name] = ModuleType(name)
    module.__file__ = str(path)
    try:
        # Not importlib: it would leave a __pycache__ beside the user's file and trust it by its clock.
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
    except SyntaxError as error:
        del sys.modules[name]
        raise ConfigError(f"rewards: {error.filename}, line {error.lineno}: not valid Python: {error.msg}; mend the "
                          f"file") from error
    except (Exception, SystemExit) as error:  # the border: the user's file may raise anything
        del sys.modules[name]
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        raise ConfigError(f"rewards: {path}, line {lines[-1] if lines else 1}: importing it raised "
                          f"{type(error).__name__}: {error}; mend the file") from error
    return module


def _check_signature(call: Callable[..., Any], where: str) -> None:
    try:
        kinds = [p.kind for p in inspect.signature(call).parameters.values()]
    except (TypeError, ValueError):  # some built-in types have none
        kinds = []
    if inspect.iscoroutinefunction(call) or inspect.Parameter.VAR_KEYWORD not in kinds:
        raise ConfigError(f"rewards: {where} must be a plain function that takes any keyword; write it as "
                          f"def {where.rpartition(': ')[2]}(completions, **kwargs)")


def _check_options(call: Callable[..., Any], options: dict[str, Any], where: str) -> None:
    """Each option is a parameter that the function names: `**kwargs` would swallow a misspelt one."""
    known = [p.name for p in inspect.signature(call).parameters.values()
             if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in PASSED]
    wrong = next((name for name in options if name not in known), None)
    if wrong is not None:
        hint = nearest(wrong, known)
        cure = f"did you mean {hint!r}? " if hint else ""
        raise ConfigError(f"rewards: {where} has no parameter for options.{wrong}; {cure}it names "
                          f"{', '.join(known) or 'none'}")
