"""Loading of the native modules, the version checks, and the command line."""

import functools

import jax
import numpy as np
import pytest

import jax_dwsconv
from jax_dwsconv import __main__ as command_line, _native, _versions

BUILT = ["80-real", "90-real", "80-virtual"]


@pytest.mark.parametrize(
    ("jax_version", "works"),
    [("0.9.2", False), ("0.10.0", True), ("0.10.2", True), ("0.12.0.1", True), ("0.12.3rc1", True), ("0.13.0", False)],
)
def test_supported_jax_versions(jax_version, works):
    assert _versions.is_supported(jax_version) == works


def test_unsupported_jax_is_an_error_that_names_the_versions(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.9.1")
    with pytest.raises(ImportError, match=r"works with jax 0\.10 to 0\.12, but jax 0\.9\.1 is installed"):
        _versions.check()


@pytest.mark.parametrize(
    ("driver", "capabilities", "toolkit", "reason"),
    [
        (13000, [(9, 0)], 13000, None),
        (13010, [(8, 0), (8, 6), (9, 0)], 13000, None),  # machine code runs on later minor versions
        (13000, [(12, 0)], 13000, None),  # through the PTX
        (0, [], 13000, None),  # no GPU here: nothing to compare
        (12080, [(9, 0)], 13000, "driver knows CUDA 12.8"),
        (13000, [(7, 5)], 13000, "compute capability 7.5"),
        (13000, [(9, 0), (7, 5)], 13000, "compute capability 7.5"),
        (13000, [(12, 0)], 13010, "compute capability 12.0"),  # the driver cannot compile newer PTX
    ],
)
def test_device_and_driver_are_compared_with_the_build(driver, capabilities, toolkit, reason):
    found = _native.cuda_mismatch(driver, capabilities, toolkit, BUILT)
    assert (found is None) if reason is None else (reason in found)


def test_cpu_kernels_are_used():
    assert _native.why_unavailable("cpu") is None


def test_a_missing_module_falls_back_to_lax(monkeypatch):
    monkeypatch.setattr(_native, "load", lambda platform: ImportError("not there"))
    x, kernel = np.ones((1, 5, 5, 3), np.float32), np.ones((3, 3, 1, 3), np.float32)

    def lowered():
        return jax.jit(functools.partial(jax_dwsconv.depthwise_conv2d)).lower(x, kernel).as_text()

    assert "jax_dwsconv.forward" not in lowered()
    monkeypatch.setenv("JAX_DWSCONV_FALLBACK", "error")
    with pytest.raises(jax_dwsconv.UnsupportedError, match="not there"):
        lowered()


def test_info(capsys):
    assert command_line.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"jax-dwsconv  {_versions.PACKAGE}" in printed
    assert jax.devices()[0].device_kind in printed
    assert "kernels" in printed


@pytest.mark.parametrize("arguments", [[], ["unknown"]])
def test_unknown_commands_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        command_line.main(arguments)
    assert exit_info.value.code == 2
    assert "info" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("capabilities", "architectures", "oldest"),
    [
        ([], ["80-real"], 0),
        ([(9, 0)], ["80-real", "90-real", "80-virtual"], 90),
        ([(9, 0), (8, 6)], ["80-real", "90-real", "80-virtual"], 80),
        ([(9, 0)], ["75-real", "75-virtual"], 75),
    ],
)
def test_the_oldest_code_that_runs(capabilities, architectures, oldest):
    assert _native.oldest_code(capabilities, architectures) == oldest
