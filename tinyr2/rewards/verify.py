r"""Accuracy: the exact comparison first, and where that cannot tell, math-verify in processes that can be killed.

In: completions and gold answers. Out: 1.0, 0.0, or None where nobody could decide. A gold answer that cannot be read
never makes an answer right; a text that no verifier should be given (a tower of powers) is undecided without one.
"""

import importlib.util
import re
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from tinyr2.core.config import Config
from tinyr2.core.errors import ConfigError
from tinyr2.rewards.answer import Completion, extract_answer, gold_answer, is_number, same_answer, text_of
from tinyr2.rewards.workers import Workers

_LONGEST = 300  # characters of an answer that is looked into
_LONG_NUMBER = re.compile(r"[0-9]{41}|\^\s*[{(]?\s*-?[0-9]{5}")
_DOTS = re.compile(r"\\[ldc]?dots|\.\.|\u2026")
_LETTERS = re.compile(r"[^\W\d_]{3}")  # outside commands: a word, which LaTeX reads as a product of variables
_COMMAND = re.compile(r"\\(?:begin|end)\s*\{\w*\}|\\(?:text|mathrm|textbf)\s*\{[^{}]*\}|\\[A-Za-z]+")
_PLAIN_WORDS = re.compile(r"[^\W\d_]+(?:[ '\u2019-][^\W\d_]+)*")
_NAMED = re.compile(r"[A-Za-z]\s*=([^=]+)")
_SPACING = re.compile(r"\\(?:left|right)(?![A-Za-z])|\\[,;!: ]|~")
_WHOLE_TEXT = re.compile(r"\\(?:text|mathrm|textbf)\s*\{([^{}]*)\}")
_AROUND_SIGNS = re.compile(r"\s*([^\w\s])\s*")


class AccuracyOptions(Config):
    """Whether math-verify is asked where the exact comparison says no, and how long it may take."""

    math_verify: bool = False
    # for each question, by the clock: on a loaded machine another run may leave undecided what this one decided
    timeout_s: float = Field(5.0, gt=0.0, le=600.0)
    workers: int = Field(2, ge=1, le=64)  # processes


def accuracy(options: AccuracyOptions) -> "Accuracy":
    """The reward function; ConfigError where math-verify is wanted and not installed."""
    if options.math_verify and importlib.util.find_spec("math_verify") is None:
        raise ConfigError("rewards: accuracy: options.math_verify needs the package math-verify; install it with "
                          "pip install 'tinyr2[math]', or leave math_verify: false")
    return Accuracy(Workers(options.workers, options.timeout_s) if options.math_verify else None)


class Accuracy:
    """A reward function with TRL's signature: 1.0 right, 0.0 wrong, None undecided.

    The given answer is the last of its kind in the completion (`extract_answer`); none is wrong. Equal as numbers, or
    as text up to LaTeX spacing: right. Two numbers, two plain words, or no `workers`: wrong. Anything else is math-
    verify's question, where it can be trusted with it. `undecided` counts the answers that were left so.
    """

    def __init__(self, workers: Workers | None):
        self.workers = workers
        self.undecided = 0

    def __call__(self, completions: Sequence[Completion], answer: Sequence[str | None], **_) -> list[float | None]:
        pairs = [(gold_answer(gold), extract_answer(text_of(completion)))
                 for completion, gold in zip(completions, answer, strict=True)]
        known = {pair: self._at_once(*pair) for pair in pairs}
        asked = [pair for pair, verdict in known.items() if verdict == _ASK]
        if asked:
            assert self.workers is not None
            questions = [tuple(_tidy(text) for text in pair) for pair in asked]
            for pair, verdict in zip(asked, self.workers.ask(questions), strict=True):
                known[pair] = None if verdict is None else float(verdict)
        scores = [known[pair] for pair in pairs]
        self.undecided += sum(score is None and gold is not None
                              for score, (gold, _) in zip(scores, pairs, strict=True))
        return scores

    def _at_once(self, gold: str | None, given: str | None) -> float | Literal["ask"] | None:
        """The verdict without a worker, or _ASK."""
        if gold is None:
            return None
        if given is None:
            return 0.0
        if max(len(gold), len(given)) > _LONGEST:
            return 1.0 if same_answer(gold, given) else 0.0 if self.workers is None else None
        a, b = _unnamed(_tidy(gold), _tidy(given))
        if same_answer(a, b) or _squeezed(a) == _squeezed(b):
            return 1.0
        if self.workers is None or (_is_simple(a) and _is_simple(b)):
            return 0.0
        return _ASK if _is_readable(a, b) else None


_ASK: Literal["ask"] = "ask"


def _tidy(text: str) -> str:
    r"""Without what LaTeX says about looks: \left, \right, thin spaces, $…$, \dfrac, \text around the whole."""
    text = _SPACING.sub(" ", text.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")).strip()
    if len(text) > 2 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    whole = _WHOLE_TEXT.fullmatch(text)
    return whole[1].strip() if whole else text


def _unnamed(a: str, b: str) -> tuple[str, str]:
    """Without "x =" where only one of the two says what it is the value of."""
    if ("=" in a) == ("=" in b):
        return a, b
    a, b = (match[1].strip() if (match := _NAMED.fullmatch(text)) else text for text in (a, b))
    return a, b


def _squeezed(text: str) -> str:
    return _AROUND_SIGNS.sub(r"\1", text).casefold()


def _is_simple(text: str) -> bool:
    return is_number(text) or _PLAIN_WORDS.fullmatch(text) is not None


def _is_readable(a: str, b: str) -> bool:
    """Whether math-verify can be trusted with the two: no size to hang on, nothing that it would leave out."""
    if a.count("%") != b.count("%"):
        return False
    return all(not _LONG_NUMBER.search(text) and not _DOTS.search(text)
               and not _LETTERS.search(_COMMAND.sub(" ", text)) and "$" not in text and r"\boxed" not in text
               and _is_shallow(text) for text in (a, b))


def _is_shallow(text: str) -> bool:
    """Whether every brace closes, and no power stands in the exponent of an exponent. (1, 2] may be an interval."""
    text = text.replace(" ", "")
    open_: list[tuple[str, bool]] = []  # brackets, and whether each opens an exponent
    for before, letter in zip(" " + text, text, strict=False):
        if letter in "{(":
            open_.append((letter, before == "^"))
        elif letter == "}":
            while open_ and open_[-1][0] == "(":
                open_.pop()
            if not open_:
                return False
            open_.pop()
        elif letter == ")" and open_ and open_[-1][0] == "(":
            open_.pop()
        if sum(exponent for _, exponent in open_) >= 2:
            return False
    return all(letter == "(" for letter, _ in open_)
