"""Tasks of the package reasoning-gym whose answers can be compared exactly.

In: "reasoning_gym/gcd", options, a split and a seed. Out: problems with an answer. The package's scorers are never
called: several pay for any text, or evaluate it. Only tasks are allowed whose questions have one right answer, written
in one way, so that an exact comparison is the whole grader; tests/data/test_gym.py is the audit.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from tinyr2.core.config import nearest
from tinyr2.core.errors import ConfigError
from tinyr2.core.rng import derive
from tinyr2.core.types import Message, Problem
from tinyr2.data.tasks import Split, split_of

GYM = "reasoning_gym/"
ALLOWED = (
    "base_conversion",
    "binary_alternation",  # any two letters may be swapped, so half of the misplaced ones is the least number of swaps
    "bitwise_arithmetic",  # the question asks for signed hexadecimals
    "chain_sum",
    "count_bits",
    "count_primes",
    "course_schedule",  # True or False: a constant is right half of the time, as everywhere where two answers exist
    "gcd",
    "largest_island",
    "lcm",
    "leg_counting",
    "letter_counting",  # capitals count as their small letters
    "maze",  # the length of the shortest path, not the path
    "number_sorting",  # the question prescribes how the list is written
    "path_star",  # one arm ends at the goal
    "products",
    "rotten_oranges",
    "simple_equations",  # linear in one variable, whose coefficient is never 0
    "spell_backward",
    "spiral_matrix",
    "word_sequence_reversal",
)
# Left out after a look, beside those with many right answers:
#   basic_arithmetic: divides with the remainder dropped, and without brackets from left to right
#   caesar_cipher: some 300 sentences in 25 rotations each, so held-out answers are trained on
#   fraction_simplification: the fraction in the question equals the answer
#   isomorphic_strings, ransom_note: drawn from a set of letters, whose order changes with each process
#   needle_haystack: now and then two names fit
#   prime_factorization: does not ask for an order
#   string_manipulation: a rule for long strings is wrong on short ones
#   time_intervals: depends on today's date
_PATIENCE = 2_000  # items in a row that give no new problem; then the task counts as exhausted
# What a generator raises where its options cannot work.
_REFUSALS = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)


def check_gym(task: str, options: Mapping[str, Any]) -> None:
    """ConfigError where the task is not allowed, the package is missing, or the options are not the task's."""
    name = task.removeprefix(GYM)
    if name not in ALLOWED:
        hint = nearest(name, ALLOWED)
        cure = f"did you mean {GYM}{hint}? " if hint else ""
        raise ConfigError(f"{task}: not among the tasks that an exact comparison grades rightly; {cure}there are "
                          f"{', '.join(ALLOWED)}")
    _dataset(name, options, seed=0)


def gym_problems(task: str, options: Mapping[str, Any], split: Split, n: int, seed: int) -> list[Problem]:
    """n different problems of one split, the question as a user turn; `check_gym` has found no fault.

    Item i of the package is drawn from seed + i, so its neighboring seeds share nearly all items. Here each (seed,
    task, split) starts at a place of its own among 2^63. ConfigError where the task has fewer. The first problems do
    not depend on n.
    """
    name = task.removeprefix(GYM)
    dataset = _dataset(name, options, derive(seed, task, split))
    problems: dict[str, Problem] = {}
    drawn = misses = 0
    while len(problems) < n:
        question, answer = _item(dataset, drawn, task)
        drawn += 1
        canonical = " ".join(f"{task} {question} {answer}".split())
        if canonical not in problems and split_of(canonical) == split:
            problems[canonical] = Problem(id=f"{split}:{len(problems)}", task=task, answer=answer,
                                          messages=(Message("user", question),))
            misses = 0
        elif (misses := misses + 1) > _PATIENCE:
            raise ConfigError(f"{n} different {split} problems of {task}: only {len(problems)} turned up; ask for "
                              f"fewer, or make the task harder through its options")
    return list(problems.values())


def _dataset(name: str, options: Mapping[str, Any], seed: int) -> Any:
    try:
        import reasoning_gym  # half a second, which a run on other tasks does without
    except ImportError as error:
        raise ConfigError(f"{GYM}{name}: the package reasoning-gym is not installed; pip install tinyr2[tasks]"
                          ) from error
    make, level = reasoning_gym.factory.DATASETS[name]
    known = sorted({f.name for f in fields(level)} - {"seed", "size"})
    for key in options:
        if key not in known:
            hint = nearest(key, known)
            cure = f"did you mean {hint!r}? " if hint else ""
            raise ConfigError(f"options of {GYM}{name}: {key}: unknown key; {cure}known here: {', '.join(known)}")
    try:
        return make(level(**options, seed=seed))
    except _REFUSALS as error:
        raise ConfigError(f"options of {GYM}{name}: {error}; give others, or none") from error


def _item(dataset: Any, i: int, task: str) -> tuple[str, str]:
    try:
        item = dataset[i]
    except _REFUSALS as error:
        raise ConfigError(f"{task}: no problem can be made with these options: {error}; give others, or none"
                          ) from error
    return item["question"].strip(), item["answer"].strip()
