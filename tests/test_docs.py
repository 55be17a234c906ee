"""What the pages of docs/ and the README show; `test_notebooks.py` builds the site."""

import re

import pytest
import yaml

from workbench import batch, cli, runs

ROOT = runs.project_root()
PAGES = sorted((ROOT / "docs").glob("*.md"))


def commands():
    """Each command `workbench …` that a page shows, with the page."""
    for page in [*PAGES, ROOT / "README.md"]:
        for line in re.findall(r"^(?:    |)(workbench [a-z]+ .*?)(?:\s+#.*)?$", page.read_text(), re.MULTILINE):
            yield pytest.param(line, id=f"{page.stem}: {line}")


@pytest.mark.parametrize("line", list(commands()))
def test_every_command_that_is_shown_is_one_that_there_is(line):
    cli._parser().parse_args(line.split()[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_recipes_that_pages_show_name_parameters_that_there_are(page):
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
        if "data_folder:" in block:
            batch.check_parameters(ROOT, yaml.safe_load(block), where=page.name)


def test_every_test_that_is_said_to_keep_a_promise_is_there():
    there = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    said = (ROOT / "README.md").read_text() + (ROOT / "docs" / "promises.md").read_text()
    for name in re.findall(r"`(test_\w+)`", said):
        assert f"def {name}(" in there, name
    for name in re.findall(r"`(test_\w+\.py)`", said):
        assert (ROOT / "tests" / name).is_file(), name
