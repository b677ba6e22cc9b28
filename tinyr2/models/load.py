"""Models in and out: stock Hugging Face folders.

In: a folder or hub name, a device, a dtype. Out: a `transformers` causal LM and its tokenizer. Nothing here trusts
remote code or reads pickles.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import Field
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from tinyr2.core.config import Config
from tinyr2.core.errors import ConfigError, DataError

DType = Literal["float32", "bfloat16"]
HeldDType = Literal["auto", "float32", "bfloat16"]  # auto: bfloat16 on CUDA, float32 elsewhere


class LoraConfig(Config):
    """Low-rank adapters (Hu et al. 2021) instead of full training; names are peft's."""

    r: int = Field(16, ge=1)
    lora_alpha: int = Field(32, ge=1)
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    target_modules: str | tuple[str, ...] = "all-linear"


class ModelConfig(Config):
    """A model folder or hub name, and how to hold it."""

    path: str
    revision: str | None = None
    dtype: HeldDType = "auto"


def pick_device(name: str = "auto") -> torch.device:
    """The device that `name` means: auto picks CUDA, then MPS, then the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or not (number or "0").isdigit():
        raise ConfigError(f"device {name}: unknown; use auto, cpu, cuda, cuda:1 or mps")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name}: torch sees no CUDA device here; use device=cpu, or device=auto")
    if kind == "cuda" and number and int(number) >= torch.cuda.device_count():
        raise ConfigError(f"device {name}: torch sees {torch.cuda.device_count()} CUDA devices here, counted from 0; "
                          "use another, or device=auto")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device mps: torch sees no Apple GPU here; use device=cpu, or device=auto")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that `name` means on `device`."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def load_config(config: ModelConfig) -> PretrainedConfig:
    """The model's own config, without its weights; DataError where the folder is not a model."""
    folder = _check_folder(config)
    try:
        return AutoConfig.from_pretrained(folder, revision=config.revision)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise DataError(f"{config.path}: not a model that transformers knows: {_first_line(error)}") from error


def load_model(config: ModelConfig, device: torch.device) -> nn.Module:
    """The causal LM on `device`, in eval mode; DataError where its weights are damaged or not what its config says."""
    return load_as(AutoModelForCausalLM, config, device)


def load_as(kind: type, config: ModelConfig, device: torch.device) -> nn.Module:
    """`load_model` for another of transformers' Auto classes, whose every weight the folder must hold."""
    load_config(config)
    try:
        with _no_bars():
            model, report = kind.from_pretrained(
                _check_folder(config), revision=config.revision, dtype=pick_dtype(config.dtype, device),
                use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # RuntimeError: a tensor of another shape
        raise DataError(f"{config.path}: cannot load its weights: {_first_line(error)}; a model folder holds "
                        "config.json and the *.safetensors that belong to it") from error
    if lacking := sorted(report["missing_keys"]):  # transformers would fill them with random numbers
        raise DataError(f"{config.path}: its weights lack {len(lacking)} tensors that config.json asks for, e.g. "
                        f"{lacking[0]}; save the whole model there, or mend config.json")
    return model.to(device).eval()


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the model."""
    folder = _check_folder(config)
    if Path(folder).is_dir() and not any(Path(folder).glob("tokenizer*")):
        raise DataError(f"{config.path}: a model folder without a tokenizer; save the tokenizer it was trained with "
                        f"there (tokenizer.save_pretrained({config.path!r})), or make one with tinyr2 build")
    try:
        return AutoTokenizer.from_pretrained(folder, revision=config.revision)
    except (OSError, ValueError) as error:
        raise DataError(f"{config.path}: cannot load its tokenizer: {_first_line(error)}") from error


def add_lora(model: nn.Module, lora: LoraConfig, seed: int) -> nn.Module:
    """Wrap `model` in trainable low-rank adapters; its own weights are frozen."""
    import peft

    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    torch.manual_seed(seed)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=lora.r, lora_alpha=lora.lora_alpha,
                               lora_dropout=lora.lora_dropout, target_modules=_modules(lora))
    try:
        wrapped = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(f"lora.target_modules: {_first_line(error)}") from error
    if _adapted(wrapped.get_output_embeddings()):
        raise ConfigError("lora.target_modules takes in the output head; the loss reads the head's own weight, so "
                          "leave lm_head out")
    if tied and _adapted(wrapped.get_input_embeddings()):
        raise ConfigError("lora.target_modules takes in the embeddings, which are the output head too: merging the "
                          "adapter would change both; leave embed_tokens out, or take a model with "
                          "tie_word_embeddings: false")
    return wrapped


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a plain Hugging Face folder; adapters are merged (in float32) into a copy of what they adapt."""
    if hasattr(model, "merge_and_unload"):
        model = _merged(model)
    with _no_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for weights in Path(folder).glob("*.safetensors"):  # written with mode 0600, which other users could not load
        weights.chmod((Path(folder) / "config.json").stat().st_mode & 0o777)


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, dtypes and bytes of all parameters and buffers, tied ones once."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all parameters, those outside the input and output embeddings); tied weights count once."""
    total = sum(p.numel() for p in model.parameters())
    ends = {id(p): p.numel() for m in (model.get_input_embeddings(), model.get_output_embeddings())
            for p in m.parameters()}
    return total, total - sum(ends.values())


def context_length(config: PretrainedConfig) -> int | None:
    """The most tokens a sequence may have, where the config says."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' own progress bars, which would cut through the run's."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _merged(model: nn.Module) -> nn.Module:
    import copy

    merged = copy.deepcopy(model)
    dtype = next(merged.parameters()).dtype
    return merged.float().merge_and_unload().to(dtype)


def _adapted(module: nn.Module) -> bool:
    return any("lora" in name for name, _ in module.named_parameters())


def _modules(lora: LoraConfig) -> str | list[str]:
    return lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)


def _check_folder(config: ModelConfig) -> str:
    path = Path(config.path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise DataError(f"{config.path}: a folder without config.json is not a model; give a Hugging Face model "
                            "folder or a hub name")
    elif path.exists() or config.path.startswith((".", "/", "~")) or config.path.count("/") > 1:
        raise DataError(f"{config.path}: no such model folder; give a Hugging Face model folder or a hub name")
    return config.path


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
