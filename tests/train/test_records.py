"""Settings and figures of a run are handed from one part to the next, and no part alters them."""

import vitrail.train
from tests.records import unfrozen


def test_what_training_hands_on_cannot_be_altered():
    assert unfrozen(vitrail.train) <= {"Run", "Position"}  # which go on from step to step
