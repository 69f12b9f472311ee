"""The command line: what is installed, what a run reported, what a checkpoint holds."""

from groundwire.cli.app import main

__all__ = ["main"]
