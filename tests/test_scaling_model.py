"""The parts of a step by hand: rings, buckets, overlap, and the slowest of n ranks."""

from dataclasses import replace

import numpy as np
import pytest

from workbench import WorkbenchError
from workbench.analysis.scaling_model import FABRICS, LIMIT, Exchange, Fabric, StepModel, expected_maximum, find_fabric

FABRIC = Fabric(4, latency_within=1e-6, latency_between=1e-5, bandwidth_within=1e10, bandwidth_between=1e9)
EXCHANGE = Exchange(gradient_bytes=8e6, fabric=FABRIC, cycle=0)


def test_the_slowest_of_n_ranks():
    # Known values for 2, 3 and 5: 1/sqrt(pi), 3/(2 sqrt(pi)), 1.16296.
    told = expected_maximum([1, 2, 3, 5])
    np.testing.assert_allclose(told, [0, 1 / np.sqrt(np.pi), 1.5 / np.sqrt(np.pi), 1.16296], atol=1e-5)
    drawn = np.random.default_rng(0).standard_normal((4000, 64)).max(axis=1)
    assert expected_maximum([64])[0] == pytest.approx(drawn.mean(), abs=4 * drawn.std() / np.sqrt(4000))
    every = expected_maximum(np.arange(1, LIMIT + 1))
    assert (np.diff(every) > 0).all()
    assert every[-1] < np.sqrt(2 * np.log(LIMIT))
    for wrong in (0, LIMIT + 1):
        with pytest.raises(WorkbenchError, match=f"`workers` is {wrong}: the model speaks of 1 to 4,096"):
            expected_maximum([1, wrong])


def test_a_ring_by_hand():
    # Six messages of 2 MB within the node; fourteen of 1 MB at the pace of the link between nodes.
    by_hand = [0, 2 * (1e-6 + 4e-4), 6 * (1e-6 + 2e-4), 14 * (1e-5 + 1e-3)]
    np.testing.assert_allclose(EXCHANGE.bucket_seconds([1, 2, 4, 8]), by_hand)


def test_a_hierarchical_all_reduce_by_hand():
    nested = replace(EXCHANGE, algorithm="hierarchical")
    within, between = 6 * (1e-6 + 2e-4), 2 * (1e-5 + 4e-3)
    np.testing.assert_allclose(nested.bucket_seconds([4, 8]), [within, within + between])
    # What it is for: with many workers a ring's latencies add up.
    assert nested.bucket_seconds([4096]) < 0.5 * EXCHANGE.bucket_seconds([4096])


def test_fp16_halves_what_travels_and_buckets_are_as_few_as_fit():
    assert replace(EXCHANGE, compression="fp16").bucket_seconds([2])[0] == pytest.approx(2 * (1e-6 + 2e-4))
    assert [replace(EXCHANGE, fusion_bytes=size).buckets for size in (8e6, 7e6, 1e6)] == [1, 2, 8]
    assert replace(EXCHANGE, fusion_bytes=4e6, compression="fp16").buckets == 1
    # Every bucket pays the latencies and the wait for the next cycle.
    many = replace(EXCHANGE, fusion_bytes=1e6, cycle=1e-3)
    assert many.exposed([2], 0)[0] == pytest.approx(8 * (2 * (1e-6 + 5e-5) + 5e-4))


def test_computing_hides_all_but_the_last_bucket():
    buckets = replace(EXCHANGE, fusion_bytes=2e6, overlap=0.5)
    one = buckets.bucket_seconds([4])[0]
    assert buckets.exposed([4], 0)[0] == pytest.approx(4 * one)
    assert buckets.exposed([4], 2 * one)[0] == pytest.approx(3 * one)
    assert buckets.exposed([4], 100 * one)[0] == pytest.approx(one)
    assert buckets.exposed([1], 0)[0] == 0


def test_a_step_by_hand():
    model = StepModel(0.01, 0.1, 10, EXCHANGE, overhead=0.05, input_per_image=0.005)
    exchange = EXCHANGE.bucket_seconds([2])[0]
    assert model.seconds([1, 2]).tolist() == pytest.approx([0.2, 0.2 + 0.02 / np.sqrt(np.pi) + exchange])
    assert model.seconds([1], 20)[0] == pytest.approx(0.35)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithm": "tree"}, "no all-reduce `tree`: choose one of ring, hierarchical"),
        ({"compression": "int8"}, "no compression `int8`"),
        ({"overlap": 1.2}, "`overlap` is 1.2"),
        ({"gradient_bytes": 0}, "`gradient_bytes` is 0"),
        ({"cycle": float("nan")}, "`cycle` is nan"),
    ],
)
def test_impossible_exchanges_are_refused(change, message):
    with pytest.raises(WorkbenchError, match=message):
        replace(EXCHANGE, **change)


def test_impossible_fabrics_are_refused():
    with pytest.raises(WorkbenchError, match="`bandwidth_between` of a fabric is -1"):
        replace(FABRIC, bandwidth_between=-1)
    assert find_fabric("shared memory") is FABRICS["shared memory"]
    with pytest.raises(WorkbenchError, match="no fabric `string`: choose one of shared memory; 4 V100"):
        find_fabric("string")
