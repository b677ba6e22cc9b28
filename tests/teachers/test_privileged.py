"""What a teacher is shown beyond the student's prompt, and that the student never is."""

from dataclasses import replace

import pytest
from pydantic import ValidationError

from tinyr2.core.config import build
from tinyr2.core.errors import ConfigError, DataError
from tinyr2.core.types import Message, Problem, Rollout
from tinyr2.teachers.privileged import (
    KINDS,
    LABELS,
    PrivilegeConfig,
    knowledge,
    known,
    lacking,
    privilege_faults,
    privilege_metrics,
    privileged_messages,
)
from tinyr2.tokens.build import train_tokenizer
from tinyr2.tokens.chat import render_prompt

CHAT = (Message("system", "Be brief."), Message("user", "Hello"), Message("assistant", "Hi."),
        Message("user", "What is 2+3?"))
PROBLEM = Problem(id="p", task="sums", messages=CHAT, completion=(Message("assistant", "2 and 3 make 5."),), answer="5",
                  columns={"hint": "Count up from 2.", "remark": 7})
ALL = {"shows": KINDS, "corpus": "book.txt"}


def rollout(sample=0, text="six", right=None, problem=PROBLEM, **more):
    return Rollout(**({"problem": problem, "group": 0, "sample": sample, "author": "student", "prompt_ids": (3, 4),
                       "response_ids": (5,), "finish": "stop", "text": text, "right": right} | more))


def retrieve(query, k):
    assert query == "What is 2+3?"
    return ["Sums are made by counting.", "Five follows four.", "Six follows five.", "No."][:k]


def shown(kind, own=None, group=(), **more):
    own = own or rollout()
    if kind == "passages":
        more["corpus"] = "book.txt"
    return knowledge(own, (own, *group), PrivilegeConfig(shows=(kind,), **more), retrieve)


@pytest.mark.parametrize(("kind", "text"), [
    ("answer", "The answer is: 5"), ("hint", "A hint: Count up from 2."),
    ("solution", "A worked solution:\n2 and 3 make 5."),
    ("passages", "What may help:\nSums are made by counting.\n\nFive follows four.\n\nSix follows five.")])
def test_each_kind_follows_its_label(kind, text):
    assert shown(kind) == text


def test_the_last_user_turn_alone_is_written_anew_with_the_kinds_in_the_configs_order():
    config = PrivilegeConfig(shows=("hint", "answer"), labels={"hint": "", "answer": "= "}, separator=" | ",
                             template="Known: {knowledge}\nAsked: {prompt}\n(as {knowledge})")
    told = privileged_messages(rollout(), [], config, None)
    assert told == (*CHAT[:3], Message("user", "Known: Count up from 2. | = 5\nAsked: What is 2+3?\n"
                                               "(as Count up from 2. | = 5)"))


def test_by_default_the_knowledge_follows_the_prompt_after_an_empty_line():
    told = privileged_messages(rollout(), [], PrivilegeConfig(shows=("answer",)), None)
    assert told[-1].content == "What is 2+3?\n\nThe answer is: 5"


def test_a_prompt_that_speaks_of_the_places_is_not_filled_in():
    problem = replace(PROBLEM, messages=(Message("user", "Write {knowledge} and \\1 {0}."),), answer="{prompt}")
    told = privileged_messages(rollout(problem=problem), [], PrivilegeConfig(shows=("answer",)), None)
    assert told[-1].content == "Write {knowledge} and \\1 {0}.\n\nThe answer is: {prompt}"


def test_feedback_is_the_rollouts_own_rewards():
    own = rollout(reward_parts={"accuracy": 0.0, "format": 1.0, "length": 0.25, "judge": None})
    other = rollout(sample=1, reward_parts={"accuracy": 1.0})
    assert shown("feedback", own, (other,)) == (
        "How an attempt was graded: accuracy: 0, format: 1, length: 0.25, judge: no verdict")
    assert shown("feedback", rollout(), (other,)) is None


def test_feedback_may_be_a_column():
    assert shown("feedback", rollout(reward_parts={"accuracy": 0.0}), feedback_column="remark") == (
        "How an attempt was graded: 7")


def test_a_success_is_the_next_right_answer_of_the_group_around_its_end():
    group = [rollout(0, "zero", False), rollout(1, " one ", True), rollout(2, "two", None), rollout(3, "three", True)]
    config = PrivilegeConfig(shows=("success",))
    seen = [known(r, group[::-1], config, None).get("success") for r in group]
    assert seen == ["one", "three", "three", "one"]


def test_a_rollout_never_sees_itself_nor_its_own_text_as_a_success():
    own = rollout(0, "five", True)
    assert shown("success", own) is None
    assert shown("success", own, (rollout(1, "five ", True),)) is None
    assert shown("success", own, (rollout(1, "five", True), rollout(2, "5", True))) == "An attempt that was right:\n5"


def test_its_own_success_is_shown_where_the_config_allows_it_and_others_come_first():
    own, other = rollout(1, "five", True), rollout(0, "5", True)
    assert shown("success", own, own_success=True) == "An attempt that was right:\nfive"
    assert shown("success", own, (other,), own_success=True) == "An attempt that was right:\n5"
    assert shown("success", replace(own, right=False), own_success=True) is None


@pytest.mark.parametrize(("more", "right"), [
    ({"reward": 1.0}, True), ({"reward": 0.9}, False), ({"reward": 1.0, "right": False}, False),
    ({"reward": 0.0, "right": True}, True), ({"reward": 1.0, "error": "no verdict"}, False), ({}, False)])
def test_without_a_verdict_the_reward_says_whether_an_answer_was_right(more, right):
    found = shown("success", rollout(0), (rollout(**({"sample": 1, "text": "5"} | more)),))
    assert found == ("An attempt that was right:\n5" if right else None)


def test_a_lower_reward_may_count_as_right():
    assert shown("success", rollout(0), (rollout(1, "5", reward=0.5),), success_reward=0.5) is not None


def test_what_is_lacking_is_left_out_and_the_rest_is_shown():
    bare = Problem(id="q", task="sums", messages=CHAT, answer="5", columns={"hint": "  "})
    found = known(rollout(problem=bare), [], PrivilegeConfig(shows=("hint", "solution", "answer", "success")), None)
    assert found == {"answer": "5"}


@pytest.mark.parametrize(("without", "messages"), [("skip", None), ("plain", CHAT)])
def test_with_nothing_to_show_the_teacher_is_silent_or_reads_the_students_prompt(without, messages):
    bare = Problem(id="q", task="sums", messages=CHAT)
    config = PrivilegeConfig(shows=("answer", "hint"), without=without)
    assert privileged_messages(rollout(problem=bare), [], config, None) == messages


def test_no_passage_found_is_nothing_to_show():
    assert knowledge(rollout(), [], PrivilegeConfig(shows=("passages",), corpus="b.txt"), lambda q, k: []) is None


def test_the_students_prompt_is_the_same_whatever_the_teacher_is_shown():
    tokenizer = train_tokenizer(["What is 2+3? Count up from 2. Be brief."] * 4, vocab_size=300)
    bare = Problem(id="p", task="sums", messages=CHAT)
    plain = render_prompt(tokenizer, bare.messages)
    own, right = rollout(), rollout(1, "It is 5!", True)
    told = privileged_messages(own, [own, right], PrivilegeConfig(**ALL), retrieve)
    assert render_prompt(tokenizer, own.problem.messages) == plain
    text = tokenizer.decode(render_prompt(tokenizer, told))
    secrets = ("5", "Count up from 2.", "2 and 3 make 5.", "It is 5!", "Sums are made by counting.")
    assert all(secret in text for secret in secrets)
    assert not any(secret in tokenizer.decode(plain) for secret in secrets)
    assert own == rollout() and own.problem == PROBLEM


def test_the_shares_of_rollouts_that_had_something_are_metrics():
    config = PrivilegeConfig(shows=("answer", "success"))
    found = [{"answer": "5", "success": "x"}, {"answer": "5"}, {}, {}]
    assert privilege_metrics(found, config) == {"privilege/answer": 0.5, "privilege/success": 0.25,
                                                "privilege/none": 0.5}
    assert privilege_metrics([], config) == {}


def test_what_some_problems_lack_is_counted_and_what_all_lack_is_a_fault_with_its_cure():
    bare = Problem(id="q", task="sums", messages=CHAT, answer="5")
    config = PrivilegeConfig(shows=("answer", "hint", "solution", "success", "feedback"))
    assert lacking([PROBLEM, bare], config) == {"hint": 1, "solution": 1}
    assert privilege_faults([PROBLEM, bare], config) == []
    assert privilege_faults([bare] * 2, config) == [
        "shows: hint: none of the 2 problems has one; name the column with hint_column, or leave hint out of shows",
        "shows: solution: none of the 2 problems has one; name the column with data.columns={completion: …}, or leave "
        "solution out of shows"]
    column = PrivilegeConfig(shows=("feedback",), feedback_column="remarks")
    (fault,) = privilege_faults([PROBLEM], column)
    assert fault.startswith("shows: feedback: none of the 1 problems has one; name the column with feedback_column")


def test_a_column_that_is_no_text_is_a_data_error_that_names_it():
    problem = replace(PROBLEM, columns={"hint": ["a", "b"]})
    with pytest.raises(DataError, match=r"problem p, column 'hint': hint is text or a number, got \['a', 'b'\]; .*"
                                        "hint_column"):
        shown("hint", rollout(problem=problem))


@pytest.mark.parametrize(("raw", "message"), [
    ({"shows": []}, "shows: at least 1 needed"),
    ({"shows": ["answer", "answer"]}, "answer stands twice"),
    ({"shows": ["answer"], "template": "{prompt}"}, "the template lacks {knowledge}"),
    ({"shows": ["answer"], "template": "{knowledge}"}, "the template lacks {prompt}"),
    ({"shows": ["answer"], "labels": {"hints": ""}}, "did you mean 'hint'?"),
    ({"shows": ["passages"]}, "give corpus: my.txt"),
    ({"shows": ["answer"], "corpus": "my.txt"}, "give corpus: my.txt")])
def test_a_config_that_cannot_work_says_why(raw, message):
    with pytest.raises(ConfigError) as error:
        build(PrivilegeConfig, raw, "distill.yaml")
    assert message in str(error.value)


def test_labels_that_are_left_out_keep_their_default_and_the_default_itself_stays():
    config = PrivilegeConfig(shows=("answer",), labels={"answer": ""})
    assert config.labels == {**LABELS, "answer": ""} and LABELS["answer"] == "The answer is: "
    with pytest.raises(ValidationError):
        PrivilegeConfig(shows=("answer",), labels="none")
