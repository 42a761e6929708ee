"""`hookctl app`: the page, on this machine alone."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from typing import Any

from hookctl.cli import common
from hookctl.cli.hooks import add_hook, check_hooks
from hookctl.cli.models import SHAPES, find_model
from hookctl.cli.quiet import quiet
from hookctl.errors import InputError

_TEXT = """
Open a page in the browser: write a prompt and its edit, put editors together as cards, draw boxes,
look at the maps of the words, and take the whole along as a file, a program or a command. A picture
of your own can be edited too. Weights that are given by --hook (IP-Adapter, GLIGEN, a LoRA ...) are
cards beside the recipes: the page itself reads no file that somebody names.

The page is served to this machine alone (127.0.0.1), and nothing of it is loaded from elsewhere.
Needs the extra "app": pip install "hookctl[app]"
"""
_EXAMPLES = """
hookctl app                                   # on the embedded pipeline; Ctrl-C ends it
hookctl app ./sd15 --device cuda              # on a model of your own
hookctl app shapes-flow                       # FlowEdit and other programs of flow matching
hookctl app ./sd15 --hook ip-adapter_sd15.bin:0.6 --hook style.safetensors
"""


def add(commands: Any) -> None:
    command = common.add_command(
        commands, "app", main, "open a page to try editors on", _TEXT, _EXAMPLES
    )
    command.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default=SHAPES,
        help=f"{common.MODEL_HELP} (default: shapes)",
    )
    add_hook(command)
    command.add_argument(
        "--port", type=_port, metavar="N", help="where to serve (default: the first free from 7860)"
    )
    command.add_argument(
        "--open",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="open the page in the browser (default: yes)",
    )
    common.add_machine(command)


def _port(text: str) -> int:
    found = common.whole(1)(text)
    if found > 65535:
        raise argparse.ArgumentTypeError(f"{text} given; a port from 1 to 65535 expected")
    return found


def main(options: Any) -> None:
    find_model(options.model)
    check_hooks(options.hook)
    if find_spec("gradio") is None:
        raise InputError('the page needs gradio; install it: pip install "hookctl[app]"')
    _serve(options)


@quiet()
def _serve(options: Any) -> None:
    from hookctl.app.page import serve
    from hookctl.app.person import desk_of
    from hookctl.cli.loading import load_pipeline

    pipe = load_pipeline(options.model, options.device, options.dtype)
    desk = desk_of(pipe, options.model, options.hook)
    serve(desk, port=options.port, browser=options.open)
