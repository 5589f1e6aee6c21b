"""Writes a LoRA adapter again in another layout; which one it is in now is recognised."""

import argparse

from . import ADAPTER_FORMATS, convert_adapter

HELP = "convert an adapter between layouts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="folder to read")
    parser.add_argument("target", metavar="OUT", help="folder to write; must not exist, and appears when complete")
    parser.add_argument("--to", required=True, choices=ADAPTER_FORMATS, help="layout to write")
    parser.add_argument(
        "--uniform",
        action="store_true",
        help="one rank and scaling 1 for everything, for tools that read only lora_alpha",
    )
    parser.add_argument("--check", action="store_true", help="read OUT again and compare B@A of every expert")


def run(arguments: argparse.Namespace) -> None:
    convert_adapter(arguments.source, arguments.target, arguments.to, arguments.uniform, arguments.check)
    print(f"{arguments.target}: {arguments.to}" + (", checked" if arguments.check else ""))
