"""What the two sides of a benchmark share: where the peers' scripts lie, and how memory is read."""

import importlib.util
import os
import resource
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent


def peers_folder() -> Path:
    """The folder with the peers' scripts: `bench/` in what TINYR2_SHARED names, by default ../shared."""
    return Path(os.environ.get("TINYR2_SHARED", HERE.parent.parent / "shared")) / "bench"


def load_peer(name: str) -> ModuleType:
    """A peer's script as a module, unchanged: its shapes, lengths and prompts are ours too."""
    spec = importlib.util.spec_from_file_location(name, peers_folder() / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peak_mib() -> int:
    """This process's peak resident memory so far, in MiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
