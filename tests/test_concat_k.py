"""concat_k: bits of what is only copied, from and to any strides."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batches import EVERYWHERE, random_bytes, same_bits
from pcp_mla import concat_k

everywhere = pytest.mark.parametrize(("device", "backend"), EVERYWHERE)


@everywhere
@given(
    st.sampled_from([torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float64]),
    st.integers(0, 40),
    st.integers(1, 5),
    st.sampled_from([(128, 64), (5, 3), (64, 8), (192, 64)]),
    st.booleans(),
    st.integers(0, 2**31),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
def test_random_concats(device, backend, dtype, tokens, heads, widths, gaps, seed):
    generator = torch.Generator().manual_seed(seed)
    nope, rope = widths
    k_nope = random_bytes((tokens, heads, nope + 128 * gaps), dtype, device, generator)[..., :nope]
    k_pe = random_bytes((tokens, rope + 512 * gaps), dtype, device, generator)[:, -rope:]
    bits = [x.contiguous().view(torch.uint8) for x in (k_nope, k_pe[:, None].expand(tokens, heads, rope))]
    wanted = torch.cat(bits, dim=2).view(dtype)
    assert same_bits(concat_k(k_nope, k_pe, backend=backend), wanted)
    whole = random_bytes((tokens + 1, heads + 1, nope + rope), dtype, device, generator)
    before = whole.view(torch.uint8).clone()
    out = whole[1:, 1:]
    assert concat_k(k_nope, k_pe[:, None], out=out, backend=backend) is out
    assert same_bits(out.contiguous(), wanted)
    assert torch.equal(whole.view(torch.uint8)[0], before[0])
    assert torch.equal(whole.view(torch.uint8)[:, 0], before[:, 0])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((3, torch.zeros(5, 8)), TypeError, "k_nope must be a torch.Tensor, got int"),
        ((torch.zeros(5, 2, 16), torch.zeros(4, 8)), ValueError, "k_pe must have shape"),
        ((torch.zeros(5, 2, 16), torch.zeros(5, 8).half()), TypeError, "k_pe must be float32 as k_nope, got float16"),
        ((torch.zeros(5, 2, 16), torch.zeros(5, 0)), ValueError, "k_nope and k_pe must have heads and widths"),
        ((torch.zeros(5, 16, 2).mT, torch.zeros(5, 8)), ValueError, "k_nope must have a contiguous last dimension"),
        ((torch.zeros(5, 2, 16).to(torch.complex128), torch.zeros(5, 8).to(torch.complex128)), TypeError, "at most 8 bytes"),
    ],
)
def test_concat_errors(arguments, error, words):
    with pytest.raises(error, match=words):
        concat_k(*arguments)


def test_concat_results_must_fit():
    k_nope, k_pe = torch.zeros(5, 2, 16), torch.zeros(5, 8)
    for out, words in ((torch.zeros(6, 2, 24), "out must have 5 rows, got 6"), (torch.zeros(5, 2, 23), "out must have shape")):
        with pytest.raises(ValueError, match=words):
            concat_k(k_nope, k_pe, out=out)
