"""CIFAR is downloaded, verified and unpacked, and whatever goes wrong leaves nothing that looks whole.

The official archives are replaced by small ones of the same format, served from this machine.
"""

import errno
import hashlib
import io
import os
import pickle
import shutil
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from torchvision.datasets import CIFAR10, CIFAR100

from sequencer2d.data import cifar
from sequencer2d.data.catalog import load_data, split_names

CLASSES = {"cifar10": [f"class{i}" for i in range(10)], "cifar100": [f"fine_{i}" for i in range(100)]}


class OldArray(np.ndarray):
    """Pickles as in the official files, whose `dtype` has an integer where NumPy 2.4 began to want a bool."""

    def __reduce__(self) -> tuple:
        return _old_array, (self.tobytes(), self.shape)


def _old_array(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(data, dtype=np.dtype("u1", 0)).reshape(shape)  # pyright: ignore


def batch(count: int, num_classes: int, labels_key: str) -> bytes:
    """One batch file: row i holds the value i % num_classes in red, and that is its label."""
    pixels = np.zeros((count, 3, 32, 32), dtype=np.uint8)
    pixels[:, 0] = (np.arange(count) % num_classes)[:, None, None]
    labels = [i % num_classes for i in range(count)]
    return pickle.dumps({"data": pixels.reshape(count, -1).view(OldArray), labels_key: labels}, protocol=2)


class Server:
    """Serves a folder and counts what is asked for."""

    def __init__(self, folder: Path) -> None:
        self.requests: list[str] = []
        requests = self.requests

        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                requests.append(self.path)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Serves small archives, whose address and checksums take the place of the official ones."""
    (tmp_path / "served").mkdir()
    server = Server(tmp_path / "served")
    for name, dataset in (("cifar10", CIFAR10), ("cifar100", CIFAR100)):
        labels_key = {"cifar10": "labels", "cifar100": "fine_labels"}[name]
        files = {file: batch(200, len(CLASSES[name]), labels_key) for file, _ in dataset.train_list}
        files |= {file: batch(100, len(CLASSES[name]), labels_key) for file, _ in dataset.test_list}
        files[dataset.meta["filename"]] = pickle.dumps({dataset.meta["key"]: CLASSES[name]}, protocol=2)
        archive = tmp_path / "served" / dataset.filename
        with tarfile.open(archive, "w:gz") as tar:
            for file, content in files.items():
                member = tarfile.TarInfo(f"{dataset.base_folder}/{file}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

        md5s = {file: hashlib.md5(content).hexdigest() for file, content in files.items()}
        monkeypatch.setattr(dataset, "url", f"{server.url}/{dataset.filename}")
        monkeypatch.setattr(dataset, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
        monkeypatch.setattr(dataset, "train_list", [[file, md5s[file]] for file, _ in dataset.train_list])
        monkeypatch.setattr(dataset, "test_list", [[file, md5s[file]] for file, _ in dataset.test_list])
        monkeypatch.setattr(dataset, "meta", dataset.meta | {"md5": md5s[dataset.meta["filename"]]})
    yield server
    server.close()


def contents(root: Path) -> list[str]:
    """Without the lock of the download."""
    names = sorted(path.name for path in root.iterdir()) if root.exists() else []
    return [name for name in names if not name.endswith(".lock")]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_download(name: str, server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "made/for/it"
    data = load_data(name, root=root)
    assert data.test is not None
    assert (data.name, list(data.class_names)) == (name, CLASSES[name])
    assert data.has_classes(tuple(class_name.replace("_", " ") for class_name in CLASSES[name]))  # of `prepare`
    assert len(data.train) + len(data.val) == {"cifar10": 1000, "cifar100": 200}[name]
    assert len(data.test) == 100
    assert data.val_source == "split: 10% of train, stratified, seed 0"
    for images in (data.train, data.val, data.test):
        red = [images.image(i).getpixel((31, 0)) for i in range(len(images))]
        assert red == [(label, 0, 0) for label in images.labels]
    names = split_names(data)
    assert not set(names["train"]) & set(names["val"])
    assert names["test"][7] == f"{name}/test/00007"
    assert contents(root) == sorted([cifar.DATASETS[name].base_folder, cifar.DATASETS[name].filename])
    assert capfd.readouterr() == ("", "")


def test_what_is_there_is_not_downloaded_again(server: Server, tmp_path: Path) -> None:
    load_data("cifar10", root=tmp_path / "data")
    load_data("cifar10", root=tmp_path / "data")
    load_data("cifar10", root=tmp_path / "data", download=False)
    assert len(server.requests) == 1


def test_default_root_is_data(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    load_data("cifar10")
    assert (tmp_path / "data" / CIFAR10.filename).is_file()


def test_archive_put_there_by_hand_is_unpacked(server: Server, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    shutil.copy(tmp_path / "served" / CIFAR10.filename, tmp_path / "data")
    assert len(load_data("cifar10", root=tmp_path / "data", download=False).train) == 900
    assert server.requests == []


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("damage", ["missing", "half"])
def test_half_unpacked_data_are_repaired(file: str, damage: str, server: Server, tmp_path: Path) -> None:
    load_data("cifar10", root=tmp_path / "data")
    path = tmp_path / "data" / CIFAR10.base_folder / file
    whole = path.read_bytes()
    path.unlink() if damage == "missing" else path.write_bytes(whole[: len(whole) // 2])
    load_data("cifar10", root=tmp_path / "data")
    assert path.read_bytes() == whole
    assert len(server.requests) == 1


def test_half_an_archive_is_not_taken_for_whole(server: Server, tmp_path: Path) -> None:
    whole = (tmp_path / "served" / CIFAR10.filename).read_bytes()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / CIFAR10.filename).write_bytes(whole[:1000])
    with pytest.raises(FileNotFoundError, match=rf"cifar10: not found in .*data; .*{CIFAR10.filename}"):
        load_data("cifar10", root=tmp_path / "data", download=False)
    load_data("cifar10", root=tmp_path / "data")
    assert (tmp_path / "data" / CIFAR10.filename).read_bytes() == whole


def test_no_network(server: Server, tmp_path: Path) -> None:
    server.close()
    with pytest.raises(ConnectionError) as error:
        load_data("cifar10", root=tmp_path / "data")
    message = str(error.value)
    assert message.startswith(f"{CIFAR10.filename}: cannot be downloaded from {server.url}")
    assert f"put {CIFAR10.filename} into {tmp_path / 'data'}, or train on an image folder" in message
    assert "\n" not in message
    assert contents(tmp_path / "data") == []


def test_server_without_the_file(server: Server, tmp_path: Path) -> None:
    (tmp_path / "served" / CIFAR10.filename).unlink()
    with pytest.raises(ConnectionError, match=r"cannot be downloaded from .* \(File not found\)"):
        load_data("cifar10", root=tmp_path / "data")
    assert contents(tmp_path / "data") == []


def test_truncated_download_can_be_repeated(server: Server, tmp_path: Path) -> None:
    served = tmp_path / "served" / CIFAR10.filename
    whole = served.read_bytes()
    served.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConnectionError, match="not the whole official file"):
        load_data("cifar10", root=tmp_path / "data")
    assert contents(tmp_path / "data") == []
    served.write_bytes(whole)
    assert len(load_data("cifar10", root=tmp_path / "data").train) == 900


@pytest.mark.parametrize("where", ["download", "unpack"])
def test_full_disk(where: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "download":
        monkeypatch.setattr(cifar, "download", full)
    else:
        monkeypatch.setattr(cifar, "extract_archive", full)
    with pytest.raises(OSError, match=r"^cifar10: cannot be written to .*data: No space left on device\. Free some"):
        load_data("cifar10", root=tmp_path / "data")
    assert contents(tmp_path / "data") == ([] if where == "download" else [CIFAR10.filename])


def test_interrupted_unpacking_is_made_good(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between two of the moved files: each that is there is whole, and the next call brings the rest."""
    moved = []

    def replace_three(source: Path, target: Path) -> None:
        if len(moved) == 3:
            raise KeyboardInterrupt
        os.replace(source, target)
        moved.append(target)

    with monkeypatch.context() as patch:
        patch.setattr(cifar, "os", SimpleNamespace(replace=replace_three))
        with pytest.raises(KeyboardInterrupt):
            load_data("cifar10", root=tmp_path / "data")
    assert contents(tmp_path / "data") == [CIFAR10.base_folder, CIFAR10.filename]
    assert len(contents(tmp_path / "data" / CIFAR10.base_folder)) == 3
    assert len(load_data("cifar10", root=tmp_path / "data").train) == 900
