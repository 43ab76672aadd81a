"""Clusters by name and by numbers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from guardtrain.errors import ConfigError
from guardtrain.plan.hardware import DEVICES, GIB, find_device, parse_cluster, read_device

ASKED_FOR = (
    "T4",
    "A10G",
    "L4",
    "L40S",
    "3090",
    "4090",
    "5090",
    "A100-40GB",
    "A100-80GB",
    "H100",
    "H200",
    "B200",
    "MI300X",
    "CPU",
)


@pytest.mark.parametrize(
    ("text", "nodes", "gpus", "device"),
    [
        ("16x8xH100-80GB", 16, 8, "H100-80GB"),
        ("8xA100", 1, 8, "A100-80GB"),
        ("h200", 1, 1, "H200-141GB"),
        ("4090", 1, 1, "RTX4090"),
        ("2x3090", 1, 2, "RTX3090"),
        ("2x4x5090", 2, 4, "RTX5090"),
        (" CPU ", 1, 1, "CPU"),
    ],
)
def test_a_cluster_by_name(text: str, nodes: int, gpus: int, device: str) -> None:
    cluster = parse_cluster(text)
    assert (cluster.nodes, cluster.gpus_per_node, cluster.device.name) == (nodes, gpus, device)
    assert cluster.ranks == nodes * gpus


@pytest.mark.parametrize("name", ASKED_FOR)
def test_every_usual_device_is_known(name: str) -> None:
    assert find_device(name).memory_bytes > 10 * GIB


@pytest.mark.parametrize("text", ["", "0xH100", "2x0xH100", "-2x8xH100", "8x", "2x2x2xH100", "H100 80GB", "x8xH100", "1.5xH100"])
def test_what_is_no_cluster_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--cluster"):
        parse_cluster(text)


def test_an_unknown_device_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"RTX4090.*H200-141GB.*found H1000"):
        parse_cluster("2x8xH1000")


@pytest.mark.parametrize("option", ["network_gbit", "host_gib"])
@pytest.mark.parametrize("value", [0, -1.0])
def test_sizes_are_above_nothing(option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=option.replace("_", "-")):
        parse_cluster("H100", **{option: value})


def test_network_and_host_are_taken_as_given() -> None:
    cluster = parse_cluster("2x8xH100", network_gbit=400, host_gib=512)
    assert (cluster.network_bandwidth, cluster.host_bytes) == (50e9, 512 * GIB)


def test_a_device_by_numbers(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    wanted = dataclasses.replace(DEVICES["t4"], name="mine", has_bfloat16=True)
    path.write_text(json.dumps(dataclasses.asdict(wanted)))
    device = read_device(path)
    assert device == wanted
    assert parse_cluster("2xmine", devices={"mine": device}).device == wanted


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"flops": -1}, "flops is -1"),
        ({"flops": "fast"}, "flops is 'fast'"),
        ({"flops": True}, "flops is True"),
        ({"flops": float("nan")}, "flops is nan"),
        ({"flopz": 1}, "unknown flopz"),
        ({"name": 3}, "name is 3"),
        ({"is_host": "no"}, "is_host is 'no'"),
    ],
)
def test_numbers_that_do_not_do_are_named(change: dict[str, object], said: str, tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    path.write_text(json.dumps({**dataclasses.asdict(DEVICES["t4"]), **change}))
    with pytest.raises(ConfigError, match=said):
        read_device(path)


def test_a_device_file_that_lacks_numbers_or_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    path.write_text('{"name": "x"}')
    with pytest.raises(ConfigError, match="no memory_bytes; no flops"):
        read_device(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"device\.json:1"):
        read_device(path)
    path.write_text("3")
    with pytest.raises(ConfigError, match="an object"):
        read_device(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_device(tmp_path / "absent.json")
