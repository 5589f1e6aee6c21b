"""The integration's ``KernelSource`` against the Hub: a version, a commit and a lock file."""

import os

import pytest

from tests.conftest import ROOT
from tests.hub.conftest import REPO, VARIANT
from tests.hub.test_lock import locked_project


@pytest.mark.compat
def test_kernelize_model_takes_a_version_a_commit_or_a_lock_file(user, v1):
    def program(commit, lockfile):
        import sys

        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        from qwen3_moe_integration import KernelSource, kernelize_model

        sizes = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 16}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_hidden_layers": 1}
        files = []
        for source in (KernelSource(), KernelSource(revision=commit), KernelSource(lockfile=lockfile)):
            model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, num_experts=4, num_experts_per_tok=2))
            kernelize_model(model, kernel=source)
            files.append(sys.modules[model.model.layers[0].mlp.forward.__func__.__module__].__file__)
        return files

    path = os.pathsep.join(filter(None, (str(ROOT / "integration"), os.environ.get("PYTHONPATH"))))
    files = user.call(program, v1, str(locked_project(user, REPO)), PYTHONPATH=path)
    assert len(files) == 3
    assert all(file.endswith(f"/snapshots/{v1}/build/{VARIANT}/layers.py") for file in files)
