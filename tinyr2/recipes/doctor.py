"""`tinyr2 doctor`: the machine, and every mistake in a config that can be found before any compute.

In: nothing, or the config of a training verb or of a pipeline. Out: the machine and the findings, as lines and as JSON.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch  # describe_machine lists accelerators only where torch is loaded

from tinyr2.core import config as configs
from tinyr2.core.config import Config
from tinyr2.core.errors import ConfigError, RunError
from tinyr2.recipes import distill, dpo, reinforce, rm, sft
from tinyr2.recipes.checks import check_training
from tinyr2.recipes.findings import Finding, Setup, fault_of
from tinyr2.recipes.machine import describe_machine
from tinyr2.recipes.pipeline import PipelineConfig, read_comparison
from tinyr2.recipes.run import refuse_taken
from tinyr2.recipes.stages import PAIRED, Stage, Verbs, check_sources, plan
from tinyr2.report.console import Console

_READ: Mapping[type[Config], Callable[[Any], Setup]] = {
    sft.SftConfig: sft.read_setup, distill.DistillConfig: distill.read_setup,
    reinforce.ReinforceConfig: reinforce.read_setup, dpo.DpoConfig: dpo.read_setup,
    rm.RewardModelConfig: rm.read_setup}
_MARK = {"ok": "ok   ", "warn": "warn ", "fault": "FAULT"}


def doctor(config: str | Path | None, overrides: Sequence[str], console: Console, verbs: Verbs) -> dict[str, Any]:
    """Look, and print what was found; returns what `--json` prints. Any `faults` make an exit code of 2.

    verbs: the training verbs by name. ConfigError where the config itself cannot be read, as from any verb.
    """
    settings = read_config(config, overrides, verbs) if config is not None else None
    machine = describe_machine(settings.output_dir if settings is not None else ".")
    machine["threads"] = torch.get_num_threads()
    for line in machine_lines(machine):
        console.note(line)
    findings = examine(settings, verbs) if settings is not None else []
    for finding in findings:
        console.note(as_line(finding))
    faults, warnings = (sum(f.level == level for f in findings) for level in ("fault", "warn"))
    if settings is not None:
        console.note(f"{config}: faults {faults}, warnings {warnings}")
    return {"config": None if config is None else str(config), "machine": machine, "faults": faults,
            "warnings": warnings, "findings": [asdict(f) for f in findings]}


def read_config(path: str | Path, overrides: Sequence[str], verbs: Verbs) -> Config:
    """The config of the verb that its keys are for."""
    raw = configs.read(path, tuple(overrides))
    verb = verb_of(raw)
    if verb is None:
        raise ConfigError(f"{path}: a config for no verb (no key `student`, as distill has, no key `model`, as sft and "
                          f"reinforce have, no key `stages`, as pipeline has), it has "
                          f"{', '.join(map(str, raw)) or 'no keys'}; give the file that `tinyr2 sft`, `tinyr2 "
                          "distill`, `tinyr2 reinforce` or `tinyr2 pipeline` would be given")
    return configs.build(PipelineConfig if verb == "pipeline" else verbs[verb][0], raw, str(path))


def verb_of(raw: Mapping[str, Any]) -> str | None:
    """The verb that a config's keys are for; None where there is none."""
    if "stages" in raw:
        return "pipeline"
    if "student" in raw:
        return "distill"
    if raw.get("algorithm") in PAIRED:
        return raw["algorithm"]
    if "model" not in raw and "algorithm" not in raw:
        return None
    # what sft has too tells nothing: both have a model, data and rewards
    own = reinforce.ReinforceConfig.model_fields.keys() - sft.SftConfig.model_fields.keys()
    return "reinforce" if own & raw.keys() else "sft"


def examine(settings: Config, verbs: Verbs) -> list[Finding]:
    """All that is well, doubtful or wrong with a run of these settings."""
    taken = _taken(Path(settings.output_dir))
    if isinstance(settings, PipelineConfig):
        return [*taken, *examine_pipeline(settings, verbs)]
    return [*taken, *check_training(_READ[type(settings)](settings))]


def examine_pipeline(settings: PipelineConfig, verbs: Verbs) -> list[Finding]:
    """The stages' settings, and of each stage all that does not wait for what an earlier one makes."""
    out = Path(settings.output_dir)
    try:
        stages = plan(settings.stages, out, settings.seed, verbs)
        compare, _ = read_comparison(settings, stages)
    except ConfigError as error:
        return _split(error)
    ready = [stage for stage in stages if type(stage.config) in _READ and not _waits_for(stage)]
    rest = {f"stage {stage.name}": stage.config for stage in stages if stage not in ready}
    found = []
    try:
        check_sources(rest | ({"compare": compare} if compare is not None else {}), out)
    except ConfigError as error:
        found += _split(error)
    for stage in stages:
        name = f"stage {stage.name}"
        if stage in ready:
            found += [replace(f, name=f"{name}: {f.name}") for f in check_training(_READ[type(stage.config)](
                stage.config))]
        elif name not in [f.name for f in found]:
            waits = _waits_for(stage)
            later = f"; the rest is checked once {', '.join(waits)} is there" if waits else ""
            found.append(Finding("ok", name, f"the settings of {stage.verb} fit{later}"))
    return found


def _waits_for(stage: Stage) -> list[str]:
    return [name for name, path in stage.inputs.items() if not path.exists()]


def _split(error: ConfigError) -> list[Finding]:
    """A finding for each of the faults of an error that names several: a line each, or indented below who has them."""
    found, where = [], ""
    for line in str(error).splitlines():
        if line.endswith(":"):
            where = line[:-1]
            continue
        name, _, text = (where, "", line.strip()) if line.startswith(" ") else line.partition(": ")
        what, _, cure = text.partition("; ")
        found.append(Finding("fault", name, what, cure))
    return found


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
