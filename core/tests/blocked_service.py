"""Taking one service out of core in this process, as if its folder and its entry were gone."""

import sys

import groundwire.host

#: The services by the name of their folder or file.
SERVICES = [path.split(":")[0].split(".")[2] for path in groundwire.host.SERVICES]


def block(service):
    """Make ``service`` impossible to import, and leave it out of every run."""
    module = f"groundwire.services.{service}"
    assert service in SERVICES
    assert not any(name == module or name.startswith(f"{module}.") for name in sys.modules)

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == module or name.startswith(f"{module}."):
                raise ModuleNotFoundError(f"{name} is blocked", name=name)

    sys.meta_path.insert(0, Finder)
    groundwire.host.SERVICES = tuple(path for path in groundwire.host.SERVICES if not path.startswith(f"{module}"))
