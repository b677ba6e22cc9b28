"""Configs: one YAML file plus dotted overrides, read into a frozen pydantic model that knows every key.

In: a model class, a path, overrides such as `train.learning_rate=1e-4`. Out: the model, or a ConfigError that names
the file, the key, its nearest neighbour and the allowed ones.
"""

import difflib
import itertools
import re
import typing
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from tinyr2.core.errors import ConfigError


class Config(BaseModel):
    """Base of every config: frozen; an unknown key is an error, and so is a number that is not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
    # settings that say how a run is carried out and not what it makes: a resumed run may have others
    passing: ClassVar[frozenset[str]] = frozenset()


T = TypeVar("T", bound=Config)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number (YAML 1.1 wants 1.0e-4) and a key stands once."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(k, deep=True) for k, _ in node.value]
        twice = next((k for i, k in enumerate(keys) if k in keys[:i]), None)
        if twice is not None:
            raise yaml.MarkedYAMLError(problem=f"key {twice!r} stands twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
for first in "-+0123456789.":
    _Loader.yaml_implicit_resolvers.setdefault(first, []).insert(
        0, ("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")))


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text; a ConfigError with line and column where it is malformed."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
        raise ConfigError(f"{at}: not valid YAML: {error.problem}") from error
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{where}: not valid YAML: character {error.position + 1} is {chr(error.character)!r}; "
                          "remove it") from error


def load(model: type[T], path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> T:
    """Read `path` into `model`, with dotted `a.b=value` overrides on top (values are YAML)."""
    return build(model, read(path, overrides), str(path))


def read(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> dict:
    """The mapping in `path` with the overrides on top, before any model has judged it."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file; examples/ has some to start from")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error
    raw = parse_yaml(text, str(path))
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys, this is a {type(raw).__name__}")
    return apply(raw, overrides)


def apply(raw: dict, overrides: tuple[str, ...] | list[str]) -> dict:
    """A copy of `raw` with each `a.b=value` set; a number as key picks a list's element."""
    raw = _copy(raw)
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise ConfigError(f"override {text!r}: write it as key=value, e.g. train.learning_rate=1e-4")
        _set(raw, key.split("."), parse_yaml(value, f"override {key}"), key)
    return raw


def build(model: type[T], raw: dict, where: str) -> T:
    """Validate `raw`; every fault in one ConfigError, a line each."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        found = error.errors()
        # a list whose only element is at fault counts as empty: that is said once
        faults = [_fault(model, e) for e in found if e["type"] != "too_short" or not any(
            other is not e and other["loc"][:len(e["loc"])] == e["loc"] for other in found)]
        raise ConfigError(f"{where}:\n" + "\n".join(f"  {f}" for f in faults)) from error


def dump(config: Config) -> str:
    """The resolved config as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def lasting(config: Any, raw: Any) -> Any:
    """`raw`, which has the form of a dumped `config`, without the settings that `config` calls passing."""
    if isinstance(config, Config) and isinstance(raw, dict):
        return {key: lasting(getattr(config, key, None), value) for key, value in raw.items()
                if key not in config.passing}
    if isinstance(config, tuple) and isinstance(raw, list):
        return [lasting(inner, value) for inner, value in itertools.zip_longest(config, raw)][:len(raw)]
    return raw


def nearest(name: str, known: typing.Iterable[str]) -> str | None:
    """The known name most like `name`, or None."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return close[0] if close else None


def _copy(value):
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


def _set(node, keys: list[str], value, full: str) -> None:
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise ConfigError(f"override {full}: {key!r} picks from a list of {len(node)}; use 0 … {len(node) - 1}")
            key = int(key)
        elif not isinstance(node, dict):
            raise ConfigError(f"override {full}: {'.'.join(keys[:depth])} is a value, it has no key {key!r}")
        if last:
            node[key] = value
        elif isinstance(node, dict):
            node = node.setdefault(key, {})
            if node is None:
                raise ConfigError(f"override {full}: {'.'.join(keys[:depth + 1])} is null in the file; set it whole")
        else:
            node = node[key]


def _fault(model: type[BaseModel], error) -> str:
    path = [p for p in error["loc"]]
    name = ".".join(str(p) for p in path)
    if error["type"] == "extra_forbidden":
        known = _keys_at(model, path[:-1])
        hint = nearest(str(path[-1]), known)
        cure = f"did you mean {hint!r}? " if hint else ""
        return f"{name}: unknown key; {cure}known here: {', '.join(known)}"
    if error["type"] == "missing":
        return f"{name}: missing; add it to the file or give {name}=… on the command line"
    if error["type"] == "too_short":
        return f"{name}: at least {error['ctx']['min_length']} needed, got {error['ctx']['actual_length']}; add more"
    got = "" if isinstance(error.get("input"), dict) else f" (got {error.get('input')!r})"
    message = error["msg"].removeprefix("Value error, ")
    return f"{name}: {message}{got}" if name else message


def _keys_at(model: type[BaseModel], path: list) -> list[str]:
    keys = iter(path)
    for key in keys:
        if isinstance(key, int):
            continue
        fld = model.model_fields.get(key)
        inner = _model_in(fld.annotation) if fld else None
        if inner is None:
            return []
        if typing.get_origin(fld.annotation) is dict:
            next(keys, None)  # the name of an entry, which is the user's
        model = inner
    return sorted(model.model_fields)


def _model_in(annotation) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for arg in typing.get_args(annotation):
        if (found := _model_in(arg)) is not None:
            return found
    return None
