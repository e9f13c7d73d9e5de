"""Shards as a stream: which image comes when is arithmetic on their numbers; bytes follow, read ahead in threads.

The order is a function of (seed, epoch, rank), so it can be continued anywhere: shards whose images have all been
seen are not read again.
"""

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from threading import Event

import numpy as np

from sequencer2d.data.shards import ShardImages

SHARDS_AHEAD = 2
"""Read before they are needed; each is held in memory whole."""


def shuffled(
    images: ShardImages, *, seed: int, epoch: int, rank: int, run: tuple[int, int], buffer_size: int
) -> list[tuple[int, int]]:
    """One rank's images of an epoch in their order, each with the seed of its augmentation.

    The shards are put into a random order, the images within each as well. Each rank takes a run of that row; a
    shard at a border is read by both neighbours. The run passes a buffer, out of which a random image makes room for
    the next.

    Args:
        images: Of all ranks.
        seed: Of the run.
        epoch: From 0.
        rank: From 0.
        run: Start and end of its run.
        buffer_size: Images in the buffer.
    """
    common = np.random.default_rng([seed, epoch])
    shard_rank = common.permutation(len(images.shards))  # of each shard, its place in the row
    within = common.permutation(len(images))
    seeds = common.integers(2**32, size=len(images))
    row = np.lexsort((within, shard_rank[images.shard_numbers]))
    mine = row[slice(*run)].tolist()

    own = np.random.default_rng([seed, epoch, rank])
    buffer, rest = mine[:buffer_size], mine[buffer_size:]
    order = []
    for place, index in zip(own.integers(max(1, len(buffer)), size=len(rest)).tolist(), rest, strict=True):
        order.append(buffer[place])
        buffer[place] = index
    order += [buffer[place] for place in own.permutation(len(buffer))]
    return [(index, int(seeds[index])) for index in order]


def stream(images: ShardImages, indices: Sequence[int]) -> Generator[bytes, None, None]:
    """The bytes of the images at these indices, in their order. Every shard is read at most once, as a whole.

    An image waits in memory from the reading of its shard until its turn.

    Args:
        images: What the indices count.
        indices: No index twice.

    Raises:
        ShardError: A shard is damaged.
        OSError, ImportError: It cannot be read.
    """
    of_shard: dict[int, list[int]] = {}
    for index, number in zip(indices, images.shard_numbers[np.asarray(indices, dtype=np.int64)].tolist(), strict=True):
        of_shard.setdefault(number, []).append(index)
    coming = iter(list(of_shard))
    stop = Event()
    threads = ThreadPoolExecutor(SHARDS_AHEAD, thread_name_prefix="shards")
    try:
        reading = deque(
            (number, threads.submit(images.read_shard, number, stop)) for number in islice(coming, SHARDS_AHEAD)
        )
        held: dict[int, bytes] = {}
        for index in indices:
            while index not in held:
                number, future = reading.popleft()
                try:
                    content = future.result()
                finally:
                    del future  # its exception has this frame: a circle, which would keep a loader's workers alive
                for other in of_shard.pop(number):
                    start = images.offsets[other]
                    held[other] = content[start : start + images.sizes[other]]
                for following in islice(coming, 1):
                    reading.append((following, threads.submit(images.read_shard, following, stop)))
            yield held.pop(index)
    finally:
        stop.set()
        threads.shutdown(wait=False, cancel_futures=True)
