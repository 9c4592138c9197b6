"""Read by every Python process of a run of verl whose PYTHONPATH has this folder: verl learns of a platform without an accelerator.

The platform is registered right after verl's own ones are, in every process of Ray's, which is before anything asks for it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

PLATFORMS = "verl.plugin.platform.platform_manager"


class _AndThen(importlib.abc.Loader):
    """Loads verl's module, then registers ours in it."""

    def __init__(self, inner: importlib.abc.Loader) -> None:
        self._inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        import cpu_platform

        cpu_platform.register(module.PlatformRegistry)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "trl":
            raise ModuleNotFoundError("our TRL is newer than verl knows; without one verl does not ask")
        if fullname != PLATFORMS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert spec is not None
        assert spec.loader is not None
        spec.loader = _AndThen(spec.loader)
        return spec


sys.meta_path.insert(0, _Finder())
