"""The Triton path of linear_cross_entropy: under the interpreter on the CPU, compiled on CUDA."""

import pytest
import torch

from kernels._backend import set_backend
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from tests.kernels.test_linear_cross_entropy import make
from tests.oracle import compare

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def triton_backend(auto_backend):
    set_backend("triton")


CASES = [
    pytest.param(37, 19, 10, id="L37-V19-D10"),
    pytest.param(1, 1, 8, id="one-position-one-item"),
    pytest.param(2, 131, 50, id="items-in-many-parts-D50"),
    pytest.param(67, 15, 25, id="one-block-of-items-D25"),
    pytest.param(16, 31, 100, id="whole-blocks-D100"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length, num_items, dim", CASES)
def test_matches_reference(length, num_items, dim, dtype):
    x = make(length, num_items, dim, dtype)
    vacuous = ("output 0", "gradient of queries", "gradient of table") if num_items == 1 else ()
    compare(linear_cross_entropy, linear_cross_entropy_reference, x, vacuous)
