"""Samples of images: few pages, never zero, the same for the same content."""

import os
import random

import pytest

from pageferry.workers.sampling import PLACES, sample

PAGE = 4096


def write(path, pages):
    """`pages`: content by number of a page; None is a hole."""
    with open(path, "wb") as file:
        for content in pages:
            if content is None:
                file.seek(PAGE, os.SEEK_CUR)
            else:
                file.write(content)
        file.truncate(len(pages) * PAGE)
    return str(path)


def content(count, seed=1):
    draw = random.Random(seed)
    return [draw.randbytes(PAGE) for _ in range(count)]


@pytest.mark.parametrize("pages", [1, 2, 63, 64, 65, 127, 1000, 1024])
def test_a_few_dozen_pages_all_over_the_image(tmp_path, pages):
    found = sample(write(tmp_path / "a", content(pages)))
    assert min(pages, PLACES // 2) <= len(found) <= PLACES
    assert len({digest for _, digest in found}) == len(found)
    assert found[-1][0] >= pages * 15 // 16 - 1


def test_clones_have_the_same_but_where_they_differ(tmp_path):
    ours = content(640)
    theirs = list(ours)
    for page in range(0, 640, 20):
        theirs[page] = content(1, seed=page)[0]
    a, b = sample(write(tmp_path / "a", ours)), sample(write(tmp_path / "b", theirs))
    assert len(set(a) & set(b)) >= len(a) // 2
    stranger = sample(write(tmp_path / "c", content(640, seed=2)))
    assert not set(a) & set(stranger)


def test_images_of_similar_sizes_have_places_in_common(tmp_path):
    ours = content(640)
    a, b = sample(write(tmp_path / "a", ours)), sample(write(tmp_path / "b", ours[:500]))
    assert len(set(a) & set(b)) * 2 >= min(len(a), len(b))


def test_zero_pages_say_nothing_and_what_is_behind_them_does(tmp_path):
    ours = content(640)
    for page in range(0, 640, 2):
        ours[page] = bytes(PAGE)
    found = sample(write(tmp_path / "a", ours))
    assert len(found) >= PLACES // 2 and all(page % 2 for page, _ in found)
    assert sample(write(tmp_path / "zero", [bytes(PAGE)] * 100)) == []


def test_holes_are_passed_over(tmp_path):
    ours = [None] * 6400
    ours[3000:3100] = content(100)
    found = sample(write(tmp_path / "a", ours))
    assert found and all(3000 <= page < 3100 for page, _ in found)
    assert sample(write(tmp_path / "hole", [None] * 100)) == []


def test_what_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "short").write_bytes(b"x" * 100)
    for name in ("pipe", "lacks", "short", "."):
        assert sample(str(tmp_path / name)) == []
