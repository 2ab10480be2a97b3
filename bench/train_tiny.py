"""python -m bench.train_tiny [--geometry deepseek|glm] [--out FOLDER] [--steps N]: trains a small DeepSeek-V2 or GLM model,
transformers' own class, on generated word problems (pcp_mla.evaluation.problems), and writes its weights in bfloat16 and the
training's facts to FOLDER."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from pcp_mla.demo.models import register_padded_attention
from pcp_mla.evaluation import MODEL, load_model, problems
from pcp_mla.evaluation.answers import stock_answers

from .__main__ import commit

ROW = 1600  # tokens of a training row: the longest prompt and its solution
ROWS = 20  # a step
ITEMS = 200  # to solve at the end
STORY_LOSS = 0.1  # weight of a token that is not of a solution
RATE, WARM_UP, LAST_RATE = 1.5e-3, 0.03, 0.02  # the last two as shares of the training and of the rate
REPORT_EVERY = 5.0  # seconds

LAYERS = 6
# Shapes scaled down, heads a quarter as wide, without experts. Of DeepSeek-V2-Lite: values narrower than keys, no low rank of the
# queries. Of GLM-4.7-Flash: values as wide as keys, a quarter of these with rope, and heads that are no multiple of two.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "deepseek": {
        "model_type": "deepseek_v2",
        "num_attention_heads": 8,
        "q_lora_rank": None,
        "kv_lora_rank": 96,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "first_k_dense_replace": LAYERS,
    },
    "glm": {
        "model_type": "glm4_moe_lite",
        "num_attention_heads": 5,
        "q_lora_rank": 96,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 48,
        "qk_rope_head_dim": 16,
        "v_head_dim": 64,
        "mlp_layer_types": ["dense"] * LAYERS,
    },
}


def build_model(geometry: str) -> Any:
    """A model with seeded random weights in float32, whose attention is torch's flash kernel."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = GEOMETRIES[geometry]
    config = AutoConfig.for_model(
        **shape,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        vocab_size=len(problems.VOCABULARY),
        num_key_value_heads=shape["num_attention_heads"],
        max_position_embeddings=2048,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=problems.END,
        pad_token_id=problems.PAD,
    )
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=register_padded_attention(), dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:  # the sum of what all layers add keeps the scale of one
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.mul_((2 * config.num_hidden_layers) ** -0.5)
    return model


class Rows(Dataset):
    """Training batches, each from its own seed: [2, ROWS, ROW], token ids and the number of a token's equation, 0 outside."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __len__(self) -> int:
        return 2**31

    def __getitem__(self, index: int | str) -> torch.Tensor:
        return torch.from_numpy(np.stack([self.row(f"{index}/{row}") for row in range(ROWS)], axis=1))

    def row(self, part: str) -> np.ndarray:
        """Problems one after another, the last one cut off."""
        ids: list[int] = []
        equations: list[int] = []
        count = 0
        for problem in problems.training_problems(self.seed, part, ROW):
            for text, solves in (
                (f"Question: {problem.question} Answer:", False),
                (f"{problem.solution} {problems.END_TEXT}", True),
            ):
                piece = problems.encode(text)
                ids += piece
                for token in piece:
                    equations.append(count + 1 if solves else 0)
                    # An equation ends in its period; the last one is the answer.
                    count += solves and problems.VOCABULARY[token] in (".", problems.END_TEXT)
        return np.array([ids[:ROW], equations[:ROW]], dtype=np.int16)


def forward(model: Any, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, the tokens that they predict, and those tokens' equations."""
    ids, equations = batch.to(model.device, torch.long)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return logits.float(), ids[:, 1:], equations[:, 1:]


def loss_of(model: Any, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is trained, and the mean loss of a solution's tokens."""
    logits, targets, equations = forward(model, batch)
    losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    inside = (equations.flatten() > 0).float()
    solution = (losses * inside).sum() / inside.sum()  # no indexing by a mask, which would wait for the device
    story = (losses * (1 - inside)).sum() / (1 - inside).sum()
    return solution + STORY_LOSS * story, solution.detach()


@torch.no_grad()
def equation_accuracy(model: Any, batch: torch.Tensor) -> float:
    """Share of the equations and answers all of whose tokens the model predicts, given what stands before."""
    logits, targets, equations = forward(model, batch)
    stride = int(equations.max()) + 1
    numbers = equations + stride * torch.arange(len(equations), device=equations.device)[:, None]
    inside = equations > 0
    seen = numbers[inside].unique()
    missed = numbers[inside & (logits.argmax(-1) != targets)].unique()
    return 1 - len(missed) / len(seen)


def rate(done: float) -> float:
    """Share of the learning rate after a share of the training."""
    if done < WARM_UP:
        return (done + 1e-3) / (WARM_UP + 1e-3)
    return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - WARM_UP) / (1 - WARM_UP))))


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), fused=True)


def train(model: Any, batches: Iterator[torch.Tensor], held_out: torch.Tensor, steps: int) -> dict[str, Any]:
    """Trains for so many steps; returns the curve and the totals."""
    optimizer = optimizer_of(model)
    curve: list[dict[str, float]] = []
    begin = reported = time.perf_counter()
    tokens = 0
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate((step - 1) / steps)
        batch = next(batches)
        loss, solution = loss_of(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tokens += batch[0].numel()
        if step == steps or time.perf_counter() - reported > REPORT_EVERY:
            model.eval()
            point = {"step": step, "seconds": round(time.perf_counter() - begin, 1), "loss": round(float(solution), 4)}
            point["equations"] = round(equation_accuracy(model, held_out), 4)
            model.train()
            curve.append(point)
            print(
                f"step {step:6} {point['seconds']:6.1f} s loss {point['loss']:.4f} equations {point['equations']:.1%}", flush=True
            )
            reported = time.perf_counter()
    return {"steps": steps, "tokens": tokens, "seconds": round(time.perf_counter() - begin, 1), "curve": curve}


def exact_match(folder: Path, device: str, count: int) -> float:
    """Share of evaluation items that the saved model solves, greedily, with transformers' own attention."""
    items = sorted(problems.evaluation_items(count), key=lambda item: len(item.prompt_ids))
    answers = stock_answers(load_model(folder, torch.device(device)), items, lambda done: None)
    return sum(answer.is_right(item) for answer, item in zip(answers, items, strict=True)) / count


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.train_tiny", description=__doc__)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="deepseek", help="of the attention (default: %(default)s)")
    parser.add_argument("--out", type=Path, help=f"folder of the weights (default: {MODEL.name}, of others {MODEL.name}_GEOMETRY)")
    parser.add_argument("--steps", type=int, default=700, help="of training (default: %(default)s, too few to solve all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the training's facts; default: training.json beside the weights")
    args = parser.parse_args(arguments)
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    out = args.out or (MODEL if args.geometry == "deepseek" else MODEL.with_name(f"{MODEL.name}_{args.geometry}"))
    file = args.json or out / "training.json"
    file.parent.mkdir(parents=True, exist_ok=True)

    data = Rows(args.seed)
    workers = max(1, min(12, (os.cpu_count() or 1) - 2))
    loader = DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=8)
    batches = iter(loader)  # before there is a CUDA context, which a fork must not copy
    torch.manual_seed(args.seed)
    model = build_model(args.geometry).to(args.device).train()
    parameters = sum(p.numel() for p in model.parameters())
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    print(f"{parameters / 1e6:.2f} million parameters, {ROWS} x {ROW} tokens a step, {workers} workers, {hardware}", flush=True)
    facts = train(model, batches, data["held out"], args.steps)

    model.to(torch.bfloat16).save_pretrained(out)
    begin = time.perf_counter()
    solved = exact_match(out, args.device, ITEMS)
    print(f"exact match {solved:.1%} of {ITEMS} items in {time.perf_counter() - begin:.1f} s")
    report = {"hardware": hardware, "torch": torch.__version__, "commit": commit(), "parameters": parameters, "seed": args.seed}
    report |= {"geometry": args.geometry, "tokens_a_step": ROWS * ROW, "items": ITEMS, "exact_match": solved, **facts}
    file.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
