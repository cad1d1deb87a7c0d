"""What a detector's report says: scores by class and overlap, what mistakes cost, the worst images."""

from typing import Any

from vitrail.tasks.section import Rows, Section


def sections(found: Any) -> list[Section]:
    """found.scores: as `Scores.to_dict` gives them."""
    scores = found.scores or {}
    rows = [(key, scores[key]) for key in ("AP", "AP50", "AP75") if key in scores]
    return [Section("Scores", (Rows(("", ""), rows),), opening=True)]
