"""The marks of hook specifications and of their implementations."""

from __future__ import annotations

import pluggy

PROJECT = "groundwire"
#: Version of the set of hooks. A hook or argument that is added raises it; none is ever renamed.
SPEC_VERSION = 2

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
