"""The data's part of the check that every training verb runs first.

In: problems and what the run will do with them, a tokenizer, the shortest context. Out: findings. Of many problems only
a sample is rendered, with the longest ones in it, and the findings say how many were looked at.
"""

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from tinyr2.core.errors import DataError
from tinyr2.core.rng import permutation
from tinyr2.core.types import Message, Problem
from tinyr2.recipes.findings import Finding, Part, fault_of
from tinyr2.tokens.chat import render_example, render_prompt

SAMPLE, LONGEST = 2000, 100  # problems rendered: all up to SAMPLE, else as many drawn and the longest
COMPARED = 8  # prompts rendered by both tokenizers
_SHOWN = 3  # problem ids in a message


@dataclass(frozen=True)
class Window:
    """The most tokens that a model reads."""

    key: str  # of the model: student, model, teacher, reference or critic
    tokens: int

    def __str__(self) -> str:
        return f"the context of the {self.key} ({self.tokens:,} tokens)"


@dataclass(frozen=True)
class _Seen:
    """How many problems were looked at, of how many."""

    looked_at: int
    total: int

    def of(self, noun: str) -> str:
        sampled = f" looked at ({self.total:,} in all)" if self.looked_at < self.total else ""
        return f"{self.looked_at:,} {noun}{sampled}"


@dataclass(frozen=True)
class _Row:
    """A problem as tokens; `response` is its completion, where that is read."""

    problem: Problem
    prompt: tuple[int, ...]
    response: tuple[int, ...] | None

    @property
    def size(self) -> int:
        return len(self.prompt) + len(self.response or ())


def check_part(part: Part, tokenizer: PreTrainedTokenizerBase | None, window: Window | None) -> list[Finding]:
    """Everything about the problems of `part`; without a usable tokenizer, what needs no tokens."""
    if not part.problems:
        return []
    found = [*_check_columns(part), *_checkids_of(part)]
    if tokenizer is None:
        return found
    chosen = looked_at(part)
    rows, rejected = _rendered(part, chosen, tokenizer)
    seen = _Seen(len(chosen), len(part.problems))
    if rejected:
        problem, error = rejected[0]
        fault = fault_of(f"{part.key}.template", error)
        found.append(replace(fault, what=f"{len(rejected):,} of {seen.of('problems')} cannot be written as a chat, the "
                                         f"first is {problem.id}: {fault.what}"))
    found += _check_empty(part, rows, seen)
    found += _check_unknown(part, rows, seen, tokenizer)
    if window is not None:
        found += [*_check_lengths(part, rows, seen, window), *_check_room(part, rows, seen, window)]
    if rows and all(f.level == "ok" for f in found):
        lengths = [len(r.prompt) for r in rows]
        context = f", the context of the {window.key} {window.tokens:,}" if window else ""
        found.append(Finding("ok", part.key, f"{seen.of('problems')}; prompts of {min(lengths):,} to "
                             f"{max(lengths):,} tokens{context}"))
    return found


def looked_at(part: Part) -> list[Problem]:
    """All problems, or of many a derived sample and the longest by characters, in their order."""
    problems = part.problems
    if len(problems) <= SAMPLE:
        return list(problems)
    longest = heapq.nlargest(LONGEST, range(len(problems)), key=lambda i: _characters(part, problems[i]))
    drawn = permutation(len(problems), 0, "check", part.key)[:SAMPLE].tolist()
    return [problems[i] for i in sorted({*longest, *drawn})]


def check_prompts_alike(part: Part, student: PreTrainedTokenizerBase,
                        teacher: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Whether the teacher knows prompts in the form that the student's template and tokenizer give them."""
    for problem in part.problems[:COMPARED]:
        try:
            same = render_prompt(student, problem.messages) == render_prompt(teacher, problem.messages)
        except DataError:  # the student's fault is found elsewhere; a teacher's template is not used
            return
        if not same:
            yield Finding("warn", "teacher.prompts", f"the teacher reads prompts as the student's tokenizer and chat "
                          f"template write them, not as its own would (first: {problem.id})",
                          "set teacher.prompt=own (`tinyr2 distill`), or give both folders one chat_template.jinja, "
                          "unless the teacher was trained on the student's")
            return


def unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that characters become which the tokenizer does not know; None where it knows all."""
    unknown = tokenizer.unk_token_id
    # GPT-2 names its end of text here, and knows every byte
    return None if unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) else unknown


def held_out_overlap(parts: Sequence[Part]) -> Iterator[Finding]:
    """Whether problems to measure by are problems to learn from."""
    trained = {_question(p) for p in parts[0].problems}
    for part in parts[1:]:
        same = [p for p in part.problems if _question(p) in trained]
        if same:
            yield Finding("warn", f"{part.key}.overlap", f"{len(same):,} of {len(part.problems):,} held-out prompts "
                          f"are also in {parts[0].key} ({ids_of(same)}), so the evaluation flatters",
                          f"take them out of {part.path} or {parts[0].path}")


def _check_columns(part: Part) -> Iterator[Finding]:
    """What the rows must have beside a prompt."""
    unsolved = [p for p in part.problems if not p.completion]
    if part.completions == "needed" and unsolved:
        yield Finding("fault", f"{part.key}.completions", f"{len(unsolved):,} of {len(part.problems):,} problems have "
                      f"no completion to learn from ({ids_of(unsolved)})",
                      f"fill in the column `completion` of {part.path}, drop these rows, or name the column with "
                      f"{part.key}.columns={{completion: its_name}}")
    if part.wanted is not None and part.wanted > len(part.problems):
        yield Finding("fault", f"{part.key}.size", f"eval.num_problems asks for {part.wanted:,} problems, {part.path} "
                      f"has {len(part.problems):,}",
                      f"set eval.num_problems to {len(part.problems)} or less, or to null")


def _checkids_of(part: Part) -> Iterator[Finding]:
    twice = [problem_id for problem_id, n in Counter(p.id for p in part.problems).items() if n > 1]
    if twice:
        yield Finding("warn", f"{part.key}.ids", f"problem ids that stand more than once: {len(twice):,} (first: "
                      f"{', '.join(twice[:_SHOWN])}); rollouts of such problems cannot be told apart",
                      f"give every row of {part.path} an id of its own")


def _rendered(part: Part, problems: Sequence[Problem],
              tokenizer: PreTrainedTokenizerBase) -> tuple[list[_Row], list[tuple[Problem, DataError]]]:
    rows, rejected = [], []
    for problem in problems:
        try:
            if problem.completion and part.completions != "ignored":
                rows.append(_Row(problem, *render_example(tokenizer, problem.messages, problem.completion)))
            else:
                rows.append(_Row(problem, render_prompt(tokenizer, problem.messages), None))
        except DataError as error:
            rejected.append((problem, error))
    return rows, rejected


def _check_empty(part: Part, rows: Sequence[_Row], seen: _Seen) -> Iterator[Finding]:
    """Completions of which nothing is left to learn but their end."""
    empty = [r.problem for r in rows if r.response is not None and len(r.response) <= 1]
    if empty:
        yield Finding("fault", f"{part.key}.completions", f"the loss mask is empty: {len(empty):,} of "
                      f"{seen.of('completions')} render to no tokens but their end ({ids_of(empty)})",
                      f"drop these rows of {part.path}, fill in their completions, or mend chat_template.jinja where "
                      "it leaves them out")


def _check_unknown(part: Part, rows: Sequence[_Row], seen: _Seen,
                   tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    unknown = unknown_id(tokenizer)
    if unknown is None:
        return
    lost = [r.problem for r in rows if unknown in r.prompt or unknown in (r.response or ())]
    if lost:
        yield Finding("warn", f"{part.key}.unknown", f"{len(lost):,} of {seen.of('problems')} have characters that "
                      f"the tokenizer does not know; they become {tokenizer.unk_token} ({ids_of(lost)})",
                      f"train the tokenizer on texts like those of {part.path}, or with the alphabet `bytes`")


def _check_lengths(part: Part, rows: Sequence[_Row], seen: _Seen, window: Window) -> Iterator[Finding]:
    """Prompts that leave no room, and examples that do not fit although their prompts do."""
    full = [r for r in rows if len(r.prompt) >= window.tokens]
    over = [r for r in rows if r.size > window.tokens > len(r.prompt)]
    for name, long, what in (
            ("prompts", full, f"{seen.of('prompts')} leave no room for an answer in"),
            ("examples", over, f"{seen.of('examples')}, prompt and completion, do not fit")):
        if not long:
            continue
        size, longest = max((len(r.prompt) if long is full else r.size, r.problem.id) for r in long)
        yield Finding("fault", f"{part.key}.{name}", f"{len(long):,} of {what} {window}; the longest, {longest}, has "
                      f"{size:,} ({ids_of([r.problem for r in long])})",
                      f"drop or shorten these rows of {part.path}, or take a {window.key} with a longer context")


def _check_room(part: Part, rows: Sequence[_Row], seen: _Seen, window: Window) -> Iterator[Finding]:
    """Prompts whose answers the context may cut before the config does."""
    if part.answer_limit is None:
        return
    key, limit = part.answer_limit
    tight = [r for r in rows if len(r.prompt) < window.tokens < len(r.prompt) + limit]
    if tight:
        longest = max(len(r.prompt) for r in tight)
        writes = window.key in ("student", "model")
        consequence = "answers will be cut at" if writes else f"the {window.key} would read past"
        yield Finding("warn", f"{part.key}.room", f"{consequence} {window} for {len(tight):,} of {seen.of('prompts')} "
                      f"({ids_of([r.problem for r in tight])}): the longest has {longest:,} and {key} is {limit:,}",
                      f"set {key} to {window.tokens - longest} or less, or take a {window.key} with a longer context")


def _question(problem: Problem) -> tuple[Message, ...]:
    """What makes two prompts one: all turns but the system's, white space aside."""
    return tuple(Message(m.role, " ".join(m.content.split())) for m in problem.messages if m.role != "system")


def _characters(part: Part, problem: Problem) -> int:
    turns = problem.messages if part.completions == "ignored" else (*problem.messages, *(problem.completion or ()))
    return sum(len(m.content) for m in turns)


def ids_of(problems: Sequence[Problem]) -> str:
    """The first few ids, and how many more there are."""
    more = f" and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
    return ", ".join(p.id for p in problems[:_SHOWN]) + more
