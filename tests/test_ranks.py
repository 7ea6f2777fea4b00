"""The ranks that other tests run on."""

import os

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks


def sum_of_ranks(start: int) -> tuple[int, float, int]:
    total = torch.tensor(float(start + dist.get_rank()))
    dist.all_reduce(total)
    return dist.get_rank(), float(total), os.getpid()


def fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("not today")


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_rank_answers(num_ranks):
    results = run_ranks(num_ranks, sum_of_ranks, 10)
    assert [r for r, _, _ in results] == list(range(num_ranks))
    assert {total for _, total, _ in results} == {10.0 * num_ranks + num_ranks * (num_ranks - 1) / 2}


def test_processes_serve_again():
    assert [p for *_, p in run_ranks(2, sum_of_ranks, 0)] == [p for *_, p in run_ranks(2, sum_of_ranks, 1)]


def test_a_failure_is_told_with_its_rank_and_the_next_call_works():
    with pytest.raises(AssertionError, match=r"(?s)rank 1 failed.*not today"):
        run_ranks(2, fail_on_one)
    assert run_ranks(2, sum_of_ranks, 0)[1][1] == 1.0
