"""The command line of ``compare.py``, read in the same way by the cold-start process."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import four_bit
from .peers import PEERS
from .problem import PASSES, TOLERANCE, Shape

TOKENS = [1, 16, 128, 1024, 4096, 16384]
FULL = {"shape": Shape(), "tokens": TOKENS, "input_sets": 8, "rounds": 3, "budget_ms": 250.0}
QUICK = {"shape": Shape(64, 64, 8, 2), "tokens": [1, 16, 128], "input_sets": 2, "rounds": 1, "budget_ms": 10.0}
SETTLE_TOKENS = 4096  # the size at which everything is compiled and tuned first


def parse(argv: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parent.parent
    parser.add_argument("--kernel", type=Path, help="a local build (the folder that holds build/) instead of the Hub's")
    parser.add_argument("--out", type=Path, default=here / "results", help="folder of the results")
    parser.add_argument("--four-bit", action="store_true", help="weights in nf4")
    parser.add_argument("--peers", nargs="+", choices=list(dict.fromkeys(PEERS + four_bit.PEERS)), help="default: all")
    parser.add_argument("--passes", nargs="+", choices=PASSES, help="default: all; in 4 bit, weights are frozen")
    parser.add_argument("--tokens", nargs="+", type=int, help=f"default: {' '.join(map(str, TOKENS))}")
    parser.add_argument("--shape", nargs=4, type=int, metavar=("H", "I", "E", "k"), help="default: Qwen3-30B-A3B's")
    parser.add_argument("--dtype", choices=[str(dtype).split(".")[1] for dtype in TOLERANCE], default="bfloat16")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget-ms", type=float, help="time spent on one peer in one pass; default: 250")
    parser.add_argument("--rounds", type=int, help="turns in which the peers share that time; default: 3")
    parser.add_argument("--input-sets", type=int, help="inputs that calls go round; default: 8")
    parser.add_argument("--no-cold-start", dest="cold_start", action="store_false", help="do not time the first call")
    parser.add_argument("--quick", action="store_true", help="a tiny layer and few calls: tests this harness, no more")
    options = parser.parse_args(argv)
    peers, passes = (four_bit.PEERS, PASSES[:2]) if options.four_bit else (PEERS, PASSES)
    options.peers, options.passes = options.peers or list(peers), options.passes or list(passes)
    if not (set(options.peers) <= set(peers) and set(options.passes) <= set(passes)):
        parser.error(f"here the peers are {', '.join(peers)} and the passes {', '.join(passes)}")
    options.cold_start = options.cold_start and not options.four_bit
    options.dtype = getattr(torch, options.dtype)
    options.shape = Shape(*options.shape) if options.shape else None
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.settle_tokens = min(SETTLE_TOKENS, max(options.tokens))
    return options
