"""Rollouts as a person reads them: each with its own rewards and its own tokens' disagreement."""

from dataclasses import replace

import torch

from tests.train.tiny import rollout
from tinyr2.core.types import Message, Problem
from tinyr2.recipes.show import SHOWN, completions_of, prompt_text
from tinyr2.tokens.build import train_tokenizer
from tinyr2.train.loop import StepResult
from tinyr2.train.step import Scores

TOKENIZER = train_tokenizer(["1+2=3", "4+5=9", "67 8"], vocab_size=18, alphabet="corpus")
END = TOKENIZER.eos_token_id
SEVEN = TOKENIZER.encode("7")[0]


def scores(rollouts, row, learner, teacher) -> Scores:
    learner = torch.tensor(learner)
    return Scores(rollouts=rollouts, row=torch.tensor(row), learner_logp=learner, entropy=learner, loss=0.0,
                  actor_logp=learner, divergence=None, teacher_logp=None if teacher is None else torch.tensor(teacher))


def step(rollouts, found: Scores | None = None) -> StepResult:
    return StepResult(metrics={"loss": 0.0}, num_tokens=1, rollouts=rollouts, scores=found)


def test_a_completion_has_all_that_its_rollout_knows():
    problem = Problem(id="p1", task="t", messages=(Message("user", "3+4="),), answer="7")
    r = replace(rollout((3, 4), (SEVEN, END)), problem=problem, reward=0.5, reward_parts={"digits": 0.5, "other": None})
    (shown,) = completions_of(12, step([r]), TOKENIZER)
    assert (shown.step, shown.problem_id, shown.author) == (12, "p1", "student")
    assert (shown.prompt, shown.answer) == ("3+4=", "7")
    assert (shown.completion, shown.finish, shown.tokens) == ("7", "stop", ["7", TOKENIZER.eos_token])
    assert (shown.reward, shown.reward_parts, shown.disagreement) == (0.5, {"digits": 0.5, "other": None}, None)


def test_disagreement_is_the_learners_minus_the_teachers_and_follows_its_rollout_through_any_order():
    first, second, failed = (rollout((3,), (SEVEN, END)), rollout((4,), (SEVEN,)),
                             rollout((5,), (SEVEN, END), error="no verdict"))
    found = scores([second, first], [0, 1, 1], [-1.0, -2.0, -3.0], [-1.5, -2.0, -1.0])
    shown = completions_of(1, step([first, failed, second], found), TOKENIZER)
    assert [s.disagreement for s in shown] == [[0.0, -2.0], None, [0.5]]


def test_equal_rollouts_keep_their_own_scores():
    twins = [rollout((3,), (SEVEN,)), rollout((3,), (SEVEN,))]
    found = scores(twins[::-1], [0, 1], [-1.0, -2.0], [0.0, 0.0])
    assert [s.disagreement for s in completions_of(1, step(twins, found), TOKENIZER)] == [[-2.0], [-1.0]]


def test_without_a_teacher_or_where_tokens_are_masked_there_is_no_disagreement():
    r = rollout((3,), (SEVEN, END))
    (shown,) = completions_of(1, step([r], scores([r], [0, 0], [-1.0, -2.0], None)), TOKENIZER)
    assert shown.disagreement is None
    masked = replace(r, learn_mask=(False, True))
    (shown,) = completions_of(1, step([masked], scores([masked], [0], [-1.0], [-2.0])), TOKENIZER)
    assert shown.disagreement is None


def test_only_the_first_rollouts_are_shown():
    many = [rollout((i,), (SEVEN,)) for i in range(SHOWN + 5)]
    assert [s.problem_id for s in completions_of(1, step(many), TOKENIZER)] == [r.problem.id for r in many[:SHOWN]]


def test_a_prompt_of_several_turns_names_who_speaks():
    user = Message("user", "1+1=")
    assert prompt_text(Problem(id="a", task="t", messages=(user,))) == "1+1="
    assert prompt_text(Problem(id="a", task="t", messages=(Message("system", "Be brief."), user))) == (
        "system: Be brief.\nuser: 1+1=")
