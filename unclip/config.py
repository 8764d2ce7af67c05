"""Configuration: YAML sections map one to one onto typed models; nothing unknown gets through."""

from __future__ import annotations

import difflib
import json
import os
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from unclip.errors import ConfigError
from unclip.shipped import configuration, configurations
from unclip.text import is_whole

# A path, or another name of a place; `~` at its beginning is the home folder. An empty one, as an
# unset variable gives it, would be the current folder.
Place = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]


class Config(BaseModel):
    """Base of every typed section: immutable, unknown keys forbidden, no silent conversions, finite
    numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


C = TypeVar("C", bound=Config)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-4` and `=` as strings or worse, `NO` as false, `0012` as ten, `1:30` as
    ninety, `2026-05-01` as a date, and takes the last of two equal keys; this reads what was meant.
    """

    def compose_mapping_node(self, anchor: Any) -> Any:
        """A mapping whose keys occur once."""
        node = super().compose_mapping_node(anchor)
        seen = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if seen.count(key.value) > 1:
                raise yaml.composer.ComposerError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
        return node


_MEANT = {
    "bool": (r"true|false", "tf"),
    "int": (r"[-+]?(0|[1-9](_?[0-9])*)", "-+0123456789"),
    "float": (r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?", "-+.0123456789"),
    "null": (r"~|null|", ["~", "n", ""]),
    "merge": (r"<<", "<"),
}
_Loader.yaml_implicit_resolvers = {}
for _name, (_pattern, _first) in _MEANT.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", re.compile(f"^({_pattern})$"), list(_first)
    )


class _Dumper(yaml.SafeDumper):
    """Quotes strings that `_Loader`, or any YAML 1.1 reader, would take for something else."""


_Dumper.yaml_implicit_resolvers = {
    first: [*_Loader.yaml_implicit_resolvers.get(first, []), *resolvers]
    for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
}


def load_config(path: str | Path, overrides: Sequence[str], schema: type[C]) -> C:
    """Read a YAML file, apply dotted overrides such as `train.lr=1e-4`, and check everything.

    The name of a shipped file will do. An override is no YAML: text is what stands after the `=`,
    to its end.

    **Raises**: `ConfigError` naming the full key, its value and the nearest valid name.
    """
    data = read_yaml(path)
    given: list[str] = []
    for override in overrides:
        key = override.partition("=")[0]
        for before in given:
            if before == key or before.startswith(f"{key}."):
                raise ConfigError(
                    f"{before} is given twice, the second time as {override!r}; give each key "
                    "once, and put values with braces, stars or spaces in quotes"
                )
        given.append(key)
        _apply(data, override, schema)
    return parse_config(data, schema, source=str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of sections, or a shipped one by its short name.

    **Raises**: `ConfigError` if it is missing or not that.
    """
    name, path = str(path), configuration(path)
    if not path.is_file():
        near = difflib.get_close_matches(name, configurations(), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"no configuration file at {path}; {hint}`unclip configs` lists the shipped ones"
        )
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold sections (a mapping), not {type(data).__name__}")
    return data


def parse_config(data: dict[str, Any], schema: type[C], source: str) -> C:
    """Check a plain dict against a schema; `source` names it in errors."""
    try:
        # JSON mode is strict about scalars yet takes lists where the schema says tuple.
        return schema.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        lines = [_explain(item, schema) for item in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None
    except TypeError as error:
        raise ConfigError(f"{source}: {error}; use plain numbers, strings and lists") from None


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back to an equal one."""
    text = yaml.dump(json.loads(config.model_dump_json()), Dumper=_Dumper, sort_keys=False)
    Path(path).write_text(text, encoding="utf-8")


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every setting by its dotted name; an empty section is one, too."""
    settings: dict[str, Any] = {}
    for key, value in data.items():
        inner = isinstance(value, dict) and value
        settings |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return settings


def _apply(data: dict[str, Any], override: str, schema: type[Config]) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r} must look like section.key=value")
    if not is_whole(text):
        raise ConfigError(
            f"override {override!r}: a configuration is UTF-8, which the bytes of this value are "
            "not; rename what it names"
        )
    try:
        value = _value(text, list(_kinds(schema, parts)))
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: {text!r} is not a YAML value") from None
    for depth, part in enumerate(parts[:-1], 1):
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(parts[:depth])} is not a section")
    data[parts[-1]] = value


def _value(text: str, kinds: list[Any]) -> Any:
    """What an override's text means where one of these types is expected: itself for a string."""
    if type(None) in kinds and text == "null":
        return None
    if str in kinds:
        return text
    if text.lstrip()[:1] in ("[", "{"):
        return yaml.load(text, Loader=_Loader)  # a list or a section
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text.strip(), (True, False))
    return loader.construct_object(yaml.ScalarNode(tag, text.strip()))


def _kinds(annotation: Any, location: Sequence[str]) -> Iterator[Any]:
    """The types that a schema has at a location, each of a union; none where there is no such."""
    origin, options = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        for option in options:
            yield from _kinds(option, location)
    elif origin is Annotated:
        yield from _kinds(options[0], location)
    elif not location:
        yield from map(type, options) if origin is Literal else [origin or annotation]
    elif isinstance(annotation, type) and issubclass(annotation, Config):
        field = annotation.model_fields.get(location[0])
        yield from _kinds(field.annotation, location[1:]) if field is not None else ()


def _explain(item: Any, schema: type[Config]) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        names = _names(schema, item["loc"][:-1])
        near = difflib.get_close_matches(str(item["loc"][-1]), names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"valid names: {', '.join(names)}"
        return f"unknown key {key} = {item['input']!r} ({hint})"
    if item["type"] == "missing":
        return f"missing key {key}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error" and isinstance(item["input"], dict):  # a section's keys
        return f"{key}: {message}" if key else message
    return f"{key or 'configuration'} = {item['input']!r}: {message}"


def _names(schema: Any, location: Sequence[int | str]) -> list[str]:
    """The names valid at a location; list places and union tags in it are passed over."""
    for part in location:
        field = schema.model_fields.get(part)
        schema = (_section(field.annotation) if field is not None else None) or schema
    return list(schema.model_fields)


def _section(annotation: Any) -> Any:
    options = typing.get_args(annotation)
    if not options:
        return (
            annotation if isinstance(annotation, type) and issubclass(annotation, Config) else None
        )
    return next((inner for option in options if (inner := _section(option)) is not None), None)
