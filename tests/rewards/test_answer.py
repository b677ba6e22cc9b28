import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyr2.rewards.answer import exact_answer, extract_answer, gold_answer, is_number, same_answer

SHARED = Path(os.environ.get("TINYR2_SHARED", Path(__file__).parents[3] / "shared")) / "data"


@pytest.mark.parametrize(("text", "answer"), [
    (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
    (r"\boxed{3} or \boxed{4}", "4"),
    (r"\boxed {5}", "5"),
    (r"<answer>1</answer> but \boxed{2} #### 3", "2"),
    ("<answer>1</answer> no, <answer> 2 </answer> done", "2"),
    ("<answer>7</answer> #### 3", "7"),
    ("#### 1\n####  72 \nThat was easy.", "72"),
    ("The answer is 12. No: the answer is 13.5. Checked.", "13.5"),
    ("**Answer:** $5.", "$5"),
    ("Final answer is: **42**", "42"),
    ("ANSWER: yes\nbye", "yes"),
])
def test_the_last_answer_of_the_first_kind_counts(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize("text", [
    "", "42", "We have 1+2+3=6.", r"1+2+3=6, so #### 6 and \boxed{}", r"\boxed{6} or \boxed{", r"\boxed{\frac{1}{2}",
    "#### 6 <answer>", "<answer></answer> #### 6", "####", "#### 6\n####\n7", "The answer is", "the answers are 6",
])
def test_no_answer_an_empty_or_an_unfinished_one_is_none(text):
    assert extract_answer(text) is None


@pytest.mark.parametrize(("a", "b"), [
    ("18", "18"), ("18", " 18. "), ("18", "+18"), ("18", "18.0"), ("18", "018"), ("-3", "\u22123"),
    ("1,000", "1000"), ("1,234,567.50", "1234567.5"), ("$5", "5"), (r"\$5", "5.00"), ("-$5", "-5"), ("$5$", "5"),
    ("0.5", ".5"), ("0.5", "1/2"), ("1/2", "2/4"), (r"\frac{1}{2}", "0.5"), (r"-\dfrac{3}{4}", "-0.75"),
    ("50%", "50.0 %"), (r"50\%", "50%"), ("Yes", "yes."), ("x +  1", "X + 1"), ("1e3", "1E3"), ("1/0", "1/0"),
])
def test_equal_answers(a, b):
    assert same_answer(a, b) and same_answer(b, a)


@pytest.mark.parametrize(("a", "b"), [
    ("18", "81"), ("18", "-18"), ("18", "18 apples"), ("18", "18.01"), ("1/3", "0.333333"), ("12,34", "1234"),
    ("10", "10%"), ("0.1", "10%"), ("50%", "0.5"), ("1e3", "1000"), ("4", r"4\sqrt{2}"), ("1/0", "2/0"), ("", "0"),
    ("3", "{3,4}"), ("2", "\u0662"), ("5", "5$"), (".", "0"), ("1,2,3", "123"), ("4", "2+2"),
])
def test_different_answers(a, b):
    assert not same_answer(a, b) and not same_answer(b, a)


@given(st.fractions(), st.fractions())
def test_fractions_are_equal_exactly_when_their_values_are(x, y):
    assert same_answer(f"{x.numerator}/{x.denominator}", str(x))
    assert same_answer(str(x), str(y)) == (x == y)


@given(st.text(), st.text())
def test_any_text_can_be_compared(a, b):
    assert same_answer(a, a)
    assert same_answer(a, b) == same_answer(b, a)


def test_no_input_takes_long():
    began = time.process_time()
    for hostile in ("9" * 100_000, "5^" * 50_000, "1," * 50_000, r"\boxed{" * 50_000, "answer is " * 50_000,
                    "1/" + "0" * 100_000, "{" * 100_000, "<answer>" * 50_000, "1e999999999"):
        assert not same_answer(hostile, "5")
        exact_answer([hostile, rf"\boxed{{{hostile}}}"], ["5", "5"])
    assert time.process_time() - began < 2


def test_exact_answer_scores_texts_and_turns_and_leaves_out_rows_without_gold():
    completions = ["#### 4", [{"role": "assistant", "content": r"\boxed{4}"}], "4", "#### 5", "#### 4"]
    scores = exact_answer(prompts=[""] * 5, completions=completions, completion_ids=[[]] * 5, level=[1] * 5,
                          answer=["4", "4", "4", "4", None])
    assert scores == [1.0, 1.0, 0.0, 0.0, None]


def test_a_worked_solution_counts_as_the_answer_it_ends_with():
    assert exact_answer(["#### 4", r"\boxed{5}"], ["2+2=4\n#### 4", r"so \boxed{4}"]) == [1.0, 0.0]


def test_gsm8k_solutions_score_one_and_their_neighbors_zero():
    path = SHARED / "gsm8k_test.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path}")
    solutions = [json.loads(line)["answer"] for line in path.open()][:200]
    golds = [solution.rpartition("####")[2].strip() for solution in solutions]
    assert exact_answer(solutions, golds) == [1.0] * 200
    assert exact_answer(solutions, [f"1{gold}" for gold in golds]) == [0.0] * 200


@pytest.mark.parametrize("gold", [
    None, "", " ", "####", r"so \boxed{}", r"\boxed{\frac{1}{2}", "<answer>4", "The answer is",
])
def test_a_gold_answer_that_cannot_be_read_decides_nothing(gold):
    assert gold_answer(gold) is None
    assert exact_answer(["#### 4", "", "####", r"\boxed{}"], [gold] * 4) == [None] * 4


def test_numbers_are_told_from_other_answers():
    assert all(is_number(text) for text in ("4", "-1,000.50", "50%", r"\frac{1}{2}", "$5"))
    assert not any(is_number(text) for text in ("1e3", "4 apples", "x", "", "1/0"))
