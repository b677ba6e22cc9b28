"""The models' part of the check that every training verb runs first: classes, weights, vocabularies, chat templates.

In: models as their folders describe them. Out: findings, and models without memory for their weights, to count
parameters by.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tinyr2.core.errors import DataError
from tinyr2.models.packed import PACKED, STEADY, STOCK_PACKED, is_steady
from tinyr2.recipes.build import UNFIT
from tinyr2.recipes.findings import Finding, ModelFiles, Setup, fault_of
from tinyr2.tokens.chat import end_of_turn, stop_ids, vocabulary_faults


def skeleton(model: ModelFiles) -> nn.Module | Finding:
    """The model without memory for its weights; the fault where its config makes none that writes text."""
    if model.config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return Finding("fault", f"{model.key}.class", f"{model.config.model_type} is not a causal language model",
                       f"give {model.key}.path a model that writes text")
    return _empty(model, lambda: AutoModelForCausalLM.from_config(model.config))


def critic_skeleton(critic: ModelFiles) -> nn.Module | Finding:
    """The critic without memory for its weights; the fault where its config makes none that gives one number."""
    config = copy.deepcopy(critic.config)
    where, cure = f"{critic.key}.class", f"give {critic.key}.path another class, e.g. qwen3 or llama"
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return Finding("fault", where, f"transformers has no sequence classifier for {config.model_type} models, which "
                       "a critic is", cure)
    if any("ForSequenceClassification" in name for name in config.architectures or ()) and config.num_labels != 1:
        return Finding("fault", where, f"a classifier with {config.num_labels} labels, and a critic gives one number",
                       f"give {critic.key}.path a reward model, or null to begin with the policy's own body")
    config.num_labels = 1
    made = _empty(critic, lambda: AutoModelForSequenceClassification.from_config(config))
    if isinstance(made, nn.Module) and not isinstance(getattr(made, "score", None), nn.Linear):
        return Finding("fault", where, f"{type(made).__name__} has no plain linear `score`", cure)
    return made


def check_model(model: ModelFiles) -> Iterator[Finding]:
    """Whether the weights are there in a form that is read, and how they will run."""
    folder = Path(model.source.path)
    if model.config is not None and folder.is_dir() and not any(folder.glob("*.safetensors")):
        yield Finding("fault", f"{model.key}.weights", f"{folder} holds no *.safetensors", "save the model there with "
                      "save_pretrained; weights in pickle files (*.bin) are not read")
    if model.config is not None and not is_steady(model.config):
        yield Finding("fault", f"{model.key}.rope", "its rope_type ties every row's positions to the longest row of a "
                      "batch, so that no log-prob would be a row's own", "take a model whose config.json has one of "
                      f"{', '.join(sorted(STEADY))} as rope_parameters.rope_type")
    packed = PACKED | STOCK_PACKED
    if model.config is not None and model.config.model_type not in packed:
        yield Finding("warn", f"{model.key}.packing", f"{model.config.model_type}: no exact packed forward is known "
                      "for this class; it runs padded, with the same results but slower",
                      f"nothing has to be done; packed are {', '.join(sorted(packed))}")


def check_vocabulary(setup: Setup) -> Iterator[Finding]:
    """Whether every id that is written exists in every model; padded vocabularies are allowed.

    Student and teacher are cropped to the ids that both have. The others must know all of those.
    """
    student = setup.student
    sizes = {m.key: size for m in setup.models if m.config is not None and not m.translated
             and (size := getattr(m.config.get_text_config(), "vocab_size", None)) is not None}
    if student.tokenizer is None or not sizes:
        return
    longest = max(student.tokenizer.get_vocab().values()) + 1
    written = max(longest, min((size for key, size in sizes.items() if key not in ("reference", "value")),
                               default=longest))
    small = False
    for model in setup.models:
        size, readers = sizes.get(model.key), model.key in ("reference", "value")
        if size is not None and size < longest:
            small = True
            yield Finding("fault", f"{model.key}.vocabulary", f"the model has {size:,} ids, the tokenizer of "
                          f"{student.source.path} writes {longest:,}",
                          f"take a {model.role} that was made with this tokenizer, or widen its embeddings with "
                          f"resize_token_embeddings({longest})")
        elif size is not None and readers and size < written:
            small = True
            yield Finding("fault", f"{model.key}.vocabulary", f"the {model.role} has {size:,} ids, the policy writes "
                          f"{written:,}", f"take a {model.role} that was made from {student.source.path}, or widen its "
                          f"embeddings with resize_token_embeddings({written})")
    if not small:
        named = ", ".join(f"{m.role} {sizes[m.key]:,}" for m in setup.models if m.key in sizes)
        shared = min(sizes.values())
        cropped = f", cropped to the {shared:,} that they share" if len(set(sizes.values())) > 1 else ""
        yield Finding("ok", "vocabulary", f"ids: {named}{cropped}; the tokenizer writes {longest:,}")


def check_template(student: ModelFiles) -> list[Finding]:
    """Whether the tokenizer can write a chat and end an answer, and whether other programs would stop there."""
    tokenizer, key = student.tokenizer, student.key
    try:
        end = end_of_turn(tokenizer)
    except DataError as error:
        return [fault_of(f"{key}.chat_template", error)]
    others = _declared_ends(student)
    try:
        stops = stop_ids(tokenizer, others)
    except DataError as error:
        return [fault_of(f"{key}.eos", error)]
    found = [_eos_finding(key, tokenizer, end, {tokenizer.eos_token_id, *others})]
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id in stops:
        found.append(Finding("ok", f"{key}.pad", f"{tokenizer.pad_token!r} pads and ends answers: nothing is masked by "
                             "its id, so the end of an answer is still trained"))
    return found


def check_tokenizers(student: ModelFiles, other: ModelFiles) -> Iterator[Finding]:
    """Whether the other model's ids mean what the student's do."""
    faults = vocabulary_faults(student.tokenizer, other.tokenizer)
    if not faults:
        name = "tokenizers" if other.key == "teacher" else f"{other.key}.tokenizer"
        yield Finding("ok", name, f"{student.role} and {other.role} give the same tokens the same ids")
    elif other.key == "teacher":
        yield Finding("fault", "tokenizers", "the teacher's ids mean other tokens than the student's: "
                      + ", ".join(faults), f"take a teacher with the tokenizer of {student.source.path}, or distill "
                      "with `tinyr2 distill`, which translates")
    else:
        told = ", ".join(faults).replace("teacher", other.role).replace("student", "policy")
        yield Finding("fault", f"{other.key}.tokenizer", f"the {other.role} reads the policy's ids, which mean other "
                      f"tokens to it: {told}", f"take a {other.role} with the tokenizer of {student.source.path}")


def adapter_parameters(model: nn.Module, r: int) -> int:
    """At most so many parameters have adapters of rank r, on all linear layers but the head."""
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return sum(r * (m.in_features + m.out_features) for m in layers)


def _empty(model: ModelFiles, make: Callable[[], nn.Module]) -> nn.Module | Finding:
    try:
        with torch.device("meta"):
            return make()
    except UNFIT as error:
        reason = " ".join(str(error).split())[:200]
        return Finding("fault", f"{model.key}.config", f"no model can be made of {model.source.path}/config.json: "
                       f"{type(error).__name__}: {reason}", "mend config.json, or fetch the model again")


def _eos_finding(key: str, tokenizer: PreTrainedTokenizerBase, end: int | None, declared: set[int | None]) -> Finding:
    if end is None:
        return Finding("ok", f"{key}.eos", f"the chat template writes no end token; answers end with EOS "
                       f"{tokenizer.eos_token!r}")
    name = tokenizer.convert_ids_to_tokens(end)
    if end not in declared:
        return Finding("warn", f"{key}.eos", f"EOS {tokenizer.eos_token!r} is never trained: the chat template ends an "
                       f"answer with {name!r}, where other programs would not stop the finished model",
                       f"set eos_token to {name!r} in tokenizer_config.json and eos_token_id to {end} in "
                       "generation_config.json")
    return Finding("ok", f"{key}.eos", f"answers end with {name!r}")


def _declared_ends(model: ModelFiles) -> list[int]:
    """The end tokens that the model's folder names, for whoever generates with it."""
    try:
        named = GenerationConfig.from_pretrained(model.source.path, revision=model.source.revision,
                                                 local_files_only=True).eos_token_id
    except OSError:  # it has no generation_config.json, or none that was fetched before
        named = getattr(model.config, "eos_token_id", None)
    return named if isinstance(named, list) else [] if named is None else [named]
