import importlib.util
import os
import time

import pytest

from tinyr2.core.errors import ConfigError
from tinyr2.rewards.grade import RewardConfig, load_reward
from tinyr2.rewards.verify import AccuracyOptions, accuracy

INSTALLED = importlib.util.find_spec("math_verify") is not None
SKIPS = not INSTALLED and not os.environ.get("CI")  # where CI runs, a missing package is a failure
needs_math_verify = pytest.mark.skipif(SKIPS, reason="math-verify is not installed")
FAST = accuracy(AccuracyOptions())


@pytest.fixture(scope="module")
def careful():
    """Accuracy with math-verify."""
    reward = accuracy(AccuracyOptions(math_verify=True, timeout_s=10.0, workers=1))
    yield reward
    reward.workers.close()


def verdict(reward, gold, given):
    return reward(completions=[rf"\boxed{{{given}}}"], answer=[gold])[0]


SAME = [
    ("4", "4.0"), (r"\frac{1}{2}", "0.5"), (r"\dfrac{3}{4}", r"\tfrac{3}{4}"), ("x = 3", "3"), ("3", "y=3"),
    (r"\left(1, 2\right)", "(1,2)"), (r"\text{Monday}", "monday"), (r"2\,000", "2 000"), (r"3\sqrt{2}", r"3 \sqrt{2}"),
    ("$x+1$", "x + 1"), ("Paris", "paris."), ("1,000", "1000"),
]


@pytest.mark.parametrize(("gold", "given"), SAME)
def test_what_the_exact_comparison_can_tell_needs_no_worker(gold, given):
    assert verdict(FAST, gold, given) == 1.0


@pytest.mark.parametrize(("gold", "given"), [
    ("4", "5"), ("4", "-4"), ("10", r"10\%"), ("0.1", "10%"), ("1/3", "0.3333"), ("1/3", "0.333333"),
    ("4", r"4\sqrt(2)"), ("Paris", "London"), ("12", "1,2"), ("x", "2x"), ("3", "x = 4"), ("x=3", "y=4"),
    ("5 cm", "5 m"),
])
def test_what_is_not_equal_is_wrong_without_math_verify(gold, given):
    assert verdict(FAST, gold, given) == 0.0


@pytest.mark.parametrize("completion", [
    "", "We have 1+2+3=6, so \\boxed{}", r"\boxed{4} or \boxed{", "Simplify: (x-1)(x+1)", "<answer>4", "4",
])
def test_no_answer_is_wrong(completion):
    assert FAST(completions=[completion] * 3, answer=["6", "(x-1)(x+1)", "4"]) == [0.0] * 3


def test_the_last_box_counts():
    assert FAST(completions=[r"\boxed{3} or \boxed{4}", r"\boxed{4} or \boxed{3}"], answer=["3", "3"]) == [0.0, 1.0]


@pytest.mark.parametrize("gold", [None, "", "####", r"\boxed{}", "<answer>3"])
def test_a_gold_answer_that_cannot_be_read_decides_nothing(gold):
    reward = accuracy(AccuracyOptions())
    assert reward(completions=["#### 3", "", r"\boxed{}"], answer=[gold] * 3) == [None] * 3
    assert reward.undecided == 0


@needs_math_verify
@pytest.mark.parametrize(("gold", "given"), [
    (r"2\sqrt{2}", r"\sqrt{8}"), (r"\frac{\pi}{2}", r"\pi/2"), ("x^2-1", "(x-1)(x+1)"), ("9", "3^2"),
    ("1,000,000", "10^6"), ("[1,2)", r"[1,\frac{4}{2})"), (r"\{1,2\}", "2,1"), ("2x+3y=6", "4x+6y=12"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&\frac{8}{2}\end{pmatrix}"), ("a+b", "b+a"),
    (r"\frac12", "1/2"), (r"90^\circ", "90"), ("e^{2x}", "(e^x)^2"),
])
def test_math_verify_finds_equal_what_is_written_otherwise(gold, given, careful):
    assert verdict(careful, gold, given) == 1.0


@needs_math_verify
@pytest.mark.parametrize(("gold", "given"), [
    ("4", r"4\sqrt{2}"), ("x^2-1", "(x-1)(x-1)"), ("3*x-1*y+13=0", "3x+4y+14=0"), ("[1,2)", "(1,2)"),
    ("2x+3y=6", "4x+6y=13"), ("3", r"\{3,4\}"), ("3", "3x"), (r"5 \text{ cm}", r"5 \text{ m}"), (r"\pi", "3.14"),
    ("10", r"10\%"), ("0.1", "10%"), ("1/3", "0.333333"), ("Paris", "London"),
])
def test_what_differs_is_wrong_with_math_verify_too(gold, given, careful):
    assert verdict(careful, gold, given) == 0.0


UNDECIDED = {
    "malformed root, which math-verify takes for 4": ("4", r"4\sqrt(2)"),
    "factorials that both round to 0": ("1/2004!", "1/2006!"),
    "the same in LaTeX": (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
    "powers that both round to 0": ("1/2^{99}", "1/2^{98}"),
    "sequences with dots": (r"1,2,\ldots,n", r"1,3,5,\ldots,2n-1"),
    "equal for positive n alone": (r"\sqrt{\frac{1}{n}}", r"\frac{1}{\sqrt{n}}"),
    "equal for positive x alone": (r"\sqrt{x^2}", "x"),
    "a rounded root": (r"\sqrt{8}", "2.828427"),
    "a percent sign on one side": ("x", r"10\% x"),
    "a word, whose letters would be variables": ("3x", "3 apples"),
    "its letters in another order": ("3 apples+1", "3 appels+1"),
    "a tower of powers": ("5", "5^{5^{5^{5^5}}}"),
    "the same with brackets": ("5", "5^(5^(5^(5^5)))"),
    "a huge exponent": ("5", "5^{99999}"),
    "a number of 50 digits": ("5", "9" * 50 + "+1"),
    "a text of 400 characters": ("5", "1+" * 200 + "1"),
    "a brace that never closes": ("x", "2{x"),
    "division by zero": ("2", r"\frac{2}{1-1}"),
    "an unknown command": (r"\foo{3}", "x+1"),
}


@needs_math_verify
@pytest.mark.parametrize("pair", UNDECIDED.values(), ids=UNDECIDED.keys())
def test_what_nobody_can_guarantee_is_undecided(pair, careful):
    before = careful.undecided
    gold, given = pair
    assert careful(completions=[f"<answer>{given}</answer>"], answer=[gold]) == [None]
    assert careful.undecided == before + 1


@needs_math_verify
def test_equal_questions_of_a_batch_are_asked_once(careful):
    asked = careful.workers.asked
    completions = [r"\boxed{1+x}", r"\boxed{1+x}", r"\boxed{x+2}", "#### 7", ""]
    assert careful(completions=completions, answer=["x+1"] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert careful.workers.asked - asked == 3


@needs_math_verify
def test_only_answers_that_the_fast_path_cannot_tell_reach_a_worker(careful):
    asked = careful.workers.asked
    careful(completions=[rf"\boxed{{{given}}}" for _, given in SAME], answer=[gold for gold, _ in SAME])
    careful(completions=["#### 4", "#### no", "#### Paris"], answer=["5", "yes", "7"])
    assert careful.workers.asked == asked


@needs_math_verify
def test_a_hanging_answer_is_undecided_and_costs_its_own_time_alone():
    reward = accuracy(AccuracyOptions(math_verify=True, timeout_s=0.5, workers=2))
    try:
        reward(completions=["#### x+1"], answer=["1+x"])
        began = time.monotonic()
        given = ["x+1", "9!!!!", "1+1+x", "x+1-0"]
        scores = reward(completions=[rf"\boxed{{{g}}}" for g in given], answer=["1+x"] * 4)
        assert scores == [1.0, None, 0.0, 1.0]
        assert time.monotonic() - began < 1.5
        assert reward.undecided == 1
    finally:
        reward.workers.close()


def test_math_verify_that_is_not_installed_is_a_config_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'tinyr2\[math\]', or leave math_verify: false"):
        load_reward(RewardConfig(name="accuracy", options={"math_verify": True}))
    assert load_reward(RewardConfig(name="accuracy")).call(completions=["#### 3"], answer=["3"]) == [1.0]


def test_no_input_takes_long_without_a_worker():
    began = time.process_time()
    for hostile in (" " * 100_000 + "x", "(" * 50_000, "x=" * 50_000, r"\text{" * 30_000, r"\left" * 30_000,
                    "9" * 100_000, "^(" * 50_000, "(" * 299, "^{" * 149, " " * 298 + "x", r"\text{" * 49):
        for gold, given in ((hostile, "y+1"), ("y+1", hostile)):
            assert FAST(completions=[f"<answer>{given}</answer>"], answer=[gold]) == [0.0]
            careful = accuracy(AccuracyOptions(math_verify=INSTALLED))
            assert careful._at_once(gold, given) in (0.0, None, "ask")
    assert time.process_time() - began < 2
