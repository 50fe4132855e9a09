"""Reading machines from what their kernels print."""

from __future__ import annotations

import json

import pytest
import torch

from slimdown.measure import cpu_features, describe_environment
from slimdown.measure.machine import (
    parse_feature_names,
    parse_physical_cores,
    parse_sysctl_names,
    saturates_int8,
    select_features,
)

TWO_CORES_FOUR_THREADS = "\n\n".join(
    f"processor\t: {index}\nphysical id\t: 0\ncore id\t\t: {index % 2}\n"
    "flags\t\t: fpu avx2 avx512f avx512_vnni amx_int8"
    for index in range(4)
)
RASPBERRY_PI_5 = "processor\t: 0\nFeatures\t: fp asimd aes crc32 atomics fphp asimdhp asimddp\n"
MACBOOK = """hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_I8MM: 1
hw.optional.arm.FEAT_SME: 0
hw.optional.AdvSIMD: 1
hw.optional.avx2_0: 0"""
INTEL_MACBOOK = "hw.optional.avx2_0: 1\nhw.optional.avx512f: 0\n"


def test_features_of_x86() -> None:
    names = parse_feature_names(TWO_CORES_FOUR_THREADS)
    assert select_features(names) == {"avx2", "avx512f", "avx512_vnni", "amx_int8"}


def test_features_of_arm() -> None:
    assert select_features(parse_feature_names(RASPBERRY_PI_5)) == {"neon", "dotprod", "fp16"}


@pytest.mark.parametrize(
    ("listed", "expected"),
    [(MACBOOK, {"neon", "dotprod", "i8mm"}), (INTEL_MACBOOK, {"avx2"}), ("", set())],
)
def test_features_of_macs(listed: str, expected: set[str]) -> None:
    assert select_features(parse_sysctl_names(listed)) == expected


HASWELL = "flags\t\t: fpu sse4_1 avx avx2 fma\n"
ALDER_LAKE = "flags\t\t: fpu sse4_1 avx avx2 fma avx_vnni\n"


@pytest.mark.parametrize(
    ("cpuinfo", "architecture", "expected"),
    [
        (HASWELL, "x86_64", True),
        (ALDER_LAKE, "x86_64", False),
        (TWO_CORES_FOUR_THREADS, "x86_64", False),
        (RASPBERRY_PI_5, "aarch64", False),
    ],
)
def test_products_are_added_in_16_bits_on_x86_without_vnni(
    cpuinfo: str, architecture: str, expected: bool
) -> None:
    features = sorted(select_features(parse_feature_names(cpuinfo)))
    told = {"system": "Linux 6.8", "architecture": architecture, "cpu_features": features}
    assert saturates_int8(told) is expected
    assert not saturates_int8({**told, "system": "Windows 11"})  # which tells of no VNNI
    assert not saturates_int8({})


def test_this_machine_is_judged_by_its_own_features() -> None:
    has_vnni = bool({"avx512_vnni", "avx_vnni"} & cpu_features())
    assert not (saturates_int8(describe_environment()) and has_vnni)


def test_hyper_threads_are_not_cores() -> None:
    assert parse_physical_cores(TWO_CORES_FOUR_THREADS) == 2


def test_what_is_not_told_is_unknown() -> None:
    assert parse_physical_cores(RASPBERRY_PI_5) is None
    assert parse_feature_names("") == set()


def test_features_agree_with_what_torch_found() -> None:
    expected = {"AVX512": "avx512f", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability())
    assert expected is None or expected in cpu_features()


def test_the_environment_is_json_and_names_its_packages() -> None:
    environment = describe_environment()
    assert json.loads(json.dumps(environment)) == environment
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0]
    assert environment["torch_threads"] == torch.get_num_threads()
    assert environment["logical_cores"] >= environment["usable_cores"] >= 1
