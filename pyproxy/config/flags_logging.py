"""The flags of logging, which win over the file."""

from typing import Final

from pyproxy.config.flags_kinds import BOOL, DURATION, LEVEL, STRING, VMODULE, Flag, Group

LOGGING: Final = Group(
    "Logging (these win over the file)",
    (
        Flag("v", LEVEL, "logging.verbosity", "How much to log; 0 is little, 4 is for debugging."),
        Flag(
            "vmodule",
            VMODULE,
            "logging.vmodule",
            "Another level for some source files, for instance runner=4. Format text only.",
        ),
        Flag("logging-format", STRING, "logging.format", "text or json.", placeholder="FORMAT"),
        Flag(
            "log-flush-frequency",
            DURATION,
            "logging.flush_frequency_seconds",
            "Accepted; every line is written at once.",
        ),
        Flag(
            "log-text-split-stream",
            BOOL,
            "logging.options.text.split_stream",
            "Format text: errors to stderr, the rest to stdout. Gate LoggingAlphaOptions.",
        ),
        Flag(
            "log-text-info-buffer-size",
            STRING,
            "logging.options.text.info_buffer_size",
            "Accepted; nothing is buffered.",
            placeholder="SIZE",
        ),
        Flag(
            "log-json-split-stream",
            BOOL,
            "logging.options.json.split_stream",
            "Format json: errors to stderr, the rest to stdout. Gate LoggingAlphaOptions.",
        ),
        Flag(
            "log-json-info-buffer-size",
            STRING,
            "logging.options.json.info_buffer_size",
            "Accepted; nothing is buffered.",
            placeholder="SIZE",
        ),
    ),
)
