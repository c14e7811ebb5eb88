"""One contract for a folder of this machine and for a bucket."""

import time
from pathlib import Path

import numpy as np
import pytest
from advice import follows
from gcs_server import BUCKET, GcsServer, key_of

from mtp_model.files.memory import AlignedBuffer
from mtp_model.files.open import as_place
from mtp_model.files.place import Place, digest
from mtp_model.problems import UserError

DATA = bytes(range(256)) * 20


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path, gcs: GcsServer, url: str) -> Place:  # noqa: ARG001
    return as_place(tmp_path / "place" if request.param == "folder" else url)


@pytest.fixture
def filled(place: Place) -> Place:
    """With a file, and one in a folder."""
    (place / "sub").make_folder()
    (place / "a").write_pieces([DATA[:100], DATA[100:]])
    (place / "sub" / "b").write_pieces([b"b"])
    return place


def test_what_is_there(filled: Place):
    assert filled.is_dir()
    assert (filled / "a").is_file()
    assert not (filled / "sub").is_file()
    assert not (filled / "absent").exists()
    assert [entry.name for entry in filled.entries()] == ["a", "sub"]
    assert [entry.name for entry in filled.entries("s")] == ["sub"]
    assert (filled / "absent").entries() == []
    assert filled.sizes() == {"a": len(DATA), "sub/b": 1}
    assert (filled / "sub").parent.is_same(filled)
    assert as_place(str(filled)).is_same(filled)


def test_places_overlap_by_whole_names(filled: Place):
    assert filled.overlaps(filled / "sub")
    assert (filled / "sub").overlaps(filled)
    assert not (filled / "sub").overlaps(filled / "sub2")


def test_what_was_written_is_read(filled: Place):
    file = filled / "a"
    assert file.read_bytes() == b"".join(file.pieces()) == DATA
    assert b"".join(file.pieces(1000)) == DATA
    assert (file.size(), len(list(file.pieces(1000)))) == (len(DATA), 6)
    assert abs(file.written_s() - time.time()) < 60
    assert file.digest() == digest(DATA)
    out = np.empty(100, np.uint8)
    file.read_range_into(37, out)
    assert out.tobytes() == DATA[37:137]
    with pytest.raises(UserError, match="a"):
        file.read_range_into(len(DATA) - 50, out)
    with pytest.raises(FileNotFoundError):
        (filled / "absent").read_range_into(0, out)
    for read in ((filled / "absent").size, lambda: list((filled / "absent").pieces())):
        with pytest.raises(FileNotFoundError, match="absent"):
            read()


@follows(" was replaced while it was read; run the same command again")
@pytest.mark.parametrize("change", ["replaced", "deleted", "damaged"])
def test_pieces_are_those_of_one_moment(gcs: GcsServer, url: str, change: str):
    """An object that changes between two requests, or whose bytes are not those of its checksum."""
    key = f"{key_of(url)}/a"
    gcs.put(key, DATA)
    if change == "damaged":
        gcs.storage.objects[BUCKET][key]["crc32c"] = "AAAAAA=="
    pieces = (as_place(url) / "a").pieces(100)
    first = next(pieces)
    if change == "replaced":
        gcs.put(key, DATA[::-1])
    elif change == "deleted":
        gcs.delete(key)
    with pytest.raises(UserError, match="a was replaced while it was read"):
        assert first + b"".join(pieces) != DATA
    gcs.put(key, DATA)
    assert b"".join((as_place(url) / "a").pieces(100)) == DATA


def test_a_buffer_is_a_file(place: Place):
    place.make_folder()
    buffer = AlignedBuffer(2 << 20)
    buffer.bytes[:] = np.arange(len(buffer.bytes), dtype=np.uint8)
    for nbytes in (5, (1 << 20) + 1):
        (place / "x").write_buffer(buffer, nbytes)
        assert (place / "x").read_bytes() == buffer.bytes[:nbytes].tobytes()
    assert place.sizes() == {"x": (1 << 20) + 1}


def test_a_file_that_is_appended_to_appears_at_its_end(filled: Place):
    out = (filled / "new").appended(filled / "parts")
    out.append(np.frombuffer(DATA, np.uint8))
    assert not (filled / "new").exists()
    out.finish()
    assert (filled / "new").read_bytes() == DATA
    assert (filled / "new").fault(digest(DATA)) is None
    given_up = (filled / "never").appended(filled / "parts")
    given_up.append(np.frombuffer(DATA, np.uint8))
    given_up.discard()
    assert sorted(filled.sizes()) == ["a", "new", "sub/b"]


def test_a_file_is_taken_within_its_place(filled: Place):
    assert (filled / "c").can_link(filled / "a")
    assert (filled / "c").take(filled / "a") in ("hard link", "copy in the cloud")
    assert (filled / "c").read_bytes() == DATA


def test_nothing_is_linked_between_kinds(filled: Place, tmp_path: Path, url: str):
    other = as_place(url if filled.room_for(1) else tmp_path)
    assert not (other / "c").can_link(filled / "a")
    assert (other / "c").take(filled / "a") is None
    assert not other.overlaps(filled)


def test_deletes_and_moves(filled: Place):
    (filled / "sub").move_to(filled / "moved")
    assert sorted(filled.sizes()) == ["a", "moved/b"]
    (filled / "a").unlink()
    (filled / "moved").delete_tree()
    assert filled.sizes() == {}


def test_a_lock_is_held_by_one_or_shared(place: Place):
    place.make_folder(marked=True)
    assert place.is_dir()
    lock = place / "lock"
    with lock.locked() as got, lock.locked() as second, lock.locked(shared=True) as third:
        assert (got, second, third) == (True, False, False)
    with lock.locked(shared=True) as got, lock.locked(shared=True) as second:
        assert (got, second) == (True, True)


def test_lines_go_on_after_those_that_are_kept(place: Place):
    place.make_folder()
    log = (place / "log").lines()
    assert log.read() == []
    log.keep([])
    log.append(b"1\n")
    log.append(b"2\n")
    log.close()
    again = (place / "log").lines()
    assert again.read() == [b"1\n", b"2\n"]
    again.keep([b"1\n", b"2\n"])
    again.append(b"3\n")
    again.close()
    assert (place / "log").lines().read()[0] == b"1\n"
    assert set((place / "log").lines().read()) == {b"1\n", b"2\n", b"3\n"}


def test_what_is_needed_of_this_machine(place: Place):
    with (place / "fetched").on_this_machine() as folder:
        assert isinstance(folder, Path)
        assert (folder == place / "fetched") == bool(place.room_for(1))


@pytest.mark.parametrize("name", ["file", "file/below", "file/far/below"])
def test_a_folder_that_a_file_stands_in_the_way_of(tmp_path: Path, name: str):
    """The file is named, and is as it was."""
    (tmp_path / "file").write_text("my own")
    with pytest.raises(
        UserError, match=f"{tmp_path / 'file'} is a file, needed a folder; name another"
    ):
        as_place(tmp_path / name).make_folder()
    assert (tmp_path / "file").read_text() == "my own"
