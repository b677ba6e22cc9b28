"""The check that every training verb runs first: models, tokenizers, device, folder and disk; the data is next door.

In: a `Setup`. Out: findings. Nothing is computed and nothing is written.
"""

import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tinyr2.core.errors import ConfigError, DataError
from tinyr2.core.files import free_bytes
from tinyr2.models.load import context_length, pick_device, pick_dtype
from tinyr2.models.packed import PACKED, STEADY, STOCK_PACKED, is_steady
from tinyr2.recipes.build import UNFIT
from tinyr2.recipes.check_data import Window, check_part, check_prompts_alike, held_out_overlap
from tinyr2.recipes.findings import Finding, ModelFiles, Setup, fault_of
from tinyr2.recipes.machine import describe_machine
from tinyr2.tokens.chat import end_of_turn, stop_ids, vocabulary_faults
from tinyr2.train.state import HEADROOM

_MIB = 2**20


def check_training(setup: Setup) -> list[Finding]:
    """Everything about `setup` that can be known without compute. What could not be read is left out of the rest."""
    student, teacher = setup.student, setup.teacher
    models = [m for m in (student, teacher) if m is not None]
    skeletons = {m.key: _skeleton(m) for m in models if m.config is not None}
    folder = list(check_folder(setup.output_dir))
    found = [*setup.unread, *check_device(setup), *check_evaluation(setup), *folder]
    found += [skeleton for skeleton in skeletons.values() if isinstance(skeleton, Finding)]
    if isinstance(skeleton := skeletons.get(student.key), nn.Module) and _sound(folder):
        found.append(check_disk(setup, skeleton))
    for model in models:
        found += check_model(model)
    found += check_vocabulary(student, teacher)
    template = check_template(student) if student.tokenizer is not None else []
    if teacher is not None and student.tokenizer is not None and teacher.tokenizer is not None:
        pair = list(check_tokenizers(student, teacher))
        if _sound(pair):
            pair += check_prompts_alike(setup.parts[0], student.tokenizer, teacher.tokenizer)
        found += pair
    # without a usable template every row would fail in the same way
    usable = student.tokenizer if _sound(template) else None
    windows = [Window(m.key, n) for m in models if m.config is not None and (n := context_length(m.config))]
    for part in setup.parts:
        found += check_part(part, usable, min(windows, key=lambda w: w.tokens, default=None))
    return [*found, *template, *held_out_overlap(setup.parts)]


def _sound(findings: list[Finding]) -> bool:
    return all(f.level != "fault" for f in findings)


def check_device(setup: Setup) -> Iterator[Finding]:
    """Whether the device is there, and what bfloat16 costs on it."""
    try:
        device = pick_device(setup.device)
        torch.empty(0, device=device)  # cuda:7 is a valid name on any machine
    except ConfigError as error:
        yield fault_of("device", error)
        return
    except (RuntimeError, AssertionError) as error:  # torch's own words for a name or a number that is not there
        yield Finding("fault", "device", f"{setup.device!r}: {str(error).splitlines()[0]}",
                      "use device=auto, cpu, cuda or mps")
        return
    dtype, key = setup.student.source.dtype, f"{setup.student.key}.dtype"
    if pick_dtype(dtype, device) == torch.bfloat16:
        yield Finding("warn", key, f"{dtype} on {device}: the weights that are trained would be bfloat16, whose steps "
                      "are too coarse for most updates", f"set {key} to float32; on CUDA products are bfloat16 anyway")
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield Finding("warn", "device", f"{torch.cuda.get_device_name(device)} has no bfloat16 units: products are "
                      "emulated and slow", "use a GPU of compute capability 8.0 or higher, or device=cpu")
    elif device.type == "cpu" and _bfloat16_is_slow(setup):
        yield Finding("warn", "device", "this processor has no bfloat16 instructions: a model in bfloat16 is slow here",
                      "set its dtype to float32")
    else:
        products = "bfloat16" if device.type == "cuda" else "float32"
        yield Finding("ok", "device", f"{device}, products in {products}")


def _bfloat16_is_slow(setup: Setup) -> bool:
    """Whether a model is asked for in bfloat16 on a processor known to lack it."""
    models = [setup.student, *([setup.teacher] if setup.teacher is not None else [])]
    if all(m.source.dtype != "bfloat16" for m in models):
        return False
    instructions = describe_machine()["cpu"]["instructions"]
    return instructions is not None and not any("bf16" in name for name in instructions)


def check_folder(output_dir: str) -> Iterator[Finding]:
    """Whether the run folder, or the nearest folder above it that exists, can be written to."""
    folder = Path(output_dir).absolute()
    # not Path.exists, which raises where it may not look
    nearest = next(p for p in (folder, *folder.parents) if os.path.exists(p))
    if not nearest.is_dir():
        yield Finding("fault", "output_dir", f"{nearest} is a file, so {output_dir} cannot be a folder",
                      "give another output_dir")
        return
    try:
        tempfile.TemporaryFile(dir=nearest).close()  # permission bits alone say nothing about read-only disks
    except OSError as error:
        yield Finding("fault", "output_dir", f"{nearest} cannot be written to ({error.strerror})",
                      "give an output_dir on a disk and in a folder that you may write to")
    else:
        yield Finding("ok", "output_dir", f"{nearest} can be written to")


def check_evaluation(setup: Setup) -> Iterator[Finding]:
    """Whether there is something to measure where a measurement is asked for."""
    if setup.evaluates:
        return
    cure = "add eval_data, with rewards or completions to measure by, or set it to"
    if setup.train.load_best_model_at_end:
        yield Finding("fault", "train.load_best_model_at_end", "nothing would say which model is best: no evaluation "
                      "of this run gives a figure", f"{cure} false")
    if setup.train.eval_steps:
        yield Finding("warn", "train.eval_steps", "no evaluation of this run gives a figure", f"{cure} 0")


def check_disk(setup: Setup, skeleton: nn.Module) -> Finding:
    """Whether checkpoints (weights and AdamW's two moments each) and the finished model fit beside what is there."""
    source, train = setup.student.source, setup.train
    size = 2 if source.dtype == "bfloat16" else 4  # bytes
    total = sum(p.numel() for p in skeleton.parameters())
    trained = total if source.lora is None else _adapter_parameters(skeleton, source.lora.r)
    # a new checkpoint is written before the oldest is removed
    saves = min(train.save_total_limit + 1, math.ceil(train.max_steps / train.save_steps))
    finished = 2 if train.load_best_model_at_end else 1
    need = HEADROOM * size * (3 * trained * saves + total * finished) / _MIB
    folder = Path(setup.output_dir)
    # a resumed or overwritten run takes the place of the weights that lie there
    replaced = sum(p.stat().st_size for p in folder.rglob("*.safetensors"))
    free = (free_bytes(folder) + replaced) / _MIB
    what = (f"about {need:,.0f} MiB are needed (checkpoints: {saves} x {trained:,} trained parameters and their "
            f"moments, finished models: {finished} x {total:,}), {free:,.0f} MiB are there")
    if free < need:
        return Finding("fault", "disk", what, f"free {need - free:,.0f} MiB, give an output_dir on another disk, or "
                       "lower train.save_total_limit")
    return Finding("ok", "disk", what)


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


def check_vocabulary(student: ModelFiles, teacher: ModelFiles | None) -> Iterator[Finding]:
    """Whether every id that the student's tokenizer writes exists in both models; padded vocabularies are allowed."""
    sizes = {m.key: size for m in (student, teacher) if m is not None and m.config is not None
             and (size := getattr(m.config.get_text_config(), "vocab_size", None)) is not None}
    if student.tokenizer is None or not sizes:
        return
    longest = max(student.tokenizer.get_vocab().values()) + 1
    small = {key: size for key, size in sizes.items() if size < longest}
    for key, size in small.items():
        yield Finding("fault", f"{key}.vocabulary", f"the model has {size:,} ids, the tokenizer of "
                      f"{student.source.path} writes {longest:,}",
                      f"take a {key} that was made with this tokenizer, or widen its embeddings with "
                      f"resize_token_embeddings({longest})")
    if not small:
        named = ", ".join(f"{key} {size:,}" for key, size in sizes.items())
        cropped = f", cropped to the {min(sizes.values()):,} that they share" if len(set(sizes.values())) > 1 else ""
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


def check_tokenizers(student: ModelFiles, teacher: ModelFiles) -> Iterator[Finding]:
    """Whether the teacher's ids mean what the student's do."""
    faults = vocabulary_faults(student.tokenizer, teacher.tokenizer)
    if faults:
        yield Finding("fault", "tokenizers", "cross-tokenizer distillation is not what this loss can do: "
                      + ", ".join(faults), f"take a teacher with the tokenizer of {student.source.path}, or build the "
                      f"student with that of {teacher.source.path}")
    else:
        yield Finding("ok", "tokenizers", "student and teacher give the same tokens the same ids")


def _skeleton(model: ModelFiles) -> nn.Module | Finding:
    """The model without memory for its weights; the fault where its config makes none that writes text."""
    if model.config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return Finding("fault", f"{model.key}.class", f"{model.config.model_type} is not a causal language model",
                       f"give {model.key}.path a model that writes text")
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(model.config)
    except UNFIT as error:
        reason = " ".join(str(error).split())[:200]
        return Finding("fault", f"{model.key}.config", f"no model can be made of {model.source.path}/config.json: "
                       f"{type(error).__name__}: {reason}", "mend config.json, or fetch the model again")


def _adapter_parameters(model: nn.Module, r: int) -> int:
    """At most so many parameters have adapters of rank r, on all linear layers but the head."""
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return sum(r * (m.in_features + m.out_features) for m in layers)
