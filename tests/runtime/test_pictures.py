"""Files, folders and patterns."""

import os

import pytest

from vitrail_runtime.decoding import IMAGE_SUFFIXES, decode
from vitrail_runtime.errors import InputError
from vitrail_runtime.pictures import find_pictures


@pytest.fixture
def tree(tmp_path):
    for name in (
        "b.JPG",
        "a.png",
        "notes.txt",
        ".hidden.jpg",
        "sub/c.webp",
        "sub/Äpfel.tif",
        ".git/d.jpg",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def names(tree, source):
    return [p.relative_to(tree).as_posix() for p in find_pictures(source)]


def test_a_folder_gives_its_pictures_at_any_depth_in_sorted_order(tree):
    assert names(tree, tree) == ["a.png", "b.JPG", "sub/c.webp", "sub/Äpfel.tif"]


def test_a_file_is_itself_whatever_its_name(tree):
    assert names(tree, tree / "notes.txt") == ["notes.txt"]


def test_patterns_match_pictures_and_folders(tree):
    assert names(tree, f"{tree}/*") == ["a.png", "b.JPG", "sub/c.webp", "sub/Äpfel.tif"]
    assert names(tree, f"{tree}/**") == ["a.png", "b.JPG", "sub/c.webp", "sub/Äpfel.tif"]
    assert names(tree, f"{tree}/**/*.w*") == ["sub/c.webp"]
    assert names(tree, f"{tree}/[ab].*") == ["a.png", "b.JPG"]


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tree):
    (tree / "x[1].png").touch()
    assert names(tree, tree / "x[1].png") == ["x[1].png"]


def test_loops_of_links_end_and_linked_folders_count_once(tree):
    os.symlink(tree, tree / "sub" / "loop")
    os.symlink(tree / "sub", tree / "again")
    found = names(tree, tree)
    assert len(found) == len(set(found)) == 4


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no.jpg", "no such file or folder"),
        ("*.gif", r"no pictures match .*\*\.gif"),
        (".git/x", "no such file"),
    ],
)
def test_what_is_not_there_is_named(tree, source, message):
    with pytest.raises(InputError, match=message):
        find_pictures(tree / source)


def test_a_folder_without_pictures_says_what_counts_as_one(tmp_path):
    with pytest.raises(InputError, match=r"no pictures in .*\.avif, .*\.webp count"):
        find_pictures(tmp_path)


@pytest.mark.parametrize("target", ["gone.jpg", "link.jpg"], ids=["nothing", "itself"])
def test_a_link_that_leads_nowhere_is_a_file_that_cannot_be_read(tree, target):
    os.symlink(target, tree / "link.jpg")
    everything = ["a.png", "b.JPG", "link.jpg", "sub/c.webp", "sub/Äpfel.tif"]
    assert names(tree, tree / "link.jpg") == ["link.jpg"]
    assert names(tree, tree) == everything
    assert names(tree, f"{tree}/*.jpg") == ["link.jpg"]
    with pytest.raises(
        InputError, match=r"link\.jpg cannot be read: no such file \(a link to nothing\)"
    ):
        decode(tree / "link.jpg")


def test_a_pattern_for_any_depth_goes_round_no_loop(tree, monkeypatch):
    os.symlink(tree, tree / "a-loop")
    os.symlink(tree, tree / "sub" / "loop")
    assert names(tree, f"{tree}/**") == names(tree, tree)
    assert names(tree, f"{tree}/**/*.png") == ["a.png"]
    (tree / "sub" / "a.png").touch()  # another file of that name
    assert names(tree, f"{tree}/**/*.png") == ["a.png", "sub/a.png"]
    assert names(tree, f"{tree}/s*/**/[ab].*") == ["sub/a.png"]
    monkeypatch.chdir(tree)
    assert [str(p) for p in find_pictures("**/*.png")] == ["a.png", "sub/a.png"]


def test_every_suffix_of_a_picture_counts_in_either_case_and_no_other(tmp_path):
    other = ("eps", "svg", "pdf", "txt", "jpgx", "")
    for i, suffix in enumerate([*sorted(IMAGE_SUFFIXES), *other]):
        (tmp_path / f"{i:02}{suffix}").touch()
        (tmp_path / f"{i:02}-large{suffix.upper()}").touch()
    (tmp_path / "jpg").touch()  # a name, not a suffix
    for source in (tmp_path, f"{tmp_path}/*", f"{tmp_path}/**"):
        found = find_pictures(source)
        assert len(found) == 2 * len(IMAGE_SUFFIXES)
        assert found == sorted(found)
        assert {p.suffix.lower() for p in found} == IMAGE_SUFFIXES


def test_hidden_files_and_folders_count_where_they_are_named(tree):
    assert names(tree, tree / ".git") == [".git/d.jpg"]
    assert names(tree, tree / ".hidden.jpg") == [".hidden.jpg"]
    assert names(tree, f"{tree}/.git/*") == [".git/d.jpg"]
    with pytest.raises(InputError, match="no pictures match"):
        find_pictures(f"{tree}/*hidden*")


def test_a_folder_that_a_pattern_matches_is_searched_and_each_file_comes_once(tree):
    (tree / "sub" / "deep").mkdir()
    (tree / "sub" / "deep" / "e.png").touch()
    assert names(tree, f"{tree}/s*") == ["sub/c.webp", "sub/deep/e.png", "sub/Äpfel.tif"]
    assert names(tree, f"{tree}/sub/*") == ["sub/c.webp", "sub/deep/e.png", "sub/Äpfel.tif"]
    assert names(tree, f"{tree}/?.png") == ["a.png"]
    assert names(tree, f"{tree}/**/d*/*") == ["sub/deep/e.png"]
    assert names(tree, f"{tree}/**/sub/**") == ["sub/c.webp", "sub/deep/e.png", "sub/Äpfel.tif"]
