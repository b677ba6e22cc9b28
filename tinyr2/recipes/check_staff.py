"""What a distillation run asks of its teachers, and some of them cannot do: found once their tokenizers are read.

In: the config, and of each teacher its files. Out: faults, each with its cure.
"""

from collections.abc import Iterator, Sequence

from tinyr2.core.config import nearest
from tinyr2.core.errors import ConfigError, DataError, UserError
from tinyr2.core.types import Message, Problem, Rollout
from tinyr2.data.retrieval import Corpus, Retriever
from tinyr2.models.load import ModelConfig, context_length, load_config, load_tokenizer
from tinyr2.recipes.check_data import ids_of, looked_at
from tinyr2.recipes.distill_config import DistillConfig, Signal, TeacherConfig
from tinyr2.recipes.findings import Finding, ModelFiles, Part, fault_of
from tinyr2.teachers.privileged import Retrieve, privilege_faults, privileged_messages
from tinyr2.tokens.chat import render_prompt
from tinyr2.tokens.translate import Translator

SPOKEN = ("exact", "chunk", "chunk_debiased")  # signals of log-probs alone


def check_staff(config: DistillConfig, files: Sequence[ModelFiles | None], student: ModelFiles,
                part: Part) -> Iterator[Finding]:
    """Faults of all teachers; files: None for the student itself, and for an endpoint that writes."""
    yield from _check_tasks(config, part)
    for teacher, own in zip(config.staff, files, strict=True):
        retrieve = None
        if teacher.privilege is not None:
            found, retrieve = _check_privilege(teacher, part)
            yield from found
        yield from _check_ignored(teacher, own, student)
        yield from _check_papers(config, teacher, student if own is None else own, part, retrieve)
        if own is not None and own.translated:
            yield from _check_translated(config, teacher)
            yield from _check_roles(teacher, student, own)
        if _speaks(config, teacher, own) and config.loss.divergence.kind != "reverse_kl":
            yield Finding("fault", f"{teacher.name}.signal", "log-probs of tokens or spans estimate the reverse KL, "
                          f"and loss.divergence is {config.loss.divergence.kind}", "set "
                          "loss.divergence.kind=reverse_kl, or a signal of distributions (marginal, mapped; "
                          "server.top_k)")
        if _speaks(config, teacher, own) and config.rollout.lmbda < 1:
            yield Finding("fault", f"{teacher.name}.signal", "log-probs of tokens or spans teach by a policy gradient, "
                          "which needs what the student itself sampled", "set rollout.lmbda=1, or a signal of "
                          "distributions (marginal, mapped; server.top_k)")


def signal_of(teacher: TeacherConfig, config: DistillConfig) -> Signal:
    """What a teacher with another tokenizer says, where the config leaves it open; ConfigError where it cannot."""
    sampled = config.loss.estimator == "sampled"
    if teacher.signal in ("mapped", "marginal") and sampled:
        raise ConfigError(f"{teacher.name}.signal: {teacher.signal} compares distributions, and loss.estimator: "
                          "sampled does not; set loss.estimator=full, or the signal to chunk")
    if teacher.signal != "auto":
        return teacher.signal
    return "chunk" if teacher.server is not None or sampled else "marginal"


def _speaks(config: DistillConfig, teacher: TeacherConfig, own: ModelFiles | None) -> bool:
    """Whether it gives nothing but log-probs of what was sampled."""
    if teacher.server is not None:
        return teacher.server.top_k == 0
    return own is not None and own.translated and teacher.signal in SPOKEN


def _check_tasks(config: DistillConfig, part: Part) -> Iterator[Finding]:
    """Whether each teacher's tasks are there, and each task has a teacher."""
    if not part.problems:
        return
    there = sorted({p.task for p in part.problems})
    for teacher in config.staff:
        for task in sorted({*(teacher.tasks or ())} - {*there}):
            hint = nearest(task, there)
            cure = f"did you mean {hint!r}? " if hint else ""
            yield Finding("fault", f"{teacher.name}.tasks", f"no problem of {part.path} has the task {task!r}",
                          f"{cure}the tasks there: {', '.join(there)}")
    if any(t.tasks is None for t in config.staff):
        return
    judged = {task for t in config.staff for task in t.tasks}
    left = [p for p in part.problems if p.task not in judged]
    if left:
        yield Finding("warn", "teachers.tasks", f"no teacher judges {len(left):,} of {len(part.problems):,} problems "
                      f"({', '.join(sorted({p.task for p in left}))}): answers to them teach nothing",
                      f"add their tasks to a teacher's, or drop these rows of {part.path}")


def _check_ignored(teacher: TeacherConfig, own: ModelFiles | None, student: ModelFiles) -> Iterator[Finding]:
    """Settings that would change nothing."""
    read = own is None or None not in (own.tokenizer, student.tokenizer)
    if read and not (own is not None and own.translated):
        same = "the teacher has the student's own vocabulary, where every token is compared with itself"
        if teacher.signal != "auto":
            yield Finding("fault", f"{teacher.name}.signal", f"{teacher.signal} would be ignored: {same}",
                          "leave signal out")
        if teacher.roles:
            yield Finding("fault", f"{teacher.name}.roles", f"they would be ignored: {same}", "leave roles out")
    if teacher.tail != "bucket" and (teacher.server is None or teacher.server.top_k == 0):
        yield Finding("fault", f"{teacher.name}.tail", f"{teacher.tail} would be ignored: it is about the tokens that "
                      "a server's list leaves out", "leave tail out, or set server.top_k to 20 or so")


def _check_privilege(teacher: TeacherConfig, part: Part) -> tuple[list[Finding], Retrieve | None]:
    """What is wrong, and what finds passages for a first look, where that can be known."""
    key, shown, found = f"{teacher.name}.privilege", teacher.privilege, []
    try:
        faults = privilege_faults(part.problems, shown) if part.problems else []
    except DataError as error:
        return [fault_of(key, error)], None
    for fault in faults:
        what, _, cure = fault.partition("; ")
        found.append(Finding("fault", key, what, cure))
    if "passages" not in shown.shows:
        return found, None
    try:
        retrieve = Retriever(Corpus.read(shown.corpus)).texts
    except UserError as error:
        return [*found, fault_of(f"{key}.corpus", error)], None
    if shown.embedder is not None:
        source = ModelConfig(path=shown.embedder)
        try:
            load_config(source), load_tokenizer(source)
        except UserError as error:
            found.append(fault_of(f"{key}.embedder", error))
    return found, retrieve


def _check_papers(config: DistillConfig, teacher: TeacherConfig, reader: ModelFiles, part: Part,
                  retrieve: Retrieve | None) -> Iterator[Finding]:
    """Whether prompts that are not the student's fit into the teacher's context, and whether an answer does besides.

    reader: whose context and tokenizer it is, the student's where the teacher is the student itself
    """
    context = None if reader.config is None else context_length(reader.config)
    rows = _papers(teacher, reader, part, retrieve)
    if context is None or not rows:
        return
    seen = f"of {len(rows):,} prompts, as the teacher reads them,"
    less = "show less in privilege, " if teacher.privilege is not None else ""
    cure = f"{less}drop these rows of {part.path}, or take a teacher with a longer context"
    full = [(n, p) for n, p in rows if n >= context]
    if full:
        yield Finding("fault", f"{teacher.name}.prompts", f"{len(full):,} {seen} leave no room in its context "
                      f"({context:,} tokens); the longest has {max(n for n, _ in full):,} "
                      f"({ids_of([p for _, p in full])})", cure)
    if part.answer_limit is None or config.method == "data" or config.rollout.lmbda == 0:
        return
    key, limit = part.answer_limit
    tight = [(n, p) for n, p in rows if n < context < n + limit]
    if tight:
        longest = max(n for n, _ in tight)
        yield Finding("warn", f"{teacher.name}.room", f"{len(tight):,} {seen} and {key} ({limit:,}) are more than its "
                      f"context ({context:,} tokens; {ids_of([p for _, p in tight])}), and an answer that does not fit "
                      "gets no judgment", f"set {key} to {context - longest} or less, {cure}")


def _papers(teacher: TeacherConfig, reader: ModelFiles, part: Part,
            retrieve: Retrieve | None) -> list[tuple[int, Problem]]:
    """The lengths of the prompts that it reads; none where they are the student's, or a fault keeps them from being."""
    shown = teacher.privilege
    if reader.tokenizer is None or (shown is None and not reader.own_prompt and not reader.translated):
        return []
    if shown is not None and "passages" in shown.shows and retrieve is None:
        return []
    judged = [p for p in looked_at(part) if teacher.tasks is None or p.task in teacher.tasks]
    try:
        return [(len(render_prompt(reader.tokenizer, _told(p, teacher, retrieve))), p) for p in judged]
    except DataError:  # of a template that is missing, or of a column; told elsewhere
        return []


def _told(problem: Problem, teacher: TeacherConfig, retrieve: Retrieve | None) -> tuple[Message, ...]:
    """What the teacher reads before an answer, as far as it can be known before there is one."""
    if teacher.privilege is None:
        return problem.messages
    none = Rollout(problem=problem, group=0, sample=0, author="student", prompt_ids=(), response_ids=(), finish="stop")
    return privileged_messages(none, (), teacher.privilege, retrieve) or problem.messages


def _check_translated(config: DistillConfig, teacher: TeacherConfig) -> Iterator[Finding]:
    key, has = f"{teacher.name}.tokenizer", "the teacher has another vocabulary than the student, and "
    cases = (
        (config.hidden is not None, "hidden compares layers token by token", "leave hidden out"),
        (config.rollout.num_teacher_generations > 0, "what it writes would be read as the student's ids",
         "set rollout.num_teacher_generations=0, or method: data, which goes by text"),
        (config.panel.combine != "sum", f"panel.combine: {config.panel.combine} blends distributions over one "
         "vocabulary", "set panel.combine=sum"),
        (config.kd is not None and (config.kd.by == "entropy" or teacher.signal in SPOKEN),
         "kd compares whole distributions", "set kd.by=fixed or linear, and the signal to marginal"),
        (teacher.server is not None and teacher.server.top_k > 0, "server.top_k lists tokens of that vocabulary",
         "set server.top_k to 0: the log-probs of spans are compared"),
    )
    for wrong, what, cure in cases:
        if wrong:
            yield Finding("fault", key, has + what, cure)
    try:
        signal_of(teacher, config)
    except ConfigError as error:
        yield fault_of(f"{teacher.name}.signal", error)


def _check_roles(teacher: TeacherConfig, student: ModelFiles, own: ModelFiles) -> Iterator[Finding]:
    if not teacher.roles:
        return
    try:
        _ = Translator(student.tokenizer, own.tokenizer, teacher.roles).roles
    except UserError as error:
        yield fault_of(f"{teacher.name}.roles", error)
