"""What every layer is called with is read once a step, and again whenever it may be another."""

import gc

import pytest
import torch

from qwen3_moe_integration import enable_graphed_checkpointing
from qwen3_moe_integration.offload import Claim
from qwen3_moe_integration.recording import Input
from tests.integration import graphs
from tests.integration.lora import config, pair
from tests.integration.models import tokens

Tensor = torch.Tensor


class Reads:
    """An input whose buffer is set to zero before each reading, so that this shows."""

    def __init__(self, like: Tensor):
        self.input = Input(torch.empty_like(like))

    def __call__(self, tensor: Tensor, claim: Claim) -> bool:
        self.input.buffer.zero_()
        self.input.read(tensor, claim)
        read = torch.equal(self.input.buffer, tensor)
        assert read or not self.input.buffer.any()
        return read


@pytest.fixture
def tensor() -> Tensor:
    return torch.randn(3, 5)


def test_it_is_read_once_until_the_readers_backward_is_over(tensor):
    reads, first, second = Reads(tensor), Claim(), Claim()
    assert reads(tensor, first)
    assert not reads(tensor, second) and not reads(tensor, first)
    first.over = True
    assert reads(tensor, second)
    assert not reads(tensor, first)


def test_it_is_read_again_once_the_reader_is_gone(tensor):
    reads, first, second = Reads(tensor), Claim(), Claim()
    assert reads(tensor, first)
    del first
    gc.collect()
    assert reads(tensor, second)


def test_a_tensor_that_changed_is_read_again(tensor):
    reads, claim = Reads(tensor), Claim()
    assert reads(tensor, claim)
    tensor[0].add_(1)
    assert reads(tensor, claim) and not reads(tensor, claim)


def test_another_tensor_is_read(tensor):
    reads, claim = Reads(tensor), Claim()
    assert reads(tensor, claim)
    other = tensor.detach()
    assert reads(other, claim) and reads(tensor, claim)
    for _ in range(3):  # perhaps where the one before it was
        assert reads(torch.randn(3, 5), claim)


def test_all_layers_and_their_backwards_read_once(source, monkeypatch):
    graphs.stand_in(monkeypatch.setattr)
    model = enable_graphed_checkpointing(pair(source, config())[0])
    batch, mask = tokens(), torch.zeros(2, 1, 13, 13)

    def step() -> list[int]:
        """How often each input has been read."""
        model(input_ids=batch, attention_mask=mask, labels=batch).loss.backward()
        return [each.buffer._version for made in graphs.made for each in made.buffers._inputs.values()]

    counts = [step() for _ in range(5)]
    assert counts[1:] == [[n] * 4 for n in range(1, 5)]  # of mask, positions, cos and sin, from the second step on
