"""The text to train on: read from where it is, and cut into sequences of one length."""

import json
from pathlib import Path

from datasets import Dataset, load_dataset
from tiny_checkpoint import texts


def read_texts(dataset: str | None, column: str) -> list[str]:
    """The documents of a text file (one), a JSONL file (one a line) or a dataset's train split (one a row)."""
    if dataset is None:
        return texts()
    path = Path(dataset)
    if path.suffix in (".txt", ".md", ".json", ".jsonl") and not path.is_file():
        raise SystemExit(f"--dataset: there is no file {path}")
    if not path.is_file():
        rows = load_dataset(dataset, split="train")
        if column not in rows.column_names:
            raise SystemExit(f"--dataset {dataset}: no column {column!r}, there are {', '.join(rows.column_names)}")
        return [_string(row, f"{dataset}, row {number}, {column!r}") for number, row in enumerate(rows[column])]
    if path.suffix not in (".json", ".jsonl"):
        return [path.read_text(encoding="utf-8")]
    documents = []
    # Not splitlines(), which also ends a line at characters that JSON may hold as they are, such as U+2028.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                document = json.loads(line)[column]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise SystemExit(
                    f"--dataset {path}, line {number}: wants JSON with {column!r}, got {error!r}"
                ) from None
            documents.append(_string(document, f"{path}, line {number}, {column!r}"))
    return documents


def _string(document: object, where: str) -> str:
    if not isinstance(document, str):
        raise SystemExit(f"--dataset {where}: wants a string, got {document!r:.60}")
    return document


def pack(documents: list[str], tokenizer, seq_len: int) -> tuple[Dataset, Dataset]:
    """All documents end to end, cut into sequences of ``seq_len`` tokens; every twentieth is held out."""
    tokens = []
    for document in documents:
        tokens += [*tokenizer(document).input_ids, tokenizer.eos_token_id]
    sequences = [tokens[i : i + seq_len] for i in range(0, len(tokens) - seq_len + 1, seq_len)]
    if len(sequences) < 2:
        raise SystemExit(
            f"--dataset: {len(tokens)} tokens are too few for a sequence to train on and one to hold out "
            f"({2 * seq_len} tokens); give more text or a smaller --seq-len"
        )
    held_out, kept = sequences[::20], [row for i, row in enumerate(sequences) if i % 20]
    print(f"Text: {len(tokens)} tokens; {len(kept)} sequences of {seq_len} to train on, {len(held_out)} held out.")
    return tuple(Dataset.from_dict({"input_ids": rows, "labels": rows}) for rows in (kept, held_out))
