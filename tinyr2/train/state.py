"""Checkpoints: the whole state of a training run, out to a folder and back, bit for bit.

In: a `TrainState` between two optimizer steps, and the run's `checkpoints/`. Out: `checkpoints/step-00000012/` with
model.safetensors, optimizer.safetensors, state.json and manifest.json; or the state, as the newest good folder has it.

What is not kept, because it has no state: randomness (derived, core/rng.py), learning rates (functions of the step),
gradients (a checkpoint lies between steps). What is not copied but named in `identity`: frozen weights, data, config.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tinyr2.core.errors import RunError
from tinyr2.core.files import commit_folder, free_bytes, sync_folder, verify_folder

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
SCHEMA = 1  # of state.json
HEADROOM = 1.2  # free space asked for, as a multiple of what will be written
CURE = "resume with the version that wrote it, or start a new run"
TMP = ".tmp-"  # a folder of this name belongs to an attempt under way, or to a dead one


class CheckpointSkipped(RunError):
    """A save that the disk did not take. Every checkpoint that was good still is, and training may go on."""


@dataclass(kw_only=True)
class TrainState:
    """All that changes while a run trains, and what must not change.

    The optimizer follows torch.optim in two things: `param_groups`, and `state`, a live mapping from parameter to
    slots: what is written there, its step reads. Every other field is plain JSON: str, int, float, bool, None, lists,
    and dicts with str keys.

    TrainState(model=model, optimizer=optimizer, identity={"config": "9f2c…", "data": "17ab…"})
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0  # optimizer steps finished
    num_tokens: int = 0  # tokens trained on
    logs: dict[str, int] = field(default_factory=dict)  # append-only file, from the run folder -> bytes that count
    monitor: dict[str, Any] = field(default_factory=dict)  # what the health monitor remembers
    identity: dict[str, str] = field(default_factory=dict)  # fact -> fingerprint; another one is refused at load


PLAIN = tuple(f.name for f in fields(TrainState) if f.name not in ("model", "optimizer"))


def save(checkpoints: Path, state: TrainState, *, keep: int = 2) -> Path:
    """Write the state to `checkpoints/step-XXXXXXXX`, then remove all but the newest `keep` verified ones.

    A step that stands there already, unharmed, is not written again: the same steps of the same run gave it. Raises
    CheckpointSkipped when the disk is too full, fails or refuses; RunError when the step there is another run's.
    """
    assert keep >= 1, f"keep={keep} would delete the checkpoint that was just written"
    final = checkpoints / f"step-{state.step:08d}"
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        _sweep(checkpoints)
        if not _stands(final, state):
            _write(final, state)
        _rotate(checkpoints, final, keep)
    except (OSError, SafetensorError) as error:
        _sweep(checkpoints)
        raise CheckpointSkipped(f"{final}: saving stopped: {error}. The checkpoints that were good still are; free "
                                "some disk space or mend the disk before the next save") from error
    return final


def load(checkpoints: Path, state: TrainState, *, say: Callable[[str], None]) -> Path | None:
    """Put the newest good checkpoint into `state`, in place, and return its folder; None where there is none.

    A folder that is not as it was written is renamed to `step-XXXXXXXX.corrupt`, `say` tells why, and the one before
    is tried. Raises RunError, with `state` untouched, when the checkpoint is whole but does not fit: another identity,
    other tensors, or a field that is not there.
    """
    _sweep(checkpoints)
    folders = _newest_first(checkpoints)
    for folder in folders:
        faults = verify_folder(folder)
        if not faults:
            _restore(folder, state)
            return folder
        aside = _set_aside(folder)
        say(f"{folder.name} is damaged and set aside as {aside}: {'; '.join(faults)}. Trying the one before; delete "
            "the folder when you have looked at it")
    if folders:
        say(f"{checkpoints}: no good checkpoint is left, {len(folders)} were damaged; starting from the beginning")
    return None


def _newest_first(checkpoints: Path) -> list[Path]:
    steps = {int(m[1]): p for p in checkpoints.glob("step-*") if (m := re.fullmatch(r"step-(\d{8,})", p.name))}
    return [steps[step] for step in sorted(steps, reverse=True)]


def _sweep(checkpoints: Path) -> None:
    for path in checkpoints.glob(f"{TMP}*"):
        shutil.rmtree(path, ignore_errors=True)  # what resists is tried again at the next save


def _set_aside(folder: Path) -> Path:
    aside, n = folder.with_name(f"{folder.name}.corrupt"), 1
    while aside.exists():
        aside, n = folder.with_name(f"{folder.name}.corrupt.{n}"), n + 1
    os.rename(folder, aside)
    sync_folder(folder.parent)
    return aside


def _rotate(checkpoints: Path, fresh: Path, keep: int) -> None:
    """Remove what is older than the newest `keep` good ones; `fresh`, known to be good, is never read nor removed."""
    good = 0
    for folder in _newest_first(checkpoints):
        if folder == fresh or (good < keep and not verify_folder(folder)):
            good += 1
        elif good >= keep:
            # Renamed first, so that a deletion cut short never looks like a damaged checkpoint.
            doomed = checkpoints / f"{TMP}old-{folder.name}-{uuid4().hex}"
            os.rename(folder, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _stands(final: Path, state: TrainState) -> bool:
    """Whether this step of this run is there already and good; a damaged one is moved out of the way."""
    if not final.exists():
        return False
    if verify_folder(final):
        _set_aside(final)
        return False
    _require_identity(_read_json(final), state.identity, final)
    return True


def _write(final: Path, state: TrainState) -> None:
    model = _model_tensors(state.model)
    optimizer, record = _pack_optimizer(state)
    plain = {name: getattr(state, name) for name in PLAIN}
    text = json.dumps({"schema": SCHEMA, **plain, "optimizer": record})
    back = json.loads(text)
    assert repr(plain) == repr({name: back[name] for name in PLAIN}), f"would not come back as it is: {plain}"
    size = len(text) + sum(t.numel() * t.element_size() for t in (*model.values(), *optimizer.values()))
    free = free_bytes(final.parent)
    if free < HEADROOM * size:
        raise CheckpointSkipped(f"{final}: not saved: {HEADROOM * size / 2**20:.1f} MiB are needed, {free / 2**20:.1f} "
                                "MiB are free. The checkpoints before it are untouched; free some disk space")
    tmp = final.with_name(f"{TMP}{state.step}-{uuid4().hex}")
    tmp.mkdir()
    for tensors, name in ((model, MODEL), (optimizer, OPTIMIZER)):
        save_file({key: t.detach().contiguous() for key, t in tensors.items()}, tmp / name)
    with open(tmp / STATE, "x", encoding="utf-8") as file:
        file.write(text)
    commit_folder(tmp, final)


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters and persistent buffers by name, tied ones once. The tensors are the model's own."""
    persistent = model.state_dict(keep_vars=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return trained | {name: b for name, b in model.named_buffers() if name in persistent}


def _pack_optimizer(state: TrainState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's tensors by "slot/parameter", and a JSON record of everything else.

    The record keeps, for each parameter, `values` (slots that are no tensors) and `tensors`: slot -> None where it
    lies beside its parameter, or the kind of device where it does not (AdamW counts its steps on the CPU).
    """
    names = {p: name for name, p in state.model.named_parameters()}
    groups = [{"params": [names[p] for p in group["params"]], "settings": _settings(group)}
              for group in state.optimizer.param_groups]
    tensors, slots = {}, {}
    for p, kept in state.optimizer.state.items():
        here = slots[names[p]] = {"tensors": {}, "values": {}}
        for slot, value in kept.items():
            if not isinstance(value, Tensor):
                here["values"][slot] = value
                continue
            here["tensors"][slot] = None if value.device == p.device else value.device.type
            tensors[f"{slot}/{names[p]}"] = value
    return tensors, {"groups": groups, "slots": slots}


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """A group's hyperparameters. Functions stay behind: they belong to the code, and the config names it."""
    kept = {k: v for k, v in group.items() if k != "params" and not callable(v)}
    return {k: v.item() if isinstance(v, Tensor) else v for k, v in kept.items()}


def _restore(folder: Path, state: TrainState) -> None:
    """Check everything, then change everything: a checkpoint that does not fit leaves `state` as it was."""
    saved = _read_json(folder)
    _require_identity(saved, state.identity, folder)
    model, stored = _model_tensors(state.model), load_file(folder / MODEL)
    _require_tensors(stored, model, folder / MODEL)
    record, slots = saved["optimizer"], load_file(folder / OPTIMIZER)
    _require_optimizer(record, slots, state, folder)
    with torch.no_grad():
        for name, tensor in model.items():
            tensor.copy_(stored[name])
        _fill_optimizer(record, slots, state)
    for name in PLAIN:
        setattr(state, name, saved[name])


def _read_json(folder: Path) -> dict[str, Any]:
    saved = json.loads((folder / STATE).read_text(encoding="utf-8"))
    _require_fields(saved, ("schema", *PLAIN, "optimizer"), folder)
    if saved["schema"] != SCHEMA:
        raise RunError(f"{folder / STATE}: schema {saved['schema']!r}, this version reads {SCHEMA}; {CURE}")
    _require_fields(saved["optimizer"], ("groups", "slots"), folder, "optimizer.")
    for i, group in enumerate(saved["optimizer"]["groups"]):
        _require_fields(group, ("params", "settings"), folder, f"optimizer.groups[{i}].")
    for name, kept in saved["optimizer"]["slots"].items():
        _require_fields(kept, ("tensors", "values"), folder, f"optimizer.slots[{name}].")
    return saved


def _require_fields(mapping: dict[str, Any], names: Iterable[str], folder: Path, prefix: str = "") -> None:
    lacking = [prefix + name for name in names if name not in mapping]
    if lacking:
        raise RunError(f"{folder / STATE}: {', '.join(lacking)} missing; {CURE}")


def _require_identity(saved: dict[str, Any], now: dict[str, str], folder: Path) -> None:
    was = saved["identity"]
    changed = [f"{k}: {was.get(k)!r} in the checkpoint, {now.get(k)!r} now"
               for k in sorted(was.keys() | now.keys()) if was.get(k) != now.get(k)]
    if changed:
        raise RunError(f"{folder}: belongs to another run: {'; '.join(changed)}. Give the run what it was started "
                       "with, or start a new one in another folder")


def _require_tensors(stored: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> None:
    lacking, extra = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    faults = [f"{len(names)} {what}, e.g. {names[0]}" for names, what in
              ((lacking, "missing tensors"), (extra, "tensors that nothing here has")) if names]
    for name in wanted.keys() & stored.keys():
        was, now = ((t.dtype, tuple(t.shape)) for t in (stored[name], wanted[name]))
        if was != now:
            faults.append(f"{name} is {was[0]} {was[1]} there and {now[0]} {now[1]} here")
    if faults:
        raise RunError(f"{path}: does not fit the model: {'; '.join(sorted(faults)[:3])}. Use the model and the "
                       "settings that the run was started with")


def _require_optimizer(record: dict[str, Any], slots: dict[str, Tensor], state: TrainState, folder: Path) -> None:
    names = {p: name for name, p in state.model.named_parameters()}
    for i, (group, kept) in enumerate(zip(state.optimizer.param_groups, record["groups"], strict=False)):
        _require_fields(kept["settings"], _settings(group), folder, f"optimizer.groups[{i}].settings.")
    was = [group["params"] for group in record["groups"]]
    now = [[names[p] for p in group["params"]] for group in state.optimizer.param_groups]
    if was != now:
        raise RunError(f"{folder / STATE}: the optimizer's groups hold {[len(g) for g in was]} parameters there, "
                       f"{[len(g) for g in now]} here, or others; use the settings that the run was started with")
    listed = {f"{slot}/{name}" for name, kept in record["slots"].items() for slot in kept["tensors"]}
    if listed != slots.keys():
        odd = sorted(listed ^ slots.keys())
        raise RunError(f"{folder / OPTIMIZER}: {len(odd)} tensors missing, or not in {STATE}, e.g. {odd[0]}; {CURE}")


def _fill_optimizer(record: dict[str, Any], slots: dict[str, Tensor], state: TrainState) -> None:
    """Not `load_state_dict`: it casts the slots to the parameter's dtype, and joined optimizers have none."""
    for group, kept in zip(state.optimizer.param_groups, record["groups"], strict=True):
        for name, value in kept["settings"].items():
            now = group.get(name)
            if isinstance(now, Tensor):
                now.fill_(value)
            else:
                group[name] = tuple(value) if isinstance(now, tuple) else value  # JSON has no tuples
    named, target = dict(state.model.named_parameters()), state.optimizer.state
    target.clear()
    for name, kept in record["slots"].items():
        p = named[name]
        filled = {slot: _beside(p, slots[f"{slot}/{name}"], device) for slot, device in kept["tensors"].items()}
        target[p] = filled | kept["values"]
    assert len(state.optimizer.state) == len(record["slots"]), "optimizer.state is a copy, not what its step reads"


def _beside(p: Tensor, stored: Tensor, device: str | None) -> Tensor:
    """A copy in memory of its own (a mapped file is neither aligned nor ours), laid out like the parameter."""
    if stored.shape == p.shape and device is None:
        return torch.empty_like(p, dtype=stored.dtype, requires_grad=False).copy_(stored)
    return torch.empty_like(stored, device=device or p.device).copy_(stored)
