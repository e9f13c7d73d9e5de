"""Near duplicates: pictures that look the same although their pixels differ, by re-encoding or a slight resize.

How good it is, counted on real pictures that were looked at. Of 2,000 images of Tiny-ImageNet, copies that were
encoded again (quality 85, 50), scaled (0.5, 0.9, 1.25) or both were found in at least 99.9 % of cases; of 63
photographs of ImageNet all that were encoded again, halved, or squeezed to a square; cropped by a twentieth, half.
Found were no different pictures among 25,000 of Tiny-ImageNet, not even at twice the limits below; and 39 pairs among
55,000 of CIFAR-10, on which the limits were chosen: one of them shows two aeroplanes at one place, a few may be two
pictures of one car, the others are the same picture. Drawings of a few strokes are another matter: of scikit-learn's
1,797 digits of 8×8 pixels, it takes four pairs of ones for copies, none of which is.

Two stages. Signs of the lowest frequencies of a 16×16 thumbnail make a hash, of which many small parts are looked up,
so that no more than the pictures that agree in one part are compared at all. Of those the thumbnails decide.

Shape legend: `N` pictures, `G` = 16 sides of the grey thumbnail, `P` pairs.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from PIL import Image
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

GREY_SIDE, COLOUR_SIDE = 16, 4
THUMBNAIL_BYTES = GREY_SIDE**2 + 3 * COLOUR_SIDE**2

MAX_DIFFERENCE = 8.0
"""Mean absolute difference of two grey thumbnails, and of two colour thumbnails, in levels of 255."""
MAX_RELATIVE_DIFFERENCE = 0.25
"""The same difference as a share of the contrast of the flatter one: what is faint must agree the better."""
MIN_CONTRAST = 4.0
"""Mean absolute deviation of a grey thumbnail from its mean; flatter pictures have nothing to compare."""

HASH_BITS = 64
PARTS, PART_BITS = 48, 16
"""Random parts of the hash that are looked up: where 8 of its 64 bits differ, one part agrees in 99 % of cases."""
MAX_HASH_DISTANCE = 20
"""Bits; a first sieve before the thumbnails are compared."""
MAX_NEIGHBOURS = 100
"""Of one part, how many pictures one is compared with: a film of one scene must not cost its length squared."""


@dataclass(frozen=True, kw_only=True)
class NearGroup:
    """Pictures that are near duplicates of one another, directly or through others of the group."""

    members: tuple[int, ...]
    difference: float
    """Largest mean absolute difference that joins two of them, in levels of 255."""


def thumbnail(image: Image.Image) -> bytes:
    """`THUMBNAIL_BYTES` bytes: 16×16 grey levels, then 4×4 colours. The image is RGB."""
    small = np.asarray(image.resize((GREY_SIDE, GREY_SIDE), Image.Resampling.BOX), dtype=np.float32)
    cell = GREY_SIDE // COLOUR_SIDE
    colours = small.reshape(COLOUR_SIDE, cell, COLOUR_SIDE, cell, 3).mean((1, 3))
    return np.rint(np.concatenate([small.mean(2).ravel(), colours.ravel()])).astype(np.uint8).tobytes()


def near_duplicates(thumbnails: UInt8[np.ndarray, "N 304"]) -> list[NearGroup]:
    """Groups of pictures whose thumbnails are alike within the limits above.

    Found are, of pictures with some contrast, nearly all copies that were encoded again, or resized without being
    cropped. Not found are mirrored, turned, cropped and recoloured ones. Pictures with the same thumbnail are near
    duplicates, too, so leave out all but one of those with the same pixels. Time grows about as `N`: 100,000 take
    seconds.

    Returns:
        Groups in the order of their first members; members are ascending indices.
    """
    contrasts = contrast(thumbnails)
    candidates = np.flatnonzero(contrasts >= MIN_CONTRAST)
    if not len(candidates):
        return []
    grey = thumbnails[candidates, : GREY_SIDE**2].astype(np.float32)
    bits = _hash_bits(grey.reshape(-1, GREY_SIDE, GREY_SIDE))
    hashes = _packed(bits, np.uint64)
    chooser = np.random.RandomState(0)
    group_of = np.arange(len(thumbnails))
    lefts, rights, differences = [], [], []
    for _ in range(PARTS):
        part = _packed(bits[:, chooser.permutation(HASH_BITS)[:PART_BITS]], np.uint16)
        left, right = (candidates[side] for side in _agreeing_pairs(part, hashes))
        new = group_of[left] != group_of[right]
        left, right = left[new], right[new]
        alike, difference = _are_alike(thumbnails, contrasts, left, right)
        lefts.append(left[alike])
        rights.append(right[alike])
        differences.append(difference[alike])
        group_of = _groups(np.concatenate(lefts), np.concatenate(rights), len(thumbnails))
    return _listed(group_of, np.concatenate(lefts), np.concatenate(differences))


def contrast(thumbnails: UInt8[np.ndarray, "N 304"]) -> Float[np.ndarray, "N"]:
    """Mean absolute deviation of each grey thumbnail from its mean."""
    grey = thumbnails[:, : GREY_SIDE**2].astype(np.float32)
    return np.abs(grey - grey.mean(1, keepdims=True)).mean(1)


def _hash_bits(grey: Float[np.ndarray, "N G G"]) -> Bool[np.ndarray, "N 64"]:
    """Signs of the 64 lowest frequencies of a cosine transform; the mean is none of them."""
    frequencies = np.add.outer(np.arange(GREY_SIDE), np.arange(GREY_SIDE)).ravel()
    lowest = np.argsort(frequencies, kind="stable")[1 : HASH_BITS + 1]
    return np.asarray(dctn(grey, axes=(1, 2))).reshape(len(grey), -1)[:, lowest] > 0


def _packed(bits: Bool[np.ndarray, "N K"], word: type[np.unsignedinteger]) -> Shaped[np.ndarray, "N"]:
    """Each row as one number."""
    return np.ascontiguousarray(np.packbits(bits, axis=1)).view(word).ravel()


def _agreeing_pairs(
    part: Shaped[np.ndarray, "N"], hashes: Shaped[np.ndarray, "N"]
) -> tuple[Int[np.ndarray, "P"], Int[np.ndarray, "P"]]:
    """Pairs that agree in this part of the hash and differ little in the whole."""
    order = np.lexsort((hashes, part))
    part, hashes = part[order], hashes[order]
    first = np.arange(len(order))
    pairs = [np.empty((2, 0), dtype=np.int64)]
    for step in range(1, MAX_NEIGHBOURS + 1):
        first = first[first < len(order) - step]
        first = first[part[first] == part[first + step]]
        if not len(first):
            break
        near = first[_bit_count(hashes[first] ^ hashes[first + step]) <= MAX_HASH_DISTANCE]
        pairs.append(np.stack([order[near], order[near + step]]))
    left, right = np.concatenate(pairs, axis=1)
    return left, right


def _bit_count(words: Shaped[np.ndarray, "P"]) -> Int[np.ndarray, "P"]:
    """Ones in each 64-bit word. (NumPy has `bitwise_count` from 2.0 on.)"""
    return _ONES[words.view(np.uint16).reshape(-1, 4)].sum(1)


_ONES = np.unpackbits(np.arange(2**16, dtype=np.uint16).view(np.uint8).reshape(-1, 2), axis=1).sum(1, dtype=np.int64)


def _are_alike(
    thumbnails: UInt8[np.ndarray, "N 304"],
    contrasts: Float[np.ndarray, "N"],
    left: Int[np.ndarray, "P"],
    right: Int[np.ndarray, "P"],
    block: int = 50_000,
) -> tuple[Bool[np.ndarray, "P"], Float[np.ndarray, "P"]]:
    """Which pairs of thumbnails are within the limits, and their differences; in blocks, which bounds the memory."""
    difference = np.empty(len(left), dtype=np.float32)
    for start in range(0, len(left), block):
        rows = slice(start, start + block)
        levels = np.abs(thumbnails[left[rows]].astype(np.int16) - thumbnails[right[rows]])
        grey, colour = levels[:, : GREY_SIDE**2].mean(1), levels[:, GREY_SIDE**2 :].mean(1)
        difference[rows] = np.maximum(grey, colour)
    limit = np.minimum(MAX_DIFFERENCE, MAX_RELATIVE_DIFFERENCE * np.minimum(contrasts[left], contrasts[right]))
    return difference <= limit, difference


def _groups(left: Int[np.ndarray, "P"], right: Int[np.ndarray, "P"], count: int) -> Int[np.ndarray, "N"]:
    """Number of each picture's group when pairs are joined."""
    graph = coo_array((np.ones(len(left), dtype=bool), (left, right)), shape=(count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def _listed(
    group_of: Int[np.ndarray, "N"], left: Int[np.ndarray, "P"], difference: Float[np.ndarray, "P"]
) -> list[NearGroup]:
    largest = np.zeros(len(group_of))
    np.maximum.at(largest, group_of[left], difference)
    order = np.argsort(group_of, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(group_of[order])) + 1)
    return [
        NearGroup(members=tuple(found.tolist()), difference=float(largest[group_of[found[0]]]))
        for found in sorted(members, key=lambda found: int(found[0]) if len(found) else 0)
        if len(found) > 1
    ]
