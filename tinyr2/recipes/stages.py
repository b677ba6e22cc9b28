"""The stages of a pipeline: read, checked against each other, and run one at a time.

In: the stages as a file has them, and the verbs there are. Out: `Stage`s whose references to earlier stages are paths,
after every check that needs no compute.
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, field_validator

from tinyr2.core import config as configs
from tinyr2.core.config import Config, nearest
from tinyr2.core.errors import ConfigError, RunError, UserError
from tinyr2.core.files import sha256
from tinyr2.data.problems import DataConfig, load_problems
from tinyr2.models.load import ModelConfig, load_config
from tinyr2.recipes.build import BuildConfig, TokenizerConfig, build, read_texts
from tinyr2.recipes.mix import DATA, MixConfig, mix
from tinyr2.recipes.reject import RejectConfig, reject
from tinyr2.recipes.run import CONFIG
from tinyr2.recipes.setup import model_fingerprint
from tinyr2.report.console import Console
from tinyr2.rewards.grade import RewardConfig, load_reward

C = TypeVar("C", bound=Config)
Verbs = Mapping[str, tuple[type[Config], Callable[..., dict]]]  # verb -> its config and its recipe

OWN: Verbs = {"build": (BuildConfig, build), "data": (MixConfig, mix), "reject": (RejectConfig, reject)}
AT_ONCE = ("build", "data")  # write all or nothing in seconds; there is nothing to resume
PAIRED = ("dpo", "rm")  # algorithms of reinforce that learn from pairs, and are verbs of their own
NO_MODEL = ("data", "reject", "rm")  # make no model that answers
_TAKEN = ("checkpoints", "completions", "final", "best")  # `tinyr2 runs` does not look into folders of these names
_REFERENCE = re.compile(r"stage:([^/]+)(?:/(.+))?")


class StageConfig(Config):
    """One stage: what it is called, its verb, and what that verb is told, but for output_dir."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")  # of its folder, too
    verb: str
    config: dict[str, Any] = {}

    @field_validator("name")
    @classmethod
    def _free(cls, name: str) -> str:
        if name in _TAKEN:
            raise ValueError(f"the folders {', '.join(_TAKEN)} belong to runs; take another name")
        return name


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage ready to run. It is pickled on its way to a child process."""

    name: str
    verb: str
    recipe: Callable[..., dict]
    config: Config  # references to earlier stages are paths
    settings: Mapping[str, Any]  # the same as JSON, references as they were written; without output_dir
    inputs: Mapping[str, Path] = field(default_factory=dict)  # files and model folders that it reads, as written

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return Path(self.config.output_dir)

    @property
    def product(self) -> Path:
        """What `stage:NAME` stands for: a model folder or a JSONL file."""
        return product_of(self.verb, self.folder)


def product_of(verb: str, folder: Path) -> Path:
    """What a stage of that verb leaves in its folder for others."""
    if verb == "build":
        return folder
    return folder / (DATA if verb in ("data", "reject") else "final")


def plan(stages: tuple[StageConfig, ...], out: Path, seed: int, verbs: Verbs) -> list[Stage]:
    """The stages in their order; ConfigError with every fault in their settings, a line each or more."""
    verbs, faults, planned = {**OWN, **verbs}, [], []
    products: dict[str, tuple[str, Path]] = {}  # of the stages so far: their verb and folder
    for stage in stages:
        where = f"stage {stage.name}"
        if stage.verb == "reinforce" and stage.config.get("algorithm") in PAIRED:  # as on the command line
            stage = stage.model_copy(update={"verb": stage.config["algorithm"]})
        if stage.verb not in verbs:
            hint = nearest(stage.verb, verbs)
            faults.append(f"{where}: no verb {stage.verb!r}; {f'did you mean {hint!r}? ' if hint else ''}there are "
                          f"{', '.join(verbs)}")
        elif "output_dir" in stage.config:
            faults.append(f"{where}: output_dir is the pipeline's to set; leave it out")
        else:
            try:
                planned.append(_planned(stage, out, seed, verbs[stage.verb], products))
            except ConfigError as error:
                faults.append(str(error))
        products[stage.name] = (stage.verb, out / stage.name)
    if faults:
        raise ConfigError("\n".join(faults))
    return planned


def _planned(stage: StageConfig, out: Path, seed: int, verb: tuple[type[Config], Callable[..., dict]],
             products: Mapping[str, tuple[str, Path]]) -> Stage:
    config_class, recipe = verb
    raw = _seeded(stage.config, config_class, seed)
    config, inputs = referring(config_class, raw | {"output_dir": str(out / stage.name)}, products,
                               f"stage {stage.name} ({stage.verb})")
    written = {str(path): name for name, path in inputs.items()}
    settings = _replaced(config.model_dump(mode="json", exclude={"output_dir"}), lambda text: written.get(text, text))
    return Stage(name=stage.name, verb=stage.verb, recipe=recipe, config=config, settings=settings, inputs=inputs)


def referring(kind: type[C], raw: dict, products: Mapping[str, tuple[str, Path]],
              where: str) -> tuple[C, dict[str, Path]]:
    """The config `kind` of `raw` with references replaced, and what it reads: stages, files and model folders.

    ConfigError for a reference to what is no earlier stage, or for settings that `kind` refuses.
    """
    found: dict[str, Path] = {}

    def path_of(text: str) -> str:
        match = _REFERENCE.fullmatch(text)
        if match is None:
            return text
        name, inside = match.groups()
        if name not in products:
            hint = nearest(name, products)
            raise ConfigError(f"{where}: {text}: no stage of that name comes before; "
                              f"{f'did you mean {hint!r}? ' if hint else ''}there are {', '.join(products) or 'none'}")
        verb, folder = products[name]
        product = product_of(verb, folder)
        if inside is not None:
            product = (folder if product.suffix else product) / inside
        found[text] = product
        return str(product)

    config = configs.build(kind, _replaced(raw, path_of), where)
    for text in _strings(config.model_dump(mode="json", exclude={"output_dir"})):
        path = os.path.expanduser(text)  # os.path: any text may come, also one too long for a name
        if Path(path) not in found.values() and (os.path.isfile(path) or os.path.isfile(f"{path}/config.json")):
            found[text] = Path(path)
    return config, found


def check_sources(named: Mapping[str, Config], out: Path) -> None:
    """ConfigError with all that the configs, by who has them, read from elsewhere than the folder `out` in vain."""
    faults, seen = [], set()
    for name, config in named.items():
        for source in _nested(config, DataConfig, ModelConfig, RewardConfig, TokenizerConfig):
            key = (type(source), source.model_dump_json())
            if key in seen:
                continue
            seen.add(key)
            try:
                _check_source(source, out)
            except UserError as error:
                faults.append(f"{name}: {error}")
    if faults:
        raise ConfigError("\n".join(faults))


def _check_source(source: Config, out: Path) -> None:
    """The first row of a file, all problems of a task, a model's config, the user's reward, a tokenizer's texts."""
    if isinstance(source, RewardConfig):
        if source.file is not None:
            load_reward(source)
    elif isinstance(source, TokenizerConfig):
        if source.texts is not None and not _inside(source.texts, out):
            read_texts(source.texts)
    elif isinstance(source, ModelConfig):
        if not _inside(source.path, out):
            load_config(source)
    elif source.task is not None:
        load_problems(source)
    elif source.path.endswith((".jsonl", ".parquet")) and not _inside(source.path, out):
        load_problems(source.model_copy(update={"limit": 1}))


def carry_out(stage: Stage, console: Console) -> dict:
    """Run a stage from where it stands: anew, or from what it has saved. What a child process does."""
    if stage.verb in AT_ONCE:
        start = time.perf_counter()
        return stage.recipe(stage.config, console, overwrite=True) | {"seconds": time.perf_counter() - start}
    return stage.recipe(stage.config, console, resume=(stage.folder / CONFIG).is_file())


def fingerprint(path: Path) -> str | None:
    """What tells one file or model folder from another; None where nothing is there."""
    if path.is_file():
        return sha256(path)[:16]
    if (path / "config.json").is_file():
        return model_fingerprint(str(path))
    if path.exists():
        raise RunError(f"{path}: neither a file nor a model folder, so no stage can start from it; name what is in it")
    return None


def _seeded(raw: dict[str, Any], kind: type[Config], seed: int) -> dict[str, Any]:
    """`raw` with the pipeline's seed where it names none."""
    if "seed" in kind.model_fields:
        return {"seed": seed} | raw
    if "train" in kind.model_fields and isinstance(raw.get("train", {}), dict):
        return raw | {"train": {"seed": seed} | raw.get("train", {})}
    return raw


def _replaced(value: Any, replace: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(item, replace) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(item, replace) for item in value]
    return replace(value) if isinstance(value, str) else value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _nested(value: Any, *kinds: type[Config]) -> Iterator[Config]:
    """The configs of those kinds in a config, however deep."""
    if isinstance(value, kinds):
        yield value
    if isinstance(value, Config):
        inside = [getattr(value, name) for name in type(value).model_fields]
    else:
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    for item in inside:
        yield from _nested(item, *kinds)


def _inside(path: str, out: Path) -> bool:
    return Path(path).absolute().is_relative_to(out.absolute())
