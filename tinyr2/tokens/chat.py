"""Chat templates: from raw turns to token ids, and back to text.

In: a transformers tokenizer, turns of a chat, an answer. Out: prompt ids that end where the answer begins, response ids
that end with the token that ends a turn, the ids that stop a generation, text, and what identifies a tokenizer.
"""

import json
import os.path
import re
from collections.abc import Sequence
from hashlib import blake2b

import jinja2
from transformers import PreTrainedTokenizerBase

from tinyr2.core.errors import DataError
from tinyr2.core.types import Message
from tinyr2.tokens.backend import byte_of_char, is_byte_level

_PROBE = "zqx"  # an answer that no template's own text contains


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[int, ...]:
    """Token ids of the turns and of the opening of the answer, as the tokenizer's chat template writes them.

    A BOS token is there if the template writes one, and never twice. DataError: no chat template, no user turn, or
    roles that the template rejects.
    """
    return tuple(_encode(tokenizer, _prompt_text(tokenizer, messages)))


def render_example(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message],
                   completion: Sequence[Message]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(prompt_ids, response_ids): the prompt that `render_prompt` gives, and one assistant turn that follows it.

    The response ends with the token that ends a turn, always to be learned: the template's own, or EOS where it has
    none. Where prompt and response would share a token ("Assistant: " and "4" as " 4"), the two are tokenized apart,
    as a model meets them that continues the prompt. DataError: `completion` is not one assistant turn, or the
    template cannot write it after its own generation prompt.
    """
    if [m.role for m in completion] != ["assistant"]:
        raise DataError(f"a completion is one assistant turn, this one has the roles "
                        f"{[m.role for m in completion]}; put the turns before the last answer into the prompt")
    prompt = _prompt_text(tokenizer, messages)
    closing = _closing(tokenizer)
    end = _end_of_turn(tokenizer, closing)
    body = _response_text(tokenizer, messages, completion[0], closing)
    if end is None:
        body = body.removesuffix(closing) + closing.rstrip()
    prompt_ids = _encode(tokenizer, prompt)
    response_ids = _split_off(tokenizer, prompt, body, prompt_ids)
    if end is None:
        return tuple(prompt_ids), (*response_ids, _eos(tokenizer))
    # The last occurrence: an answer that quotes the end token keeps its quotation.
    last = max((i for i, token in enumerate(response_ids) if token == end), default=None)
    if last is None:
        raise DataError(f"{_name(tokenizer)}: the chat template closes this answer otherwise than others, with "
                        f"{body[-30:]!r} instead of {closing!r}; mend chat_template.jinja")
    return tuple(prompt_ids), tuple(response_ids[:last + 1])


def stop_ids(tokenizer: PreTrainedTokenizerBase, generation_eos: int | list[int] | None) -> tuple[int, ...]:
    """Every token id that ends an answer: EOS, `generation_config.eos_token_id`, and the template's end of turn.

    No id stands twice; EOS comes first. DataError where none of the three names a token.
    """
    listed = generation_eos if isinstance(generation_eos, list) else [generation_eos]
    turn = _end_of_turn(tokenizer, _closing(tokenizer)) if tokenizer.chat_template else None
    found = [i for i in (tokenizer.eos_token_id, *listed, turn) if i is not None]
    return tuple(dict.fromkeys(found)) or (_eos(tokenizer),)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of `ids` without special tokens, to the character: nothing is cleaned up."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    r"""Each token as a person reads it, special tokens by name, for display only.

    A byte that is not a whole character by itself reads `\xf0`; an id beyond the vocabulary reads `<|id 9|>`.
    """
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    byte_of = byte_of_char() if is_byte_level(tokenizer) else None
    texts = []
    for i, token in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
        if token is None:
            texts.append(f"<|id {i}|>")
        elif i in added:
            texts.append(added[i])
        elif byte_of is not None and byte_of.keys() >= set(token):
            texts.append(bytes(byte_of[c] for c in token).decode("utf-8", errors="backslashreplace"))
        else:
            texts.append(token.replace("\u2581", " "))  # SentencePiece's mark for a space
    return texts


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits over vocabulary, merges, text processing, added tokens, special roles and chat template.

    DataError for a tokenizer without a `tokenizer.json`, whose parts cannot be read.
    """
    if not tokenizer.is_fast:
        raise DataError(f"{_name(tokenizer)}: a {type(tokenizer).__name__} has no tokenizer.json; convert it with "
                        f"AutoTokenizer.from_pretrained(…, use_fast=True).save_pretrained(…)")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting in ("truncation", "padding"):  # left behind by the last call, no part of the tokenizer
        del state[setting]
    roles = sorted((role, str(token)) for role, token in tokenizer.special_tokens_map.items())
    whole = json.dumps([state, roles, tokenizer.chat_template])
    return blake2b(whole.encode(), digest_size=8).hexdigest()


def vocabulary_faults(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> list[str]:
    """What keeps a teacher from scoring the student's token ids; empty where both map the same tokens to the same ids.

    The models' vocabularies may still be padded to different sizes: that is no matter of the tokenizers.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    moved = sorted((i, t) for t, i in ours.items() if theirs.get(t, i) != i)
    faults = []
    if moved:
        i, token = moved[0]
        faults.append(f"{len(moved)} tokens have different ids, e.g. {token!r}: student {i}, teacher {theirs[token]}")
    for side, mine, other in (("student", ours, theirs), ("teacher", theirs, ours)):
        alone = sorted((i, t) for t, i in mine.items() if t not in other)
        if alone:
            shown = ", ".join(f"{t!r} ({i})" for i, t in alone[:3])
            faults.append(f"{len(alone)} tokens are the {side}'s alone, e.g. {shown}")
    return faults


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the token with which the chat template closes an answer; None where it writes none."""
    return _end_of_turn(tokenizer, _closing(tokenizer))


def _prompt_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    if not any(m.role == "user" for m in messages):
        raise DataError(f"the prompt has no user turn (its roles: {[m.role for m in messages]}); add one: it is what "
                        f"the model answers")
    return _render(tokenizer, messages, opening=True)


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, opening: bool) -> str:
    try:
        tokenizer.get_chat_template()
    except ValueError as error:
        raise DataError(f"{_name(tokenizer)}: the tokenizer has no chat template; add a chat_template.jinja to its "
                        f"folder, or take the tokenizer of the model's Instruct version") from error
    chat = [{"role": m.role, "content": m.content} for m in messages]
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=opening)
    except jinja2.TemplateError as error:
        raise DataError(f"{_name(tokenizer)}: the chat template rejects the roles {[m.role for m in messages]}: "
                        f"{error}; change the turns, or the template in chat_template.jinja") from error


def _closing(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes after an answer, e.g. "<|im_end|>" and a newline."""
    turns = (Message("user", "hello"), Message("assistant", _PROBE))
    before, found, after = _render(tokenizer, turns, opening=False).rpartition(_PROBE)
    if not found:
        raise DataError(f"{_name(tokenizer)}: the chat template leaves out the assistant's text; it cannot be trained "
                        f"with; mend chat_template.jinja")
    return after


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, closing: str) -> int | None:
    ends = {tokenizer.eos_token_id, *tokenizer.added_tokens_decoder}
    return next((i for i in _encode(tokenizer, closing) if i in ends), None)


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError(f"{_name(tokenizer)}: nothing ends an answer: the tokenizer has no eos_token and the chat "
                        f"template writes no end token; set eos_token in tokenizer_config.json")
    return tokenizer.eos_token_id


def _response_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], answer: Message,
                   closing: str) -> str:
    """The text that follows the generation prompt, with the template's closing.

    Some templates write a turn otherwise once an answer follows it (the system turn moves, thoughts are cut), so that
    the whole chat does not begin with the prompt; the last user turn alone then often does.
    """
    for context in (messages, messages[-1:]):
        head = _prompt_text(tokenizer, context)
        full = _render(tokenizer, [*context, answer], opening=False)
        if full.startswith(head) and _squeeze(answer.content) in _squeeze(full[len(head):]):
            return full[len(head):]
    return _continued(tokenizer, head, full, answer.content, closing)


def _continued(tokenizer: PreTrainedTokenizerBase, head: str, full: str, content: str, closing: str) -> str:
    """The answer as it must follow `head` where the template's own rendering `full` of it does not.

    The opening of a thought that the prompt has already written ("<think>") is not written again.
    """
    opened, shared = head.rstrip(), len(os.path.commonprefix([head, full]))
    if len(opened) <= shared < len(head) and _squeeze(content) in _squeeze(full[shared:]):
        return full[shared:].lstrip()
    text = content.lstrip()
    overlap = max((k for k in range(1, len(opened) + 1) if text.startswith(opened[-k:])), default=0)
    if len(opened) - overlap > shared:
        raise DataError(
            f"{_name(tokenizer)}: the chat template opens an answer with {head[shared:]!r}, which this completion does "
            f"not continue: {content[:60]!r}; write the completion so that it begins with the same, or change what "
            f"the template writes for add_generation_prompt")
    rest = text[overlap:]
    return (rest.lstrip() if len(opened) < len(head) else rest) + closing


def _split_off(tokenizer: PreTrainedTokenizerBase, prompt: str, body: str, prompt_ids: list[int]) -> list[int]:
    """Token ids of `body` after `prompt`."""
    whole = _encode(tokenizer, prompt + body)
    if whole[:len(prompt_ids)] == prompt_ids:
        return whole[len(prompt_ids):]
    apart = _encode(tokenizer, body)
    if tokenizer.decode([*prompt_ids, *apart]) != tokenizer.decode(whole):
        raise DataError(f"{_name(tokenizer)}: the answer cannot be tokenized apart from the prompt, which ends with "
                        f"{prompt[-20:]!r}; let the chat template end its generation prompt with a special token")
    return apart


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # The template has written BOS where the model wants one, so the tokenizer must not add it.
    return tokenizer.encode(text, add_special_tokens=False)


def _squeeze(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or "tokenizer"
