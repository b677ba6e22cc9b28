"""Data distillation: a teacher writes, the rewards filter, and the student is fine-tuned on what is kept.

In: a checked config and a writer. Out: one run folder with the written chunks (`parts/`), what was kept of them
(`data.jsonl`, `written.json`), and `final/`, the student. Teacher and student need no common tokenizer: the student
reads the teacher's text in its own template. After Kim and Rush 2016 (1606.07947), Section 3.2, and DeepSeek-R1
(2501.12948), Section 2.4.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import Field

from tinyr2.core.errors import DataError
from tinyr2.core.files import write_atomic
from tinyr2.core.rng import derive
from tinyr2.core.types import Message, Rollout
from tinyr2.data.problems import DataConfig, load_problems
from tinyr2.data.problems import fingerprint as data_fingerprint
from tinyr2.eval.suite import EvalConfig
from tinyr2.models.load import ModelConfig, context_length, load_model, load_tokenizer, save_model
from tinyr2.recipes import setup
from tinyr2.recipes.answers import Answering, AnswersConfig, Write, answered, chunks, joined
from tinyr2.recipes.inputs import Inputs
from tinyr2.recipes.mix import DATA, write_rows
from tinyr2.recipes.run import Run, identity, open_run
from tinyr2.recipes.sft import FineTuning, SftConfig
from tinyr2.recipes.show import completions_of
from tinyr2.report.completions import Completion
from tinyr2.report.console import Console
from tinyr2.rewards.grade import RewardConfig
from tinyr2.rollouts.sample import sample
from tinyr2.tokens.chat import fingerprint, render_example
from tinyr2.train.loop import StepResult, TrainConfig

WRITTEN = "written.json"


class DataDistillationConfig(AnswersConfig):
    """Data distillation: the teacher writes, the rewards filter, and the student is fine-tuned on what is kept.

    `max_tokens` counts as the student's tokenizer does. Without rewards every answer that came to its end is right:
    sequence-level distillation (Kim and Rush 2016, 1606.07947, Section 3.2).
    """

    examples_per_step: int = Field(16, ge=1)  # of the fine-tuning


class Told(Protocol):
    """What the config of the whole run says; it is saved with the run."""

    student: setup.StudentConfig
    data: DataConfig
    eval_data: DataConfig | None
    rewards: tuple[RewardConfig, ...]
    data_distillation: DataDistillationConfig
    train: TrainConfig
    eval: EvalConfig
    device: str
    output_dir: str


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Who writes: a model in this process, or a server."""

    name: str  # what messages call it
    facts: Mapping[str, str]  # what tells it from another: what it wrote is not gone on with by another one
    open: Callable[[], Write]  # called once, where there is something left to write
    close: Callable[[Run], None] = lambda run: None  # called once, when the run ends or breaks off


def local_writer(model: ModelConfig, choices: DataDistillationConfig, seed: int, device: torch.device) -> Writer:
    """A model folder as writer, in its own tokenizer and template; its weights are read when it has to write."""

    def load() -> Write:
        tokenizer, weights = load_tokenizer(model), load_model(model, device)
        size = weights.config.get_text_config().vocab_size
        policy = setup.policy_of(weights, tokenizer, setup.shared_vocabulary(size, size, tokenizer))
        return partial(sample, policy, n=choices.num_generations, sampling=choices, author="teacher",
                       seed=derive(seed, "data distillation"), max_rows=choices.max_rows)

    return Writer(name=model.path, facts={"teacher": setup.model_fingerprint(model.path)}, open=load)


def distill_data(told: Told, inputs: Inputs, writer: Writer, console: Console, *, resume: bool = False,
                 overwrite: bool = False) -> dict[str, Any]:
    """Write, filter, fine-tune; returns what `--json` prints. One seed gives the same data and the same student.

    inputs: the student's tokenizer, the problems, the loaded rewards, what is held out; all of it checked. DataError
    where nothing that was written could be kept.
    """
    device = setup.choose_device(told.device, told.train)
    # before the folder is made: weights that cannot be read, or adapters that fit nothing, leave no run behind
    model = setup.load_student(told.student, device, told.train.seed)
    size = model.config.get_text_config().vocab_size
    inputs = replace(inputs, vocab=setup.shared_vocabulary(size, size, inputs.tokenizer))
    with open_run(told, "distill", console, total=told.train.max_steps, resume=resume, overwrite=overwrite,
                  show=partial(_shown, inputs)) as run:
        run.at_end(partial(writer.close, run))
        written = _write(run, told, inputs, writer, context_length(model.config))
        inputs = replace(inputs, problems=load_problems(DataConfig(path=str(run.folder / DATA))))
        facts = {"config": identity(told), "data": data_fingerprint(inputs.problems),
                 "eval_data": data_fingerprint(inputs.held_out), "tokenizer": fingerprint(inputs.tokenizer),
                 "student": setup.model_fingerprint(told.student.path)}
        state = setup.restore(run, model, told.train, facts, resume)
        if state.step == 0:
            run.event("written", **written)
        work = FineTuning(_tuning(told), inputs, setup.learner_of(model, inputs.vocab, device, told.train))
        return setup.carry_out(run, work, state, train_config=told.train, evaluates=bool(inputs.held_out),
                               save=partial(save_model, model, inputs.tokenizer)) | {
            "data": str(run.folder / DATA), "written": written}


def _write(run: Run, told: Told, inputs: Inputs, writer: Writer, context: int | None) -> dict[str, Any]:
    """Leave data.jsonl, and written.json with what it comes to, which is returned; no part is written twice."""
    choices, parts = told.data_distillation, []
    work = Answering(config=choices, write=writer.open, rewards=inputs.rewards, seed=told.train.seed,
                     measure=partial(tokens_read, inputs, context))
    facts = {"config": identity(told), "data": data_fingerprint(inputs.problems), **writer.facts,
             "tokenizer": fingerprint(inputs.tokenizer),
             "rewards": setup.code_fingerprint([r.file for r in told.rewards if r.file])}
    if not inputs.rewards:
        run.console.note("no rewards: nothing filters what the teacher writes but its length and its end")
    for i, part in enumerate(answered(run, work, inputs.problems, facts)):
        parts.append(part)
        run.console.progress(i + 1, chunks(inputs.problems, choices), part["metrics"], name="chunk")
    run.console.end_progress()
    found = joined(parts, writer.name)
    counts, kept = found["counts"], len(found["rows"])
    decided = counts["answers"] - counts["undecided"]
    written = {**counts, "kept": kept, "kept_share": kept / counts["answers"],
               "right_share": counts["right"] / max(1, decided) if inputs.rewards else None,
               "seconds": sum(part["seconds"] for part in parts)}
    write_rows(run.folder / DATA, found["rows"])
    write_atomic(run.folder / WRITTEN, json.dumps(written, indent=2) + "\n")
    run.console.note(f"kept {kept:,} of {counts['answers']:,} answers ({counts['num_generated_tokens']:,} tokens), to "
                     f"{counts['solved']:,} of {counts['problems']:,} problems; {counts['too_long']:,} right ones are "
                     "too long for the student")
    return written


def tokens_read(inputs: Inputs, context: int | None, rollout: Rollout) -> int | None:
    """The tokens of an answer as the student reads it; None where its template or its context cannot hold it whole."""
    try:
        prompt, response = render_example(inputs.tokenizer, rollout.problem.messages,
                                          (Message("assistant", rollout.text),))
    except DataError:  # the problem alone was rendered by the checks, so this answer's text is what does not fit
        return None
    return None if context is not None and len(prompt) + len(response) > context else len(response)


def _shown(inputs: Inputs, step: int, result: StepResult) -> list[Completion]:
    """What the teacher wrote, in tokens as the student reads it."""
    encode = partial(inputs.tokenizer.encode, add_special_tokens=False)
    rollouts = [replace(r, response_ids=tuple(encode(r.text or "")), actor_logp=None) for r in result.rollouts]
    return completions_of(step, replace(result, rollouts=rollouts), inputs.tokenizer)


def _tuning(told: Told) -> SftConfig:
    """The fine-tuning as `tinyr2 sft` has it."""
    return SftConfig(model=told.student, data=DataConfig(path=str(Path(told.output_dir) / DATA)),
                     eval_data=told.eval_data, rewards=told.rewards, train=told.train, eval=told.eval,
                     examples_per_step=told.data_distillation.examples_per_step, device=told.device,
                     output_dir=told.output_dir)
