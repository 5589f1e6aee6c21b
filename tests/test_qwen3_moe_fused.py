"""The kernel by itself, as a user loads it. kernel-builder's CI runs this (``nix run .#ci-test``), by hand it is

    LOCAL_KERNELS=org/qwen3-moe-fused=$PWD python -m pytest tests/test_qwen3_moe_fused.py

after a build. It needs torch, kernels and pytest, and nothing of the other tests.
"""

import pytest
import torch
import torch.nn.functional as F
from kernels import get_kernel
from torch import nn

pytestmark = pytest.mark.kernels_ci

T, K, E, H, I = 70, 3, 8, 96, 72
RATIO = {torch.float32: 5e-6, torch.float16: 3 * 2.0**-11, torch.bfloat16: 3 * 2.0**-8}
"""How far results may be from fp64, as a ratio of norms: in 16 bits three times the largest error of one rounding."""


@pytest.fixture(scope="module")
def moe():
    return get_kernel("org/qwen3-moe-fused", version=1)


@pytest.fixture(params=["cpu", *["cuda"] * torch.cuda.is_available()])
def device(request) -> str:
    return request.param


@pytest.fixture(params=RATIO, ids=str)
def dtype(request) -> torch.dtype:
    return request.param


class Experts(nn.Module):
    """What a Transformers model holds, without what it would do with it."""

    def __init__(self, gate_up_proj: torch.Tensor, down_proj: torch.Tensor) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = gate_up_proj, down_proj, nn.SiLU()


def random(*shape: int, **kind) -> torch.Tensor:
    """Scaled so that sums over the last dimension, times other such numbers, are about 1."""
    return (torch.randn(shape, device=kind["device"]) / shape[-1] ** 0.5).to(kind["dtype"])


def loop_over_experts(x, index, weights, gate_up, down) -> torch.Tensor:
    """Slots that say E add nothing."""
    out = torch.zeros_like(x)
    for expert in range(E):
        token, choice = (index == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up[expert].T).chunk(2, -1)
        out = out.index_add(0, token, (F.silu(gate) * up @ down[expert].T) * weights[token, choice, None])
    return out


def with_gradients(function, tensors: list, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    out = function(*tensors)
    return out.detach(), *torch.autograd.grad(out, [x for x in tensors if x.requires_grad], grad)


def assert_as_in_fp64(function, in_fp64, tensors: list, grad: torch.Tensor) -> None:
    """The result, and the gradients of all tensors of floats."""
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in tensors]
    wide = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in tensors]
    want = with_gradients(in_fp64, wide, grad.double())
    for ref, got in zip(want, with_gradients(function, leaves, grad)):
        assert got.dtype == grad.dtype and (got.double() - ref).norm() <= RATIO[grad.dtype] * ref.norm()


@pytest.mark.parametrize("skipped", [0.0, 0.4], ids=["all slots", "some skipped"])
def test_the_layer_trains_as_in_fp64(moe, device, dtype, skipped):
    kind = {"device": device, "dtype": dtype}
    index = torch.rand(T, E, device=device).topk(K).indices
    index[torch.rand(T, K, device=device) < skipped] = E
    stacks = random(E, 2 * I, H, **kind), random(E, H, I, **kind)
    tensors = [random(T, H, **kind), index, torch.rand(T, K, device=device).to(dtype), *stacks]

    def layer(x, index, weights, *stacks) -> torch.Tensor:
        return moe.layers.Qwen3MoeExperts.forward(Experts(*stacks), x, index, weights)

    assert_as_in_fp64(layer, loop_over_experts, tensors, random(T, H, **kind))


def test_each_row_of_the_linear_layer_meets_its_experts_matrix(moe, device, dtype):
    kind = {"device": device, "dtype": dtype}
    expert = torch.randint(E - 1, (T,), device=device).sort().values  # the last one has no rows
    m_sizes = torch.bincount(expert, minlength=E)
    tensors = [random(T, H, **kind), random(E, I, H, **kind)]
    assert_as_in_fp64(
        lambda x, weight: moe.moe_fused_linear(x, weight, m_sizes),
        lambda x, weight: torch.einsum("bi,boi->bo", x, weight[expert]),
        tensors,
        random(T, I, **kind),
    )
