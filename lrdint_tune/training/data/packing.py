"""Which rows share a sequence: a deterministic plan for one epoch."""

import zlib

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

# Streams of random numbers of one seed.
_COMPOSITION, _ORDER = 0, 1


class PackPlan:
    """Packs of one epoch; ``plan[i]`` is the int64 array of the rows in pack ``i``, in their order in the sequence.

    Held as two flat arrays (rows, and where each pack begins), 8 bytes a row.
    """

    def __init__(self, rows: IntArray, offsets: IntArray) -> None:
        self.rows, self.offsets = rows, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> IntArray:
        return self.rows[self.offsets[index] : self.offsets[index + 1]]

    def checksum(self) -> int:
        """CRC-32 of the plan: equal plans, equal numbers, on every machine."""
        return zlib.crc32(self.offsets.astype("<i8").tobytes(), zlib.crc32(self.rows.astype("<i8").tobytes()))


def pack_plan(
    lengths: npt.ArrayLike, max_seq_len: int, *, seed: int, epoch: int, shuffle: bool, packed: bool
) -> PackPlan:
    """Plan one epoch: every row is in exactly one pack, and no pack is longer than ``max_seq_len``.

    With ``packed`` the rows are placed in shuffled order, each into the open pack with the least room that still takes
    it (online best fit), otherwise into a new one. Without ``packed`` every row is a pack. Which rows share a pack
    depends on the seed only, so that all epochs have equally many packs; the order of the packs depends on seed and
    epoch. Nothing depends on the number of ranks. About a second for a million rows.

    Args:
        lengths: tokens of each row, [rows], each in 1 .. ``max_seq_len``.
        shuffle: False keeps the rows' order (packs by their first row) in every epoch.

    Raises:
        ValueError: a length outside 1 .. ``max_seq_len``.
    """
    counts = np.asarray(lengths, dtype=np.int64)
    if len(counts) and (counts.min() < 1 or counts.max() > max_seq_len):
        raise ValueError(f"row lengths must be in 1..{max_seq_len}, got {counts.min()}..{counts.max()}")
    pack_of, num_packs = np.arange(len(counts)), len(counts)
    order = pack_of
    if packed:
        if shuffle:
            order = np.random.default_rng([seed, _COMPOSITION]).permutation(len(counts))
        pack_of, num_packs = _best_fit(counts[order].tolist(), max_seq_len)
    if shuffle:
        pack_of = np.random.default_rng([seed, _ORDER, epoch]).permutation(num_packs)[pack_of]
    by_pack = np.argsort(pack_of, kind="stable")  # stable: rows keep their order inside a pack
    sizes = np.bincount(pack_of, minlength=num_packs)
    return PackPlan(order[by_pack], np.concatenate([[0], np.cumsum(sizes)]))


def _best_fit(lengths: list[int], capacity: int) -> tuple[IntArray, int]:
    """(pack of each row, number of packs).

    ``open_packs[room]`` holds the packs with exactly ``room`` tokens left, and bit ``room`` of ``rooms`` says whether
    there are any: the tightest fit for a row is the lowest set bit at or above its length.
    """
    open_packs: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    pack_of = np.empty(len(lengths), dtype=np.int64)
    num_packs = 0
    for row, length in enumerate(lengths):
        fits = rooms >> length
        if fits:
            room = length + (fits & -fits).bit_length() - 1
            pack = open_packs[room].pop()
            if not open_packs[room]:
                rooms ^= 1 << room
        else:
            room, pack = capacity, num_packs
            num_packs += 1
        room -= length
        if room:
            if not open_packs[room]:
                rooms |= 1 << room
            open_packs[room].append(pack)
        pack_of[row] = pack
    return pack_of, num_packs
