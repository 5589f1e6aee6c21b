"""First call to first result, with nothing compiled: what a new user waits for.

Run as a program this is the process that is measured; :func:`cold_start` runs it with an empty Triton cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

TIMEOUT_S = 180


def cold_start(argv: list[str]) -> dict:
    """Seconds to load the kernel, then of the first forward and forward+backward at each number of tokens."""
    paths = [str(Path(__file__).resolve().parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-m", "harness.cold_start", *argv],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": cache},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    if done.returncode:
        raise RuntimeError(f"the process ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    from .measure import wall_time
    from .options import parse
    from .peers import load_kernel, ours
    from .problem import make_inputs, make_weights, run_pass, train_weights

    options = parse(description=__doc__)
    device = options.device
    weights = make_weights(options.shape, options.dtype, device)
    train_weights(weights, trained=False)
    loaded = []
    result = {"load_s": wall_time(lambda: loaded.append(load_kernel(options.kernel)), device), "first_calls": []}
    layer = ours(loaded[0], weights).layer
    for tokens in sorted(options.tokens, key=lambda tokens: tokens != options.settle_tokens):
        inputs = make_inputs(options.shape, tokens, options.dtype, device, seed=tokens)
        calls = {which: partial(run_pass, layer, which, inputs, weights) for which in ("forward", "frozen")}
        seconds = {which: wall_time(call, device) for which, call in calls.items()}
        result["first_calls"].append({"tokens": tokens, **seconds})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
