"""From the words of a command line, and the text of a file, to the settings in effect. No I/O."""

from collections.abc import Iterator, Mapping, Sequence
from textwrap import wrap
from typing import Final, Literal

from msgspec import Struct, field
from msgspec.structs import replace

from pyproxy.config import (
    HEALTHZ_PORT,
    METRICS_PORT,
    Config,
    VModule,
    node_name,
    setting,
    with_setting,
)
from pyproxy.config import file as config_file
from pyproxy.config.check import other_defaults
from pyproxy.config.file import Loaded
from pyproxy.config.flags_kinds import BOOL, DURATION, Flag, Value
from pyproxy.config.flags_logging import LOGGING
from pyproxy.config.flags_table import FLAGS, GROUPS, SHORT
from pyproxy.config.text import ConfigError, did_you_mean, duration_text, with_port

_USAGE: Final = (
    ("pyproxy run [flags]", "serve this node, until told to stop"),
    ("pyproxy [flags]", "the same"),
    ("pyproxy cleanup", "remove the rules of every mode"),
    ("pyproxy demo", "see it work, without a cluster"),
    ("pyproxy render -f FILE", "print the rules for manifests, changing nothing"),
    ("pyproxy get WHAT", "what is programmed, at which version"),
    ("pyproxy explain SERVICE", "what becomes of connections to it, and why"),
    ("pyproxy top", "how much goes to which Service"),
    ("pyproxy wait SERVICE", "return once it is programmed"),
    ("pyproxy diff", "what differs, or would with other settings"),
    ("pyproxy audit", "compare with the kernel, and put it right"),
    ("pyproxy doctor", "what is wrong with this node, and what to do"),
    ("pyproxy migrate --to MODE", "move to another mode, losing no connection"),
    ("pyproxy help COMMAND", "what a command takes"),
)
_HELP_COLUMN: Final = 30


class Options(Struct, frozen=True):
    """What a command line says. ``given`` has the values of the flags that stand for settings."""

    config: str = ""
    write_config_to: str = ""
    cleanup: bool = False
    keep: str = ""
    init_only: bool = False
    master: str = ""
    version: bool = False
    help: bool = False
    manifests: str = ""
    control_socket: str = "/run/pyproxy/pyproxy.sock"
    state_dir: str = "/var/lib/pyproxy"
    service_cidr: tuple[str, ...] = ("10.96.0.0/16", "fd00:10:96::/112")
    event_loop: Literal["auto", "uvloop", "asyncio"] = "auto"
    healthz_port: int = HEALTHZ_PORT
    metrics_port: int = METRICS_PORT
    given: Mapping[str, Value] = field(default_factory=dict)
    deprecated: tuple[str, ...] = ()  # flags given that something replaces


# --- parsing ------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> Options:
    """Read flags as kube-proxy does. Raises ConfigError for the first word that makes no sense."""
    given: dict[str, Value] = {}
    words = iter(argv)
    for word in words:
        if word == "--":
            word = next(words, "")
            if not word:
                break
            raise ConfigError(f'unexpected argument "{word}": there are only flags')
        flag, text = _flag_and_text(word)
        if text is None:
            text = "true" if flag.kind is BOOL else next(words, None)
        if text is None:
            raise ConfigError(f"--{flag.name}: a value is missing")
        given[flag.name] = _with_earlier(given.get(flag.name), _value(flag, text))
    options = Options(
        given={name: value for name, value in given.items() if FLAGS[name].setting},
        deprecated=tuple(name for name in given if FLAGS[name].instead),
    )
    for name in given.keys() - options.given.keys():
        options = with_setting(options, _field(FLAGS[name]), given[name])
    return options


def _flag_and_text(word: str) -> tuple[Flag, str | None]:
    if not word.startswith("-") or word == "-":
        raise ConfigError(f'unexpected argument "{word}": there are only flags')
    if not word.startswith("--"):
        name, rest = SHORT.get(word[1], word[1]), word[2:]
        text = rest.removeprefix("=") if rest else None
    else:
        name, equals, rest = word[2:].partition("=")
        name, text = name.replace("_", "-"), rest if equals else None
    if name not in FLAGS:
        near = did_you_mean(name, FLAGS, prefix="--") if word.startswith("--") else ""
        raise ConfigError(f"unknown flag {word.partition('=')[0]}{near}")
    return FLAGS[name], text


def _value(flag: Flag, text: str) -> Value:
    try:
        return flag.kind.parse(text)
    except ValueError as error:
        raise ConfigError(f"--{flag.name}: {error}") from None


def _with_earlier(earlier: Value | None, value: Value) -> Value:
    """Lists and mappings grow when a flag is repeated; of anything else the last one counts."""
    match earlier, value:
        case tuple(), tuple():
            return (*earlier, *value)
        case Mapping(), Mapping():
            return {**earlier, **value}
        case _:
            return value


# --- precedence ---------------------------------------------------------------------------------


def effective_config(options: Options, file_text: str | None, hostname: str) -> Loaded:
    """Return the settings in effect: from the file if there is one, else from flags."""
    if file_text is None:
        config, warnings = Loaded(_from_flags(options))
    else:
        config, warnings = config_file.load(file_text)
        config = _with_logging_flags(config, options.given)
        warnings = (*warnings, *_ignored(options.given))
    if override := str(options.given.get("hostname-override", "")):
        config = replace(config, hostname_override=override)
        config = replace(config, hostname_override=node_name(config, ""))
    node_name(config, hostname)  # raises where there is none
    return Loaded(config, (*warnings, *_deprecations(options), *other_defaults(config)))


def _from_flags(options: Options) -> Config:
    given = options.given
    mode = str(given.get("proxy-mode", "")) or "auto"
    config = replace(Config(), mode=mode)
    if mode == "ipvs":
        # kube-proxy has one pair of periods for flags, with the defaults of mode iptables.
        config = with_setting(config, "ipvs.min_sync_period_seconds", 1.0)
    for name, value in given.items():
        if value != "":  # an empty text leaves the default
            for path in _settings_in_mode(FLAGS[name], mode):
                config = with_setting(config, path, value)
    return _with_ports(config, options)


def _settings_in_mode(flag: Flag, mode: str) -> tuple[str, ...]:
    """Return what a flag sets: some have no block of their own, and mean that of the mode."""
    block, _, name = flag.setting.partition(".")
    blocks: Mapping[str, tuple[str, ...]]
    match flag.name:
        case "masquerade-all":
            blocks = {"nftables": ("nftables",), "auto": ("iptables", "nftables")}
        case "iptables-sync-period" | "iptables-min-sync-period":
            blocks = {"nftables": ("nftables",), "auto": ("iptables", "nftables"), "ipvs": ()}
        case "ipvs-sync-period" | "ipvs-min-sync-period":
            return (flag.setting,) if mode == "ipvs" else ()
        case _:
            return (flag.setting,)
    return tuple(f"{block}.{name}" for block in blocks.get(mode, (block,)))


def _with_ports(config: Config, options: Options) -> Config:
    """Complete addresses that have no port; a deprecated port flag of 0 empties the address."""
    healthz_port, metrics_port = options.healthz_port, options.metrics_port
    if options.write_config_to:
        healthz_port, metrics_port = HEALTHZ_PORT, METRICS_PORT
    healthz = with_port(config.healthz_bind_address, healthz_port) if healthz_port else ""
    metrics = with_port(config.metrics_bind_address, metrics_port) if metrics_port else ""
    return replace(config, healthz_bind_address=healthz, metrics_bind_address=metrics)


def _with_logging_flags(config: Config, given: Mapping[str, Value]) -> Config:
    from_file = config.logging.vmodule
    for flag in LOGGING.flags:
        if flag.name in given:
            config = with_setting(config, flag.setting, given[flag.name])
    if "vmodule" in given:  # the first pattern that matches a file counts
        both = (*config.logging.vmodule, *from_file)
        config = with_setting(config, "logging.vmodule", both)
    return config


def _ignored(given: Mapping[str, Value]) -> Iterator[str]:
    heard = {"hostname-override", *(flag.name for flag in LOGGING.flags)}
    if names := [f"--{name}" for name in given if name not in heard]:
        yield f"--config: the file replaces {', '.join(names)}"


def _deprecations(options: Options) -> Iterator[str]:
    for name in options.deprecated:
        yield f"--{name}: is deprecated, use {FLAGS[name].instead}"


# --- for people ---------------------------------------------------------------------------------


def help_text(width: int = 80) -> str:
    """Return what ``--help`` prints."""
    lines = ["pyproxy makes the Services of a Kubernetes cluster work on this node.", "", "Usage:"]
    lines += [f"  {usage:<{_HELP_COLUMN - 2}}{purpose}" for usage, purpose in _USAGE]
    for group in GROUPS:
        lines += ["", f"{group.title}:"]
        for flag in group.flags:
            lines += _help_lines(flag, width)
    return "".join(f"{line}\n" for line in lines)


def _help_lines(flag: Flag, width: int) -> list[str]:
    short = next((f"-{letter}, " for letter, name in SHORT.items() if name == flag.name), "")
    placeholder = flag.placeholder or flag.kind.placeholder
    head = f"  {short}--{flag.name} {placeholder}".rstrip()
    default = f" (default {shown})" if (shown := _default_shown(flag)) else ""
    text = wrap(flag.help + default, width - _HELP_COLUMN, break_on_hyphens=False)
    lines = [" " * _HELP_COLUMN + line for line in text]
    if len(head) > _HELP_COLUMN - 2:
        return [head, *lines]
    return [f"{head:<{_HELP_COLUMN}}{text[0]}", *lines[1:]]


def _default_shown(flag: Flag) -> str:
    default = _in_effect(flag, Options())
    empty = default is False or default in ("", (), {})
    return flag.default or ("" if empty else _shown(flag, default))


def flag_values(options: Options) -> dict[str, str]:
    """Return every flag with its value, given or not: what ``/flagz`` shows."""
    return {name: _shown(flag, _in_effect(flag, options)) for name, flag in FLAGS.items()}


def _in_effect(flag: Flag, options: Options) -> object:
    if not flag.setting:
        return setting(options, _field(flag))
    return options.given.get(flag.name, setting(Config(), flag.setting))


def _field(flag: Flag) -> str:
    return flag.name.replace("-", "_")


def _shown(flag: Flag, value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case float() if flag.kind is DURATION:
            return duration_text(value)
        case float():
            return f"{value:g}"
        case tuple():
            return ",".join(_item(item) for item in value)
        case Mapping():
            return ",".join(f"{name}={str(on).lower()}" for name, on in sorted(value.items()))
        case _:
            return str(value)


def _item(item: object) -> str:
    return f"{item.file_pattern}={item.verbosity}" if isinstance(item, VModule) else str(item)
