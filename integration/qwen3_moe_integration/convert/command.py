"""Writes a LoRA adapter or a checkpoint again in another layout; which one it is in now is recognised."""

import argparse

from . import ADAPTER_FORMATS, CHECKPOINT_FORMATS, convert

HELP = "convert an adapter or a checkpoint between layouts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="folder to read")
    parser.add_argument("target", metavar="OUT", help="folder to write; must not exist, and appears when complete")
    parser.add_argument(
        "--to", required=True, choices=sorted({*ADAPTER_FORMATS, *CHECKPOINT_FORMATS}), help="layout to write"
    )
    parser.add_argument(
        "--uniform",
        action="store_true",
        help="one rank and scaling 1 for everything, for tools that read only lora_alpha",
    )
    parser.add_argument(
        "--check", action="store_true", help="read OUT again and compare what it holds for every expert"
    )


def run(arguments: argparse.Namespace) -> None:
    convert(arguments.source, arguments.target, arguments.to, arguments.uniform, arguments.check)
    print(f"{arguments.target}: {arguments.to}" + (", checked" if arguments.check else ""))
