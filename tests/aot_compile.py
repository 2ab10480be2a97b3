"""Compiles every Triton kernel for sm_80 and sm_90. test_triton_aot.py runs it in a process without the interpreter."""

import inspect
import os
import subprocess
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pcp_mla.triton.attention import configuration
from pcp_mla.triton.attention_kernel import attention_kernel
from pcp_mla.triton.concat_k import concat_k_kernel
from pcp_mla.triton.fused_gather import fused_gather_kernel
from pcp_mla.triton.fused_restore import fused_restore_kernel
from pcp_mla.triton.kv_up_project import kv_up_project_kernel
from pcp_mla.triton.latent_cache import latent_cache_kernel
from pcp_mla.triton.merge_states import merge_states_kernel
from pcp_mla.triton.plan_expand import plan_expand_kernel
from pcp_mla.triton.plan_rank_rows import plan_rank_rows_kernel
from pcp_mla.triton.plan_shard_rows import plan_shard_rows_kernel

# Arguments that point to something; all others that are no constants are sizes and strides.
POINTERS = {
    fused_gather_kernel: {"data": "q k v q_head k_head v_head q_tail k_tail v_tail", "*i32": "table"},
    fused_restore_kernel: {"data": "out_head out_tail out", "*fp32": "lse_head lse_tail lse", "*i32": "table"},
    plan_expand_kernel: {
        "*i32": "table blocks local_out positions_out restore_out hidden_out kv_out",
        "*i64": "slots_out",
    },
    plan_rank_rows_kernel: {"*i32": "table out"},
    plan_shard_rows_kernel: {"*i32": "table starts blocks context_out kv_out", "*i64": "slots slots_out"},
    concat_k_kernel: {"data": "k_nope k_pe out"},
    kv_up_project_kernel: {"data": "latents weight k_out v_out k_pe_out", "*i32": "rows", "*fp32": "scale"},
    latent_cache_kernel: {"data": "cache outside", "*i64": "slots", "*i32": "block_table cu_seqlens starts"},
    merge_states_kernel: {
        "data": "a b out",
        "*fp32": "lse_a lse_b scale lse_out",
        "*i32": "row_op cu_seqlens out_rows seqused_k",
    },
}
CONSTANTS = {
    fused_gather_kernel: {"ROWS": 8, "BLOCK_Q": 1024, "BLOCK_K": 256, "BLOCK_V": 128},
    fused_restore_kernel: {"ROWS": 8, "BLOCK": 1024, "BLOCK_LSE": 16},
    plan_expand_kernel: {"HAS_BLOCKS": True, "SPLIT": True, "BLOCK": 256},
    plan_rank_rows_kernel: {"BLOCK": 256},
    plan_shard_rows_kernel: {"SPLIT": True, "BLOCK": 256},
    concat_k_kernel: {"ROWS": 8, "BLOCK": 256},
    kv_up_project_kernel: {"LISTED": True, "SCALED": False, "ROPE": 64, "ROWS": 128, "COLUMNS": 128, "DEPTH": 64, "GROUP": 8},
    latent_cache_kernel: {"WRITE": False, "TABLE": True, "STARTS": True, "ROWS": 8, "BLOCK": 1024},
    merge_states_kernel: {"BASE2": False, "HEADS": 16, "BLOCK": 128},
}
DATA = {
    fused_gather_kernel: ("*bf16", "*fp32", "*u8"),
    fused_restore_kernel: ("*bf16", "*fp32", "*u8"),
    plan_expand_kernel: ("indices",),
    plan_rank_rows_kernel: ("indices",),
    plan_shard_rows_kernel: ("indices",),
    concat_k_kernel: ("*bf16", "*u8"),
    kv_up_project_kernel: ("*bf16", "*fp32"),
    latent_cache_kernel: ("*bf16", "*u8"),
    merge_states_kernel: ("*bf16", "*fp32"),
}


def numbers_of(kernel, pointers):
    """Its sizes and strides, which are constants to Triton where they are 1."""
    names = [p.name for p in kernel.params if not p.do_not_specialize and not p.is_constexpr]
    return dict.fromkeys((name for name in names if name not in pointers), 1)


def compile_for(capability, kernel, types, ones=False, changes=None):
    """Size of the binary, of a kernel whose pointers have these types; ``ones``: all sizes and strides are 1; ``changes`` of its
    constants.

    It must be for this GPU, and multiply matrices by its tensor cores if the kernel is there for that.
    """
    names = list(inspect.signature(kernel.fn).parameters)
    constants = (numbers_of(kernel, types) if ones else {}) | CONSTANTS[kernel] | (changes or {})
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    source = ASTSource(kernel, signature, constexprs={(names.index(n),): value for n, value in constants.items()})
    output = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm
    assert f".target sm_{capability}" in output["ptx"]
    if kernel is kv_up_project_kernel and types["weight"] == "*bf16":
        assert ("wgmma.mma_async" if capability >= 90 else "mma.sync") in output["ptx"]
    return len(output["cubin"])


def compile_attention(capability, data, listed, ones=False):
    """Compiler output of attention of widths 128 + 64 and 128, K in two parts, as configured for the GPU."""
    config = configuration(capability // 10, torch.bfloat16, 320)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    del config["HEADS"]
    constants = {"WIDTH_A": 128, "WIDTH_B": 64, "WIDTH_V": 128, "BLOCK_A": 128, "BLOCK_B": 64, "BLOCK_V": 128}
    constants |= {"CAUSAL": True, "IN_PLACE": True, "ROWS": 128, "FLOAT32": False, **config}
    if not listed:
        constants["kv_rows"] = None
    types = dict.fromkeys(["q", "k_a", "k_b", "v", "prev_out", "out"], data) | dict.fromkeys(("prev_lse", "lse"), "*fp32")
    types |= dict.fromkeys(["kv_rows", "cu_seqlens_q", "cu_seqlens_k", "seqused_k"], "*i32") | {"scale": "fp32"}
    constants |= numbers_of(attention_kernel, types) if ones else {}
    names = list(inspect.signature(attention_kernel.fn).parameters)
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    divisible = [n for n in names if signature[n].startswith("*") or ("stride" in n and n not in constants)]
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in divisible}
    positions = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(attention_kernel, signature, constexprs=positions, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm


def assembler_report(capability, ptx):
    """What the assembler says, such as that tensor core instructions cannot overlap with others."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        name = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={name}", file.name, "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def print_attention():
    """On Hopper by its own tensor core instructions, and with all in registers; else it would compute, but slowly."""
    for data in ("*bf16", "*fp16"):
        for capability in (80, 90):
            for listed in (False, True):
                output = compile_attention(capability, data, listed)
                assert ("wgmma.mma_async" in output["ptx"]) == (capability >= 90)
                assert "cp.async" in output["ptx"]
                report = assembler_report(capability, output["ptx"])
                assert "serialized" not in report
                assert " 0 bytes spill stores, 0 bytes spill loads" in report, report
                print("attention_kernel", data, listed, f"sm_{capability}", len(output["cubin"]))
    print("attention_kernel ones sm_90", len(compile_attention(90, "*bf16", True, ones=True)["cubin"]))


def main():
    print_attention()
    for kernel, pointers in POINTERS.items():
        for data in DATA[kernel]:
            types = {name: data if kind == "data" else kind for kind, names in pointers.items() for name in names.split()}
            for capability in (80, 90):
                print(kernel.__name__, data, f"sm_{capability}", compile_for(capability, kernel, types))
            print(kernel.__name__, data, "ones sm_90", compile_for(90, kernel, types, ones=True))
            if kernel is merge_states_kernel:  # sm_80 has no float8
                print(kernel.__name__, data, "float8 sm_90", compile_for(90, kernel, types | {"out": "*fp8e4nv"}))
            if kernel is kv_up_project_kernel and data == "*bf16":
                for capability in (80, 90):
                    size = compile_for(capability, kernel, types | {"latents": "*u8"}, changes={"SCALED": True})
                    print(kernel.__name__, data, "float8", f"sm_{capability}", size)


if __name__ == "__main__":
    main()
