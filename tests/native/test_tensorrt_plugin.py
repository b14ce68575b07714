"""``libiapt_trt_plugin.so`` in a plugin registry, and the flag that asks for it.

TensorRT for RTX is the registry that runs here; its networks take no plugins, and data-centre TensorRT needs a GPU,
so the kernel that the plugin calls is run by ``rational_gpu_test`` instead.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.native import PLUGIN_NAME, PLUGIN_VARIABLE, PLUGIN_VERSION, load_plugin, plugin_library
from engines.tensorrt.builder import BuildOptions, check_options
from engines.tensorrt.callbacks import make_logger
from iapt_export.contract.errors import IaptError, NotRunnableError
from tests.native.built import PLUGIN, needs_plugin

try:
    import tensorrt_rtx as trt
except ImportError:
    trt = None

has_registry = pytest.mark.skipif(trt is None, reason="TensorRT for RTX, whose plugin registry is used, is missing")


@pytest.fixture
def creator() -> Any:
    registry = trt.get_plugin_registry()
    handle = registry.load_library(str(PLUGIN))
    found = registry.get_creator(PLUGIN_NAME, PLUGIN_VERSION, "")
    assert found is not None
    yield found
    if handle is None:  # a build in this process has loaded it before, and keeps it
        return
    registry.deregister_library(handle)
    assert registry.get_creator(PLUGIN_NAME, PLUGIN_VERSION, "") is None


def make(creator: Any, form: str, phase: str = "BUILD") -> Any:
    field = trt.PluginField("form", np.frombuffer(form.encode(), np.int8), trt.PluginFieldType.CHAR)
    return creator.create_plugin("rational", trt.PluginFieldCollection([field]), getattr(trt.TensorRTPhase, phase))


@needs_plugin
@has_registry
def test_the_registry_takes_the_plugin(creator: Any) -> None:
    assert (creator.name, creator.plugin_version, creator.plugin_namespace) == ("Rational", "1", "")
    assert [(field.name, field.type) for field in creator.field_names] == [("form", trt.PluginFieldType.CHAR)]


@needs_plugin
@has_registry
@pytest.mark.parametrize("phase", ["BUILD", "RUNTIME"])
@pytest.mark.parametrize("form", ["A", "B"])
def test_a_plugin_has_all_three_capabilities(creator: Any, form: str, phase: str) -> None:
    plugin = make(creator, form, phase)
    kinds = trt.PluginCapabilityType
    for kind in (kinds.CORE, kinds.BUILD, kinds.RUNTIME):
        assert plugin.get_capability_interface(kind) is not None


@needs_plugin
@has_registry
@pytest.mark.parametrize("form", ["C", "", "AB"])
def test_a_wrong_form_makes_no_plugin(creator: Any, form: str) -> None:
    assert make(creator, form) is None


@needs_plugin
@has_registry
def test_loading_twice_registers_once() -> None:
    registry, logger = trt.get_plugin_registry(), make_logger(trt)
    load_plugin(registry, logger)
    before = len(registry.all_creators)
    load_plugin(registry, logger)
    assert len(registry.all_creators) == before
    creator = registry.get_creator(PLUGIN_NAME, PLUGIN_VERSION, "")
    assert creator is not None
    registry.deregister_creator(creator)


def test_a_missing_plugin_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLUGIN_VARIABLE, "none")
    with pytest.raises(NotRunnableError, match=r"build it with 'make cpp' where nvcc is, .* or build the bundle with"):
        plugin_library()


def test_a_registry_that_refuses_the_plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "libiapt_trt_plugin.so"
    path.write_bytes(b"no library")
    monkeypatch.setenv(PLUGIN_VARIABLE, str(path))
    registry = types.SimpleNamespace(get_creator=lambda *key: None, load_library=lambda path: None)
    logger = types.SimpleNamespace(lines=lambda: ["invalid ELF header"])
    with pytest.raises(
        NotRunnableError, match=r"TensorRT cannot load .*plugin\.so: invalid ELF header; build it again"
    ):
        load_plugin(registry, logger)


def test_only_datacentre_tensorrt_takes_the_plugin() -> None:
    check_options(BuildOptions(target="tensorrt", rational="plugin"))
    with pytest.raises(IaptError, match=r"tensorrt-rtx has no plugins \(--rational plugin\); leave it out"):
        check_options(BuildOptions(rational="plugin"))
