"""python -m bench.vllm: an engine with PCP, vLLM's own code and this package's parts in turn, prompt by prompt.

With ``--pcp 1`` there is nothing to compare, and the engine is timed alone: one GPU, or tensor parallelism. Each case is timed with
the same fresh prompts for both sides, an empty prefix cache before each; which side is first alternates. Times are milliseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from ..__main__ import commit
from . import engine, marks

DEFAULT_PARTS = "exchange,prefill,planner"
CASES = {"8k": (8192, 0), "8k+56k": (8192, 57344), "32k": (32768, 0)}  # new tokens of one step, cached tokens


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def sides(args: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    ours = tuple(part for part in args.parts.split(",") if part)
    if args.pcp == 1:
        return {"vllm": ()}
    return {"vllm": (), "ours": ours} | ({} if args.split is None else {"heads": (*ours, "heads")})


class Timer:
    """Times generations of one engine, each side of the comparison in turn."""

    def __init__(self, llm: Any, args: argparse.Namespace) -> None:
        self.llm, self.sides, self.deadline = llm, sides(args), time.monotonic() + args.seconds
        self.seed = 0

    def on(self, side: str) -> None:
        if len(self.sides) > 1:
            engine.switch(self.llm, self.sides[side])

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def compare(self, lengths: list[int], new: int, repeats: int) -> dict[str, Any]:
        """All sides on the same prompts of these lengths, ``repeats`` times after one call of each that is not counted."""
        times: dict[str, list[float]] = {side: [] for side in self.sides}
        equal = True
        for repeat in range(repeats + 1):
            if repeat > 1 and self.late():
                break
            self.seed += len(lengths)
            prompts = [engine.prompt(count, self.seed + i) for i, count in enumerate(lengths)]
            order = list(self.sides)[:: 1 if repeat % 2 else -1]
            tokens = {}
            for side in order:
                self.on(side)
                engine.forget(self.llm)
                seconds, tokens[side] = engine.generate(self.llm, prompts, new)
                if repeat:
                    times[side].append(1e3 * seconds)
            equal &= all(found == tokens[order[0]] for found in tokens.values())
        row: dict[str, Any] = {"repeats": len(times["vllm"]), "tokens_equal": equal}
        for side, found in times.items():
            row |= {f"{side}_ms": statistics.median(found), f"{side}_min_ms": min(found)}
        return row


def first_tokens(timer: Timer, args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for step in _numbers(args.steps):
        engine.set_step(timer.llm, step)
        for length in _numbers(args.prompts):
            if timer.late():
                print(f"left out for want of time: {length} in steps of {step}", flush=True)
                continue
            few = length > 32768
            row = {"case": "ttft", "prompt": length, "step_tokens": step}
            row |= timer.compare([length], 1, min(args.repeats, 5) if few else args.repeats)
            rows.append(row)
            show(row)
    return rows


def decodes(timer: Timer, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A long prompt's tokens beside running decodes: vllm_ms and ours_ms are a decode step's."""
    engine.set_step(timer.llm, 8192)
    new = 65
    row: dict[str, Any] = {"case": "tpot", "prompt": 1024, "requests": 8, "step_tokens": 8192}
    many = timer.compare([1024] * 8, new, args.repeats)
    one = timer.compare([1024] * 8, 1, args.repeats)
    for name in many:
        row[name] = (many[name] - one[name]) / (new - 1) if name.endswith("_ms") else many[name]
    row["tokens_equal"] = many["tokens_equal"] and one["tokens_equal"]
    show(row)
    return [row]


def _differences(one: Any, other: Any) -> tuple[int, int, float, float]:
    """Tokens that were compared, up to the first of a prompt that differs, and how many do; by how much ``one`` preferred its own
    there, at most (at least, where the other is not among its five likeliest); and the largest difference of the log-probabilities
    that both sides have of a token."""
    compared = differ = 0
    gap = apart = 0.0
    for ours, theirs in zip(one, other, strict=True):
        for (token, likely), (second, also) in zip(ours, theirs, strict=True):
            compared += 1
            apart = max([apart, *(abs(likely[n] - also[n]) for n in likely.keys() & also.keys())])
            if token != second:
                differ += 1
                gap = max(gap, likely[token] - likely.get(second, min(likely.values())))
                break
    return compared, differ, gap, apart


def batches(timer: Timer, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Prompts of several lengths at once, in chunks, decode steps of some beside prefills of others: how far log-probabilities
    are apart, and how many tokens differ. vLLM's own code on the same prompts in another order is what to compare with."""
    rows = []
    engine.likely(timer.llm, [engine.prompt(count, count) for count in (5000, 300)], 8)  # an engine's first batch compiles kernels
    for step in (4096, 32768):
        engine.set_step(timer.llm, step)
        for turn in range(4):
            timer.seed += 10
            prompts = [engine.prompt(count, timer.seed + i) for i, count in enumerate((5000, 1234, 333, 9001, 3, 700))]
            found = {}
            for side, names in ({"vllm": (), "again": ()} | timer.sides).items():
                engine.switch(timer.llm, names)
                engine.forget(timer.llm)
                order = prompts[::-1] if side == "again" else prompts
                likely = engine.likely(timer.llm, order, 8)
                found[side] = likely[::-1] if side == "again" else likely
            for side in [side for side in found if side != "vllm"]:
                compared, differ, gap, apart = _differences(found["vllm"], found[side])
                row = {"case": "batch", "side": side, "turn": turn, "step_tokens": step, "tokens": compared, "differ": differ}
                row |= {"largest_gap": gap, "largest_logprob_difference": apart}
                rows.append(row)
                show(row)
    return rows


def _mean(dicts: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(found.get(name, 0.0) for found in dicts) for name in sorted(set().union(*dicts))}


def _measured(timer: Timer, new: int, cached: int, count: int, before: Any, after: Any) -> list[Any]:
    """What ``after`` gives on rank 0 for each of ``count`` steps of ``new`` tokens behind a cached prefix; one more warms up."""
    found = []
    for _ in range(count + 1):
        timer.seed += 1
        prefix = engine.prompt(cached, timer.seed)
        engine.forget(timer.llm)
        if cached:
            engine.generate(timer.llm, [prefix])
        engine.on_workers(timer.llm, before)
        engine.generate(timer.llm, [prefix + engine.prompt(new, 100000 + timer.seed)])
        found.append(engine.on_workers(timer.llm, after)[0])
    return found[1:]


def profiles(timer: Timer, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Where a step's time goes on rank 0: host clocks of steps without the profiler, kernels of steps under it."""
    rows = []
    engine.on_workers(timer.llm, marks.install)
    layers = engine.models.MODELS[args.model]["num_hidden_layers"] if args.layers is None else args.layers
    engine.set_step(timer.llm, 32768)
    for case in args.profile.split(","):
        for side in timer.sides:
            timer.on(side)
            clocks = _mean(_measured(timer, *CASES[case], 5, marks.read_clock, marks.read_clock))
            kernels = _measured(timer, *CASES[case], 2, marks.start_profile, marks.stop_profile)
            gpu, launches = (_mean([{kind: pair[i] for kind, pair in found.items()} for found in kernels]) for i in (0, 1))
            row = {"case": "profile", "what": case, "side": side}
            row["host_us_layer"] = {label: 1e6 * clocks.get(label, 0.0) / layers for label in marks.LAYER}
            row["host_us_step"] = {label: 1e6 * clocks.get(label, 0.0) for label in marks.STEP}
            row["gpu_us_layer"] = {kind: us / layers for kind, us in gpu.items()}
            row["launches_layer"] = {kind: count / layers for kind, count in launches.items()}
            rows.append(row)
            show(row)
    return rows


def show(row: dict[str, Any]) -> None:
    if row["case"] == "profile":
        print(f"profile {row['what']} {row['side']}", flush=True)
        for name in ("host_us_layer", "host_us_step", "gpu_us_layer", "launches_layer"):
            values = row[name]
            listed = ", ".join(f"{kind} {value:.1f}" for kind, value in values.items())
            print(f"  {name}: {listed}; sum {sum(values.values()):.1f}", flush=True)
        return
    if row["case"] == "batch":
        words = (f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items())
        print(", ".join(words), flush=True)
        return
    text = f"{row['case']:5} {row['prompt']:6} in steps of {row['step_tokens']:5}: "
    for side in ("vllm", "ours", "heads"):
        if f"{side}_ms" in row:
            text += f"{side} {row[f'{side}_ms']:9.2f} (min {row[f'{side}_min_ms']:9.2f}), "
    if "ours_ms" in row:
        text += f"{row['vllm_ms'] / row['ours_ms']:.3f} times, tokens {'equal' if row['tokens_equal'] else 'DIFFER'}, "
    if "heads_ms" in row:
        text += f"heads over ours {row['ours_ms'] / row['heads_ms']:.3f} times, "
    print(f"{text}n {row['repeats']}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.vllm", description=__doc__)
    engine.arguments(parser)
    parser.add_argument("--parts", default=DEFAULT_PARTS, help="of the plug-in that are compared with vLLM's own code")
    parser.add_argument(
        "--split",
        choices=("auto", "heads"),
        help="a third side, of --parts and heads: in steps where that costs less, or in all",
    )
    parser.add_argument("--prompts", default="1024,4096,8192,16384,32768,65536,131072")
    parser.add_argument("--steps", default="8192,32768", help="new tokens of a step, at most")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cases", default="ttft,batch,tpot", help="of ttft, batch, tpot")
    parser.add_argument("--profile", default="", help=f"also where the time goes, of {', '.join(CASES)}")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no case later than this")
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    args = parser.parse_args(arguments)
    llm = engine.build(args, sides(args))
    timer, rows = Timer(llm, args), []
    for name, run in (("batch", batches), ("ttft", first_tokens), ("tpot", decodes)):
        if name in args.cases.split(",") and (name != "batch" or args.pcp > 1):
            rows += run(timer, args)
    if args.pcp > 1:
        print("calls of the plug-in, each rank:", engine.counts(llm), flush=True)
    if args.profile:
        rows += profiles(timer, args)
    if args.out is not None:
        import torch
        import vllm

        about = {"model": args.model, "tp": args.tp, "pcp": args.pcp}
        head = {"hardware": torch.cuda.get_device_name(), "commit": commit(), "vllm": vllm.__version__, "torch": torch.__version__}
        args.out.write_text(json.dumps({"benchmark": "vllm", **head, "results": [about | row for row in rows]}, indent=1) + "\n")
    llm.llm_engine.engine_core.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
