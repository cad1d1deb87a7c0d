"""What an analysis has found is handed to pages and files, and neither alters it."""

import vitrail.analysis
from tests.records import unfrozen


def test_what_an_analysis_hands_on_cannot_be_altered():
    gathered = {
        "LayerStudy",
        "StageStudy",
        "AttentionStudy",
        "Page",
    }  # batch by batch, part by part
    assert unfrozen(vitrail.analysis) <= gathered
