"""`tinyr2 distill`: the student writes, teachers judge, the student learns.

In: a config. Out: a run folder whose `final/` is the student as a plain Hugging Face folder.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from tinyr2.core.types import Problem
from tinyr2.data.problems import fingerprint as data_fingerprint
from tinyr2.data.retrieval import Corpus
from tinyr2.eval.suite import EvalConfig, evaluate
from tinyr2.models.load import ModelConfig, load_model, save_model
from tinyr2.recipes import setup
from tinyr2.recipes.check_staff import check_staff
from tinyr2.recipes.data_distillation import Writer, distill_data, local_writer
from tinyr2.recipes.distill_config import DistillConfig, TeacherConfig
from tinyr2.recipes.distillation import Distillation
from tinyr2.recipes.findings import ModelFiles, Part, Reader, Setup
from tinyr2.recipes.hiring import files_of, hire_staff, load_teachers, worse_teachers
from tinyr2.recipes.inputs import Inputs, checked_inputs
from tinyr2.recipes.run import identity, open_run, refuse_own_input, refuse_taken
from tinyr2.recipes.serving import ANSWERS, Scribe, meet_servers
from tinyr2.recipes.sft import read_mixture
from tinyr2.recipes.show import completions_of
from tinyr2.report.console import Console
from tinyr2.rewards.grade import load_rewards
from tinyr2.rollouts.sample import Policy
from tinyr2.teachers.local import Teacher
from tinyr2.tokens.chat import fingerprint, vocabulary_faults
from tinyr2.train.guard import guarded
from tinyr2.train.hidden import layer_map
from tinyr2.train.loop import TrainConfig


def read_setup(config: DistillConfig) -> Setup:
    """Tokenizers, model configs, data and rewards; what cannot be read is a fault in the setup."""
    reader = Reader()
    student = reader.model("student", config.student)
    teachers = [files for i, t in enumerate(config.staff) if t.has_files
                for files in (_teacher_files(reader, t, "teacher" if config.teacher else f"teachers.{i}", student),)]
    rewards = reader.read("rewards", lambda: load_rewards(config.rewards)) or []
    parts = [_trained_on(reader, config, student)]
    if config.eval_data is not None:
        parts.append(Part(
            key="eval_data", path=config.eval_data.source, problems=reader.problems("eval_data", config.eval_data),
            answer_limit=("eval.max_completion_length", config.eval.max_completion_length), rewards=config.rewards,
            wanted=config.eval.num_problems if config.rewards else None))
    if config.hidden is not None and student.config is not None and teachers[0].config is not None:
        layers = [m.config.get_text_config().num_hidden_layers for m in (student, teachers[0])]
        reader.read("hidden.layers", lambda: layer_map(config.hidden.layers, *layers))
    files = iter(teachers)
    own = [next(files) if t.has_files else None for t in config.staff]
    faults = [*reader.faults, *check_staff(config, own, student, parts[0])]
    return Setup(student=student, teachers=tuple(teachers), parts=tuple(parts), rewards=tuple(rewards),
                 train=config.train, evaluates=len(parts) > 1 and bool(config.rewards or config.eval_kl_problems),
                 device=config.device, output_dir=config.output_dir, unread=tuple(faults))


def _trained_on(reader: Reader, config: DistillConfig, student: ModelFiles) -> Part:
    """The problems, and what the run does with them."""
    if config.mixture is not None:
        part = read_mixture(reader, config.mixture, student)
    else:
        part = Part(key="data", path=config.data.source, problems=reader.problems("data", config.data))
    if config.method == "data":
        wanted = config.data_distillation
        return replace(part, rewards=config.rewards, answer_limit=(
            "data_distillation.max_completion_length", wanted.max_completion_length))
    return replace(part, completions="needed" if config.rollout.lmbda < 1 else "ignored",
                   answer_limit=("rollout.max_completion_length", config.rollout.max_completion_length),
                   rewards=config.rewards if config.loss.level == "sequence" else ())


def _teacher_files(reader: Reader, teacher: TeacherConfig, key: str, student: ModelFiles) -> ModelFiles:
    """A teacher's config and tokenizer; of a server its tokenizer alone."""
    if teacher.server is None:
        files = reader.model(key, teacher.model)
    else:
        source = ModelConfig(path=teacher.server.tokenizer)
        files = ModelFiles(key=key, source=source, config=None, tokenizer=reader.tokenizer(key, source.path))
    known = student.tokenizer is not None and files.tokenizer is not None
    translated = known and bool(vocabulary_faults(student.tokenizer, files.tokenizer))
    return ModelFiles(key=key, source=files.source, config=files.config, tokenizer=files.tokenizer,
                      own_prompt=teacher.prompt == "own", translated=translated)


def distill(config: DistillConfig, console: Console, *, resume: bool = False, overwrite: bool = False) -> dict:
    """Run it; returns what `--json` prints."""
    refuse_taken(Path(config.output_dir), resume=resume, overwrite=overwrite)
    if overwrite:
        shown = [t.privilege for t in config.staff if t.privilege is not None]
        refuse_own_input(Path(config.output_dir), [
            config.student.path, *(t.path for t in config.staff if t.path), *config.trained_on.files,
            *(path for p in shown for path in (p.corpus, p.embedder) if path)])
    found = read_setup(config)
    inputs = checked_inputs(found, console)
    if config.method == "data":
        meet_servers(config, files_of(config, found), config.teaching_temperature)
        writer = _writer(config, found, inputs)
        if config.compare_problems and inputs.rewards and inputs.held_out:
            console.note(f"{config.staff[0].name} is not compared with the student before the first step: the rewards "
                         "judge each answer that it writes")
        return distill_data(config, inputs, writer, console, resume=resume, overwrite=overwrite)
    return _distill_on_policy(config, found, inputs, console, resume=resume, overwrite=overwrite)


def _distill_on_policy(config: DistillConfig, found: Setup, inputs: Inputs, console: Console, *, resume: bool,
                       overwrite: bool) -> dict:
    train = guarded_train(config, inputs)
    device = setup.choose_device(config.device, config.train)
    # before the folder is made: weights that cannot be read, adapters that fit nothing, or servers that are others
    # leave no run behind
    model = setup.load_student(config.student, device, config.train.seed)
    learner = setup.learner_of(model, inputs.vocab, device, config.train)
    student = setup.policy_of(model, inputs.tokenizer, inputs.vocab, exact=config.train.deterministic,
                              dtype=setup.decode_dtype(config.rollout.dtype, learner))
    teachers = load_teachers(config, found, inputs, device)
    meet_servers(config, files_of(config, found), config.teaching_temperature)
    if not resume:
        _compare(config, found, inputs, student, teachers, console)
    with open_run(config, "distill", console, total=train.max_steps, resume=resume, overwrite=overwrite,
                  show=lambda step, result: completions_of(step, result, inputs.tokenizer)) as run:
        staff = hire_staff(config, found, inputs, learner, run.folder / ANSWERS, teachers)
        try:
            run.at_end(partial(staff.tell, run))
            work = Distillation(config, inputs, staff, learner, student)
            module, optimizer = staff.pupil(model, config)
            state = setup.restore(run, module, train, _identity(config, found, inputs), resume, optimizer)
            return setup.carry_out(run, work, state, train_config=train, evaluates=bool(inputs.held_out),
                                   save=partial(save_model, model, inputs.tokenizer))
        finally:
            staff.close()


def guarded_train(config: DistillConfig, inputs: Inputs) -> TrainConfig:
    """The training config, with the guard's alarm where there is a guard."""
    guard = config.guarding
    if guard is None:
        return config.train
    return guarded(config.train, guard, evaluates=bool(inputs.held_out and inputs.rewards))


def _writer(config: DistillConfig, found: Setup, inputs: Inputs) -> Writer:
    """Who writes for data distillation."""
    (teacher,), choices = config.staff, config.data_distillation
    if teacher.chat is not None:
        return Scribe(teacher, choices, config.train.seed, inputs, Path(config.output_dir)).writer
    writer = local_writer(teacher.model, choices, config.train.seed, setup.choose_device(config.device, config.train))
    return replace(writer, facts={**writer.facts, "teacher_tokenizer": fingerprint(found.teachers[0].tokenizer)})


def _compare(config: DistillConfig, found: Setup, inputs: Inputs, student: Policy, loaded: Mapping[str, Teacher],
             console: Console) -> None:
    """Held-out problems, answered by the student and by each teacher that can answer them; worse ones are told of.

    Those that are not `loaded` are read for this, and given back.
    """
    if not (config.compare_problems and inputs.rewards and inputs.held_out):
        return
    left_out = []
    for teacher, files in zip(config.staff, files_of(config, found), strict=True):
        problems = [p for p in inputs.held_out if teacher.tasks is None or p.task in teacher.tasks]
        reason = _incomparable(teacher, problems)
        if reason is not None:
            left_out.append(f"{teacher.name} ({reason})")
            continue
        model = loaded[teacher.name].model if loaded else load_model(teacher.model, next(
            student.model.parameters()).device)
        size = model.config.get_text_config().vocab_size
        policy = setup.policy_of(model, files.tokenizer, setup.shared_vocabulary(size, size, files.tokenizer))
        theirs = _solved(policy, problems[:config.compare_problems], inputs, config.eval)
        ours = _solved(replace(student), problems[:config.compare_problems], inputs, config.eval)
        console.note(f"{teacher.name} solves {theirs:.1%} of {len(problems[:config.compare_problems])} held-out "
                     f"problems, the student {ours:.1%}")
        for warning in worse_teachers({teacher.name: theirs}, ours):
            console.note(f"warning: {warning}")
    if left_out:
        console.note(f"not compared with the student before the first step: {', '.join(left_out)}")


def _incomparable(teacher: TeacherConfig, problems: list[Problem]) -> str | None:
    """Why its own answers to held-out problems would say nothing, or cannot be had; None where they can."""
    if teacher.privilege is not None:
        return "it judges by what the problems do not say"
    if teacher.path is None:
        return "the student itself" if teacher.ema is not None else "a server that scores, and does not write"
    return None if problems else "no held-out problem is of its tasks"


def _solved(policy: Policy, problems: list[Problem], inputs: Inputs, config: EvalConfig) -> float:
    greedy = config.model_copy(update={"num_generations": 1, "k": (1,), "num_problems": None, "temperature": 0.0})
    with torch.no_grad():
        return evaluate(policy, problems, inputs.rewards, greedy).pass_at[1].value


def _identity(config: DistillConfig, found: Setup, inputs: Inputs) -> dict[str, str]:
    # a server may have moved; its weights are known by its journal
    teachers = ",".join(setup.model_fingerprint(t.path) if t.path else t.server.model if t.server else t.source
                        for t in config.staff)
    tokenizers = ",".join(fingerprint(m.tokenizer) for m in found.teachers)
    shown = [t.privilege for t in config.staff if t.privilege is not None and t.privilege.corpus is not None]
    corpora = ",".join(Corpus.read(p.corpus).fingerprint + (setup.model_fingerprint(p.embedder) if p.embedder else "")
                       for p in shown)
    return {"config": identity(config), "data": data_fingerprint(inputs.problems),
            "eval_data": data_fingerprint(inputs.held_out),
            "tokenizer": fingerprint(inputs.tokenizer), "student": setup.model_fingerprint(config.student.path),
            "teacher": teachers, "teacher_tokenizers": tokenizers, "corpora": corpora,
            "rewards": setup.code_fingerprint([r.file for r in config.rewards if r.file])}
