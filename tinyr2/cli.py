"""The command line: verbs, and the only table from names to functions.

In: words that a person types. Out: a recipe's result on the console or, with --json, as one JSON object on the last
line of standard output. What a verb needs is imported when it runs: help must not wait for torch. A verb's options are
its parameters, each explained where it stands, so two verbs have many and this file is long.
"""

import errno
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, get_args

import typer
from typer.core import TyperGroup

from tinyr2 import __version__
from tinyr2.core.config import Config, nearest
from tinyr2.core.errors import ConfigError, UserError
from tinyr2.models.presets import PRESETS

if TYPE_CHECKING:
    from tinyr2.report.console import Console

OK, USER, HALTED, INTERRUPTED = 0, 2, 3, 130
EPILOG = """Exit codes:

\b
  0    done, or stopped by SIGTERM or Ctrl-C after a checkpoint
  1    a fault of tinyr2's own, with its traceback
  2    a fault to be mended by you: one message says what, where and how
  3    halted by a critical alarm, after a checkpoint
  130  interrupted where there was nothing to save

`tinyr2 VERB --help` explains a verb and has an example."""

DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)

# Typer's newer releases carry a click of their own; this is the base of usage errors in either.
_UsageError = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


class Verbs(TyperGroup):
    """The one place where an error becomes a message and an exit code."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> NoReturn:
        """Run the verb and leave with its exit code."""
        try:
            code = super().main(*args, standalone_mode=False, **extra)
        except UserError as error:
            code = _fail(str(error))
        except _UsageError as error:
            context = getattr(error, "ctx", None)
            hint = f"\nsee {context.command_path} --help" if context else ""
            code = _fail(error.format_message() + hint)
        except OSError as error:
            if error.errno not in DISK_FAULTS:
                raise
            code = _fail(f"{error.filename or 'the disk'}: {error.strerror}; mend that, and `tinyr2 runs resume RUN` "
                         "goes on from the newest checkpoint")
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        sys.exit(code or OK)


class Runs(TyperGroup):
    """`tinyr2 runs` and `tinyr2 runs FOLDER` mean `tinyr2 runs list …`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """Put `list` in front where no verb stands."""
        if not args or args[0] not in (*self.commands, "-h", "--help"):
            args = ["list", *args]
        return super().parse_args(ctx, args)


_PLAIN = {"rich_markup_mode": None, "context_settings": {"help_option_names": ["-h", "--help"]}}  # rich costs 0.2 s
app = typer.Typer(cls=Verbs, epilog=EPILOG, invoke_without_command=True, add_completion=False,
                  pretty_exceptions_enable=False, **_PLAIN)
runs_app = typer.Typer(cls=Runs, **_PLAIN)

Json = Annotated[bool, typer.Option("--json", help="End standard output with the result as one JSON object; all else "
                                                   "goes to standard error.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete what an earlier run left in the folder.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in output_dir from its newest checkpoint.")]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The settings; examples/ has some.")]
Overrides = Annotated[list[str] | None, typer.Argument(
    metavar="a.b=c", show_default=False, help="Settings on top of the file, e.g. train.learning_rate=1e-4.")]
Seed = Annotated[int, typer.Option(help="All randomness follows from it.")]


def main() -> None:
    """The console script `tinyr2`."""
    app(prog_name="tinyr2")


@app.callback()
def _root(context: typer.Context,
          version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Build, distill, reinforce and judge ultra-small reasoning models on one machine.

    Start with `tinyr2 quickstart`: no download, no GPU, minutes.
    """
    if version:
        typer.echo(f"tinyr2 {__version__}")
        raise typer.Exit(OK)
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def quickstart(
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Folder for models, data and runs.")] = Path("runs/quickstart"),
    minutes: Annotated[float, typer.Option(min=0.01, help="About how long it may train on two cores.")] = 3.0,
    terms: Annotated[int, typer.Option(min=2, max=3, help="How hard: the most numbers in a sum.")] = 3,
    digits: Annotated[int, typer.Option(min=1, max=9, help="How hard: the most digits of a number.")] = 2,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Distill a small student on-policy, from nothing, in minutes.

    No network, no GPU: problems, tokenizer, teacher and student are made on the spot. Prints one table.

    \b
    Example:
      tinyr2 quickstart --seed 1 --out runs/first
    """
    from tinyr2.data.tasks import SignedSums
    from tinyr2.recipes.quickstart import quickstart as recipe

    level = SignedSums(terms=terms, digits=digits)
    with _console(json) as console:
        console.result(recipe(console, out=out, seed=seed, minutes=minutes, level=level, overwrite=overwrite))


@app.command()
def build(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The model folder to write.")],
    overrides: Annotated[list[str] | None, typer.Argument(
        metavar="a.b=c", show_default=False,
        help="Fields of the transformers config on top, e.g. num_hidden_layers=4.")] = None,
    preset: Annotated[str | None, typer.Option(help=f"A shape by name: {', '.join(PRESETS)}.")] = None,
    config: Annotated[Path | None, typer.Option(
        metavar="MODEL.yaml", help="A shape from a file: model_type and any fields of that transformers config; a "
                                   "config.json will do.")] = None,
    tokenizer: Annotated[str | None, typer.Option(
        metavar="FOLDER", help="Take this tokenizer as it is: a folder or a hub name.")] = None,
    train_tokenizer: Annotated[str | None, typer.Option(
        metavar="TEXTS", help="Train a tokenizer on a .txt file, or on a .jsonl file with text, prompt, completion or "
                              "messages (or else any strings).")] = None,
    trim_tokenizer: Annotated[tuple[str, str] | None, typer.Option(
        metavar="FOLDER TEXTS", help="Cut that tokenizer down to the tokens that these texts use most.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Tokens of a tokenizer that is trained or trimmed.")] = None,
    alphabet: Annotated[Literal["bytes", "corpus"], typer.Option(
        help="Of a trained tokenizer: any text, or only the characters of its texts.")] = "bytes",
    pad_vocab: Annotated[int, typer.Option(
        metavar="N", help="Round the model's vocabulary up to a multiple of N.")] = 1,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the weights in the folder.")] = "float32",
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model folder that is there.")] = False,
    json: Json = False,
) -> None:
    """Write a model with random weights, and its tokenizer.

    OUT is a stock Hugging Face folder. The vocabulary and the ids of padding, begin and end follow the tokenizer. One
    seed gives the same bytes.

    \b
    Examples:
      tinyr2 build runs/student --preset qwen3-1m --train-tokenizer texts.jsonl --vocab-size 4096
      tinyr2 build runs/small --preset qwen3-0.6b num_hidden_layers=8 --trim-tokenizer Qwen/Qwen3-0.6B \\
        texts.jsonl --vocab-size 16384
    """
    from tinyr2.core import config as configs
    from tinyr2.recipes.build import BuildConfig
    from tinyr2.recipes.build import build as recipe

    sources = {"--tokenizer": tokenizer, "--train-tokenizer": train_tokenizer, "--trim-tokenizer": trim_tokenizer}
    _exactly_one(sources)
    _exactly_one({"--preset": preset, "--config": config})
    path, texts = trim_tokenizer or (tokenizer, train_tokenizer)
    fields = configs.read(config, overrides or ()) if config else configs.apply({}, overrides or ())
    raw = {"output_dir": str(out), "preset": preset, "model": fields, "pad_vocab_to_multiple_of": pad_vocab,
           "dtype": dtype, "seed": seed,
           "tokenizer": {"path": path, "texts": texts, "vocab_size": vocab_size, "alphabet": alphabet}}
    settings = configs.build(BuildConfig, raw, "tinyr2 build")
    with _console(json) as console:
        console.result(recipe(settings, console, overwrite=overwrite))


@app.command()
def sft(config: ConfigFile, overrides: Overrides = None, resume: Resume = False, overwrite: Overwrite = False,
        json: Json = False) -> None:
    """Fine-tune a model on worked solutions.

    Everything that can be checked without compute is checked first. SIGTERM and Ctrl-C save a checkpoint and stop.

    \b
    Example:
      tinyr2 sft examples/gsm8k/student.yaml train.max_steps=200 output_dir=runs/sft
    """
    _train("sft", config, overrides, resume=resume, overwrite=overwrite, json=json)


@app.command()
def distill(config: ConfigFile, overrides: Overrides = None, resume: Resume = False, overwrite: Overwrite = False,
            json: Json = False) -> None:
    """Distill on-policy: a student writes, teachers judge.

    `teacher` is one, `teachers` are many: a model with any tokenizer (`path`), a server (`server`), or the student
    itself (`ema`), which may know more than the student (`privilege`). `method: data` fine-tunes on what a teacher
    writes, `kd` and `hidden` learn from its labels and layers on given completions.

    Everything that can be checked without compute is checked first. SIGTERM and Ctrl-C save a checkpoint and stop.

    \b
    Examples:
      tinyr2 distill examples/gsm8k/distill.yaml loss.divergence=forward_kl output_dir=runs/forward
      tinyr2 distill examples/gsm8k/cross_tokenizer.yaml teacher.path=MODEL
      tinyr2 distill examples/gsm8k/panel.yaml panel.resident=one
    """
    _train("distill", config, overrides, resume=resume, overwrite=overwrite, json=json)


@app.command()
def reinforce(config: ConfigFile, overrides: Overrides = None, resume: Resume = False, overwrite: Overwrite = False,
              json: Json = False) -> None:
    """Reinforce a model: it writes, rewards judge.

    `algorithm` names a point among the choices of baseline, scale, clip, aggregation, KL and critic: ppo, orz, vapo,
    grpo, r1_zero, dr_grpo, dapo, gspo, rloo, reinforce_pp, reinforce_pp_baseline. `dpo` learns from pairs, and `rm`
    trains a reward model on them.

    \b
    Examples:
      tinyr2 reinforce examples/gsm8k/reinforce.yaml algorithm=dapo output_dir=runs/dapo
      tinyr2 reinforce examples/dpo.yaml train.max_steps=100
    """
    _train("reinforce", config, overrides, resume=resume, overwrite=overwrite, json=json)


@app.command()
def pipeline(config: ConfigFile, overrides: Overrides = None, resume: Resume = False, overwrite: Overwrite = False,
             json: Json = False) -> None:
    """Run several stages, each handing its model to the next.

    A stage that finished is not run again, and one that was stopped goes on from its checkpoint. Every stage writes
    its own report; the last page compares all models.

    \b
    Example:
      tinyr2 pipeline examples/pipelines/r1.yaml output_dir=runs/r1
    """
    from tinyr2.core import config as configs
    from tinyr2.recipes.pipeline import PipelineConfig
    from tinyr2.recipes.pipeline import pipeline as recipe

    settings = configs.load(PipelineConfig, config, overrides or ())
    with _console(json) as console:
        _end(recipe(settings, console, _recipes(), resume=resume, overwrite=overwrite), console)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face model folder or hub name.")],
    data: Annotated[str | None, typer.Option(help="A .jsonl or .parquet file, or a hub id.")] = None,
    task: Annotated[str | None, typer.Option(
        metavar="TASK", help="In place of data: countdown, signed_sums or reasoning_gym/NAME, generated here.")] = None,
    option: Annotated[list[str] | None, typer.Option(
        metavar="KEY=VALUE", help="How hard the task is, e.g. numbers=4. Repeatable.")] = None,
    name: Annotated[str | None, typer.Option(help="A hub dataset's configuration.")] = None,
    split: Annotated[str | None, typer.Option(
        help="A hub dataset's split, or train or held_out of a task.  [default: train]")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first rows; of a task, how many problems.")] = None,
    column: Annotated[list[str] | None, typer.Option(
        metavar="OURS=THEIRS", help="What the data calls prompt, completion, messages, answer. Repeatable.")] = None,
    answer_after: Annotated[str | None, typer.Option(
        metavar="TEXT", help="The gold answer follows this in the answer column, as #### does in GSM8K.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system turn before every prompt.")] = None,
    reward: Annotated[list[str] | None, typer.Option(
        metavar="REWARD", help="By name (exact_answer, accuracy, countdown, think_format, …), or your own as "
                               "file.py:function; their sum is graded. Repeatable.  [default: exact_answer]")] = None,
    n: Annotated[int | None, typer.Option("-n", help="Answers to each problem.  [default: 1]")] = None,
    k: Annotated[list[int] | None, typer.Option("-k", help="Of pass@k and maj@k. Repeatable.  [default: 1]")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of sampling; 0 is greedy.  [default: 0]")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus; 1 is off.  [default: 1]")] = None,
    top_k: Annotated[int | None, typer.Option(help="Most likely tokens; 0 is off.  [default: 0]")] = None,
    min_p: Annotated[float | None, typer.Option(help="Share of the likeliest; 0 is off.  [default: 0]")] = None,
    max_completion_length: Annotated[int | None, typer.Option(help="Tokens.  [default: 256]")] = None,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write the result there too.")] = None,
    json: Json = False,
) -> None:
    """Measure pass@k and maj@k, with 95% intervals.

    \b
    Examples:
      tinyr2 eval runs/opd/final --data test.jsonl
      tinyr2 eval MODEL --data openai/gsm8k --name main --split test --column prompt=question \\
        --answer-after '####' -n 8 -k 1 -k 8 --temperature 0.7
      tinyr2 eval runs/dapo/final --task countdown --split held_out --limit 1024 --reward countdown
    """
    from tinyr2.core import config as configs
    from tinyr2.recipes.evaluate import EvaluateConfig, evaluate_model

    _exactly_one({"--data": data, "--task": task})
    if option and task is None:
        raise ConfigError(f"--option {option[0]}: options are a task's; leave it out, or give --task")
    raw = {"model": {"path": model}, "device": device, "data": _given(
        path=data, task=task, options=configs.apply({}, option) if option else None, name=name, split=split,
        limit=limit, answer_after=answer_after, system=system,
        columns=dict(_pair(c, "=", "--column prompt=question") for c in column or ())), "eval": _given(
        num_generations=n, k=k or None, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
        max_completion_length=max_completion_length, seed=seed)}
    if reward:
        raw["rewards"] = [_reward(r) for r in reward]
    settings = configs.build(EvaluateConfig, raw, "tinyr2 eval")
    with _console(json) as console:
        console.result(evaluate_model(settings, console, out=out))


@app.command()
def align(
    a: Annotated[str | None, typer.Argument(
        metavar="A", show_default=False, help="The student's tokenizer: a folder or a hub name.")] = None,
    b: Annotated[str | None, typer.Argument(
        metavar="B", show_default=False, help="The teacher's tokenizer, likewise.")] = None,
    data: Annotated[str | None, typer.Option(
        metavar="FILE", help="Texts to compare on: .txt, .jsonl or .parquet; with models the problems that the student "
                             "answers.  [default: built-in samples]")] = None,
    limit: Annotated[int | None, typer.Option(
        help="Only the first rows.  [default: all; with models 64]")] = None,
    student: Annotated[str | None, typer.Option(
        metavar="MODEL", help="The student itself: it answers the problems of --data. Its tokenizer is A, where A is "
                              "left out.")] = None,
    teacher: Annotated[str | None, typer.Option(
        metavar="MODEL", help="The teacher itself, which reads the answers. Its tokenizer is B, where B is left "
                              "out.")] = None,
    max_completion_length: Annotated[int | None, typer.Option(help="Tokens of an answer.  [default: 256]")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the answers.  [default: 1]")] = None,
    max_bias: Annotated[float | None, typer.Option(
        help="Of chunk_debiased: the probability that the end of a span may rule out.  [default: 0.1]")] = None,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    json: Json = False,
) -> None:
    """Show how two tokenizers line up, and what each signal keeps.

    Of prose, maths, code, Chinese and emoji, or of --data: the share of the student's tokens and of the bytes that
    `exact`, `chunk` and `mapped` speak of, and of which `marginal` has a distribution (the rest it treats as `chunk`);
    special tokens by role; the longest spans. With two models also `chunk_debiased`, and the share of the sum of
    |advantage| that lies in the spans that a signal keeps, of `marginal` in those with a distribution.

    \b
    Examples:
      tinyr2 align runs/student/final Qwen/Qwen3-8B
      tinyr2 align ../shared/tokenizers/gpt2 ../shared/tokenizers/o200k --data texts.jsonl
      tinyr2 align --student runs/student/final --teacher runs/teacher/final --data problems.jsonl
    """
    from tinyr2.core import config as configs
    from tinyr2.recipes.align import AlignConfig
    from tinyr2.recipes.align import align as recipe

    models = {"--student": student, "--teacher": teacher}
    sampling = _given(max_completion_length=max_completion_length, temperature=temperature)
    if student is None and teacher is None:
        if sampling or max_bias is not None:
            raise ConfigError("--max-completion-length, --temperature and --max-bias are of answers; give --student "
                              "and --teacher, or leave them out")
        raw = _given(student=a, teacher=b, data=data, limit=limit)
    elif None in (*models.values(), data):
        lacking = next(name for name, value in {**models, "--data": data}.items() if value is None)
        raise ConfigError(f"{lacking}: missing; a student answers the problems of --data, and a teacher reads them: "
                          "give --student, --teacher and --data")
    else:
        raw = _given(student=a, teacher=b, models=_given(
            student={"path": student}, teacher={"path": teacher}, data={"path": data, "limit": limit or 64},
            sampling=sampling, max_bias=max_bias, seed=seed, device=device))
    settings = configs.build(AlignConfig, raw, "tinyr2 align")
    with _console(json) as console:
        console.result(recipe(settings, console))


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG.yaml", show_default=False, help=(
        "What `tinyr2 sft`, `distill`, `reinforce` or `pipeline` would be given; without it, only the machine is "
        "looked at."))] = None,
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """Look at the machine, and for every mistake in a config.

    Nothing is trained and nothing written. Exit code 2 where there are faults. Of a pipeline, what waits for an
    earlier stage is looked at once that is there.

    \b
    Examples:
      tinyr2 doctor
      tinyr2 doctor examples/gsm8k/distill.yaml train.max_steps=500
      tinyr2 doctor examples/pipelines/r1.yaml
    """
    from tinyr2.recipes.doctor import doctor as recipe

    with _console(json) as console:
        found = recipe(config, overrides or (), console, _recipes())
        console.result(found)
    if found["faults"]:
        raise typer.Exit(USER)


@runs_app.callback()
def _runs() -> None:
    """List the runs in a folder, or go on with one.

    \b
    Examples:
      tinyr2 runs
      tinyr2 runs FOLDER --json
      tinyr2 runs resume runs/opd
    """


@runs_app.command("list")
def list_(folder: Annotated[Path, typer.Argument(help="Where to look, however deep.")] = Path("runs"),
          json: Json = False) -> None:
    """Show the runs in a folder, newest first.

    A row has verb, status (running, finished, stopped, halted, crashed), step, newest metrics, start and size.

    \b
    Example:
      tinyr2 runs list runs
    """
    from tinyr2.recipes.runs import list_runs

    with _console(json) as console:
        console.result(list_runs(folder, console))


@runs_app.command()
def resume(run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")], json: Json = False) -> None:
    """Go on with a run from its newest checkpoint, or with a pipeline from the stage it was in.

    Its settings are those in its folder, which may have moved; paths in them hold from where it was started.

    \b
    Examples:
      tinyr2 runs resume runs/opd
      tinyr2 runs resume runs/r1
    """
    from tinyr2.recipes.runs import resume_run

    with _console(json) as console:
        _end(resume_run(run, console, _recipes()), console)


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
           open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
           json: Json = False) -> None:
    """Write a run's report.html again.

    \b
    Example:
      tinyr2 report runs/opd --open
    """
    from tinyr2.recipes.report import report as recipe

    with _console(json) as console:
        console.result(recipe(run, console, show=open_page))


app.add_typer(runs_app, name="runs")


def _recipes() -> Mapping[str, tuple[type[Config], Callable[..., dict]]]:
    """The training verbs: their config and their function."""
    from tinyr2.recipes import distill, dpo, reinforce, rm, sft

    return {"sft": (sft.SftConfig, sft.sft), "distill": (distill.DistillConfig, distill.distill),
            "reinforce": (reinforce.ReinforceConfig, reinforce.reinforce),
            "dpo": (dpo.DpoConfig, dpo.dpo), "rm": (rm.RewardModelConfig, rm.rm)}


def _train(verb: str, config: Path, overrides: list[str] | None, *, resume: bool, overwrite: bool, json: bool) -> None:
    from tinyr2.core import config as configs

    raw = configs.read(config, overrides or ())
    if verb == "reinforce" and raw.get("algorithm") in ("dpo", "rm"):  # which learn from pairs, not from rewards
        verb = raw["algorithm"]
    config_class, recipe = _recipes()[verb]
    settings = configs.build(config_class, raw, str(config))
    with _console(json) as console:
        _end(recipe(settings, console, resume=resume, overwrite=overwrite), console)


def _end(result: dict, console: "Console") -> None:
    """Say what can be done with a run that did not reach its end."""
    how = f"tinyr2 runs resume {result['run']}"
    if result["ending"] == "stopped":
        console.note(f"stopped at step {result['step']}, after a checkpoint; go on with: {how}")
    elif result["ending"] == "halted":
        console.note(f"halted by a critical alarm at step {result['step']}; look at the report, then go on with: {how}")
    console.result(result)
    if result["ending"] == "halted":
        raise typer.Exit(HALTED)


@contextmanager
def _console(json: bool) -> Iterator["Console"]:
    """The console of a verb; transformers' own progress bars would cross its live line."""
    from tinyr2.report.console import Console

    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()
    with Console(json_mode=json) as console:
        yield console


def _exactly_one(options: Mapping[str, Any]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1:
        raise ConfigError(f"give one of {', '.join(options)}; got {' and '.join(given) or 'none of them'}")


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given; the others have their defaults in the configs."""
    return {name: value for name, value in options.items() if value is not None}


def _reward(text: str) -> dict[str, str]:
    """`--reward` as a config has it."""
    from tinyr2.rewards.named import Name

    known = get_args(Name)
    if text in known:
        return {"name": text}
    hint = nearest(text, known)
    example = f"--reward {hint or known[0]} or --reward my.py:score (by name there are {', '.join(known)})"
    return dict(zip(("file", "function"), _pair(text, ":", example), strict=True))


def _pair(text: str, sign: str, example: str) -> tuple[str, str]:
    left, found, right = text.rpartition(sign) if sign == ":" else text.partition(sign)
    if not (left and found and right):
        raise ConfigError(f"{text!r}: write {example}")
    return left, right


def _fail(message: str) -> int:
    typer.echo(f"error: {message}", err=True)
    return USER
