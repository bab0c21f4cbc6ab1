from __future__ import annotations

import io
import lzma
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_class_folders

from utils.data import archives
from utils.data.archives import HARMLESS_BYTES, largest_unpacked, unpack
from utils.data.sources import load_source


def _tar(path: Path, *members: tuple[str, bytes, str], content: bytes = b"x") -> Path:
    """A tar of members (name, type, target of a link)."""
    with tarfile.open(path, "w") as opened:
        for name, kind, target in members:
            item = tarfile.TarInfo(name)
            item.type, item.linkname = kind, target
            item.size = len(content) if kind == tarfile.REGTYPE else 0
            opened.addfile(item, io.BytesIO(content))
    return path


def _zip(path: Path, *names: str, mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for name in names:
            item = zipfile.ZipInfo(name)
            item.external_attr = mode << 16
            opened.writestr(item, b"x")
    return path


def _refused(archive: Path, message: str) -> None:
    """The archive is refused with this message, and nothing is written."""
    target = archive.parent / "target"
    target.mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=message) as caught:
        unpack(archive, target)
    assert str(archive) in str(caught.value) and not list(target.iterdir())


FILE, FOLDER, LINK = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE


def test_a_chain_of_links_beyond_the_path_limit_writes_nothing(tmp_path: Path) -> None:
    """The checks of tarfile's own filter end where a path becomes too long to be resolved."""
    long, steps, path, members = "d" * 247, "abcdefghijklmnop", "", []
    for step in steps:
        members += [(path + long, FOLDER, ""), (path + step, LINK, long)]
        path += long + "/"
    last = "/".join(steps) + "/" + "l" * 254
    members += [(last, LINK, "../" * len(steps)), ("escape", LINK, f"{last}/../outside")]
    members += [("escape/new.png", FILE, "")]
    (tmp_path / "outside").mkdir()
    _refused(_tar(tmp_path / "chain.tar", *members), "'a' is a symbolic link")
    assert not list((tmp_path / "outside").iterdir())


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.FIFOTYPE, "named pipe"),
        (tarfile.CHRTYPE, "device"),
        (tarfile.BLKTYPE, "device"),
        (tarfile.GNUTYPE_SPARSE, "sparse file"),
        (tarfile.CONTTYPE, "special file"),
        (b"Z", "special file"),
    ],
)
def test_only_plain_files_and_folders_leave_a_tar(tmp_path: Path, kind: bytes, word: str) -> None:
    first = ("top/Non/good.png", FILE, "")
    _refused(_tar(tmp_path / "a.tar", first, ("top/odd", kind, "top/Non/good.png")), f"'top/odd' is a {word}")


@pytest.mark.parametrize(
    ("mode", "word"),
    [
        (stat.S_IFLNK, "symbolic link"),
        (stat.S_IFIFO, "named pipe"),
        (stat.S_IFCHR, "device"),
        (stat.S_IFBLK, "device"),
        (stat.S_IFSOCK, "socket"),
        (stat.S_IFLNK | 0o777, "symbolic link"),
    ],
)
@pytest.mark.parametrize("name", ["Non/odd.png", "Non/odd/", "__MACOSX/odd.png"])
def test_only_plain_files_and_folders_leave_a_zip(tmp_path: Path, mode: int, word: str, name: str) -> None:
    _refused(_zip(tmp_path / "a.zip", name, mode=mode), f"is a {word}")


def test_modes_of_plain_files_and_folders_are_taken(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as opened:
        for name, mode in (("Non", stat.S_IFDIR | 0o755), ("Mild\\", 0), ("Non/a.png", stat.S_IFREG | 0o644)):
            item = zipfile.ZipInfo(name)
            item.external_attr = mode << 16
            opened.writestr(item, b"pixels" if name.endswith("png") else b"")
    assert unpack(tmp_path / "a.zip", target) == 0
    assert (target / "Non" / "a.png").read_bytes() == b"pixels" and (target / "Mild").is_dir()


@pytest.mark.parametrize(
    "name",
    [
        "../evil.png",
        "/evil.png",
        "top/../../evil.png",
        "C:/evil.png",
        "top/c:evil.png",
        "..\\evil.png",
        "\\\\host\\evil.png",
        "top/.. /evil.png",
        "top/.../evil.png",
        "__MACOSX/../../evil.png",
    ],
)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_that_lead_outside(tmp_path: Path, name: str, kind: str) -> None:
    make = _zip if kind == "zip" else lambda path, *names: _tar(path, *[(one, FILE, "") for one in names])
    _refused(make(tmp_path / f"a.{kind}", "Non/good.png", name), "would land outside")


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    _zip(tmp_path / "a.zip", "Non/a_png.png")
    content = (tmp_path / "a.zip").read_bytes().replace(b"a_png", b"a\0png")
    (tmp_path / "nul.zip").write_bytes(content)
    _refused(tmp_path / "nul.zip", "no file can have")
    _refused(_tar(tmp_path / "dot.tar", ("./.", FILE, "")), "no file can have")
    with tarfile.open(tmp_path / "pax.tar", "w", format=tarfile.PAX_FORMAT) as opened:
        item = tarfile.TarInfo("Non/a.png")
        item.pax_headers = {"path": "Non/a\0b.png"}
        opened.addfile(item, io.BytesIO())
    _refused(tmp_path / "pax.tar", "no file can have")


@pytest.mark.parametrize(
    "second", ["Non/a.png", "non/A.PNG", "Non/a.png.", "Non//a.png", "./Non/a.png", "Non\\a.png", "Non./a.png"]
)
@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_one_file_twice(tmp_path: Path, second: str, kind: str) -> None:
    make = _zip if kind == "zip" else lambda path, *names: _tar(path, *[(one, FILE, "") for one in names])
    _refused(make(tmp_path / f"a.{kind}", "Non/a.png", second), "are the same file")


def test_accents_in_two_forms_are_one_file(tmp_path: Path) -> None:
    _refused(_zip(tmp_path / "a.zip", "Non/\u00e9.png", "Non/e\u0301.png"), "are the same file")


@pytest.mark.parametrize("names", [("Non", "Non/a.png"), ("Non/a.png", "Non"), ("Non/a", "non/A/b/c.png")])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_file_that_others_lie_in(tmp_path: Path, names: tuple[str, str], kind: str) -> None:
    make = _zip if kind == "zip" else lambda path, *names: _tar(path, *[(one, FILE, "") for one in names])
    _refused(make(tmp_path / f"a.{kind}", *names), "needs a folder there")


def test_a_file_and_a_folder_of_one_name(tmp_path: Path) -> None:
    _refused(_tar(tmp_path / "a.tar", ("Non", FOLDER, ""), ("Non", FILE, "")), "needs a folder there")
    _refused(_tar(tmp_path / "b.tar", ("Non", FILE, ""), ("Non", FOLDER, "")), "needs a folder there")


def _bomb_zip(path: Path, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("Non/a.png", content)
    return path


def _bomb_tar(path: Path, content: bytes) -> Path:
    with tarfile.open(path, "w:xz", preset=0) as opened:
        item = tarfile.TarInfo("Non/a.png")
        item.size = len(content)
        opened.addfile(item, io.BytesIO(content))
    return path


def _bomb_behind_the_end(path: Path, content: bytes) -> Path:
    """Zeros may follow the end of a tar, but not without end."""
    _tar(path.with_suffix(".plain"), ("Non/a.png", FILE, ""))
    path.write_bytes(lzma.compress(path.with_suffix(".plain").read_bytes() + content, preset=0))
    return path


@pytest.mark.parametrize(
    ("make", "name"), [(_bomb_zip, "a.zip"), (_bomb_tar, "a.tar.xz"), (_bomb_behind_the_end, "a.tar.xz")]
)
def test_an_archive_that_grows_a_thousandfold(tmp_path: Path, make: Callable[[Path, bytes], Path], name: str) -> None:
    archive = make(tmp_path / name, bytes(HARMLESS_BYTES + 10_000))
    assert archive.stat().st_size < HARMLESS_BYTES / 500
    _refused(archive, "unpacks to more than 64 MiB")


def test_a_declared_size_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    item = tarfile.TarInfo("Non/a.png")
    item.size = 2**42
    (tmp_path / "a.tar").write_bytes(item.tobuf() + bytes(2048))
    _refused(tmp_path / "a.tar", "unpacks to more than")
    monkeypatch.setattr(archives, "LARGEST_BYTES", 1000)
    _refused(_zip(tmp_path / "many.zip", *[f"Non/{number}.png" for number in range(1001)]), "unpacks to more than")


def test_a_zip_whose_headers_lie(tmp_path: Path) -> None:
    _bomb_zip(tmp_path / "a.zip", b"y" * 5000)
    content = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "lies.zip").write_bytes(content.replace((5000).to_bytes(4, "little"), (50).to_bytes(4, "little")))
    (tmp_path / "target").mkdir()
    with pytest.raises(ValueError, match=r"lies\.zip"):
        unpack(tmp_path / "lies.zip", tmp_path / "target")
    assert sum(file.stat().st_size for file in (tmp_path / "target").rglob("*.png")) <= 50


@pytest.mark.parametrize("size", [2**31, -1])
def test_a_header_is_not_read_into_memory(tmp_path: Path, size: int) -> None:
    item = tarfile.TarInfo("pax")
    item.type, item.size = tarfile.XHDTYPE, size
    (tmp_path / "a.tar").write_bytes(item.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    _refused(tmp_path / "a.tar", "a.tar")


def test_a_negative_size_is_refused(tmp_path: Path) -> None:
    item = tarfile.TarInfo("Non/a.png")
    item.size = -512
    (tmp_path / "a.tar").write_bytes(item.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    _refused(tmp_path / "a.tar", "negative size")


def test_too_many_members_and_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = _zip(tmp_path / "a.zip", "Non/a.png", "Non/b.png", "Non/c.png")
    monkeypatch.setattr(archives, "LARGEST_COUNT", 2)
    _refused(archive, "more than 2 members")
    monkeypatch.setattr(archives, "LARGEST_COUNT", 3)
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2}))
    assert largest_unpacked(archive, tmp_path) == 2
    _refused(archive, "free disk space")


def test_incompressible_images_pass_whatever_their_size(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar.xz"
    archive.write_bytes(b"x" * 2**20)
    assert largest_unpacked(archive, tmp_path) >= 100 * 2**20


def test_encrypted_archives_are_named(tmp_path: Path) -> None:
    _zip(tmp_path / "a.zip", "Non/a.png")
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(content)
    _refused(tmp_path / "locked.zip", "'Non/a.png' is encrypted with a password")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_system_files_are_counted_and_not_unpacked(tmp_path: Path, kind: str) -> None:
    junk = ("__MACOSX/Non/._a.png", "Non/.DS_Store", "Non/Thumbs.db", "Mild/desktop.ini", "Non/._b.png")
    make = _zip if kind == "zip" else lambda path, *names: _tar(path, *[(one, FILE, "") for one in names])
    assert unpack(make(tmp_path / f"a.{kind}", "Non/a.png", *junk), tmp_path / "target") == 5
    assert [file.name for file in (tmp_path / "target").rglob("*") if file.is_file()] == ["a.png"]


def test_the_set_says_how_many_files_its_archive_had_beside_the_images(tmp_path: Path) -> None:
    folder = write_class_folders(tmp_path / "images")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as opened:
        for file in folder.rglob("*.png"):
            opened.write(file, file.relative_to(folder))
        opened.writestr("__MACOSX/._a.png", b"x")
    assert load_source(tmp_path / "a.zip").info == {"ignored_files": 1}
    (folder / "Non_Demented" / ".DS_Store").write_bytes(b"x")
    assert load_source(folder).info == {"ignored_files": 1}


def test_a_misnamed_compression_is_read(tmp_path: Path) -> None:
    folder = write_class_folders(tmp_path / "images")
    with tarfile.open(tmp_path / "a.tar.xz", "w:gz") as opened:
        opened.add(folder, ".")
    assert len(load_source(tmp_path / "a.tar.xz")) == 6
