"""What is drawn, planned and found is handed from one part to the next, and no part alters it."""

import vitrail.data
from tests.records import unfrozen


def test_what_data_hands_on_cannot_be_altered():
    # One row of a checkup, completed as it is read; a JSON file, whose annotations go once they are read.
    assert unfrozen(vitrail.data) <= {"_Seen", "Document"}
