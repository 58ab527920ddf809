"""The documentation says what the code does."""

from docs.make_configuration import PAGE, page


def test_the_configuration_reference_is_current():
    assert PAGE.read_text() == page(), "run `make docs`"


def test_every_setting_is_explained():
    for line in page().splitlines():
        if line.startswith("| `"):
            assert line.split(" | ")[-1].strip(" |"), f"no meaning: {line}"
