"""Accelerators and clusters: what a plan is made for.

Figures from the makers' data sheets: memory, dense half-precision products a second, bandwidth of the memory, bandwidth between
the GPUs of a node in one direction (NVLink or PCIe).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from guardtrain.errors import ConfigError
from guardtrain.json_files import read_object

GB = 10**9
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Device:
    """memory_bytes: usable by tensors and allocator, what the driver reports; flops: dense half-precision products, operations a
    second; efficiency: the share of them that large products reach, attention_efficiency: that attention does;
    memory_bandwidth, link_bandwidth (to the node's other GPUs) and host_bandwidth (to the host's memory): bytes a second;
    launch_seconds: of one operator, on the CPU that starts it.

    is_host: it computes in the host's own memory, one operator after the other. has_bfloat16: natively.
    """

    name: str
    memory_bytes: int
    flops: float
    memory_bandwidth: float
    link_bandwidth: float
    host_bandwidth: float
    efficiency: float = 0.65
    attention_efficiency: float = 0.35
    launch_seconds: float = 6e-6
    has_bfloat16: bool = True
    is_host: bool = False


def _gpu(
    name: str, gib: float, tflops: float, memory_gb: float, link_gb: float, host_gb: float, *, has_bfloat16: bool = True
) -> Device:
    return Device(
        name=name,
        memory_bytes=int(gib * GIB),
        flops=tflops * 1e12,
        memory_bandwidth=memory_gb * GB,
        link_bandwidth=link_gb * GB,
        host_bandwidth=host_gb * GB,
        has_bfloat16=has_bfloat16,
    )


# Memory as nvidia-smi and rocm-smi report it, a little below the name. PCIe 3.0 x16: 16 GB/s, 4.0: 32, 5.0: 64; 80 % of that
# arrives.
_DEVICES = (
    _gpu("T4", 15.0, 65, 300, 13, 13, has_bfloat16=False),
    _gpu("A10G", 22.5, 70, 600, 26, 26),
    _gpu("L4", 22.5, 121, 300, 26, 26),
    _gpu("L40S", 44.9, 362, 864, 26, 26),
    _gpu("RTX3090", 24.0, 71, 936, 26, 26),
    _gpu("RTX4090", 24.0, 165, 1008, 26, 26),
    _gpu("RTX5090", 31.8, 210, 1792, 51, 51),
    _gpu("A100-40GB", 39.5, 312, 1555, 300, 26),
    _gpu("A100-80GB", 79.3, 312, 2039, 300, 26),
    _gpu("H100-80GB", 79.6, 989, 3350, 450, 51),
    _gpu("H200-141GB", 139.8, 989, 4800, 450, 51),
    _gpu("B200-180GB", 178.4, 2250, 8000, 900, 51),
    _gpu("MI300X-192GB", 191.7, 1307, 5300, 448, 51),
    # Two cores without half-precision products; `guardtrain bench device` measures yours.
    Device(
        name="CPU",
        memory_bytes=24 * GIB,
        flops=100e9,
        efficiency=1.0,
        attention_efficiency=0.3,
        memory_bandwidth=12 * GB,
        link_bandwidth=1 * GB,
        host_bandwidth=12 * GB,
        launch_seconds=15e-6,
        has_bfloat16=False,
        is_host=True,
    ),
)
DEVICES: Mapping[str, Device] = {device.name.lower(): device for device in _DEVICES}
ALIASES = {
    "a100": "a100-80gb",
    "h100": "h100-80gb",
    "h200": "h200-141gb",
    "b200": "b200-180gb",
    "mi300x": "mi300x-192gb",
    "3090": "rtx3090",
    "4090": "rtx4090",
    "5090": "rtx5090",
}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """nodes of gpus_per_node devices. network_bandwidth: of one node, one direction, bytes a second; host_bytes: of one node."""

    nodes: int
    gpus_per_node: int
    device: Device
    network_bandwidth: float
    host_bytes: int

    @property
    def ranks(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus_per_node

    def __str__(self) -> str:
        return f"{self.nodes}x{self.gpus_per_node}x{self.device.name}"


def parse_cluster(
    text: str, *, network_gbit: float | None = None, host_gib: float | None = None, devices: Mapping[str, Device] = DEVICES
) -> Cluster:
    """16x8xH100-80GB, 8xH100 (one node) or H100. Raises ConfigError.

    network_gbit: of a node, all its cards together; 3,200 for nodes of eight data-centre GPUs and 100 for others unless given.
    host_gib: memory of a node; 64 GiB and 192 for each GPU unless given, a CPU's own for CPUs.
    """
    match = re.fullmatch(r"(?:(\d+)x)?(?:(\d+)x)?((?!\d+x)[\w.-]+)", text.strip())
    if match is None or 0 in (int(match[1] or 1), int(match[2] or 1)):
        raise ConfigError("not a cluster", where="--cluster", expected="NODESxGPUSxNAME, for example 2x8xH100-80GB", found=text)
    first, second, name = match.groups()
    nodes, gpus = (int(first), int(second)) if second else (1, int(first or 1))
    device = find_device(name, devices)
    is_data_centre = device.link_bandwidth >= 300 * GB
    gbit = network_gbit if network_gbit is not None else 3200 if is_data_centre and gpus == 8 else 100
    default_host = device.memory_bytes / GIB if device.is_host else 64 + 192 * gpus
    host = host_gib if host_gib is not None else default_host
    for option, value in (("--network-gbit", gbit), ("--host-gib", host)):
        if value <= 0:
            raise ConfigError("not a size", where=option, expected="more than 0", found=str(value))
    return Cluster(nodes=nodes, gpus_per_node=gpus, device=device, network_bandwidth=gbit * GB / 8, host_bytes=int(host * GIB))


def find_device(name: str, devices: Mapping[str, Device] = DEVICES) -> Device:
    """A device by its name, capital letters or not. Raises ConfigError."""
    key = name.lower()
    key = ALIASES.get(key, key)
    if key not in devices:
        expected = ", ".join(device.name for device in devices.values())
        hint = "--device FILE describes any other by its numbers"
        raise ConfigError("no such device", where="--cluster", expected=expected, found=name, hint=hint)
    return devices[key]


def read_device(path: Path) -> Device:
    """A device by numbers: JSON with the fields of Device, as `guardtrain bench device` writes it. Raises ConfigError."""
    tree = read_object(path, "a device by its numbers")
    fields = {field.name: field for field in dataclasses.fields(Device)}
    needed = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    problems = [f"no {name}" for name in needed if name not in tree] + [f"unknown {key}" for key in tree if key not in fields]
    problems += [f"{name} is {value!r}" for name, value in tree.items() if name in fields and not _is_valid(fields[name], value)]
    if problems:
        expected = f"{', '.join(needed)}; numbers above 0"
        raise ConfigError("not a device", where=str(path), expected=expected, found="; ".join(problems))
    return Device(**tree)


def _is_valid(field: dataclasses.Field[object], value: object) -> bool:
    if field.type in {"str", "bool"}:
        return type(value).__name__ == field.type
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
