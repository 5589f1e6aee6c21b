"""Tables from the JSON of a run, as Markdown: milliseconds, memory, errors, and why a cell is empty."""

from __future__ import annotations

from collections.abc import Iterable

from .peers import OURS
from .problem import PASSES

TITLES = {
    "forward": "Forward",
    "frozen": "Forward + backward, frozen experts (gradients of hidden states and routing weights)",
    "trained": "Forward + backward, trained experts (expert weight gradients too)",
}


def report(results: dict) -> str:
    """The whole run as Markdown."""
    parts = [_header(results)]
    for which in PASSES:
        records = [record for record in results["layer"] if record["pass"] == which]
        if records:
            parts += [f"## {TITLES[which]}", _times(results, records), _memory(results, records)]
    parts += [_errors(results), _routing(results), _notes(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def value(record: dict, key: str) -> float | None:
    """A measurement of a record, the median where it is a time; None if the record has none."""
    found = record.get(key)
    return found["median"] if isinstance(found, dict) else found


def lead(records: Iterable[dict], key: str) -> float | None:
    """The best peer's measurement over ours, of the records of one pass at one number of tokens."""
    values = {record["peer"]: value(record, key) for record in records if value(record, key)}
    own = values.pop(OURS, None)
    return min(values.values()) / own if own and values else None


def _header(results: dict) -> str:
    env, shape = results["environment"], results["shape"]
    lines = [
        f"{env['device']}, torch {env['torch']}, triton {env['triton']}, transformers {env['transformers']}, "
        f"Liger {env['liger-kernel']}; {results['dtype']}, H {shape['hidden']}, I {shape['intermediate']}, "
        f"E {shape['experts']}, top-{shape['top_k']}.",
        f"`{results['command']}`" + ("" if results["complete"] else f" - not complete: {results['aborted']}"),
    ]
    if results["ceilings"]:
        lines.append(
            f"Ceilings of this GPU in this run: {results['ceilings']['operations_per_second'] / 1e12:.0f} TFLOP/s, "
            f"{results['ceilings']['bytes_per_second'] / 1e12:.2f} TB/s."
        )
    cold = results["cold_start"]
    if cold and "first_calls" in cold:
        first = ", ".join(f"{c['tokens']}: {c['forward']:.1f} + {c['frozen']:.1f}" for c in cold["first_calls"])
        lines.append(f"Cold start, s: load {cold['load_s']:.1f}; forward + forward-and-backward by tokens {first}.")
    elif cold:
        lines.append(f"Cold start failed: {cold['reason']}")
    return "\n\n".join(lines)


def _times(results: dict, records: list[dict]) -> str:
    rows = _rows(records, "call_ms", "ms a call") + _rows(records, "graph_ms", "ms in a CUDA graph")
    rows += [_lead_row(records, "call_ms", "calls"), _lead_row(records, "graph_ms", "graphs")]
    which = records[0]["pass"]
    floors = (results["floors_ms"].get(f"{which} {tokens}") for tokens in _tokens(records))
    rows.append(["floor of this GPU, ms", *(_number(floor, "{:.3f}") for floor in floors)])
    return _table(["", *map(str, _tokens(records))], rows)


def _memory(results: dict, records: list[dict]) -> str:
    rows = [*_rows(records, "peak_bytes", "peak MiB", "{:.1f}", 2**20), _lead_row(records, "peak_bytes", "memory")]
    return _table(["", *map(str, _tokens(records))], rows)


def _routing(results: dict) -> str:
    records = [{**record, "peer": record["name"]} for record in results["routing"]]
    rows = _rows(records, "call_ms", "ms a call") + _rows(records, "graph_ms", "ms in a CUDA graph")
    return _titled("Routing alone", _table(["", *map(str, _tokens(records))], rows))


def _errors(results: dict) -> str:
    checked = [record for record in results["layer"] if "errors" in record]
    names = list(dict.fromkeys(name for record in checked for name in record["errors"]))
    rows = []
    for peer in dict.fromkeys(record["peer"] for record in checked):
        errors = [record["errors"] for record in checked if record["peer"] == peer]
        rows.append([peer, *(_largest([error[name] for error in errors if name in error]) for name in names)])
    return _titled("Largest relative error against fp64", _table(["", *names], rows))


def _largest(errors: list[float | None]) -> str:
    return "NaN" if None in errors else _number(max(errors, default=None), "{:.1e}")


def _notes(results: dict) -> str:
    notes = [
        f"- {peer['name']} computes the expert weights' gradients in every backward, frozen or not."
        for peer in results["peers"]
        if peer.get("always_weight_grads")
    ]
    notes += [f"- {peer['name']}: {peer['reason']}" for peer in results["peers"] if peer.get("reason")]
    for record in results["layer"]:
        if record.get("reason"):
            where = f"{record['peer']}, {record['pass']}, {record['tokens']} tokens"
            notes.append(f"- {where}: {record['status']}, {record['reason']}")
    for record in results["routing"]:
        if record.get("reason"):
            notes.append(f"- {record['name']}, routing, {record['tokens']} tokens: {record['reason']}")
    no_graph = ((record["peer"], record.get("graph_reason")) for record in results["layer"])
    notes += [f"- {peer} has no time in a CUDA graph: {why}." for peer, why in dict.fromkeys(no_graph) if why]
    return _titled("Notes", "\n".join(notes))


def _rows(records: list[dict], key: str, unit: str, form: str = "{:.3f}", scale: float = 1.0) -> list[list[str]]:
    """A row for each peer, a column for each number of tokens."""
    rows = []
    for peer in dict.fromkeys(record["peer"] for record in records):
        values = {record["tokens"]: value(record, key) for record in records if record["peer"] == peer}
        rows.append([f"{peer}, {unit}", *(_number(values.get(tokens), form, scale) for tokens in _tokens(records))])
    return rows


def _lead_row(records: list[dict], key: str, name: str) -> list[str]:
    groups = ([record for record in records if record["tokens"] == tokens] for tokens in _tokens(records))
    return [f"**best peer / ours, {name}**", *(_number(lead(group, key), "{:.2f}x") for group in groups)]


def _tokens(records: list[dict]) -> list[int]:
    return sorted({record["tokens"] for record in records})


def _number(number: float | None, form: str, scale: float = 1.0) -> str:
    return "" if number is None else form.format(number / scale)


def _titled(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table of the rows that have anything in them; nothing if there are none."""
    filled = [row for row in rows if any(row[1:])]
    if not filled:
        return ""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *filled]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
