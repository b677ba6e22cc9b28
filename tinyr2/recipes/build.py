"""`tinyr2 build`: a model with random weights and its tokenizer, as a plain Hugging Face folder.

In: a preset or the fields of a `transformers` config, and a tokenizer or the texts to make one from. Out: the folder.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import Field, model_validator
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tinyr2.core.config import Config, nearest
from tinyr2.core.errors import ConfigError, DataError, RunError
from tinyr2.core.rng import derive
from tinyr2.models.load import DType, context_length, count_parameters, save_model, weights_hash
from tinyr2.models.presets import PRESETS
from tinyr2.report.console import Console
from tinyr2.tokens.build import train_tokenizer, trim_tokenizer
from tinyr2.tokens.chat import fingerprint, stop_ids

TRL_COLUMNS = ("text", "prompt", "completion", "messages")
# Written by transformers beside the shape: a config.json may be given as it is, and these are set anew.
BOOKKEEPING = ("architectures", "dtype", "torch_dtype", "transformers_version")
# What transformers raises for values that no model can be made of.
UNFIT = (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ArithmeticError)


class TokenizerConfig(Config):
    """`path` alone: taken as it is. `texts` alone: trained on them. Both: cut to the tokens that the texts use most."""

    path: str | None = None  # a folder or a hub name
    texts: str | None = None  # a .txt file, or a .jsonl file with TRL's columns or any texts
    vocab_size: int | None = Field(None, ge=1)  # tokens, where there are texts
    alphabet: Literal["bytes", "corpus"] = "bytes"  # of a trained one: any text, or the characters of `texts` alone

    @model_validator(mode="after")
    def _one_way(self) -> "TokenizerConfig":
        if self.path is None and self.texts is None:
            raise ValueError("a model needs a tokenizer: give path (take one), texts (train one), or both (trim one)")
        if (self.texts is None) != (self.vocab_size is None):
            raise ValueError("texts and vocab_size go together: a tokenizer that is trained or trimmed needs both, one "
                             "taken as it is needs neither")
        if self.alphabet == "corpus" and (self.path is not None or self.texts is None):
            raise ValueError("alphabet is a choice for a tokenizer that is trained; leave it out")
        return self


class BuildConfig(Config):
    """Everything that `tinyr2 build` can be told."""

    output_dir: str
    tokenizer: TokenizerConfig
    preset: str | None = None
    model: dict[str, Any] = {}  # fields of the transformers config, over the preset's; without one, with model_type
    pad_vocab_to_multiple_of: int = Field(1, ge=1)  # the model's vocabulary may be longer than its tokenizer's
    dtype: DType = "float32"
    seed: int = 0

    @model_validator(mode="after")
    def _one_shape(self) -> "BuildConfig":
        if self.preset is None:
            if "model_type" not in self.model:
                raise ValueError("no shape: give a preset, or model fields with a model_type, e.g. model_type: qwen3")
        elif self.preset not in PRESETS:
            hint = nearest(self.preset, PRESETS)
            raise ValueError(f"no preset {self.preset!r}; {f'did you mean {hint!r}? ' if hint else ''}there are "
                             f"{', '.join(PRESETS)}")
        if "vocab_size" in self.model and self.pad_vocab_to_multiple_of > 1:
            raise ValueError("vocab_size and pad_vocab_to_multiple_of both set the vocabulary; give one of them")
        return self


def build(config: BuildConfig, console: Console, *, overwrite: bool = False) -> dict:
    """Write the folder `config.output_dir`, all at once; returns what `--json` prints. One seed gives the same bytes.

    RunError where the folder holds something, ConfigError for fields that make no model, DataError for texts or a
    tokenizer that cannot be read.
    """
    folder = Path(config.output_dir)
    _refuse_taken(folder, overwrite)
    fields = _merged(PRESETS[config.preset] if config.preset else {}, config.model)
    _check_names(fields)
    tokenizer = make_tokenizer(config.tokenizer)
    settings = _settings(config, fields, tokenizer)
    model = _initialized(settings, config, tokenizer)
    tokenizer.model_max_length = context_length(settings) or tokenizer.model_max_length
    _commit(folder, model, tokenizer)
    result = _described(config, model, tokenizer)
    console.note(f"{folder}: {result['model_type']}, {result['params']:,} parameters "
                 f"({result['params_without_embeddings']:,} without embeddings), {result['dtype']}, vocabulary "
                 f"{result['vocab_size']:,}, context {result['context_length']}")
    if config.tokenizer.vocab_size is not None and len(tokenizer) < config.tokenizer.vocab_size:
        console.note(f"the texts give {len(tokenizer)} of the {config.tokenizer.vocab_size} tokens asked for; more or "
                     "longer texts give more")
    if not tokenizer.chat_template:
        console.note("its tokenizer has no chat template; training needs one: put a chat_template.jinja there")
    return result


def read_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """A tokenizer by folder or hub name; DataError where there is none."""
    folder = Path(path).expanduser()
    if not folder.exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        hint = nearest(folder.name, [p.name for p in folder.parent.iterdir()]) if folder.parent.is_dir() else None
        raise DataError(f"{path}: no such folder; {f'did you mean {hint}? ' if hint else ''}give a folder with "
                        "tokenizer.json, or a hub name")
    return make_tokenizer(TokenizerConfig(path=str(folder) if folder.exists() else path))


def make_tokenizer(config: TokenizerConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that `config` describes: loaded, trained or trimmed."""
    if config.texts is None:
        return _load_tokenizer(config.path)
    if config.path is None:
        return train_tokenizer(read_texts(config.texts), vocab_size=config.vocab_size, alphabet=config.alphabet)
    return trim_tokenizer(_load_tokenizer(config.path), read_texts(config.texts), vocab_size=config.vocab_size)[0]


def read_texts(path: str | Path) -> Iterator[str]:
    """The texts of a .txt file, line by line, or of a .jsonl file: of each row TRL's columns, or else every string.

    DataError: no such file, another kind of file, or a malformed line, with its number.
    """
    path = Path(path).expanduser()
    if path.suffix not in (".txt", ".jsonl"):
        raise DataError(f"{path}: texts are a .txt or a .jsonl file; convert it, and name it so")
    if not path.is_file():
        hint = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else None
        raise DataError(f"{path}: no such file{f'; did you mean {hint}?' if hint else ''}")
    return _lines(path)


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8")
                if path.suffix == ".txt":
                    yield text
                elif text.strip():
                    yield from _strings(_texts_of(json.loads(text)))
            except ValueError as error:  # neither JSON nor UTF-8
                raise DataError(f"{path}, line {number}: {error}; a .jsonl file has one JSON object per line, in "
                                "UTF-8") from error


def _texts_of(row: Any) -> Any:
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}")
    return {name: row[name] for name in TRL_COLUMNS if name in row} or row


def _strings(value: Any) -> Iterator[str]:
    """Every string inside; a turn's role is no text."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            if name not in ("role", "from"):
                yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    folder = Path(path)
    if folder.exists() and not any(folder.glob("tokenizer*")):
        raise DataError(f"{path}: no tokenizer there; give a folder with tokenizer.json, or a hub name")
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot load a tokenizer: {_said(error)}; give a folder with tokenizer.json, or a hub "
                        "name") from error


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with `over` on top, nested mappings key by key."""
    nested = {k: _merged(base[k], v) for k, v in over.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return base | over | nested


def _check_names(fields: dict[str, Any]) -> None:
    kind = fields["model_type"]
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        hint = nearest(str(kind), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        raise ConfigError(f"model_type: transformers has no causal language model {kind!r}; "
                          f"{f'did you mean {hint!r}? ' if hint else ''}usual ones are qwen3, llama, deepseek_v3")
    owner = CONFIG_MAPPING[kind]
    known = {"model_type", *BOOKKEEPING, *owner.attribute_map, *(f.name for f in dataclasses.fields(owner))}
    if "rope_parameters" in known:
        known |= {"rope_theta", "rope_scaling"}  # older names, which transformers still reads
    faults = []
    for name in sorted(fields.keys() - known):
        hint = nearest(name, known)
        faults.append(f"  {name}: no field of {owner.__name__}; {f'did you mean {hint!r}? ' if hint else ''}known "
                      f"there: {', '.join(sorted(known - set(BOOKKEEPING)))}")
    if faults:
        raise ConfigError("\n".join(["model:", *faults]))


def _settings(config: BuildConfig, fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The transformers config; vocabulary and token ids follow the tokenizer."""
    tokens = max(tokenizer.get_vocab().values()) + 1
    vocab = fields.get("vocab_size", -(-tokens // config.pad_vocab_to_multiple_of) * config.pad_vocab_to_multiple_of)
    if isinstance(vocab, int) and vocab < tokens:
        raise ConfigError(f"vocab_size {vocab}: the tokenizer has {tokens} tokens; give at least that, or leave it out")
    kept = {name: value for name, value in fields.items() if name not in ("model_type", *BOOKKEEPING)}
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("pad", "bos", "eos")}
    try:
        return CONFIG_MAPPING[fields["model_type"]](**kept | {"vocab_size": vocab} | ids)
    except UNFIT as error:
        raise ConfigError(f"model: {_said(error)}") from error


def _initialized(settings: PretrainedConfig, config: BuildConfig, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """The model, proven to run: heads that do not divide show only there."""
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(derive(config.seed, "build"))
            # Drawn in float32 whatever the dtype: one seed is one model.
            model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
            ids = torch.zeros(1, 4, dtype=torch.long)
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except UNFIT as error:
        raise ConfigError(f"model: these fields make no {settings.model_type} that runs: {type(error).__name__}: "
                          f"{_said(error)}; check widths and head counts (num_key_value_heads divides "
                          "num_attention_heads, the head width is even)") from error
    stop = stop_ids(tokenizer, None)
    model.generation_config = GenerationConfig(
        eos_token_id=stop[0] if len(stop) == 1 else list(stop), bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id)
    return model.to(getattr(torch, config.dtype))


def _refuse_taken(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if not overwrite:
        raise RunError(f"{folder}: already there; --overwrite replaces a model folder, or give another one")
    if not (folder / "config.json").is_file():
        raise RunError(f"{folder}: not a model folder (no config.json), so --overwrite will not delete it; give "
                       "another one")


def _commit(folder: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    tmp = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, tokenizer, tmp)
        if folder.exists():
            shutil.rmtree(folder)
        tmp.rename(folder)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error.strerror or error}); give another folder, or make "
                       "room") from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def _described(config: BuildConfig, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict:
    params, inner = count_parameters(model)
    return {"model": config.output_dir, "preset": config.preset, "model_type": model.config.model_type,
            "params": params, "params_without_embeddings": inner, "dtype": config.dtype, "seed": config.seed,
            "vocab_size": model.config.vocab_size, "tokens": len(tokenizer), "tokenizer": fingerprint(tokenizer),
            "context_length": context_length(model.config), "weights": weights_hash(model)}


def _said(error: BaseException) -> str:
    """What an error of transformers says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
