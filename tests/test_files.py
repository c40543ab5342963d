"""Files are written whole or not at all, and only files are replaced."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from regard.cli import main
from regard.cli.common import check_output
from regard.errors import InputError
from regard.files import write_text


def test_a_link_stays_and_leads_to_the_new_text(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for link, target in (("a", "deep/a.txt"), ("b", "a")):
        (tmp_path / link).symlink_to(target)
        check_output(tmp_path / link)
        write_text(tmp_path / link, link)
        assert (tmp_path / link).is_symlink()
        assert (tmp_path / "deep" / "a.txt").read_text() == link
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "a.txt", "b", "deep"]
    (tmp_path / "lost").symlink_to("nowhere/a.txt")
    with pytest.raises(InputError, match="nowhere does not exist"):
        check_output(tmp_path / "lost")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("kind", ["fifo", "dev/fd"])
def test_pipes_are_written_to(tmp_path: Path, kind: str) -> None:
    path, got = tmp_path / "pipe", list[str]()
    if kind == "fifo":
        os.mkfifo(path)
        check_output(path)
        reader = threading.Thread(target=lambda: got.append(path.read_text()), daemon=True)
        reader.start()
        write_text(path, "words")
        reader.join(10)
    else:
        out, into = os.pipe()
        path = Path(f"/dev/fd/{into}")
        if not path.exists():
            pytest.skip("no /dev/fd here")
        check_output(path)
        write_text(path, "words")
        os.close(into)
        got.append(os.read(out, 9).decode())
        os.close(out)
    assert got == ["words"] and path.parent.is_dir() and not path.is_file()


def test_devices_are_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(*_: object) -> None:
        raise AssertionError("a device is not replaced")

    null, access = Path(os.devnull), os.access
    monkeypatch.setattr(os, "replace", rename)
    monkeypatch.setattr(os, "access", lambda path, mode: path != null.parent and access(path, mode))
    check_output(null)  # whoever may not write beside it may write to it
    write_text(null, "words")
    assert not null.is_file()


def test_the_home_folder_is_opened_in_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        main(["methods", "see", "--json=~/x.json"])
    assert not ended.value.code, capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
