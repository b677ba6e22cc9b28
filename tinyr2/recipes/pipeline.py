"""`tinyr2 pipeline`: several stages in one file, each a run of its own, that hand over models and data.

In: a config that lists stages; `stage:NAME` in the settings of one stands for what an earlier one made. Out: a folder
with a run folder for each stage, `pipeline.json` (what is finished, and what it was made of), a table of all models on
held-out problems, and a page that links to the stages' own.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from typing import Any

from pydantic import Field, model_validator

from tinyr2.core import config as configs
from tinyr2.core.config import Config, nearest
from tinyr2.core.errors import ConfigError, DataError, RunError
from tinyr2.core.files import single_writer, write_atomic
from tinyr2.eval.suite import EvalConfig, evaluate
from tinyr2.models.load import ModelConfig, count_parameters, load_model, load_tokenizer, pick_device
from tinyr2.recipes.child import Ended, run_in_child
from tinyr2.recipes.mix import Sources, load_all
from tinyr2.recipes.run import (
    CONFIG,
    ENV,
    Run,
    changed_settings,
    clear_run,
    refuse_own_input,
    refuse_taken,
    write_env,
)
from tinyr2.recipes.setup import policy_of, shared_vocabulary
from tinyr2.recipes.stages import (
    NO_MODEL,
    Stage,
    StageConfig,
    Verbs,
    carry_out,
    check_sources,
    fingerprint,
    plan,
    referring,
)
from tinyr2.report.console import Console
from tinyr2.report.run import read_run
from tinyr2.report.table import result_table
from tinyr2.rewards.grade import RewardConfig, load_rewards

LEDGER = "pipeline.json"
GENERATED = "num_generated_tokens"  # the metric, a sum over the steps so far
_CURE = ("--overwrite makes everything anew, another output_dir keeps both, and once the folders of that stage and the "
         "later ones are deleted, --resume makes those anew")


class CompareConfig(Config):
    """On what the models are compared at the end, and which; by default all that a stage trained to answer."""

    data: Sources
    # where there are several, the mean of each has a column; one of weight 0 is shown, and decides nothing
    rewards: tuple[RewardConfig, ...] = (RewardConfig(name="exact_answer"),)
    eval: EvalConfig = EvalConfig()
    models: tuple[str, ...] | None = None  # names of stages
    device: str = "auto"


class PipelineConfig(Config):
    """Everything that `tinyr2 pipeline` can be told."""

    output_dir: str
    seed: int = 0  # of every stage that names none
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    compare: CompareConfig | None = None

    @model_validator(mode="after")
    def _names_fit(self) -> "PipelineConfig":
        names = [stage.name for stage in self.stages]
        folded = [name.casefold() for name in names]  # some disks do not tell case
        twice = next((name for name, fold in zip(names, folded, strict=True) if folded.count(fold) > 1), None)
        if twice is not None:
            raise ValueError(f"stages: two are called {twice!r}; a name is a folder's, rename one")
        for name in self.compare.models or () if self.compare else ():
            if name not in names:
                hint = nearest(name, names)
                raise ValueError(f"compare.models: no stage {name!r}; {f'did you mean {hint!r}? ' if hint else ''}"
                                 f"there are {', '.join(names)}")
        return self


class Ledger:
    """pipeline.json: which stages are finished, what each was made of and what it gave; and what was measured."""

    def __init__(self, folder: Path):
        self._path = folder / LEDGER
        try:
            raw = json.loads(self._path.read_text(encoding="utf-8")) if self._path.is_file() else {}
            self.stages: dict[str, dict[str, Any]] = dict(raw.get("stages", {}))
            self.measured: dict[str, dict[str, Any]] = dict(raw.get("measured", {}))
        except (ValueError, AttributeError) as error:
            raise DataError(f"{self._path}: damaged ({error}); restore it, or start anew with --overwrite") from error

    def write(self) -> None:
        """On the disk, all at once."""
        text = json.dumps({"stages": self.stages, "measured": self.measured}, indent=1)
        write_atomic(self._path, text + "\n")

    def is_finished(self, stage: Stage) -> bool:
        """Whether the stage came to its end, and what it made is still there."""
        return stage.name in self.stages and stage.product.exists()

    def refuse_changed(self, stage: Stage) -> None:
        """RunError where a finished stage is asked for with other settings, or what it read has become another."""
        entry = self.stages[stage.name]
        changed = changed_settings({"verb": entry["verb"]} | entry["settings"], {"verb": stage.verb} | stage.settings)
        now = {name: fingerprint(path) for name, path in stage.inputs.items()}
        changed += [f"{name}: {entry['inputs'].get(name)} before, {found} now (its fingerprint)"
                    for name, found in now.items() if found is not None and found != entry["inputs"].get(name)]
        if changed:
            raise RunError(f"stage {stage.name} is finished, and made of something else: {'; '.join(changed)}; {_CURE}")


def pipeline(config: PipelineConfig, console: Console, verbs: Verbs, *, resume: bool = False,
             overwrite: bool = False) -> dict:
    """Run what is not finished, in order, then compare; returns what `--json` prints.

    verbs: the training verbs by name, as `tinyr2 runs resume` has them; build, data and reject are known here. A stage
    that stops (a signal) or halts (an alarm) ends the pipeline with its word; `resume` goes on in the middle of it.
    KeyboardInterrupt where a signal met a stage that had nothing to save.
    """
    out = Path(config.output_dir)
    refuse_taken(out, resume=resume, overwrite=overwrite)
    stages = plan(config.stages, out, config.seed, verbs)
    comparison = read_comparison(config, stages)
    if overwrite:
        refuse_own_input(out, [n for s in stages for n in s.inputs if not n.startswith("stage:")])
    to_do = {f"stage {s.name}": s.config for s in (_to_do(Ledger(out), stages) if resume else stages)}
    check_sources(to_do | ({"compare": comparison[0]} if comparison[0] else {}), out)
    with _opened(config, console, resume=resume, overwrite=overwrite) as run:
        ledger = Ledger(out)
        left = _to_do(ledger, stages)
        for number, stage in enumerate(stages, 1):
            where = f"stage {number}/{len(stages)}, {stage.name}"
            if stage not in left:
                ledger.refuse_changed(stage)  # again: an earlier one may have been made anew
                console.note(f"{where}: finished already")
                continue
            console.note(f"{where}: {stage.verb}")
            early = _one(run, ledger, stage)
            if early is not None:
                return early
        return _finish(run, ledger, stages, _measure_all(run, ledger, stages, comparison))


def _to_do(ledger: Ledger, stages: list[Stage]) -> list[Stage]:
    """The stages that are not finished; RunError where one that is finished has changed."""
    finished = [stage for stage in stages if ledger.is_finished(stage)]
    for stage in finished:
        ledger.refuse_changed(stage)
    return [stage for stage in stages if stage not in finished]


def read_comparison(config: PipelineConfig, stages: list[Stage]) -> tuple[CompareConfig | None, dict[str, Path]]:
    """The comparison with references replaced, and what it reads; ConfigError where a stage makes no model."""
    if config.compare is None:
        return None, {}
    products = {stage.name: (stage.verb, stage.folder) for stage in stages}
    compare, inputs = referring(CompareConfig, config.compare.model_dump(mode="json"), products, "compare")
    for stage in stages:
        if stage.name in (compare.models or ()) and stage.verb in NO_MODEL:
            raise ConfigError(f"compare.models: {stage.name}: {stage.verb} makes no model that answers; leave it out")
    return compare, inputs


@contextmanager
def _opened(config: PipelineConfig, console: Console, *, resume: bool, overwrite: bool) -> Iterator[Run]:
    """The pipeline's folder, held until the block ends. Settings of stages to come may differ from the ones before."""
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with single_writer(folder):
        if overwrite:
            clear_run(folder)
        write_atomic(folder / CONFIG, configs.dump(config))
        if not resume or not (folder / ENV).is_file():
            write_env(folder, "pipeline")
        for leftover in folder.glob(".*.tmp"):  # of a kill while something was written
            rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        run = Run(folder, console, total=len(config.stages), show=None)
        try:
            if resume:
                run.event("resumed")
            yield run
        finally:
            run.close()


def _one(run: Run, ledger: Ledger, stage: Stage) -> dict | None:
    """Run one stage in a child process and note its end; None, or, where the pipeline ends with it, its result."""
    inputs = {name: fingerprint(path) for name, path in stage.inputs.items()}
    ended = run_in_child(carry_out, stage, json_mode=run.console.json_mode)
    told = _told(run, ended, f"stage {stage.name}")
    ending = told.get("ending", "finished")
    run.event("stage", stage=stage.name, verb=stage.verb, ending=ending)
    if ending == "finished":
        ledger.stages[stage.name] = {"verb": stage.verb, "settings": stage.settings, "inputs": inputs,
                                     "made": fingerprint(stage.product), "result": told, **_costs(stage, told)}
        ledger.write()
        if not ended.interrupted:
            return None
        ending = "stopped"
    run.console.note(f"{ending} in stage {stage.name}; the same command with --resume goes on from there")
    report = run.finish(ending)
    return {"ending": ending, "stage": stage.name, "step": told.get("step", 0), "run": str(run.folder),
            "report": str(report)}


def _told(run: Run, ended: Ended, what: str) -> dict:
    """What a child returned. KeyboardInterrupt where a signal ended it, RunError where it failed."""
    if ended.fault is None:
        return ended.value
    how = "the same command with --resume goes on from there"
    run.event("failed", what=what, fault=ended.fault)
    if ended.interrupted:
        run.console.note(f"{what} {ended.fault}; {how}")
        raise KeyboardInterrupt
    raise RunError(f"{what} {ended.fault}; once that is mended, {how}")


def _costs(stage: Stage, told: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of work, those before a resume included, and the tokens that were sampled, where they are counted."""
    if not (stage.folder / CONFIG).is_file():
        return {"seconds": told.get("seconds"), GENERATED: None}
    view = read_run(stage.folder)
    counted = view.curves.get(GENERATED)
    return {"seconds": view.seconds, GENERATED: int(counted[-1][1]) if counted else None}


def _measure_all(run: Run, ledger: Ledger, stages: list[Stage],
                 comparison: tuple[CompareConfig | None, Mapping[str, Path]]) -> dict[str, dict[str, Any]]:
    """By stage, what its model does on the held-out problems; measured once for each model and comparison."""
    compare, inputs = comparison
    if compare is None:
        return {}
    data = {name: fingerprint(path) for name, path in inputs.items()}
    settings = compare.model_dump(mode="json", exclude={"models"})
    rows = {}
    for stage in stages:
        if not _is_compared(compare, stage):
            continue
        made_of = json.dumps([fingerprint(stage.product), settings, data], sort_keys=True)
        key = hashlib.sha256(made_of.encode()).hexdigest()[:16]
        if key not in ledger.measured:
            run.console.note(f"measuring {stage.name}")
            ended = run_in_child(measure, str(stage.product), compare, json_mode=run.console.json_mode)
            ledger.measured[key] = _told(run, ended, f"measuring {stage.name}")
            ledger.write()
        rows[stage.name] = ledger.measured[key]
    return rows


def _is_compared(compare: CompareConfig, stage: Stage) -> bool:
    if compare.models is None:
        return stage.verb not in (*NO_MODEL, "build")  # what has random weights is no news
    return stage.name in compare.models


def measure(path: str, compare: CompareConfig, console: Console) -> dict[str, Any]:
    """A model folder's row of the table. What a child process does."""
    source, device = ModelConfig(path=path), pick_device(compare.device)
    model, tokenizer = load_model(source, device), load_tokenizer(source)
    size = model.config.get_text_config().vocab_size
    rewards = load_rewards(compare.rewards, max_completion_length=compare.eval.max_completion_length)
    result = evaluate(policy_of(model, tokenizer, shared_vocabulary(size, size, tokenizer)), load_all(compare.data),
                      rewards, compare.eval)
    for error in result.errors:
        console.note(f"not graded: {error}")
    found = result.pass_at.get(1)
    parts = result.parts if len(rewards) > 1 else {}
    return {"params": count_parameters(model)[0], "pass_at_1": found and found.value, "low": found and found.low,
            "high": found and found.high, "n": found.n if found else 0, "mean_length": result.mean_length, **parts}


def _finish(run: Run, ledger: Ledger, stages: list[Stage], measured: Mapping[str, Mapping[str, Any]]) -> dict:
    """The table of all stages, result.json and the page."""
    figures = list(dict.fromkeys(name for row in measured.values() for name in row))
    rows = {}
    for stage in stages:
        entry, found = ledger.stages[stage.name], measured.get(stage.name, {})
        rows[stage.name] = ({"verb": stage.verb} | {name: found.get(name) for name in figures}
                            | {name: entry[name] for name in ("seconds", GENERATED)})
    result = {"rows": rows, "seconds": round(sum(row["seconds"] or 0.0 for row in rows.values()), 1),
              "reports": {s.name: f"{s.name}/report.html" for s in stages if (s.folder / "report.html").is_file()}}
    write_atomic(run.folder / "result.json", json.dumps(result, indent=2) + "\n")
    run.console.table(result_table(rows, title=run.folder.name))
    report = run.finish("finished")
    return {"ending": "finished", "step": len(stages), "run": str(run.folder), "report": str(report), **result}
