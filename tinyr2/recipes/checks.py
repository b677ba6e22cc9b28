"""The check that every training verb runs first: device, folder and disk; models, data and rewards are next door.

In: a `Setup`. Out: findings. Nothing is computed and nothing is written.
"""

import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from tinyr2.core.errors import ConfigError
from tinyr2.core.files import free_bytes
from tinyr2.models.load import context_length, pick_device, pick_dtype
from tinyr2.recipes.check_data import Window, check_part, check_prompts_alike, held_out_overlap
from tinyr2.recipes.check_models import (
    adapter_parameters,
    check_model,
    check_template,
    check_tokenizers,
    check_vocabulary,
    critic_skeleton,
    skeleton,
)
from tinyr2.recipes.check_rewards import check_rewards
from tinyr2.recipes.check_teachers import check_renders, check_translation
from tinyr2.recipes.findings import Finding, ModelFiles, Setup, fault_of
from tinyr2.recipes.machine import describe_machine
from tinyr2.train.state import HEADROOM

_MIB = 2**20


def check_training(setup: Setup) -> list[Finding]:
    """Everything about `setup` that can be known without compute. What could not be read is left out of the rest."""
    student, models = setup.student, setup.models
    folder = list(check_folder(setup.output_dir))
    found = [*setup.unread, *check_device(setup), *check_evaluation(setup), *folder]
    made = _skeletons(setup)
    found += [fault for fault in made.values() if isinstance(fault, Finding)]
    if isinstance(made.get(student.key), nn.Module) and _sound(folder):
        found.append(check_disk(setup, made[student.key], made.get("value")))
    for model in models:
        found += check_model(model)
    found += check_vocabulary(setup)
    template = check_template(student) if student.tokenizer is not None else []
    for other in models[1:]:
        found += _check_pair(setup, other)
    # without a usable template every row would fail in the same way
    usable = student.tokenizer if _sound(template) else None
    windows = [Window(m.role, n) for m in models
               if m.config is not None and not m.translated and (n := context_length(m.config))]
    for part in setup.parts:
        found += check_part(part, usable, min(windows, key=lambda w: w.tokens, default=None))
    return [*found, *template, *check_rewards(setup), *held_out_overlap(setup.parts)]


def _skeletons(setup: Setup) -> dict[str, nn.Module | Finding]:
    """By key, of each model whose config could be read: the model without weights, or the fault."""
    made = {m.key: skeleton(m) for m in setup.models if m.config is not None and m is not setup.critic}
    if setup.critic is not None and setup.critic.config is not None:
        made["value"] = critic_skeleton(setup.critic)
    return made


def _check_pair(setup: Setup, other: ModelFiles) -> list[Finding]:
    """Whether student and other model read the same ids, and a teacher the same prompts."""
    student = setup.student
    if student.tokenizer is None or other.tokenizer is None:
        return []
    if other.translated:
        return list(check_translation(setup.parts[0], student, other))
    pair = list(check_tokenizers(student, other))
    if other in setup.teachers and _sound(pair):
        if other.own_prompt:
            return [*pair, *check_renders(setup.parts[0], other)]
        pair += check_prompts_alike(setup.parts[0], student.tokenizer, other.tokenizer)
    return pair


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
    if all(m.source.dtype != "bfloat16" for m in setup.models):
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


def check_disk(setup: Setup, student: nn.Module, critic: nn.Module | Finding | None) -> Finding:
    """Whether checkpoints (weights and AdamW's two moments each) and the finished model fit beside what is there.

    student, critic: without weights. A critic with a body of its own is in each checkpoint, and finished once.
    """
    source, train = setup.student.source, setup.train
    size = 2 if source.dtype == "bfloat16" else 4  # bytes
    total, judging = _parameters(student), _parameters(critic) if isinstance(critic, nn.Module) else 0
    trained = total if source.lora is None else adapter_parameters(student, source.lora.r)
    # a new checkpoint is written before the oldest is removed
    saves = min(train.save_total_limit + 1, math.ceil(train.max_steps / train.save_steps))
    finished = 2 if train.load_best_model_at_end else 1
    need = HEADROOM * size * (3 * (trained + judging) * saves + total * finished + judging) / _MIB
    folder = Path(setup.output_dir)
    # a resumed or overwritten run takes the place of the weights that lie there
    replaced = sum(p.stat().st_size for p in folder.rglob("*.safetensors"))
    free = (free_bytes(folder) + replaced) / _MIB
    beside = f" and the critic's {judging:,}" if judging else ""
    what = (f"about {need:,.0f} MiB are needed (checkpoints: {saves} x {trained:,} trained parameters{beside} and "
            f"their moments, finished models: {finished} x {total:,}{beside}), {free:,.0f} MiB are there")
    if free < need:
        return Finding("fault", "disk", what, f"free {need - free:,.0f} MiB, give an output_dir on another disk, or "
                       "lower train.save_total_limit")
    return Finding("ok", "disk", what)


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
