"""Experts quantized while a checkpoint loads: what becomes 4 bit, to the bit, and what it takes in memory."""

import weakref

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import core_model_loading

from qwen3_moe_integration import MoeBitsAndBytesConfig
from qwen3_moe_integration.quantize.stacks import decode, quantize_stack
from tests.integration.models import QWEN3, RATIO, Tiny, assert_same_training, tokens
from tests.integration.quantized import (
    NESTED,
    PLAIN_FP4,
    SIZES,
    assert_same_model,
    checkpoint,
    decoded,
    edit,
    experts_parameters,
    load,
    same_bits,
    tensor_names,
)
from tests.integration.test_experts import ARIA, FUSED, STOCK

CONFIGS = [
    pytest.param(NESTED, marks=pytest.mark.compat, id="nf4 nested"),
    pytest.param(PLAIN_FP4, marks=pytest.mark.compat, id="fp4"),
    pytest.param(MoeBitsAndBytesConfig(experts_blocksize=1024), id="blocks that cross experts"),
    pytest.param(MoeBitsAndBytesConfig(experts_blocksize=4096, bnb_4bit_quant_type="fp4"), id="blocks of 4 experts"),
]


def assert_quantized(parameter, full, config: MoeBitsAndBytesConfig) -> None:
    """Exactly what bitsandbytes makes of the whole stack."""
    data, state = quantize_4bit(
        full,
        blocksize=config.experts_blocksize,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
        quant_storage=config.bnb_4bit_quant_storage,
    )
    got = parameter.quant_state
    assert isinstance(parameter, Params4bit) and not parameter.requires_grad
    assert got.shape == full.shape and got.dtype == config.bnb_4bit_compute_dtype
    assert same_bits(parameter.data, data) and same_bits(got.absmax, state.absmax)
    state.dtype = got.dtype
    assert torch.equal(decoded(parameter), decoded(data, state))


@pytest.mark.parametrize("config", CONFIGS)
def test_experts_are_quantized_as_bitsandbytes_quantizes_the_whole_stack(registered, tmp_path, config, capfd):
    full = experts_parameters(checkpoint(tmp_path))
    model = load(tmp_path, config)
    parameters = experts_parameters(model)
    assert len(parameters) == len(full) == 4
    for name, parameter in parameters.items():
        assert_quantized(parameter, full[name].data, config)
    assert "Loading weights" in capfd.readouterr().err  # the progress bar


def test_other_layers_are_in_4_bit_as_stock_or_stay_as_they_were(registered, tmp_path):
    full = dict(checkpoint(tmp_path).named_parameters())
    model = load(tmp_path, MoeBitsAndBytesConfig(experts_blocksize=128))
    linear = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert linear == {
        f"model.layers.{i}.self_attn.{projection}_proj" for i in range(2) for projection in ("q", "k", "v", "o")
    }
    for name in linear:
        weight = model.get_submodule(name).weight
        data, state = quantize_4bit(full[f"{name}.weight"].data, compress_statistics=True, quant_type="nf4")
        assert same_bits(weight.data, data) and same_bits(weight.quant_state.absmax, state.absmax)
    others = {name: x for name, x in model.named_parameters() if not isinstance(x, Params4bit)}
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.gate.weight"} < others.keys()
    assert all(same_bits(x.data, full[name].data) for name, x in others.items())
    assert model.is_loaded_in_4bit and model.config._experts_implementation == "qwen3_moe_fused"
    with pytest.raises(ValueError, match="cannot cast a bitsandbytes model"):
        model.to(torch.float16)


@pytest.mark.compat
@pytest.mark.parametrize("tiny", FUSED, ids=repr)
def test_every_model_with_the_experts_interface_loads_saves_and_loads_again(registered, tmp_path, tiny):
    full = experts_parameters(checkpoint(tmp_path / "full", tiny))
    model = load(tmp_path / "full", NESTED)
    assert len(full) == 2 * tiny.moe_layers
    for name, parameter in experts_parameters(model).items():
        assert_quantized(parameter, full[name].data, NESTED)
    linear = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    assert [name for name in linear if "router" in name or name.endswith("gate")] == [] and not isinstance(
        model.lm_head, Linear4bit
    )
    model.save_pretrained(tmp_path / "quantized", max_shard_size="50KB")
    again = load(tmp_path / "quantized")
    assert_same_model(model, again)
    again.save_pretrained(tmp_path / "again")
    assert_same_model(model, load(tmp_path / "again"))


@pytest.mark.parametrize("skip", ["model.layers.0.mlp.experts", "experts.down_proj", "v_proj"])
def test_llm_int8_skip_modules_are_honoured_and_the_head_stays_too(registered, tmp_path, skip):
    full = dict(checkpoint(tmp_path / "full").named_parameters())
    model = load(tmp_path / "full", MoeBitsAndBytesConfig(llm_int8_skip_modules=[skip]))
    model.save_pretrained(tmp_path / "quantized")
    for each in (model, load(tmp_path / "quantized")):
        for name, x in each.named_parameters():
            stays = skip in name or name.endswith(
                ("norm.weight", "gate.weight", "embed_tokens.weight", "lm_head.weight")
            )
            assert isinstance(x, Params4bit) != stays
            assert not stays or same_bits(x.data, full[name].data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("skipped", ["gate_up_proj", "down_proj"])
def test_a_projection_that_stays_dense_is_trained_beside_one_in_4_bit(registered, tmp_path, skipped, dtype):
    """In its own dtype, whatever the other's bnb_4bit_compute_dtype, here bf16, says."""
    checkpoint(tmp_path)
    stock = load(tmp_path, dtype=dtype)
    config = MoeBitsAndBytesConfig(llm_int8_skip_modules=["q_proj", "k_proj", "v_proj", "o_proj", f"experts.{skipped}"])
    model = load(tmp_path, config, dtype=dtype)
    stacks = {name: x for name, x in experts_parameters(model).items() if isinstance(x, Params4bit)}
    assert [*stacks] == [name for name in experts_parameters(model) if skipped not in name]
    for name, parameter in stacks.items():
        stock.get_parameter(name).requires_grad_(False).copy_(decode(parameter, dtype))
    stock.set_experts_implementation("eager")
    assert_same_training(model, stock, ratio=RATIO if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("tiny", [QWEN3, Tiny("mixtral", {"num_local_experts": 64, "intermediate_size": 24})], ids=repr)
def test_no_more_than_a_few_experts_are_ever_there_in_full_precision(registered, tmp_path, tiny, monkeypatch):
    shapes = {x.shape[1:] for x in experts_parameters(checkpoint(tmp_path, tiny, num_experts=64)).values()}
    shapes |= {torch.Size((rows // 2, columns)) for rows, columns in shapes}
    read, most = [], []

    def reading(*arguments):
        tensor = read_from_file(*arguments)
        if tensor.shape in shapes:
            read.append(weakref.ref(tensor))
            most.append(sum(each() is not None for each in read))
        return tensor

    read_from_file = core_model_loading._materialize_copy
    monkeypatch.setattr(core_model_loading, "_materialize_copy", reading)
    load(tmp_path, NESTED)
    assert len(read) == 2 * 3 * 64
    assert max(most) <= 4  # gate and up of an expert, while those of the one before go


@pytest.mark.parametrize("dtype", [None, torch.float32, "float32"])
def test_dequantize_gives_a_model_in_full_precision(registered, tmp_path, dtype):
    full = checkpoint(tmp_path / "full", **SIZES)
    model = load(tmp_path / "full", NESTED)
    wanted = {name: decoded(x) for name, x in model.named_parameters() if isinstance(x, Params4bit)}
    model.dequantize(dtype)
    for name, want in wanted.items():
        assert same_bits(model.get_parameter(name).data, want.to(torch.float32 if dtype else torch.bfloat16))
    model.save_pretrained(tmp_path / "dense")
    assert tensor_names(tmp_path / "dense") == tensor_names(tmp_path / "full")  # each expert's matrices on their own
    again = load(tmp_path / "dense")
    assert again.state_dict().keys() == full.state_dict().keys()
    assert_same_model(model.bfloat16(), again)  # the config says that dtype, whatever was asked for
    assert model(tokens()).logits.isfinite().all()  # on the kernel, which must not take them for packed


TRANSPOSED = (ARIA, "AriaExperts", "its weights are stored transposed")


@pytest.mark.parametrize(
    ("tiny", "experts", "reason"),
    [*(pytest.param(*each, marks=pytest.mark.compat) for each in STOCK[:2]), TRANSPOSED],
    ids=repr,
)
def test_a_model_whose_experts_the_kernel_cannot_compute_is_an_error(registered, tmp_path, tiny, experts, reason):
    checkpoint(tmp_path, tiny)
    with pytest.raises(ValueError, match=f"no experts that can be in 4 bit; {experts}: {reason}"):
        load(tmp_path, NESTED)


MISTAKES = [
    ({"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type must be one of .*, got 'int4'"),
    ({"experts_blocksize": 96}, "experts_blocksize must be one of .*, got 96"),
    ({"bnb_4bit_compute_dtype": torch.float64}, "bnb_4bit_compute_dtype must be one of .*, got torch.float64"),
    ({"bnb_4bit_quant_storage": "int3"}, "bnb_4bit_quant_storage"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_settings_that_there_are_not_are_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        MoeBitsAndBytesConfig(**arguments)


def test_a_checkpoint_that_lacks_experts_is_an_error_that_names_the_stack(registered, tmp_path):
    checkpoint(tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight"))
    message = r"model.layers.1.mlp.experts.gate_up_proj: the checkpoint has 7 of 8 tensors .*up_proj.weight"
    with pytest.raises(ValueError, match=message):
        load(tmp_path, NESTED)


def test_an_expert_of_another_shape_is_an_error_that_names_the_stack(registered, tmp_path):
    checkpoint(tmp_path)
    name = "model.layers.0.mlp.experts.2.down_proj.weight"
    edit(tmp_path, lambda tensors: tensors.update({name: tensors[name][:, :-2].contiguous()}))
    with pytest.raises(
        ValueError, match=r"experts.down_proj: the model has 8 experts of \(32, 24\), .* 2 is \(32, 22\)"
    ):
        load(tmp_path, NESTED)


def stack(count: int = 4, shape: tuple = (6, 32), wanted: tuple = (6, 32), dtype: torch.dtype = torch.bfloat16):
    """Of ``count`` experts of one shape, where four of ``wanted`` belong."""
    settings = MoeBitsAndBytesConfig(bnb_4bit_quant_storage=torch.float64)
    return quantize_stack("x", (torch.ones(shape).to(dtype) for _ in range(count)), (4, *wanted), settings)


UNFIT = [
    (dict(count=3), "x: the checkpoint has 3 of its 4 experts"),
    (dict(count=5), r"x: the model has 4 experts of \(6, 32\), the checkpoint's expert 4 is \(6, 32\)"),
    (dict(shape=(32, 6)), r"x: the model has 4 experts of \(6, 32\), the checkpoint's expert 0 is \(32, 6\)"),
    (dict(dtype=torch.float8_e4m3fn), "x: only 16- and 32-bit floats can be quantized, got torch.float8_e4m3fn"),
    (dict(shape=(6, 33), wanted=(6, 33)), r"x: .* rows must have an even length, got \(4, 6, 33\)"),
    (dict(shape=(1, 6), wanted=(1, 6)), "x: 12 bytes cannot be stored as torch.float64"),
]


@pytest.mark.parametrize(("settings", "message"), UNFIT)
def test_matrices_that_make_no_stack_are_an_error_that_names_it(settings, message):
    with pytest.raises(ValueError, match=message):
        stack(**settings)
