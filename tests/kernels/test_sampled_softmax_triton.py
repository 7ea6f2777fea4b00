"""The Triton path of sampled_softmax: under the interpreter on the CPU, compiled on CUDA."""

import pytest
import torch

from kernels._backend import set_backend
from kernels._philox import uniform_ids
from kernels.sampled_softmax import bank_softmax, sampled_softmax
from kernels.sampled_softmax.cpu import draw_negatives
from kernels.sampled_softmax.reference import bank_softmax_reference, sampled_softmax_reference
from tests.kernels.test_sampled_softmax import make, make_bank
from tests.oracle import compare

pytest.importorskip("triton")

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def triton_backend(auto_backend):
    set_backend("triton")


CASES = [
    pytest.param(17, 19, 10, 7, id="L17-V19-D10-R7"),
    pytest.param(1, 3, 8, 1, id="one-position"),
    pytest.param(13, 61, 25, 17, id="one-past-the-block-D25"),
    pytest.param(11, 5, 50, 32, id="many-collisions-D50"),
    pytest.param(5, 3_001, 100, 16, id="large-table-D100"),
    pytest.param(5, 1, 16, 5, id="one-item"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length, num_items, dim, negatives", CASES)
def test_matches_reference(length, num_items, dim, negatives, dtype):
    x = make(length, num_items, dim, negatives, dtype)
    vacuous = ("output 0", "gradient of queries", "gradient of table") if num_items == 1 else ()
    compare(sampled_softmax, sampled_softmax_reference, x, vacuous)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "atomics"])
def test_options_match_reference(normalize, deterministic):
    x = make(19, 40, 12, 9)
    x["table"][5] *= 1e-3  # below eps
    x["queries"][3] *= 1e-3
    g = torch.Generator().manual_seed(9)
    offsets = {"log_q": torch.randn(41, generator=g), "label_log_q": torch.randn(19, generator=g)}
    kwargs = {"temperature": 0.7, "l2_normalize": normalize, "eps": 0.5, **offsets}
    reference = lambda **i: sampled_softmax_reference(**i, **kwargs)  # noqa: E731
    compare(lambda **i: sampled_softmax(**i, **kwargs, deterministic=deterministic), reference, x)


def test_strided_views_and_int32_ids():
    x = make(17, 23, 24, 11, ids=torch.int32)
    g = torch.Generator().manual_seed(5)
    x["queries"] = torch.randn(17, 72, generator=g)[:, 24:48]
    x["table"] = torch.randn(24, 40, generator=g)[:, 8:32]
    x["negatives"] = x["negatives"].T.contiguous().T
    x["labels"] = x["labels"].repeat_interleave(2)[::2]
    compare(sampled_softmax, sampled_softmax_reference, x)
    x["queries"] = torch.randn(17, 48, generator=g)[:, ::2]
    x["table"] = torch.randn(24, 24, generator=g).T
    compare(sampled_softmax, sampled_softmax_reference, x)


@pytest.mark.parametrize("num_negatives", [1, 6, 16, 37])
@pytest.mark.parametrize("seed", [0, 1, 2**62 + 12_345])
def test_the_kernel_draws_what_torch_draws(num_negatives, seed):
    x = make(9, 30, 8, 1)
    negatives = draw_negatives(9, num_negatives, 30, seed, CPU)
    assert torch.equal(negatives, uniform_ids(9, num_negatives, 30, seed, CPU))
    given = sampled_softmax(x["queries"], x["table"], x["labels"], negatives)
    drawn = sampled_softmax(x["queries"], x["table"], x["labels"], num_negatives=num_negatives, seed=seed)
    assert torch.equal(given, drawn)


# A shared bank

BANK_CASES = [
    pytest.param(19, 17, 10, 23, id="collisions-D10"),
    pytest.param(2, 50, 25, 131, id="items-in-many-parts-D25"),
    pytest.param(41, 60, 50, 1, id="bank-of-one-D50"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("corrected", [True, False], ids=["logq", "plain"])
@pytest.mark.parametrize("length, num_items, dim, size", BANK_CASES)
def test_bank_matches_reference(length, num_items, dim, size, corrected, dtype):
    x, log_q, label_log_q = make_bank(length, num_items, dim, size, dtype)
    kwargs = {"log_q": log_q, "label_log_q": label_log_q} if corrected else {}
    compare(lambda **i: bank_softmax(**i, **kwargs), lambda **i: bank_softmax_reference(**i, **kwargs), x)
