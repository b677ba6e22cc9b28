"""How the tokenizers of a folder line up, each as student and as teacher of every other: what each signal keeps.

    python bench/align_table.py ../shared/tokenizers

One more is trained here: BPE in SentencePiece's manner, ▁ for spaces and <0xNN> for what it has no token for, on pieces
of the built-in samples. Texts are those samples. Writes bench/results/align.json and prints Markdown tables.
"""

import argparse
import json
from collections.abc import Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

from sides import HERE
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tinyr2.core.files import write_atomic
from tinyr2.recipes.align import load_tokenizer
from tinyr2.tokens.lineup import SIGNALS, compare, line_up, vocabulary
from tinyr2.tokens.samples import SAMPLES
from tinyr2.tokens.translate import Translator

SPECIAL = ["<unk>", "<s>", "</s>"]
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
OWN = "sentencepiece"
TELLING = (("minimind", "o200k"), ("o200k", "minimind"), ("gpt2", "cl100k"), (OWN, "o200k"), ("o200k", OWN))


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.add_argument("folder", type=Path, help="of tokenizer folders")
    parser.add_argument("--vocab-size", type=int, default=900, help="of the one that is trained here, bytes included")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "align.json")
    a = parser.parse_args()
    tokenizers = {path.name: load_tokenizer(str(path)) for path in sorted(a.folder.iterdir()) if path.is_dir()}
    tokenizers[OWN] = sentencepiece(a.vocab_size)
    pairs = {pair: measured(tokenizers[pair[0]], tokenizers[pair[1]]) for pair in permutations(tokenizers, 2)}
    rows = [{"student": one, "teacher": other, **found} for (one, other), found in pairs.items()]
    write_atomic(a.out, json.dumps({"vocab_size": {name: len(t) for name, t in tokenizers.items()},
                                    "pairs": rounded(rows)}, indent=1) + "\n")
    print("\n".join([*overall(pairs), "", *by_kind(pairs)]))


def sentencepiece(vocab_size: int) -> PreTrainedTokenizerBase:
    """Trained on every other line of the samples, so that some of what it reads is new to it."""
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    lines = [line for text in SAMPLES.values() for line in text.splitlines()[::2]]
    core.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=vocab_size - 256, special_tokens=SPECIAL,
                                                        show_progress=False))
    state = json.loads(core.to_str())
    known = state["model"]["vocab"]
    known |= {f"<0x{byte:02X}>": len(known) + byte for byte in range(256)}
    core = Tokenizer.from_str(json.dumps(state))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, unk_token="<unk>",
                                   bos_token="<s>", eos_token="</s>")
    made.chat_template = TEMPLATE
    return made


def measured(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What `tinyr2 align --json` says of the shares and of the vocabulary."""
    translator = Translator(student, teacher)
    return compare(line_up(translator, list(SAMPLES.items()))) | {"vocabulary": vocabulary(translator)}


def rounded(value: Any) -> Any:
    """The same with shares to five digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 5) if isinstance(value, float) else value


def overall(pairs: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[str]:
    """Each ordered pair over all samples."""
    lines = [f"| student | teacher | {' | '.join(SIGNALS)} | shared vocabulary |",
             f"|---|---|{'---|' * len(SIGNALS)}---|"]
    for (student, teacher), found in pairs.items():
        v = found["vocabulary"]
        lines.append(f"| {student} | {teacher} | {_cells(found)} | {v['shared']:,} "
                     f"({v['student_share']:.1%} / {v['teacher_share']:.1%}) |")
    return lines


def by_kind(pairs: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[str]:
    """`exact` and `marginal` by kind of text, for a few pairs."""
    lines = [f"| student → teacher | | {' | '.join(SAMPLES)} |", f"|---|---|{'---|' * len(SAMPLES)}"]
    for pair in TELLING:
        for signal in ("exact", "marginal"):
            if pair in pairs:
                shares = " | ".join(_share(pairs[pair]["kinds"][kind][signal]) for kind in SAMPLES)
                lines.append(f"| {pair[0]} → {pair[1]} | {signal} | {shares} |")
    return lines


def _cells(found: Mapping[str, Any]) -> str:
    return " | ".join(_share(found[signal]) for signal in SIGNALS)


def _share(signal: Mapping[str, float]) -> str:
    return f"{signal['tokens']:.1%} / {signal['bytes']:.1%}"


if __name__ == "__main__":
    main()
