"""Ties between experts are broken as the stock model breaks them, and only ties."""

from types import SimpleNamespace

import pytest
import torch

from pcp_mla.demo.routing import RecordRouting, Routing, chosen_apart, rounding_share


class Router(torch.nn.Module):
    """Returns the scores that it is called with, and the best two experts with their scores as weights."""

    def forward(self, scores):
        weights, experts = scores.topk(2)
        return scores, weights, experts


def model(layers):
    return SimpleNamespace(
        model=SimpleNamespace(layers=[SimpleNamespace(mlp=SimpleNamespace(gate=Router())) for _ in range(layers)])
    )


def run(scores, stock=None, tie=0.0):
    routed = model(1)
    with RecordRouting(routed, stock, tie) as record:
        out = routed.model.layers[0].mlp.gate(scores)
    assert not routed.model.layers[0].mlp.gate._forward_hooks
    return out, record


def test_choices_apart():
    scores = torch.tensor([[4.0, 3.0, 2.5, 0.0], [1.0, 2.0, 3.0, 4.0]])
    ours, theirs = torch.tensor([[0, 1], [3, 2]]), torch.tensor([[2, 0], [2, 3]])
    assert chosen_apart(scores, ours, theirs).tolist() == [0.5, 0.0]


def test_a_tie_is_broken_as_in_the_stock_model():
    stock_scores = torch.tensor([[8.0, 3.0000010, 3.0], [1.0, 2.0, 8.0]])
    scores = torch.tensor([[8.0, 3.0, 3.0000010], [1.0, 2.0, 8.0], [5.0, 1.0, 2.0]])  # the last row pads
    (_, weights, experts), stock = run(stock_scores)
    (_, our_weights, our_experts), record = run(scores, Routing([experts], [weights]), tie=1e-6)
    assert our_experts.tolist() == [[0, 1], [2, 1], [0, 2]]
    assert our_weights[:2].tolist() == weights.tolist()
    assert record.ties == 1
    assert stock.ties == 0


def test_what_is_no_tie_stays():
    (_, weights, experts), _ = run(torch.tensor([[8.0, 3.1, 3.0]]))
    (_, _, ours), record = run(torch.tensor([[8.0, 3.0, 3.1]]), Routing([experts], [weights]), tie=1e-3)
    assert ours.tolist() == [[0, 2]]
    assert record.ties == 0


def test_rows_of_a_rank():
    routing = Routing([torch.tensor([[1], [2], [3]])], [torch.tensor([[0.1], [0.2], [0.3]])])
    part = routing.rows(torch.tensor([2, 0]))
    assert part.experts[0].tolist() == [[3], [1]]
    assert part.weights[0].flatten().tolist() == pytest.approx([0.3, 0.1])


def test_rounding_share_is_small_but_above_rounding():
    assert torch.finfo(torch.float32).eps * 8 == rounding_share(1, 1, torch.float32)[0]
    assert rounding_share(4, 256, torch.float32)[0] < 1e-4
    assert torch.finfo(torch.bfloat16).eps < rounding_share(4, 256, torch.bfloat16)[0] < 2**-4
