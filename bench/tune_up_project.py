"""python -m bench.tune_up_project [FILE]: times tiles of kv_up_project's Triton kernel on this GPU and writes the best of each
class of shapes to FILE (python/pcp_mla/data/kv_up_project.json), where calls find them: nothing is tuned in a caller's process."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch

from pcp_mla.pipeline import MLADims
from pcp_mla.triton.kv_up_project import DEFAULT, kv_up_project, shape_class

from . import timing

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


def best(tokens: int, dtype: torch.dtype) -> tuple[dict[str, int], float]:
    """The fastest configuration at DIMS and its time in microseconds."""
    latents = torch.randn(2 * tokens, DIMS.latent_dim, device="cuda").to(dtype)
    rows = torch.randperm(2 * tokens, device="cuda")[:tokens].int()
    weight = torch.randn(DIMS.num_heads * DIMS.expanded_dim, DIMS.kv_lora_rank, device="cuda").to(dtype)
    k = torch.empty(tokens, DIMS.num_heads, DIMS.qk_head_dim, dtype=dtype, device="cuda")
    v = torch.empty(tokens, DIMS.num_heads, DIMS.v_head_dim, dtype=dtype, device="cuda")
    times = []
    for config in candidates(dtype.itemsize):
        try:
            time = timing.gpu_us(lambda config=config: kv_up_project(latents, rows, weight, k, v, config), 7)
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
