"""Tar files as other tools write them: listed once, trained from, and what is wrong with them is named."""

import io
import json
import logging
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from batches import assert_same, epoch, random_transform
from buckets import bucket, upload
from flaky import FlakyServer, flaky_server
from sequencer2d.data import fetch
from sequencer2d.data.catalog import load_data
from sequencer2d.data.fetch import Patience, ShardError
from sequencer2d.data.loaders import TrainLoader
from sequencer2d.data.sets import ImageData
from sequencer2d.data.shards import ShardImages, is_shards, load_shards

pytestmark = pytest.mark.filterwarnings("ignore:.* use of fork:DeprecationWarning")

Members = dict[str, bytes]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(fetch, "PATIENCE", Patience(attempts=2, timeout_s=5, first_delay_s=0.01, max_delay_s=0.02))
    return folder


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FlakyServer]:
    with flaky_server(tmp_path) as server:
        yield server


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        folder = tarfile.TarInfo("./")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


WORDS = ("cat", "dog", "élan")


def sample(number: int, kind: str) -> Members:
    """A sample as one of several tools writes it; the classes are numbers or words."""
    key = f"n{number:03d}"
    label, word = number % 3, WORDS[number % 3]
    return {
        "cls": {f"{key}.png": picture(number), f"{key}.cls": str(label).encode()},
        "cls first": {f"./{key}.cls": f"{label}\n".encode(), f"./{key}.png": picture(number)},
        "txt": {f"photos/{key}.png": picture(number), f"photos/{key}.txt": word.encode()},
        "json": {
            f"{key}.json": json.dumps({"width": 8, "label": label, "caption": "a photograph"}).encode(),
            f"{key}.PNG": picture(number),
            f"{key}.txt": b"a photograph",
        },
        "json word": {f"{key}.png": picture(number), f"{key}.json": json.dumps(word).encode()},
        "long name": {f"{'x' * 150}{key}.png": picture(number), f"{'x' * 150}{key}.cls": word.encode()},
    }[kind]


KINDS = ("cls", "cls first", "txt", "json", "json word", "long name")


def write_set(folder: Path, kind: str = "cls") -> Path:
    """12 training images in shards of 4 and 5."""
    for shard, numbers in enumerate((range(4), range(4, 9), range(9, 12))):
        members: Members = {}
        for number in numbers:
            members |= sample(number, kind)
        write_tar(folder / f"shard-{shard:03d}.tar", members)
    return folder


def load(name: str | Path) -> ImageData:
    return load_shards(str(name), val_fraction=0.25, seed=0)


def check_images(data: ImageData, count: int = 12) -> None:
    numbers = []
    for images in (data.train, data.val):
        for index in range(len(images)):
            number = np.asarray(images.image(index))[0, 0, 0]
            assert images.labels[index] == number % 3
            assert f"n{number:03d}" in images.name(index)
            numbers.append(number)
    assert sorted(numbers) == list(range(count))


@pytest.mark.parametrize("kind", KINDS)
def test_members_as_other_tools_write_them(kind: str, tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", kind)
    assert is_shards(str(root))
    data = load_data(str(root), val_fraction=0.25)
    assert data.class_names == (("0", "1", "2") if kind in ("cls", "cls first", "json") else WORDS)
    assert (len(data.train), len(data.val), data.val_source[:5]) == (9, 3, "split")
    check_images(data)


def test_every_way_gives_the_same_batches(tmp_path: Path, server: FlakyServer) -> None:
    root = write_set(tmp_path / "set")
    names = [
        str(root),
        f"{root}/shard-{{000..002}}.tar",
        f"{server.url}/set/shard-{{000..002}}.tar",
        f"pipe:cat {root}/shard-{{000..002}}.tar",
    ]
    batches = []
    for name in names:
        for _ in range(2):  # indexed, then from the cache
            data = load(name)
            assert isinstance(data.train, ShardImages)
            loader = TrainLoader(data.train, random_transform(), batch_size=4, seed=0, num_workers=0)
            assert len(loader) == 2
            batches.append(epoch(loader))
    for other in batches[1:]:
        assert_same(other, batches[0])


def test_splits_by_folder_and_by_name(tmp_path: Path) -> None:
    for root, pattern in ((tmp_path / "a", "{}/x-0.tar"), (tmp_path / "b", "imagenet1k-{}-0000.tar")):
        for first, split in ((0, "train"), (6, "validation"), (9, "test")):
            members: Members = {}
            for number in range(first, first + 3):
                members |= sample(number, "txt")
            write_tar(root / pattern.format(split), members)
        assert is_shards(str(root))
        data = load(root)
        assert data.val_source == "given"
        assert data.test is not None
        for images, first in ((data.train, 0), (data.val, 6), (data.test, 9)):
            assert [np.asarray(images.image(i))[0, 0, 0] for i in range(3)] == [first, first + 1, first + 2]


def test_a_folder_of_images_with_a_tar_in_it_is_no_shards(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / "cat").mkdir()
    assert not is_shards(str(tmp_path))
    assert not is_shards(str(tmp_path / "cat"))
    assert not is_shards(str(tmp_path / "nowhere"))


def test_classes_have_the_names_and_order_of_classes_json(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", "txt")
    (root / "classes.json").write_text('{"dog": "hound", "cat": "cat", "ox": "ox", "\u00e9lan": "moose"}')
    data = load(root)
    assert data.class_names == ("hound", "cat", "ox", "moose")
    assert sorted({*data.train.labels, *data.val.labels}) == [0, 1, 3]
    (root / "classes.json").write_text("[1]")
    with pytest.raises(ShardError, match=r"classes.json: does not map labels to names"):
        load(root)


def test_the_list_is_made_once_and_anew_after_a_change(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_set(tmp_path / "set")

    def made(count: int = 12) -> bool:
        caplog.clear()
        check_images(load(root), count)
        return "read through once" in caplog.text

    with caplog.at_level(logging.INFO):
        assert [made(), made()] == [True, False]
        write_tar(root / "shard-002.tar", sample(9, "cls") | sample(10, "cls"))
        assert [made(11), made(11)] == [True, False]
        (file,) = cache.rglob("*.json")
        file.write_text(file.read_text()[:99])
        assert [made(11), made(11)] == [True, False]
        (root / "classes.json").write_text('{"0": "a", "1": "b", "2": "c"}')
        assert [made(11), made(11)] == [True, False]
    (root / "classes.json").write_text('{"2": "c", "1": "b", "0": "a"}')
    assert load(root).class_names == ("c", "b", "a")


def test_a_cache_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    check_images(load(write_set(tmp_path / "set")))
    assert "The next start will take as long" in caplog.text


def corrupt_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.find(b"n005.cls") + 150] ^= 255  # the checksum
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Members, str]] = {
    "no image": ({"a.cls": b"0"}, "x.tar/a: 0 images among .cls, where one is needed"),
    "two images": ({"a.jpg": b"", "a.png": b"", "a.cls": b"0"}, "x.tar/a: 2 images among .jpg, .png, .cls"),
    "no label": ({"a.png": b"", "a.json": b'{"width": 3}'}, "x.tar/a: no label among .png, .json; needed is .cls"),
    "empty label": ({"a.png": b"", "a.cls": b" "}, "x.tar/a.cls: '' is no label"),
    "caption": ({"a.png": b"", "a.txt": b"a cat " * 99}, "x.tar/a.txt: 'a cat a cat .*' is no label"),
    "no json": ({"a.png": b"", "a.json": b"{"}, "x.tar/a.json: no JSON"),
    "one class": ({"a.png": b"", "a.cls": b"0"}, "x.tar: 1 different labels for 1 images; needed are two"),
    "names": (
        {f"{i}{ending}": str(i).encode() + b"x" for i in range(100) for ending in (".png", ".txt")},
        "x.tar: 100 different labels for 100 images; .* not captions",
    ),
    "numbers of things": (
        {f"{i}{ending}": b"73456382%d" % i for i in range(9) for ending in (".png", ".cls")},
        "x.tar: 734,563,829 different labels for 9 images",
    ),
    "no samples": ({}, "x.tar: not a tar file of samples"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_is_named(damage: str, tmp_path: Path, cache: Path) -> None:
    members, message = DAMAGES[damage]
    path = write_tar(tmp_path / "x.tar", members)
    for name in (path, tmp_path):
        with pytest.raises(ShardError, match=rf"^{tmp_path}/{message}"):
            load(name)
    assert list(cache.rglob("*.json")) == []


@pytest.mark.parametrize("remote", [False, True])
def test_damaged_and_shortened_files_are_named(remote: bool, tmp_path: Path, server: FlakyServer) -> None:
    root = write_set(tmp_path / "set")
    name = f"{server.url if remote else tmp_path}/set/shard-{{000..002}}.tar"
    whole = (root / "shard-001.tar").read_bytes()
    corrupt_header(root / "shard-001.tar")
    with pytest.raises(ShardError, match=r"/set/shard-001.tar: damaged"):
        load(name)
    (root / "shard-001.tar").write_bytes(whole[:3500])
    with pytest.raises(ShardError, match=r"/set/shard-001.tar: damaged \(unexpected end of data\)"):
        load(name)
    (root / "shard-001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-001.tar"):
        load(name)


def test_a_label_that_training_does_not_know(tmp_path: Path) -> None:
    write_set(tmp_path)
    write_tar(tmp_path / "val-0.tar", {"a.png": picture(0), "a.cls": b"3"})
    with pytest.raises(ShardError, match=rf"^{tmp_path}/val-0.tar/a: label '3' is not one of the 3 classes"):
        load(tmp_path)


def larger(content: bytes) -> bytes:
    return content + bytes(512)


def in_another_place(content: bytes) -> bytes:
    return content[512:] + bytes(512)


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("change", [larger, in_another_place])
def test_a_file_that_changed_after_it_was_listed_is_named_and_listed_anew(
    change: Callable[[bytes], bytes], remote: bool, tmp_path: Path, server: FlakyServer, cache: Path
) -> None:
    root = write_set(tmp_path / "set")
    name = f"{server.url}/set/shard-{{000..002}}.tar" if remote else str(root)
    images = load(name).train
    assert isinstance(images, ShardImages)
    path = root / "shard-001.tar"
    assert len(images.read_shard(1)) == path.stat().st_size
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ShardError, match=r"shard-001.tar.*: changed .*; its list, .*\.json, is removed: run again"):
        images.read_shard(1)
    assert list(cache.rglob("*.json")) == []
    check_images(load(name))


def test_one_image_of_a_file_that_changed(tmp_path: Path, server: FlakyServer) -> None:
    root = write_set(tmp_path / "set")
    images = load(f"{server.url}/set/shard-{{000..002}}.tar").train
    for path in root.iterdir():
        path.write_bytes(larger(path.read_bytes()))
    with pytest.raises(ShardError, match=r"shard-00.\.tar: changed since it was listed"):
        images.image(0)


def test_a_list_that_cannot_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_set(tmp_path / "set")
    images = load(root).train
    assert isinstance(images, ShardImages)

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    (root / "shard-001.tar").write_bytes(bytes(512))
    with pytest.raises(ShardError, match=r"remove .*\.json \(Permission denied\), and run again"):
        images.read_shard(1)


def test_a_pattern_of_a_command_waits_little_for_a_list_that_others_do_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "PATIENCE", Patience(first_delay_s=0.01))
    root, asked = write_set(tmp_path / "set"), tmp_path / "asked"
    (tmp_path / "get").write_text(f'echo "$1" >> {asked}; cat "$1"')
    for _ in range(2):
        check_images(load(f"pipe:sh {tmp_path}/get {root}/shard-{{000..002}}.tar"))
    assert asked.read_text().split().count(f"{root}/shards.json") == 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # of moto's server
def test_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_set(tmp_path / "set")
    with bucket(monkeypatch) as client:
        name = upload(client, root, "a/set")
        pattern = f"{name}/shard-{{000..002}}.tar"
        data = load(pattern)
        check_images(data)
        check_images(load(pattern))  # from the cache
        assert data.name == "set"
        with pytest.raises(FileNotFoundError, match=rf"^{name}/shards.json: missing; .*train-\{{000000"):
            load(name)
        with pytest.raises(FileNotFoundError, match=rf"^{name}/shard-003.tar: not found"):
            load(f"{name}/shard-{{000..003}}.tar")
        write_tar(root / "shard-001.tar", sample(4, "cls"))
        upload(client, root, "a/set")
        images = data.train
        assert isinstance(images, ShardImages)
        with pytest.raises(ShardError, match=rf"^{name}/shard-001.tar: changed since it was listed"):
            images.read_shard(1)
        data = load(pattern)
        assert len(data.train) + len(data.val) == 8


def test_a_folder_at_a_server_cannot_be_listed(server: FlakyServer, tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    with pytest.raises(FileNotFoundError, match=r"set/shards.json: missing; .* as in train-\{000000..000099\}.tar"):
        load(f"{server.url}/set")


def test_names_that_come_late_to_a_server_are_taken(tmp_path: Path, server: FlakyServer) -> None:
    write_set(tmp_path / "set")
    name = f"{server.url}/set/shard-{{000..002}}.tar"
    assert load(name).class_names == ("0", "1", "2")
    (tmp_path / "set" / "classes.json").write_text('{"0": "a", "1": "b", "2": "c"}')
    assert load(name).class_names == ("a", "b", "c")
