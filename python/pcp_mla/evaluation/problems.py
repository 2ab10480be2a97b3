"""Seeded word problems with worked solutions, and the word-level tokenizer for them.

A problem tells what happens to the number of things that somebody has, one sentence a change, between sentences that do not
matter. The solution is one equation a change. An evaluation item is five solved problems and the question of a sixth.

Every generator is a ``random.Random`` seeded with a text, which Python hashes with SHA-512: ``evaluation/...`` for items,
``training/...`` for what a model learns from. So the two never share a seed, and nothing depends on the process.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import lru_cache

EXAMPLES = 5
SHORTEST_PROMPT, LONGEST_PROMPT = 300, 1500  # tokens of an item's prompt
LARGEST = 199  # of all numbers of a solution: few enough sums for a small model to learn
MOST_STEPS, MOST_FILLERS = 6, 14

_PRONOUNS = {"f": ("She", "she", "her", "her"), "m": ("He", "he", "his", "him")}
_WOMEN = ("Alma", "Bianca", "Clara", "Dora", "Edith", "Greta", "Helen", "Ida", "Jana", "Lena", "Mira", "Nora", "Olga", "Petra")
_MEN = ("Adam", "Bruno", "Carl", "David", "Emil", "Felix", "Georg", "Hugo", "Ivan", "Jonas", "Karl", "Leo", "Max", "Oscar", "Paul")
_THINGS = (
    *("apples", "beads", "buttons", "cards", "coins", "eggs", "flags", "kites", "lemons", "magnets", "marbles", "nuts"),
    *("pears", "pencils", "plums", "shells", "spoons", "stamps", "stickers", "tickets", "tiles", "tulips"),
)
_PLACES = ("beach", "garden", "harbor", "library", "market", "museum", "park", "school", "station", "village")
_OPENINGS = ("", "", "", "Then ", "Next ", "Later ", "After lunch ", "In the evening ", "A week later ")
_STARTS = (
    "{name} has {n} {things}.",
    "{name} starts with {n} {things}.",
    "There are {n} {things} on the desk of {name}.",
    "{name} counts {n} {things} at home.",
)
_PACKED_STARTS = (
    "{name} buys {m} boxes with {n} {things} in each.",
    "{name} fills {m} bags with {n} {things} each.",
    "{name} gets {n} {things} from each of {m} cousins.",
)
_CHANGES = {
    "+": (
        "{who} finds {n} more.",
        "{who} buys {n} {things} at the {place}.",
        "{who} wins {n} {things} in a game.",
        "{friend} gives {him} {n} {things}.",
        "{friend} sends {him} {n} more.",
    ),
    "-": (
        "{who} gives {n} {things} to {friend}.",
        "{who} loses {n} of them.",
        "{who} sells {n} {things} at the {place}.",
        "{who} lends {n} to {his} brother.",
        "{friend} takes {n} {things} away.",
    ),
    "*": (
        "{who} works hard until there are {n} times as many.",
        "{the} number of {things} grows {n} times as large.",
        "{who} trades each of them for {n} others.",
    ),
    "/": (
        "{who} shares them equally among {n} people and keeps one share.",
        "{who} makes {n} equal piles and keeps only one pile.",
        "{the} {things} are split equally into {n} parts and only one part is left.",
    ),
}
_FILLERS = (
    "The weather is warm and sunny.",
    "The bus to the {place} is late again.",
    "{friend} lives {n} miles away from the {place}.",
    "{friend} also has {n} {other} in a drawer.",
    "{who} walks to the {place} for {n} minutes.",
    "The {place} opens {n} minutes later than usual.",
    "A cousin of {friend} is {n} years old.",
    "It rains for {n} hours and the street is wet.",
    "{friend} does not like {other} at all.",
    "{who} reads {n} pages of a long book.",
    "There is a lot of noise near the {place}.",
    "A dog runs after {friend} and barks {n} times.",
    "{friend} wants to talk about the {place} and the weather.",
    "Nobody at the {place} sells {other} today.",
)
_QUESTIONS = (
    "How many {things} does {name} have now?",
    "How many {things} are left in the end?",
    "What is the number of {things} that {name} has now?",
)

PAD_TEXT, END_TEXT, MARK = "<pad>", "<end>", "####"
_SENTENCES = (*_OPENINGS, *_STARTS, *_PACKED_STARTS, *(s for kind in _CHANGES.values() for s in kind), *_FILLERS, *_QUESTIONS)
_WORDS = set(re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", "", " ".join(_SENTENCES))))
_WORDS |= {"Question", "Answer", "The", "the", *_WOMEN, *_MEN, *_THINGS, *_PLACES}
_WORDS |= {word for words in _PRONOUNS.values() for word in words}
VOCABULARY: tuple[str, ...] = (PAD_TEXT, END_TEXT, *"0123456789", *"+-*/=.,?:", MARK, *sorted(_WORDS))
_IDS = {token: index for index, token in enumerate(VOCABULARY)}
PAD, END = _IDS[PAD_TEXT], _IDS[END_TEXT]
_WORD = re.compile(rf"({MARK}|{PAD_TEXT}|{END_TEXT}|[A-Za-z]+|\d+|[-+*/=])([.,?:]?)", re.ASCII)


@dataclass(frozen=True)
class Problem:
    """A question, its worked solution, which ends in ``#### answer``, and the answer."""

    question: str
    solution: str
    answer: int

    @property
    def text(self) -> str:
        """Question and solution as they stand in a prompt, with the end token."""
        return f"Question: {self.question} Answer: {self.solution} {END_TEXT}"


@dataclass(frozen=True)
class Item:
    """A prompt of five solved problems and a question, and what a model should continue it with."""

    prompt_ids: list[int]
    solution: str
    answer: int


@lru_cache(maxsize=4096)
def _encode_word(word: str) -> tuple[int, ...]:
    match = _WORD.fullmatch(word)
    if match is None:
        raise ValueError(f"encode: {word!r} is no word of the vocabulary")
    body, mark = match.groups()
    tokens = [*(body if body.isdigit() else [body]), *mark]
    if tokens[0] not in _IDS:
        raise ValueError(f"encode: {word!r} is no word of the vocabulary")
    return tuple(_IDS[token] for token in tokens)


def encode(text: str) -> list[int]:
    """Tokens of words that single spaces separate; a number is one token a digit, and a mark behind a word one of its own.

    Raises ValueError for a word outside ``VOCABULARY``, and for two numbers side by side, whose digits would run together."""
    ids: list[int] = []
    for word in text.split(" "):
        pieces = _encode_word(word)
        if ids and VOCABULARY[ids[-1]].isdigit() and VOCABULARY[pieces[0]].isdigit():
            raise ValueError(f"encode: no word stands between two numbers, the second is {word!r}")
        ids += pieces
    return ids


def decode(ids: list[int]) -> str:
    """The text of tokens: ``decode(encode(text)) == text``. Digits side by side are one number. ValueError for an unknown id."""
    text, after_digit = "", False
    for index in ids:
        if not 0 <= index < len(VOCABULARY):
            raise ValueError(f"decode: ids must be in [0, {len(VOCABULARY)}), got {index}")
        token = VOCABULARY[index]
        joins = token in ".,?:" or (after_digit and token.isdigit())
        text += token if joins or not text else " " + token
        after_digit = token.isdigit()
    return text


def parse_answer(text: str) -> int | None:
    """The number behind the first ``####`` of a continuation, before its end token; None if there is none."""
    match = re.search(rf"{MARK} (\d+)", text.partition(END_TEXT)[0], re.ASCII)
    return int(match[1]) if match else None


def _change(rng: random.Random, total: int, used: set[int]) -> tuple[str, int, int]:
    """An operation, its operand and its result. No number of a problem comes back as an operand, so that each has one place."""
    while True:
        operation = rng.choice("+++---**//")
        n = rng.randint(2, 30) if operation in "+-" else rng.randint(2, 5)
        result = {"+": total + n, "-": total - n, "*": total * n, "/": total // n}[operation]
        if n not in used and 2 <= result <= LARGEST and (operation != "/" or total % n == 0):
            return operation, n, result


def make_problem(rng: random.Random, shortest: int = 2, longest: int = MOST_STEPS, fillers: int = 4) -> Problem:
    """A problem of ``shortest`` to ``longest`` steps with so many sentences that do not matter.

    Raises ValueError unless 1 <= shortest <= longest <= 6 and 0 <= fillers <= 14."""
    if not 1 <= shortest <= longest <= MOST_STEPS or not 0 <= fillers <= MOST_FILLERS:
        raise ValueError(
            f"make_problem: steps must be in [1, {MOST_STEPS}] and fillers in [0, {MOST_FILLERS}],"
            f" got {shortest} to {longest} steps and {fillers} fillers"
        )
    kind, ours, others = rng.choice((("f", _WOMEN, _MEN), ("m", _MEN, _WOMEN)))
    name = rng.choice(ours)
    friend, stranger = rng.sample(others, 2)  # never whom "she" or "he" means
    things, other = rng.sample(_THINGS, 2)
    subject, small_subject, his, him = _PRONOUNS[kind]
    fields = {"name": name, "things": things, "other": other, "his": his, "him": him}

    def tell(template: str, opening: str = "", friend: str = friend, **numbers: int) -> str:
        who, the = (small_subject, "the") if opening else (subject, "The")
        return opening + template.format(**fields, **numbers, who=who, the=the, place=rng.choice(_PLACES), friend=friend)

    steps = rng.randint(shortest, longest)
    total, equations = rng.randint(5, 60), []
    used = {total}
    if rng.random() < 0.25:
        m = rng.choice([n for n in range(2, 6) if n != total])
        total = min(total, LARGEST // m)
        used = {total, m}
        story = [tell(rng.choice(_PACKED_STARTS), m=m, n=total)]
        equations.append(f"{m} * {total} = {m * total}.")
        total *= m
    else:
        story = [tell(rng.choice(_STARTS), n=total)]
    while len(equations) < steps:
        operation, n, result = _change(rng, total, used)
        used.add(n)
        story.append(tell(rng.choice(_CHANGES[operation]), rng.choice(_OPENINGS), n=n))
        equations.append(f"{total} {operation} {n} = {result}.")
        total = result
    for template in rng.sample(_FILLERS, fillers):
        story.insert(rng.randint(1, len(story)), tell(template, friend=stranger, n=rng.randint(2, 60)))
    story.append(tell(rng.choice(_QUESTIONS)))
    return Problem(" ".join(story), f"{' '.join(equations)} {MARK} {total}", total)


def draw_style(rng: random.Random) -> dict[str, int]:
    """Arguments of ``make_problem`` that the problems of a prompt share: short ones stand together, and long ones."""
    longest = rng.randint(2, MOST_STEPS)
    return {"shortest": max(2, longest - 2), "longest": longest, "fillers": rng.randint(0, MOST_FILLERS)}


def make_item(rng: random.Random) -> Item:
    """An evaluation item with a prompt of 300 to 1500 tokens."""
    while True:
        style = draw_style(rng)
        *examples, last = [make_problem(rng, **style) for _ in range(EXAMPLES + 1)]
        prompt = " ".join([*(problem.text for problem in examples), f"Question: {last.question} Answer:"])
        prompt_ids = encode(prompt)
        if SHORTEST_PROMPT <= len(prompt_ids) <= LONGEST_PROMPT:
            return Item(prompt_ids, last.solution, last.answer)


def evaluation_items(count: int, seed: int = 0) -> list[Item]:
    """The first ``count`` items of a seed; item i does not depend on the count."""
    return [make_item(random.Random(f"evaluation/{seed}/{index}")) for index in range(count)]


def training_problems(seed: int, part: str, tokens: int) -> list[Problem]:
    """Problems of one style, as a prompt has them, that fill so many tokens; ``part`` tells draws of a seed apart."""
    rng = random.Random(f"training/{seed}/{part}")
    style, problems, length = draw_style(rng), [], 0
    while length < tokens:
        problems.append(make_problem(rng, **style))
        length += len(encode(problems[-1].text))
    return problems
