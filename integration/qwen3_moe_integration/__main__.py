"""The command line: ``python -m qwen3_moe_integration convert IN OUT --to LAYOUT``, ``... plan --model MODEL``."""

import argparse
import sys
from collections.abc import Sequence
from typing import Optional

from .convert import command as convert
from .plan import command as plan

COMMANDS = {"convert": convert, "plan": plan}
"""Each has a one-line ``HELP``, ``add_arguments(parser)``, and ``run(arguments)``, which raises what went wrong."""


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="qwen3_moe_integration", description=__doc__.partition(":")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.HELP, description=command.__doc__))
    parsed = parser.parse_args(arguments)
    try:
        COMMANDS[parsed.command].run(parsed)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
