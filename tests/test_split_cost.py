"""The cost model that shares a layer out by tokens or by heads."""

import itertools
import math

import numpy as np
import pytest

from pcp_mla import MLADims
from pcp_mla.plan.split_cost import NETWORK, NODE, Rates, Wire, Work, attention_pairs, over_nodes, rates_of, split_seconds

H100 = rates_of("NVIDIA H100 80GB HBM3")


def dims(heads):
    return MLADims(heads, 128, 64, 128, 512)


def work(new, context, world):
    return Work(new + context, -(-new // world), attention_pairs(np.array([new]), np.array([context])))


def gain(new, context, heads, world, rates=H100, way="peers"):
    """Microseconds that heads save."""
    by_tokens, by_heads = split_seconds(rates, dims(heads), work(new, context, world), world, 2, getattr(rates, way))
    return 1e6 * (by_tokens - by_heads)


def test_by_hand():
    """32768 new tokens, 16 heads, P = 8: a GEMM of 4096 x 512 for each key, of which a rank keeps an eighth, and 4096 rows of 14
    heads' queries and outputs."""
    up = 2 * 32768 * 16 * 256 * 512 / 640e12
    sent = 4096 * 14 * 320 * 2 / 370e9
    assert gain(32768, 0, 16, 8) == pytest.approx(1e6 * (up * 7 / 8 - sent - 2 * 7e-6))
    attention = 2 * (32768 * 32769 / 2) * 16 / 8 * 320 / 750e12
    by_tokens, by_heads = split_seconds(H100, dims(16), work(32768, 0, 8), 8, 2, Wire(7e-6, 370e9))
    assert by_tokens == pytest.approx(up + attention)
    assert by_heads == pytest.approx(up / 8 + attention + sent + 14e-6)


def test_pairs():
    queries, contexts = np.array([3, 0, 1], np.int32), np.array([2, 9, 7], np.int32)
    assert attention_pairs(queries, contexts) == (3 + 4 + 5) + 8
    assert attention_pairs(np.array([2**30], np.int32), np.array([2**30], np.int32)) == pytest.approx(1.5 * 2**60)
    assert attention_pairs(np.empty(0, np.int32), np.empty(0, np.int32)) == 0


def test_where_heads_begin_to_pay():
    """Points of docs/scaling.md: with no context, tokens below; behind a long one, heads."""
    assert gain(5150, 0, 16, 8) < 0 < gain(5200, 0, 16, 8)
    assert gain(640, 0, 128, 8) < 0 < gain(655, 0, 128, 8)
    assert gain(8192, 13350, 16, 2) < 0 < gain(8192, 13400, 16, 2)
    assert gain(8192, 120 * 1024, 16, 8) > 650
    assert gain(8192, 39700, 16, 2, way="collective") < 0 < gain(8192, 39900, 16, 2, way="collective")
    assert gain(2**20, 0, 16, 8, way="collective") < 0


def test_more_context_more_heads_more_tokens():
    for heads, world in itertools.product((16, 128), (2, 4, 8, 16)):
        for new in (1024, 8192, 32768):
            assert all(a < b for a, b in itertools.pairwise(gain(new, c, heads, world) for c in (0, 1024, 8192, 65536, 131072)))
    for world in (2, 8):
        assert all(a < b for a, b in itertools.pairwise(gain(8192, 65536, heads, world) for heads in (16, 32, 64, 128)))
        gains = [gain(new, 0, 16, world) for new in (4096, 8192, 16384, 32768)]
        assert gains == sorted(gains, reverse=gains[-1] < gains[0])
    by_world = [gain(32768, 0, 16, world) for world in (2, 4, 8, 16)]
    assert by_world == sorted(by_world)


def test_a_faster_wire_is_for_heads_and_a_faster_gemm_for_tokens():
    base = gain(8192, 8192, 16, 8)
    assert gain(8192, 8192, 16, 8, H100._replace(peers=Wire(7e-6, 740e9))) > base
    assert gain(8192, 8192, 16, 8, H100._replace(gemm=2 * H100.gemm)) < base
    assert gain(8192, 8192, 16, 8, H100._replace(peers=Wire(10e-6, 370e9))) == pytest.approx(base - 6)


def test_heads_that_do_not_share_out_evenly():
    """The rank with one more computes more attention than by tokens; long rows are not for that."""
    assert gain(131072, 0, 16, 8) > 0 > gain(131072, 0, 17, 8)
    assert gain(1024, 131072, 17, 4) > 0
    assert split_seconds(H100, dims(5), work(4096, 0, 8), 8, 2, H100.peers)[1] == math.inf


def test_beyond_a_node():
    """Of 15 other ranks 8 are in the other node. Many queries for few keys do not pay over the network."""
    near = H100.collective
    far = over_nodes(near, 16)
    assert over_nodes(near, NODE) == near
    assert far.launch == near.launch
    assert 15 / far.rate == pytest.approx(7 / near.rate + 8 / NETWORK)
    rates = H100._replace(collective=far)
    assert gain(32768, 0, 16, 16, rates, "collective") < 0 < gain(32768, 0, 16, 16, H100, "collective")
    assert gain(8192, 57344, 16, 16, rates, "collective") > 200


@pytest.mark.parametrize("name", ["NVIDIA H100 PCIe", "NVIDIA H200", "NVIDIA A100-SXM4-40GB", ""])
def test_rates_of_kinds(name):
    rates = rates_of(name)
    assert isinstance(rates, Rates)
    assert all(1e-6 < wire.launch < 1e-3 and 1e10 < wire.rate < 1e12 for wire in rates[2:])
    assert all(1e13 < rate < 1e16 for rate in rates[:2])
    assert (rates.peers.rate < H100.peers.rate) == (name != "NVIDIA H200")
