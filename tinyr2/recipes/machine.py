"""What a run stands on: processor, memory, disk, versions, accelerators, settings, commit.

In: the folder that runs are written to. Out: a dict that JSON can hold, for `env.json` and `tinyr2 doctor`. What the
machine does not tell is None. Environment variables are named one by one, so a secret cannot slip in.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("tinyr2", "torch", "transformers", "tokenizers", "safetensors", "datasets", "peft", "pydantic", "numpy")
_SETTINGS = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME", "TOKENIZERS_PARALLELISM",
             "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG",
             "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTHONHASHSEED")
_SECRETS = ("HF_TOKEN", "WANDB_API_KEY")  # said to be set, never shown
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16",  # x86
                 "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2")  # ARM
_MIB = 2**20


def describe_machine(folder: str | Path = ".") -> dict[str, Any]:
    """The machine as it is now; `folder` (which need not exist yet) says which disk is meant.

    Memory and disk in MiB. Imports nothing heavy: `cuda` and `mps` are None where torch is not imported yet.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "memory": _memory(),
        "disk_free_mib": _disk_free(Path(folder)),
        "versions": {name: _version(name) for name in _PACKAGES},
        **_accelerators(),
        "environment": _environment(),
        "git_commit": _git_commit(),
    }


def _cpu() -> dict[str, Any]:
    """Model, cores of the machine, cores that this process may use, and instruction sets that matter to torch."""
    text = _read("/proc/cpuinfo")
    if text is None and sys.platform == "darwin":
        model, instructions = _output("sysctl", "-n", "machdep.cpu.brand_string"), None
    else:
        model, instructions = _parse_cpuinfo(text or "")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"model": model or platform.processor() or None, "cores": os.cpu_count(), "cores_usable": usable,
            "cores_quota": _parse_cpu_quota(_read("/sys/fs/cgroup/cpu.max")), "instructions": instructions}


def _parse_cpuinfo(text: str) -> tuple[str | None, list[str] | None]:
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    known = set(flags[1].split()) if flags else None
    return (model[1].strip() if model else None,
            None if known is None else [name for name in _INSTRUCTIONS if name in known])


def _parse_cpu_quota(text: str | None) -> float | None:
    """The cores that a container's `cpu.max` ("200000 100000") grants; None: no limit."""
    quota, _, period = (text or "").partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.strip().isdigit() else None


def _memory() -> dict[str, int | None]:
    """Of the whole machine; `limit_mib` is a container's, None where there is none."""
    total, available = _parse_meminfo(_read("/proc/meminfo") or "")
    if total is None and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _MIB
    limit = (_read("/sys/fs/cgroup/memory.max") or "").strip()
    return {"total_mib": total, "available_mib": available,
            "limit_mib": int(limit) // _MIB if limit.isdigit() else None}


def _parse_meminfo(text: str) -> tuple[int | None, int | None]:
    mib = {key: int(kib) // 1024 for key, kib in re.findall(r"^(\w+):\s*(\d+) kB$", text, re.MULTILINE)}
    return mib.get("MemTotal"), mib.get("MemAvailable")


def _disk_free(folder: Path) -> int:
    folder = folder.absolute()
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free // _MIB


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _accelerators() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    if torch is None:
        return {"cuda": None, "mps": None}
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    cuda = [{"name": d.name, "memory_mib": d.total_memory // _MIB, "capability": f"{d.major}.{d.minor}"}
            for d in devices]
    return {"cuda": cuda, "mps": torch.backends.mps.is_available()}


def _environment() -> dict[str, str]:
    shown = {name: os.environ[name] for name in _SETTINGS if name in os.environ}
    return shown | {name: "set (not shown)" for name in _SECRETS if os.environ.get(name)}


def _git_commit() -> str | None:
    return _output("git", "rev-parse", "--verify", "HEAD")


def _output(*command: str) -> str | None:
    """What a small command prints; None where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=2, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return None
