"""The text of a manifest file as parsed documents: YAML or JSON, one after another."""

import contextlib
import json
from collections.abc import Hashable, Iterator
from typing import Final

import yaml

try:
    from yaml import CSafeLoader as SafeLoader
except ImportError:  # PyYAML without libyaml
    from yaml import SafeLoader  # type: ignore[assignment]  # same interface, slower

MAX_DEPTH: Final = 1000

_TIMESTAMP: Final = "tag:yaml.org,2002:timestamp"
_MERGE: Final = "tag:yaml.org,2002:merge"


class ManifestTextError(Exception):
    """The text is neither YAML nor JSON; the message is one line with the document and the line."""


def documents_of(text: str, *, is_json: bool) -> tuple[object, ...]:
    """Return the documents, with None for an empty one so that the numbers stay true."""
    read = _json_documents if is_json else _yaml_documents
    documents: list[object] = []
    try:
        documents.extend(read(text))
    except yaml.YAMLError as error:
        raise _text_error(len(documents), _yaml_complaint(error)) from error
    except json.JSONDecodeError as error:
        raise _text_error(len(documents), f"line {error.lineno}: {error.msg}") from error
    except (RecursionError, _DepthError) as error:
        raise _text_error(len(documents), "it is nested too deeply") from error
    except ValueError as error:  # a constructor's: 2026-99-99, or a number of 10,000 digits
        raise _text_error(len(documents), str(error).partition("\n")[0]) from error
    return tuple(documents)


class _DepthError(Exception):
    """More than MAX_DEPTH levels."""


def _text_error(documents_before: int, complaint: str) -> ManifestTextError:
    return ManifestTextError(f"document {documents_before + 1}: {complaint}")


class _Loader(SafeLoader):
    """YAML as Kubernetes reads it: a time is text, and a key stands once in a mapping."""

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False
    ) -> dict[Hashable, object]:
        # Two objects without the --- between them look like this, and one would be lost.
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f'the key "{key.value}" is there twice (is a --- missing?)',
                    problem_mark=key.start_mark,
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
    for first, resolvers in SafeLoader.yaml_implicit_resolvers.items()
}


def _yaml_documents(text: str) -> Iterator[object]:
    _refuse_depth(text)
    documents: Iterator[object] = yaml.load_all(text, _Loader)
    return documents


def _refuse_depth(text: str) -> None:
    """Keep the loader from its own stack: its C code descends until the process dies (PyYAML 6.0).

    A level costs a bracket, or a column of a line, so that nearly all files are known to be flat
    without being parsed once more.
    """
    brackets = text.count("[") + text.count("{")
    if brackets < MAX_DEPTH and all(len(line) < MAX_DEPTH for line in text.splitlines()):
        return
    depth = 0
    for event in _events(text):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise _DepthError


def _events(text: str) -> Iterator[object]:
    # The loader stops at the same error, and knows in which document it is.
    with contextlib.suppress(yaml.YAMLError):
        yield from yaml.parse(text, SafeLoader)


def _json_documents(text: str) -> Iterator[object]:
    decoder = json.JSONDecoder()
    at = _next_word(text, 0)
    while at < len(text):
        document, end = decoder.raw_decode(text, at)
        yield document
        at = _next_word(text, end)


def _next_word(text: str, at: int) -> int:
    return len(text) - len(text[at:].lstrip())


def _yaml_complaint(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        # libyaml writes an article and a class name before some problems; both say nothing.
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())
