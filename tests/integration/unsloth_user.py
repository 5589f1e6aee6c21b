"""What a user of Unsloth does. Unsloth changes classes for good, so each of these has a process of its own."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora import model as peft_model
from torch import nn

from qwen3_moe_integration import KernelSource, kernelize_model, lora, lora_four_bit
from tests.documents import ROOT, call_main
from tests.integration.lora import StackSized
from tests.integration.models import ExpertsCalls, tokens
from tests.kernel.oracle import assert_close

TARGETS = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    from unsloth import FastModel

    model, _ = FastModel.from_pretrained(str(folder), max_seq_length=64, dtype=dtype, load_in_4bit=True)
    return model


def adapted(model: nn.Module) -> nn.Module:
    """With random factors, so that every one of them has a gradient."""
    from unsloth import FastModel

    model = FastModel.get_peft_model(model, r=4, lora_alpha=8, target_modules=TARGETS)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.train()


def train_as_unsloth_does(folder: Path, kernel_dir: Path, dtype: torch.dtype, imported: str) -> None:
    """One call, and loss and gradients are those of Unsloth's own experts; ``imported`` before or after adapters."""
    if imported == "after":
        peft_model.dispatch_default = peft_layer.dispatch_default
    model = load(folder, dtype)
    experts = model.model.layers[0].mlp.experts
    assert type(experts).__module__ != "transformers.models.qwen3_moe.modeling_qwen3_moe"
    assert experts.down_proj.shape[1] == 1 and len(experts.down_proj.quant_state.shape) == 3
    model = adapted(model)
    input_ids = tokens(length=10)
    wrapper = model.base_model.model.model.layers[0].mlp.experts
    assert type(wrapper) is {"before": lora_four_bit, "after": peft_layer}[imported].ParamWrapper
    with patch.object(lora.ParamWrapper, "forward", peft_layer.ParamWrapper.forward):
        want = step(model, input_ids)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    assert kernelize_model(model, "training", KernelSource(path=kernel_dir)) is model
    with ExpertsCalls() as calls, StackSized(model) as stacks:
        got = step(model, input_ids)
    assert (calls.forward, calls.backward) == (2 * 2, 2), "each layer once, and once more in backward"
    assert stacks.made == 0
    assert got.keys() == want.keys() and sum("experts" in name for name in got) == 2 * 4
    for name, tensor in want.items():
        assert tensor.any(), name
        assert_close(name, tensor, got[name], 1e-4 if dtype == torch.float32 else 0.1)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(before[name], after[name]) for name in before)


def compile_its_layers(folder: Path, kernel_dir: Path) -> None:
    """As Unsloth does, one region a decoder layer; the kernel's op is in its graph, and nothing breaks it."""
    model = kernelize_model(adapted(load(folder)), "training", KernelSource(path=kernel_dir))
    input_ids, graphs = tokens(), []
    want = step(model, input_ids)

    def backend(graph, _):
        graphs.append(str(graph.graph))
        return graph

    for layer in model.base_model.model.model.layers:
        layer.compile(backend=backend, fullgraph=True)
    for name, tensor in step(model, input_ids).items():
        assert_close(name, want[name], tensor, 1e-5)
    assert graphs and all("fused_experts" in graph for graph in graphs)


def step(model: nn.Module, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The loss and every gradient."""
    model.zero_grad()
    loss = model(input_ids=input_ids, labels=input_ids).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def kernelize_before_adapters(folder: Path, kernel_dir: Path) -> None:
    model = adapted(kernelize_model(load(folder), "training", KernelSource(path=kernel_dir)))
    with ExpertsCalls() as calls:
        assert all(tensor.any() for tensor in step(model, tokens()).values())
    assert (calls.forward, calls.backward) == (2 * 2, 2)


def refuse_what_is_no_stack(folder: Path, kernel_dir: Path) -> None:
    model = load(folder)
    state = model.model.layers[1].mlp.experts.down_proj.quant_state
    experts, rows, columns = state.shape
    state.shape = torch.Size((experts * rows, columns))
    with pytest.raises(ValueError, match=r"cannot compute: its down_proj is in 4 bit, but no 3-D stack: \(512, 64\)"):
        kernelize_model(model, "training", KernelSource(path=kernel_dir))
    assert "forward" not in vars(model.model.layers[0].mlp)


def refuse_to_run_without_the_kernel(folder: Path) -> None:
    model = adapted(load(folder))
    with pytest.raises(ValueError, match="can run on the kernel alone; call kernelize_model"):
        step(model, tokens())


def finetune_without_a_kernel(folder: Path) -> None:
    with pytest.raises(SystemExit, match=r"cannot be put on the kernel(.|\n)*python scripts/build_kernel.py"):
        call_main(ROOT / "examples/finetune_unsloth.py", "--output", folder, "--kernel", folder / "nowhere")
