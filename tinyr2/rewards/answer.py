r"""The answer that a text gives, and whether it is the right one.

In: a whole completion and a gold answer. Out: 1.0, 0.0, or None where there is no gold answer. Only integers,
decimals, fractions and plain strings are compared, each exactly; nothing is evaluated, so no input takes long.
"""

import re
from collections.abc import Sequence
from fractions import Fraction

_LONGEST = 200  # characters; no answer that this file can compare is longer
_BOXED = re.compile(r"\\boxed\s*\{")
_SENTENCE_END = re.compile(r"\.(\s|$)")
_SAID = re.compile(r"\banswer(?: is\b:?|:)", re.IGNORECASE)
_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_NUMBER = re.compile(rf"([-+]?)\$?({_WHOLE}?)(\.[0-9]+)?")
_RATIO = re.compile(rf"([-+]?)({_WHOLE})/({_WHOLE})")
_FRAC = re.compile(r"([-+]?)\\[dt]?frac\{([0-9,]+)\}\{([0-9,]+)\}")

Completion = str | Sequence[dict[str, str]]


def extract_answer(text: str) -> str | None:
    r"""The final answer in `text`, or None where it gives none.

    Looked for in this order, the last of its kind: \boxed{…}, <answer>…</answer>, the rest of the line after ####, the
    rest of the sentence after "answer is" or "answer:". The first kind that occurs decides: an empty or unfinished one
    is no answer, and nothing before it is taken instead.
    """
    return (_marked(text) or "").strip() or None


def gold_answer(gold: str | None) -> str | None:
    """The answer that a gold text stands for: what it ends with where it is a worked solution, else all of it.

    None where there is nothing to compare with: no text, or a solution whose answer is empty or unfinished.
    """
    if gold is None:
        return None
    found = _marked(gold)
    return (gold if found is None else found).strip() or None


def text_of(completion: Completion) -> str:
    """The text of a completion; of turns, the last one's."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def same_answer(a: str, b: str) -> bool:
    r"""Whether two answers are equal, exactly.

    Numbers: integers, decimals and fractions with commas for thousands, equal as rationals: 0.5 = 1/2 = \frac{1}{2},
    1,000 = 1000.0, $5 = 5; but 1/3 is not 0.333, 12,34 is no number, and 50% equals neither 50 nor 0.5, only 50.0%.
    Anything else, and exponents such as 1e3, as text: capitals, white space, enclosing $…$ and a final full stop do
    not count.
    """
    a, b = _plain(a), _plain(b)
    x, y = _value(a), _value(b)
    return a == b if x is None or y is None else x == y


def is_number(text: str) -> bool:
    """Whether `same_answer` would compare the text as a number."""
    return _value(_plain(text)) is not None


def exact_answer(completions: Sequence[Completion], answer: Sequence[str | None], **kwargs) -> list[float | None]:
    """A reward function with TRL's signature: 1.0 where the completion's answer is the gold one, else 0.0.

    completions: texts, or lists of turns whose last is the answer. answer: gold answers; a worked solution counts as
    the answer that it ends with. None where there is no gold answer.
    """
    golds = [gold_answer(gold) for gold in answer]
    return [None if gold is None else _score(completion, gold)
            for completion, gold in zip(completions, golds, strict=True)]


def _score(completion: Completion, gold: str) -> float:
    given = extract_answer(text_of(completion))
    return float(given is not None and same_answer(given, gold))


def _marked(text: str) -> str | None:
    """What stands where a mark says the answer is; empty where it is unfinished, None where no mark occurs."""
    if boxes := list(_BOXED.finditer(text)):
        return _braced(text[boxes[-1].end():])
    if "<answer>" in text:
        inside, closed, _ = text.rpartition("<answer>")[2].partition("</answer>")
        return inside if closed else ""
    if "####" in text:
        return text.rpartition("####")[2].strip(" \t").partition("\n")[0]
    if said := list(_SAID.finditer(text)):
        return _SENTENCE_END.split(text[said[-1].end():].strip().partition("\n")[0])[0].strip("* ")
    return None


def _braced(text: str) -> str:
    """`text` up to the brace that closes the one before it; empty where none does."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[:i]
    return ""


def _plain(text: str) -> str:
    text = " ".join(text.split()).replace("\u2212", "-").replace(r"\$", "$").replace(r"\%", "%")
    text = text.removesuffix(".").strip()
    if len(text) > 2 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    return text.casefold()


def _value(text: str) -> tuple[str, Fraction] | None:
    """(unit, number) of a plain number: the unit is "%" or ""; None for anything else."""
    number, unit = (text[:-1].rstrip(), "%") if text.endswith("%") else (text, "")
    if len(number) > _LONGEST:
        return None
    if match := _RATIO.fullmatch(number) or _FRAC.fullmatch(number):
        sign, over, under = match.groups()
        over, under = int(over.replace(",", "") or 0), int(under.replace(",", "") or 0)
        value = Fraction(over, under) if under else None
    elif (match := _NUMBER.fullmatch(number)) and (match[2] or match[3]):
        sign, whole, decimals = match.groups()
        value = Fraction(whole.replace(",", "") + (decimals or "") if whole else "0" + decimals)
    else:
        return None
    return None if value is None else (unit, -value if sign == "-" else value)
