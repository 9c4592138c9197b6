"""A platform of verl's that is the CPU: gloo, one device that Ray takes for a GPU, nothing to synchronise or to measure."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _device_module() -> types.ModuleType:
    """What verl asks of `torch.cuda`."""
    module: Any = types.ModuleType("cpu_device")
    for name in ("synchronize", "empty_cache", "set_device", "manual_seed", "set_rng_state", "reset_peak_memory_stats"):
        setattr(module, name, lambda *_, **__: None)
    for name in ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved"):
        setattr(module, name, lambda *_, **__: 0)
    module.is_available = lambda: False
    module.get_rng_state = torch.get_rng_state
    module.device_count = lambda: 1
    module.mem_get_info = lambda *_: (1, 1)
    module.get_device_name = lambda *_: "cpu"
    return module


def register(registry: Any) -> None:
    from verl.plugin.platform.platform_base import PlatformBase

    @registry.register("cpu")
    class PlatformCPU(PlatformBase):
        device_name = "cpu"
        vendor_name = "cpu"
        device_module = _device_module()

        def is_available(self) -> bool:
            return True

        def current_device(self) -> Any:
            return torch.device("cpu")

        def device_count(self) -> int:
            return 1

        def set_device(self, device_index: int) -> None:
            pass

        def synchronize(self, device_index: int | None = None) -> None:
            pass

        def manual_seed(self, seed: int) -> None:
            torch.manual_seed(seed)

        manual_seed_all = manual_seed

        def set_allocator_settings(self, settings: str) -> None:
            pass

        def empty_cache(self) -> None:
            pass

        def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
            return None, None

        def communication_backend_name(self) -> str:
            return "gloo"

        def visible_devices_envvar(self) -> str:
            return "CPU_VISIBLE_DEVICES"

        @contextmanager
        def nvtx_range(self, msg: str) -> Iterator[None]:
            yield

        def profiler_start(self) -> None:
            pass

        def profiler_stop(self) -> None:
            pass

        def ray_resource_name(self) -> str:
            return "GPU"

        def ray_noset_envvars(self) -> list[str]:
            return []

        def is_ipc_supported(self) -> bool:
            return False

        def cudart(self) -> None:
            return None

    begin = torch.distributed.init_process_group

    def once(backend: str | None = None, **given: Any) -> Any:
        # verl names a backend for the CPU and one for the device, which are one here
        return begin("gloo" if backend == "cpu:gloo,cpu:gloo" else backend, **given)

    torch.distributed.init_process_group = once
    # FSDP2 pins what it keeps off the device
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]
