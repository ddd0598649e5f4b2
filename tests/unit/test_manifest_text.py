"""The text of manifest files as documents."""

import pytest

from pyproxy.manifests.text import ManifestTextError, documents_of


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        pytest.param("", (), id="empty"),
        pytest.param("# nothing\n", (), id="a comment"),
        pytest.param("---\na: 1\n", ({"a": 1},), id="begins with a mark"),
        pytest.param("a: 1\n---\n---\nb: 2\n", ({"a": 1}, None, {"b": 2}), id="empty between"),
        pytest.param("at: 2026-01-01T00:00:00Z\n", ({"at": "2026-01-01T00:00:00Z"},), id="a time"),
        pytest.param("a: &x {b: 1}\nc: *x\n", ({"a": {"b": 1}, "c": {"b": 1}},), id="alias"),
        pytest.param(
            "a: &x {b: 1}\nc: {<<: *x, b: 2}\n", ({"a": {"b": 1}, "c": {"b": 2}},), id="<<"
        ),
        pytest.param("[" + "[], " * 2000 + "]", ([[]] * 2000,), id="many brackets, not deep"),
    ],
)
def test_yaml(text, documents):
    assert documents_of(text, is_json=False) == documents


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        pytest.param("", (), id="empty"),
        pytest.param('{"a":\t1}\n', ({"a": 1},), id="one"),
        pytest.param('{"a": 1}\n\n{"b": 2}', ({"a": 1}, {"b": 2}), id="several"),
    ],
)
def test_json(text, documents):
    assert documents_of(text, is_json=True) == documents


@pytest.mark.parametrize(
    ("text", "is_json", "error"),
    [
        pytest.param(
            "a: 1\n---\nb: [\n", False, "document 2: line 4: did not find", id="never closed"
        ),
        pytest.param(
            "a: 1\n---\nb: [" + "[], " * 2000 + "\n",
            False,
            "document 2: line 4: did not find",
            id="never closed, many brackets",
        ),
        pytest.param(
            "kind: Service\nkind: Pod\n",
            False,
            'document 1: line 2: the key "kind" is there twice (is a --- missing?)',
            id="twice",
        ),
        pytest.param("a: !!python/name:os.system x\n", False, "document 1: line 1:", id="a tag"),
        pytest.param("? [a]\n: 1\n", False, "document 1: line 1: found unhashable key", id="a key"),
        pytest.param("a: \x00\n", False, "document 1: ", id="a control character"),
        pytest.param(f"a: {'9' * 5000}\n", False, "document 1: ", id="a huge number"),
        pytest.param('{"a": 1}\n{"b" 2}', True, "document 2: line 2: Expecting ':'", id="JSON"),
        pytest.param("[" * 100_000, True, "document 1: it is nested too deeply", id="deep JSON"),
        pytest.param("[" * 100_000, False, "document 1: it is nested too deeply", id="brackets"),
        pytest.param("- " * 100_000, False, "document 1: it is nested too deeply", id="one line"),
    ],
)
def test_text_that_is_neither_says_where(text, is_json, error):
    with pytest.raises(ManifestTextError) as raised:
        documents_of(text, is_json=is_json)
    assert str(raised.value).startswith(error)
    assert "\n" not in str(raised.value)
