"""The published kernel in a user's hands: loaded by version, swapped into a model, overridden, offline."""

import pytest

from tests.hub.conftest import REPO, VARIANT


@pytest.mark.compat
def test_get_kernel_computes_the_experts_layer(user, v1):
    def program(repo_id):
        import torch
        from kernels import get_kernel

        moe = get_kernel(repo_id, version=1)
        torch.manual_seed(0)
        tokens, experts, hidden, intermediate, k = 13, 5, 24, 16, 2
        x = torch.randn(tokens, hidden, dtype=torch.float64).float()
        gate_up = torch.randn(experts, 2 * intermediate, hidden)
        down = torch.randn(experts, hidden, intermediate)
        index = torch.rand(tokens, experts).argsort(1)[:, :k]
        weights = torch.rand(tokens, k)

        expected = torch.zeros_like(x)
        for t in range(tokens):
            for j in range(k):
                gate, up = (gate_up[index[t, j]] @ x[t]).chunk(2)
                expected[t] += weights[t, j] * (down[index[t, j]] @ (torch.nn.functional.silu(gate) * up))
        out = moe.fused_experts(x, index, weights, gate_up, down)
        return ((out - expected).norm() / expected.norm()).item()

    assert user.call(program, REPO) < 1e-6


@pytest.mark.compat
def test_kernelized_model_equals_stock(user, v1):
    def program(repo_id):
        import torch
        from kernels import LayerRepository, Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 2}
        config = Qwen3MoeConfig(**sizes, **heads, num_experts=4, num_experts_per_tok=2, output_router_logits=True)
        model = Qwen3MoeForCausalLM(config).train()
        ids = torch.randint(0, 64, (2, 9))

        def step():
            model.zero_grad()
            out = model(input_ids=ids, labels=ids)
            out.loss.backward()
            return [out.loss, out.logits, out.aux_loss, *out.router_logits, *(p.grad for p in model.parameters())]

        stock = step()
        replace_kernel_forward_from_hub(Qwen3MoeSparseMoeBlock, "Qwen3MoeSparseMoeBlock")
        layer = LayerRepository(repo_id, layer_name="Qwen3MoeSparseMoeBlock", version=1)
        mapping = {"Qwen3MoeSparseMoeBlock": {"cpu": {Mode.TRAINING | Mode.TORCH_COMPILE: layer}}}
        with use_kernel_mapping(mapping, inherit_mapping=False):
            kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu")
        forwards = {block.mlp.forward.__func__.__module__ for block in model.model.layers}
        errors = [((a - b).norm() / b.norm().clamp(min=1e-9)).item() for a, b in zip(step(), stock)]
        return sorted(forwards), max(errors), len(errors)

    forwards, error, compared = user.call(program, REPO)
    assert len(forwards) == 1 and forwards[0].startswith("_qwen3_moe_fused_")
    assert forwards[0].endswith(".layers")
    assert compared > 20
    assert error < 1e-5


def test_the_card_on_the_hub_shows_code_that_runs(user, hub, v1):
    repository = hub.repository(REPO)
    card = repository.read(repository.resolve("main"), "README.md")[1].decode()
    snippets = [part.split("```")[0] for part in card.split("```python\n")[1:]]

    def program(snippets):
        import torch
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 1}
        config = Qwen3MoeConfig(**sizes, **heads, num_experts=4, num_experts_per_tok=2)
        Qwen3MoeForCausalLM(config).save_pretrained("Qwen/Qwen3-30B-A3B")  # a folder goes before the Hub
        names = {}
        for snippet in snippets:
            exec(snippet, names)
        block = names["model"].model.layers[0].mlp
        assert names["model"](torch.arange(9)[None].to(block.gate.weight.device)).logits.isfinite().all()
        return names["out"].shape == names["hidden_states"].shape, block.forward.__func__.__module__

    same_shape, module = user.call(program, snippets)
    assert len(snippets) == 2
    assert same_shape
    assert module.startswith("_qwen3_moe_fused_")


@pytest.mark.compat
def test_local_kernels_replaces_the_hub_without_asking_it(user, kernel_dir):
    def program(repo_id):
        from kernels import get_kernel

        return get_kernel(repo_id, version=1).__file__

    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    file = user.call(program, REPO, **nobody, LOCAL_KERNELS=f"{REPO}={kernel_dir}")
    assert file == str(kernel_dir / "build" / VARIANT / "__init__.py")


def test_full_snapshot_loads_offline(user, hub, v1):
    def program(repo_id, commit):
        from kernels import get_kernel

        by_version, by_commit = get_kernel(repo_id, version=1), get_kernel(repo_id, revision=commit)
        return by_version is by_commit, by_version.__file__

    user.shell(f"hf download {REPO} --repo-type kernel --revision v1")
    asked = len(hub.requests)
    same, file = user.call(program, REPO, v1, HF_HUB_OFFLINE="1")
    assert same
    assert file.endswith(f"/snapshots/{v1}/build/{VARIANT}/__init__.py")
    assert len(hub.requests) == asked
