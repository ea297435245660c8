"""``fastcircuit info``."""

from fastcircuit.cli.console import print_json, stdout
from fastcircuit.cli.options import AsJson


def info(as_json: AsJson = False) -> None:
    """Versions, devices, backends (and why one is missing), shipped models and tasks."""
    from fastcircuit.report.tables import info_table
    from fastcircuit.system import system_info

    found = system_info()
    if as_json:
        print_json(found)
    else:
        stdout.print(info_table(found))
