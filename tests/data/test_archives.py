"""Archives that are damaged or malicious are refused by name, and nothing of theirs gets out of its folder."""

import gzip
import io
import lzma
import os
import re
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from sequencer2d.data.archives import ArchiveError, Limits, open_archive, save, tar_members

FILES = {"set/a/1.png": b"one" * 1000, "set/a/2.png": b"", "set/b/1.png": os.urandom(40_000)}
LIMITS = Limits(max_bytes=1 << 20)
KINDS = ["tar", "tar.gz", "tar.xz", "zip"]


def tar_bytes(files: dict[str, bytes], *special: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in special:
            tar.addfile(member)
    return buffer.getvalue()


def make(path: Path, files: dict[str, bytes], *special: tarfile.TarInfo) -> Path:
    """An archive of the kind that the name says; `special` members only in a tar."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return path
    compress = {".tar": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[path.suffix]
    path.write_bytes(compress(tar_bytes(files, *special)))
    return path


def read(path: Path, limits: Limits = LIMITS) -> dict[str, bytes]:
    with open_archive(path, limits) as members:
        return {member.name: member.file.read() for member in members}


def special(kind: bytes, name: str, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize("kind", KINDS)
def test_content_comes_out_and_the_archive_stays(kind: str, tmp_path: Path) -> None:
    path = make(tmp_path / f"x.{kind}", {"./set/": b"", **FILES} if kind == "zip" else FILES)
    before = path.read_bytes()
    calls: list[tuple[str, int, int]] = []
    with open_archive(path, Limits(max_bytes=1 << 20), lambda *call: calls.append(call)) as members:
        for member in members:
            save(member.file, tmp_path / "out" / member.name)
    assert {file: (tmp_path / "out" / file).read_bytes() for file in FILES} == FILES
    assert path.read_bytes() == before
    assert [what for what, *_ in calls] == [f"reading x.{kind}"] * len(calls)
    assert all(0 <= done <= total == path.stat().st_size for _, done, total in calls)


def test_members_that_are_not_read_are_skipped(tmp_path: Path) -> None:
    for kind in KINDS:
        with open_archive(make(tmp_path / f"x.{kind}", FILES), Limits(max_bytes=1 << 20)) as members:
            assert [(member.name, member.size) for member in members] == [(n, len(c)) for n, c in FILES.items()]


@pytest.mark.parametrize("kind", KINDS)
def test_cut_short_anywhere(kind: str, tmp_path: Path) -> None:
    path = make(tmp_path / f"x.{kind}", FILES)
    whole = path.read_bytes()
    end = len(whole) if kind != "tar" else 2560 + 1024 + 40 * 1024  # without the padding
    cuts = {*range(0, end - 1024, 1024), *range(0, end - 1024, 997)}
    if kind != "tar":
        cuts |= {len(whole) - 1, len(whole) - 9}
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(ArchiveError, match=rf"^{re.escape(str(path))}: not a zip or tar, cut short or damaged"):
            read(path)


@pytest.mark.parametrize("kind", ["tar.gz", "tar.xz", "zip"])
def test_flipped_bits(kind: str, tmp_path: Path) -> None:
    path = make(tmp_path / f"x.{kind}", FILES)
    whole = path.read_bytes()
    for position in range(len(whole) // 4, len(whole) * 3 // 4, len(whole) // 10):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 255]) + whole[position + 1 :])
        with pytest.raises(ArchiveError):
            read(path)


@pytest.mark.parametrize("content", [b"", b"not an archive", b"\x1f\x8b", b"\x1f\x8bnonsense", b"\xfd7zXZ\0nonsense"])
def test_no_archive_at_all(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ArchiveError, match="x: "):
        read(tmp_path / "x")


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize("name", ["/etc/x.png", "../x.png", "a/../../x.png", "a\\..\\x.png", "C:/x.png", "C:x.png"])
def test_path_outside(kind: str, name: str, tmp_path: Path) -> None:
    path = make(tmp_path / f"x.{kind}", {name: b"x"})
    with pytest.raises(ArchiveError, match="leads out of the folder"):
        read(path)


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize("name", ["a/1.png", "A/1.PNG", "./a/1.png", "a//1.png"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_collide(kind: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/1.png", b"1")
            archive.writestr(name, b"2")
    else:
        path.write_bytes(tar_bytes({"a/1.png": b""}, tarfile.TarInfo(name)))
    with pytest.raises(ArchiveError, match="there twice, or in other case"):
        read(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE])
def test_links_and_devices(kind: bytes, tmp_path: Path) -> None:
    path = make(tmp_path / "x.tar", FILES, special(kind, "set/link", "set/a/1.png"))
    with pytest.raises(ArchiveError, match="'set/link' is a link or a device"):
        read(path)


def test_link_in_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        info = zipfile.ZipInfo("link")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(ArchiveError, match="'link' is a link or a device"):
        read(tmp_path / "x.zip")


def test_sparse_member_in_a_tar(tmp_path: Path) -> None:
    """A header alone that claims gigabytes of zeros."""
    member = tarfile.TarInfo("hole.png")
    member.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,0"}
    member.pax_headers |= {"GNU.sparse.size": str(1 << 40), "GNU.sparse.numblocks": "1"}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member)
    (tmp_path / "x.tar").write_bytes(buffer.getvalue())
    with pytest.raises(ArchiveError, match="link or a device"):
        read(tmp_path / "x.tar")


@pytest.mark.parametrize("kind", ["tar.gz", "tar.xz", "zip"])
def test_bombs(kind: str, tmp_path: Path) -> None:
    path = make(tmp_path / f"x.{kind}", {"zeros.png": bytes(2 << 20)})
    assert path.stat().st_size < 10_000
    with pytest.raises(ArchiveError, match="unpacks to more than 1,048,576 bytes"):
        read(path)
    many = make(tmp_path / f"y.{kind}", {f"{i}.png": b"" for i in range(101)})
    with pytest.raises(ArchiveError, match="or 100 files"):
        read(many, Limits(max_bytes=1 << 20, max_members=100))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_bomb_in_a_header(kind: bytes, tmp_path: Path) -> None:
    header = special(kind, "x")
    header.size = 2 << 20
    raw = header.tobuf() + bytes(2 << 20) + tar_bytes(FILES)
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(raw))
    with pytest.raises(ArchiveError, match="a header of 2,097,152 bytes"):
        read(tmp_path / "x.tar.gz")


def test_bomb_after_the_end(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(tar_bytes(FILES) + bytes(6 << 20)))
    with pytest.raises(ArchiveError, match="goes on after its end"):
        read(tmp_path / "x.tar.gz")


def test_tar_in_a_tar(tmp_path: Path) -> None:
    inner = tar_bytes(FILES)
    limits = Limits(max_bytes=1 << 20)
    for content, whole in ((inner, True), (inner[:20_000], False)):
        path = make(tmp_path / "x.tar", {"inner.tar": content})
        with open_archive(path, limits) as members:
            names = []
            if whole:
                names = [file.name for member in members for file in tar_members(member.file, "inner", limits)]
                assert names == list(FILES)
        if not whole:
            with pytest.raises(ArchiveError), open_archive(path, limits) as members:
                _ = [file.file.read() for member in members for file in tar_members(member.file, "inner", limits)]


def test_changed_while_it_was_read(tmp_path: Path) -> None:
    path = make(tmp_path / "x.tar", FILES)

    def read_and_append() -> None:
        with open_archive(path, LIMITS) as members:
            next(members)
            path.write_bytes(path.read_bytes() + bytes(512))
            list(members)

    with pytest.raises(ArchiveError, match="changed while it was read"):
        read_and_append()


def test_errors_of_the_disk_are_not_the_archives(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nowhere.tar")
    path = make(tmp_path / "x.tar", FILES)
    (tmp_path / "out").touch()
    with pytest.raises(OSError, match="out") as error, open_archive(path, Limits(max_bytes=1 << 20)) as members:
        save(next(members).file, tmp_path / "out" / "1.png")
    assert not isinstance(error.value, ArchiveError)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        save(io.BytesIO(b"new"), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_zip_of_windows_has_folders(tmp_path: Path) -> None:
    """PowerShell's Compress-Archive of old writes backslashes."""
    path = make(tmp_path / "x.zip", {"set\\": b"", "set\\a\\1.png": b"one"})
    assert read(path) == {"set/a/1.png": b"one"}


@pytest.mark.parametrize("name", ["..\\x.png", "\\x.png", "C:\\x.png", "a\\..\\..\\x.png", "a/..\\x.png"])
def test_backslashes_lead_no_further_out(name: str, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="leads out of the folder"):
        read(make(tmp_path / "x.zip", {name: b"x"}))


@pytest.mark.parametrize(("written", "name"), [("Käfer".encode(), "Käfer"), ("Käfer".encode("cp437"), "Käfer")])
def test_names_in_a_zip_that_says_nothing_of_utf8(written: bytes, name: str, tmp_path: Path) -> None:
    """macOS writes UTF-8 without saying so; the format's own letters are those of DOS."""
    place = "x" * len(written)
    path = make(tmp_path / "x.zip", {f"{place}/1.png": b"one"})
    path.write_bytes(path.read_bytes().replace(place.encode(), written))
    assert read(path) == {f"{name}/1.png": b"one"}
