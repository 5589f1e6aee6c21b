"""4-bit experts through the Triton kernels: decoded in the products, or first and in parts."""

import importlib

import pytest
import torch
from hypothesis import given, settings

from .. import strategies
from ..adapted import (
    Adapter,
    Quantization,
    assert_adapted_experts_agree,
    assert_decodes_to,
    decoded,
    every_byte,
)
from ..poison import poisoned_memory
from ..problems import Problem

CASES = [
    (Problem(T=9, k=3, E=5, H=64, I=64, imbalance="some_skipped"), Quantization()),
    (Problem(T=20, H=64, I=128, imbalance="one_takes_all"), Quantization("fp4", nested=False)),  # several tiles
    (Problem(T=3, H=128, I=128), Quantization("fp4", blocksize=128)),
    (Problem(T=3, H=64, I=64), Quantization(blocksize=32)),  # two blocks in the columns of a tile
    (Problem(T=5, H=192, I=64), Quantization(nested=False)),  # columns that fill no whole tile
    (Problem(T=0, H=64, I=64), Quantization()),
]


@pytest.fixture
def way(triton_kernel, monkeypatch):
    """Makes the layer take the way called so, whatever its regime would say."""
    regime = importlib.import_module(f"{triton_kernel.__name__}.regime")
    return lambda name: monkeypatch.setattr(regime, "regime", lambda *_: name)


@pytest.mark.parametrize(("problem", "quantization"), CASES, ids=repr)
def test_decoded_in_the_products(triton_kernel, way, problem, quantization, dtype):
    way("plain")
    assert_adapted_experts_agree(triton_kernel, problem, "cpu", dtype, quantization)


@pytest.mark.parametrize("imbalance", ["some_skipped", "one_takes_all"])
@pytest.mark.parametrize(
    ("experts_at_a_time", "gate_up", "down"),
    [(0, [1] * 5, [1] * 5), (1, [1] * 5, [2, 2, 1]), (2, [2, 2, 1], [3, 2]), (4, [3, 2], [5]), (5, [5], [5])],
    ids=str,
)
def test_decoded_first_some_experts_at_a_time(
    triton_kernel, way, monkeypatch, experts_at_a_time, gate_up, down, imbalance
):  # fmt: skip
    """In runs as few and as even as the scratch memory of the plan allows, of down twice as many experts, but of one at
    least; in no more memory than the longest takes: no result here is large enough to serve as that. One expert's rows
    may be more than a run's share, and the programs' of a launch more than one tile each."""
    way("dequantize")
    problem = Problem(T=31, k=2, E=5, H=64, I=64, imbalance=imbalance)
    regime, experts = (importlib.import_module(f"{triton_kernel.__name__}.{f}") for f in ("regime", "kernels.experts"))
    scratch, runs = experts_at_a_time * 2 * problem.I * problem.H * 4, []

    def recorded(weight, first, out, m_sizes):
        assert first + out.shape[0] <= problem.E
        held = out.untyped_storage().nbytes() // out[0].nbytes  # and its margins, which are less than one
        runs.append((out.shape[0], held))
        dequantize_experts(weight, first, out, m_sizes)

    dequantize_experts = experts.dequantize_experts
    monkeypatch.setattr(experts, "dequantize_experts", recorded)
    monkeypatch.setattr(regime, "LARGE_SCRATCH", scratch)
    assert_adapted_experts_agree(triton_kernel, problem, "cpu", torch.float32, Quantization())
    products = gate_up, down, down, gate_up  # forward, then backward
    assert runs == [(length, lengths[0]) for lengths in products for length in lengths]


def test_decoded_first_into_a_result_that_is_not_written_yet(triton_kernel, way, monkeypatch):
    """One that holds more experts than the scratch, and that no product writes to while it is read: the slots of the
    second product, 7168 numbers, while the first is computed."""
    way("dequantize")
    regime, experts = (importlib.import_module(f"{triton_kernel.__name__}.{f}") for f in ("regime", "kernels.experts"))
    problem = Problem(T=56, k=4, E=5, H=32, I=32)
    runs = []

    def recorded(weight, first, out, m_sizes):
        runs.append((out.shape[0], out.untyped_storage().nbytes() >= 4 * 7168))
        dequantize_experts(weight, first, out, m_sizes)

    dequantize_experts = experts.dequantize_experts
    monkeypatch.setattr(experts, "dequantize_experts", recorded)
    monkeypatch.setattr(regime, "LARGE_SCRATCH", 2 * problem.I * problem.H * 4)  # one matrix of gate and up
    assert_adapted_experts_agree(triton_kernel, problem, "cpu", torch.float32, Quantization())
    forward = [(3, True), (2, True), (2, False), (2, False), (1, False)]
    assert runs == [*forward, (5, True), *[(1, False)] * 5]


@settings(max_examples=30)
@given(
    strategies.even_problems(most_tokens=9, widest=40),
    strategies.dtypes(torch.float32, torch.float16),
    strategies.quantizations(),
)
def test_any_problem_agrees_with_the_oracle(triton_kernel, problem, dtype, quantization):
    assert_adapted_experts_agree(triton_kernel, problem, "cpu", dtype, quantization)


@pytest.mark.parametrize(
    ("ways", "imbalance"),
    [(("dequantize", "plain"), "some_skipped"), (("plain", "dequantize"), "one_takes_all")],
    ids=str,
)
def test_each_direction_may_go_a_way_of_its_own(triton_kernel, monkeypatch, ways, imbalance):
    """In tiles of its own: backward cannot read the table of forward's."""
    regime, experts = (importlib.import_module(f"{triton_kernel.__name__}.{f}") for f in ("regime", "kernels.experts"))
    heights, plan = [], experts.plan

    def noted(*arguments, **options):
        heights.append(plan(*arguments, **options))
        return heights[-1]

    monkeypatch.setattr(experts, "plan", noted)
    monkeypatch.setattr(regime, "regime", lambda *arguments: ways[arguments[4]])
    problem = Problem(T=97, k=2, E=5, H=64, I=64, imbalance=imbalance)
    assert_adapted_experts_agree(triton_kernel, problem, "cpu", torch.float16, Quantization(), Adapter(gate_up_rank=3))
    assert tuple(plan.path for plan in heights[:2]) == ways
    assert heights[0].block_m != heights[1].block_m


@pytest.mark.parametrize("name", ["plain", "dequantize"])
def test_adapters_beside_4_bit_weights(triton_kernel, way, monkeypatch, name):
    way(name)
    regime = importlib.import_module(f"{triton_kernel.__name__}.regime")
    monkeypatch.setattr(regime, "LARGE_SCRATCH", 2 * 64 * 64 * 4 * 2)  # some experts at a time, some adapters
    problem = Problem(T=9, k=3, E=5, H=64, I=64, imbalance="some_skipped")
    assert_adapted_experts_agree(triton_kernel, problem, "cpu", torch.float32, Quantization(), Adapter())


@pytest.mark.parametrize("problem", [Problem(H=40, I=24), Problem(H=96, I=32)], ids=repr)
def test_blocks_that_straddle_rows_are_decoded_first(triton_kernel, problem):
    """By the layer's own choice: no other way can take them."""
    assert_adapted_experts_agree(triton_kernel, problem, "cpu", torch.float32, Quantization())


@pytest.mark.parametrize("quantization", [Quantization(), Quantization("fp4", blocksize=128, nested=False)], ids=repr)
@pytest.mark.parametrize("stack", [(3, 64, 128), (5, 33, 70), (1, 2, 2)], ids=str)
def test_dequantize_gives_the_numbers_of_bitsandbytes(triton_kernel, quantization, dtype, stack):
    parameter = quantization.quantize(torch.randn(stack, dtype=dtype))
    ours = triton_kernel.dequantize(triton_kernel.four_bit_weight(parameter))
    assert_decodes_to(ours, parameter, decoded(parameter, dtype))


@pytest.mark.parametrize(("quant_type", "nested"), [("nf4", True), ("fp4", False)], ids=["nf4 nested", "fp4"])
def test_every_nibble_meets_scales_of_every_size(triton_kernel, quant_type, nested, dtype):
    parameter = every_byte(quant_type, nested)
    ours = triton_kernel.dequantize(triton_kernel.four_bit_weight(parameter), dtype)
    assert_decodes_to(ours, parameter, decoded(parameter, torch.float32).to(dtype))


def test_experts_without_rows_are_not_decoded(triton_kernel, launchers):
    parameter = Quantization().quantize(torch.randn(4, 8, 64))
    weight = triton_kernel.four_bit_weight(parameter)
    with poisoned_memory("cpu"):
        out = torch.empty(3, 8, 64)
    launchers.dequantize_experts(weight, 1, out, torch.tensor([3, 0, 1, 0], dtype=torch.int32))
    ref = decoded(parameter, torch.float32)
    assert torch.equal(out[1], ref[2])
    assert not torch.isfinite(out[0]).any() and not torch.isfinite(out[2]).any()


def test_one_projection_in_4_bit_beside_a_dense_one(triton_kernel, way):
    way("plain")
    inputs = Problem(T=7, H=128, I=64).draw("cpu", torch.float32)
    parameter = Quantization().quantize(inputs.gate_up_proj)
    outs = [
        triton_kernel.fused_experts(*inputs[:3], gate_up_proj, inputs.down_proj)
        for gate_up_proj in (triton_kernel.four_bit_weight(parameter), decoded(parameter, torch.float32))
    ]
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


NF4, FP4 = ((3, 80, 256), Quantization()), ((3, 200, 128), Quantization("fp4", nested=False, blocksize=128))


@pytest.mark.parametrize("stacks", [[NF4], [FP4], [NF4, None], [NF4, FP4], [FP4, NF4]], ids=repr)
def test_scales_are_decoded_and_rounded_once(triton_kernel, launchers, stacks):
    """Of one stack, one beside a dense one, or two; for experts that have rows; fp16, as the interpreter knows no
    bf16."""
    nibbles = importlib.import_module(f"{triton_kernel.__name__}.kernels.nibbles")
    dense = torch.empty(3, 128, 128)
    weights = [s and triton_kernel.four_bit_weight(s[1].quantize(torch.randn(s[0]))) for s in stacks]
    m_sizes = torch.tensor([2, 0, 1], dtype=torch.int32)
    prepared = launchers.fast_weights([dense if w is None else w for w in weights], m_sizes, torch.float16)
    for weight, fast in zip(weights, prepared):
        if weight is None:
            assert fast is dense
            continue
        _, n, k = weight.shape
        scales = fast.scales.view(torch.float16).view(3, k // 64, n)
        absmax = weight.absmax
        if weight.nested_blocksize:
            nested = weight.nested_absmax.repeat_interleave(weight.nested_blocksize)[: absmax.numel()]
            absmax = weight.nested_code[absmax.long()] * nested + weight.nested_offset
        absmax = absmax.repeat_interleave(weight.blocksize // 64).view(3, n, k // 64).transpose(1, 2).double()
        ref = absmax / nibbles.FACTORS[weight.quant_type]
        half_a_unit = 0.5 * torch.finfo(torch.float16).eps
        for expert in (0, 2):
            torch.testing.assert_close(scales[expert].double(), ref[expert], rtol=1.01 * half_a_unit, atol=1e-7)
        words = torch.tensor(nibbles.table_words(weight.quant_type, "fp16")[0::2]).to(torch.uint32).view(torch.int32)
        assert torch.equal(fast.table.view(4, 64), words[:, None].expand(4, 64))


def test_columns_are_permuted_as_the_tensor_cores_hold_them(launchers):
    """A thread c of four holds columns 2c, 2c + 1, 2c + 8 and 2c + 9 of four 16s; the packed row gives it 16 c on."""
    x = torch.randn(9, 192)
    place = {}
    for c in range(4):
        columns = [16 * part + 2 * c + offset for part in range(4) for offset in (0, 1, 8, 9)]
        place |= dict(zip(columns, range(16 * c, 16 * c + 16)))
    order = [64 * group + place[column] for group in range(3) for column in range(64)]
    assert torch.equal(launchers.permuted(x), x[:, order])
