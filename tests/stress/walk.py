"""A random walk through the transformers integration, each logit compared with the stock model's on the full token list."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import DynamicCache

from pcp_mla.integrations.transformers import copy_sharing_weights, decode, disable_pcp, enable_pcp, extend, generate, prefill
from pcp_mla.testing.played import play
from stress.draw import Draw
from stress.families import Arguments, Family
from stress.models import MODELS, VOCABULARY, Stock, tolerance

BLOCK = 16  # tokens of a block, as docs/latent_cache.md says
Action = tuple[Any, ...]


def draw_walk(draw: Draw) -> Arguments:
    """Actions, with the lengths that requests have by then."""
    world = draw.choice([1, 2, 4])
    lengths: list[int] = []
    actions: list[Action] = []

    def tokens(count: int) -> list[int]:
        return [draw.int(0, VOCABULARY - 1) for _ in range(count)]

    def new_tokens(count: int) -> list[list[int]]:
        edges = [0, 1, 2 * world - 1, 2 * world, 2 * world + 1, BLOCK, BLOCK + 1]
        sizes = [draw.choice(edges) if draw.chance(0.5) else draw.int(0, 40) for _ in range(count)]
        sizes[draw.int(0, count - 1)] += not any(sizes)
        return [tokens(n) for n in sizes]

    def start() -> tuple[list[list[int]], list[tuple[int, int] | None] | None, int | None]:
        count = draw.int(1, 4)
        prefix = None
        if lengths and draw.chance(0.6):
            chosen = [draw.int(0, len(lengths) - 1) if draw.chance(0.7) else None for _ in range(count)]
            prefix = [None if i is None else (i, lengths[i] if draw.chance(0.3) else draw.int(0, lengths[i])) for i in chosen]
        return new_tokens(count), prefix, draw.choice([None, None, 1, 5, 16, 33])

    def drafts() -> tuple[list[list[int]], list[tuple[int, int] | None], int | None, str]:
        """A few tokens behind all or the first ones of some requests, in any order, and new requests behind those."""
        going = [i for i in draw.shuffled(len(lengths)) if lengths[i] and draw.chance(0.8)]
        named = [(i, lengths[i] - draw.choice([0, draw.int(0, min(6, lengths[i] - 1))])) for i in going]
        prefix = [*named, *[None] * draw.int(not named, 2)]
        new = [tokens(draw.int(1, 6 if entry else 40)) for entry in prefix]
        return new, prefix, draw.choice([None, None, 9]), draw.choice(["all", "last"])

    kinds = ["prefill", "extend", "decode", "decode", "drafts", "drafts", "generate", "forward", "bad", "again"]
    for _ in range(draw.int(2, 6)):
        kind = draw.choice(kinds) if lengths else "prefill"
        fails = draw.chance(0.25) and kind in ("prefill", "extend", "decode", "drafts")
        if kind in ("prefill", "generate"):
            new, prefix, chunk = start()
            if kind == "generate":
                new = [text or tokens(1) for text in new]
            count = draw.int(1, 4)
            actions.append((kind, new, prefix, chunk, count) if kind == "generate" else (kind, new, prefix, chunk))
            if not fails:
                kept = [0 if p is None else p[1] for p in prefix or [None] * len(new)]
                more = count - 1 if kind == "generate" else 0
                lengths = [old + len(text) + more for old, text in zip(kept, new, strict=True)]
        elif kind == "drafts":
            new, named, *options = drafts()
            actions.append((kind, new, named, *options))
            if not fails:
                lengths = [(entry[1] if entry else 0) + len(text) for entry, text in zip(named, new, strict=True)]
        elif kind == "forward":
            texts = [tokens(draw.int(1, 20)) for _ in range(draw.int(1, 3))]
            turns = [[tokens(n)[0:n] for _ in texts] for n in (draw.choice([1, 1, 3, 36]) for _ in range(draw.int(0, 3)))]
            order = draw.shuffled(len(texts)) if draw.chance(0.4) else None
            crop = draw.int(1, 19) if draw.chance(0.3) else None
            owned, copied = draw.chance(0.5), draw.chance(0.3)
            actions.append((kind, texts, draw.choice(["left", "right"]), turns, order, crop, owned, copied))
        elif kind in ("extend", "decode"):
            new = new_tokens(len(lengths)) if kind == "extend" else [tokens(1) for _ in lengths]
            actions.append((kind, new))
            if not fails:
                lengths = [old + len(text) for old, text in zip(lengths, new, strict=True)]
        else:
            actions.append((kind,))
            lengths = [] if kind == "again" else lengths
        if fails:
            actions[-1] = ("failing", draw.int(0, 1), *actions[-1])
    return {
        "model": draw.choice(list(MODELS)),
        "world": world,
        "layout": draw.choice(["unpadded", "padded"]),
        "split": draw.choice(["tokens", "heads"]) if world < 4 else "tokens",  # the models have three heads
        "actions": actions,
    }


class Interrupted(Exception):
    """What a module raises in the middle of a step."""


class Walker:
    """One rank's model under PCP, beside the texts that its requests stand for and the blocks that these should take."""

    def __init__(self, stock: Stock, group: Any, layout: str, split: str) -> None:
        self.stock, self.group, self.layout, self.split = stock, group, layout, split
        self.model = copy_sharing_weights(stock.model)
        self.begin()

    def begin(self) -> None:
        self.context = enable_pcp(self.model, self.group, self.layout, self.split)
        self.texts: list[list[int]] = []
        self.blocks: list[list[object]] = []

    def check_blocks(self, others: int = 0) -> None:
        """No block is lost, and none is used by nobody."""
        pool = self.context.blocks
        used = sum(users > 0 for users in pool._users)
        wanted = len({id(block) for blocks in self.blocks for block in blocks}) + others
        assert used == wanted, f"{used} blocks are used, not {wanted}"
        assert sorted(pool._free) == [i for i, users in enumerate(pool._users) if not users]
        assert self.context.requests.lengths == [len(text) for text in self.texts]

    def take(self, texts: list[list[int]], blocks: list[list[object]]) -> None:
        self.texts = texts
        self.blocks = [
            held + [object() for _ in range(-(-len(text) // BLOCK) - len(held))] for text, held in zip(texts, blocks, strict=True)
        ]

    def started(self, new: list[list[int]], prefix: Any) -> tuple[list[list[int]], list[list[object]]]:
        """Texts of new requests, and the blocks that they share."""
        named = [p or (0, 0) for p in prefix or [None] * len(new)]
        texts = [(self.texts[i][:n] if n else []) + text for (i, n), text in zip(named, new, strict=True)]
        return texts, [self.blocks[i][: n // BLOCK] if n else [] for i, n in named]

    def check_new(self, name: str, logits: torch.Tensor, texts: list[list[int]], new: list[list[int]]) -> None:
        rows = [self.stock.logits(text)[len(text) - len(last) :] for text, last in zip(texts, new, strict=True) if last]
        self.stock.check(name, logits, torch.cat(rows))

    def prefill(self, new: list[list[int]], prefix: Any, chunk: int | None) -> None:
        logits = prefill(self.model, new, chunk_tokens=chunk, prefix=prefix)
        texts, blocks = self.started(new, prefix)
        self.check_new("prefill", logits, texts, new)
        self.take(texts, blocks)

    def drafts(self, new: list[list[int]], prefix: Any, chunk: int | None, logits: str) -> None:
        decodes = [entry is not None for entry in prefix]
        got = prefill(self.model, new, chunk_tokens=chunk, prefix=prefix, decodes=decodes, logits=logits)
        texts, blocks = self.started(new, prefix)
        last = [text if logits == "all" or decode else text[-1:] for text, decode in zip(new, decodes, strict=True)]
        self.check_new("drafts", got, texts, last)
        self.take(texts, blocks)

    def generate(self, new: list[list[int]], prefix: Any, chunk: int | None, count: int) -> None:
        answers = generate(self.model, new, count, chunk_tokens=chunk, prefix=prefix)
        texts, blocks = self.started(new, prefix)
        for text, answer in zip(texts, answers, strict=True):
            assert len(answer) == count
            for i, token in enumerate(answer):
                logits = self.stock.logits(text + answer[:i])[-1]
                assert logits.max() - logits[token] <= 2 * tolerance(logits[None]), f"generate: token {i} is not the likeliest"
        self.take([text + answer[:-1] for text, answer in zip(texts, answers, strict=True)], blocks)

    def extend(self, new: list[list[int]]) -> None:
        logits = extend(self.model, new)
        texts = [old + text for old, text in zip(self.texts, new, strict=True)]
        self.check_new("extend", logits, texts, new)
        self.take(texts, self.blocks)

    def decode(self, new: list[list[int]]) -> None:
        logits = decode(self.model, [text[0] for text in new])
        texts = [old + text for old, text in zip(self.texts, new, strict=True)]
        self.check_new("decode", logits, texts, new)
        self.take(texts, self.blocks)

    def failing(self, layer: int, kind: str, *arguments: Any) -> None:
        """The action with a module that raises: all is as before."""

        def interrupt(*_: Any) -> None:
            raise Interrupted

        hook = self.model.model.layers[layer].mlp.register_forward_pre_hook(interrupt)
        try:
            getattr(self, kind)(*arguments)
        except Interrupted:
            pass
        else:
            raise AssertionError(f"{kind}: the module's error was lost")
        finally:
            hook.remove()

    def bad(self) -> None:
        """Calls that are refused: all is as before."""
        count = len(self.texts)
        for call in (
            lambda: prefill(self.model, [[1, VOCABULARY]]),
            lambda: prefill(self.model, [[1], [-1]]),
            lambda: prefill(self.model, [[1]], prefix=[(count, 0)]),
            lambda: prefill(self.model, [[1]], prefix=[(0, len(self.texts[0]) + 1)]),
            lambda: extend(self.model, [[1]] * (count + 1)),
            lambda: decode(self.model, [1] * (count + 1)),
            lambda: extend(self.model, [[]] * count),
            lambda: generate(self.model, [[1], []], 2),
        ):
            try:
                call()
            except ValueError:
                pass
            else:
                raise AssertionError("a bad call passed")
            self.check_blocks()

    def again(self) -> None:
        """Without PCP the model is the stock one; then PCP anew."""
        disable_pcp(self.model)
        text = [1, 2, 3]
        with torch.no_grad():
            logits = self.model(torch.tensor([text], device=self.model.device), use_cache=False).logits[0].cpu()
        self.stock.check("without PCP", logits, self.stock.logits(text))
        self.begin()

    def forward(
        self,
        texts: list[list[int]],
        side: str,
        turns: list[list[list[int]]],
        order: list[int] | None,
        crop: int | None,
        owned: bool,
        copied: bool,
    ) -> None:
        """Calls of the model itself with pads and a cache of their own, the caller's if ``owned``, whose blocks are free when it
        goes. Behind the first call it is reordered, and cropped to so many columns."""
        texts, cache = [list(text) for text in texts], DynamicCache() if owned else None
        mask = torch.zeros(len(texts), 0, dtype=torch.int64)
        for turn, new in enumerate([texts, *turns]):
            width = max(map(len, new))
            columns = [range(width - len(text), width) if side == "left" else range(len(text)) for text in new]
            ids, real = torch.zeros(len(new), width, dtype=torch.int64), torch.zeros(len(new), width, dtype=torch.int64)
            for row, (text, places) in enumerate(zip(new, columns, strict=True)):
                ids[row, list(places)], real[row, list(places)] = torch.tensor(text), 1
            mask = torch.cat([mask, real], dim=1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
            given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            given = {name: x.to(self.model.device) for name, x in given.items()}
            result = self.model(**given, past_key_values=cache, use_cache=True)
            if turn:
                texts = [old + text for old, text in zip(texts, new, strict=True)]
            self.check_new("forward", result.logits.cpu()[real.bool()], texts, new)
            cache = cache if owned else result.get("past_key_values", result.get("cache"))
            del result
            if copied:
                cache = copy.copy(cache)
            if order is not None and not turn:
                cache.reorder_cache(torch.tensor(order))
                texts, mask = [texts[i] for i in order], mask[order]
            if crop is not None and not turn:
                cache.crop(crop)
                mask = mask[:, :crop]
                texts = [text[:kept] for text, kept in zip(texts, mask.sum(1).tolist(), strict=True)]
            self.check_blocks(sum(-(-len(text) // BLOCK) for text in texts))


def check_transformers_walk(model, world, layout, split, actions) -> None:
    stock = Stock(model)

    def rank(group: Any) -> None:
        walker = Walker(stock, group, layout, split)
        for kind, *arguments in actions:
            getattr(walker, kind)(*arguments)
            walker.check_blocks()

    play(world, rank)


FAMILIES = [Family(draw_walk, check_transformers_walk)]
