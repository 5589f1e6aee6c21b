"""What CI checks: the build is the locked one, it is right, and it trains."""

import json

import torch
from moe_layer import LOCKFILE, experts, kernel


def inputs():
    torch.manual_seed(0)
    shapes = (7, 16), (7, 4), (4, 24, 16), (4, 16, 12)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def test_the_loaded_build_is_the_locked_one():
    (locked,) = json.loads(LOCKFILE.read_text())
    assert f"/snapshots/{locked['lock']['commit']}/" in kernel.__file__


def test_equal_to_a_loop_over_the_experts():
    hidden_states, router_logits, gate_up, down = inputs()
    weights, index = router_logits.softmax(-1).topk(2)
    expected = torch.zeros_like(hidden_states)
    for expert in range(4):
        gate, up = (hidden_states @ gate_up[expert].T).chunk(2, -1)
        share = (weights * (index == expert)).sum(-1, keepdim=True)
        expected = expected + share * (torch.nn.functional.silu(gate) * up @ down[expert].T)
    torch.testing.assert_close(experts(hidden_states, router_logits, gate_up, down), expected)


def test_trains_router_and_experts():
    tensors = inputs()
    experts(*tensors).square().sum().backward()
    assert all(tensor.grad.abs().sum() > 0 for tensor in tensors)
