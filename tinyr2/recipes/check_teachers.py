"""The teachers' part of the check that every training verb runs first: prompts of their own, tokenizers of their own.

In: problems and two models as their folders describe them. Out: findings.
"""

from collections.abc import Iterator

from tinyr2.core.errors import DataError
from tinyr2.core.types import Message
from tinyr2.recipes.check_data import COMPARED
from tinyr2.recipes.findings import Finding, ModelFiles, Part, fault_of
from tinyr2.tokens.chat import render_example, render_prompt
from tinyr2.tokens.translate import Translator


def check_renders(part: Part, teacher: ModelFiles) -> Iterator[Finding]:
    """Whether the teacher's own template can write the prompts."""
    for problem in part.problems[:COMPARED]:
        try:
            render_prompt(teacher.tokenizer, problem.messages)
        except DataError as error:
            yield fault_of(f"{teacher.key}.chat_template", error)
            return
    yield Finding("ok", f"{teacher.key}.chat_template", "the teacher's own chat template writes its prompts")


def check_translation(part: Part, student: ModelFiles, teacher: ModelFiles) -> Iterator[Finding]:
    """Whether the student's text can be read by the teacher, byte for byte, and how much of it lies token on token."""
    try:
        translator = Translator(student.tokenizer, teacher.tokenizer)
    except DataError as error:
        yield fault_of(f"{teacher.key}.tokenizer", error)
        return
    rendered = list(check_renders(part, teacher))
    yield from rendered
    if any(f.level == "fault" for f in rendered):
        return
    endless = _check_end(teacher, translator)
    if endless is not None:
        yield endless
        return
    tokens = paired = total = lost = 0
    for problem in part.problems[:COMPARED]:
        answer = (problem.completion or (Message("assistant", problem.messages[-1].content),))[0]
        try:
            _, response = render_example(student.tokenizer, problem.messages, (answer,))
        except DataError:  # the student's fault, found elsewhere
            return
        found = translator.translate(problem.messages, response)
        spans = found.spans
        tokens += len(response)
        paired += int(spans.one_to_one[spans.student[spans.student >= 0]].sum())
        total += found.bytes
        lost += sum(b - a for a, b in found.lost)
    name = f"{teacher.key}.tokenizer"
    told = f"another vocabulary than the student's: {paired / max(1, tokens):.0%} of the tokens lie one to one"
    if total and lost == total:
        yield Finding("fault", name, "no byte of the student's text can be spelled by the teacher's tokenizer",
                      "take a teacher that reads such text")
    elif lost:
        yield Finding("warn", name, f"{told}; {lost / max(1, total):.1%} of the bytes cannot be spelled by the "
                      "teacher's tokenizer and are left out", "see `tinyr2 align` for which; a tokenizer without a "
                      "lossy normalizer reads everything")
    else:
        yield Finding("ok", name, f"{told}, every byte is read")


def _check_end(teacher: ModelFiles, translator: Translator) -> Finding | None:
    try:
        end = translator.roles.end
    except DataError as error:
        return fault_of(f"{teacher.key}.tokenizer", error)
    if end is not None:
        return None
    return Finding("fault", f"{teacher.key}.tokenizer", "the teacher has neither an EOS token nor an end of turn in "
                   "its chat template, so its student would be taught never to stop",
                   "set eos_token in its tokenizer_config.json")
