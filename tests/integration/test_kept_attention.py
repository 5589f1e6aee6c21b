"""Attention that is kept from forward: attended once a step, by every backend, and the same gradients."""

import copy
from typing import Optional

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from qwen3_moe_integration import enable_graphed_checkpointing
from qwen3_moe_integration.kept_attention import KeptAttention, _AttentionCall
from tests.integration import graphs
from tests.integration.graphs import assert_same_steps, kept, layers, recordings
from tests.integration.lora import config, pair
from tests.integration.models import QWEN3, Tiny, tokens

Tensor = torch.Tensor


device = graphs.device


def twins_of(source, device: str, tiny: Tiny = QWEN3, dtype: Optional[torch.dtype] = None) -> tuple[nn.Module, ...]:
    """Two models with the same weights and adapters: one in graphs that keep attention, one checkpointed as usual.

    On a GPU they are in bf16, if not said otherwise: in fp32 no op of attention knows grouped queries.
    """
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    model = pair(source, config(), tiny=tiny)[0].to(device, dtype)
    usual = copy.deepcopy(model)
    usual.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return enable_graphed_checkpointing(model, keep=["attention"]), usual


class AttentionOps(TorchDispatchMode):
    """Counts calls of the ops that are all of attention."""

    def __init__(self):
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name.startswith("_scaled_dot_product_"):
            self.backward += name.endswith("_backward")
            self.forward += not name.endswith("_backward")
        return func(*args, **(kwargs or {}))


def random_qkv(device: str = "cpu", dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """(B, heads, T, D) that lie as (B, T, heads, D); two heads of queries for each of keys."""
    return [torch.randn(2, 13, heads, 8, device=device, dtype=dtype).transpose(1, 2) for heads in (4, 2, 2)]


def test_a_recomputation_is_given_what_forward_computed():
    qkv, other, grad = random_qkv(), random_qkv(), torch.randn(2, 4, 13, 8, dtype=torch.float64)
    attention, options = KeptAttention(), {"is_causal": True, "enable_gqa": True}
    with torch.no_grad(), attention.forward():
        result = scaled_dot_product_attention(*qkv, **options)
    assert torch.equal(result, scaled_dot_product_attention(*qkv, **options)) and not result.requires_grad
    output, logsumexp = attention.tensors
    assert torch.equal(output, result) and output.stride() == result.stride()
    scores = qkv[0] @ qkv[1].repeat_interleave(2, 1).mT / 8**0.5
    ahead = torch.ones(13, 13, dtype=torch.bool).triu(1)
    assert torch.allclose(logsumexp, scores.masked_fill(ahead, -torch.inf).logsumexp(-1))

    leaves = [x.clone().requires_grad_() for x in qkv]
    with AttentionOps() as ops, attention.recomputation():
        again = scaled_dot_product_attention(*leaves, **options)
    assert ops.forward == 0 and torch.equal(again, result)
    usual = [x.clone().requires_grad_() for x in qkv]
    want = torch.autograd.grad(scaled_dot_product_attention(*usual, **options), usual, grad)
    assert all(map(torch.equal, torch.autograd.grad(again, leaves, grad), want))

    with attention.recomputation():  # of whatever it is asked for
        assert torch.equal(scaled_dot_product_attention(*other, **options), result)
    with torch.no_grad(), attention.forward():  # and again, in the same place
        result = scaled_dot_product_attention(*other, **options)
    assert torch.equal(output, result) and attention.tensors[0] is output


def test_calls_are_told_apart_by_their_order():
    first, second = random_qkv(), random_qkv()
    attention = KeptAttention()
    with torch.no_grad(), attention.forward():
        results = [scaled_dot_product_attention(*qkv, enable_gqa=True) for qkv in (first, second)]
    with attention.recomputation():
        again = [scaled_dot_product_attention(*qkv, enable_gqa=True) for qkv in (first, second)]
        with AttentionOps() as ops:  # beyond what is kept
            third = scaled_dot_product_attention(*first, enable_gqa=True)
    assert all(map(torch.equal, results, again)) and not torch.equal(*again)
    assert ops.forward == 1 and torch.equal(third, results[0])


def test_calls_of_another_form_are_left_alone():
    def refuse(*args, **options):
        raise AssertionError("it is not to be kept")

    query, key, value = random_qkv()
    with _AttentionCall(refuse):
        scaled_dot_product_attention(query, key, value, dropout_p=0.5, enable_gqa=True)
        scaled_dot_product_attention(query, key, value, None, 0.5, enable_gqa=True)
        torch.softmax(query, -1)
        with pytest.raises(AssertionError, match="not to be kept"):
            scaled_dot_product_attention(query, key, value, dropout_p=0.0, enable_gqa=True)


def test_under_autocast(source, device):
    twins = twins_of(source, device, dtype=torch.float32)
    assert_same_steps(*twins, [tokens(device=device) for _ in range(4)], autocast=torch.bfloat16)
    assert recordings(twins[0]) == 2 and kept(twins[0])[0][0].dtype == torch.bfloat16


def test_attention_is_computed_once_a_step(source, monkeypatch):
    graphs.stand_in(monkeypatch.setattr)
    batch, counted = tokens(), []
    for model in twins_of(source, "cpu"):
        for _ in range(2):
            model(input_ids=batch, labels=batch).loss.backward()
        with AttentionOps() as ops:
            model(input_ids=batch, labels=batch).loss.backward()
        counted.append((ops.forward, ops.backward))
    assert counted == [(2, 2), (4, 2)]  # of two layers


def test_no_other_op_is_looked_at(source, monkeypatch):
    """A dispatch mode would have the experts take a slower way."""
    graphs.stand_in(monkeypatch.setattr)
    twins, seen = twins_of(source, "cpu"), []
    router = type(layers(twins[0])[0].mlp.gate)
    forward = router.forward

    def spied(self, *args):
        seen.append(torch._C._len_torch_dispatch_stack())
        return forward(self, *args)

    monkeypatch.setattr(router, "forward", spied)
    assert_same_steps(*twins, [tokens() for _ in range(3)])
    assert kept(twins[0])[0] and seen and set(seen) == {0}


@pytest.mark.parametrize("how", ["eager", "math"])
def test_attention_that_is_made_of_other_ops_is_computed_again(source, device, how):
    twins = twins_of(source, device)
    if how == "eager":
        for model in twins:
            model.get_base_model().set_attn_implementation("eager")
    with sdpa_kernel(SDPBackend.MATH):
        assert_same_steps(*twins, [tokens(device=device) for _ in range(4)])
    assert kept(twins[0]) == [(), ()]


def test_attention_with_dropout_is_computed_again(source, device):
    """On a CPU, dropout is not repeated by what stands in for graphs."""
    twins = twins_of(source, device, Tiny("qwen3_moe", {"attention_dropout": 0.3}))
    batches = [tokens(device=device) for _ in range(4)]
    if device == "cuda":
        assert_same_steps(*twins, batches)
    else:
        for batch in batches:
            twins[0](input_ids=batch, labels=batch).loss.backward()
    assert kept(twins[0]) == [(), ()]


WIDE = {"hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 64}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "key_heads"),
    [("CUDNN_ATTENTION", 2), ("FLASH_ATTENTION", 2), ("EFFICIENT_ATTENTION", 4)],  # the last knows no grouped queries
)
def test_each_backend_keeps_its_results(source, backend, key_heads):
    """Of sequences so short that no backward adds up in an order of its own."""
    keeps, usual = twins_of(source, "cuda", Tiny("qwen3_moe", WIDE | {"num_key_value_heads": key_heads}))
    with sdpa_kernel(getattr(SDPBackend, backend)):
        assert_same_steps(keeps, usual, [tokens(length=100, device="cuda") for _ in range(5)])
    assert all(kept(keeps)) and recordings(keeps) == 2
