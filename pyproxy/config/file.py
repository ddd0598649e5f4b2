"""Settings from and to the text of a KubeProxyConfiguration file. No I/O.

Decoding is lenient where kube-proxy's is: an unknown or repeated field is a warning, because a
newer file must not keep a node without Services. Everything else that is wrong is an error.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple, TypeVar

import yaml
from msgspec import Struct
from msgspec.structs import fields

from pyproxy.config import Config, Quantity, Seconds, VModule, with_defaults
from pyproxy.config.text import (
    ConfigError,
    did_you_mean,
    duration_text,
    int32,
    parse_duration,
)

API_VERSION: Final = "kubeproxy.config.k8s.io/v1alpha1"
KIND: Final = "KubeProxyConfiguration"

# What a file that says nothing means: both addresses follow from bindAddress.
_UNSET: Final = Config(healthz_bind_address="", metrics_bind_address="")
# The one duration that was a number of nanoseconds before it could be a text.
_MAY_BE_NANOSECONDS: Final = "logging.flushFrequency"

S = TypeVar("S", bound=Struct)


class Loaded(NamedTuple):
    """Settings, and what was odd about where they came from."""

    config: Config
    warnings: tuple[str, ...] = ()


def load(text: str) -> Loaded:
    """Read a file. Raises ConfigError where kube-proxy would refuse it."""
    node, content = _parse(text)
    if not isinstance(content, dict):
        raise ConfigError(f"kind: the file is not a mapping with apiVersion and kind {KIND}")
    for name, wanted in (("kind", KIND), ("apiVersion", API_VERSION)):
        if (given := content.get(name)) != wanted:
            missing = "is missing" if given is None else f"is {_shown(given)}"
            raise ConfigError(f"{name}: {missing}, it must be {wanted}")
    repeated = tuple(_repeated_fields(node, "", set())) if node else ()
    settings = {k: v for k, v in content.items() if k not in ("kind", "apiVersion")}
    unknown: list[str] = []
    config = _struct(_UNSET, settings, "", unknown)
    return Loaded(with_defaults(config), (*repeated, *unknown))


def dump(config: Config) -> dict[str, object]:
    """Return the content of the file that says what these settings say."""
    return {"apiVersion": API_VERSION, "kind": KIND, **_fields_of(config)}


# --- YAML ---------------------------------------------------------------------------------------


def _parse(text: str) -> tuple[yaml.Node | None, object]:
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"line {line}: {error.problem or 'not YAML'}") from None
    except (yaml.YAMLError, ValueError) as error:
        # ValueError: the loader lets through what int() or date() says of an odd scalar.
        raise ConfigError(f"not YAML: {str(error).splitlines()[0]}") from None


def _repeated_fields(node: yaml.Node, path: str, visited: set[int]) -> Iterator[str]:
    """Find the keys that a mapping has twice; the loader keeps the last one in silence."""
    if id(node) in visited:  # an alias: it may even contain itself
        return
    visited.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _repeated_fields(item, f"{path}[{index}]", visited)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        name = _join(path, str(key.value))
        if name in seen:
            line = key.start_mark.line + 1
            yield f"line {line}: {name} is given more than once; the last one counts"
        seen.add(name)
        yield from _repeated_fields(value, name, visited)


# --- decoding -----------------------------------------------------------------------------------


def _struct(base: S, value: object, path: str, unknown: list[str]) -> S:
    """Return ``base`` with the fields that ``value`` has; names nobody knows go to ``unknown``."""
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a mapping, got {_shown(value)}")
    known = {f.encode_name: f for f in fields(base)}
    settings = {f.name: getattr(base, f.name) for f in fields(base)}
    for key, item in value.items():
        name = str(key)
        where = _join(path, name)
        if name not in known:
            unknown.append(f"{where}: unknown field, ignored{did_you_mean(name, known)}")
        elif item is not None:  # null leaves what is there
            own = known[name]
            settings[own.name] = _value(own.type, settings[own.name], item, where, unknown)
    return type(base)(**settings)


def _value(type_: object, base: object, value: object, path: str, unknown: list[str]) -> object:
    if isinstance(base, Struct):
        return _struct(base, value, path, unknown)
    if type_ == tuple[VModule, ...]:
        items = enumerate(_list(value, path))
        return tuple(_struct(VModule(), item, f"{path}[{i}]", unknown) for i, item in items)
    if type_ == tuple[str, ...]:
        items = enumerate(_list(value, path))
        return tuple(_scalar(_string, item, f"{path}[{i}]") for i, item in items)
    if path == _MAY_BE_NANOSECONDS and type(value) is int:
        return value / 10**9
    return _scalar(_SCALARS[type_], value, path)


def _list(value: object, path: str) -> list[object]:
    if not isinstance(value, list):
        raise ConfigError(f"{path}: expected a list, got {_shown(value)}")
    return value


def _scalar(decode: Callable[[object], object], value: object, path: str) -> object:
    try:
        return decode(value)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def _string(value: object) -> str:
    if isinstance(value, str):
        return value
    quoted = "" if isinstance(value, dict | list) else " (write it in quotes)"
    raise ValueError(f"expected a string, got {_shown(value)}{quoted}")


def _bool(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError(f"expected true or false, got {_shown(value)}")


def _integer(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return int32(value)
    raise ValueError(f"expected an integer, got {_shown(value)}")


def _number(value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise ValueError(f"expected a number, got {_shown(value)}")


def _duration(value: object) -> float:
    if type(value) is int and value == 0:
        return 0.0
    if isinstance(value, str):
        return parse_duration(value)
    raise ValueError(f"expected a duration such as 30s or 1h30m, got {_shown(value)}")


def _quantity(value: object) -> str:
    if type(value) is int:
        return str(value)
    return _string(value)


def _gates(value: object) -> Mapping[str, bool]:
    if not isinstance(value, dict):
        raise ValueError(f"expected a mapping, got {_shown(value)}")
    for name, on in value.items():
        if not isinstance(on, bool):
            raise ValueError(f"expected true or false for {name}, got {_shown(on)}")
    return {str(name): on for name, on in value.items()}


_SCALARS: Final[Mapping[object, Callable[[object], object]]] = {
    str: _string,
    bool: _bool,
    int: _integer,
    float: _number,
    Seconds: _duration,
    Quantity: _quantity,
    Mapping[str, bool]: _gates,
}


def _shown(value: object) -> str:
    match value:
        case dict():
            return "a mapping"
        case list():
            return "a list"
        case _:
            return json.dumps(value, default=str, ensure_ascii=False)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# --- encoding -----------------------------------------------------------------------------------


def _fields_of(values: Struct) -> dict[str, object]:
    return {f.encode_name: _plain(f.type, getattr(values, f.name)) for f in fields(values)}


def _plain(type_: object, value: object) -> object:
    match value:
        case Struct():
            return _fields_of(value)
        case tuple():
            return [_fields_of(item) if isinstance(item, Struct) else item for item in value]
        case Mapping():
            return dict(value)
        case float() if type_ == Seconds:
            return duration_text(value)
        case _:
            return value
