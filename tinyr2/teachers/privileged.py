"""What a teacher's prompt holds beyond the student's: an answer, a hint, a success, feedback, passages.

In: a graded rollout, the rollouts of its group, a config, a function that finds passages. Out: the messages that the
teacher reads before the rollout's answer, or None where there is nothing to show. The student's prompt is rendered from
`Problem.messages` alone (`tokens/chat.py`), which nothing here changes.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from tinyr2.core.config import Config, nearest
from tinyr2.core.errors import DataError
from tinyr2.core.types import Message, Problem, Rollout

Kind = Literal["answer", "hint", "solution", "success", "feedback", "passages"]
Retrieve = Callable[[str, int], Sequence[str]]  # a query and how many -> the texts of passages, best first

KINDS: tuple[Kind, ...] = get_args(Kind)
LABELS: dict[Kind, str] = {
    "answer": "The answer is: ",
    "hint": "A hint: ",
    "solution": "A worked solution:\n",
    "success": "An attempt that was right:\n",
    "feedback": "How an attempt was graded: ",
    "passages": "What may help:\n",
}
CURES: dict[Kind, str] = {
    "answer": "name the column with data.columns={answer: …}",
    "hint": "name the column with hint_column",
    "solution": "name the column with data.columns={completion: …}",
    "feedback": "name the column with feedback_column, or leave it out to show the rewards",
}


class PrivilegeConfig(Config):
    """What the teacher sees and the student does not.

    {shows: [solution]} is OPSD's teacher; {shows: [answer], template: "{prompt}\\n\\n{knowledge}"} is SDFT's
    (2601.19897); {shows: [success, feedback]} is SDPO's (2601.20802).
    """

    shows: tuple[Kind, ...] = Field(min_length=1)  # in this order; what a rollout lacks is left out
    template: str = "{prompt}\n\n{knowledge}"  # how the last user turn reads to the teacher
    labels: dict[Kind, str] = LABELS  # the text before each kind; those left out keep their default
    separator: str = "\n\n"  # between kinds, and between passages
    hint_column: str = "hint"
    feedback_column: str | None = None  # None: the rollout's own rewards, e.g. "accuracy: 0, format: 1"
    own_success: bool = False  # a right answer may be shown to the teacher that judges it
    success_reward: float = 1.0  # an answer with this reward was right, where no verdict says whether it was
    passages: int = Field(3, ge=1)
    corpus: str | None = None  # a .txt file of paragraphs, or .jsonl or .parquet with a column `text`
    embedder: str | None = None  # a model's folder: passages are found by its hidden states, too
    dense_weight: float = Field(0.5, ge=0.0, le=1.0)  # with an embedder: how much these count, beside words
    without: Literal["skip", "plain"] = "skip"  # nothing to show: the teacher says nothing, or judges as it is

    @field_validator("shows")
    @classmethod
    def _each_once(cls, shows: tuple[Kind, ...]) -> tuple[Kind, ...]:
        twice = [kind for kind, n in Counter(shows).items() if n > 1]
        if twice:
            raise ValueError(f"{', '.join(twice)} stands twice; name each kind once")
        return shows

    @field_validator("template")
    @classmethod
    def _both_places(cls, template: str) -> str:
        for place in ("{prompt}", "{knowledge}"):
            if place not in template:
                raise ValueError(f"the template lacks {place}; it needs {{prompt}}, where the user's turn stands, and "
                                 "{knowledge}")
        return template

    @field_validator("labels", mode="before")
    @classmethod
    def _all_labels(cls, labels: Any) -> Any:
        if not isinstance(labels, Mapping):
            return labels
        for kind in labels:
            if kind not in KINDS:
                hint = nearest(str(kind), KINDS)
                cure = f"did you mean {hint!r}? " if hint else ""
                raise ValueError(f"{kind!r} is nothing that a teacher is shown; {cure}known: {', '.join(KINDS)}")
        return LABELS | dict(labels)

    @model_validator(mode="after")
    def _corpus_for_passages(self) -> "PrivilegeConfig":
        if ("passages" in self.shows) != (self.corpus is not None):
            raise ValueError("shows: passages and a corpus belong together; give corpus: my.txt, or leave both out")
        if self.embedder is not None and self.corpus is None:
            raise ValueError("embedder finds passages; show passages of a corpus, or leave embedder out")
        if self.embedder is None and self.dense_weight != 0.5:
            raise ValueError("dense_weight weighs an embedder's hidden states; give an embedder, or leave it out")
        return self


def known(rollout: Rollout, group: Sequence[Rollout], config: PrivilegeConfig,
          retrieve: Retrieve | None) -> dict[Kind, str]:
    """What there is to show to the teacher of `rollout`, without labels, in the order of `config.shows`.

    group: the rollouts of the same group, `rollout` among them or not    retrieve: None where no passages are shown
    DataError where a column that should be text is something else.
    """
    found = {kind: _text_of(kind, rollout, group, config, retrieve) for kind in config.shows}
    return {kind: text for kind, text in found.items() if text is not None}


def knowledge(rollout: Rollout, group: Sequence[Rollout], config: PrivilegeConfig,
              retrieve: Retrieve | None) -> str | None:
    """`known` as the teacher reads it, each kind after its label; None where there is nothing."""
    found = known(rollout, group, config, retrieve)
    return config.separator.join(config.labels[kind] + text for kind, text in found.items()) or None


def privileged_messages(rollout: Rollout, group: Sequence[Rollout], config: PrivilegeConfig,
                        retrieve: Retrieve | None) -> tuple[Message, ...] | None:
    """The turns that the teacher reads: the problem's, the last one with the knowledge in it.

    None: there is nothing to show, and `config.without` is skip.
    """
    messages, told = rollout.problem.messages, knowledge(rollout, group, config, retrieve)
    if told is None:
        return None if config.without == "skip" else messages
    last = messages[-1]
    assert last.role == "user", f"problem {rollout.problem.id} ends with the {last.role}'s turn"
    places = {"{prompt}": last.content, "{knowledge}": told}
    # in one pass: a prompt or a passage that speaks of {knowledge} stays as it is
    content = re.sub(r"\{prompt\}|\{knowledge\}", lambda m: places[m[0]], config.template)
    return (*messages[:-1], replace(last, content=content))


def privilege_metrics(found: Sequence[Mapping[Kind, str]], config: PrivilegeConfig) -> dict[str, float]:
    """The share of rollouts that had each kind, and of those that had none; `found` is `known` of each."""
    if not found:
        return {}
    shares = {f"privilege/{kind}": sum(kind in had for had in found) / len(found) for kind in config.shows}
    return shares | {"privilege/none": sum(not had for had in found) / len(found)}


def lacking(problems: Sequence[Problem], config: PrivilegeConfig) -> dict[Kind, int]:
    """How many problems lack each shown kind that the data must bring; kinds that none lacks are left out."""
    brought = [kind for kind in config.shows
               if kind in ("answer", "hint", "solution") or (kind == "feedback" and config.feedback_column)]
    counts = {kind: sum(_of_problem(kind, p, config) is None for p in problems) for kind in brought}
    return {kind: n for kind, n in counts.items() if n}


def privilege_faults(problems: Sequence[Problem], config: PrivilegeConfig) -> list[str]:
    """What is shown in the config and brought by no problem, with the cure; empty where each kind is there somewhere.

    A kind that some problems lack is no fault: `known` leaves it out, and `privilege_metrics` counts it.
    """
    return [f"shows: {kind}: none of the {n} problems has one; {CURES[kind]}, or leave {kind} out of shows"
            for kind, n in lacking(problems, config).items() if n == len(problems)]


def _text_of(kind: Kind, rollout: Rollout, group: Sequence[Rollout], config: PrivilegeConfig,
             retrieve: Retrieve | None) -> str | None:
    if kind == "success":
        return _success(rollout, group, config)
    if kind == "feedback" and config.feedback_column is None:
        return _graded(rollout)
    if kind == "passages":
        assert retrieve is not None, "passages are shown, and nobody finds them"
        found = retrieve(rollout.problem.messages[-1].content, config.passages)
        return config.separator.join(found) or None
    return _of_problem(kind, rollout.problem, config)


def _of_problem(kind: Kind, problem: Problem, config: PrivilegeConfig) -> str | None:
    if kind == "answer":
        return problem.answer
    if kind == "solution":
        return problem.completion[-1].content if problem.completion else None
    column = config.hint_column if kind == "hint" else config.feedback_column
    value = problem.columns.get(column)
    if value is not None and not isinstance(value, str | int | float):
        raise DataError(f"problem {problem.id}, column {column!r}: {kind} is text or a number, got {value!r:.60}; name "
                        f"another column with {kind}_column")
    return str(value).strip() or None if value is not None else None


def _success(rollout: Rollout, group: Sequence[Rollout], config: PrivilegeConfig) -> str | None:
    """The text of the next right answer after the rollout's own, in the group's order, around its end.

    So the group's teachers are shown different ones, and always the same. Unless the config allows it, neither the
    rollout itself is one, nor another that reads the same: a teacher that sees the very text has nothing to judge.
    """
    assert all(r.problem.id == rollout.problem.id for r in group), "a group answers one problem"
    place = (rollout.author, rollout.sample)
    order = sorted(group, key=lambda r: (r.author, r.sample))
    later = [r for r in order if (r.author, r.sample) > place] + [r for r in order if (r.author, r.sample) < place]
    if config.own_success:
        later.append(rollout)
    for r in later:
        text = r.text.strip() if r.text is not None and _succeeded(r, config) else ""
        if text and (config.own_success or rollout.text is None or text != rollout.text.strip()):
            return text
    return None


def _succeeded(rollout: Rollout, config: PrivilegeConfig) -> bool:
    if rollout.right is not None:
        return rollout.right
    return rollout.error is None and rollout.reward is not None and rollout.reward >= config.success_reward


def _graded(rollout: Rollout) -> str | None:
    parts = rollout.reward_parts.items()
    return ", ".join(f"{name}: {'no verdict' if v is None else f'{v:g}'}" for name, v in parts) or None
