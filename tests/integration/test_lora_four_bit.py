"""LoRA of experts in 4 bit: as PEFT trains it on the same weights decoded, which PEFT cannot do by itself."""

import copy

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Params4bit
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import layer as peft_layer

from qwen3_moe_integration import kernelize_model
from tests.integration.lora import StackSized, config, with_adapters
from tests.integration.models import ExpertsCalls, assert_same_training, generated, tokens
from tests.integration.quantized import NESTED, SIZES, checkpoint, decoded, experts_parameters, load, same_bits
from tests.integration.test_quantize_run import CONFIGS, decoded_twin
from tests.kernel.oracle import assert_close


@pytest.fixture(params=CONFIGS, ids=["nf4 nested", "fp4"])
def model(request, registered, tmp_path):
    """Its experts are in 4 bit, on the kernel as experts implementation; all else is fp32."""
    checkpoint(tmp_path / "model", **SIZES)
    return load(tmp_path / "model", request.param, dtype=torch.float32)


@pytest.mark.compat
@pytest.mark.parametrize("kernelized", ["before", "after", "by the experts implementation"])
def test_adapters_train_as_in_peft_on_the_decoded_weights(model, source, device, kernelized):
    model = model.to(device)
    stock = with_adapters(decoded_twin(model), config())
    stacks = [*experts_parameters(model).values()]
    packed = [x.detach().clone() for x in stacks]
    if kernelized == "before":
        kernelize_model(model, kernel=source)
    model = with_adapters(model, config())
    if kernelized == "after":
        kernelize_model(model, kernel=source)
    _share_adapters(model, stock)
    with ExpertsCalls() as calls:
        assert_same_training(model.train(), stock.train(), ratio=1e-4)
    assert (calls.forward, calls.backward) == (2, 2)
    input_ids = tokens(device=device)
    with StackSized(model) as large:
        model(input_ids=input_ids, labels=input_ids).loss.backward()
    assert large.made == 0
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0).step()
    assert all(map(same_bits, stacks, packed))


def test_several_adapters_and_none(model):
    configs = config(), config(r=2, use_rslora=True, rank_pattern={"mlp.experts.down_proj": 5})
    stock = with_adapters(decoded_twin(model), *configs)
    model = with_adapters(model, *configs)
    _share_adapters(model, stock)
    for active in ("second", ["first", "second"]):
        for each in (model, stock):
            each.base_model.set_adapter(active)
        assert_same_training(model.train(), stock.train(), ratio=1e-4)
    with model.disable_adapter(), stock.disable_adapter():
        _assert_same_logits(model, stock)


def test_adapters_go_between_4_bit_and_dense_models(model, tmp_path):
    adapted = with_adapters(model, config(lora_dropout=0.2, rank_pattern={"mlp.experts.gate_up_proj": 6}))
    adapted.save_pretrained(tmp_path / "adapter")
    want = adapted.eval()(tokens_ := tokens()).logits
    bare = adapted.unload()
    dense = PeftModel.from_pretrained(decoded_twin(bare), tmp_path / "adapter" / "first")
    assert_close("on decoded weights", dense(tokens_).logits, want, 1e-4)
    again = PeftModel.from_pretrained(bare, tmp_path / "adapter" / "first")
    assert torch.equal(again(tokens_).logits, want)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_preparing_for_kbit_training_leaves_the_experts_and_trains(registered, tmp_path, use_reentrant):
    """Attention is in 4 bit too, and what is left in bf16 becomes fp32, as PEFT has it; the experts' bits stay."""
    checkpoint(tmp_path, **SIZES)
    model = load(tmp_path, NESTED)
    before = {name: x.detach().clone() for name, x in experts_parameters(model).items()}
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert model.model.norm.weight.dtype == torch.float32
    for name, parameter in experts_parameters(model).items():
        assert isinstance(parameter, Params4bit) and same_bits(parameter, before[name])
        assert parameter.quant_state.absmax.dtype == torch.uint8 and parameter.quant_state.dtype == torch.bfloat16
    model = get_peft_model(model, config(lora_dropout=0.2)).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    input_ids, steps = tokens(), []
    for checkpointed in (True, False):
        if not checkpointed:
            model.gradient_checkpointing_disable()
        model.zero_grad()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=input_ids, labels=input_ids).loss.backward()
        steps.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, grad in steps[0].items():
        assert grad.any(), name
        assert torch.equal(grad, steps[1][name]), name


def test_transformers_own_mixin_keeps_factors_in_the_compute_dtype(registered, tmp_path):
    checkpoint(tmp_path, **SIZES)
    model = load(tmp_path, NESTED)
    model.add_adapter(config())
    assert {p.dtype for name, p in model.named_parameters() if "experts" in name and "lora" in name} == {torch.bfloat16}
    input_ids = tokens()
    with ExpertsCalls() as calls:
        model.train()(input_ids=input_ids, labels=input_ids).loss.backward()
    assert (calls.forward, calls.backward) == (2, 2)


def test_merging_decodes_adds_and_quantizes_again(model):
    adapted = with_adapters(model, config(target_modules=[]))
    wrappers = [each for each in adapted.modules() if isinstance(each, peft_layer.ParamWrapper)]
    before = [each.get_param() for each in wrappers]
    with pytest.warns(UserWarning, match="4-bit linear may get different generations due to rounding errors"):
        adapted.merge_adapter()
    for wrapper, old in zip(wrappers, before):
        merged, (A, B) = wrapper.get_param(), wrapper.factors("first")
        state, kept = merged.quant_state, old.quant_state
        assert (state.blocksize, state.quant_type, state.nested) == (kept.blocksize, kept.quant_type, kept.nested)
        added = (decoded(old) + wrapper.scaling["first"] * B @ A).detach().flatten()
        settings = {"blocksize": state.blocksize, "quant_type": state.quant_type, "compress_statistics": state.nested}
        want = bnb.dequantize_4bit(*bnb.quantize_4bit(added, **settings)).view(state.shape)
        assert_close(wrapper.parameter_name, want, decoded(merged), 1e-2)
        assert (decoded(merged) - decoded(old)).norm() > 0.1 * decoded(old).norm()
        assert merged.dtype == old.dtype and state.dtype == torch.float32 and not merged.requires_grad
    input_ids = tokens()
    twin = decoded_twin(copy.deepcopy(adapted).unload())
    assert_close("merged", twin(input_ids).logits, adapted(input_ids).logits, 1e-4)

    with pytest.warns(UserWarning, match="Unmerge lora module to 4-bit"):
        adapted.unmerge_adapter()
    for wrapper, old in zip(wrappers, before):
        assert_close(wrapper.parameter_name, decoded(old), decoded(wrapper.get_param()), 0.2)
    with pytest.warns(UserWarning, match=r"Already unmerged\. Nothing to do"):
        wrappers[0].unmerge()
    with pytest.warns(UserWarning, match="Merge lora module to 4-bit"):
        merged = adapted.merge_and_unload(safe_merge=True)
    assert not any("lora" in name for name in merged.state_dict())
    with ExpertsCalls() as calls:
        generated(merged)
    assert calls.forward == 2 * 12


def test_merging_takes_the_adapters_that_are_named(model):
    adapted = with_adapters(model, config(target_modules=[]), config(target_modules=[]))
    wrapper = next(each for each in adapted.modules() if isinstance(each, peft_layer.ParamWrapper))
    before, (A, B) = decoded(wrapper.get_param()), wrapper.factors("second")
    adapted.merge_adapter(["second"])
    assert wrapper.merged_adapters == ["second"]
    want = (before + wrapper.scaling["second"] * B @ A).detach()
    assert_close("merged", want, decoded(wrapper.get_param()), 0.2)


def test_merging_what_is_not_finite_is_refused(model):
    adapted = with_adapters(model, config(target_modules=[]))
    experts = adapted.base_model.model.model.layers[1].mlp.experts
    experts.lora_B["first"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter first"):
        adapted.merge_adapter(safe_merge=True)


def test_without_the_kernel_4_bit_experts_are_an_error(model):
    adapted = with_adapters(model, config())
    model.set_experts_implementation("eager")
    with pytest.raises(ValueError, match="Qwen3MoeExperts is in 4 bit, so it can run on the kernel alone"):
        adapted(tokens())


def test_peft_by_itself_still_cannot_adapt_a_packed_stack(model):
    """When it can, lora_four_bit.py may go."""
    experts = model.model.layers[0].mlp.experts
    wrapper = peft_layer.ParamWrapper(experts, "default", "down_proj", config(), r=2)
    assert wrapper.lora_A["default"].weight.shape != (8 * 2, 64)


def _share_adapters(model, stock):
    """Gives ``stock`` the factors of ``model``."""
    factors = {name: x for name, x in model.state_dict().items() if "lora_" in name}
    assert factors and not stock.load_state_dict(copy.deepcopy(factors), strict=False).unexpected_keys


def _assert_same_logits(model, stock):
    input_ids = tokens()
    assert_close("logits", stock(input_ids).logits, model(input_ids).logits, 1e-4)
