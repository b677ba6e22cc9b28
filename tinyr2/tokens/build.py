"""Tokenizers of our own: trained on a corpus, or cut out of a bigger one.

In: texts, a size. Out: a `PreTrainedTokenizerFast` with its chat template, whose saved folder `AutoTokenizer` loads;
for a cut one, also the old ids that were kept, in the order of the new ones, by which embeddings are cut.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from typing import Any, Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tinyr2.core.errors import ConfigError, DataError
from tinyr2.tokens.chat import end_of_turn

PAD, UNKNOWN = "<|endoftext|>", "<unk>"

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")

# A turn costs one token and an answer's end one more: what a vocabulary of a hundred tokens can afford.
COMPACT = ("{% for m in messages %}"
           "{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}"
           "{% elif m['role'] == 'assistant' %}{{ '<|assistant|>' + m['content'] + '<|end|>' }}"
           "{% elif m['role'] == 'system' %}{{ '<|system|>' + m['content'] }}"
           "{% else %}{{ raise_exception('it knows system, user and assistant') }}{% endif %}"
           "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, alphabet: Literal["bytes", "corpus"] = "bytes",
                    chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-pair encoding learned from `texts`; every digit is a token by itself.

    "bytes": all 256 bytes are tokens, so any text round-trips; the template is ChatML. "corpus": the characters of
    `texts` and no others, an unknown one becomes <unk>; the template is `COMPACT`. `vocab_size` counts every token;
    a corpus with too little to merge gives fewer. Each `<|name|>` in the template is one token, the one that closes
    an answer is EOS, and padding is <|endoftext|>. The same texts give the same tokenizer. ConfigError where
    `vocab_size` cannot hold the alphabet, DataError where there is no text.
    """
    template = chat_template or (CHATML if alphabet == "bytes" else COMPACT)
    named = dict.fromkeys([PAD, *re.findall(r"<\|[^|<>\s]+\|>", template)])
    special = [*named, *([UNKNOWN] if alphabet == "corpus" else [])]
    kept = [text for text in texts if text]
    if not kept:
        raise DataError("no text to train a tokenizer on; give at least one text that is not empty")
    letters = set(pre_tokenizers.ByteLevel.alphabet()) if alphabet == "bytes" else set().union(*kept)
    if vocab_size < len(letters) + len(special):
        raise ConfigError(f"vocab_size {vocab_size} is too small: the alphabet ({alphabet}) has {len(letters)} symbols "
                          f"and {len(special)} special tokens; use at least {len(letters) + len(special)}")
    core = _byte_core() if alphabet == "bytes" else _character_core()
    core.train_from_iterator(kept, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=sorted(letters), show_progress=False))
    unknown = {"unk_token": UNKNOWN} if alphabet == "corpus" else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, clean_up_tokenization_spaces=False,
                                        **unknown)
    tokenizer.chat_template = template
    end = end_of_turn(tokenizer)
    tokenizer.eos_token = PAD if end is None else tokenizer.convert_ids_to_tokens(end)
    if alphabet == "corpus":
        _check_template_letters(tokenizer, letters)
    return tokenizer


def trim_tokenizer(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *,
                   vocab_size: int) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """(`tokenizer` cut to `vocab_size` tokens, the old ids it kept): new token i is old token `kept[i]`.

    Kept are all added tokens, all 256 bytes, and then the tokens that `texts` use most, each with the tokens that it
    is merged from; what the texts leave free goes to the lowest ids, the tokens learned first. Text whose tokens are
    all kept is encoded as before, and any other text still round-trips. DataError for anything but byte-level BPE or
    for no text, ConfigError where `vocab_size` cannot hold bytes and added tokens.
    """
    state = _byte_level_state(tokenizer)
    vocab, merges = state["model"]["vocab"], state["model"]["merges"]
    rank = {tuple(pair): r for r, pair in enumerate(merges)}
    added = {token["content"] for token in state["added_tokens"]}
    kept = added | set(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(kept):
        raise ConfigError(f"vocab_size {vocab_size} is too small: 256 bytes and {len(added)} added tokens stay in any "
                          f"case; use at least {len(kept)}")
    uses = _uses(tokenizer, texts)
    for token in sorted(vocab.keys() - kept, key=lambda t: (-uses[vocab[t]], vocab[t])):
        if len(kept) == vocab_size:
            break
        needed = _parts(token, rank) - kept
        if len(kept) + len(needed) <= vocab_size:
            kept |= needed
    old_ids = vocab | {token["content"]: token["id"] for token in state["added_tokens"]}
    order = sorted(kept, key=old_ids.__getitem__)
    return _rebuilt(tokenizer, state, order), [old_ids[token] for token in order]


def _byte_core() -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    return core


def _character_core() -> Tokenizer:
    core = Tokenizer(models.BPE(unk_token=UNKNOWN))
    # A digit alone, a word with the space before it, a run of punctuation, or white space.
    pieces = Regex(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+")
    core.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="isolated")
    core.decoder = decoders.Fuse()
    return core


def _check_template_letters(tokenizer: PreTrainedTokenizerFast, letters: set[str]) -> None:
    a = min(letters)
    chat = [{"role": "user", "content": a}, {"role": "assistant", "content": a}]
    ids = tokenizer.encode(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False)
    if tokenizer.unk_token_id in ids:
        raise DataError(f"the chat template writes characters that the corpus lacks: {tokenizer.decode(ids)!r}; leave "
                        f"chat_template out (roles are then tokens of their own), or take alphabet: bytes")


def _byte_level_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer's tokenizer.json, if it is byte-level BPE that this file can cut; else a DataError."""
    state = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"model": {"type": "no BPE"}}
    model, steps = state["model"], json.dumps(state.get("pre_tokenizer"))
    if (model["type"] != "BPE" or '"ByteLevel"' not in steps
            or not model["vocab"].keys() >= set(pre_tokenizers.ByteLevel.alphabet())):
        kind = f"{model['type']}, pre-tokenizer {(state.get('pre_tokenizer') or {}).get('type')}"
        raise DataError(f"{tokenizer.name_or_path or 'tokenizer'}: only a byte-level BPE tokenizer with all 256 bytes "
                        f"(Qwen's, Llama 3's, GPT-2's kind) can be trimmed, this is {kind}; train a new one instead")
    if not _is_plain(state["post_processor"]):
        raise DataError(f"{tokenizer.name_or_path or 'tokenizer'}: its post-processor "
                        f"{state['post_processor']['type']} names token ids in a form that cannot be cut; train a new "
                        f"tokenizer instead")
    return state


def _is_plain(processor: dict[str, Any] | None) -> bool:
    if processor is None or processor["type"] in ("ByteLevel", "TemplateProcessing"):
        return True
    return processor["type"] == "Sequence" and all(_is_plain(p) for p in processor["processors"])


def _uses(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Counter[int]:
    """How often each token id occurs in `texts`."""
    counts, source = Counter(), iter(texts)
    while chunk := list(islice(source, 256)):
        for encoding in tokenizer.backend_tokenizer.encode_batch(chunk, add_special_tokens=False):
            counts.update(encoding.ids)
    if not counts:
        raise DataError("no text to trim the tokenizer by; give texts like those that the model will read and write")
    return counts


def _parts(token: str, rank: dict[tuple[str, str], int]) -> set[str]:
    """`token` and every token on the way to it when its bytes are merged, lowest rank first.

    A merge across the token's edges would have kept it from appearing, so inside any text it grows by these steps.
    """
    pieces, seen = list(token), {token, *token}
    while len(pieces) > 1:
        best = min(range(len(pieces) - 1), key=lambda i: rank.get((pieces[i], pieces[i + 1]), len(rank)))
        if (pieces[best], pieces[best + 1]) not in rank:
            break  # such a token is found whole or not at all (`ignore_merges`)
        pieces[best:best + 2] = [pieces[best] + pieces[best + 1]]
        seen.add(pieces[best])
    return seen


def _rebuilt(tokenizer: PreTrainedTokenizerBase, state: dict[str, Any], order: list[str]) -> PreTrainedTokenizerFast:
    """`tokenizer` with the tokens of `order` alone, their ids counted from 0."""
    new_id = {token: i for i, token in enumerate(order)}
    merges = [[a, b] for a, b in state["model"]["merges"] if a in new_id and b in new_id and a + b in new_id]
    # Added tokens stand in the vocabulary too: their ids would otherwise be counted on from its end.
    model = state["model"] | {"vocab": new_id, "merges": merges}
    added = [token | {"id": new_id[token["content"]]} for token in state["added_tokens"]]
    processor = _renumbered(state["post_processor"], new_id)
    cut = state | {"model": model, "added_tokens": sorted(added, key=lambda t: t["id"]), "post_processor": processor}
    trimmed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(cut)), clean_up_tokenization_spaces=False,
        model_max_length=tokenizer.model_max_length, padding_side=tokenizer.padding_side,
        **tokenizer.special_tokens_map)
    trimmed.chat_template = tokenizer.chat_template
    return trimmed


def _renumbered(processor: Any, new_id: dict[str, int]) -> Any:
    """A post-processor's JSON with new ids wherever it lists tokens beside their ids."""
    if isinstance(processor, list):
        return [_renumbered(part, new_id) for part in processor]
    if not isinstance(processor, dict):
        return processor
    renumbered = {key: _renumbered(part, new_id) for key, part in processor.items()}
    if "ids" in processor and "tokens" in processor:
        renumbered["ids"] = [new_id[token] for token in processor["tokens"]]
    return renumbered
