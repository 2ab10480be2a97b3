"""Word problems are right, the same everywhere and new to who learned from the training's; their tokens give the text back."""

import os
import random
import re
import subprocess
import sys

import pytest

from pcp_mla.evaluation import problems

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)\.")
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
FIRST = (
    "Question: There are 24 marbles on the desk of Bianca. Then she shares them equally among 2 people and keeps one share."
    " She shares them equally among 4 people and keeps one share. What is the number of marbles that Bianca has now?"
    " Answer: 24 / 2 = 12. 12 / 4 = 3. #### 3 <end>"
)


def draw(count=300, **style):
    return [problems.make_problem(random.Random(f"test/{index}"), **style) for index in range(count)]


@pytest.fixture(scope="module")
def items():
    return problems.evaluation_items(300)


@pytest.mark.parametrize("fillers", [0, 5, 14])
def test_solutions_are_chains_of_true_equations(fillers):
    steps = set()
    for problem in draw(fillers=fillers):
        equations = EQUATION.findall(problem.solution)
        steps.add(len(equations))
        before = None
        for left, operation, right, result in equations:
            assert OPERATIONS[operation](int(left), int(right)) == int(result)
            assert operation != "/" or int(left) % int(right) == 0
            assert 2 <= int(result) <= problems.LARGEST
            assert before in (None, left)
            before = result
        written = " ".join(f"{a} {operation} {b} = {c}." for a, operation, b, c in equations)
        assert problem.solution == f"{written} #### {problem.answer}"
        assert before == str(problem.answer)
    assert steps == {2, 3, 4, 5, 6}


def test_the_story_tells_each_operand_in_order():
    for problem in draw(shortest=3, fillers=0):
        told = [int(number) for number in re.findall(r"\d+", problem.question)]
        equations = EQUATION.findall(problem.solution)
        operands = [int(equations[0][0])] + [int(right) for _, _, right, _ in equations]
        packed = ("boxes with", "bags with")  # these tell the factor first
        assert told == operands or any(word in problem.question for word in packed) or "from each of" in problem.question
        assert sorted(told) == sorted(operands)
        assert len(set(operands)) == len(operands)


def test_fillers_only_lengthen_the_story():
    for few, many in zip(draw(50, fillers=0), draw(50, fillers=9), strict=True):
        assert (few.solution, few.answer) == (many.solution, many.answer)
        assert many.question.count(".") == few.question.count(".") + 9


def test_text_comes_back_from_its_tokens(items):
    texts = [problem.text for problem in draw()] + [problems.decode(item.prompt_ids) for item in items[:20]]
    for text in texts:
        ids = problems.encode(text)
        assert problems.decode(ids) == text
        assert problems.encode(problems.decode(ids)) == ids


def test_tokens():
    assert len(set(problems.VOCABULARY)) == len(problems.VOCABULARY) < 256
    assert problems.VOCABULARY[problems.PAD] == "<pad>"
    assert problems.VOCABULARY[problems.END] == "<end>"
    tokens = [problems.VOCABULARY[index] for index in problems.encode("Mira has 120 beads. <end>")]
    assert tokens == ["Mira", "has", "1", "2", "0", "beads", ".", "<end>"]
    assert problems.decode([]) == ""


@pytest.mark.parametrize("text", ["Mira has 3 dragons.", "mira", "Mira  has", "", "beads .", "beads..", "-3", "٣", "Mira\nhas"])
def test_unknown_words(text):
    with pytest.raises(ValueError, match="no word of the vocabulary"):
        problems.encode(text)


def test_numbers_side_by_side():
    with pytest.raises(ValueError, match="between two numbers, the second is '5'"):
        problems.encode("Mira has 12 5 beads.")


@pytest.mark.parametrize("index", [-1, len(problems.VOCABULARY)])
def test_unknown_ids(index):
    with pytest.raises(ValueError, match=f"got {index}"):
        problems.decode([index])


@pytest.mark.parametrize(
    "style", [{"shortest": 0}, {"shortest": 4, "longest": 3}, {"longest": 7}, {"fillers": -1}, {"fillers": 15}]
)
def test_styles_out_of_range(style):
    with pytest.raises(ValueError, match="make_problem: steps must be in"):
        problems.make_problem(random.Random(0), **style)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 3 = 5. #### 5 <end>", 5),
        ("#### 017", 17),
        ("#### 12. #### 13", 12),
        ("#### 0 <end> <pad> <pad>", 0),
        ("2 + 3 = 5.", None),
        ("2 + 3 = 5. <end> #### 5", None),
        ("####", None),
        ("#### ? 5", None),
        ("", None),
    ],
)
def test_parse_answer(text, answer):
    assert problems.parse_answer(text) == answer


def test_items(items):
    lengths = sorted(len(item.prompt_ids) for item in items)
    assert problems.SHORTEST_PROMPT <= lengths[0] < 400
    assert 1400 < lengths[-1] <= problems.LONGEST_PROMPT
    assert len(set(lengths)) > 200
    for item in items:
        prompt = problems.decode(item.prompt_ids)
        assert prompt.count("Question:") == prompt.count("Answer:") == problems.EXAMPLES + 1
        assert prompt.count("####") == prompt.count("<end>") == problems.EXAMPLES
        assert prompt.endswith("? Answer:")
        assert problems.parse_answer(item.solution) == item.answer


def test_seeds_give_the_same_problems_in_every_process(items):
    assert problems.make_problem(random.Random("test/first"), 2, 2, 0).text == FIRST
    assert problems.evaluation_items(3) == items[:3]
    assert problems.evaluation_items(3, seed=1) != items[:3]
    code = "from pcp_mla.evaluation import problems; print(problems.evaluation_items(2), problems.VOCABULARY)"
    environment = os.environ | {"PYTHONHASHSEED": "1"}  # this process has another
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == f"{items[:2]} {problems.VOCABULARY}", done.stderr


def test_training_problems_share_a_style_and_none_with_the_items(items):
    trained = [problems.training_problems(0, str(index), 1600) for index in range(300)]
    assert trained[0] == problems.training_problems(0, "0", 1600)
    assert trained[0] != problems.training_problems(1, "0", 1600)
    for row in trained[:20]:
        counts = [len(EQUATION.findall(problem.solution)) for problem in row]
        assert max(counts) - min(counts) <= 2
        assert sum(len(problems.encode(problem.text)) for problem in row) >= 1600
    questions = {problem.question for row in trained for problem in row}
    assert len(questions) > 3000
    for item in items:
        asked = re.findall(r"Question: (.*?) Answer:", problems.decode(item.prompt_ids))
        assert questions.isdisjoint(asked)
