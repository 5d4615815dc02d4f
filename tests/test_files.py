"""Files and folders that are written as a whole, and what the system may refuse."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from autolora.errors import DiskFullError, PathError
from autolora.files import replacing_directory, write_text_atomic, writing
from autolora.results import RunDirectory


def fill(path: Path) -> None:
    with replacing_directory(path) as folder:
        (folder / "new").write_text("x")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_without_a_word_of_training(code: int) -> None:
    told = r"^here: could not be written \(.*; free space and repeat the command$"
    with pytest.raises(DiskFullError, match=told), writing(Path("here")):
        raise OSError(code, os.strerror(code))


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ELOOP, errno.ENOENT])
def test_a_place_that_is_refused(code: int) -> None:
    told = rf"^here: could not be written \({os.strerror(code)}\); name another place"
    with pytest.raises(PathError, match=told), writing(Path("here")):
        raise OSError(code, os.strerror(code))


def test_other_errors_are_not_the_user_s() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"), writing(Path("here")):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def test_a_folder_where_something_is_mounted_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounted, replace = tmp_path / "mounted", os.replace
    mounted.mkdir()

    def busy(source: Any, target: Any) -> None:
        if mounted in (Path(source), Path(target)):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(source), None, str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", busy)
    with pytest.raises(PathError, match=r"mounted: could not be written \(.*busy\); .* name one inside it"):
        fill(mounted)
    assert [path.name for path in tmp_path.iterdir()] == ["mounted"]
    fill(mounted / "inside")
    assert (mounted / "inside" / "new").is_file()


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_its_target_is_replaced(there: bool, tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    if there:
        target.mkdir()
        (target / "old").write_text("x")
    link.symlink_to(target)
    fill(link)
    assert link.is_symlink()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert {path.name for path in tmp_path.iterdir()} == {"target", "link"}


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "round").symlink_to("round")
    for parent in ("file", "round"):
        with pytest.raises(PathError, match=rf"{parent}/out: could not be written"):
            fill(tmp_path / parent / "out")
        held = RunDirectory(tmp_path / parent / "run").held()
        with pytest.raises(PathError, match=rf"{parent}/run: could not be written"), held:
            pytest.fail("held what cannot be there")
        with pytest.raises(PathError, match=rf"{parent}/text: could not be written"):
            write_text_atomic(tmp_path / parent / "text", "x")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "round"}
