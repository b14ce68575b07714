"""ONNX graph in, TensorRT engine file out, for both flavours of TensorRT.

The graph states every type (TensorRT 11 knows strongly typed networks only), the manifest states every
range. A build writes two files, the engine and its record (`engines.tensorrt.engine_info`), each whole or not at all.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.cuda.driver import find_driver
from engines.native import load_plugin
from engines.tensorrt.callbacks import ProgressCallback, make_logger, make_monitor, readable_lines, run_cancellable
from engines.tensorrt.engine_info import EngineInfo, EngineTensor, ProfileShape, interface_problems, profile_from_spec
from engines.tensorrt.flavour import PORTABLE, Flavour, check_compute_capability, flavour, load_tensorrt
from iapt_export.contract.errors import BundleError, IaptError, NotRunnableError
from iapt_export.contract.manifest import GraphSpec, Ranges, file_sha256, write_atomically

HARDWARE_LEVELS = {"ampere+": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY"}


@dataclass(frozen=True)
class BuildOptions:
    """How to build; everything here changes the engine's bytes."""

    target: str = "tensorrt-rtx"
    """``tensorrt-rtx`` or ``tensorrt``."""
    compute_capability: str | None = None
    """For tensorrt-rtx ``8.9`` or ``portable`` (the default); tensorrt builds for the GPU that is there."""
    tf32: bool = False
    """Let fp32 products round their inputs to 10 bits. Off, unlike TensorRT's default: fp32 should mean fp32."""
    workspace_mib: int | None = None
    """Limit of the GPU memory for intermediate results; None leaves it to TensorRT."""
    hardware_compatibility: str | None = None
    """``ampere+`` or ``same-compute-capability``: run on other GPUs too (tensorrt only)."""
    version_compatible: bool = False
    """Run on newer versions too (tensorrt only)."""
    refit: bool = False
    """Weights can be replaced later (tensorrt only)."""
    timing_cache: Path | None = None
    """File of kernel timings to read and extend (tensorrt only)."""
    rational: str = "function"
    """``plugin``: ai.iapt::Rational as our compiled kernel (tensorrt only); ``function``: as its definition."""


@dataclass(frozen=True)
class Build:
    """TensorRT's objects of one build. The parser owns the weights, so it must live as long as the network."""

    trt: Any
    logger: Any
    builder: Any
    network: Any
    parser: Any


def engine_from_onnx(
    onnx_path: Path,
    engine_path: Path,
    spec: GraphSpec,
    ranges: Ranges,
    options: BuildOptions | None = None,
    on_progress: ProgressCallback | None = None,
) -> EngineInfo:
    """Build an engine and write it with its record.

    Args:
        onnx_path: the graph; external weights lie where it says.
        engine_path: the engine's file, for example ``prefill.engine``; the record is ``prefill.json`` beside it.
        spec: names, types and sizes that the graph must have.
        ranges: sizes that the engine must take.
        options: how to build; None takes the defaults.
        on_progress: called with each step.

    Raises:
        NotRunnableError: this machine cannot build for the target.
        BundleError: the graph is not what the manifest says.
        IaptError: options that do not go together, or TensorRT refuses the graph; the node is named.
        KeyboardInterrupt: the build was cancelled; nothing was written.
    """
    options = options or BuildOptions()
    check_options(options)
    shapes = profile_from_spec(spec, ranges)
    started = time.perf_counter()
    build = network_from_onnx(onnx_path, options.target, options.rational)
    inputs, outputs = _interface(build)
    problems = interface_problems(spec, inputs, outputs)
    if problems:
        raise BundleError(f"{onnx_path} is not the graph that the manifest describes: " + "; ".join(problems))
    decompose_attention(build)
    config = _configure(build, options, shapes)
    plan = _serialise(build, config, onnx_path, on_progress)
    _save_timing_cache(config, options)
    info = EngineInfo(
        target=options.target,
        runtime_version=str(build.trt.__version__),
        compute_capability=_built_for(options),
        version_compatible=options.version_compatible,
        rational=options.rational,
        source_sha256=file_sha256(onnx_path),
        sha256=hashlib.sha256(plan).hexdigest(),
        size_bytes=len(plan),
        seconds=round(time.perf_counter() - started, 3),
        inputs=inputs,
        outputs=outputs,
        profiles=[shapes],
    )
    engine_path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(engine_path, plan)
    info.save(engine_path)
    return info


def check_options(options: BuildOptions) -> None:
    """Refuse options that the target does not have.

    Raises:
        IaptError: with every problem listed.
    """
    chosen = flavour(options.target)
    check_compute_capability(options.target, options.compute_capability)
    wishes = {
        "hardware_compatibility": (options.hardware_compatibility is not None, chosen.hardware_compatibility),
        "version_compatible": (options.version_compatible, chosen.version_compatible),
        "refit": (options.refit, chosen.refit),
        "timing_cache": (options.timing_cache is not None, chosen.timing_cache),
        "plugins (--rational plugin)": (options.rational == "plugin", chosen.plugins),
    }
    problems = [name for name, (wanted, able) in wishes.items() if wanted and not able]
    if problems:
        raise IaptError(f"target {options.target} has no {', '.join(problems)}; leave it out, or use --target tensorrt")
    level = options.hardware_compatibility
    if level is not None and level not in HARDWARE_LEVELS:
        raise IaptError(f"hardware compatibility {level!r} is not known; use {' or '.join(HARDWARE_LEVELS)}")


def network_from_onnx(onnx_path: Path, target: str, rational: str = "function") -> Build:
    """Read a graph into a TensorRT network.

    Raises:
        NotRunnableError: the target is not installed, or needs a GPU that is not there, or the plugin is not built.
        IaptError: the file is missing, or TensorRT refuses a node.
    """
    if not onnx_path.is_file():
        raise IaptError(f"{onnx_path} does not exist; expected an ONNX graph written by 'iapt-export build'")
    trt = load_tensorrt(target)
    logger = make_logger(trt)
    builder = _create_builder(trt, logger, flavour(target))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    if rational == "plugin":  # the parser prefers a plugin that is registered to the function of its name
        load_plugin(builder.get_plugin_registry(), logger)
    parser = trt.OnnxParser(network, logger)
    # from the file and not from bytes: only so does the parser find external weights
    if not parser.parse_from_file(str(onnx_path)):
        raise IaptError(f"{target} refuses {onnx_path}: " + "; ".join(_parser_errors(parser, logger)))
    return Build(trt, logger, builder, network, parser)


def decompose_attention(build: Build) -> int:
    """Let TensorRT split each attention where it has no fused kernel, instead of giving up; returns how many.

    fp32 has no such kernel. Where there is one (fp16, bf16) it is still used: the engines are equal in size.
    """
    count = 0
    for index in range(build.network.num_layers):
        layer = build.network.get_layer(index)
        if layer.type == build.trt.LayerType.ATTENTION_INPUT:
            # get_layer returns the base class; TensorRT's own tools narrow it in this way too
            layer.__class__ = build.trt.IAttentionInputLayer
            layer.attention.decomposable = True
            count += 1
    return count


def _create_builder(trt: Any, logger: Any, chosen: Flavour) -> Any:
    if not chosen.builds_without_gpu:
        problem = find_driver().problem
        if problem:
            raise NotRunnableError(
                f"{chosen.target} engines are built on the GPU that runs them, and {problem}; build on that machine "
                f"(driver {chosen.driver} or newer), or use --target tensorrt-rtx, which builds without a GPU"
            )
    try:
        return trt.Builder(logger)
    except TypeError as error:  # what the binding raises when the C++ factory returns null
        reasons = "; ".join(logger.lines()) or "it gives no reason"
        raise NotRunnableError(f"{chosen.target} cannot start a build: {reasons}; see iapt-export doctor") from error


def _parser_errors(parser: Any, logger: Any) -> list[str]:
    """Each refused node with its name, operator and the parser's words."""
    texts = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        operator, name = error.node_operator(), error.node_name()
        place = f"node {name or error.node()} ({operator})" if operator else "the file"
        texts.append(f"{place}: {_explain(error.desc(), operator)}")
    return list(dict.fromkeys(texts)) or logger.lines() or ["the parser gives no reason"]


def _explain(description: str, operator: str) -> str:
    if "Plugin not found" in description:
        return f"the operator {operator} is not known, and the graph carries no function of that name to stand in"
    if description.strip() == "false":  # how the parser says that a check without a message failed
        return f"the operator {operator} is not supported, or not with these types and attributes"
    # the first line repeats the node's name when more follow
    lines = [line for line in readable_lines([description]) if not line.startswith("Invalid Node")]
    return " ".join(lines) or description.strip()


def _interface(build: Build) -> tuple[list[EngineTensor], list[EngineTensor]]:
    network = build.network
    return (
        [_tensor(build.trt, network.get_input(index)) for index in range(network.num_inputs)],
        [_tensor(build.trt, network.get_output(index)) for index in range(network.num_outputs)],
    )


def _tensor(trt: Any, tensor: Any) -> EngineTensor:
    kinds = trt.DataType
    names = {kinds.FLOAT: "fp32", kinds.HALF: "fp16", kinds.BF16: "bf16"}
    dtype = names.get(tensor.dtype, tensor.dtype.name.lower())
    return EngineTensor(tensor.name, dtype, [int(size) for size in tensor.shape])


def _configure(build: Build, options: BuildOptions, shapes: dict[str, ProfileShape]) -> Any:
    trt, config = build.trt, build.builder.create_builder_config()
    profile = build.builder.create_optimization_profile()
    for name, shape in shapes.items():
        profile.set_shape(name, shape.min, shape.opt, shape.max)
    if config.add_optimization_profile(profile) < 0:
        raise IaptError("TensorRT refuses the optimisation profile: " + "; ".join(build.logger.lines()))
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if flavour(options.target).builds_without_gpu:
        _choose_gpus(trt, config, options)
    if options.hardware_compatibility is not None:
        level = HARDWARE_LEVELS[options.hardware_compatibility]
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    if options.timing_cache is not None:
        known = options.timing_cache.read_bytes() if options.timing_cache.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    return config


def _choose_gpus(trt: Any, config: Any, options: BuildOptions) -> None:
    """Name each GPU: where none is named, TensorRT does not ask whether they have the network's types."""
    chosen = options.compute_capability
    names = flavour(options.target).portable if chosen in (None, PORTABLE) else (str(chosen),)
    capabilities = [_capability(trt, name) for name in names]
    config.num_compute_capabilities = len(capabilities)
    for place, capability in enumerate(capabilities):
        config.set_compute_capability(capability, place)


def _capability(trt: Any, name: str) -> Any:
    member = f"SM{name.replace('.', '')}"
    if not hasattr(trt.ComputeCapability, member):
        raise IaptError(
            f"compute capability {name} is not known to the installed version {trt.__version__}; "
            "upgrade it, or choose another"
        )
    return getattr(trt.ComputeCapability, member)


def _serialise(build: Build, config: Any, onnx_path: Path, on_progress: ProgressCallback | None) -> Any:
    """The engine's bytes, as a view of TensorRT's own memory."""
    monitor = make_monitor(build.trt, on_progress or (lambda progress: None))
    config.progress_monitor = monitor
    build.logger.errors.clear()  # a network that parses may have logged warnings as errors
    plan = run_cancellable(lambda: build.builder.build_serialized_network(build.network, config), monitor)
    if plan is None:
        reasons = "; ".join(build.logger.lines()) or "it gives no reason"
        raise IaptError(
            f"TensorRT {build.trt.__version__} cannot build {onnx_path}: {reasons}. "
            "Try another --dtype, --opset 20, or smaller ranges"
        )
    return memoryview(plan)


def _built_for(options: BuildOptions) -> str:
    if flavour(options.target).builds_without_gpu:
        return options.compute_capability or PORTABLE
    return find_driver().gpus[0].compute_capability


def _save_timing_cache(config: Any, options: BuildOptions) -> None:
    if options.timing_cache is not None:
        write_atomically(options.timing_cache, bytes(config.get_timing_cache().serialize()))
