"""Bad input: each mistake is an error that names the argument, what it got and what it wants.

Values live on the device, so only the CPU backend looks at them; what a GPU does with bad ones is in ``gpu/``.
"""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from .agreement import assert_sums_over_nothing_are_zero
from .problems import NOTHING, LinearProblem, Problem

LINEAR_ERRORS = [
    ("input", lambda x: x.flatten(), ValueError, r"input must have shape \(M, K\), got \(464,\)"),
    ("input", lambda x: x.tolist(), TypeError, r"input must be a tensor of shape \(M, K\), got list"),
    ("input", lambda x: x.long(), TypeError, r"input must be one of .*float32.*, got torch.int64"),
    ("input", lambda x: x.to(torch.complex64), TypeError, r"input must be one of .*, got torch.complex64"),
    (
        "input",
        lambda x: x[:, 1:],
        ValueError,
        r"weight must have size 15 in dimension 2 \(K of input\), got .*24, 16\)",
    ),
    ("weight", lambda x: x[0], ValueError, r"weight must have shape \(E, N, K\), got \(24, 16\)"),
    ("weight", lambda x: x.half(), TypeError, r"weight must be torch.float32 like input, got torch.float16"),
    ("weight", lambda x: x.to("meta"), ValueError, r"weight must be on \w+(:0)? like input, got meta"),
    ("m_sizes", lambda x: x[None], ValueError, r"m_sizes must have shape \(E,\), got \(1, 4\)"),
    ("m_sizes", lambda x: x.float(), TypeError, r"m_sizes must be one of torch.int32, torch.int64, got torch.float32"),
    ("m_sizes", lambda x: x.to(torch.int8), TypeError, r"m_sizes must be one of .*, got torch.int8"),
    ("m_sizes", lambda x: x > 0, TypeError, r"m_sizes must be one of .*, got torch.bool"),
    ("m_sizes", lambda x: x.tolist(), TypeError, r"m_sizes must be a tensor of shape \(E,\), got list"),
    ("m_sizes", lambda x: x[1:], ValueError, r"m_sizes must have size 4 in dimension 0 \(E of weight\), got .*\(3,\)"),
    ("m_sizes", lambda x: x.to("meta"), ValueError, r"m_sizes must be on \w+(:0)? like input, got meta"),
]

EXPERTS_ERRORS = [
    ("hidden_states", lambda x: x[None], ValueError, r"hidden_states must have shape \(T, H\), got \(1, 32, 24\)"),
    ("hidden_states", lambda x: None, TypeError, r"hidden_states must be a tensor .*, got NoneType"),
    ("hidden_states", lambda x: x.int(), TypeError, r"hidden_states must be one of .*, got torch.int32"),
    ("hidden_states", lambda x: x[:, :-1], ValueError, r"gate_up_proj must have size 23 in dimension 2 \(H of hidden"),
    ("top_k_index", lambda x: x[0], ValueError, r"top_k_index must have shape \(T, k\), got \(2,\)"),
    ("top_k_index", lambda x: x.float(), TypeError, r"top_k_index must be one of torch.int32, .*, got torch.float32"),
    ("top_k_index", lambda x: x[1:], ValueError, r"top_k_index must have size 32 in dimension 0 \(T of hidden_states"),
    ("top_k_index", lambda x: x[:, :1], ValueError, r"top_k_weights must have size 1 in dimension 1 \(k of top_k_ind"),
    ("top_k_index", lambda x: x.to("meta"), ValueError, r"top_k_index must be on \w+(:0)? like hidden_.*, got meta"),
    ("top_k_weights", lambda x: x.flatten(), ValueError, r"top_k_weights must have shape \(T, k\), got \(64,\)"),
    ("top_k_weights", lambda x: x.long(), TypeError, r"top_k_weights must be one of .*, got torch.int64"),
    ("top_k_weights", lambda x: x[1:], ValueError, r"top_k_weights must have size 32 in dimension 0 \(T of hidden"),
    ("top_k_weights", lambda x: x.to("meta"), ValueError, r"top_k_weights must be on \w+(:0)? like hid.*, got meta"),
    ("gate_up_proj", lambda x: x[0], ValueError, r"gate_up_proj must have shape \(E, 2I, H\), got \(32, 24\)"),
    (
        "gate_up_proj",
        lambda x: x.half(),
        TypeError,
        r"gate_up_proj must be torch.float32 like hid.*, got torch.float16",
    ),
    ("gate_up_proj", lambda x: x[:, 1:], ValueError, r"gate_up_proj must have size 32 in dimension 1 \(twice I of do"),
    ("gate_up_proj", lambda x: x.to("meta"), ValueError, r"gate_up_proj must be on \w+(:0)? like hid.*, got meta"),
    ("down_proj", lambda x: x[0], ValueError, r"down_proj must have shape \(E, H, I\), got \(24, 16\)"),
    ("down_proj", lambda x: x.double(), TypeError, r"down_proj must be torch.float32 like hid.*, got torch.float64"),
    ("down_proj", lambda x: x[1:], ValueError, r"down_proj must have size 4 in dimension 0 \(E of gate_up_proj\)"),
    ("down_proj", lambda x: x[:, 1:], ValueError, r"down_proj must have size 24 in dimension 1 \(H of hidden_states"),
    ("down_proj", lambda x: x.to("meta"), ValueError, r"down_proj must be on \w+(:0)? like hid.*, got meta"),
]


def _named(errors: list[tuple]) -> list:
    return [pytest.param(*error, id=error[-1].replace("\\", "")) for error in errors]


@pytest.mark.kernels_ci
@pytest.mark.parametrize(("argument", "spoil", "error", "message"), _named(LINEAR_ERRORS))
def test_moe_fused_linear_names_the_mistake(kernel, device, argument, spoil, error, message):
    inputs = LinearProblem().draw(device, torch.float32)._asdict()
    del inputs["grad_output"]
    inputs[argument] = spoil(inputs[argument])
    with pytest.raises(error, match=message):
        kernel.moe_fused_linear(**inputs)


@pytest.mark.kernels_ci
@pytest.mark.parametrize(("argument", "spoil", "error", "message"), _named(EXPERTS_ERRORS))
def test_fused_experts_names_the_mistake(kernel, device, argument, spoil, error, message):
    """Whether or not it has seen the other arguments pass."""
    inputs = Problem().draw(device, torch.float32)._asdict()
    del inputs["grad_output"]
    kernel.fused_experts(**inputs)
    inputs[argument] = spoil(inputs[argument])
    with pytest.raises(error, match=message):
        kernel.fused_experts(**inputs)


@pytest.mark.parametrize(
    ("argument", "spoil", "error", "message"),
    [
        ("hidden_states", lambda x: x.int(), TypeError, r"hidden_states must be one of .*, got torch.int32"),
        ("gate_up_proj", lambda x: x.int(), TypeError, r"gate_up_proj must be one of .*, got torch.int32"),
        ("down_proj", lambda x: None, TypeError, r"down_proj must be a tensor of shape \(E, H, I\), got NoneType"),
    ],
)
def test_autocast_hides_no_mistake(kernel, device, argument, spoil, error, message):
    inputs = Problem().draw(device, torch.float32)._asdict()
    del inputs["grad_output"]
    inputs[argument] = spoil(inputs[argument])
    with torch.autocast(device, torch.bfloat16), pytest.raises(error, match=message):
        kernel.fused_experts(**inputs)


def test_on_no_device_results_have_their_shape(kernel):
    inputs = Problem().draw("cpu", torch.float32)._asdict()
    del inputs["grad_output"]
    out = kernel.fused_experts(**{name: x.to("meta") for name, x in inputs.items()})
    assert out.is_meta and out.shape == inputs["hidden_states"].shape


@pytest.mark.parametrize("activation", ["relu", "SiLU", "", None, ["silu"]])
def test_an_activation_it_does_not_know_is_refused(kernel, device, activation):
    inputs = Problem().draw(device, torch.float32)
    kernel.fused_experts(*inputs[:-1], "silu")
    with pytest.raises(
        ValueError, match=f"activation must be one of silu, gelu, gelu_tanh, got {re.escape(repr(activation))}"
    ):
        kernel.fused_experts(*inputs[:-1], activation)


@pytest.mark.parametrize(
    ("index", "num_experts", "block_m", "error", "message"),
    [
        (torch.zeros(6).long(), 4, 16, ValueError, r"top_k_index must have shape \(T, k\), got \(6,\)"),
        (torch.zeros(3, 2), 4, 16, TypeError, r"top_k_index must be one of .*, got torch.float32"),
        ([[0, 1]], 4, 16, TypeError, r"top_k_index must be a tensor of shape \(T, k\), got list"),
        (torch.zeros(3, 2).long(), 0, 16, ValueError, "num_experts must be at least 1, got 0"),
        (torch.zeros(3, 2).long(), 4.0, 16, TypeError, "num_experts must be an integer, got float"),
        (torch.zeros(3, 2).long(), True, 16, TypeError, "num_experts must be an integer, got bool"),
        (torch.zeros(3, 2).long(), 4, 8, ValueError, "block_m must be at least 16, got 8"),
        (torch.zeros(3, 2).long(), 4, 48, ValueError, "block_m must be a power of two, got 48"),
        (torch.zeros(3, 2).long(), 4, "64", TypeError, "block_m must be an integer, got str"),
    ],
)
def test_routing_names_the_mistake(kernel, index, num_experts, block_m, error, message):
    with pytest.raises(error, match=message):
        kernel.routing(index, num_experts, block_m)


@pytest.mark.parametrize("id", [-1, 5, 2**40])
def test_an_id_outside_the_experts_is_refused_on_a_cpu(kernel, id):
    hidden, index, *rest, _ = Problem().draw("cpu", torch.float32)
    index[3, 1] = id
    message = r"top_k_index must lie in \[0, 4\] \(4 marks a slot to skip\), got values from"
    with pytest.raises(ValueError, match=message):
        kernel.routing(index, 4)
    with pytest.raises(ValueError, match=message):
        kernel.fused_experts(hidden, index, *rest)


@pytest.mark.parametrize(
    ("m_sizes", "got"),
    [
        ([8, 8, 8, 4], "a sum of 28 and a smallest entry of 4"),
        ([8, 8, 8, 6], "a sum of 30 and a smallest entry of 6"),
        ([16, -3, 8, 8], "a sum of 29 and a smallest entry of -3"),
    ],
    ids=["too few rows", "too many rows", "negative"],
)
def test_m_sizes_that_do_not_fit_the_rows_are_refused_on_a_cpu(kernel, m_sizes, got):
    input, weight, _, _ = LinearProblem(M=29).draw("cpu", torch.float32)
    with pytest.raises(ValueError, match=f"m_sizes must be non-negative and sum to the 29 rows of input, got {got}"):
        kernel.moe_fused_linear(input, weight, torch.tensor(m_sizes))


def test_rows_without_any_expert_are_refused_on_a_cpu(kernel):
    weight, m_sizes = torch.empty(0, 5, 3), torch.empty(0, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"m_sizes must be .* sum to the 4 rows of input, got a sum of 0"):
        kernel.moe_fused_linear(torch.ones(4, 3), weight, m_sizes)
    assert kernel.moe_fused_linear(torch.ones(0, 3), weight, m_sizes).shape == (0, 5)


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("sizes", NOTHING, ids=repr)
def test_sums_over_nothing_are_zero(kernel, sizes, adapted):
    """No choice, no expert (all slots are skipped then), no column, no intermediate one."""
    assert_sums_over_nothing_are_zero(kernel, sizes, adapted)


@pytest.mark.parametrize("got", [None, "experts", torch.nn.Linear], ids=str)
@pytest.mark.parametrize("function", ["expert_weights", "unsupported_reason"])
def test_what_is_no_module_is_not_looked_into(kernel, function, got):
    with pytest.raises(TypeError, match=f"experts must be a module, got {type(got).__name__}"):
        getattr(kernel, function)(got)


@pytest.mark.parametrize(
    ("function", "got", "message"),
    [
        ("keeping", 3, r"kept must be a list, as keeping\(\) gives it, got int"),
        ("keeping", (), r"kept must be a list, as keeping\(\) gives it, got tuple"),
        ("for_gradients", 3, r"kept must be a list or tuple, as keeping\(\) gives it, got int"),
        ("for_gradients", None, r"kept must be a list or tuple, as keeping\(\) gives it, got NoneType"),
    ],
)
def test_what_is_kept_is_a_list(kernel, function, got, message):
    """Said at the call, not where it is entered."""
    with pytest.raises(TypeError, match=message):
        getattr(kernel, function)(got)


def test_a_device_it_has_no_kernel_for_is_refused(kernel):
    with FakeTensorMode():
        input, weight, m_sizes = torch.empty(6, 4, device="xpu"), torch.empty(2, 3, 4), torch.empty(2).int()
        index = torch.empty(6, 2, dtype=torch.int64, device="xpu")
        with pytest.raises(ValueError, match="input must be on a cpu or cuda device, got xpu"):
            kernel.moe_fused_linear(input, weight, m_sizes)
        with pytest.raises(ValueError, match="hidden_states must be on a cpu or cuda device, got xpu"):
            kernel.fused_experts(input, index, index.float(), torch.empty(2, 6, 4), torch.empty(2, 4, 3))
        with pytest.raises(ValueError, match="top_k_index must be on a cpu or cuda device, got xpu"):
            kernel.routing(index, 2)


@pytest.mark.gpu
def test_fp64_is_for_the_cpu_only(kernel):
    inputs = Problem().draw("cuda", torch.float64)
    with pytest.raises(TypeError, match=r"hidden_states must be one of .* on cuda, got torch.float64"):
        kernel.fused_experts(*inputs[:-1])


@pytest.mark.gpu
@pytest.mark.parametrize("argument", ["weight", "m_sizes"])
def test_tensors_on_two_devices_are_refused(kernel, argument):
    inputs = LinearProblem().draw("cuda", torch.float32)._asdict()
    del inputs["grad_output"]
    inputs[argument] = inputs[argument].cpu()
    with pytest.raises(ValueError, match=f"{argument} must be on cuda:0 like input, got cpu"):
        kernel.moe_fused_linear(**inputs)
