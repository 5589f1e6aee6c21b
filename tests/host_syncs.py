"""Synchronizations of the host, who asks for the values of tensors and on a GPU waits for each answer."""

import sys
from pathlib import Path
from typing import Any

import torch

SYNCS = "__bool__", "__int__", "__float__", "__index__", "item", "tolist", "numpy", "cpu"


def host_syncs(monkeypatch: Any) -> list[str]:
    """From now on, the files whose code asks; but for the kernel's CPU backend, which does where others launch."""
    files = []

    def noted(name: str):
        answer = getattr(torch.Tensor, name)

        def ask(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            file = Path(sys._getframe(1).f_code.co_filename)
            if not (file.name == "reference.py" and file.parent.name in ("torch-cpu", "torch-cuda")):
                files.append(file.name)
            return answer(tensor, *args, **kwargs)

        return ask

    for name in SYNCS:
        monkeypatch.setattr(torch.Tensor, name, noted(name))
    return files
