"""``python -m pcp_mla demo``: a model of transformers with MLA as it is, and the same under PCP on P ranks, on a real text."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from ..layer.split import SPLITS
from ..plan.partition import partition
from ..testing.launch import RankError
from .models import NAMES, build_model, make_config
from .outcome import Work, run_stock
from .progress import bar
from .ranks import check_heads, run_ranks
from .report import as_json, failures, format_table, make_row, make_tolerance, notes

# Tokens of the greedy continuation.
CONTINUATION = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the demo."""
    parser.add_argument("--model", choices=NAMES, default="tiny", help="shapes to use, weights are random (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model (default: %(default)s)")
    parser.add_argument("--pcp", type=int, nargs="+", default=[1, 2, 4], metavar="P", help="numbers of ranks (default: 1 2 4)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to read (default: the Declaration of Independence)")
    parser.add_argument("--max-tokens", type=int, default=1024, metavar="N", help="bytes of the text to use (default: %(default)s)")
    parser.add_argument("--chunk-tokens", type=int, metavar="N", help="tokens of a prefill step (default: all in one step)")
    parser.add_argument("--split", choices=SPLITS, default="auto", help="what ranks share out in attention (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to FILE as well")


def read_text(path: Path | None) -> tuple[str, bytes]:
    """Name and bytes of the text. ValueError if it cannot be read, is empty or not UTF-8."""
    source = resources.files("pcp_mla") / "data" / "declaration.txt" if path is None else path
    name = "declaration.txt (US Declaration of Independence, 1776)" if path is None else str(path)
    try:
        data = source.read_bytes()
    except OSError as error:
        raise ValueError(f"demo: --text must be a readable file, got {name} ({error.strerror})") from None
    if not data:
        raise ValueError(f"demo: --text must not be empty, got 0 bytes in {name}")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"demo: --text must be UTF-8, got {error.reason} at byte {error.start} of {name}") from None
    return name, data


def check_arguments(args: argparse.Namespace) -> tuple[str, list[int]]:
    """Name of the text and its tokens. ValueError or ImportError if the demo cannot run."""
    if args.max_tokens < 1:
        raise ValueError(f"demo: --max-tokens must be at least 1, got {args.max_tokens}")
    if args.chunk_tokens is not None and args.chunk_tokens < 1:
        raise ValueError(f"demo: --chunk-tokens must be at least 1, got {args.chunk_tokens}")
    for world_size in args.pcp:
        if world_size < 1:
            raise ValueError(f"demo: --pcp must be at least 1, got {world_size}")
    name, data = read_text(args.text)
    prompt = list(data[: args.max_tokens])
    if max(args.pcp) > len(prompt):
        raise ValueError(f"demo: --pcp must not be more than the tokens, got {max(args.pcp)} processes for {len(prompt)} tokens")
    if args.json is not None and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        raise ValueError(f"demo: --json must be a file in a folder that exists, got {args.json}")
    # Needed by all that follows: say so before anything runs.
    from ..integrations import transformers as _  # noqa: F401

    check_heads("demo", args.split, make_config(args.model).num_attention_heads, args.pcp)
    return name, prompt


def _describe(args: argparse.Namespace, model: Any, text: str, work: Work) -> dict[str, Any]:
    config = model.config
    gpu = torch.cuda.is_available()
    routed = any(hasattr(layer.mlp, "gate") for layer in model.model.layers)
    return {
        "model": args.model,
        "class": type(model).__name__,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_lora_rank": config.kv_lora_rank,
        "q_lora_rank": config.q_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "experts": config.n_routed_experts if routed else None,
        "experts_per_token": config.num_experts_per_tok if routed else None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "text": text,
        "tokens": len(work.prompt),
        "chunk_tokens": work.chunk_tokens,
        "split": work.split,
        "second_tokens": len(work.second),
        "shared_tokens": work.shared,
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {os.cpu_count()} cores",
        "on_gpu": gpu,
    }


def _print_head(facts: dict[str, Any]) -> None:
    f = facts
    print(
        f"model      {f['model']}: {f['class']}, {f['layers']} layers, {f['parameters'] / 1e6:.1f} M random weights, {f['dtype']}"
    )
    print(
        f"dims       hidden {f['hidden']}, {f['heads']} heads, kv_lora_rank {f['kv_lora_rank']}, q_lora_rank {f['q_lora_rank']}, "
        f"nope {f['qk_nope_head_dim']}, rope {f['qk_rope_head_dim']}, v {f['v_head_dim']}, "
        + (f"{f['experts_per_token']} of {f['experts']} experts" if f["experts"] else "no experts")
    )
    print(f"text       {f['text']}, {f['tokens']} tokens (bytes)")
    steps = "one step" if f["chunk_tokens"] == f["tokens"] else f"steps of {f['chunk_tokens']} tokens"
    steps += "" if f["split"] == "auto" else f", by {f['split']}"
    print(
        f"prefill    in {steps}; then a second prompt of {f['second_tokens']} tokens, the first {f['shared_tokens']} of them "
        "a cached prefix that it shares"
    )
    print(f"device     {f['device']}", flush=True)


def _run(args: argparse.Namespace, text: str, prompt: list[int]) -> int:
    with (
        bar(f"building {args.model}", 3 + len(args.pcp), "step") as done,
        tempfile.TemporaryDirectory(prefix="pcp-mla-demo-") as folder,
    ):
        model = build_model(args.model).to(getattr(torch, args.dtype))
        work = Work.make(prompt, CONTINUATION, args.chunk_tokens, args.split)
        facts = _describe(args, model, text, work)
        done.clear()
        _print_head(facts)
        done.update()
        model_file = os.path.join(folder, "model.pt")
        done.set_description("saving it for the ranks")
        torch.save(model, model_file)
        done.update()
        done.set_description("stock model, one process")
        stock, routing = run_stock(model.to("cuda") if facts["on_gpu"] else model, work)
        done.update()
        facts["continuation"] = stock.tokens
        tolerance = make_tolerance(stock, facts["layers"], facts["hidden"], getattr(torch, args.dtype))
        # The ranks map the file; this copy would be one too many.
        del model
        gc.collect()
        torch.cuda.empty_cache()
        rows = []
        for world_size in args.pcp:
            done.set_description(f"under PCP, P = {world_size}")
            backend, results = run_ranks(world_size, model_file, work, routing)
            done.update()
            tokens = partition([work.chunk_tokens], world_size=world_size, rank=0).tokens_per_rank.tolist()
            rows.append(make_row(stock, results, backend, tokens, tolerance))
    reasons = failures(rows, tolerance)
    print(f"tolerance  {tolerance.value:.2e} = {tolerance.derivation}\n")
    print(format_table(rows, CONTINUATION, facts["on_gpu"]))
    print()
    for line in notes(rows, tolerance):
        print(line)
    for reason in reasons:
        print(f"FAIL: {reason}")
    if not reasons:
        print(f"PASS: all logits within the tolerance of the stock model's, P = {', '.join(map(str, args.pcp))}")
    if args.json is not None:
        args.json.write_text(json.dumps(as_json(facts, rows, tolerance), indent=2) + "\n")
    return 1 if reasons else 0


def run(args: argparse.Namespace) -> int:
    """Run the demo. Exit code 0: all P agree with the stock model, and the layer with the seed path; 1: some do not, or a rank
    failed; 2: bad input."""
    try:
        text, prompt = check_arguments(args)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        return _run(args, text, prompt)
    except (RankError, TimeoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
