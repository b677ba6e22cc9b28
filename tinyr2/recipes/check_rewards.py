"""The rewards' part of the check that every training verb runs first: whether they can judge answers to these problems.

In: a `Setup`. Out: findings: tasks that are nobody's, problems that no reward judges, columns that a reward compares
with and that are lacking, and how a reward model reads what the student reads otherwise.
"""

import inspect
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from tinyr2.core.config import nearest
from tinyr2.core.errors import DataError
from tinyr2.core.types import Message, Problem
from tinyr2.recipes.check_data import ids_of, looked_at, unknown_id
from tinyr2.recipes.findings import Finding, Part, Setup, fault_of
from tinyr2.rewards.grade import PASSED, RewardConfig, RewardFunction
from tinyr2.rewards.learned import RewardModel, compare_readers
from tinyr2.rewards.named import needs
from tinyr2.tokens.chat import render_example

_COMPARED = 8  # prompts written by both tokenizers
_REPLY = (Message("assistant", "1"),)


def check_rewards(setup: Setup) -> list[Finding]:
    """Everything about the rewards of `setup` that can be known before an answer is written."""
    found = list(check_tasks(setup.parts))
    for part in setup.parts:
        found += [*([] if found else check_judged(part)), *check_needs(part)]
    for reward in setup.rewards:
        found += check_columns(reward, setup.parts[0])
        if isinstance(reward.call, RewardModel):
            found += check_reader(reward, reward.call.tokenizer, setup.student.tokenizer, setup.parts[0])
    return found


def check_tasks(parts: Sequence[Part]) -> Iterator[Finding]:
    """Whether the tasks that rewards are for are those of some problem."""
    if not all(part.problems for part in parts):  # some could not be read, and may have had them
        return
    known = sorted({p.task for part in parts for p in part.problems})
    named = {task: reward for part in parts for reward in part.rewards for task in reward.tasks or ()}
    for task, reward in named.items():
        if task not in known:
            hint = nearest(task, known)
            yield Finding("fault", "rewards.tasks", f"{_name(reward)}: no problem is of the task {task!r}",
                          f"{f'did you mean {hint!r}? ' if hint else ''}the data has {', '.join(known)}")


def check_judged(part: Part) -> Iterator[Finding]:
    """Whether each problem has a reward for its task."""
    orphans = [p for p in part.problems if part.rewards and not any(_is_for(r, p) for r in part.rewards)]
    if orphans:
        tasks = ", ".join(sorted({p.task for p in orphans}))
        every = len(orphans) == len(part.problems)
        yield Finding("fault" if every else "warn", f"{part.key}.rewards", f"{len(orphans):,} of "
                      f"{len(part.problems):,} problems are of a task that no reward is for, {tasks} "
                      f"({ids_of(orphans)})", f"name the task in `tasks` of a reward of {part.key}, or set that "
                      f"reward's tasks to null, or take these rows out of {part.path}")


def check_needs(part: Part) -> Iterator[Finding]:
    """Whether the problems have what the named rewards compare answers with."""
    wanted: dict[str, list[RewardConfig]] = {}
    for reward in part.rewards:
        for need in needs(reward.name, reward.options) if reward.name is not None else ():
            wanted.setdefault(need, []).append(reward)
    for need, rewards in wanted.items():
        judged = [p for p in part.problems if any(_is_for(r, p) for r in rewards)]
        lacking = [p for p in judged if lacks(p, need)]
        if lacking:
            yield _lacking(part, need, ", ".join(map(_name, rewards)), lacking, len(judged))


def check_columns(reward: RewardFunction, part: Part) -> Iterator[Finding]:
    """Whether the data has what a user's function asks for by name, without a default of its own."""
    asked = [p.name for p in inspect.signature(reward.call).parameters.values()
             if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.default is p.empty]
    judged = [p for p in part.problems if reward.tasks is None or p.task in reward.tasks]
    known = dict.fromkeys(name for p in judged for name in p.columns)
    for name in asked:
        if judged and name not in known and name not in PASSED:
            hint = nearest(name, known)
            yield Finding("fault", f"rewards.{reward.name}", f"the function asks for the column {name!r}, which no row "
                          f"of {part.path} has", f"{f'did you mean {hint!r}? ' if hint else ''}give the parameter a "
                          f"default, or the data the column; it has {', '.join(known) or 'no columns of its own'}")


def lacks(problem: Problem, need: str) -> bool:
    """Whether the problem has not what a named reward compares with (`needs`)."""
    if need == "numbers":
        given = problem.columns.get(need)
        return not isinstance(given, list | tuple) or not all(type(n) is int for n in given)
    return problem.answer is None and (need == "answer" or problem.columns.get(need) is None)


def check_reader(reward: RewardFunction, reader: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase | None,
                 part: Part) -> Iterator[Finding]:
    """Whether a reward model can read the problems, and how it reads otherwise than the student, which is no fault."""
    where = f"rewards.{reward.name}"
    chosen = [p for p in looked_at(part) if reward.tasks is None or p.task in reward.tasks]
    if not chosen:
        return
    unknown, lost, rejected = unknown_id(reader), [], []
    for problem in chosen:
        try:
            # the data's own solutions are not what it will read: only the prompts are known before a run
            prompt, _ = render_example(reader, problem.messages, _REPLY)
        except DataError as error:
            rejected.append((problem, error))
            continue
        if unknown is not None and unknown in prompt:
            lost.append(problem)
    if rejected:
        fault = fault_of(f"{where}.template", rejected[0][1])
        yield Finding("fault" if len(rejected) == len(chosen) else "warn", fault.name, f"its own chat template cannot "
                      f"write {len(rejected):,} of {len(chosen):,} problems, whose answers it gives no reward; the "
                      f"first is {rejected[0][0].id}: {fault.what}", fault.cure)
    if lost:
        yield Finding("warn", f"{where}.unknown", f"{len(lost):,} of {len(chosen):,} prompts have characters that its "
                      f"own tokenizer does not know; it reads them as {reader.unk_token} ({ids_of(lost)})",
                      "train the reward model with a tokenizer that knows them, e.g. one with the alphabet `bytes`")
    if student is not None and len(rejected) < len(chosen):
        told = compare_readers(student, reader, [p.messages for p in chosen[:_COMPARED]])
        differences = f"differ from the student's: {', '.join(told)}" if told else "are the student's too"
        yield Finding("ok", where, f"reads text through its own tokenizer and chat template, which {differences}")


def _lacking(part: Part, need: str, rewards: str, lacking: Sequence[Problem], total: int) -> Finding:
    level = "fault" if len(lacking) == total else "warn"
    if need == "answer":
        return Finding(level, f"{part.key}.answers", f"{len(lacking):,} of {total:,} problems have no answer to grade "
                       f"by, which {rewards} needs ({ids_of(lacking)})", f"fill in the column `answer` of {part.path}, "
                       f"or name the column with {part.key}.columns={{answer: its_name}}")
    meaning = "a list of integers" if need == "numbers" else "or an answer in its place"
    return Finding(level, f"{part.key}.{need}", f"{len(lacking):,} of {total:,} problems have no column `{need}` "
                   f"({meaning}), which {rewards} needs ({ids_of(lacking)})", f"fill in the column `{need}` of "
                   f"{part.path}, take problems of the task countdown, or take another reward")


def _is_for(reward: RewardConfig, problem: Problem) -> bool:
    return reward.tasks is None or problem.task in reward.tasks


def _name(reward: RewardConfig) -> str:
    return reward.name or reward.function or ""
