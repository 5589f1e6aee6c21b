"""4-bit experts on a GPU: every way to multiply them, in bf16, against the oracle and against itself."""

import pytest
import torch

from ..adapted import Quantization, assert_adapted_experts_agree, decoded
from ..problems import Problem
from .runs import no_host_waits

pytestmark = pytest.mark.gpu

WAYS = ["fast", "plain", "dequantize"]
QUANTIZATIONS = [
    (Quantization(), torch.bfloat16),
    (Quantization("fp4", nested=False, blocksize=128), torch.float16),
]
SIZES = dict(k=2, E=8, H=256, I=384)
PROBLEMS = [  # so many rows per expert that each entry of the tables is used
    Problem(T=7, **SIZES),
    Problem(T=18, **SIZES),
    Problem(T=33, **SIZES, imbalance="some_skipped"),
    Problem(T=120, **SIZES),
    Problem(T=700, **SIZES),
    Problem(T=2000, **SIZES, imbalance="one_takes_all"),
]


@pytest.mark.parametrize(("quantization", "dtype"), QUANTIZATIONS, ids=repr)
@pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
@pytest.mark.parametrize("name", WAYS)
def test_the_layer_and_its_gradients_are_the_oracles(kernel, way, name, problem, quantization, dtype):
    way(name)
    assert_adapted_experts_agree(kernel, problem, "cuda", dtype, quantization)


@pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
def test_decoded_in_registers_forty_runs_are_one(kernel, way, problem):
    """A product that is still in flight when the next decode overwrites its registers would show here."""
    way("fast")
    inputs = problem.draw("cuda", torch.bfloat16)
    weights = [kernel.four_bit_weight(Quantization().quantize(w)) for w in (inputs.gate_up_proj, inputs.down_proj)]
    hidden_states = inputs.hidden_states.requires_grad_()

    def run():
        out = kernel.fused_experts(hidden_states, *inputs[1:3], *weights)
        return out, *torch.autograd.grad(out, hidden_states, inputs.grad_output)

    first = run()
    for _ in range(40):
        assert all(map(torch.equal, first, run()))


@pytest.mark.parametrize("quantization", [quantization for quantization, _ in QUANTIZATIONS], ids=repr)
@pytest.mark.parametrize("tokens", [1, 3])
def test_slots_one_by_one_are_as_good_as_sorted(kernel, quantization, tokens, dtype):
    problem = Problem(T=tokens, **SIZES, imbalance="some_skipped" if tokens > 1 else "random")
    inputs = problem.draw("cuda", dtype)
    parameters = [quantization.quantize(w) for w in (inputs.gate_up_proj, inputs.down_proj)]
    with torch.no_grad():
        out = kernel.fused_experts(*inputs[:3], *map(kernel.four_bit_weight, parameters))
        ref = kernel.fused_experts(*inputs[:3], *(decoded(p, dtype) for p in parameters))
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(out, ref, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tokens", [1, 40])
def test_the_layer_runs_in_a_cuda_graph(kernel, tokens):
    inputs = Problem(T=tokens, **SIZES).draw("cuda", torch.bfloat16)
    weights = [kernel.four_bit_weight(Quantization().quantize(w)) for w in (inputs.gate_up_proj, inputs.down_proj)]
    with torch.no_grad():
        expected = kernel.fused_experts(*inputs[:3], *weights)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = kernel.fused_experts(*inputs[:3], *weights)
        out.zero_()
        graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("shape", [(1, 4096, 2048), (1, 512, 2048), (2, 33, 70)], ids=str)
def test_a_stack_is_decoded_in_one_launch_for_which_nobody_waits(kernel, shape):
    weight = kernel.four_bit_weight(Quantization().quantize(torch.randn(shape, dtype=torch.bfloat16, device="cuda")))
    kernel.dequantize(weight)  # compiles
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        with no_host_waits():
            kernel.dequantize(weight)
        torch.cuda.synchronize()
    assert [(event.key, event.count) for event in recorded.key_averages() if event.self_device_time_total] == [
        ("_dequantize_kernel", 1)
    ]


def test_a_graph_decodes_what_is_packed_when_it_is_replayed(kernel):
    stacks = torch.randn(2, 1, 512, 2048, dtype=torch.bfloat16, device="cuda")
    weight, other = (kernel.four_bit_weight(Quantization().quantize(stack)) for stack in stacks)
    kernel.dequantize(weight)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel.dequantize(weight)
    for tensor, new in zip(weight[:6], other[:6]):
        tensor.copy_(new)
    graph.replay()
    assert torch.equal(out, kernel.dequantize(other))
