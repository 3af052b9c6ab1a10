"""NVIDIA's plugin of ONNX Runtime on a machine without NVIDIA's driver, for compiling alone.

The plugin can compile for a named GPU without a driver, in what it takes for a sandboxed process. `pretend` makes this
process look like one: the driver's libraries are empty stand-ins (nothing in them is called), the flag that says
"sandboxed" is set in the plugin's memory, and between ONNX Runtime and the plugin stands a library that adds the
settings which Python has no way to give: that there is a virtual device, and of which architecture. Parser and engine
builder are NVIDIA's own. For tests and benchmarks: tcc itself uses the plugin as it is.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

__all__ = ["missing", "pretend"]

CUDA = (
    "cuCtxCreate_v4 cuCtxDestroy_v2 cuCtxGetCurrent cuCtxPopCurrent_v2 cuCtxPushCurrent_v2 cuCtxSetCurrent "
    "cuDestroyExternalMemory cuDestroyExternalSemaphore cuExternalMemoryGetMappedBuffer cuGetErrorString "
    "cuImportExternalMemory cuImportExternalSemaphore cuInit cuSignalExternalSemaphoresAsync cuStreamGetCtx "
    "cuWaitExternalSemaphoresAsync"
)
NVML = """
int nvmlInit_v2(void) { return 9; }
int nvmlShutdown(void) { return 1; }
int nvmlSystemGetDriverVersion(char *version, unsigned length) { return 1; }
const char *nvmlErrorString(int error) { return "no driver"; }
"""
#: The numbers are places in ONNX Runtime's tables of functions, which only ever grow at the end.
BETWEEN = """
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
enum { ADD_KEY_VALUE_PAIR = 296, GET_EP_API = 317, GET_ENV_CONFIG_ENTRIES = 49 };
typedef void Add(void *, const char *, const char *);
typedef struct { const void *(*GetApi)(unsigned); const char *(*GetVersionString)(void); } Base;
static const Base *real;
static void *api[480], *ep[120];
static void *(*get_entries)(void **);
static void *entries(void **out) {
  void *status = get_entries(out);
  Add *add = (Add *)api[ADD_KEY_VALUE_PAIR];
  if (status) return status;
  add(*out, "allow_virtual_devices", "1");
  add(*out, "ep_factory.NvTensorRTRTXExecutionProvider.nv_target_sm", "sm89");
  return 0;
}
static const void *ep_api(void) { return ep; }
static const void *get_api(unsigned version) {
  const void *table = real->GetApi(version);
  if (!table) return 0;
  memcpy(api, table, sizeof api);
  memcpy(ep, ((const void *(*)(void))api[GET_EP_API])(), sizeof ep);
  get_entries = (void *(*)(void **))ep[GET_ENV_CONFIG_ENTRIES];
  ep[GET_ENV_CONFIG_ENTRIES] = entries;
  api[GET_EP_API] = ep_api;
  return api;
}
static const char *version(void) { return real->GetVersionString(); }
static Base mine = {get_api, version};
static void *plugin(const char *name) { return dlsym(dlopen(getenv("TCC_TEST_PLUGIN"), RTLD_NOW), name); }
typedef void *(*Create)(const char *, const Base *, void *, void **, size_t, size_t *);
void *CreateEpFactories(const char *name, const Base *base, void *log, void **factories, size_t most, size_t *count) {
  real = base;
  return ((Create)plugin("CreateEpFactories"))(name, &mine, log, factories, most, count);
}
void *ReleaseEpFactory(void *factory) { return ((void *(*)(void *))plugin("ReleaseEpFactory"))(factory); }
"""


def missing() -> str:
    """Why `pretend` cannot work here; "" if it can."""
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            return f"needs {tool}"
    if Path("/proc/driver/nvidia").exists():
        return "there is a driver"
    try:
        import onnxruntime_ep_nv_tensorrt_rtx  # noqa: F401
    except ImportError:
        return "needs the plugin, which `make test` installs (Linux on x86-64, Python 3.11 or newer): 'tcc[rtx]'"
    return ""


def pretend(patch: pytest.MonkeyPatch) -> None:
    """Let the plugin compile in this process, until it ends."""
    import onnxruntime_ep_nv_tensorrt_rtx as plugin

    folder = Path(tempfile.mkdtemp())
    stubs = "".join(f"int {name}(void) {{ return 100; }}\n" for name in CUDA.split())
    for name, source in (("libcuda.so.1", stubs), ("libnvidia-ml.so.1", NVML)):
        ctypes.CDLL(_build(folder / name, source), mode=ctypes.RTLD_GLOBAL)
    library = plugin.get_library_path()
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    _set_sandboxed(library)
    patch.setenv("TCC_TEST_PLUGIN", library)
    between = _build(folder / "between.so", BETWEEN)
    patch.setattr(plugin, "get_library_path", lambda: between)


def _build(path: Path, source: str) -> str:
    command = ["gcc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", "-x", "c", "-", "-o", str(path)]
    subprocess.run(command, input=source, text=True, check=True)
    return str(path)


def _set_sandboxed(library: str) -> None:
    symbols = subprocess.run(["nm", "-C", library], capture_output=True, text=True, check=True).stdout.splitlines()
    # the flag, and the guard that says that it has its value
    places = [line.split()[0] for line in symbols if line.endswith("IsWin32kLockdownActive()::active")]
    assert len(places) == 2, "another version of the plugin than this was written for"
    maps = Path("/proc/self/maps").read_text().splitlines()
    base = next(line for line in maps if line.endswith(os.path.realpath(library)))
    for place in places:
        ctypes.c_char.from_address(int(base.split("-")[0], 16) + int(place, 16)).value = b"\x01"
