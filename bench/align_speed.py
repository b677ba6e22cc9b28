"""How many student tokens a second are lined up with a teacher's, with and without the tokenizers' own time.

    python bench/align_speed.py --student ../shared/tokenizers/minimind --teacher ../shared/tokenizers/gpt2

Answers of 40, 400 and 4,000 tokens, cut from GSM8K's solutions, each batch of about 80,000 tokens; one core. The
tokenizers' own time is what the teacher's takes to write the text as ids, and its template to render the prompts.
Prints one JSON line; the figures are medians over `--repeats`.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core

from tokenizers import Tokenizer  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

import tinyr2.tokens.translate as translate  # noqa: E402
from tinyr2.core.types import Message  # noqa: E402

BATCH = 80_000
W2 = 64, 109  # answers of one step of that workload, and their mean length
SHARED = Path(os.environ.get("TINYR2_SHARED", "../shared"))


class Watch:
    """Seconds inside the calls that it watches."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def over(self, call: Callable) -> Callable:
        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed

    def over_backend(self, backend: Tokenizer) -> SimpleNamespace:
        """A tokenizer's two calls, with their ids made into lists inside the time."""
        def ids(texts, **settings):
            return [SimpleNamespace(ids=e.ids) for e in backend.encode_batch_fast(texts, **settings)]

        def offsets(texts, **settings):
            return [SimpleNamespace(ids=e.ids, offsets=e.offsets) for e in backend.encode_batch(texts, **settings)]

        return SimpleNamespace(encode_batch_fast=self.over(ids), encode_batch=self.over(offsets))


def answers(student: AutoTokenizer, length: int,
            count: int | None = None) -> list[tuple[tuple[Message, ...], translate.Answer]]:
    """`count` answers of one length, or about BATCH tokens of them; eight answers share a question."""
    rows = [json.loads(line) for line in (SHARED / "data" / "gsm8k_test.jsonl").open(encoding="utf-8")]
    ids = [i for row in rows for i in student.encode(row["answer"], add_special_tokens=False)]
    count = count or max(1, BATCH // length)
    return [((Message("user", rows[k // 8 % len(rows)]["question"]),),
             translate.Answer((*ids[k * length:(k + 1) * length - 1], student.eos_token_id), ()))
            for k in range(count)]


def measure(student: AutoTokenizer, teacher: AutoTokenizer, length: int, repeats: int,
            count: int | None = None) -> dict[str, float]:
    """Student tokens a second, whole and without the tokenizers' own time."""
    watch = Watch()
    translator = translate.Translator(student, teacher)
    own = translator.teacher
    opening = watch.over_backend(own._opening)
    going_on = watch.over_backend(own._going_on) if own.prefixes else opening
    translator.teacher = replace(own, _opening=opening, _going_on=going_on)
    translate.render_prompt, kept = watch.over(translate.render_prompt), translate.render_prompt
    items, whole, alone = answers(student, length, count), [], []
    tokens = sum(len(answer.response_ids) for _, answer in items)
    translator.translate_all(items)
    for _ in range(repeats):
        watch.seconds, start = 0.0, time.perf_counter()
        translator.translate_all(items)
        spent = time.perf_counter() - start
        whole.append(tokens / spent)
        alone.append(tokens / (spent - watch.seconds))
    translate.render_prompt = kept
    return {"answers": len(items), "tokens": tokens, "tokens_per_s": round(statistics.median(alone)),
            "tokens_per_s_with_tokenizers": round(statistics.median(whole))}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--student", default=str(SHARED / "tokenizers" / "minimind"))
    parser.add_argument("--teacher", default=str(SHARED / "tokenizers" / "gpt2"))
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    student, teacher = (AutoTokenizer.from_pretrained(folder) for folder in (args.student, args.teacher))
    by_length = {length: measure(student, teacher, length, args.repeats) for length in (40, 400, 4000)}
    step = measure(student, teacher, W2[1], args.repeats, count=W2[0])
    print(json.dumps({"student": Path(args.student).name, "teacher": Path(args.teacher).name, "cores": 1,
                      "repeats": args.repeats, "length": by_length, "W2_step": step}))


if __name__ == "__main__":
    main()
