"""What the tests of teachers share: two tokenizers whose pieces lie across each other, and answers cut by hand.

Student: a 5, b 6, c 7, d 8, ab 9, cd 10. Teacher: a 5, b 6, c 7, d 8, bc 9, abc 10. The end of a turn is 4 to the
student and 2 to the teacher.
"""

from functools import cache

import torch

from tests.tokens.makers import of_pieces
from tests.train.tiny import VOCAB, qwen3
from tinyr2.core.types import Message, Problem, Rollout
from tinyr2.models.pairs import Pairs
from tinyr2.teachers.boundaries import Boundaries, Order
from tinyr2.teachers.local import hire
from tinyr2.teachers.marginal import Marginal
from tinyr2.teachers.views import View
from tinyr2.tokens.byte_order import byte_order
from tinyr2.tokens.chat import render_prompt
from tinyr2.tokens.prefixes import Prefixes
from tinyr2.tokens.translate import Translator

END = 4
A, B, C, D, AB, CD = range(5, 11)


@cache
def student_tokenizer():
    return _spoken(of_pieces("a", "b", "c", "d", "ab", "cd"), "<|im_end|>")


@cache
def teacher_tokenizer():
    return _spoken(of_pieces("a", "b", "c", "d", "bc", "abc"), "</s>")


def _spoken(tokenizer, end):
    tokenizer.chat_template = ("{% for m in messages %}{{ m['content'] + '" + end + "' }}{% endfor %}"
                               "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}")
    return tokenizer


def answer(question, *response, **more):
    """A rollout of the student's own tokens."""
    problem = Problem(id=question, task=more.pop("task", "letters"), messages=(Message("user", question),), answer="d")
    prompt = tuple(render_prompt(student_tokenizer(), problem.messages))
    return Rollout(**({"problem": problem, "group": 0, "sample": 0, "author": "student", "prompt_ids": prompt,
                       "response_ids": response, "finish": "stop" if response[-1:] == (END,) else "length"} | more))


def answers():
    """abcd as (ab c|d|end) against (abc|d|end), as (a b cd|end) against (abc d|end); dab, cut, as (d|ab)."""
    return [answer("ab", AB, C, D, END), answer("dd", A, B, CD, END, sample=1), answer("abcd", D, AB, group=1)]


def aid(signal, translator=None, threshold=0.1):
    """What a member with this signal needs."""
    translator = translator or Translator(student_tokenizer(), teacher_tokenizer())
    if signal == "mapped":
        return Pairs(*map(torch.from_numpy, translator.pairs))
    if signal == "chunk_debiased":
        return Boundaries(*(Order(*map(torch.from_numpy, byte_order(side.pieces))) for side in (
            translator.student, translator.teacher)), threshold=threshold)
    if signal == "marginal":
        ours, theirs = translator.student, translator.teacher
        roles = {int(t): int(s) for s, t in zip(*translator.pairs, strict=True) if not theirs.pieces[t]}
        return Marginal(Prefixes(ours.ids_of_bytes(), theirs.pieces, roles, ours), ours.pieces, theirs.pieces, VOCAB)
    return None


def teacher(seed=1, dtype=torch.float32):
    return hire(qwen3(hidden=24, seed=seed, dtype=dtype), VOCAB)


def across(**more):
    """How the teacher reads what the student wrote."""
    return View(translator=Translator(student_tokenizer(), teacher_tokenizer()), **more)


@torch.no_grad()
def logps(model, prompt, response, temperature=1.0):
    """Of each response token, by the stock forward of one row."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0].double() / temperature
    rows = torch.log_softmax(logits, -1)[len(prompt) - 1:-1]
    return [float(row[token]) for row, token in zip(rows, response, strict=True)]
