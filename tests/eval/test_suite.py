import json
from dataclasses import replace
from itertools import combinations
from statistics import fmean

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tinyr2.core.config import build
from tinyr2.core.errors import ConfigError, DataError
from tinyr2.core.types import Message, Problem, Rollout
from tinyr2.eval import suite
from tinyr2.eval.intervals import bootstrap_mean, paired_difference, wilson
from tinyr2.eval.suite import EvalConfig, evaluate, summarize
from tinyr2.rewards.answer import exact_answer
from tinyr2.rewards.grade import RewardFunction
from tinyr2.rollouts.sample import Policy, sample
from tinyr2.tokens.build import train_tokenizer
from tinyr2.tokens.chat import stop_ids


def _problem(i, answer="4"):
    return Problem(id=f"test:{i}", task="sums", messages=(Message("user", f"{i} + 2?"),), answer=answer)


def _graded(rows, length=3):
    """Rollouts of graded answers: a list per problem of (text, reward)."""
    return [Rollout(problem=_problem(i), group=i, sample=j, author="student", prompt_ids=(1,),
                    response_ids=(2,) * length, finish="stop", text=text, reward=reward)
            for i, row in enumerate(rows) for j, (text, reward) in enumerate(row)]


def _sampled(n, k=(1,)):
    return EvalConfig(num_generations=n, k=k, temperature=1.0)


@pytest.fixture(scope="module")
def policy():
    tokenizer = train_tokenizer(["0 1 2 3 4 5 6 7 8 9 + ? answer: "], vocab_size=40, alphabet="corpus")
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64)).eval()
    return Policy(model=model, tokenizer=tokenizer, stop=stop_ids(tokenizer, None), vocab=len(tokenizer), context=64)


class _Watcher:
    """A reward that keeps what it saw: right where the answer has an odd number of tokens, undecided at 5."""

    def __init__(self):
        self.prompts, self.ids, self.texts = [], [], []
        self.reward = RewardFunction(name="odd", weight=1.0, call=self)

    def __call__(self, prompts, completions, completion_ids, **columns):
        self.prompts += [p[-1]["content"] for p in prompts]
        self.ids += completion_ids
        self.texts += [c[-1]["content"] for c in completions]
        return [self.verdict(ids) for ids in completion_ids]

    @staticmethod
    def verdict(ids):
        return None if len(ids) == 5 else float(len(ids) % 2)


def test_pass_at_1_of_one_answer_each_is_the_share_with_its_wilson_interval():
    result = summarize(_graded([[("x", 1.0)]] * 15 + [[("x", 0.0)]] * 5), EvalConfig(), seconds=2.0)
    found = result.pass_at[1]
    assert (found.value, found.n, (found.low, found.high)) == (0.75, 20, wilson(15, 20))
    assert result.maj_at == {}
    assert result.correct == (True,) * 15 + (False,) * 5


def test_undecided_answers_leave_the_share_and_are_counted():
    rollouts = _graded([[("x", 1.0)], [("x", None)], [("x", 0.0)], [("x", None)]])
    result = summarize(rollouts, EvalConfig(), seconds=1.0)
    assert (result.pass_at[1].value, result.pass_at[1].n, result.undecided) == (0.5, 2, 2)
    assert result.correct == (True, None, False, None)


def test_nothing_decided_gives_no_figure_instead_of_zero():
    result = summarize(_graded([[("x", None)], [("x", None)]]), EvalConfig(), seconds=1.0)
    row = result.to_dict()
    assert result.pass_at == {1: None}
    assert (row["pass@1"], row["pass@1_low"], row["pass@1_n"], row["undecided"]) == (None, None, 0, 2)
    assert "pass@1" not in result.figures()


def test_pass_at_k_of_several_answers_is_the_mean_over_problems_with_a_bootstrap_interval():
    right, wrong = ("x", 1.0), ("x", 0.0)
    rows = [[right, wrong, wrong], [wrong] * 3, [right] * 3, [right, right, wrong]]
    result = summarize(_graded(rows), _sampled(3, k=(1, 2, 3)), seconds=1.0)
    shares = {1: [1 / 3, 0, 1, 2 / 3], 2: [2 / 3, 0, 1, 1], 3: [1, 0, 1, 1]}
    for k, values in shares.items():
        found = result.pass_at[k]
        assert found.value == pytest.approx(fmean(values))
        assert (found.low, found.high) == pytest.approx(bootstrap_mean(values, seed=0))
        assert found.n == 4


def test_a_problem_with_too_few_decided_answers_leaves_that_k_alone():
    rows = [[("x", 1.0), ("x", None)], [("x", 0.0), ("x", 0.0)]]
    result = summarize(_graded(rows), _sampled(2, k=(1, 2)), seconds=1.0)
    assert (result.pass_at[1].value, result.pass_at[1].n) == (0.5, 2)
    assert (result.pass_at[2].value, result.pass_at[2].n) == (0.0, 1)


def test_the_majority_counts_equal_numbers_as_one_answer():
    row = [("#### 1,000", 1.0), ("so the answer is 7.", 0.0), (r"\boxed{1000.0}", 1.0), ("no idea", 0.0)]
    result = summarize(_graded([row]), _sampled(4), seconds=1.0)
    assert set(result.maj_at) == {4}
    assert result.maj_at[4].value == 1.0


def test_the_majority_leaves_undecided_answers_out_of_the_vote():
    rows = [[("#### 7", None), ("#### 7", None), ("#### 4", 1.0)], [("#### 7", 0.0), ("#### 4", 1.0), ("#### 4", 1.0)]]
    result = summarize(_graded(rows), _sampled(3, k=(1, 2)), seconds=1.0)
    # the first problem has one vote; the second's pairs: {7, 4} → 1/2 twice, {4, 4} → 1
    assert (result.maj_at[2].value, result.maj_at[2].n) == (pytest.approx(2 / 3), 1)
    assert (result.maj_at[3].value, result.maj_at[3].n) == (1.0, 1)


def test_without_any_extracted_answer_there_is_no_majority():
    result = summarize(_graded([[("four", 1.0), ("five", 0.0)]]), _sampled(2), seconds=1.0)
    assert result.maj_at == {}


def test_the_threshold_decides_what_counts_as_solved():
    rollouts = _graded([[("x", 0.5)], [("x", 1.0)], [("x", 1.2)], [("x", 0.49)]])
    assert summarize(rollouts, EvalConfig(), seconds=1.0).correct == (False, True, True, False)
    assert summarize(rollouts, EvalConfig(threshold=0.5), seconds=1.0).correct == (True, True, True, False)


def test_lengths_truncation_and_speed_by_hand():
    short, long = _graded([[("x", 1.0)]] * 3, length=2), _graded([[("x", 0.0)]], length=10)
    cut = Rollout(**{**vars(long[0]), "finish": "length"})
    result = summarize([*short, cut], EvalConfig(), seconds=0.5)
    assert (result.mean_length, result.clipped_ratio, result.tokens_per_s) == (4.0, 0.25, 32.0)


def test_each_reward_has_its_mean_over_the_answers_that_it_graded():
    parts = [{"right": 1.0, "form": 0.5}, {"right": 0.0, "form": None}, {"right": 1.0, "form": 0.0}]
    rollouts = [replace(r, reward_parts=p) for r, p in zip(_graded([[("x", 1.0)]] * 3), parts, strict=True)]
    assert summarize(rollouts, EvalConfig(), seconds=1.0).parts == {"right": 2 / 3, "form": 0.25}


def test_the_row_is_json_and_the_metrics_leave_the_clock_out():
    rows = [[("#### 4", 1.0), ("#### 5", 0.0)], [("#### 4", 1.0), ("#### 4", 1.0)]]
    result = summarize(_graded(rows), _sampled(2, k=(1, 2)), seconds=1.0)
    row = json.loads(json.dumps(result.to_dict()))
    assert (row["num_problems"], row["num_generations"], row["undecided"], row["errors"]) == (2, 2, 0, [])
    assert (row["pass@1"], row["pass@2"], row["maj@2"]) == (0.75, 1.0, 0.75)
    assert row["pass@1_low"] <= row["pass@1"] <= row["pass@1_high"]
    assert set(row) - set(result.figures()) == {"seconds", "tokens_per_s", "errors"}
    assert all(isinstance(v, int | float) for v in result.figures().values())


def test_the_first_figure_is_the_one_to_choose_a_model_by():
    rows = [[("#### 4", 1.0), ("#### 5", 0.0)], [("#### 4", 1.0), ("#### 4", 1.0)]]
    for ks, value in (((1, 2), 0.75), ((2, 1), 1.0)):
        figures = summarize(_graded(rows), _sampled(2, k=ks), seconds=1.0).figures()
        assert next(iter(figures.items())) == (f"pass@{ks[0]}", value)


def test_evaluate_asks_every_problem_n_times_and_sums_up_what_was_written(policy):
    watcher = _Watcher()
    config = EvalConfig(num_generations=4, k=(1, 2), temperature=1.0, max_completion_length=12)
    result = evaluate(policy, [_problem(i) for i in range(6)], [watcher.reward], config)
    assert watcher.prompts == [f"{i} + 2?" for i in range(6) for _ in range(4)]
    verdicts = [[watcher.verdict(ids) for ids in watcher.ids[i:i + 4]] for i in range(0, 24, 4)]
    assert [list(row) for row in result.verdicts] == verdicts  # 1.0 == True, and None is None
    decided = [[v for v in row if v is not None] for row in verdicts]
    pairs = [fmean(max(pair) for pair in combinations(row, 2)) for row in decided if len(row) >= 2]
    assert 0.0 < result.pass_at[1].value < 1.0
    assert result.pass_at[1].value == pytest.approx(fmean(fmean(row) for row in decided if row))
    assert result.pass_at[2].value == pytest.approx(fmean(pairs))
    assert result.undecided == sum(row.count(None) for row in verdicts)
    assert result.mean_length == fmean(len(ids) for ids in watcher.ids)
    assert result.clipped_ratio == fmean(len(ids) == 12 and ids[-1] not in policy.stop for ids in watcher.ids)
    assert result.tokens_per_s * result.seconds == pytest.approx(sum(len(ids) for ids in watcher.ids))


def test_an_evaluation_repeats_with_its_seed_and_moves_with_another(policy):
    def texts(seed):
        watcher = _Watcher()
        config = EvalConfig(num_generations=2, temperature=1.0, max_completion_length=12, seed=seed)
        return watcher, evaluate(policy, [_problem(i) for i in range(4)], [watcher.reward], config)

    (first, one), (again, two), (other, _) = texts(0), texts(0), texts(1)
    assert first.texts == again.texts != other.texts
    assert one.figures() == two.figures()


def test_the_batch_size_reaches_the_decoder_and_changes_no_answer(policy, monkeypatch):
    widths, seen = [], []

    def watched(*args, **kwargs):
        widths.append(kwargs["max_rows"])
        return sample(*args, **kwargs)

    monkeypatch.setattr(suite, "sample", watched)
    for rows in (256, 3):
        watcher = _Watcher()
        config = EvalConfig(num_generations=2, temperature=1.0, max_completion_length=12,
                            per_device_eval_batch_size=rows)
        evaluate(policy, [_problem(i) for i in range(5)], [watcher.reward], config)
        seen.append(watcher.ids)
    assert widths == [256, 3]
    assert seen[0] == seen[1]


def test_num_problems_draws_the_same_subset_for_every_policy_and_keeps_its_order(policy):
    problems, config = [_problem(i) for i in range(40)], EvalConfig(num_problems=7, max_completion_length=2)
    one, two = (evaluate(policy, problems, [_Watcher().reward], config) for _ in range(2))
    places = [int(name.removeprefix("test:")) for name in one.problem_ids]
    assert one.problem_ids == two.problem_ids
    assert places == sorted(set(places))
    assert len(places) == 7
    assert places != list(range(7))


def test_two_results_are_compared_problem_by_problem():
    ours = summarize(_graded([[("x", 1.0)], [("x", 1.0)], [("x", None)], [("x", 0.0)]]), EvalConfig(), seconds=1.0)
    theirs = summarize(_graded([[("x", 0.0)], [("x", 1.0)], [("x", 1.0)], [("x", 0.0)]]), EvalConfig(), seconds=1.0)
    found = paired_difference(ours.correct, theirs.correct)
    assert (found.value, found.n) == (pytest.approx(1 / 3), 3)


def test_a_failing_reward_is_named_and_gives_no_verdict(policy):
    def broken(**columns):
        raise KeyError("solution")

    reward = RewardFunction(name="broken", weight=1.0, call=broken)
    result = evaluate(policy, [_problem(0), _problem(1)], [reward], EvalConfig(max_completion_length=2))
    assert (result.undecided, result.pass_at[1]) == (2, None)
    assert len(result.errors) == 1
    assert "broken: KeyError" in result.errors[0]


def test_problems_without_a_gold_answer_are_undecided(policy):
    reward = RewardFunction(name="exact_answer", weight=1.0, call=exact_answer)
    result = evaluate(policy, [_problem(0, answer=None), _problem(1)], [reward], EvalConfig(max_completion_length=2))
    assert (result.correct, result.undecided) == ((None, False), 1)


def test_too_few_problems_are_an_error(policy):
    with pytest.raises(DataError, match="without problems"):
        evaluate(policy, [], [], EvalConfig())
    with pytest.raises(ConfigError, match="num_problems 3: the dataset has 2"):
        evaluate(policy, [_problem(0), _problem(1)], [], EvalConfig(num_problems=3))


@pytest.mark.parametrize(("raw", "message"), [
    ({"num_generations": 4}, "num_generations 4 at temperature 0"),
    ({"num_generations": 2, "temperature": 1.0, "k": [1, 3]}, "between 1 and num_generations"),
    ({"k": [0]}, "between 1 and num_generations"),
    ({"num_generations": 2, "temperature": 1.0, "k": [2, 2]}, "stands once"),
    ({"num_problems": 0}, "num_problems"),
    ({"num_generation": 1}, "did you mean 'num_generations'"),
])
def test_a_config_that_cannot_work_is_an_error_that_says_why(raw, message):
    with pytest.raises(ConfigError, match=message):
        build(EvalConfig, raw, "eval.yaml")


def test_a_config_read_from_yaml_takes_its_ks_as_a_list():
    assert build(EvalConfig, {"num_generations": 8, "temperature": 0.6, "k": [1, 8]}, "eval.yaml").k == (1, 8)


@pytest.mark.parametrize(("reward", "expected"), [(0.0, (0, 6)), (1.0, (6, 6))])
def test_all_problems_alike_still_have_an_interval_with_a_width(reward, expected):
    found = summarize(_graded([[("a", reward), ("b", reward)]] * 6), _sampled(2, (1, 2)), seconds=1.0)
    for k in (1, 2):
        assert (found.pass_at[k].low, found.pass_at[k].high) == wilson(*expected)
