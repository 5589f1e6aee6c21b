"""4-bit weights: read from bitsandbytes' parameters, decoded bit for bit, and in the layer."""

from unittest.mock import patch

import pytest
import torch
from bitsandbytes.nn import Params4bit
from hypothesis import given, settings
from hypothesis import strategies as st

from . import strategies
from .adapted import Quantization, assert_adapted_experts_agree, assert_decodes_to, decoded, every_byte
from .modules import Experts
from .oracle import RATIO, assert_close
from .problems import Problem

QUANTIZATIONS = [
    Quantization(),
    Quantization(nested=False),
    Quantization("fp4", blocksize=128),
    Quantization(blocksize=4096),
    Quantization("fp4", nested=False, blocksize=256),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
QUANTIZED = strategies.quantizations()


@pytest.fixture(params=QUANTIZATIONS, ids=repr)
def quantization(request) -> Quantization:
    return request.param


@pytest.mark.parametrize("problem", [Problem(H=64, I=128), Problem(T=9, E=3, H=256, I=64, imbalance="some_skipped")])
def test_the_layer_and_its_gradients_are_the_oracles(kernel, device, dtype, quantization, problem):
    assert_adapted_experts_agree(kernel, problem, device, dtype, quantization)


@settings(max_examples=100)
@given(strategies.even_problems(), st.sampled_from(DTYPES), QUANTIZED)
def test_any_problem_agrees_with_the_oracle(kernel, problem, dtype, quantization):
    assert_adapted_experts_agree(kernel, problem, "cpu", dtype, quantization)


@settings(max_examples=100)
@given(strategies.SEEDS, st.tuples(*map(st.integers, (1, 1, 1), (5, 40, 40))), st.sampled_from(DTYPES), QUANTIZED)
def test_any_stack_is_decoded_as_by_bitsandbytes(kernel, seed, sizes, dtype, quantization):
    E, N, half = sizes
    stack = torch.randn(E, N, 2 * half, generator=torch.Generator().manual_seed(seed))
    parameter = quantization.quantize(stack.to(dtype))
    assert_decodes_to(kernel.dequantize(kernel.four_bit_weight(parameter)), parameter, decoded(parameter, dtype))


def test_on_a_cpu_experts_that_no_token_chose_are_not_decoded(kernel):
    inputs = Problem(E=6, H=64, I=32).draw("cpu", torch.float32)
    index = torch.tensor([[1, 4]]).expand_as(inputs.top_k_index).contiguous()
    asked = []

    def recorded(weight, expert, dtype):
        asked.append(expert)
        return decode(weight, expert, dtype)

    decode = kernel.reference.dequantize_expert
    weights = [kernel.four_bit_weight(Quantization().quantize(w)) for w in (inputs.gate_up_proj, inputs.down_proj)]
    hidden = inputs.hidden_states.requires_grad_()
    with patch.object(kernel.reference, "dequantize_expert", recorded):
        kernel.fused_experts(hidden, index, inputs.top_k_weights, *weights).sum().backward()
    assert sorted(asked) == sorted([1, 4] * 4), "each of both projections once, forward and backward"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stack", [(3, 64, 128), (5, 33, 70), (1, 2, 2)], ids=str)
def test_dequantize_gives_the_numbers_of_bitsandbytes(kernel, device, quantization, dtype, stack):
    parameter = quantization.quantize(torch.randn(stack, dtype=dtype, device=device))
    assert_decodes_to(kernel.dequantize(kernel.four_bit_weight(parameter)), parameter, decoded(parameter, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_nibble_meets_every_scale(kernel, device, quant_type, dtype):
    parameter = every_byte(quant_type, nested=True, device=device)
    ref = decoded(parameter, dtype)
    assert_decodes_to(kernel.dequantize(kernel.four_bit_weight(parameter), dtype), parameter, ref)
    assert len(ref.unique()) > 1000


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_nibble_meets_scales_of_every_size(kernel, quant_type, dtype):
    """Rounded once from bitsandbytes' fp32: itself it may make 0 of subnormal numbers in bf16 on a CPU."""
    parameter = every_byte(quant_type, nested=False)
    ref = decoded(parameter, torch.float32).to(dtype)
    assert_decodes_to(kernel.dequantize(kernel.four_bit_weight(parameter), dtype), parameter, ref)


def test_weights_stored_as_another_dtype_are_the_same(kernel, device):
    parameter = Quantization().quantize(torch.randn(2, 64, 64, device=device))
    stored = Params4bit(
        parameter.data.flatten().view(torch.bfloat16), requires_grad=False, quant_state=parameter.quant_state
    )
    ours, theirs = (kernel.dequantize(kernel.four_bit_weight(p)) for p in (stored, parameter))
    assert torch.equal(ours, theirs)


def test_an_experts_module_in_4_bit_runs_as_the_dense_one_decoded(kernel, device):
    problem = Problem(H=64, I=64)
    inputs = problem.draw(device, torch.float32)
    module = Experts(inputs)
    for name in ("gate_up_proj", "down_proj"):
        setattr(module, name, Quantization().quantize(getattr(inputs, name)))
    assert kernel.unsupported_reason(module) is None
    ours = kernel.layers.Qwen3MoeExperts.forward(module, *inputs[:3])
    dense = (kernel.dequantize(w) for w in kernel.expert_weights(module)[:2])
    assert_close("output", kernel.fused_experts(*inputs[:3], *dense), ours, RATIO[torch.float32])


def test_a_parameter_that_lost_its_state_is_read_with_the_modules(kernel):
    """As FSDP gathers it: the same bytes in a plain parameter."""
    inputs = Problem(H=64, I=64).draw("cpu", torch.float32)
    module = Experts(inputs)
    stacks = {name: Quantization().quantize(getattr(inputs, name)) for name in ("gate_up_proj", "down_proj")}
    module.quant_states = {name: stack.quant_state for name, stack in stacks.items()}
    for name, stack in stacks.items():
        setattr(module, name, torch.nn.Parameter(stack.data.flatten().view(torch.bfloat16), requires_grad=False))
    weights = kernel.expert_weights(module)
    assert kernel.unsupported_reason(module) is None
    for name, stack in stacks.items():
        ours, theirs = (kernel.dequantize(x) for x in (getattr(weights, name), kernel.four_bit_weight(stack)))
        assert torch.equal(ours, theirs)


MISTAKES = [
    (dict(packed=lambda x: x[1:]), r"gate_up_proj.packed must be torch.uint8 of shape \(16384,\) .*, got .*16383"),
    (dict(packed=lambda x: x.float()), r"gate_up_proj.packed must be torch.uint8 .*, got torch.float32"),
    (dict(absmax=lambda x: x[:-1]), r"gate_up_proj.absmax must be torch.uint8 of shape \(512,\) .*, got .*511"),
    (dict(absmax=lambda x: x.float()), r"gate_up_proj.absmax must be torch.uint8 .*, got torch.float32"),
    (dict(code=lambda x: x[:8]), r"gate_up_proj.code must be torch.float32 of shape \(16,\)"),
    (dict(nested_absmax=lambda x: None), r"gate_up_proj.nested_absmax must be torch.float32 .*, got None"),
    (dict(nested_offset=lambda x: x[None]), r"gate_up_proj.nested_offset must be torch.float32 of shape \(\)"),
    (dict(nested_absmax=lambda x: x[:-1]), r"gate_up_proj.nested_absmax must be torch.float32 of shape \(2,\)"),
    (
        dict(absmax=lambda x: x.repeat_interleave(2)[::2]),
        r"gate_up_proj.absmax must be contiguous, got strides \(2,\)",
    ),
    (dict(blocksize=lambda x: 0), r"gate_up_proj.blocksize must be even and positive, got 0"),
    (dict(blocksize=lambda x: 63), r"gate_up_proj.blocksize must be even and positive, got 63"),
    (dict(quant_type=lambda x: "int4"), r"gate_up_proj.quant_type must be one of nf4, fp4, got 'int4'"),
    (dict(shape=lambda x: x[1:]), r"gate_up_proj must have a 3-D shape \(E, N, K\) .*, got \(128, 64\)"),
    (dict(shape=lambda x: (0, *x[1:])), r"gate_up_proj must have .* of sizes above 0, got \(0, 128, 64\)"),
    (dict(shape=lambda x: (4, 0, 64)), r"gate_up_proj must have .* of sizes above 0, got \(4, 0, 64\)"),
    (dict(shape=lambda x: (4, 128, 63)), r"gate_up_proj.shape must have an even last dimension"),
    (dict(nested_code=lambda x: x.to("meta")), r"gate_up_proj.nested_code must be on \w+(:0)? like gate_up_proj.pac"),
    (dict(shape=lambda x: (4, 256, 32)), r"gate_up_proj must have size 64 in dimension 2 \(H of hidden_states\)"),
]


@pytest.mark.parametrize(("spoil", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_statistics_that_do_not_fit_are_named(kernel, device, spoil, message):
    inputs = Problem(H=64, I=64).draw(device, torch.float32)
    gate_up = kernel.four_bit_weight(Quantization().quantize(inputs.gate_up_proj))
    kernel.fused_experts(*inputs[:3], gate_up, inputs.down_proj)
    gate_up = gate_up._replace(**{field: change(getattr(gate_up, field)) for field, change in spoil.items()})
    with pytest.raises(ValueError, match=message):
        kernel.fused_experts(*inputs[:3], gate_up, inputs.down_proj)


def test_dequantize_names_what_does_not_fit(kernel, device):
    weight = kernel.four_bit_weight(Quantization().quantize(torch.randn(2, 64, 64, device=device)))
    with pytest.raises(ValueError, match=r"weight.absmax must be torch.uint8 of shape \(128,\) .*, got .*127"):
        kernel.dequantize(weight._replace(absmax=weight.absmax[:-1]))
    with pytest.raises(TypeError, match=r"dtype must be one of torch.bfloat16, .*, got torch.float64"):
        kernel.dequantize(weight, torch.float64)


def test_what_is_not_packed_and_what_is_packed_are_not_confused(kernel):
    inputs = Problem(H=64, I=64).draw("cpu", torch.float32)
    packed = Quantization().quantize(inputs.gate_up_proj)
    kernel.fused_experts(*inputs[:3], kernel.four_bit_weight(packed), inputs.down_proj)
    with pytest.raises(
        TypeError, match=r"gate_up_proj is in 4 bit: pass four_bit_weight\(gate_up_proj\), got Params4bit"
    ):
        kernel.fused_experts(*inputs[:3], packed, inputs.down_proj)
    for parameter in (torch.nn.Parameter(inputs.down_proj), Params4bit(inputs.down_proj), None):
        kind = type(parameter).__name__
        with pytest.raises(
            TypeError, match=f"must be a Params4bit that is quantized, got {kind} without a quant_state"
        ):
            kernel.four_bit_weight(parameter)
    for weight in (inputs.down_proj, packed):
        with pytest.raises(TypeError, match=f"weight must be a FourBitWeight, .*, got {type(weight).__name__}"):
            kernel.dequantize(weight)


def test_4_bit_experts_stored_transposed_keep_their_own_forward(kernel):
    module = Experts(Problem(H=64, I=64).draw("cpu", torch.float32))
    module.gate_up_proj = Quantization().quantize(module.gate_up_proj.detach())
    module.is_transposed = True
    assert kernel.unsupported_reason(module) == "its gate_up_proj is in 4 bit and stored transposed"


def test_a_shape_may_be_a_list(kernel):
    """As it is when it comes from a file."""
    inputs = Problem(H=64, I=32).draw("cpu", torch.float32)
    weights = [kernel.four_bit_weight(Quantization().quantize(w)) for w in (inputs.gate_up_proj, inputs.down_proj)]
    want, got = (
        kernel.fused_experts(inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights, *stacks)
        for stacks in (weights, [weight._replace(shape=[*weight.shape]) for weight in weights])
    )
    assert torch.equal(want, got)
