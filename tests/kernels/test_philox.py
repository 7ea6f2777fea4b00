"""Philox in torch: published known answers, Triton's stream, uniform ids."""

import pytest
import torch

from kernels._philox import MASK, STREAM_NEGATIVES, philox_4x32, uniform_ids

# Random123, examples/kat_vectors, philox4x32 with 10 rounds: counter, key, answer.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, answer", KNOWN, ids=["zeros", "ones", "pi"])
def test_known_answers(counter, key, answer):
    words = philox_4x32(torch.tensor([counter[0]]), counter[1], key[1] << 32 | key[0], counter[2], counter[3])
    assert tuple(w.item() for w in words) == answer


def test_stream_of_triton():
    triton = pytest.importorskip("triton")
    import triton.language as tl

    @triton.jit
    def kernel(out, seed, N: tl.constexpr):
        at = tl.arange(0, N)
        counter = at.to(tl.int64) * 715_827_883  # past 2^32
        zero = (counter * 0).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, counter.to(tl.uint32), (counter >> 32).to(tl.uint32), zero + 1, zero)
        tl.store(out + at * 4, w0.to(tl.int64))
        tl.store(out + at * 4 + 1, w1.to(tl.int64))
        tl.store(out + at * 4 + 2, w2.to(tl.int64))
        tl.store(out + at * 4 + 3, w3.to(tl.int64))

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for seed in (0, 7, 2**40 + 5, 2**63 - 1):
        out = torch.zeros(32, 4, dtype=torch.int64, device=device)
        kernel[(1,)](out, seed, N=32)
        counter = torch.arange(32, device=device) * 715_827_883
        assert int(counter.max()) > 2**32
        words = philox_4x32(counter & MASK, counter >> 32, seed, STREAM_NEGATIVES)
        assert torch.equal(out, torch.stack(words, dim=1))


def test_ids_are_uniform_fresh_and_a_function_of_the_seed():
    device = torch.device("cpu")
    a = uniform_ids(2_000, 50, 10, 3, device)
    assert a.dtype == torch.int32 and a.shape == (2_000, 50)
    assert torch.equal(a, uniform_ids(2_000, 50, 10, 3, device))
    assert not torch.equal(a, uniform_ids(2_000, 50, 10, 4, device))
    assert not torch.equal(a[0], a[1]) and not torch.equal(a[:, 0], a[:, 1])
    counts = torch.bincount(a.flatten().long(), minlength=11)
    assert counts[0] == 0 and counts.shape == (11,)
    # 9 degrees of freedom, below the 0.9999 quantile of chi-square.
    assert ((counts[1:] - 10_000.0) ** 2 / 10_000.0).sum() < 33.7


@pytest.mark.parametrize("num_items", [1, 2, 26_744, 2**31 - 1])
def test_ids_reach_the_whole_range_and_not_beyond(num_items):
    ids = uniform_ids(5_000, 7, num_items, 2**63 - 1, torch.device("cpu")).long()
    assert ids.min() >= 1 and ids.max() <= num_items
    assert ids.min() <= 1 + num_items // 1_000 and ids.max() >= num_items - num_items // 1_000


def test_a_prefix_of_the_rows_does_not_depend_on_their_number():
    device = torch.device("cpu")
    assert torch.equal(uniform_ids(9, 6, 100, 1, device)[:4], uniform_ids(4, 6, 100, 1, device))
    assert uniform_ids(0, 6, 100, 1, device).shape == (0, 6)
