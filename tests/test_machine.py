"""Descriptions of machines that are not this one, from copies of what their systems say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hirelc_deploy.measure.machine import cpu_features, describe, fingerprint, known_features
from hirelc_deploy.testing.fake_backend import FakeBackend

X86 = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 26
model\t\t: 2
model name\t: AMD EPYC
stepping\t: 1
flags\t\t: fpu avx2 avx512f avx_vnni avx512_vnni
processor\t: 1
model name\t: AMD EPYC
flags\t\t: fpu
"""
PI5 = """processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd asimdhp asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd0b
"""


def machine(folder: Path, cpuinfo: str) -> Path:
    (folder / "proc").mkdir(exist_ok=True)
    (folder / "proc/cpuinfo").write_text(cpuinfo)
    (folder / "proc/meminfo").write_text("MemTotal:        8000 kB\nMemFree: 1 kB\n")
    return folder


def test_an_x86_machine_is_described_by_model_and_features(tmp_path: Path) -> None:
    described = describe(FakeBackend(), machine(tmp_path, X86))
    assert described["cpu_model"] == "AMD EPYC (cpu family 26 model 2 stepping 1)"
    assert described["features"] == ["avx2", "avx512f", "avx512_vnni", "avx_vnni"]
    assert described["memory_bytes"] == 8000 * 1024
    assert described["backend"] == "fake"
    assert described["governor"] is None
    json.dumps(described)


def test_an_arm_board_is_described_by_its_device_tree(tmp_path: Path) -> None:
    root = machine(tmp_path, PI5)
    (root / "proc/device-tree").mkdir()
    (root / "proc/device-tree/model").write_bytes(b"Raspberry Pi 5 Model B\0")
    described = describe(FakeBackend(), root)
    assert described["cpu_model"] == "Raspberry Pi 5 Model B, CPU implementer 0x41 CPU part 0xd0b"
    assert described["features"] == ["asimddp", "asimdhp"]


def test_governors_of_all_cores_and_the_highest_frequency_are_read(tmp_path: Path) -> None:
    root = machine(tmp_path, X86)
    for core, governor in (("cpu0", "performance"), ("cpu1", "powersave")):
        (root / f"sys/devices/system/cpu/{core}/cpufreq").mkdir(parents=True)
        (root / f"sys/devices/system/cpu/{core}/cpufreq/scaling_governor").write_text(f"{governor}\n")
    (root / "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").write_text("2400000\n")
    described = describe(FakeBackend(), root)
    assert (described["governor"], described["max_frequency_khz"]) == ("performance, powersave", 2_400_000)


def test_a_system_that_says_nothing_gives_none_and_not_an_error(tmp_path: Path) -> None:
    described = describe(FakeBackend(), tmp_path)
    assert described["features"] is described["memory_bytes"] is None
    assert cpu_features(tmp_path) is known_features(tmp_path) is None


def test_the_fingerprint_ignores_load_and_follows_what_timings_depend_on(tmp_path: Path) -> None:
    described = describe(FakeBackend(), machine(tmp_path, X86))
    assert fingerprint(described) == fingerprint(
        {**described, "load_average": [9, 9, 9], "os": "Linux 7", "governor": "x"}
    )
    for change in ({"versions": {"fake": "2"}}, {"cpu_model": "other"}, {"features": []}, {"backend": "other"}):
        assert fingerprint(described) != fingerprint({**described, **change})


def test_this_machine_can_be_described() -> None:
    described = describe(FakeBackend())
    assert described["cores"] >= 1
    assert described["python"].startswith("3.")


@pytest.mark.parametrize("key", ["cpu_model", "cores", "features", "versions", "load_average", "python", "os"])
def test_what_the_report_shows_is_there(key: str) -> None:
    assert key in describe(FakeBackend())
