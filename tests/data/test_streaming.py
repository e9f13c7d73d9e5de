"""Shards as a stream: every image once, in an order that no number of workers, stop or server changes."""

import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batches import PREPROCESSING, assert_same, epoch, random_transform
from buckets import bucket, upload
from flaky import FlakyServer, flaky_server
from sequencer2d.data import fetch, loaders
from sequencer2d.data.catalog import load_data
from sequencer2d.data.fetch import Patience, ShardError
from sequencer2d.data.images import Picture
from sequencer2d.data.loaders import Batch, StreamedBatches, TrainLoader, eval_loader
from sequencer2d.data.sets import ArrayImages, ImageData
from sequencer2d.data.shards import Shard, ShardImages, ShardLocation, load_shards, write_shards
from sequencer2d.data.streaming import SHARDS_AHEAD, shuffled, stream
from sequencer2d.data.transforms import EvalTransform
from sequencer2d.training.config import TrainConfig
from sequencer2d.training.run import train
from sequencer2d.training.task import SequencerTask

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # on a machine of one core
    pytest.mark.filterwarnings("ignore:.* use of fork:DeprecationWarning"),  # Python 3.12 and 3.13, beside threads
]

NUM_TRAIN = 23


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "PATIENCE", Patience(attempts=3, timeout_s=0.5, first_delay_s=0.01, max_delay_s=0.02))
    monkeypatch.setattr(loaders, "SHUFFLE_BUFFER", 6)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 training images in shards of 4, whose pixels are their number; 5 validation images in two shards."""
    numbers = np.arange(NUM_TRAIN + 5)
    array = np.broadcast_to(numbers[:, None, None, None], (NUM_TRAIN + 5, 8, 8, 3)).astype(np.uint8)
    images = ArrayImages(np.ascontiguousarray(array), numbers % 3, [f"images/{i}" for i in numbers])
    data = ImageData(
        name="numbered",
        class_names=("a", "b", "c"),
        train=images.subset(range(NUM_TRAIN)),
        val=images.subset(range(NUM_TRAIN, NUM_TRAIN + 5)),
        test=None,
        val_source="given",
    )
    root = tmp_path_factory.mktemp("data")
    write_shards(data, root / "shards", images_per_shard=4)
    return root


@pytest.fixture
def server(root: Path) -> Iterator[FlakyServer]:
    with flaky_server(root) as server:
        yield server


def load(name: str | Path) -> ImageData:
    return load_shards(str(name), val_fraction=0.25, seed=0)


def train_images(name: str | Path) -> ShardImages:
    images = load(name).train
    assert isinstance(images, ShardImages)
    return images


def loader(
    images: ShardImages, *, batch_size: int = 4, seed: int = 0, num_workers: int = 0, **ranks: int
) -> TrainLoader:
    return TrainLoader(images, random_transform(), batch_size=batch_size, seed=seed, num_workers=num_workers, **ranks)


def indices(batches: Sequence[Batch]) -> list[int]:
    return torch.cat([batch.indices for batch in batches]).tolist()


def imagined(sizes: Sequence[int]) -> ShardImages:
    """Shards of so many images, of which no byte exists."""
    ones = [
        Shard(
            file=f"{number}.tar", split="train", first_key=0, num_images=size, size=size, sha256="",
            labels=[0] * size, offsets=list(range(size)), sizes=[1] * size,
        )
        for number, size in enumerate(sizes)
    ]  # fmt: skip
    return ShardImages(ShardLocation("nowhere/"), ones, 1)


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    world_size=st.integers(1, 5),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    number=st.integers(0, 1000),
)
def test_the_ranks_share_an_epoch_without_repetition_and_as_many_batches_as_one_would_have(
    sizes: list[int], world_size: int, batch_size: int, seed: int, number: int
) -> None:
    images = imagined(sizes)
    if len(images) < world_size:
        return
    num_batches = max(1, len(images) // max(batch_size, world_size))
    shares = []
    for rank in range(world_size):
        batches = StreamedBatches(images, batch_size, seed, rank=rank, world_size=world_size)
        batches.set_epoch(number)
        assert len(batches) == num_batches
        shares.append([index for index, _ in batches.order()])
        assert len(shares[-1]) % num_batches == 0
    counts = [len(share) // num_batches for share in shares]
    assert sum(counts) == min(max(batch_size, world_size), len(images))
    assert max(counts) - min(counts) <= 1
    seen = [index for share in shares for index in share]
    assert len(set(seen)) == len(seen) > len(images) - max(batch_size, world_size)
    # a shard is read by several ranks only where it lies at a border between them
    readers = Counter(number for share in shares for number in set(images.shard_numbers[share].tolist()))
    assert sum(readers.values()) <= len(sizes) + world_size - 1


def test_shards_and_images_are_shuffled_anew_each_epoch_and_have_their_own_seeds() -> None:
    images = imagined([50] * 20)
    options = {"seed": 3, "rank": 0, "run": (0, 1000), "buffer_size": 100}
    first, second = (shuffled(images, epoch=number, **options) for number in (0, 1))
    assert first == shuffled(images, epoch=0, **options)
    assert len({seed for _, seed in first}) == 1000
    for order in (first, second):
        shards = images.shard_numbers[[index for index, _ in order]]
        assert shards[:50].tolist() != sorted(shards[:50])
        assert len(set(shards[:50])) >= 3  # a buffer of two shards mixes their images
        within = [index for index, _ in order if images.shard_numbers[index] == shards[0]]
        assert within != sorted(within)
    assert [index for index, _ in first] != [index for index, _ in second]
    assert dict(first)[0] != dict(second)[0]


def test_an_epoch_has_every_image_once(root: Path) -> None:
    images = train_images(root / "shards")
    for number in (0, 1):
        seen = indices(epoch(loader(images, batch_size=NUM_TRAIN), number))
        assert sorted(seen) == list(range(NUM_TRAIN))
    assert len(loader(images)) == 5
    assert len(indices(epoch(loader(images)))) == 20  # the incomplete batch is dropped


def test_the_images_are_those_that_their_indices_name(root: Path) -> None:
    images = train_images(root / "shards")
    for index, content in zip([7, 22, 0, 8], stream(images, [7, 22, 0, 8]), strict=True):
        assert images.decode(index, content).tobytes() == images.image(index).tobytes()
    for batch in epoch(loader(images)):
        assert batch.labels.tolist() == images.labels[batch.indices.numpy()].tolist()


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_number_of_workers_changes_nothing(num_workers: int, world_size: int, root: Path) -> None:
    images = train_images(root / "shards")
    for rank in range(world_size):
        ranks = {"rank": rank, "world_size": world_size}
        helped, alone = loader(images, num_workers=num_workers, **ranks), loader(images, **ranks)
        for number in (0, 1):
            assert_same(epoch(helped, number), epoch(alone, number))


def test_two_ranks_see_disjoint_halves(root: Path) -> None:
    images = train_images(root / "shards")
    one, other = (indices(epoch(loader(images, batch_size=22, rank=rank, world_size=2))) for rank in (0, 1))
    assert len(one) == len(other) == 11
    assert not set(one) & set(other)


def test_more_ranks_than_images_are_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="23 images in shards are too few for 24 processes"):
        loader(train_images(root / "shards"), world_size=24)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 3, 5])
def test_a_stopped_epoch_continues_with_exactly_what_was_left(done: int, num_workers: int, root: Path) -> None:
    images = train_images(root / "shards")
    whole = [epoch(loader(images), number) for number in (4, 5)]
    stopped = loader(images, num_workers=num_workers)
    stopped.batches.set_epoch(4)
    taken = list(itertools.islice(stopped, done))
    state = stopped.state_dict()

    continued = loader(images, num_workers=num_workers)
    continued.load_state_dict(state)
    rest = epoch(continued, 4 if done < 5 else 5)
    assert_same([*taken, *rest], whole[0] if done < 5 else [*whole[0], *whole[1]])
    assert_same(epoch(continued, 5), whole[1])


@pytest.mark.parametrize(("state", "warns"), [((2, 2), True), ((0, 2), False), ((2, 1), False)])
def test_another_number_of_processes_inside_an_epoch_is_said(
    state: tuple[int, int], warns: bool, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    batch, world_size = state
    continued = loader(train_images(root / "shards"))
    continued.load_state_dict({"batch": batch, "world_size": world_size})
    assert ("with 2 processes, going on with 1: shards are divided anew" in caplog.text) == warns
    assert len(epoch(continued)) == 5 - batch


def test_what_was_seen_before_the_stop_is_not_read_again(root: Path, server: FlakyServer) -> None:
    images = train_images(f"{server.url}/shards")
    server.requests.clear()
    epoch(loader(images))
    assert sorted(server.files()) == [f"train-00000{i}.tar" for i in range(6)]  # each once
    continued = loader(images)
    continued.load_state_dict({"batch": 4})
    server.requests.clear()
    (last,) = epoch(continued)
    assert set(server.files()) == {images.name(index).partition("/")[0] for index in last.indices.tolist()}
    assert len(server.files()) < 6


def test_shards_are_read_ahead_but_not_far(root: Path, server: FlakyServer) -> None:
    images = train_images(f"{server.url}/shards")
    server.requests.clear()
    files = stream(images, range(NUM_TRAIN))
    next(files)
    assert len(server.requests) <= 1 + SHARDS_AHEAD
    files.close()
    assert len(server.requests) <= 1 + SHARDS_AHEAD


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 50])
def test_evaluation_has_every_image_once_and_in_order(batch_size: int, num_workers: int, root: Path) -> None:
    images = load(root / "shards").val
    evaluation = eval_loader(images, EvalTransform(PREPROCESSING), batch_size=batch_size, num_workers=num_workers)
    for _ in range(2):
        batches = list(evaluation)
        assert len(batches) == len(evaluation)
        assert torch.cat([batch.images for batch in batches])[:, 0, 0, 0].tolist() == list(range(23, 28))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_server_in_trouble_changes_nothing(num_workers: int, root: Path, server: FlakyServer) -> None:
    server.faults |= {
        "shards.json": [503, "reset"],
        "train-000001.tar": ["reset", "no-range"],
        "train-000003.tar": [503, 503],
        "train-000004.tar": ["stall"],
    }
    remote = train_images(f"{server.url}/shards/shards.json")
    assert_same(epoch(loader(remote, num_workers=num_workers)), epoch(loader(train_images(root / "shards"))))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_that_does_not_come_is_given_up_by_name_after_what_came(
    num_workers: int, root: Path, server: FlakyServer
) -> None:
    images = train_images(f"{server.url}/shards")
    whole = epoch(loader(images))
    needed = {images.name(index).partition("/")[0] for batch in whole[:2] for index in batch.indices.tolist()}
    missing = next(f"train-00000{i}.tar" for i in range(6) if f"train-00000{i}.tar" not in needed)
    server.faults[missing] = [503] * 9
    came: list[Batch] = []
    with pytest.raises(ConnectionError, match=rf"^{server.url}/shards/{missing}: given up after 3 .* 503"):
        came.extend(loader(images, num_workers=num_workers))
    assert len(came) >= 2
    assert_same(came, whole[: len(came)])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_shard_ends_epoch_and_evaluation_by_name(num_workers: int, root: Path, tmp_path: Path) -> None:
    data = load(damaged(root, tmp_path, "train-000002.tar", "val-000001.tar"))
    assert isinstance(data.train, ShardImages)
    with pytest.raises(ShardError, match=rf"^{tmp_path}/train-000002.tar: not the file"):
        epoch(loader(data.train, num_workers=num_workers))
    evaluation = eval_loader(data.val, EvalTransform(PREPROCESSING), batch_size=2, num_workers=num_workers)
    with pytest.raises(ShardError, match=rf"^{tmp_path}/val-000001.tar: not the file"):
        list(evaluation)


def damaged(root: Path, folder: Path, *files: str) -> Path:
    """The shards in another folder, these files with other bytes than are listed."""
    for path in (root / "shards").iterdir():
        content = path.read_bytes()
        (folder / path.name).write_bytes(content.replace(b"IHDR", b"IHDX", 1) if path.name in files else content)
    return folder


def wait_for_the_end_of_threads() -> None:
    deadline = time.monotonic() + 20
    while any(thread.name.startswith("shards") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_threads_end_with_the_epoch_even_if_somebody_keeps_its_error(root: Path, tmp_path: Path) -> None:
    """As a notebook does; the traceback has all that was at work."""
    images = train_images(damaged(root, tmp_path, "train-000002.tar"))
    with pytest.raises(ShardError) as caught:
        list(stream(images, range(NUM_TRAIN)))
    wait_for_the_end_of_threads()
    assert caught.tb is not None


def test_threads_of_a_closed_stream_wait_for_no_server(
    root: Path, server: FlakyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = train_images(f"{server.url}/shards")
    monkeypatch.setattr(fetch, "PATIENCE", Patience(attempts=9, first_delay_s=60, max_delay_s=60))
    server.faults["train-000001.tar"] = [503] * 9
    files = stream(images, range(NUM_TRAIN))
    next(files)
    while "train-000001.tar" not in server.files():
        time.sleep(0.01)
    files.close()
    wait_for_the_end_of_threads()


def test_a_failure_does_not_keep_the_workers(root: Path, tmp_path: Path) -> None:
    """What only the collector of garbage ends may be ended by a process that forked later, and wreck the queues."""
    images = train_images(damaged(root, tmp_path, "train-000002.tar"))
    gc.disable()
    try:
        failing = loader(images, num_workers=1)
        reference = weakref.ref(failing)
        try:
            list(failing)
        except ShardError:
            del failing
        assert reference() is None
    finally:
        gc.enable()


class Garbage:
    """A circle that tells which process collects it."""

    def __init__(self, file: Path) -> None:
        self.circle, self.file, self.process = self, file, os.getpid()

    def __del__(self) -> None:
        if os.getpid() != self.process:
            self.file.touch()


class CollectingTransform(EvalTransform):
    def __call__(self, images: Sequence[Picture], seeds: Sequence[int]) -> np.ndarray:
        gc.collect()
        return super().__call__(images, seeds)


def test_workers_leave_the_garbage_of_the_main_process_alone(root: Path, tmp_path: Path) -> None:
    gc.disable()
    try:
        Garbage(tmp_path / "collected")
        list(
            eval_loader(train_images(root / "shards"), CollectingTransform(PREPROCESSING), batch_size=4, num_workers=1)
        )
        assert not (tmp_path / "collected").exists()
    finally:
        gc.enable()


@pytest.fixture
def s3(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The shards in a bucket of an S3-compatible server."""
    with bucket(monkeypatch) as client:
        yield upload(client, root / "shards", "numbered")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # of moto's server
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bucket_gives_the_same_batches(num_workers: int, s3: str, root: Path) -> None:
    data = load_data(s3)
    assert data.name == "numbered"
    assert isinstance(data.train, ShardImages)
    assert data.train.image(0).size == (8, 8)
    assert_same(epoch(loader(data.train, num_workers=num_workers)), epoch(loader(train_images(root / "shards"))))
    with pytest.raises(FileNotFoundError, match=r"^s3://images/other/shards.json: missing"):
        load_data("s3://images/other")


def tiny_run(data: str, run_dir: Path) -> TrainConfig:
    return TrainConfig(
        model="sequencer2d_conv_p_patch2_16",
        model_args={"layers": [1, 1], "embed_dims": [8, 8], "hidden_sizes": [2, 2], "stem_widths": [8]},
        data=data,
        epochs=3,
        batch_size=5,
        precision="fp32",
        run_dir=str(run_dir),
        log_every=1,
    )


@pytest.mark.slow
def test_a_run_over_http_stops_and_continues_as_if_it_had_not(
    root: Path, server: FlakyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another number of workers, past a server in trouble, equal to a run on local shards."""
    straight = train(tiny_run(str(root / "shards"), tmp_path / "straight"))
    server.faults["train-000001.tar"] = [503, "reset"]
    config = tiny_run(f"{server.url}/shards", tmp_path / "stopped")
    original = SequencerTask.training_step
    counter = itertools.count()

    def training_step(self: SequencerTask, *arguments: Any) -> Any:
        if next(counter) == 5:  # the second of four batches of the second epoch
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments)

    monkeypatch.setattr(SequencerTask, "training_step", training_step)
    assert not train(config).finished
    continued = train(replace(config, num_workers=2))
    assert continued.finished
    assert straight.evaluation is not None
    assert continued.evaluation is not None
    assert straight.evaluation.loss == continued.evaluation.loss
    assert (tmp_path / "stopped" / "samples").is_dir()


@pytest.mark.slow
def test_two_processes_see_disjoint_halves(root: Path, server: FlakyServer) -> None:
    program = f"""if True:
        import sys
        from sequencer2d.data.loaders import TrainLoader
        from sequencer2d.data.shards import load_shards
        from sequencer2d.data.transforms import EvalTransform
        from sequencer2d.preprocessing import Preprocessing
        images = load_shards({server.url + "/shards"!r}, val_fraction=0.1, seed=0).train
        loader = TrainLoader(
            images, EvalTransform(Preprocessing(image_size=8)), batch_size=22, seed=0, num_workers=2,
            rank=int(sys.argv[1]), world_size=2,
        )
        print(*(images.name(i) for batch in loader for i in batch.indices))
    """
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    one, other = (process.communicate(timeout=120)[0].split() for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert len(one) == len(other) == 11
    assert not set(one) & set(other)
