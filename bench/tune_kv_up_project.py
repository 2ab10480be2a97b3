"""python -m bench.tune_kv_up_project [FILE]: times tiles of kv_up_project's Triton kernel on this GPU and writes the best of each
class of shapes to FILE (python/pcp_mla/data/kv_up_project.json), where calls find them: nothing is tuned in a caller's process."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pcp_mla.plan.dims import MLADims
from pcp_mla.triton.kv_up_project import DEFAULT, kv_up_project, shape_class

from . import plain, timing

FILE = Path(__file__).resolve().parent.parent / "python" / "pcp_mla" / "data" / "kv_up_project.json"
TILES = {
    2: [(64, 64, 64), (128, 64, 64), (64, 128, 64), (128, 128, 64), (128, 128, 32)],  # ROWS, COLUMNS, DEPTH
    4: [(64, 64, 32), (128, 64, 32), (64, 64, 16)],
}
SCHEDULES = [(4, 3), (8, 3)]  # num_warps, num_stages
TOKENS = (1024, 16384)
DIMS = MLADims(16, 128, 64, 128, 512)


def candidates(item: int) -> list[dict[str, int]]:
    names = ("ROWS", "COLUMNS", "DEPTH", "num_warps", "num_stages")
    pairs = itertools.product(TILES[item], SCHEDULES)
    return [DEFAULT] + [dict(zip(names, (*tile, *schedule), strict=True), GROUP=8) for tile, schedule in pairs]


def make_call(tokens: int, dtype: torch.dtype, device: str) -> Callable[[dict[str, int]], Callable[[], None]]:
    """What gives the kernel's call by a configuration, checked."""
    latents = torch.randn(2 * tokens, DIMS.latent_dim, device=device).to(dtype)
    rows = torch.randperm(2 * tokens, device=device)[:tokens].int()
    weight = torch.randn(DIMS.num_heads * DIMS.expanded_dim, DIMS.kv_lora_rank, device=device).to(dtype)
    k = torch.empty(tokens, DIMS.num_heads, DIMS.qk_head_dim, dtype=dtype, device=device)
    v = torch.empty(tokens, DIMS.num_heads, DIMS.v_head_dim, dtype=dtype, device=device)
    kv_c, k_pe = latents[rows.long()].split([DIMS.kv_lora_rank, DIMS.qk_rope_head_dim], dim=1)
    expanded = (kv_c.double() @ weight.double().T).view(tokens, DIMS.num_heads, -1)
    k_nope, wanted_v = expanded.split([DIMS.qk_nope_head_dim, DIMS.v_head_dim], dim=2)
    wanted_k = torch.cat([k_nope, k_pe[:, None].expand(-1, DIMS.num_heads, -1)], dim=2)

    def call_by(config: dict[str, int]) -> Callable[[], None]:
        def call() -> None:
            kv_up_project(latents, rows, weight, None, k, v, None, config)

        for out in (k, v):
            out.fill_(torch.nan)
        call()
        share = 2**-7 if dtype == torch.bfloat16 else 1e-5  # of float32, with no TF32 on the way
        plain.check_close(f"K by {config}", k, wanted_k, share)
        plain.check_close(f"V by {config}", v, wanted_v, share)
        return call

    return call_by


def best(tokens: int, dtype: torch.dtype) -> tuple[dict[str, int], float]:
    """The fastest configuration at DIMS and its time in microseconds."""
    call_by = make_call(tokens, dtype, "cuda")
    times = []
    for config in candidates(dtype.itemsize):
        try:
            time = timing.gpu_us(call_by(config), 7)
        except plain.WrongResultError:
            raise
        except Exception as error:  # more shared memory or registers than there are
            print(f"  {config}: {str(error).splitlines()[0][:80]}")
            continue
        times.append((time, len(times), config))
    time, _, config = min(times)
    return config, time


def main(file: Path = FILE) -> None:
    gpu = torch.cuda.get_device_name()
    gpu = gpu.split()[1] if " " in gpu else gpu  # NVIDIA H100 80GB HBM3
    tuned: dict[str, Any] = json.loads(FILE.read_text())
    for dtype in (torch.bfloat16, torch.float32):
        for tokens in TOKENS:
            config, time = best(tokens, dtype)
            shape = shape_class(tokens, DIMS.num_heads, dtype)
            tuned.setdefault(gpu, {})[shape] = config
            print(f"{gpu} {shape}: {time:.1f} us with {config}", flush=True)
    file.write_text(json.dumps(tuned, indent=1) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
