"""``optimum-cli export iapt`` is ``iapt-export build``, ``optimum-cli iapt COMMAND`` is ``iapt-export COMMAND``.

Optimum imports this module whenever ``optimum-cli`` starts, whatever the command, so it imports nothing of ours before
one of these two runs. Neither this folder nor those above it may have an ``__init__.py``: they belong to Optimum.
"""

import argparse

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class IaptCommand(BaseOptimumCLICommand):
    """Everything that ``iapt-export`` can do; flags, errors and exit codes are its own."""

    COMMAND = CommandInfo("iapt", "Prompt-tuning adapters for many tenants: everything that iapt-export can do.")
    BEFORE: tuple[str, ...] = ()
    """Words that stand before those of the user."""

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Take every word as it is, ``--help`` among them."""
        parser.prefix_chars = ""
        parser.add_argument("words", nargs=argparse.REMAINDER)

    def run(self) -> None:
        """Run the command line; exits as it does."""
        from iapt_export.cli import main

        main([*self.BEFORE, *self.args.words])


class IaptExportCommand(IaptCommand):
    """``iapt-export build``."""

    COMMAND = CommandInfo("iapt", "Export a backbone and its prompt-tuning adapters to ONNX graphs and engines.")
    BEFORE = ("build",)


REGISTER_COMMANDS = [IaptCommand, (IaptExportCommand, ExportCommand)]
