"""Every page for users: its code blocks run as they stand, and its links lead somewhere.

What is checked after a page is that it did what it says, not only that it ran. What needs a Hub is run by tests/hub:
test_pinned_ci.py and test_load.py.
"""

import ast
import importlib
import json
import re
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

import qwen3_moe_integration
from qwen3_moe_integration import lora_linear, whole_adapters
from tests import stand_ins
from tests.documents import ROOT, blocks, in_own_process, run, run_commands, run_on_two_ranks
from tests.integration.adapters import assert_same_additions
from tests.integration.models import ExpertsCalls

GUIDES = sorted(path.relative_to(ROOT) for path in (ROOT / "docs").glob("*.md"))
PAGES = [*map(str, GUIDES), "README.md", "CARD.md", "integration/README.md", "benchmarks/README.md"]
ON_A_HUB = ["docs/pinned-ci.md", "CARD.md"]
CI = ".github/workflows/ci.yml"
RUN = {"python", "bash", "toml"}
SHOWN = {"text", "mermaid"}


@pytest.fixture(scope="module")
def environment(kernel_dir) -> dict[str, str]:
    return {"LOCAL_KERNELS": f"org/qwen3-moe-fused={kernel_dir}", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def files(environment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stand_ins")
    in_own_process(stand_ins.make, folder=folder, environment=environment)
    return folder


@pytest.fixture
def folder(files, tmp_path):
    return shutil.copytree(files, tmp_path / "page")


def check_readme(after):
    model, script = after
    check_runs_on_the_kernel(model["model"])
    assert script["out"].shape == script["tokens"].shape and script["out"].isfinite().all()
    assert Path("build/torch-cpu/metadata.json").is_file()
    check_finetuned(Path("outputs/finetune"))


def check_finetuned(output):
    """By examples/finetune.py."""
    adapter = load_file(output / "model/adapter_model.safetensors")
    assert len([name for name in adapter if "experts" in name]) == 2 * 2 * 3
    assert (output / "loss.png").is_file() and (output / "checkpoints/checkpoint-2/trainer_state.json").is_file()


def check_script(after):
    names = after[-1]
    T, H, I, E, k = (names[name] for name in "THIEk")
    assert names["out"].shape == (T, H) and names["dense"].shape == (E, 2 * I, H)
    assert names["hidden_states"].grad.norm() > 0 and names["B"].grad.norm() > 0
    assert names["gate_and_up"].shape == (T * k, 2 * I)
    assert len(names["kept"]) == 1 and names["again"].isnan().all()
    seed, *_ = names["kept"][0]
    with patch.object(torch, "randint", lambda *_, **options: seed):
        out = names["moe"].fused_experts(*names["arguments"], gate_up_lora=names["gate_up_lora"])
    assert torch.equal(out, names["out"])
    want = torch.autograd.grad(out, (names["hidden_states"], names["A"], names["B"]), names["grad_output"])
    assert all(map(torch.equal, names["grads"], want))


def check_kernelize(after):
    there, installed = (Path(folder, "qwen3_moe_integration") for folder in ("integration", "installed"))
    modules = {file.relative_to(there) for file in there.rglob("*.py")}
    assert modules and modules == {file.relative_to(installed) for file in installed.rglob("*.py")}
    for names in after:
        check_runs_on_the_kernel(names["model"])
    for model in (after[-1]["again"], after[-1]["model"]):
        stack = model.get_submodule("model.layers.0.mlp.experts").down_proj
        assert stack.quant_state.shape[0] == model.config.num_experts
        check_runs_on_the_kernel(model)


def check_peft(after):
    trained = after[1]["model"]
    check_runs_on_the_kernel(trained)
    attention = [module for module in trained.modules() if isinstance(module, lora_linear.Linear4bit)]
    assert len(attention) == 4 * trained.config.num_hidden_layers
    for layer in attention:
        assert layer._plain_lora(torch.empty(1, layer.in_features, dtype=torch.bfloat16, device=trained.device))
    check_runs_on_the_kernel(after[-1]["merged"])
    assert not [name for name, _ in after[-1]["merged"].named_parameters() if "lora" in name]


def check_trl(after):
    check_runs_on_the_kernel(after[-1]["model"])
    assert Path("my-adapter/adapter_model.safetensors").is_file()
    assert {p.dtype for p in after[-1]["trainer"].model.parameters() if p.requires_grad} == {torch.bfloat16}
    check_finetuned(Path("outputs/finetune"))
    if "plain" in after[-1]:
        check_runs_on_the_kernel(after[-1]["plain"])


def check_unsloth(after):
    check_runs_on_the_kernel(after[-1]["model"])
    for adapter in ("my-adapter", "outputs/finetune-unsloth/model"):
        assert Path(adapter, "adapter_model.safetensors").is_file()


def check_other_models(after):
    for names in after:
        check_runs_on_the_kernel(names["model"])


def check_convert(after):
    check_runs_on_the_kernel(after[-1]["adapted"])
    assert_same_additions(Path("v4-adapter"), Path("my-v5-adapter"))
    keys = " ".join(load_file("my-adapter-uniform/adapter_model.safetensors"))
    assert all(f".experts.{e}.down_proj.lora_A.weight" in keys for e in range(16))
    config = json.loads(Path("my-adapter-uniform/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (16, 16, {}, {})


def check_scaling(after):
    """On each of two ranks: the adapters are the two's together, trained; the other model is kept in halves."""
    shared, expert_parallel = after
    with whole_adapters(shared["model"]):
        here = {name: p for name, p in shared["model"].named_parameters() if "lora_" in name}
        saved = load_file("adapter/adapter_model.safetensors")
        assert len(saved) == len(here) and all(saved[name.replace(".default", "")].equal(p) for name, p in here.items())
    B = [factor for name, factor in saved.items() if "experts" in name and "lora_B" in name]
    E = shared["model"].config.num_experts
    assert len(B) == 2 * 3 and all(each.view(-1, 16, E).any(0).any(0).all() for each in B)
    stack = expert_parallel["model"].get_submodule("model.layers.0.mlp.experts").gate_up_proj
    assert shared["ranks"].num_processes == 2 and 2 * len(stack.to_local()) == len(stack) == E
    check_runs_on_the_kernel(expert_parallel["model"])


def check_launched(after):
    """The commands for several processes."""
    assert after == []
    check_finetuned(Path("outputs/ddp"))
    check_finetuned(Path("outputs/fsdp2"))
    result = json.loads(Path("results/scaling.json").read_text())
    assert result["ranks"] == 2 and len(result["runs"]) == 3 and result["graphs"]


def check_tuning(after):
    assert after == []
    assert complete("results/compare.json") and complete("results/crossover.json")
    assert complete("results/uneven/crossover.json") and Path("results/profile.md").is_file()
    cards = json.loads(Path("results/compile_report.json").read_text())["cards"]
    assert [*cards] == ["sm_86"] and cards["sm_86"]
    if torch.cuda.is_available():
        card = torch.cuda.get_device_name().replace(" ", "_")
        for table in ("rows.json", f"torch-ext/qwen3_moe_fused/configs/{card}.json"):
            assert json.loads(Path(table).read_text())["tilings"].keys() == {"1"}


def check_benchmarks(after):
    assert after == []
    results = Path("benchmarks/results")
    assert all(complete(results / f"{name}.json") for name in ("compare", "compare-four-bit", "compare-lora"))
    assert (results / "compare-four-bit-time.png").is_file() and (results / "profile.md").is_file()
    verified = json.loads(Path("benchmark.json").read_text())["results"]
    assert len(verified) == 6 and all(each["verified"] for each in verified)


def complete(file):
    return json.loads(Path(file).read_text())["complete"]


def check_runs_on_the_kernel(model):
    with torch.no_grad(), ExpertsCalls() as calls:
        logits = model(torch.arange(9, 17, device=model.device)[None]).logits
    assert calls.forward == model.config.num_hidden_layers and logits.isfinite().all()


CHECKS = {
    "README.md": check_readme,
    "docs/script.md": check_script,
    "docs/kernelize.md": check_kernelize,
    "docs/peft.md": check_peft,
    "docs/trl.md": check_trl,
    "docs/unsloth.md": check_unsloth,
    "docs/other-models.md": check_other_models,
    "docs/convert.md": check_convert,
    "docs/tuning.md": check_tuning,
    "docs/scaling.md": check_launched,  # its Python, on two ranks: check_scaling
    "benchmarks/README.md": check_benchmarks,
}
RUNNING = [page for page in PAGES if page not in ON_A_HUB and RUN & {block.language for block in blocks(ROOT / page)}]


@pytest.mark.parametrize("page", RUNNING)
def test_the_page_runs(page, folder, environment):
    if page == "docs/trl.md" and not torch.cuda.is_available():
        environment = environment | {"TRITON_INTERPRET": "1"}  # TRL computes its loss by a Triton kernel
    if page == "docs/scaling.md":
        environment = environment | {"CUDA_VISIBLE_DEVICES": ""}  # its processes are several, GPUs may be one
    chosen = [block for block in blocks(ROOT / page) if not block.needs]
    run(ROOT / page, chosen, folder, CHECKS[page], environment)


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.needs == "ranks" for b in blocks(ROOT / page))])
def test_what_needs_ranks_runs_on_two(page, folder, environment):
    chosen = [block for block in blocks(ROOT / page) if block.needs == "ranks"]
    run_on_two_ranks(ROOT / page, chosen, folder, check_scaling, environment)


def test_steps_of_a_model_that_unsloth_loads_are_timed(folder, environment):
    """In a process that has imported nothing of these tests, for the integration would wrap Unsloth's own experts."""
    (commands,) = (block.code for block in blocks(ROOT / "docs/unsloth.md") if block.needs == "itself")
    in_own_process(run_commands, commands, folder=folder, environment=environment)
    stem = folder / "benchmarks/results/train_step-1-layers-unsloth"
    theirs, ours = (json.loads(Path(f"{stem}{name}.json").read_text())["experts"] for name in ("", "-kernel"))
    assert (theirs, ours) == ("Unsloth", "this kernel")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "page", [page for page in RUNNING if any(block.needs == "gpu" for block in blocks(ROOT / page))]
)
def test_the_page_runs_whole_on_a_gpu(page, folder, environment):
    chosen = [block for block in blocks(ROOT / page) if block.needs in ("", "gpu")]
    run(ROOT / page, chosen, folder, CHECKS[page], environment)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_only_shown(page):
    found = blocks(ROOT / page)
    assert 2 * len(found) == len(re.findall(r"^\s*```", (ROOT / page).read_text(), re.M))
    assert {block.language for block in found} <= RUN | SHOWN
    assert {block.needs for block in found} <= {"", "gpu", "hub", "ranks", "itself"}
    assert [block for block in found if block.language in SHOWN and is_code(block.code)] == []


def is_code(text: str) -> bool:
    """Whether it is Python, or has a line that begins with a command."""
    try:
        ast.parse(text)
        return True
    except SyntaxError:
        return re.search(r"^\s*(python|pip|make|kernels|accelerate|torchrun) ", text, re.M) is not None


def test_code_does_not_pass_for_text():
    assert is_code("model = load()\nwith model:\n    train(...)\n") and is_code("\npip install 'kernels>=0.16'\n")
    assert not is_code("out[token] = sum over its k experts of  weight\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("python examples/finetune.py --trainer nonsense --seq-len banana", "invalid choice: 'nonsense'"),
        ("python examples/finetune.py --seq-len banana", "invalid integer value: 'banana'"),
        ("python examples/finetune.py --offload experts", "--offload is for what graphs keep"),
        ("python examples/generate.py --adaptor mine", "unrecognized arguments: --adaptor mine"),
        ("python benchmarks/compare.py --four-bit --passes trained", "here the peers are"),
        ("python tune.py --rows 3", "invalid choice: 3"),
        ("python -m qwen3_moe_integration convert in out --to stack", "invalid choice: 'stack'"),
        ("accelerate launch --config_file examples/accelerate/no.yaml examples/finetune.py", "no.yaml"),
        ("accelerate launch --config_file examples/accelerate/ddp.yaml examples/finetune.py --bits 5", "choice: 5"),
        ("torchrun --nodes=2 benchmarks/scaling.py", "error"),
        ("torchrun --nproc-per-node=2 benchmarks/scaling.py --layers few", "invalid int value: 'few'"),
        ("pip install no-such-package-xyz", "no-such-package-xyz is no package"),
        ("pip install 'kernels>=99'", "kernels>=99 is no package"),
        ("pip install ./nowhere", "'./nowhere'"),
        ("python benchmarks/plot.py missing.json", "No such file or directory"),
        ("make test NONSENSE", "No rule to make target"),
        ("make benchmarks", "Nothing to be done for"),
        ("kernels benchmark nowhere", "must specify either branch or version"),
        ("kernels measure .", "does not know"),
        ("curl example.org", "does not know"),
    ],
)
def test_a_command_that_would_fail_is_not_passed_over(line, message, folder):
    with pytest.raises(AssertionError, match=re.escape(message)) as raised:
        in_own_process(run_commands, line, folder=folder, environment={})
    assert f"AssertionError: {line}" in str(raised.value)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!https?://)([^)#\s]*)(#[^)\s]*)?\)", text):
        path, anchor = target
        other = (ROOT / page).parent / path if path else ROOT / page
        assert other.exists(), f"{page}: {path}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", other.read_text(), re.M)
            assert anchor[1:] in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, anchor


def test_the_thresholds_are_those_of_the_kernel(kernel):
    text = (ROOT / "docs/how-it-works.md").read_text()
    regime = importlib.import_module(f"{kernel.__name__}.regime")
    for threshold in (f"{regime.GEMV_SLOTS} slots", f"{regime.FAST_ROWS} rows", f"{regime.PLAIN_ROWS} rows"):
        assert f"at most {threshold}" in text
    large, rows, small = regime.LARGE_SCRATCH >> 20, regime.LARGE_SCRATCH_ROWS, regime.SCRATCH >> 20
    assert f"as {large} MiB hold, above {rows} rows per expert {small} MiB" in " ".join(text.split())


def test_what_the_guide_says_of_4_bit_and_routing_was_measured():
    text = " ".join((ROOT / "docs/how-it-works.md").read_text().split())
    result = json.loads((ROOT / "benchmarks/results/nvidia-h200/compare-four-bit.json").read_text())
    graph, call = (
        next(r[time]["median"] for r in result["routing"] if r["tokens"] == 4096 and r["name"] == "qwen3-moe-fused")
        for time in ("graph_ms", "call_ms")
    )
    assert f"takes {graph:.3f} ms in a CUDA graph, and {call:.2f} as a call of its own" in text
    few, some, many, decoded = (
        next(r["peak_bytes"] / 2**20 for r in result["layer"] if (r["peer"], r["pass"], r["tokens"]) == each)
        for each in (("qwen3-moe-fused", "forward", tokens) for tokens in (16, 1024, 4096, 16384))
    )
    assert f"{few:.0f} MiB in all at 16 tokens, {some:.0f} at 1024, {many:.0f} at 4096" in text
    assert f"at 16384, dequantized, {decoded:.0f} " in text


def test_readme_asks_for_the_python_that_the_scripts_need():
    """And that CI has: the integration alone is content with an older one."""
    minor = re.search(r'"scripts/\*\*" = "py3(\d+)"', (ROOT / "pyproject.toml").read_text())[1]
    for file, words in (("README.md", "With Python {}"), ("Makefile", "Python {} or"), (CI, 'python-version: "{}"')):
        assert words.format(f"3.{minor}") in (ROOT / file).read_text(), file


def test_every_public_name_is_in_the_guides(kernel):
    guides = " ".join((ROOT / guide).read_text() for guide in GUIDES)
    assert [name for name in kernel.__all__ if not re.search(rf"\b{name}\b", guides)] == []
    readme = (ROOT / "integration/README.md").read_text()
    assert [name for name in qwen3_moe_integration.__all__ if f"`{name}(" not in readme] == []


def test_every_guide_is_in_the_index():
    index = (ROOT / "docs/README.md").read_text()
    assert [str(guide) for guide in GUIDES if guide.name != "README.md" and f"({guide.name})" not in index] == []
