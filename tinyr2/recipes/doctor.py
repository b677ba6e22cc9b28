"""`tinyr2 doctor`: the machine, and every mistake in a config that can be found before any compute.

In: nothing, or the config of a training verb. Out: the machine and the findings, as lines and as JSON.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch  # describe_machine lists accelerators only where torch is loaded

from tinyr2.core import config as configs
from tinyr2.core.errors import ConfigError, RunError
from tinyr2.recipes import distill, sft
from tinyr2.recipes.checks import check_training
from tinyr2.recipes.findings import Finding, fault_of
from tinyr2.recipes.machine import describe_machine
from tinyr2.recipes.run import refuse_taken
from tinyr2.report.console import Console

_MARK = {"ok": "ok   ", "warn": "warn ", "fault": "FAULT"}


def doctor(config: str | Path | None, overrides: Sequence[str], console: Console) -> dict[str, Any]:
    """Look, and print what was found; returns what `--json` prints. Any `faults` make an exit code of 2.

    ConfigError where the config itself cannot be read, as from any verb.
    """
    settings = read_config(config, overrides) if config is not None else None
    machine = describe_machine(settings.output_dir if settings is not None else ".")
    machine["threads"] = torch.get_num_threads()
    for line in machine_lines(machine):
        console.note(line)
    findings = examine(settings) if settings is not None else []
    for finding in findings:
        console.note(as_line(finding))
    faults, warnings = (sum(f.level == level for f in findings) for level in ("fault", "warn"))
    if settings is not None:
        console.note(f"{config}: faults {faults}, warnings {warnings}")
    return {"config": None if config is None else str(config), "machine": machine, "faults": faults,
            "warnings": warnings, "findings": [asdict(f) for f in findings]}


def read_config(path: str | Path, overrides: Sequence[str]) -> distill.DistillConfig | sft.SftConfig:
    """The config of the training verb that its keys are for."""
    raw = configs.read(path, tuple(overrides))
    if "student" in raw:
        return configs.build(distill.DistillConfig, raw, str(path))
    if "model" in raw:
        return configs.build(sft.SftConfig, raw, str(path))
    raise ConfigError(f"{path}: neither a config for distill (no key `student`) nor one for sft (no key `model`), it "
                      f"has {', '.join(map(str, raw)) or 'no keys'}; give the file that `tinyr2 distill` or "
                      "`tinyr2 sft` would be given")


def examine(settings: distill.DistillConfig | sft.SftConfig) -> list[Finding]:
    """All that is well, doubtful or wrong with a run of these settings."""
    recipe = distill if isinstance(settings, distill.DistillConfig) else sft
    return [*_taken(Path(settings.output_dir)), *check_training(recipe.read_setup(settings))]


def as_line(finding: Finding) -> str:
    """A finding for a person to read."""
    cure = f" -> {finding.cure}" if finding.cure else ""
    return f"{_MARK[finding.level]} {finding.name}: {finding.what}{cure}"


def machine_lines(machine: Mapping[str, Any]) -> list[str]:
    """What `describe_machine` found, for a person to read; what the machine does not tell is left out."""
    cpu, memory = machine["cpu"], machine["memory"]
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in machine["versions"].items())
    instructions = f"; {', '.join(cpu['instructions'])}" if cpu["instructions"] else ""
    gpus = ", ".join(f"{d['name']} ({d['memory_mib']:,} MiB, compute capability {d['capability']})"
                     for d in machine["cuda"] or ())
    known = [f"{memory[key]:,} MiB {name}" for key, name in (
        ("total_mib", "in all"), ("available_mib", "free"), ("limit_mib", "granted to this container"))
        if memory[key] is not None]
    return [
        f"python {machine['python']} on {machine['platform']}",
        f"versions: {versions}",
        f"processor: {cpu['model'] or 'unknown'}, {cpu['cores_usable']} of {cpu['cores']} cores usable, "
        f"{machine['threads']} threads{instructions}",
        f"accelerator: {gpus or ('Apple GPU (mps)' if machine['mps'] else 'none')}",
        *([f"memory: {', '.join(known)}"] if known else []),
        f"disk: {machine['disk_free_mib']:,} MiB free",
        *(f"{name}={value}" for name, value in machine["environment"].items()),
    ]


def _taken(folder: Path) -> list[Finding]:
    if not folder.is_dir():
        return []
    try:
        refuse_taken(folder, resume=False, overwrite=False)
    except RunError as error:
        fault = fault_of("output_dir", error)
        return [Finding("warn", fault.name, fault.what, fault.cure)]
    return []
