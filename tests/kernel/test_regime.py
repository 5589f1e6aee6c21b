"""The choice among the ways to multiply 4-bit experts."""

import importlib
import math

import pytest
import torch

from .adapted import Quantization
from .replays import bytes_in_use, make_layer, tensors_in

MIB = 2**20
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(params=[False, True], ids=["any card", "byte permute"])
def byte_permute(request) -> bool:
    return request.param


@pytest.fixture
def regime(kernel, monkeypatch, byte_permute):
    module = importlib.import_module(f"{kernel.__name__}.regime")
    monkeypatch.setattr(module, "has_byte_permute", lambda device: byte_permute)
    return module


def stack(kernel, *shape, **quantization):
    return kernel.four_bit_weight(Quantization(**quantization).quantize(torch.randn(shape)))


def test_dense_weights_have_no_regime(regime):
    assert regime.regime(8, (torch.empty(2, 4, 4),) * 2, torch.bfloat16, CPU) == "dense"


def test_many_rows_are_worth_decoding_for(kernel, regime, byte_permute):
    weights = (stack(kernel, 2, 256, 128), stack(kernel, 2, 128, 128))
    few, many = (regime.regime(rows, weights, torch.bfloat16, CPU) for rows in (1, 10**5))
    assert (few, many) == ("fast" if byte_permute else "plain", "dequantize")
    in_fp32 = regime.regime(1, weights, torch.float32, CPU)
    assert in_fp32 == ("dequantize" if byte_permute else "plain"), "the fast path multiplies 16-bit numbers"


@pytest.mark.parametrize("byte_permute", [True], ids=["byte permute"])
def test_a_card_may_have_its_own_numbers_of_rows_to_decode_in_registers(kernel, regime, monkeypatch):
    weights = (stack(kernel, 2, 128, 128),) * 2
    monkeypatch.setattr(regime, "fast_rows", regime.fast_rows.__wrapped__)  # not kept for other tests
    for tuned, forward, backward in (
        (None, 800, 800),
        ({"forward": 300, "backward": 500}, 300, 500),
        ({"forward": 1, "backward": 2}, 1, 2),
    ):
        monkeypatch.setattr(regime, "tuned_fast_rows", lambda device, tuned=tuned: tuned)
        for direction, most in ((False, forward), (True, backward)):
            ways = [regime.regime(rows, weights, torch.bfloat16, CPU, direction) for rows in (most, most + 1)]
            assert ways == ["fast", "dequantize"], (tuned, direction)


@pytest.mark.parametrize("quantization", [dict(blocksize=256), dict(blocksize=4096)], ids=str)
def test_blocks_that_straddle_rows_are_decoded_first(kernel, regime, quantization):
    weights = (stack(kernel, 2, 256, 128, **quantization), torch.empty(2, 128, 128))
    assert regime.regime(1, weights, torch.bfloat16, CPU) == "dequantize"


def test_sizes_of_no_whole_tile_take_a_slower_way(kernel, regime, byte_permute):
    slower = "dequantize" if byte_permute else "plain"
    assert regime.regime(1, (stack(kernel, 2, 192, 64),), torch.bfloat16, CPU) == slower
    assert regime.regime(1, (stack(kernel, 2, 80, 128),), torch.bfloat16, CPU) == "dequantize"


def test_what_the_fast_way_would_misread_takes_a_slower_way(kernel, regime, byte_permute):
    """It reads four words at a time, and one scale for each 64 weights."""
    slower, projection = "dequantize" if byte_permute else "plain", projection_of(kernel)
    aligned = stack(kernel, 2, 128, 128)
    misaligned = aligned._replace(packed=torch.cat((aligned.packed[:8], aligned.packed))[8:])
    for weight in (misaligned, stack(kernel, 2, 128, 128, blocksize=32)):
        assert regime.regime(1, (aligned, weight), torch.bfloat16, CPU) == slower
        assert not regime.suits_gemv(8, projection(aligned), projection(weight), CPU)


def test_columns_are_permuted_only_where_both_products_want_that(kernel, regime, byte_permute):
    packed, dense, dtype = stack(kernel, 2, 256, 128), torch.empty(2, 128, 128), torch.bfloat16
    for down, permute in ((stack(kernel, 2, 128, 128), byte_permute), (dense, False)):
        plan = regime.plan(2 * 40, packed, down, dtype, CPU, kernel_tiling(kernel), False)
        assert plan.path == ("fast" if byte_permute else "plain") and plan.permute == permute


def test_only_few_slots_of_4_bit_experts_are_multiplied_one_by_one(kernel, regime, byte_permute):
    projection = projection_of(kernel)
    packed, dense = projection(stack(kernel, 2, 128, 128)), projection(torch.empty(2, 128, 128))
    adapted = packed._replace(lora=kernel.Lora(torch.empty(2, 4, 128), torch.empty(2, 128, 4)))
    assert regime.suits_gemv(8, packed, packed, CPU) == byte_permute
    assert not regime.suits_gemv(10**4, packed, packed, CPU)
    assert not regime.suits_gemv(0, packed, packed, CPU)
    assert not regime.suits_gemv(8, packed, dense, CPU)
    assert not regime.suits_gemv(8, adapted, packed, CPU)


@pytest.mark.parametrize("rows", [1, 8, 20, 100, 300])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("hidden", "width"), [(640, 384), (512, 384), (384, 512)])
def test_tiles_divide_what_the_fast_way_cannot_mask(kernel, regime, byte_permute, rows, backward, hidden, width):
    """The summed dimension; transposed, the columns too; and 64 columns where a permutation is within them."""
    gate_up, down = stack(kernel, 2, 2 * width, hidden), stack(kernel, 2, hidden, width)
    plan = regime.plan(2 * rows, gate_up, down, torch.bfloat16, CPU, kernel_tiling(kernel), backward)
    assert plan.path in ("fast", "plain", "dequantize")
    if plan.path == "dequantize":
        return
    sizes = ((width, hidden), (hidden, 2 * width)) if backward else ((width, hidden), (hidden, width))
    for tile, (n, k) in zip((plan.first, plan.second), sizes):
        assert k % tile.block_k == 0
        assert not backward or n % tile.block_n == 0
        assert not plan.permute or tile.block_n % 64 == 0
    assert plan.permute <= byte_permute


def test_what_is_decoded_at_a_time_is_bounded(kernel, regime):
    weights = stack(kernel, 2, 2 * 40, 64), stack(kernel, 2, 64, 40)  # of no whole tiles: always dequantized
    scratch = {}
    for rows in (1, 256, 257, 10**5):
        plan = regime.plan(2 * rows, *weights, torch.bfloat16, CPU, kernel_tiling(kernel), False)
        assert plan.path == "dequantize"
        scratch[rows] = plan.scratch
    assert scratch[1] == scratch[256] < 512 * MIB, "where it buys 15 %"
    assert scratch[257] == scratch[10**5] <= 64 * MIB


def test_one_stack_is_decoded_at_a_time(kernel, compiler, monkeypatch):
    """The memory of the first is free before the other's is taken."""
    monkeypatch.setattr(importlib.import_module(f"{kernel.__name__}.regime"), "regime", lambda *_: "dequantize")
    layer = make_layer(kernel, "4 bit", tokens=2)
    layer.step()  # compiles
    with bytes_in_use() as forward:
        _, *saved = layer.forward()
    with bytes_in_use() as backward:
        layer.backward(tuple(saved))
    gate_up, down = (2 * math.prod(projection.weight.shape) for projection in layer.projections)
    for found in (forward, backward):
        assert gate_up <= max(found) < gate_up + down


def test_the_slots_rows_are_gone_when_the_largest_gradient_comes(kernel, compiler):
    layer = make_layer(kernel, "trained")
    layer.step()  # compiles
    _, *saved = layer.forward()
    pre_activation, hidden = saved[0], layer.tokens[0]
    with bytes_in_use() as found:
        results = layer.backward(tuple(saved))
    gradients = sum(x.nbytes for x in tensors_in(results))
    slots_rows = layer.tokens[1].numel() * hidden.shape[1] * hidden.element_size()
    assert gradients + pre_activation.nbytes < max(found) < gradients + pre_activation.nbytes + slots_rows


def test_backward_makes_a_tile_table_only_where_forward_s_is_of_another_height(kernel, compiler, monkeypatch):
    layer, experts = make_layer(kernel, "trained"), importlib.import_module(f"{kernel.__name__}.kernels.experts")
    layer.step()  # compiles
    compiler.launched.clear()
    layer.step()
    assert compiler.launched and "_tile_table_kernel" not in compiler.launched
    _, *saved = layer.forward()
    plan = experts.plan
    monkeypatch.setattr(experts, "plan", lambda *a, **k: (p := plan(*a, **k))._replace(block_m=2 * p.block_m))
    compiler.launched.clear()
    layer.backward(tuple(saved))
    assert compiler.launched.count("_tile_table_kernel") == 1


@pytest.mark.parametrize("block_n", [64, 128, 256])
@pytest.mark.parametrize("columns", [2048, 2000, 77])
def test_what_takes_much_memory_comes_in_halves_of_whole_blocks(regime, columns, block_n):
    tile, dtype = kernel_tile(regime, block_n), torch.bfloat16
    for slots in (0, 1, 24, 16384, 16385, 20000, 10**5, 10**7):
        width = regime.window(slots, columns, tile, dtype, "fast")
        if slots * columns * 2 <= regime.WINDOW or columns <= block_n:
            assert width == columns, "no launch more than needed"
        else:
            assert width % block_n == 0 and columns / 2 <= width < min(columns, columns / 2 + block_n)
        assert regime.window(slots, columns, tile, dtype, "dequantize") == columns


@pytest.mark.parametrize("byte_permute", [True], ids=["byte permute"])
def test_each_direction_has_the_path_that_its_rows_ask_for(kernel, regime, monkeypatch):
    """Between the two numbers of rows, forward decodes beforehand and backward in registers."""
    weights, dense = (stack(kernel, 2, 256, 128), stack(kernel, 2, 128, 128)), kernel_tiling(kernel)
    monkeypatch.setattr(regime, "fast_rows", lambda device, backward: 200 if backward else 100)
    for rows, want in ((100, ("fast", "fast")), (101, ("dequantize", "fast")), (201, ("dequantize", "dequantize"))):
        plans = [regime.plan(2 * rows, *weights, torch.bfloat16, CPU, dense, backward) for backward in (False, True)]
        assert tuple(plan.path for plan in plans) == want
        assert plans[0].block_m == (dense.block_m if want[0] == "dequantize" else 128)


def projection_of(kernel):
    return importlib.import_module(f"{kernel.__name__}.projection").Projection


def kernel_tile(regime, block_n):
    return regime.Tile(block_n, 64, 4, 4)


def kernel_tiling(kernel):
    tiling = importlib.import_module(f"{kernel.__name__}.tiling")
    return tiling.choose(16, 2, torch.bfloat16, CPU)
