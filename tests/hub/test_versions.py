"""Two versions of the kernel on one Hub, side by side in one process; and what the commands say about them."""

import json

from tests.hub.conftest import BOTH, VARIANT


def test_versions_and_commits_load_side_by_side_and_all_work(user, both):
    def program(repo_id, commits):
        import torch
        from kernels import get_kernel, get_loaded_kernels

        by_version = {"v1": get_kernel(repo_id, version=1), "v2": get_kernel(repo_id, version=2)}
        by_commit = {branch: get_kernel(repo_id, revision=commits[branch]) for branch in ("v1", "v2")}
        x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(2, 4, 8, requires_grad=True)
        expected = torch.cat([x[:3] @ weight[0].T, x[3:] @ weight[1].T])
        expected_grads = torch.autograd.grad(expected.sum(), (x, weight))
        for kernel in by_version.values():
            out = kernel.moe_fused_linear(x, weight, torch.tensor([3, 2]))
            grads = torch.autograd.grad(out.sum(), (x, weight))
            for got, wanted in zip((out, *grads), (expected, *expected_grads)):
                torch.testing.assert_close(got, wanted)
        loaded = [(kernel.metadata.version, kernel.metadata.id) for kernel in get_loaded_kernels()]
        have_ops = [hasattr(getattr(torch.ops, namespace), "moe_fused_linear") for _, namespace in loaded]
        return loaded, have_ops, [by_version[branch] is by_commit[branch] for branch in ("v1", "v2")]

    loaded, have_ops, same = user.call(program, BOTH, both)
    assert [version for version, _ in loaded] == [1, 2]
    assert len({namespace for _, namespace in loaded}) == 2
    assert have_ops == [True, True]
    assert same == [True, True]


def test_kernels_versions_lists_both_with_their_builds(user, both):
    listed = user.shell(f"kernels versions {BOTH}")
    for version in (1, 2):
        assert f"Version {version}:" in listed
    assert listed.count(f"{VARIANT} compatible, preferred") == 2
    assert listed.count("does not match system backend") == 2


def test_kernels_info_describes_a_version(user, both):
    info = json.loads(user.shell(f"kernels info {BOTH} --version 1 --json"))
    assert info["name"] == "qwen3-moe-fused"
    assert (info["version"], info["revision"], info["license"]) == (1, "v1", "Apache-2.0")
    assert info["backends"] == ["cpu", "cuda"]
    assert info["python_depends"] == []
    assert json.loads(user.shell(f"kernels info {BOTH} --json"))["version"] == 2, "the newest by default"
