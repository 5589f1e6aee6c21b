"""Routing alone: the order by expert, the rows of each and where they start, against the same from PyTorch's ops.

Ours makes the table of tiles as well; a table is what PyTorch's grouped product makes for itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from .contest import attempt
from .measure import repeats, summary, time_calls, time_graph, wall_time
from .peers import OURS
from .problem import Inputs

BLOCK_M = 128
SORT = "torch.sort + histc"


def sort_and_histc(top_k_index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order, rows per expert, end of each expert's rows."""
    ids, order = torch.sort(top_k_index.reshape(-1))
    ids = ids.int() if ids.is_cuda else ids.float()  # histc takes no integers on a CPU
    m_sizes = torch.histc(ids, bins=experts, min=0, max=experts - 1)
    return order, m_sizes, torch.cumsum(m_sizes, 0, dtype=torch.int32)


def routing_records(kernel: ModuleType, sets: Sequence[Inputs], options: argparse.Namespace) -> list[dict]:
    """Call and graph times of both, for one number of tokens."""
    experts = options.shape.experts
    makers = {OURS: partial(kernel.routing, num_experts=experts, block_m=BLOCK_M), SORT: None}
    makers[SORT] = partial(sort_and_histc, experts=experts)
    records = []
    for name, make in makers.items():
        record = {"tokens": sets[0].top_k_index.shape[0], "name": name}
        measured, reason = attempt(partial(_measure, make, sets, options), options.device)
        records.append({**record, **(measured or {"reason": reason})})
    return records


def _measure(make, sets: Sequence[Inputs], options: argparse.Namespace) -> dict:
    order, m_sizes, *_ = make(sets[0].top_k_index)
    ids = sets[0].top_k_index.reshape(-1)
    counts = torch.bincount(ids, minlength=options.shape.experts)
    if not (torch.equal(ids[order.long()], ids.sort().values) and torch.equal(m_sizes.long(), counts)):
        return {"reason": "the rows are not in the order of their experts"}
    calls = [partial(make, inputs.top_k_index) for inputs in sets]
    count = repeats(options.budget_ms, 1e3 * wall_time(calls[0], options.device))
    record = {"call_ms": summary([time_calls(calls, count, options.device)])}
    if options.device == "cuda":
        record["graph_ms"] = summary([time_graph(calls, options.budget_ms)])
    return record
