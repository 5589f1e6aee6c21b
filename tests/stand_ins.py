"""What pages find in their folder, made there: the repository as a reader has it, and small files that stand for names
of the Hub or of a reader's files."""

import json
import sys
from pathlib import Path

from transformers import Qwen3MoeConfig

from tests.documents import ROOT, copy_checkout
from tests.integration.adapters import V4Adapter
from tests.integration.models import Tiny
from tests.integration.quantized import SIZES, checkpoint
from tests.integration.test_quantize_legacy import quantize_v4

MIXTRAL = Tiny("mixtral", {"num_local_experts": 8, "intermediate_size": 24})


def make() -> None:
    copy_checkout(Path())
    sys.path.insert(0, str(ROOT / "examples"))
    from tiny_checkpoint import make_checkpoint

    for owner in ("Qwen", "mistralai"):
        Path(owner).mkdir()
    qwen = Path("Qwen/Qwen3-30B-A3B")
    make_checkpoint(qwen)
    config = Qwen3MoeConfig.from_pretrained(qwen)
    MIXTRAL.build().bfloat16().save_pretrained("mistralai/Mixtral-8x7B-v0.1")
    checkpoint(Path("old-4bit"), **SIZES)
    quantize_v4(Path("old-4bit"), nested=True)
    sizes = config.hidden_size, config.moe_intermediate_size, config.num_experts, tuple(range(config.num_hidden_layers))
    V4Adapter(*sizes).save(Path("v4-adapter"))
    text = "A grouped product multiplies every row by the matrix of its own expert. " * 4
    Path("notes.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for _ in range(8)))
