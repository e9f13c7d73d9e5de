"""Small archives in the formats of the official ones, and folders of images."""

import hashlib
import io
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import CIFAR10, CIFAR100

CLASSES = {"cifar10": [f"class{i}" for i in range(10)], "cifar100": [f"fine_{i:02}" for i in range(100)]}
WORDS = {
    "n02012849": "crane",
    "n01742172": "boa constrictor, Constrictor constrictor",
    "n03126707": "crane",
}


def snapshot(root: Path) -> dict[str, bytes | None]:
    """Everything in a folder but locks and the marks of scratch folders."""
    paths = (path for path in sorted(root.rglob("*")) if not path.name.endswith(".lock"))
    return {path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else None for path in paths}


_Pickler: Any = vars(pickle)["_Pickler"]  # the one in Python, whose parts can be replaced


class Python2Pickler(_Pickler):
    """Writes what the official files hold: byte strings of Python 2, and NumPy's old names."""

    dispatch: ClassVar[dict[Any, Any]] = dict(_Pickler.dispatch)

    def save_bytes(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    def save_global(self, value: object, name: str | None = None) -> None:
        names = {np.ndarray: "numpy\nndarray", np.dtype: "numpy\ndtype"}
        named = names[value] if isinstance(value, type) else "numpy.core.multiarray\n_reconstruct"
        self.write(pickle.GLOBAL + named.encode() + b"\n")

    dispatch[bytes] = save_bytes
    dispatch[type] = save_global
    dispatch[type(lambda: None)] = save_global


def python2_pickle(value: object) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, 2).dump(value)
    return buffer.getvalue()


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # pyright: ignore[reportCallIssue, reportArgumentType]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def cifar_archive(folder: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """An official archive of random pixels, and the checksums of torchvision's class that it would have."""
    dataset, random = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name], np.random.RandomState(0)
    files = {}
    for file, _ in [*dataset.train_list, *dataset.test_list]:
        count = 2 * len(CLASSES[name])
        pixels = random.randint(0, 256, (count, 3072)).astype(np.uint8)
        labels_key = b"labels" if name == "cifar10" else b"fine_labels"
        files[file] = python2_pickle({b"data": pixels, labels_key: [i % (count // 2) for i in range(count)]})
    classes = [class_name.encode() for class_name in CLASSES[name]]
    files[dataset.meta["filename"]] = python2_pickle({dataset.meta["key"].encode(): classes})
    archive = folder / dataset.filename
    write_files(folder, {archive.name: tar_of({f"{dataset.base_folder}/{f}": c for f, c in files.items()}, "w:gz")})
    md5s = {file: hashlib.md5(content).hexdigest() for file, content in files.items()}
    return archive, {
        "tgz_md5": hashlib.md5(archive.read_bytes()).hexdigest(),
        "train_list": [[file, md5s[file]] for file, _ in dataset.train_list],
        "test_list": [[file, md5s[file]] for file, _ in dataset.test_list],
        "meta": dataset.meta | {"md5": md5s[dataset.meta["filename"]]},
    }


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.RandomState(seed).randint(0, 256, (6, 6, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def tiny_files() -> dict[str, bytes]:
    """Tiny-ImageNet's official layout: three classes of three training and two validation images."""
    top, lines, files = "tiny-imagenet-200", [], {}
    for number, wnid in enumerate(WORDS):
        files[f"{top}/train/{wnid}/{wnid}_boxes.txt"] = b"boxes"
        files |= {f"{top}/train/{wnid}/images/{wnid}_{i}.JPEG": jpeg(10 * number + i) for i in range(3)}
    for i in range(6):
        files[f"{top}/val/images/val_{i}.JPEG"] = jpeg(100 + i)
        lines.append(f"val_{i}.JPEG\t{list(WORDS)[i % 3]}\t0\t0\t9\t9\n")
    files[f"{top}/val/val_annotations.txt"] = "".join(lines).encode()
    files[f"{top}/test/images/test_0.JPEG"] = jpeg(0)
    files[f"{top}/wnids.txt"] = "\n".join(WORDS).encode()
    files[f"{top}/words.txt"] = "".join(f"{wnid}\t{words}\n" for wnid, words in WORDS.items()).encode()
    return files


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_files(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def imagenet_archives(folder: Path, **changes: object) -> Path:
    """The three archives: two classes of two and three training images, four validation images."""
    counts = {"n02012849": 2, "n03126707": 3}
    ids = {"n03126707": 1, "n02012849": 2}
    rows = [(3, "n00000001", "animal", 2, 0), *((ids[w], w, WORDS[w], 0, counts[w]) for w in counts)]
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O"), ("num_train_images", "O")]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, dtype=fields)})
    truth = str(changes.get("truth", "1\n2\n2\n1\n"))
    kit = {
        "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    }
    train = {
        f"{wnid}.tar": tar_of({f"{wnid}_{i}.JPEG": jpeg(i + 10 * count) for i in range(count)})
        for wnid, count in counts.items()
    }
    val = {f"ILSVRC2012_val_0000000{i}.JPEG": jpeg(50 + i) for i in (4, 2, 3, 1)}
    for change in (train, val):
        for key in list(change):
            if key == changes.get("without"):
                del change[key]
    if extra := changes.get("extra"):
        assert isinstance(extra, dict)
        train |= extra
    return write_files(
        folder,
        {
            "ILSVRC2012_devkit_t12.tar.gz": tar_of(kit, "w:gz"),
            "ILSVRC2012_img_train.tar": tar_of(train),
            "ILSVRC2012_img_val.tar": tar_of(val),
        },
    )


def folder_files() -> dict[str, bytes]:
    return {f"{c}/{'deep/' * (i % 2)}{i}.jpg": jpeg(i) for c in ("cat", "dog") for i in range(6)}
