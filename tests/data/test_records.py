"""What is drawn, planned and found is handed from one part to the next, and no part alters it."""

import vitrail.data
from tests.records import unfrozen


def test_what_data_hands_on_cannot_be_altered():
    assert unfrozen(vitrail.data) <= {"_Seen"}  # one row of a checkup, completed as it is read
