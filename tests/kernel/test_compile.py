"""The ops as PyTorch sees them: schemas, fake results and autograd registrations; whole graphs with dynamic T."""

import importlib
from types import ModuleType

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from .adapted import Quantization
from .modules import Block, Experts, Router, with_forward
from .oracle import RATIO, assert_close
from .problems import SKIPPING, ExpertsInputs, LinearProblem, Problem


def op(kernel: ModuleType, file: str, name: str):
    """A registered op, as the package's file holds it."""
    return getattr(importlib.import_module(f"{kernel.__name__}.{file}"), name)


def plain(kernel: ModuleType, hidden_states, index, weights, gate_up_proj, down_proj, activation: str, save: bool):
    """The plain arguments of the op, for dense weights without adapters."""
    projection = importlib.import_module(f"{kernel.__name__}.projection").Projection
    flat = (*projection(gate_up_proj).flatten(), *projection(down_proj).flatten())
    return (hidden_states, index, weights, *flat, None, activation, save)


def crossed(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, stored with the last two dimensions crossed."""
    return tensor.transpose(-2, -1).contiguous().transpose(-2, -1)


@pytest.fixture(params=[False, True], ids=["contiguous", "transposed"])
def stored(request):
    """How floating inputs lie in memory."""
    return crossed if request.param else torch.clone


def test_opcheck_routing(kernel, device):
    index = Problem(imbalance="some_skipped").draw_index(device)
    for table in (index, index[:0], index.int()):
        torch.library.opcheck(op(kernel, "routing", "_routing"), (table, 4, 16))


def test_opcheck_linear_and_its_weight_gradient(kernel, device, stored):
    input, weight, m_sizes, grad = LinearProblem().draw(device, torch.float32)
    input, weight, grad = (stored(x).requires_grad_() for x in (input, weight, grad))
    torch.library.opcheck(op(kernel, "linear", "_linear"), (input, weight, m_sizes))
    torch.library.opcheck(op(kernel, "linear", "_weight_grad"), (grad, input, m_sizes))


@pytest.mark.kernels_ci
def test_opcheck_experts(kernel, device, stored):
    arguments = _arguments(Problem().draw(device, torch.float32), stored)
    torch.library.opcheck(op(kernel, "experts_op", "forward_op"), plain(kernel, *arguments, "silu", True))


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("imbalance", SKIPPING)
def test_opcheck_experts_as_trained_under_expert_parallelism(kernel, device, stored, imbalance):
    """The last check compares the outputs of two runs, and on a GPU nobody writes pre_activation rows of skipped slots;
    on a CPU they are zero."""
    arguments = _arguments(Problem(imbalance=imbalance).draw(device, torch.float32), stored)
    checks = CHECKS if device == "cpu" else CHECKS[:-1]
    inputs = plain(kernel, *arguments, "silu", True)
    torch.library.opcheck(op(kernel, "experts_op", "forward_op"), inputs, test_utils=checks)


def test_opcheck_experts_that_save_nothing(kernel, device):
    arguments = Problem(imbalance="some_skipped").draw(device, torch.float32)[:-1]
    torch.library.opcheck(op(kernel, "experts_op", "forward_op"), plain(kernel, *arguments, "gelu", False))


@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, True, True)])
def test_opcheck_experts_backward(kernel, device, stored, wanted):
    inputs = Problem(imbalance="some_skipped").draw(device, torch.float16)
    arguments = plain(kernel, *(x.detach() for x in _arguments(inputs, stored)), "silu", True)
    _, *saved = op(kernel, "experts_op", "forward_op")(*arguments)
    hidden, gate_up, down = wanted
    wanted = [hidden, True, gate_up, down, False, False, False, False]
    backward = op(kernel, "experts_op", "backward_op")
    torch.library.opcheck(backward, (stored(inputs.grad_output), *arguments[:-1], *saved, wanted))


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_one_graph_serves_every_number_of_tokens(kernel, device, training):
    problem = Problem()
    _assert_one_graph_serves(kernel, device, problem, Experts(problem.draw(device, torch.float32)), training)


@pytest.mark.parametrize("quantization", [Quantization(), Quantization("fp4", nested=False)], ids=repr)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_one_graph_serves_4_bit_experts(kernel, training, quantization):
    problem = Problem(H=64, I=32)
    experts = Experts(problem.draw("cpu", torch.float32))
    experts.gate_up_proj, experts.down_proj = (quantization.quantize(weight.data) for weight in experts.parameters())
    _assert_one_graph_serves(kernel, "cpu", problem, experts, training)


def test_a_dimension_marked_dynamic_stays_dynamic(kernel, device):
    hidden, index, weights, gate_up, down, _ = Problem(T=8).draw(device, torch.float32)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(kernel.fused_experts, fullgraph=True, backend=counter)
    for tokens in (8, 5, 3):
        arguments = [x[:tokens].clone() for x in (hidden, index, weights)]
        for x in arguments:
            torch._dynamo.mark_dynamic(x, 0)
        out = compiled(*arguments, gate_up, down)
        assert_close("compiled", kernel.fused_experts(*arguments, gate_up, down), out, RATIO[torch.float32])
    assert counter.frame_count == 1


def test_the_linear_layer_compiles_whole(kernel, device):
    input, weight, m_sizes, _ = LinearProblem().draw(device, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(kernel.moe_fused_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(input, weight, m_sizes), kernel.moe_fused_linear(input, weight, m_sizes))


def test_fake_tensors_tell_shapes_without_running(kernel):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        inputs = Problem(T=4096, k=8, E=128, H=2048, I=768).draw("cpu", torch.bfloat16)
        out = kernel.fused_experts(*inputs[:-1])
        assert out.shape == (4096, 2048) and out.dtype == torch.bfloat16


def _arguments(inputs: ExpertsInputs, stored) -> list[torch.Tensor]:
    return [stored(x).requires_grad_() if x.is_floating_point() else x for x in inputs[:-1]]


def _assert_one_graph_serves(kernel, device: str, problem: Problem, experts: Experts, training: bool) -> None:
    """Any number of tokens."""
    gate = Router(problem.H, problem.E, problem.k).to(device)
    block = with_forward(Block(gate, experts), kernel.layers.Qwen3MoeSparseMoeBlock)
    counter = CompileCounterWithBackend("inductor" if device == "cuda" else "aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    with torch.set_grad_enabled(training), torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (5, 12, 64, 33):
            _assert_compiled_is_eager(block, compiled, torch.randn(1, tokens, problem.H, device=device), training)
    assert counter.frame_count == 1


def _assert_compiled_is_eager(block: Block, compiled, tokens: torch.Tensor, training: bool) -> None:
    results = []
    for module in (block, compiled):
        leaf = tokens.detach().clone().requires_grad_(training)
        block.zero_grad()
        out = module(leaf)
        if training:
            out.square().sum().backward()
            results.append((out.detach(), leaf.grad, *(p.grad for p in block.parameters() if p.requires_grad)))
        else:
            results.append((out,))
    for eager, got in zip(*results):
        assert_close("compiled", eager, got, RATIO[torch.float32])
