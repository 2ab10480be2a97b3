"""python installed.py LIBRARY ...: looks whether these libraries of the installed package are loaded, and makes a few calls."""

import sys
from pathlib import Path

import torch

import pcp_mla
from pcp_mla.ops import native

assert (Path(pcp_mla.__file__).parents[1] / f"pcp_mla-{pcp_mla.__version__}.dist-info").is_dir(), pcp_mla.__file__
for name in sys.argv[1:]:
    assert native.status[name] == "", native.status

meta = pcp_mla.PCPMetadata.build([9, 4], world_size=2, rank=0)
q, kv = torch.randn(meta.num_tokens, 2, 8), torch.randn(meta.num_kv_tokens, 2, 8)
rows = pcp_mla.pcp_fused_gather(q, kv, kv, meta)
assert torch.equal(rows.k_tail, kv[meta.kv_tail_indices])
assert torch.equal(pcp_mla.pcp_fused_restore(rows.q_head, rows.q_tail, None, None, meta)[0], q)
assert pcp_mla.PCPPlanner(2, 9, 2, 0).plan([4]).positions.tolist() == [0, 3]
if "_native" in sys.argv[1:]:
    again = pcp_mla.pcp_fused_gather(q, kv, kv, meta, backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(rows[:6], again[:6], strict=True))
