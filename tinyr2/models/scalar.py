"""Models that give one number per token: reward models, read at an answer's last token, and critics, read at every one.

In: the folder of a reward model or of a causal LM. Out: a stock `AutoModelForSequenceClassification` with one label,
its numbers for hidden states, and a plain Hugging Face folder again.
"""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
)

from tinyr2.core.errors import DataError
from tinyr2.models.load import ModelConfig, load_as, load_config, load_model, save_model
from tinyr2.tokens.chat import end_of_turn


def load_scalar(config: ModelConfig, device: torch.device) -> nn.Module:
    """A reward model as it was saved, or a causal LM's body with a zero `score`; on `device`, in eval mode.

    With the zero `score` the first value of every token is 0. DataError where weights are damaged or lacking, where a
    reward model gives more than one number, and where transformers has no sequence classifier of this class.
    """
    saved = load_config(config)
    if type(saved) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise DataError(f"{config.path}: transformers has no sequence classifier for {saved.model_type} models, which "
                        "a reward model or critic is; give another class, e.g. qwen3 or llama")
    if not any("ForSequenceClassification" in name for name in saved.architectures or ()):
        return _from_causal(load_model(config, device), config.path)
    if saved.num_labels != 1:
        raise DataError(f"{config.path}: a classifier with {saved.num_labels} labels; a reward model or critic gives "
                        "one number, so it is saved with num_labels=1")
    model = load_as(AutoModelForSequenceClassification, config, device)
    _check_score(model, config.path)
    return model


def scalars(model: nn.Module, hidden: Tensor) -> Tensor:
    """hidden (n, D), last hidden states of tokens → (n,) the model's numbers, with gradients; float32 at least."""
    work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    score = model.score
    bias = None if score.bias is None else score.bias.to(work)
    # the precision has been chosen: autocast would lower it
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.to(work), score.weight.to(work), bias)[:, 0]


def pooling_pad(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad a scalar model's batches with: a special token that ends no answer.

    Stock classifiers read the last token that is not padding, so a padding token that also ends an answer (pad = eos)
    would hide the very token that is to be read. DataError where the tokenizer has no other special token.
    """
    ends = {tokenizer.eos_token_id, end_of_turn(tokenizer)}
    special = [i for i, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    for i in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *special):
        if i is not None and i not in ends:
            return i
    raise DataError(f"{tokenizer.name_or_path or 'tokenizer'}: its only special tokens end an answer, so none is left "
                    "to pad a reward model's batches with; add one with tokenizer.add_special_tokens({'pad_token': …})")


def save_scalar(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a plain Hugging Face folder for `AutoModelForSequenceClassification`.

    Config and tokenizer name the padding token with which stock batches read each row's last real token, padded on
    either side. DataError as in `pooling_pad`.
    """
    pad = pooling_pad(tokenizer)
    padded = copy.deepcopy(tokenizer)
    padded.pad_token = tokenizer.convert_ids_to_tokens(pad)
    model.config.pad_token_id = pad
    save_model(model, padded, folder)


def _from_causal(causal: nn.Module, path: str) -> nn.Module:
    """The sequence classifier around a causal LM's body, without a copy of it."""
    causal.config.num_labels = 1
    with torch.device("meta"):  # its own body is not needed
        model = AutoModelForSequenceClassification.from_config(causal.config)
    _check_score(model, path)
    if model.base_model_prefix != causal.base_model_prefix or type(model.base_model) is not type(causal.base_model):
        raise DataError(f"{path}: {type(model).__name__} has another body than {type(causal).__name__}; give another "
                        "class, e.g. qwen3 or llama")
    body = causal.base_model
    setattr(model, model.base_model_prefix, body)
    like = next(body.parameters())
    model.score = nn.Linear(model.score.in_features, 1, bias=model.score.bias is not None, device=like.device,
                            dtype=like.dtype)
    for parameter in model.score.parameters():
        nn.init.zeros_(parameter)
    model.config = body.config  # one object, which the body's layers hold too
    return model.eval()


def _check_score(model: nn.Module, path: str) -> None:
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise DataError(f"{path}: {type(model).__name__} has no plain linear `score`; give another class, e.g. qwen3 "
                        "or llama")
