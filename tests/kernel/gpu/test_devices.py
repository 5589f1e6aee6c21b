"""Two CUDA devices in one process: work is launched where the tensors are, whatever device is current."""

import pytest
import torch

from ..adapted import Adapter, Quantization, assert_adapted_experts_agree
from ..problems import Problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
PROBLEM = Problem(H=128, I=64)


@pytest.mark.parametrize("quantization", [None, Quantization()], ids=["dense", "4 bit"])
@pytest.mark.parametrize("adapter", [None, Adapter()], ids=["", "adapted"])
@pytest.mark.parametrize("current", [0, 1])
def test_experts_agree_on_a_device_that_is_not_current(kernel, quantization, adapter, current):
    with torch.cuda.device(current):
        assert_adapted_experts_agree(
            kernel, PROBLEM, f"cuda:{1 - current}", torch.bfloat16, quantization=quantization, adapter=adapter
        )
        assert torch.cuda.current_device() == current


def test_the_stream_is_that_of_the_tensors_device(kernel):
    inputs = PROBLEM.draw("cuda:1", torch.bfloat16)
    arguments = [x.detach() for x in inputs[:-1]]
    with torch.cuda.device(1):
        want = kernel.fused_experts(*arguments)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
    with torch.cuda.stream(side), torch.cuda.device(0):
        with torch.cuda.device(1):
            torch.cuda._sleep(20_000_000)  # whoever does not wait for this stream reads before it is done
            late = [x.clone() for x in arguments]
        got = kernel.fused_experts(*late)
    torch.cuda.synchronize(1)
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["top_k_index", "top_k_weights", "gate_up_proj", "down_proj"])
def test_tensors_on_two_devices_are_refused_by_name(kernel, name):
    inputs = PROBLEM.draw("cuda:0", torch.bfloat16)._asdict()
    del inputs["grad_output"]
    inputs[name] = inputs[name].to("cuda:1")
    with pytest.raises(ValueError, match=f"{name} must be on cuda:0 like .*, got cuda:1"):
        kernel.fused_experts(**inputs)
