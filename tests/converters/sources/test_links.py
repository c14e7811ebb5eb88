"""Folders of symbolic links: refused with advice that works, or followed, never without end."""

import os
from pathlib import Path

import pytest
from roundtrip import assert_same_files, make_source, tree_bytes

from converters.cli.main import main
from converters.sources.open import open_source
from mtp_model.problems import ProblemsError


def linked_folder(source: Path, folder: Path) -> Path:
    """A folder of links to all files of another, subfolders as links to folders."""
    folder.mkdir()
    for entry in source.iterdir():
        (folder / entry.name).symlink_to(entry.absolute())
    return folder


def faults(folder: Path, **options: bool) -> list[str]:
    with pytest.raises(ProblemsError) as caught:
        open_source(str(folder), **options).files()
    return [f"{problem.subject} {problem.detail}" for problem in caught.value.problems]


def test_a_folder_of_links_goes_the_whole_way_with_the_flag_that_the_refusal_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = make_source(tmp_path / "elsewhere")
    chained = linked_folder(source, tmp_path / "chained")  # links to links
    links = str(linked_folder(chained, tmp_path / "links"))
    ckpt, out = str(tmp_path / "ckpt"), tmp_path / "out"
    for command in (["inspect", links], ["import", links, ckpt]):
        assert main(command) != 0
        assert "read it with --follow-links" in capsys.readouterr().err
        assert main([*command, "--follow-links"]) == 0
    assert main(["verify", links, ckpt, "--follow-links"]) == 0
    assert main(["export", ckpt, str(out), "--base", links, "--follow-links"]) == 0
    assert_same_files(out, source)
    assert not any(path.is_symlink() for path in out.rglob("*"))


def test_links_to_folders_are_followed_once_and_never_in_circles(tmp_path: Path):
    root, other = tmp_path / "root", tmp_path / "other"
    (other / "deep").mkdir(parents=True)
    (other / "deep" / "x").write_bytes(b"12")
    root.mkdir()
    (root / "inner").symlink_to(other)
    assert faults(root) == [
        f"inner is a link out of the folder, to {other}; read it with --follow-links, or put the "
        "file itself there"
    ]
    assert open_source(str(root), follow_links=True).files() == {"inner/deep/x": 2}
    already = "is a link to a folder that is part of this one already; remove the link"
    for target in (root, tmp_path, other, other / "deep", Path("/")):  # back, above, sideways
        (other / "deep" / "loop").symlink_to(target)
        assert faults(root, follow_links=True) == [f"inner/deep/loop {already}"]
        (other / "deep" / "loop").unlink()
    (root / "twice").symlink_to("inner")
    [fault] = faults(root, follow_links=True)
    assert fault.endswith(already)


def test_links_that_lead_nowhere_are_named_with_and_without_the_flag(tmp_path: Path):
    (tmp_path / "x").symlink_to("nowhere")
    (tmp_path / "y").symlink_to("z")
    (tmp_path / "z").symlink_to("y")
    (tmp_path / "null").symlink_to("/dev/null")
    advice = "mend the link or remove it"
    expected = [
        f"x is a link to nowhere, which cannot be opened: No such file or directory; {advice}",
        f"y is a link to z, which cannot be opened: Too many levels of symbolic links; {advice}",
        f"z is a link to y, which cannot be opened: Too many levels of symbolic links; {advice}",
    ]
    assert faults(tmp_path, follow_links=True) == ["null is not a regular file", *expected]
    assert [fault for fault in faults(tmp_path) if "null" not in fault] == expected
    for name in ("x", "y", "z", "null"):
        (tmp_path / name).unlink()
    assert open_source(str(tmp_path)).files() == {}


def test_the_hub_cache_works_as_it_is(tmp_path: Path):
    source = make_source(tmp_path / "source")
    model = tmp_path / "models--org--name"
    snapshot = model / "snapshots" / "0123abcd"
    (model / "blobs").mkdir(parents=True)
    for number, (name, content) in enumerate(tree_bytes(source).items()):
        (model / "blobs" / f"{number:040x}").write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        relative = os.path.relpath(model / "blobs" / f"{number:040x}", (snapshot / name).parent)
        (snapshot / name).symlink_to(relative)
    ckpt, out = str(tmp_path / "ckpt"), tmp_path / "out"
    assert main(["import", str(snapshot), ckpt]) == 0
    assert main(["export", ckpt, str(out), "--base", str(snapshot)]) == 0
    assert_same_files(out, source)
