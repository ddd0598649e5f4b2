import pytest

from docs.make_reference import FOLDER, PAGES


@pytest.mark.parametrize("name", PAGES)
def test_a_reference_says_what_the_code_does(name):
    assert (FOLDER / name).read_text() == PAGES[name](), "python -m docs.make_reference renews it"
