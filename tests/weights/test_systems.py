"""The table of systems says what is true: names that build, commands that are understood."""

import shlex

import pytest

from vitrail.cli.train import effective_config
from vitrail.models import parse_name
from vitrail.recipes import recipe_config
from vitrail.weights.systems import SYSTEMS, System, systems


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: s.title)
def test_a_name_is_a_models_and_its_command_trains_one_of_its_kind(system: System):
    head, entry = parse_name(system.name)
    words = shlex.split(system.train)
    config = effective_config(words)
    assert config.data == "DIR"
    if "--recipe" in words:
        recipe = recipe_config(words[words.index("--recipe") + 1])
        assert config.lr == recipe.lr
    trained, backbone = parse_name(config.model)
    assert backbone.family == entry.family or head is not None
    assert (head and (head.task, type(head.config))) == (
        trained and (trained.task, type(trained.config))
    )


def test_the_table_has_a_row_for_each_system_with_its_paper():
    lines = systems()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")][1:]
    assert len(rows) == len(SYSTEMS) == len({s.title for s in SYSTEMS})
    for row, system in zip(rows, SYSTEMS, strict=True):
        assert row[0] == f"| {system.title}"
        assert row[1] == f"[{system.paper}](https://arxiv.org/abs/{system.paper})"
        assert row[2:] == [f"`{system.name}`", system.parity, f"`{system.train}` |"]
