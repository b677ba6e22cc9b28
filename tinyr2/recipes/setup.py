"""What the training verbs share: device and determinism chosen once, models, state, and the way to a finished run."""

import hashlib
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal, Protocol

import torch
from pydantic import Field, model_validator
from torch import nn
from transformers import PreTrainedTokenizerBase

from tinyr2.core.errors import ConfigError
from tinyr2.core.rng import derive
from tinyr2.models.decode import supports_decoding
from tinyr2.models.load import (
    HeldDType,
    LoraConfig,
    ModelConfig,
    add_lora,
    context_length,
    load_model,
    pick_device,
)
from tinyr2.recipes.run import Run
from tinyr2.rollouts.sample import Policy, Resident
from tinyr2.rollouts.sampling import SamplingConfig
from tinyr2.tokens.chat import stop_ids
from tinyr2.train import state as checkpoint
from tinyr2.train.loop import Job, StepResult, TrainConfig
from tinyr2.train.loop import run as train
from tinyr2.train.optim import Offloaded, Optimizer, make_optimizer
from tinyr2.train.step import Learner

DecodeDType = Literal["auto", "float32", "bfloat16"]  # auto: float32 on a CPU, the learner's elsewhere


class StudentConfig(ModelConfig):
    """The model that is trained, its weights in float32 unless `dtype` says otherwise; `train.bf16` is for products."""

    dtype: HeldDType = "float32"
    lora: LoraConfig | None = None  # None: train all parameters


class WritingConfig(SamplingConfig):
    """What a training step writes. It samples from the whole distribution: what is scored must be what was drawn."""

    temperature: float = Field(1.0, gt=0.0)
    prompts_per_step: int = Field(16, ge=1)
    max_rows: int = Field(256, ge=1)  # decoded side by side
    dtype: DecodeDType = "auto"  # of the decode copy

    @model_validator(mode="after")
    def _untruncated(self) -> "WritingConfig":
        if self.truncates:
            raise ValueError("training samples from the whole distribution: top_p must be 1, top_k 0, min_p 0 "
                             "(truncation is for eval)")
        return self


def choose_device(name: str, train_config: TrainConfig) -> torch.device:
    """The run's device; sets threads and, where asked for, exact kernels."""
    if train_config.num_threads:
        torch.set_num_threads(train_config.num_threads)
    if train_config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    device = pick_device(name)
    if train_config.bf16:
        require_bfloat16("train.bf16=true", device, "train.bf16=false")
    if train_config.optim_offload and device.type == "cpu":
        raise ConfigError("train.optim_offload: the model is on the CPU already, so there is nothing to move there; "
                          "set it to false, or give another device")
    return device


def require_bfloat16(setting: str, device: torch.device, cure: str) -> None:
    """ConfigError where bfloat16 would be emulated: slower than float32, and less exact."""
    if device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):  # others have no cheap way to be asked
        return
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        raise ConfigError(f"{setting}: this processor has no instructions for bfloat16 (neither avx512_bf16 nor amx), "
                          f"so float32 is faster, and more exact; set {cure}")


def autocast(device: torch.device, bf16: bool | None = None) -> Callable[[], AbstractContextManager]:
    """bfloat16 products where `bf16` is true, or None and the device CUDA."""
    if device.type == "cuda" if bf16 is None else bf16:
        return lambda: torch.autocast(device.type, torch.bfloat16)
    return nullcontext


def load_student(config: StudentConfig, device: torch.device, seed: int) -> nn.Module:
    """The student, adapters on it where the config asks for them."""
    model = load_model(config, device)
    if config.lora is None:
        return model.requires_grad_(True).train()
    return add_lora(model, config.lora, derive(seed, "lora")).to(device).train()


def decode_dtype(name: DecodeDType, learner: Learner) -> torch.dtype:
    """What the learner's weights are decoded in; ConfigError where class or processor give no choice."""
    learned, device = learner.dtype, next(learner.model.parameters()).device
    if not supports_decoding(learner.model):  # through the stock forward, in the learner's own precision
        if name != "auto" and getattr(torch, name) != learned:
            raise ConfigError(f"rollout.dtype {name}: {type(learner.model).__name__} has no decode copy, so it writes "
                              f"in {str(learned).removeprefix('torch.')}, in which it learns; set rollout.dtype=auto")
        return learned
    if name == "auto":
        return torch.float32 if device.type == "cpu" else learned
    if name == "bfloat16":
        require_bfloat16("rollout.dtype=bfloat16", device, "rollout.dtype=auto")
    return getattr(torch, name)


def policy_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase, vocab: int, version: int = 0, *,
              dtype: torch.dtype | None = None, exact: bool = False) -> Policy:
    """A model that can write. Its decode copy is made when it first writes.

    For a later version, `replace` the policy's: on a CPU that one makes its own copy, and the learner has the memory in
    between; on CUDA the copy stays where it is, with the steps captured from it, and is refreshed.
    dtype: to decode in; None: the model's, or autocast's    exact: what is written beside an answer leaves it as it is
    """
    generation = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    resident = Resident() if next(model.parameters()).device.type == "cuda" else None
    return Policy(model=model, tokenizer=tokenizer, stop=stop_ids(tokenizer, eos), vocab=vocab, resident=resident,
                  context=context_length(model.config), version=version, dtype=dtype, exact=exact)


def model_fingerprint(path: str) -> str:
    """What tells one model folder from another: config and, of each weight file, size, first and last mebibyte.

    A hub name stands for itself.
    """
    folder = Path(path)
    if not folder.is_dir():
        return path
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as f:
            digest.update(f.read(2**20))
            f.seek(max(0, size - 2**20))
            digest.update(f.read(2**20))
    return digest.hexdigest()[:16]


def code_fingerprint(files: Sequence[str]) -> str:
    """Hash of what the user's Python files say."""
    digest = hashlib.sha256()
    for name in files:
        digest.update(Path(name).expanduser().read_bytes())
    return digest.hexdigest()[:16]


def restore(run: Run, model: nn.Module, train_config: TrainConfig, identity: dict[str, str], resume: bool,
            optimizer: Optimizer | Offloaded | None = None) -> checkpoint.TrainState:
    """A fresh state, or that of the newest good checkpoint; the journals are cut back to it."""
    if train_config.deterministic:
        identity = {**identity, "torch": torch.__version__, "threads": str(torch.get_num_threads()),
                    "device": next(model.parameters()).device.type}
    optimizer = make_optimizer(model, train_config) if optimizer is None else optimizer
    state = checkpoint.TrainState(model=model, optimizer=optimizer, identity=identity)
    if resume:
        damaged: list[str] = []
        found = checkpoint.load(run.checkpoints, state, say=damaged.append)
        run.rewind(state.logs)
        for text in damaged:
            run.event("checkpoint_set_aside", step=state.step, level="critical", evidence=text,
                      action="look for a failing disk; the run goes on from the checkpoint before")
        run.event("resumed", step=state.step)
        run.console.note(f"resuming from {found.name}" if found else "no checkpoint yet; starting from the beginning")
    return state


class Work(Protocol):
    """The steps of a run, and what its evaluations say."""

    learner: Learner

    def step(self, t: int) -> StepResult: ...
    def evaluate(self, step: int) -> dict[str, float]: ...


def learner_of(model: nn.Module, vocab: int, device: torch.device, train_config: TrainConfig) -> Learner:
    """The model as the training steps see it."""
    return Learner(model=model, vocab=vocab, autocast=autocast(device, train_config.bf16),
                   tokens_per_micro_batch=train_config.tokens_per_micro_batch,
                   gradient_checkpointing=train_config.gradient_checkpointing)


def carry_out(run: Run, work: Work, state: checkpoint.TrainState, *, train_config: TrainConfig, evaluates: bool,
              save: Callable[[Path], None], beside: Mapping[str, Callable[[Path], None]] | None = None) -> dict:
    """Train from where `state` stands to the end, `save` the model and write the report; what `--json` prints.

    beside: other folders that a finished run has; they stand before the run is called finished
    """
    job = Job(config=train_config, compute=work.step, recorder=run, checkpoints=run.checkpoints,
              evaluate=work.evaluate if evaluates else None, keep_best=lambda: run.commit("best", save))
    ending = train_to_end(run, state, job, save)
    if ending == "finished":
        for name, write in (beside or {}).items():
            run.commit(name, write)
    report = run.finish(ending)
    return {"ending": ending, "step": state.step, "num_tokens": state.num_tokens, "run": str(run.folder),
            "model": str(run.folder / "final"), "report": str(report)}


def train_to_end(run: Run, state: checkpoint.TrainState, job: Job, save: Callable[[Path], None]) -> str:
    """Train, write `final/`, and say how it ended."""
    ending = train(state, job)
    if ending == "finished":
        if job.config.load_best_model_at_end:
            run.commit("final", lambda folder: shutil.copytree(run.folder / "best", folder))
        else:
            run.commit("final", save)
    return ending


def shared_vocabulary(student: int, teacher: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """The ids that both models have. A padded vocabulary is longer than its tokenizer; that is allowed."""
    vocab = min(student, teacher)
    longest = max(tokenizer.get_vocab().values()) + 1
    if vocab < longest:
        raise ConfigError(f"the tokenizer has {longest} ids, the models hold {student} and {teacher}: the smaller one "
                          "lacks tokens; take models and tokenizer that belong together")
    return vocab
