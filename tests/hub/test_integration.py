"""The integration's ``KernelSource`` against the Hub: a version, a commit, a lock file; and who must be trusted."""

import os

import pytest

from tests.conftest import ROOT
from tests.hub.conftest import BOTH, REPO, VARIANT
from tests.hub.test_lock import locked_project

PATH = os.pathsep.join(filter(None, (str(ROOT / "integration"), os.environ.get("PYTHONPATH"))))


@pytest.mark.compat
def test_kernelize_model_takes_a_version_a_commit_or_a_lock_file(user, both):
    def program(repo_id, commit, lockfile):
        import sys

        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        from qwen3_moe_integration import KernelSource, kernelize_model

        sizes = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 16}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_hidden_layers": 1}
        files = []
        for which in ({}, {"version": 2}, {"revision": commit}, {"lockfile": lockfile, "version": 2}):
            model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, num_experts=4, num_experts_per_tok=2))
            kernelize_model(model, kernel=KernelSource(repo_id, **which))
            files.append(sys.modules[model.model.layers[0].mlp.forward.__func__.__module__].__file__)
        return files

    files = user.call(program, BOTH, both["v2"], str(locked_project(user, BOTH)), PYTHONPATH=PATH)
    for file, branch in zip(files, ("v1", "v2", "v2", "v1"), strict=True):
        assert file.endswith(f"/snapshots/{both[branch]}/build/{VARIANT}/layers.py")


def test_a_publisher_must_be_trusted_by_the_hub_or_by_the_user(user, hub, v1, monkeypatch):
    def program(repo_id, lockfile):
        from qwen3_moe_integration import KernelSource

        outcomes = []
        for which in ({}, {"lockfile": lockfile}):
            for trust in (False, True):
                try:
                    KernelSource(repo_id, **which, trust_remote_code=trust).load()
                    outcomes.append("loaded")
                except ValueError as error:
                    outcomes.append(str(error))
        return outcomes

    lockfile = str(locked_project(user, REPO))
    monkeypatch.setattr(hub, "trusted", set())
    by_version, trusted, locked, trusted_locked = user.call(program, REPO, lockfile, PYTHONPATH=PATH)
    assert trusted == trusted_locked == "loaded"
    assert all("is not from a trusted publisher" in error for error in (by_version, locked))
