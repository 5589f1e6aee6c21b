"""Stands in for tabulate, by which ``kernels benchmark`` prints its table: the cells, without the lines around them."""


def tabulate(rows: list, headers: list, tablefmt: str) -> str:
    return "\n".join(" ".join(map(str, row)) for row in (headers, *rows))
