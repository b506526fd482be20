"""docs/algorithms.md says what the code does, and is a table that a reader can read."""

import re

import pytest

import docs.algorithms
from docs.algorithms import PAPERS, PATH
from docs.settings import SETTINGS
from rlsys.algo.catalogue import SYSTEMS, TABLES, formula_of, linked, markdown_table, prose
from rlsys.algo.rows import facts_of
from rlsys.config.checks import check_sections
from rlsys.config.load import load_config
from rlsys.config.presets import PRESETS, resolve
from rlsys.plan.algorithm import check_rows

ROWS = [(table, name) for table in TABLES for name in table.rows]
SETTINGS_HERE = [(system, setting) for system, settings in SETTINGS.items() for setting in settings if setting.ours]
QUICKSTART = PATH.parent.parent / "configs" / "quickstart.yaml"


def cells_of(line: str) -> list[str]:
    return re.split(r"(?<!\\)\|", line)[1:-1]


def test_the_file_is_what_the_code_makes_of_it():
    assert PATH.read_text(encoding="utf-8") == docs.algorithms.text(), "run: python -m docs.algorithms"


@pytest.mark.parametrize(("table", "name"), ROWS, ids=lambda value: getattr(value, "name", value))
def test_every_row_has_a_source_and_a_formula_and_is_called_by_its_name(table, name):
    assert facts_of(table.rows[name]).source
    assert formula_of(table.rows[name])
    assert table.rows[name].__name__ == name


def test_every_line_of_a_table_has_as_many_cells_as_its_head():
    lines, head = docs.algorithms.text().splitlines(), None
    for line in lines:
        if not line.startswith("|"):
            head = None
            continue
        head = head or len(cells_of(line))
        assert len(cells_of(line)) == head and all(cell.strip() for cell in cells_of(line)), line


def test_every_section_that_is_linked_to_is_there():
    text = docs.algorithms.text()
    headings = re.findall(r"^## (.+)$", text, re.M)
    places = {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#(.+?)\)", text)) == places


def test_every_preset_has_its_paper():
    assert PRESETS.keys() == PAPERS.keys()


def test_the_systems_with_a_column_are_those_whose_settings_are_told():
    assert tuple(SETTINGS) == SYSTEMS


@pytest.mark.parametrize(("system", "setting"), SETTINGS_HERE, ids=lambda value: getattr(value, "theirs", value))
def test_what_a_setting_elsewhere_is_here_can_be_configured(system, setting, tmp_path):
    config = resolve(load_config(QUICKSTART, [*setting.ours, f"run.root={tmp_path}"]))
    check_sections(config)
    check_rows(config)


def test_a_setting_with_nothing_to_set_says_why():
    assert all(setting.ours or setting.difference for settings in SETTINGS.values() for setting in settings)


def test_words_are_not_taken_for_markup():
    assert prose("|x| < 2\n   and a*b, _low, 2 * 3") == r"\|x\| &lt; 2 and a\*b, \_low, 2 * 3"
    assert prose("the row ``a|b_`` alone") == r"the row `a\|b_` alone"
    assert (
        linked("DAPO, arXiv:2503.14476 (clip)") == "DAPO, [arXiv:2503.14476](https://arxiv.org/abs/2503.14476) (clip)"
    )


def test_an_empty_cell_has_a_dash():
    assert markdown_table(("a", "b"), [("1", "")]) == "| a | b |\n| --- | --- |\n| 1 | - |\n"
