"""Our counts beside the authors' figures, for every variant."""

import pytest

from vitrail.cli.models import count, differences, stored_counts
from vitrail.models import list_models
from vitrail.registry import backbone_entry


@pytest.mark.parametrize("name", list_models())
def test_every_figure_has_a_source_and_every_gap_a_reason(name):
    published = backbone_entry(name).published
    assert published is not None, "neither the authors' figures nor why there are none"
    assert published.source
    missing = [key for key in ("params", "macs", "top1") if getattr(published, key) is None]
    assert not missing or published.remark, f"nothing says why there is no {missing}"


@pytest.mark.parametrize("name", list_models())
def test_counts_equal_the_authors_or_the_difference_is_explained(name):
    counts = stored_counts()
    assert name in counts, "not counted yet: vitrail models --markdown docs/models.md"
    assert not [what for what, why in differences(name, counts[name]) if not why]


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models())
def test_the_stored_counts_are_those_of_the_model_on_meta(name):
    assert stored_counts()[name] == count(name)


def test_a_printed_figure_stands_for_what_it_may_be_rounded_from():
    # The table has 50 M and 8.7 G.
    assert differences("swin_small_patch4_window7", [50_200_000, 8_700_000_000]) == []
    ((what, why),) = differences("swin_small_patch4_window7", [49_510_000, 8_700_000_000])
    assert "49.51 M against 50 M (-1.0 %)" in what
    assert why == "rounded there"
    ((_, why),) = differences("swin_small_patch4_window7", [49_490_000, 8_700_000_000])
    assert why == ""
    ((what, why),) = differences("swin_small_patch4_window7", [50_000_000, 8_800_000_000])
    assert "multiply-adds 8.8 G against 8.7 G (+1.1 %)" in what
    assert why == ""
