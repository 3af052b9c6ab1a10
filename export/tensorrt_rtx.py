"""TensorRT for RTX: each ONNX graph compiled into an engine that ONNX Runtime runs.

NVIDIA's provider is a plugin of ONNX Runtime (`onnxruntime-ep-nv-tensorrt-rtx-cu13`). ONNX Runtime's model-compile API
gives a model of one `EPContext` node, which names the engine's file beside it. An engine holds its weights: the
plugin's weight-stripped engines are experimental, and are built on a GPU alone.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from tcc.errors import BundleError, ExportError
from tcc.export.machine import Machine, check_arch, gpu_arch, refuse_other, versions
from tcc.export.manifest import Manifest
from tcc.export.onnx import require_onnx
from tcc.export.onnx_engine import OnnxEngine

__all__ = ["compile_context", "open_rtx", "rtx_machine"]

TARGET, PLUGIN = "tensorrt-rtx", "onnxruntime-ep-nv-tensorrt-rtx-cu13"


def rtx_machine(arch: str | None) -> Machine:
    """What engines are built for and with; any architecture can be named, where there is an NVIDIA driver.

    Raises:
        ExportError: a package, the driver or a GPU is missing.
    """
    require_onnx()
    _device(torch.device("cuda"))
    if arch is not None:
        check_arch(arch)
    version = _plugin()[1].__version__
    return Machine(arch or gpu_arch(TARGET, arch), versions("torch", "onnxscript", "onnxruntime") | {PLUGIN: version})


def compile_context(source: Path, out: Path, machine: Machine) -> None:
    """Compile one graph into an engine; writes `out`, a model of one `EPContext` node, and beside it `<name>.engine`.

    Raises:
        ExportError: the provider cannot compile the graph, or leaves a part of it to others.
    """
    import onnx

    onnxruntime = _plugin()[0]
    flags = onnxruntime.OrtCompileApiFlags
    options = _options(onnxruntime, torch.device("cuda"), {"nv_target_sm": machine.arch})
    before = set(out.parent.iterdir())
    try:
        compiler = onnxruntime.ModelCompiler(
            options,
            source,
            embed_compiled_data_into_model=False,  # a model file holds 2 GiB at most
            flags=flags.ERROR_IF_NO_NODES_COMPILED | flags.ERROR_IF_OUTPUT_FILE_EXISTS,
        )
        compiler.compile_to_file(str(out))
    except Exception as error:  # ONNX Runtime has a dozen exception types without a common base
        raise ExportError(f"TensorRT for RTX cannot compile the graph for {machine.arch}: {error}") from error
    model = onnx.load(out, load_external_data=False)
    if [node.op_type for node in model.graph.node] != ["EPContext"]:
        left = {node.op_type for node in model.graph.node} - {"EPContext"}
        raise ExportError(f"TensorRT for RTX takes only parts of the graph; it leaves {', '.join(sorted(left))}")
    (engine,) = set(out.parent.iterdir()) - before - {out}
    name = engine.rename(out.with_suffix(".engine")).name
    for attribute in model.graph.node[0].attribute:
        if attribute.name == "ep_cache_context":
            attribute.s = name.encode()
    onnx.save(model, out)


def open_rtx(folder: Path, manifest: Manifest, device: torch.device) -> list[OnnxEngine]:
    """A session of ONNX Runtime for every engine.

    Raises:
        ExportError: a package, the driver or a GPU is missing.
        BundleError: the engines are for another GPU or version, or are not what the manifest describes.
    """
    onnxruntime, plugin = _plugin()
    options = _options(onnxruntime, device, {})
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    used = {PLUGIN.replace("-", "_"): plugin.__version__}
    refuse_other(str(folder), manifest.arch, manifest.tools, device, **used)
    engines = []
    for graph in manifest.graphs:
        try:
            session = onnxruntime.InferenceSession(str(folder / graph.file), options)
        except Exception as error:
            raise BundleError(f"{folder / graph.file}: ONNX Runtime cannot load the engine ({error})") from error
        engines.append(OnnxEngine(session, graph, manifest, device, keep=None))
    return engines


@functools.cache
def _plugin() -> tuple[Any, Any]:
    """ONNX Runtime with the plugin, and the plugin.

    Raises:
        ExportError: one of them is missing, or the plugin cannot be loaded.
    """
    try:
        import onnxruntime
        import onnxruntime_ep_nv_tensorrt_rtx as plugin
    except ImportError as error:
        raise ExportError(f"target={TARGET!r} needs the package {error.name}: pip install 'tcc[rtx]'") from error
    if not hasattr(onnxruntime, "ModelCompiler"):
        raise ExportError(f"target={TARGET!r} needs a newer ONNX Runtime: pip install -U 'tcc[rtx]'")
    try:
        onnxruntime.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())
    except Exception as error:
        raise ExportError(
            f"target={TARGET!r}: the provider's library cannot be loaded; it needs NVIDIA's driver ({error})"
        ) from error
    return onnxruntime, plugin


def _device(device: torch.device) -> Any:
    """The provider's device.

    Raises:
        ExportError: the provider has none.
    """
    onnxruntime, plugin = _plugin()
    found = [each for each in onnxruntime.get_ep_devices() if each.ep_name == plugin.get_ep_name()]
    for each in found:
        if each.ep_metadata.get("device_id") == str(device.index or 0):
            return each
    raise ExportError(
        f"target={TARGET!r} on {device}: the provider can use {len(found)} GPUs here, and not this one: it needs an "
        "NVIDIA GPU of the architecture sm86, sm89, or sm120 and newer, and its driver"
    )


def _options(onnxruntime: Any, device: torch.device, settings: dict[str, str]) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: warnings are about the types of inputs
    options.add_provider_for_devices([_device(device)], settings)
    return options
