"""Small tokenizers of every kind, trained here in a blink, and the real ones where they are at hand."""

import json
import os
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tinyr2.tokens.build import train_tokenizer

SHARED = Path(os.environ.get("TINYR2_SHARED", Path(__file__).parents[3] / "shared")) / "tokenizers"
REAL = ("gpt2", "cl100k", "o200k", "minimind")
CORPUS = ["the cat sat on the mat, 12 cats and 345 mats", "a hat? the hat! the cat", "add 17 and 25: 42",
          "Naïve café, größer; привет мир; 漢字かな; Then = x + y\n    return x"] * 3
TEMPLATE = ("{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}")
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


@cache
def real(name):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED} has no {name}")
    return AutoTokenizer.from_pretrained(SHARED / name)


def finished(core, **settings):
    """`core` with a chat template, an end of turn and no other ornament."""
    tokens = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"} | settings
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **tokens)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def of_pieces(*pieces):
    """A tokenizer of these pieces, that takes the fewest; id i + 5 is pieces[i]."""
    core = Tokenizer(models.Unigram([*((name, 0.0) for name in SPECIAL), *((p, -1.0) for p in pieces)], 0, False))
    core.decoder = decoders.Fuse()
    return finished(core)


@cache
def byte_level(vocab_size=320):
    return train_tokenizer(CORPUS, vocab_size=vocab_size)


@cache
def characters():
    return train_tokenizer(CORPUS, vocab_size=120, alphabet="corpus")


@cache
def sentencepiece(prefix="prepend", fallback=True):
    """BPE over ▁, with tokens for single bytes.

    prefix: "prepend" (a normalizer puts ▁ before a text), "first" or "always" (Metaspace does), "never"
    """
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=fallback))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=150, special_tokens=SPECIAL, show_progress=False))
    state = json.loads(core.to_str())
    if fallback:  # plain entries of the vocabulary, as in Llama 2's
        vocabulary = state["model"]["vocab"]
        vocabulary |= {f"<0x{b:02X}>": len(vocabulary) + b for b in range(256)}
    core = Tokenizer.from_str(json.dumps(state))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix == "prepend":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps.append(decoders.Strip(" ", 1, 0))
    elif prefix in ("first", "always"):
        core.normalizer = normalizers.Sequence([])
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=True)
        steps = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=prefix), decoders.Fuse()]
    core.decoder = decoders.Sequence(steps)
    return finished(core)


@cache
def unigram(normalizer=None):
    core = Tokenizer(models.Unigram())
    if normalizer is not None:
        core.normalizer = normalizer()
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.train_from_iterator(CORPUS, trainers.UnigramTrainer(
        vocab_size=130, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False))
    return finished(core)


@cache
def wordpiece(lowercase=True):
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.train_from_iterator(CORPUS, trainers.WordPieceTrainer(
        vocab_size=180, special_tokens=SPECIAL, show_progress=False))
    return finished(core)


@cache
def normalized(*steps):
    """Byte-level BPE behind normalizers, each a class of `tokenizers.normalizers`."""
    tokenizer = train_tokenizer(CORPUS, vocab_size=320)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([step() for step in steps])
    return tokenizer


MADE = {"bytes": byte_level, "characters": characters, "sentencepiece": sentencepiece, "unigram": unigram,
        "wordpiece": wordpiece}
KINDS = (*REAL, *MADE)


def tokenizer_of(kind):
    """One of KINDS."""
    return MADE[kind]() if kind in MADE else real(kind)
