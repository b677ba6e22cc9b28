"""What is made sure of before a server's first log-prob counts: that it reads tokens as the config says.

In: a client and the tokenizer that the server should have. Out: nothing, or a ConfigError that says what the server has
instead; and the log-probs of a fixed probe, by which its weights are known again.
"""

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from tinyr2.core.errors import ConfigError
from tinyr2.core.net import Client, Fault, Request
from tinyr2.core.net_check import ask_if_known
from tinyr2.core.rng import generator
from tinyr2.teachers.remote_protocol import Question, ServerConfig, body_of, read

Probe = tuple[float | None, ...]

# words, digits, code, accents, Chinese, an emoji: what tells tokenizers apart
_TEXT = "The cat's 12,345 apples cost $6.78.\n\tif x != 10: return [a_b]  # naïve café 你好世界 🙂"
_PROBE_TOKENS = 24
_SAMPLED = 64  # ids whose text is compared
_SHOWN = 8  # tokens in a message


def check_tokenizer(client: Client, config: ServerConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """ConfigError where the server's tokenizer is not `tokenizer`.

    Asked are the ids that it gives a text and every added token (vLLM, SGLang), or, where it does not say, the text
    that it makes of ids from all over the vocabulary.
    """
    if config.engine == "openai" or not _agree_on_ids(client, tokenizer):
        _agree_on_text(client, config, tokenizer)


def probe_question(tokenizer: PreTrainedTokenizerBase) -> Question:
    """Ordinary tokens in an order that depends on their number alone; the first is the prompt."""
    ordinary = _ordinary(tokenizer)
    picks = generator(0, "probe").integers(0, len(ordinary), _PROBE_TOKENS + 1)
    ids = tuple(ordinary[i] for i in picks)
    return Question(prompt=ids[:1], response=ids[1:])


def ask_probe(client: Client, config: ServerConfig, question: Question, temperature: float) -> Probe:
    """The log-probs of the probe. Fault where there are none."""
    path, body = body_of(config, question, temperature)

    def said(answer: Any) -> Probe:
        logp = read(config, answer, question).logp
        if sum(x is not None for x in logp) < len(logp) // 2:
            raise Fault("wrong", "the server gives no log-probs of most of a prompt's tokens")
        return logp

    return client.ask(Request(path=path, body=body, key="probe", probe=True), said)


def distance(a: Probe, b: Probe) -> float:
    """Mean absolute difference in nats, over the tokens of which both say something."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    return sum(abs(x - y) for x, y in pairs) / max(1, len(pairs))


def _agree_on_ids(client: Client, tokenizer: PreTrainedTokenizerBase) -> bool:
    """False where the server does not say how it tokenizes."""
    added = "".join(token.content for _, token in sorted(tokenizer.added_tokens_decoder.items())[:64])
    for text in (_TEXT, added):
        body = {"model": client.config.model, "prompt": text, "add_special_tokens": False}
        found = ask_if_known(client, Request(path="/tokenize", body=body, probe=True, key="tokenize"))
        if not isinstance(found, dict) or not isinstance(found.get("tokens"), list):
            return False
        ours, theirs = tokenizer(text, add_special_tokens=False)["input_ids"], found["tokens"]
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                      min(len(ours), len(theirs)))
            raise _other_tokenizer(client, tokenizer, f"of {text!r} it makes {len(theirs)} tokens, from the "
                                   f"{at + 1}. on {theirs[at:at + _SHOWN]}, not {ours[at:at + _SHOWN]}")
    return True


def _agree_on_text(client: Client, config: ServerConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = _readable(tokenizer)
    if config.engine == "sglang":
        body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 0, "temperature": 1.0}, "return_logprob": True,
                "logprob_start_len": 0, "return_text_in_logprobs": True}
        answer = ask_if_known(client, Request(path="/generate", body=body, probe=True, key="texts"))
    else:
        body = {"model": config.model, "prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 1}
        answer = ask_if_known(client, Request(path="/v1/completions", body=body, probe=True, key="texts"))
    try:
        theirs = ("".join(row[2] for row in answer["meta_info"]["input_token_logprobs"]) if config.engine == "sglang"
                  else answer["choices"][0]["text"])
    except (KeyError, IndexError, TypeError) as error:
        raise ConfigError(f"{config.url}: the server answers otherwise than {config.engine} does; set engine to what "
                          "the server is") from error
    ours, theirs = _squeezed(tokenizer.decode(ids, clean_up_tokenization_spaces=False)), _squeezed(theirs)
    if not theirs.startswith(ours):
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs))
        raise _other_tokenizer(client, tokenizer, f"where our ids say {ours[at:at + _SHOWN]!r} it reads "
                                                  f"{theirs[at:at + _SHOWN]!r}")


def _ordinary(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that are neither special nor added, in order."""
    return sorted(set(tokenizer.get_vocab().values()) - {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder})


def _readable(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Up to `_SAMPLED` ids from all over the vocabulary, each of them whole characters."""
    ordinary = _ordinary(tokenizer)
    spread = [ordinary[round(i)] for i in np.linspace(0, len(ordinary) - 1, min(len(ordinary), 4 * _SAMPLED))]
    whole = [i for i in spread if (text := tokenizer.decode([i])).isprintable() and text.strip()
             and "\ufffd" not in text]
    step = max(1, len(whole) / _SAMPLED)
    return [whole[-1 - int(i * step)] for i in range(min(len(whole), _SAMPLED))]


def _squeezed(text: str) -> str:
    """Without white space, in which the ways to put tokens together differ."""
    return "".join(text.split())


def _other_tokenizer(client: Client, tokenizer: PreTrainedTokenizerBase, what: str) -> ConfigError:
    return ConfigError(f"{client.config.url}: the server has another tokenizer than {tokenizer.name_or_path!r}: "
                       f"{what}; set tokenizer to the folder or hub id of the model that is served")
