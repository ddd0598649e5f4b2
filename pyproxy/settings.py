"""Reads the settings in effect: flags, and the file that they name."""

from pathlib import Path

from pyproxy.config.check import validate
from pyproxy.config.file import Loaded
from pyproxy.config.flags import Options, effective_config
from pyproxy.config.text import ConfigError


class SettingsError(Exception):
    """The settings cannot be used; each argument is one line for a terminal."""


def file_text(options: Options) -> str | None:
    """Return what the configuration file says, if there is one. Raises ``SettingsError``."""
    if not options.config:
        return None
    try:
        return Path(options.config).read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"--config {options.config}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        problem = f"byte {error.start} is not UTF-8"
        raise SettingsError(f"--config {options.config}: {problem}") from error


def loaded(options: Options, text: str | None, hostname: str) -> Loaded:
    """Return the settings in effect. Raises ``SettingsError``."""
    where = f"--config {options.config}: " if options.config else ""
    try:
        found = effective_config(options, text, hostname)
    except ConfigError as error:
        raise SettingsError(f"{where}{error}") from error
    if problems := validate(found.config):
        raise SettingsError(*(where + problem for problem in problems))
    return found
