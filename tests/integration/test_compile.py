"""``torch.compile`` of whole models, without graph breaks and for any number of tokens."""

import pytest
import torch

from qwen3_moe_integration import kernelize_model
from tests.integration.lora import config, pair
from tests.integration.models import QWEN3, Tiny, assert_same_training, stock_twin, tokens
from tests.kernel.oracle import assert_close

LENGTHS = (5, 12, 31)
ONE_LAYER = Tiny("qwen3_moe", {"num_hidden_layers": 1}, moe_layers=1)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("route", ["kernelized", "interface"])
def test_a_whole_model_compiles_once_for_every_number_of_tokens(source, registered, route):
    model = QWEN3.build(num_hidden_layers=1)
    stock = stock_twin(model)
    if route == "kernelized":
        kernelize_model(model, kernel=source)
    else:
        model.set_experts_implementation("qwen3_moe_fused")
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for length in LENGTHS:
        input_ids = tokens(length=length)
        assert_close("logits", stock(input_ids).logits, compiled(input_ids=input_ids, use_cache=False).logits, 1e-5)
    assert len(graphs) == 1


def test_a_compiled_model_trains_as_stock(source):
    model = QWEN3.build(num_hidden_layers=1)
    stock = stock_twin(model)
    compiled = torch.compile(kernelize_model(model, kernel=source), fullgraph=True, dynamic=True, backend="aot_eager")
    for length in LENGTHS:
        assert_same_training(model, stock, compiled, length)


def test_experts_that_stay_stock_compile_and_warn_once(registered, warnings):
    model = QWEN3.build(num_hidden_layers=1, hidden_act="relu")
    stock = stock_twin(model)
    model.set_experts_implementation("qwen3_moe_fused")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for length in LENGTHS:
        input_ids = tokens(length=length)
        assert_close("logits", stock(input_ids).logits, compiled(input_ids=input_ids, use_cache=False).logits, 1e-5)
    assert len(warnings) == 1


def test_adapters_of_experts_compile_without_a_graph_break(source):
    """Two that are active together: their factors are joined in the graph."""
    model, stock = pair(source, config(), config(r=2), tiny=ONE_LAYER)
    for each in (model, stock):
        each.base_model.set_adapter(["first", "second"])
    assert_same_training(model, stock, torch.compile(model, backend="aot_eager", fullgraph=True))
