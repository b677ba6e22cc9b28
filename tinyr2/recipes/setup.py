"""What the training verbs share: device and determinism chosen once, models, state, and the way to a finished run."""

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from tinyr2.core.errors import ConfigError
from tinyr2.core.rng import derive
from tinyr2.models.load import (
    HeldDType,
    LoraConfig,
    ModelConfig,
    add_lora,
    context_length,
    load_model,
    pick_device,
    save_model,
)
from tinyr2.recipes.run import Run
from tinyr2.rollouts.sample import Policy
from tinyr2.tokens.chat import stop_ids
from tinyr2.train import state as checkpoint
from tinyr2.train.loop import Job, StepResult, TrainConfig
from tinyr2.train.loop import run as train
from tinyr2.train.optim import make_optimizer
from tinyr2.train.step import Learner


class StudentConfig(ModelConfig):
    """The model that is trained; its weights are float32, on CUDA its products bfloat16."""

    dtype: HeldDType = "float32"
    lora: LoraConfig | None = None  # None: train all parameters


def choose_device(name: str, train_config: TrainConfig) -> torch.device:
    """The run's device; sets threads and, where asked for, exact kernels."""
    if train_config.num_threads:
        torch.set_num_threads(train_config.num_threads)
    if train_config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    return pick_device(name)


def autocast(device: torch.device) -> Callable[[], AbstractContextManager]:
    """bfloat16 products on CUDA; float32 elsewhere."""
    if device.type == "cuda":
        return lambda: torch.autocast("cuda", torch.bfloat16)
    return nullcontext


def load_student(config: StudentConfig, device: torch.device, seed: int) -> nn.Module:
    """The student, adapters on it where the config asks for them."""
    model = load_model(config, device)
    if config.lora is None:
        return model.requires_grad_(True).train()
    return add_lora(model, config.lora, derive(seed, "lora")).to(device).train()


def policy_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase, vocab: int, version: int = 0) -> Policy:
    """A model that can write."""
    generation = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    return Policy(model=model, tokenizer=tokenizer, stop=stop_ids(tokenizer, eos), vocab=vocab,
                  context=context_length(model.config), version=version)


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


def restore(run: Run, model: nn.Module, train_config: TrainConfig, identity: dict[str, str],
            resume: bool) -> checkpoint.TrainState:
    """A fresh state, or that of the newest good checkpoint; the journals are cut back to it."""
    if train_config.deterministic:
        identity = {**identity, "torch": torch.__version__, "threads": str(torch.get_num_threads()),
                    "device": next(model.parameters()).device.type}
    state = checkpoint.TrainState(model=model, optimizer=make_optimizer(model, train_config), identity=identity)
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
    return Learner(model=model, vocab=vocab, autocast=autocast(device),
                   tokens_per_micro_batch=train_config.tokens_per_micro_batch)


def carry_out(run: Run, work: Work, state: checkpoint.TrainState, *, tokenizer: PreTrainedTokenizerBase,
              train_config: TrainConfig, evaluates: bool) -> dict:
    """Train from where `state` stands to the end, write the model and the report; returns what `--json` prints."""
    job = Job(config=train_config, compute=work.step, recorder=run, checkpoints=run.checkpoints,
              evaluate=work.evaluate if evaluates else None,
              keep_best=lambda: run.commit("best", lambda folder: save_model(state.model, tokenizer, folder)))
    ending = train_to_end(run, state, job, tokenizer)
    report = run.finish(ending)
    return {"ending": ending, "step": state.step, "num_tokens": state.num_tokens, "run": str(run.folder),
            "model": str(run.folder / "final"), "report": str(report)}


def train_to_end(run: Run, state: checkpoint.TrainState, job: Job, tokenizer: PreTrainedTokenizerBase) -> str:
    """Train, write `final/`, and say how it ended."""
    ending = train(state, job)
    if ending == "finished":
        if job.config.load_best_model_at_end:
            run.commit("final", lambda folder: shutil.copytree(run.folder / "best", folder))
        else:
            run.commit("final", lambda folder: save_model(state.model, tokenizer, folder))
    return ending


def shared_vocabulary(student: int, teacher: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """The ids that both models have. A padded vocabulary is longer than its tokenizer; that is allowed."""
    vocab = min(student, teacher)
    longest = max(tokenizer.get_vocab().values()) + 1
    if vocab < longest:
        raise ConfigError(f"the tokenizer has {longest} ids, the models hold {student} and {teacher}: the smaller one "
                          "lacks tokens; take models and tokenizer that belong together")
    return vocab
