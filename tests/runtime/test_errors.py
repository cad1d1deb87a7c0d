"""Messages: long lists are cut, and say how long they are."""

import pytest

from vitrail_runtime.errors import listed


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, ""), (1, "0"), (3, "0, 1, 2"), (4, "0, 1, 2, ... (4 in all)")],
)
def test_a_list_is_cut_where_it_is_longer_than_the_limit(count, expected):
    assert listed(map(str, range(count)), limit=3) == expected


def test_ten_are_shown_and_lines_may_part_them():
    assert listed("abcdefghij") == "a, b, c, d, e, f, g, h, i, j"
    assert listed("abc", "\n", 2) == "a\nb\n... (3 in all)"
