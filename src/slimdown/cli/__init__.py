"""The command line."""

from slimdown.cli.app import main as main
