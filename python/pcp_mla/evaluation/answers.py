"""Answers of a model to evaluation items: greedy, with the logits that every token was chosen from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from ..demo.models import bound_memory
from .problems import END, LONGEST_PROMPT, PAD, Item, decode, encode, parse_answer

MAX_TOKENS = 96  # more than any solution has
LONGEST = LONGEST_PROMPT + MAX_TOKENS
BATCH = 50  # items at a time
_QUESTION = encode("Question:")[0]


@dataclass
class Answer:
    """What a model says: ``tokens`` up to the end token, which is kept, and ``logits`` [tokens, vocabulary] float32 on the CPU."""

    tokens: list[int]
    logits: torch.Tensor

    def is_right(self, item: Item) -> bool:
        return parse_answer(decode(self.tokens)) == item.answer


def _until_end(rows: torch.Tensor, logits: torch.Tensor) -> Iterator[Answer]:
    """Answers from tokens [requests, steps] and logits [requests, steps, vocabulary], cut behind the end token."""
    for tokens, scores in zip(rows.tolist(), logits.float().cpu(), strict=True):
        count = tokens.index(END) + 1 if END in tokens else len(tokens)
        # Cloned: a view would keep the whole batch.
        yield Answer(tokens[:count], scores[:count].clone())


def _batches(items: list[Item]) -> Iterator[list[Item]]:
    for first in range(0, len(items), BATCH):
        yield items[first : first + BATCH]


@torch.inference_mode()
def stock_answers(model: Any, items: list[Item], progress: Callable[[int], object]) -> Iterator[Answer]:
    """Of a model as it is, by transformers' own generate. ``progress`` is told how many items are done since the last time."""
    device = model.lm_head.weight.device
    for batch in _batches(items):
        longest = max(len(item.prompt_ids) for item in batch)
        bound_memory(model, longest, len(batch))
        ids = torch.tensor([[PAD] * (longest - len(item.prompt_ids)) + item.prompt_ids for item in batch], device=device)
        out = model.generate(
            ids,
            attention_mask=(ids != PAD).long(),
            do_sample=False,
            max_new_tokens=MAX_TOKENS,
            eos_token_id=END,
            pad_token_id=PAD,
            output_logits=True,
            return_dict_in_generate=True,
        )
        yield from _until_end(out.sequences[:, longest:], torch.stack(out.logits, dim=1))
        progress(len(batch))


@torch.inference_mode()
def pcp_answers(
    model: Any, items: list[Item], chunk_tokens: int | None, prefix_cache: bool, progress: Callable[[int], object]
) -> Iterator[Answer]:
    """Of a model under PCP, on every rank. With ``prefix_cache`` the solved problems of a prompt are prefilled as a request of
    their own, and the question as another that finds them in the cache."""
    from ..integrations.transformers import greedy_steps, prefill

    for batch in _batches(items):
        prompts, prefix = [item.prompt_ids for item in batch], None
        if prefix_cache:
            starts = [len(prompt) - 1 - prompt[::-1].index(_QUESTION) for prompt in prompts]
            prefill(model, [prompt[:start] for prompt, start in zip(prompts, starts, strict=True)], chunk_tokens=chunk_tokens)
            prompts = [prompt[start:] for prompt, start in zip(prompts, starts, strict=True)]
            prefix = list(enumerate(starts))
        tokens, steps = [], []
        ended = torch.zeros(len(batch), dtype=torch.bool, device=model.lm_head.weight.device)
        for chosen, logits in islice(greedy_steps(model, prompts, chunk_tokens=chunk_tokens, prefix=prefix), MAX_TOKENS):
            tokens.append(chosen)
            steps.append(logits)
            ended |= chosen == END
            if bool(ended.all()):
                break
        yield from _until_end(torch.stack(tokens, dim=1), torch.stack(steps, dim=1))
        progress(len(batch))
