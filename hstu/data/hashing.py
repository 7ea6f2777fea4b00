"""A hash of ids that is the same on every machine and in every release. numpy only; docs/data.md repeats the rule.

Legend: n ids.
"""

from __future__ import annotations

import numpy as np

from hstu.data.order import mix64

_WORD_BYTES = 8


def hash_texts(joined: bytes, lengths: np.ndarray) -> np.ndarray:
    """[n] uint64 hash of n texts.

    h is the number of bytes; then, for each 8-byte little-endian word w of the text padded with zero bytes to whole
    words, ``h = mix(h ^ w)``, mix being splitmix64 (:func:`hstu.data.order.mix64`). A text without bytes has h = 0.

    Args:
        joined: UTF-8, the texts one after the other.
        lengths: [n] integer, bytes of each.
    """
    lengths = np.asarray(lengths, np.int64)
    words = -(-lengths // _WORD_BYTES)
    starts = np.cumsum(words) - words
    padded = np.zeros(int(words.sum()) * _WORD_BYTES, np.uint8)
    shift = starts * _WORD_BYTES - (np.cumsum(lengths) - lengths)
    padded[np.arange(len(joined)) + np.repeat(shift, lengths)] = np.frombuffer(joined, np.uint8)
    values = padded.view("<u8")
    found = lengths.astype(np.uint64)
    left = np.flatnonzero(words > 0)
    for k in range(int(words.max(initial=0))):
        left = left[words[left] > k]
        found[left] = mix64(found[left] ^ values[starts[left] + k])
    return found


def hash_ids(ids: np.ndarray) -> np.ndarray:
    """[n] uint64 hash of raw ids as text: an integer as its decimal digits, so that 7 and "7" agree."""
    texts = [str(i).encode() for i in np.asarray(ids).tolist()]
    return hash_texts(b"".join(texts), np.array([len(t) for t in texts], np.int64))


def hash_codes(values: np.ndarray, rows: int) -> np.ndarray:
    """int32 codes 1..rows of ``values``, text or integers, by :func:`hash_ids`; 0 for an empty text.

    Raises ValueError for other numbers, whose text is not theirs alone.
    """
    if values.dtype.kind not in "Uiu":
        raise ValueError(f"values of type {values.dtype} cannot be hashed: expected text or integers")
    codes = (hash_ids(values) % np.uint64(rows)).astype(np.int32) + 1
    return np.where(values == "", 0, codes).astype(np.int32) if values.dtype.kind == "U" else codes


def shards_of(hashes: np.ndarray, num_shards: int) -> np.ndarray:
    """[n] int64 shard of each id: its hash modulo the number of shards."""
    return (hashes % np.uint64(num_shards)).astype(np.int64)
