"""``python -m pcp_mla eval``: exact match of a small MLA model on word problems, stock and at several numbers of ranks."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ..checks import dtype_name
from ..demo.progress import bar
from ..demo.ranks import check_heads, on_ranks
from ..demo.routing import rounding_share
from ..groups import Group, group_rank, group_world_size
from ..layer.split import SPLITS
from ..testing.launch import RankError
from .answers import BATCH, LONGEST, Answer, pcp_answers, stock_answers
from .compare import Score, as_json, score, table
from .problems import VOCABULARY, Item, evaluation_items

CACHES = ("model", "fp8")
# The weights that bench/train_tiny.py made.
MODEL = Path(__file__).resolve().parents[1] / "data" / "arithmetic"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the evaluation."""
    parser.add_argument("--pcp", type=int, nargs="+", default=[1, 2, 4], metavar="P", help="numbers of ranks (default: 1 2 4)")
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="problems to solve (default: %(default)s)")
    parser.add_argument("--chunk", type=int, metavar="N", help="tokens of a prefill step (default: all prompts of a batch)")
    parser.add_argument("--split", choices=SPLITS, default="auto", help="what ranks share out in attention (default: %(default)s)")
    caches = "caches to solve them with: of the model's dtype, float8, or one after the other (default: model)"
    parser.add_argument("--cache-dtype", nargs="+", choices=CACHES, default=["model"], help=caches)
    parser.add_argument("--prefix-cache", action="store_true", help="prefill the solved problems first, and share their blocks")
    parser.add_argument("--model", type=Path, default=MODEL, metavar="FOLDER", help="weights (default: those of the package)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to FILE as well")


def check_arguments(args: argparse.Namespace) -> None:
    """ValueError or ImportError if the evaluation cannot run."""
    for name, value in (("--limit", args.limit), ("--chunk", args.chunk), *(("--pcp", p) for p in args.pcp)):
        if value is not None and value < 1:
            raise ValueError(f"eval: {name} must be at least 1, got {value}")
    if not (args.model / "model.safetensors").is_file():
        raise ValueError(
            f"eval: --model must be a folder with weights, got {args.model}; python -m bench.train_tiny --out FOLDER makes them"
        )
    if args.json is not None and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        raise ValueError(f"eval: --json must be a file in a folder that exists, got {args.json}")
    # Needed by all that follows: say so before anything runs.
    from ..integrations import transformers as _  # noqa: F401


def load_model(folder: Path, device: torch.device) -> Any:
    """The model, in bfloat16 on a GPU, in float32 on a CPU. ValueError if its vocabulary is not that of the problems."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    if model.config.vocab_size != len(VOCABULARY):
        raise ValueError(f"eval: --model must have a vocabulary of {len(VOCABULARY)} tokens, got {model.config.vocab_size}")
    return model.to(device)


def _answers_of_rank(
    model: Any, group: Group, items: list[Item], chunk: int | None, prefix_cache: bool, split: str, cache: str
) -> list[Answer]:
    """A rank's answers; their logits are rank 0's alone to bring."""
    from ..integrations.transformers import capture_graphs, enable_pcp

    enable_pcp(model, group, split=split, cache_dtype=torch.float8_e4m3fn if cache == "fp8" else None)
    if model.lm_head.weight.is_cuda:
        count = min(BATCH, len(items))
        capture_graphs(model, decode_sizes=[(count, count * LONGEST)], max_requests=count)
    rank = group_rank(group)
    with bar(f"P = {group_world_size(group)}", len(items), "problem", rank == 0) as done:
        answers = list(pcp_answers(model, items, chunk, prefix_cache, done.update))
    return answers if rank == 0 else [Answer(answer.tokens, answer.logits[:0]) for answer in answers]


def run_ranks(
    world_size: int, folder: Path, items: list[Item], chunk: int | None, prefix_cache: bool, split: str, cache: str
) -> tuple[str, list[Answer]]:
    """How the ranks were run, and rank 0's answers. RuntimeError if another rank says something else."""
    backend, results = on_ranks(world_size, partial(load_model, folder), _answers_of_rank, items, chunk, prefix_cache, split, cache)
    for rank, answers in enumerate(results):
        if [answer.tokens for answer in answers] != [answer.tokens for answer in results[0]]:
            raise RuntimeError(f"eval: ranks 0 and {rank} of {world_size} gave different answers")
    return backend, results[0]


def _run(args: argparse.Namespace, model: Any) -> int:
    device = model.device
    # By length: prompts of a batch are alike, so transformers pads little.
    items = sorted(evaluation_items(args.limit), key=lambda item: len(item.prompt_ids))
    layers, hidden, dtype = model.config.num_hidden_layers, model.config.hidden_size, model.dtype
    lengths = [len(item.prompt_ids) for item in items]
    parameters = sum(p.numel() for p in model.parameters())
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    size = f"{layers} layers, {parameters / 1e6:.1f} M trained weights, {dtype_name(dtype)}"
    print(f"model    {type(model).__name__}, {size}, {hardware}")
    print(f"problems {len(items)}, prompts of {lengths[0]} to {lengths[-1]} tokens")
    print(f"prefill  {f'in steps of {args.chunk} tokens' if args.chunk else 'in one step a batch'}", end="")
    print(f", prefix caching {'on' if args.prefix_cache else 'off'}, split {args.split}", flush=True)
    with bar("stock", len(items), "problem") as done:
        stock = list(stock_answers(model, items, done.update))
    largest = max((float(answer.logits.abs().max()) for answer in stock if answer.tokens), default=0.0)
    share, words = rounding_share(layers, hidden, dtype)
    tolerance = share * largest
    compare = partial(score, stock=stock, items=items, tolerance=tolerance)
    scores, quantised = [compare("stock", stock)], list[Score]()
    backends: dict[int, str] = {}  # the same for all caches
    for cache, world_size in product(args.cache_dtype, args.pcp):
        backends[world_size], answers = run_ranks(world_size, args.model, items, args.chunk, args.prefix_cache, args.split, cache)
        if cache == "fp8":
            quantised.append(compare(f"{world_size} fp8", answers))
        else:
            scores.append(compare(str(world_size), answers))
    print(f"\n{table(scores + quantised, len(items))}\n")
    print(f"ranks    {', '.join(f'P = {p}: {b}' for p, b in backends.items())}")
    overturned = max(s.largest_margin for s in scores)
    print(f"rounding moves a logit by at most {tolerance:.2g} = {words} x largest logit {largest:.1f}; answers may part where the")
    print(f"         stock model preferred its token by less than twice that (largest preference overturned: {overturned:.2g})")
    differ = [f"{s.unexplained} at P = {s.run}" for s in scores if s.unexplained]
    failed = [f"answers differ by more: {', '.join(differ)}"] if differ else []
    if not scores[0].exact_match:
        failed.append("the stock model solves no problem: that answers are the same shows nothing")
    # A float8 cache moves logits by more than rounding does, and answers in no direction.
    apart = [s for s in quantised if abs(s.exact_match - scores[0].exact_match) > scores[0].stderr]
    if apart:
        failed.append(f"exact match is more than a standard error from the stock model's at P = {', '.join(s.run for s in apart)}")
    for reason in failed:
        print(f"FAIL: {reason}")
    if not failed and len(scores) > 1:
        print("PASS: no answer differs by more than rounding")
    if not failed and quantised:
        print("PASS: exact match with a float8 cache is within a standard error of the stock model's")
    if args.json is not None:
        facts = {"hardware": hardware, "torch": torch.__version__, "dtype": dtype_name(dtype), "problems": len(items)}
        facts |= {
            "cache_dtype": args.cache_dtype,
            "chunk": args.chunk,
            "prefix_cache": args.prefix_cache,
            "split": args.split,
            "tolerance": tolerance,
        }
        facts["ranks"] = list(backends.values())
        args.json.write_text(json.dumps(facts | {"runs": as_json(scores + quantised)}, indent=1) + "\n")
    return 1 if failed else 0


def run(args: argparse.Namespace) -> int:
    """Run the evaluation. Exit code 0: no answer differs from the stock model's by more than rounding explains; 1: some do, or the
    stock model has no right one, or a rank failed; 2: bad input."""
    try:
        check_arguments(args)
        model = load_model(args.model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        check_heads("eval", args.split, model.config.num_attention_heads, args.pcp)
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        return _run(args, model)
    except (RankError, TimeoutError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
