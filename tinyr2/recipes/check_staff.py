"""What a distillation run asks of its teachers, and some of them cannot do: found once their tokenizers are read.

In: the config, and of each teacher its files. Out: faults, each with its cure.
"""

from collections.abc import Iterator, Sequence

from tinyr2.core.errors import ConfigError, UserError
from tinyr2.data.retrieval import Corpus
from tinyr2.recipes.distill_config import DistillConfig, Signal, TeacherConfig
from tinyr2.recipes.findings import Finding, ModelFiles, Part, fault_of
from tinyr2.teachers.privileged import privilege_faults
from tinyr2.tokens.translate import Translator

SPOKEN = ("exact", "chunk", "chunk_debiased")  # signals of log-probs alone


def check_staff(config: DistillConfig, files: Sequence[ModelFiles | None], student: ModelFiles,
                part: Part) -> Iterator[Finding]:
    """Faults of all teachers; files: None for the student itself, and for an endpoint that writes."""
    for teacher, own in zip(config.staff, files, strict=True):
        if teacher.privilege is not None:
            yield from _check_privilege(teacher, part)
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


def _check_privilege(teacher: TeacherConfig, part: Part) -> Iterator[Finding]:
    key = f"{teacher.name}.privilege"
    for fault in privilege_faults(part.problems, teacher.privilege) if part.problems else ():
        what, _, cure = fault.partition("; ")
        yield Finding("fault", key, what, cure)
    if "passages" in teacher.privilege.shows:
        try:
            Corpus.read(teacher.privilege.corpus)
        except UserError as error:
            yield fault_of(f"{key}.corpus", error)


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
