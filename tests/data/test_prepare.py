"""Whatever happens, the data set is there whole or not at all, and its source is as it was.

The official archives are replaced by small ones of the same format, made here.
"""

import errno
import hashlib
import json
import os
import shutil
import tarfile
import threading
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from official_archives import (
    CLASSES,
    WORDS,
    cifar_archive,
    folder_files,
    imagenet_archives,
    jpeg,
    python2_pickle,
    snapshot,
    tar_of,
    tiny_files,
    write_files,
    write_zip,
)
from sequencer2d.cli import DONE, WRONG_INPUT, main
from sequencer2d.data import layouts
from sequencer2d.data.archives import ArchiveError
from sequencer2d.data.catalog import load_data, split_names
from sequencer2d.data.prepare import LAYOUTS, prepare


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes an official archive of random pixels, whose checksums take the place of the official ones."""

    def make(name: str) -> Path:
        archive, checksums = cifar_archive(tmp_path / "source", name)
        for attribute, value in checksums.items():
            monkeypatch.setattr(layouts.DATASETS[name], attribute, value)
        return archive

    return make


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("how", ["archive", "folder of it", "unpacked", "folder of unpacked"])
def test_cifar_is_lossless(name: str, how: str, cifar: Callable[[str], Path], tmp_path: Path) -> None:
    archive = cifar(name)
    base = layouts.DATASETS[name].base_folder
    source = {"archive": archive, "folder of it": archive.parent}.get(how, tmp_path / "unpacked")
    if "unpacked" in how:
        with tarfile.open(archive) as tar:
            tar.extraction_filter = getattr(tarfile, "data_filter", None)  # not in 3.11.2, Debian 12's Python
            tar.extractall(source)
        source = source / base if how == "unpacked" else source
    before = snapshot(source if source.is_dir() else source.parent)
    result = prepare(name, tmp_path / "data", source)
    assert snapshot(source if source.is_dir() else source.parent) == before
    assert result.num_images == {"train": {"cifar10": 100, "cifar100": 200}[name], "test": len(CLASSES[name]) * 2}
    assert (result.made, result.num_classes) == (True, len(CLASSES[name]))
    data, random = load_data(str(result.folder)), np.random.RandomState(0)
    assert list(data.class_names) == [class_name.replace("_", " ") for class_name in CLASSES[name]]
    assert list(data.class_ids) == CLASSES[name]  # as a model trained on the official batches calls them
    for split, files in (("train", layouts.DATASETS[name].train_list), ("test", layouts.DATASETS[name].test_list)):
        for file, _ in files:
            count = 2 * len(CLASSES[name])
            pixels = random.randint(0, 256, (count, 3072)).astype(np.uint8).reshape(-1, 3, 32, 32)
            for i in range(count):
                folder = CLASSES[name][i % (count // 2)]
                with Image.open(result.folder / split / folder / f"{file}_{i:05d}.png") as image:
                    assert np.array_equal(np.asarray(image), pixels[i].transpose(1, 2, 0))


def test_cifar_is_downloaded(cifar: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = cifar("cifar10")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(archive.parent)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_address[1]}/{archive.name}")
    try:
        assert prepare("cifar10", tmp_path / "data").num_images == {"train": 100, "test": 20}
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_archive_of_another_set(cifar: Callable[[str], Path], tmp_path: Path) -> None:
    for other in (cifar("cifar100"), write_zip(tmp_path / "source/tiny.zip", tiny_files())):
        with pytest.raises(ArchiveError, match=rf"{other.name}: not the official cifar10: lacks batches.meta"):
            prepare("cifar10", tmp_path / "data", other)
    with pytest.raises(ArchiveError, match=r"cifar-100-python.tar.gz/wnids.txt: missing"):
        prepare("tiny-imagenet", tmp_path / "data", tmp_path / "source" / CIFAR100.filename)
    with pytest.raises(FileNotFoundError, match=r"holds neither cifar-10-python.tar.gz nor"):
        prepare("cifar10", tmp_path / "data", tmp_path / "source")
    assert snapshot(tmp_path / "data") == {}


def test_pickle_that_would_run_something(cifar: Callable[[str], Path], tmp_path: Path) -> None:
    cifar("cifar10")
    code = b"cos\nsystem\n(S'touch " + str(tmp_path / "run").encode() + b"'\ntR."
    with pytest.raises(layouts.cifar_batches.BatchError, match=r"names os\.system, which no official file does"):
        layouts.cifar_batches.unpickle_arrays("data_batch_1", code)
    with pytest.raises(layouts.cifar_batches.BatchError, match="not the official file of cifar10"):
        layouts.cifar_batches.read_batch("cifar10", "data_batch_1", code)
    assert not (tmp_path / "run").exists()


BLACK = np.zeros((1, 3072), dtype=np.uint8)


@pytest.mark.parametrize(
    "value",
    [
        {},
        {b"data": 3, b"labels": [1]},
        {b"data": b"x", b"labels": [1]},
        [1],
        {b"data": BLACK, b"labels": [10]},
        {b"data": BLACK, b"labels": [-1]},
        {b"data": BLACK, b"labels": [b"1"]},
        {b"data": BLACK, b"labels": [1, 1]},
    ],
)
def test_batch_that_makes_no_sense(value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    content = python2_pickle(value)
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", hashlib.md5(content).hexdigest()]])
    with pytest.raises(layouts.cifar_batches.BatchError, match=r"^data_batch_1: "):
        layouts.cifar_batches.read_batch("cifar10", "data_batch_1", content)


@pytest.mark.parametrize("how", ["archive", "folder", "folder of it", "folder of the archive"])
def test_tiny_imagenet(how: str, tmp_path: Path) -> None:
    files = tiny_files()
    if "archive" in how:
        source = write_zip(tmp_path / "source" / "tiny-imagenet-200.zip", files)
        source = source.parent if how.startswith("folder") else source
    else:
        source = write_files(tmp_path / "source", files)
        source = source / "tiny-imagenet-200" if how == "folder" else source
    before = snapshot(tmp_path / "source")
    result = prepare("tiny-imagenet", tmp_path / "data", source)
    assert snapshot(tmp_path / "source") == before
    assert result.num_images == {"train": 9, "val": 6}
    assert "no labels" in result.notes[0]
    assert "only a part of tiny-imagenet, consistent in itself: 3 of 200 classes" in result.notes[1]
    made = snapshot(result.folder)
    names = json.loads((result.folder / "classes.json").read_text())
    wanted = {"n01742172": "boa constrictor", "n02012849": "crane (n02012849)", "n03126707": "crane (n03126707)"}
    assert list(names.items()) == list(wanted.items())
    assert load_data(str(result.folder)).class_names == tuple(wanted.values())
    by_name = load_data("tiny-imagenet", root=tmp_path / "data")
    assert (by_name.name, by_name.class_names) == ("tiny-imagenet", tuple(wanted.values()))
    images = {file: content for file, content in made.items() if content is not None and file != "classes.json"}
    assert len(images) == 15
    for i in range(6):
        assert images[f"val/{list(WORDS)[i % 3]}/val_{i}.JPEG"] == files[f"tiny-imagenet-200/val/images/val_{i}.JPEG"]
    for wnid in WORDS:
        file = f"{wnid}_1.JPEG"
        assert images[f"train/{wnid}/{file}"] == files[f"tiny-imagenet-200/train/{wnid}/images/{file}"]


@pytest.mark.parametrize(
    ("gone", "added", "message"),
    [
        ("train/n02012849/images/n02012849_1.JPEG", "", "train: n02012849 has not 3 images"),
        ("val/images/val_2.JPEG", "", "val_2.JPEG: missing"),
        ("", "val/images/val_9.JPEG", "images and val_annotations.txt are not the same"),
        ("", "train/n00000001/images/n00000001_0.JPEG", "do not have the same classes"),
        ("wnids.txt", "", "wnids.txt: missing"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_tiny_imagenet_that_lacks_something(gone: str, added: str, message: str, zipped: bool, tmp_path: Path) -> None:
    files = tiny_files()
    files.pop(f"tiny-imagenet-200/{gone}", None)
    if added:
        files[f"tiny-imagenet-200/{added}"] = jpeg(1)
    source = write_zip(tmp_path / "t.zip", files) if zipped else write_files(tmp_path / "t", files)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        prepare("tiny-imagenet", tmp_path / "data", source)
    assert str(error.value).startswith(str(source))
    assert snapshot(tmp_path / "data") == {}


@pytest.mark.parametrize("zipped", [True, False])
def test_tiny_imagenet_by_another_name(zipped: bool, tmp_path: Path) -> None:
    source = write_zip(tmp_path / "t.zip", tiny_files()) if zipped else write_files(tmp_path / "t", tiny_files())
    source = source if zipped else source / "tiny-imagenet-200"
    with pytest.raises(ValueError, match=rf"^{source}: Tiny-ImageNet .* by its name, tiny-imagenet"):
        prepare("tiny", tmp_path / "data", source)


def test_tiny_imagenet_whose_val_lacks_a_class(tmp_path: Path) -> None:
    files, annotations = tiny_files(), "tiny-imagenet-200/val/val_annotations.txt"
    lines = files[annotations].splitlines(keepends=True)
    files[annotations] = b"".join(line for number, line in enumerate(lines) if number % 3)
    for number in (0, 3):
        del files[f"tiny-imagenet-200/val/images/val_{number}.JPEG"]
    with pytest.raises(ValueError, match=r"wnids\.txt, train and val do not have the same classes"):
        prepare("tiny-imagenet", tmp_path / "data", write_files(tmp_path / "t", files))
    assert snapshot(tmp_path / "data") == {}


def test_imagenet(tmp_path: Path) -> None:
    source = imagenet_archives(tmp_path / "source")
    before = snapshot(source)
    result = prepare("imagenet", tmp_path / "data", source)
    assert snapshot(source) == before
    assert result.num_images == {"train": 5, "val": 4}
    assert "only a part of imagenet" in result.notes[0]
    made = snapshot(result.folder)
    assert made["train/n02012849/n02012849_1.JPEG"] == jpeg(21)
    assert made["train/n03126707/n03126707_2.JPEG"] == jpeg(32)
    for number, wnid in enumerate(["n03126707", "n02012849", "n02012849", "n03126707"], start=1):
        assert made[f"val/{wnid}/ILSVRC2012_val_0000000{number}.JPEG"] == jpeg(50 + number)
    for root in (result.folder, tmp_path / "data"):
        assert load_data("imagenet", root=root).class_names == ("crane (n02012849)", "crane (n03126707)")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"without": "n02012849.tar"}, "0 images of n02012849, where the devkit counts 2"),
        ({"without": "ILSVRC2012_val_00000003.JPEG"}, "3 images, where the devkit labels 4"),
        ({"truth": "1\n2\n2\n"}, "val_00000004.JPEG is not a validation image that the devkit labels"),
        ({"truth": "1\n1\n"}, "are not the same"),
        ({"truth": "1\n9\n"}, "makes no sense"),
        ({"extra": {"n00000009.tar": b""}}, "n00000009.tar is not the tar of a class"),
        ({"extra": {"n02012849.tar": tar_of({"n02012849_0.JPEG": b"1"})}}, "1 images of n02012849, where"),
        ({"extra": {"n02012849.tar": tar_of({"n03126707_0.JPEG": b"1"})}}, "is not an image of that class"),
        ({"extra": {"n02012849.tar": tar_of({"../n02012849_0.JPEG": b"1"})}}, "leads out of the folder"),
        ({"extra": {"n02012849.tar": tar_of({"n02012849_0.JPEG": bytes(999)})[:700]}}, "cut short"),
    ],
)
def test_imagenet_archives_that_disagree(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    source = imagenet_archives(tmp_path / "source", **changes)
    with pytest.raises(ArchiveError, match=message):
        prepare("imagenet", tmp_path / "data", source)
    assert snapshot(tmp_path / "data") == {}


def test_imagenet_archive_missing(tmp_path: Path) -> None:
    (imagenet_archives(tmp_path / "source") / "ILSVRC2012_img_val.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"source: lacks ILSVRC2012_img_val\.tar; download"):
        prepare("imagenet", tmp_path / "data", tmp_path / "source")


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_folder_is_split_with_the_seed(kind: str, tmp_path: Path) -> None:
    files = folder_files()
    if kind == "folder":
        source = write_files(tmp_path / "source", files | {"cat/notes.txt": b"no image"})
    elif kind == "zip":
        members = {f"top/{file}": content for file, content in files.items()}
        macos = {f"__MACOSX/top/{file.replace('/', '/._')}": b"x" for file in files} | {"top/.hidden/a.png": b"x"}
        source = write_zip(tmp_path / "source" / "x.zip", members | macos)
    else:
        source = write_files(tmp_path / "source", {"x.tar": tar_of(files)}) / "x.tar"
    before = snapshot(tmp_path / "source")
    result = prepare("pets", tmp_path / "data", source, val_fraction=0.34, seed=3)
    assert snapshot(tmp_path / "source") == before
    assert result.num_images == {"train": 8, "val": 4}
    assert result.notes == ("validation images: split: 34% of the images, stratified, seed 3",)
    wanted = split_names(load_data(str(write_files(tmp_path / "plain", files)), val_fraction=0.34, seed=3))
    made = snapshot(result.folder)
    assert json.loads(str((made.pop("classes.json") or b"").decode())) == {"cat": "cat", "dog": "dog"}
    assert {name for name, content in made.items() if content is not None} == {
        f"{split}/{file}" for split in ("train", "val") for file in wanted[split]
    }
    for name, content in made.items():
        assert content is None or content == files[name.partition("/")[2]]


def test_pictures_of_other_formats_in_an_archive_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_zip(tmp_path / "x.zip", folder_files() | {"cat/a.heic": b"x", "__MACOSX/cat/._a.heic": b"x"})
    prepare("pets", tmp_path / "data", source)
    assert f"{source}: left out, since their format is not read: 1 .heic;" in caplog.text


def test_folder_with_splits_and_names(tmp_path: Path) -> None:
    files = {f"{split}/{c}/{i}.png": b"x" for split in ("train", "valid", "test") for c in ("n1", "n2") for i in "ab"}
    files["classes.json"] = b'{"n1": "ox", "n2": "ox"}'
    result = prepare("pets", tmp_path / "data", write_files(tmp_path / "source", files))
    assert (result.num_images, result.notes) == ({"train": 4, "val": 4, "test": 4}, ())
    assert load_data(str(result.folder)).class_names == ("ox (n1)", "ox (n2)")
    assert (result.folder / "val/n2/b.png").is_file()


@pytest.mark.parametrize("change", ["content", "gone", "new", "shorter for a moment"])
def test_folder_that_changes_while_it_is_read(change: str, tmp_path: Path) -> None:
    files = folder_files()
    source = write_files(tmp_path / "source", files)
    times = os.stat(source / "dog/4.jpg")

    def meddle(what: str, done: int, total: int) -> None:
        if change == "shorter for a moment":  # as rsync may write it, which restores times
            (source / "dog/4.jpg").write_bytes(b"other" if done < total else files["dog/4.jpg"])
            os.utime(source / "dog/4.jpg", ns=(times.st_atime_ns, times.st_mtime_ns))
        elif change == "gone":
            (source / "dog/4.jpg").unlink(missing_ok=True)
        else:
            (source / {"content": "cat/0.jpg", "new": "dog/9.jpg"}[change]).write_bytes(b"other")

    with pytest.raises(ValueError, match=rf"{source}.*: changed while it was read; run again"):
        prepare("pets", tmp_path / "data", source, progress=meddle)
    assert snapshot(tmp_path / "data") == {}


@pytest.mark.parametrize("gone", ["train/cat", "val/dog/*.jpg"])
def test_a_file_system_that_loses_something(gone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that takes the classes `cat` and `Cat` for the same folder."""

    def lay_out(job: layouts.Job) -> layouts.Layout:
        layout = layouts.lay_out_folder(job)
        lost = next(job.tree.glob(gone))
        if lost.is_dir():
            shutil.rmtree(lost)
            return replace(layout, num_images={"train": 4, "val": 4})  # else the counts differ, too
        lost.unlink()
        return layout

    monkeypatch.setitem(LAYOUTS, "tiny-imagenet", lay_out)
    source = write_files(tmp_path / "source", folder_files())
    with pytest.raises(AssertionError):
        prepare("tiny-imagenet", tmp_path / "data", source, val_fraction=0.34)
    assert snapshot(tmp_path / "data") == {}


def test_not_a_regular_file(tmp_path: Path) -> None:
    source = write_files(tmp_path / "source", folder_files())
    os.mkfifo(source / "cat/pipe.png")
    with pytest.raises(ValueError, match=r"pipe\.png: not a regular file"):
        prepare("pets", tmp_path / "data", source)


def test_finished_set_is_left_alone_and_others_are_not_touched(tmp_path: Path) -> None:
    source = write_files(tmp_path / "source", folder_files())
    first = prepare("pets", tmp_path / "data", source)
    before = snapshot(tmp_path / "data")
    again = prepare("pets", tmp_path / "data", source, seed=9)
    assert (again.made, again.num_images, again.folder) == (False, first.num_images, first.folder)
    assert snapshot(tmp_path / "data") == before
    for file in ("notes.txt", "classes.json", "train/cat/1.jpg"):
        write_files(tmp_path / "data/mine", {file: b"mine"})
        with pytest.raises(FileExistsError, match="mine: there already, and not made by prepare"):
            prepare("mine", tmp_path / "data", source)
        assert snapshot(tmp_path / "data/mine")[file] == b"mine"
        shutil.rmtree(tmp_path / "data/mine")


@pytest.mark.parametrize("by_link", [False, True])
def test_target_within_the_source(by_link: bool, tmp_path: Path) -> None:
    source = write_files(tmp_path / "source", folder_files())
    (tmp_path / "link").symlink_to(source)
    before = snapshot(source)
    with pytest.raises(ValueError, match="lies in the source"):
        prepare("pets", (tmp_path / "link" if by_link else source) / "cat", source)
    assert snapshot(source) == before


@pytest.mark.parametrize("name", ["../pets", "a/b", "", ".", "..", ".hidden", "a\n"])
def test_name_that_is_no_folder_of_the_root(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a plain name"):
        prepare(name, tmp_path / "data", tmp_path)


def test_two_at_once(tmp_path: Path) -> None:
    source = write_files(tmp_path / "source", folder_files())
    (tmp_path / "data/.prepare-pets").mkdir(parents=True)
    with (
        FileLock(tmp_path / "data/.prepare-pets.lock"),
        pytest.raises(BlockingIOError, match="another process is preparing it"),
    ):
        prepare("pets", tmp_path / "data", source)
    assert (tmp_path / "data/.prepare-pets").is_dir()  # the other's
    assert prepare("pets", tmp_path / "data", source).made


@pytest.mark.parametrize("when", ["before", "while writing"])
def test_full_disk(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_files(tmp_path / "source", folder_files())
    if when == "before":
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(layouts.shutil, "disk_usage", lambda path: usage(10, 0, 10))
    else:

        def full(*args: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(layouts, "save", full)
    with pytest.raises(
        OSError, match=r"^pets: cannot be written to .*data: No space left on device.*\. Free some space"
    ):
        prepare("pets", tmp_path / "data", source)
    assert snapshot(tmp_path / "data") == {}


def test_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_zip(tmp_path / "source/t.zip", tiny_files())
    root = str(tmp_path / "data")
    assert main(["prepare", "tiny-imagenet", "--root", root, "--source", str(source)]) == DONE
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{root}/tiny-imagenet: 9 train, 6 val images of 3 classes\n")
    assert "note: the official test images have no labels and are left out" in captured.out
    assert f"sequencer2d train --data {root}/tiny-imagenet" in captured.out
    assert captured.err == ""
    assert main(["prepare", "tiny-imagenet", "--root", root, "--source", str(source)]) == DONE
    assert "already and is unchanged" in capsys.readouterr().out
    source.write_bytes(source.read_bytes()[:2000])
    status = main(["prepare", "tiny-imagenet", "--root", str(tmp_path / "b"), "--source", str(source)])
    captured = capsys.readouterr()
    assert status == WRONG_INPUT
    assert f"{source}: not a zip or tar, cut short or damaged" in captured.err
    assert captured.err.count("\n") == 1
