"""What memory there is: of the GPU that CUDA would take, as its driver says, and of the computer."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import warm

from lite_dil.base.memory import GIB
from lite_dil.planning.memory import CUDA_CONTEXT, memory_here, memory_of

DRIVER = """
#include <stdlib.h>
#include <string.h>
static const char *names[] = {"NVIDIA GeForce RTX 3060", "NVIDIA GeForce RTX 3090", "NVIDIA A100 MIG 1g.10gb"};
static const char *uuids[] = {"GPU-1f3a", "GPU-2b7c", "MIG-5d1e"};
static const unsigned long long mib[][2] = {{12288, 11000}, {24576, 20000}, {9728, 9000}};
int nvmlInitWithFlags(unsigned flags) { return getenv("NO_DRIVER") ? 9 : 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, long *device) { *device = index; return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, long *device) {
  for (*device = 0; *device < 3; ++*device) if (!strcmp(uuid, uuids[*device])) return 0;
  return 6;
}
int nvmlDeviceGetName(long device, char *name, unsigned length) { strcpy(name, names[device]); return 0; }
int nvmlDeviceGetUUID(long device, char *uuid, unsigned length) { strcpy(uuid, uuids[device]); return 0; }
int nvmlDeviceGetMemoryInfo(long device, unsigned long long *memory) {
  memory[0] = mib[device][0] << 20, memory[1] = mib[device][1] << 20, memory[2] = memory[0] - memory[1];
  return 0;
}
"""
ASKED = """
import ctypes, json, os, sys
ctypes.CDLL(sys.argv[1])  # under the name of the real one, which is not looked for any more
from lite_dil.planning.memory import memory_here, nvidia_gpu
found = {}
for visible in json.loads(sys.argv[2]):
    os.environ["CUDA_VISIBLE_DEVICES"] = visible
    found[visible] = nvidia_gpu()
del os.environ["CUDA_VISIBLE_DEVICES"]
print(json.dumps([found, memory_here("cuda"), memory_here("cuda", host=12.7), memory_here("cpu")]))
os.environ["NO_DRIVER"] = "1"
memory_here("cuda")
"""


def test_memory_is_that_of_the_gpu_that_is_here(tmp_path: Path) -> None:
    """A stand-in for the driver's library, with two cards and a part of a third, for a machine whose torch sees no GPU."""
    (tmp_path / "driver.c").write_text(DRIVER)
    library = str(tmp_path / "driver.so")
    soname = "-Wl,-soname,libnvidia-ml.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", soname, "-o", library, str(tmp_path / "driver.c")], check=True)
    there = {"0": "3060", "1,0": "3090", "GPU-2b7c": "3090", "GPU-1": "3060", " 1": "3090", "MIG-5d1e": "1g.10gb"}
    none = ("", "-1", "-1,0", "2", "none", "GPU-9", "MIG-2b7c")
    asked = warm.run(library, json.dumps([*there, *none]), code=ASKED)
    found, gpu, in_computer, computer = json.loads(asked.stdout)
    assert {visible: found[visible][0].split()[-1] for visible in there} == there
    assert found["MIG-5d1e"][1:] == [9000 * 2**20, 9728 * 2**20]
    assert not any(found[visible] for visible in none)
    usable, text, host = gpu
    assert usable == 11000 * 2**20 - CUDA_CONTEXT
    assert "NVIDIA GeForce RTX 3060, 10.7 of 12.0 GB free" in text
    assert host == pytest.approx(computer[0] + GIB / 2, abs=GIB)
    assert in_computer[2] == int(12.7 * GIB) - GIB
    assert re.search(r"UserError: .*GPU.*--memory GB", asked.stderr)


def test_memory_of_a_computer() -> None:
    assert memory_of(16, "mlx").usable == 12 * GIB
    assert memory_of(16, "cuda").usable < 16 * GIB
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 2**10
    assert memory_here("cpu").usable == pytest.approx(available - GIB / 2, abs=GIB)
