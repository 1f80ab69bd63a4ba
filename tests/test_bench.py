import csv
import importlib.util
import json

import jax
import pytest

from jax_dwsconv import __main__ as command_line, _bench

HAS_PLOTS = importlib.util.find_spec("matplotlib") is not None


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_small_run(layout, tmp_path, capsys):
    output = tmp_path / "run"
    arguments = f"bench --layers 9,8,3,2 7,8,5,1 --layout {layout} --peers lax shift --seconds 0.01 --output {output}"
    assert command_line.main(arguments.split()) == 0
    printed = capsys.readouterr().out
    assert printed.count("batch 1 (2 layers): ours / floor") == 3
    with output.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert {row["operator"] for row in rows} == set(_bench.OPERATORS)
    assert all(float(row[name]) > 0 for row in rows for name in ("floor_us", "ours_us", "lax_us", "shift_us"))
    saved = json.loads(output.with_suffix(".json").read_text())
    assert saved["environment"]["jax"] == jax.__version__
    assert len(saved["rows"]) == 6
    assert output.with_suffix(".png").exists() == HAS_PLOTS


def test_a_wrong_peer_is_noticed(monkeypatch):
    right = _bench._convolve
    monkeypatch.setattr(_bench, "_convolve", lambda peer, *rest: right(peer, *rest) * (2 if peer == "lax" else 1))
    with pytest.raises(SystemExit, match="differs from lax"):
        command_line.main(["bench", "--layers", "5,8,3,1", "--operators", "forward", "--seconds", "0.01"])


def test_lax_is_not_timed_in_our_name(monkeypatch):
    monkeypatch.setattr(_bench._native, "load", lambda platform: ImportError("not built"))
    with pytest.raises(SystemExit, match=r"no kernels of jax_dwsconv to time: .*not built"):
        command_line.main(["bench", "--layers", "5,8,3,1"])
    monkeypatch.undo()
    monkeypatch.setenv("JAX_DWSCONV_DISABLE", "1")
    with pytest.raises(SystemExit, match="JAX_DWSCONV_DISABLE is set"):
        command_line.main(["bench", "--layers", "5,8,3,1"])


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there the tiles are swept")
def test_no_tiles_to_sweep_on_a_cpu(capsys):
    with pytest.raises(SystemExit):
        command_line.main(["bench", "--sweep"])
    assert "no GPU" in capsys.readouterr().err


def test_random_layers(capsys):
    """Results are compared with lax's and with shift-and-add's."""
    arguments = "bench --random 3 --seed 4 --peers lax shift --seconds 0.001"
    assert command_line.main(arguments.split()) == 0
    assert capsys.readouterr().out.count("(3 layers): ours / floor") == 3
    sample = _bench.random_layers(200, 1)
    assert sample[:20] == _bench.random_layers(20, 1)
    assert {layer.dilation for layer in sample} == {1, 2, 3, 4}
    assert {layer.stride for layer in sample} == {layer.multiplier for layer in sample} == {1, 2}
    assert {layer.window[0] for layer in sample} == set(range(2, 10))


def test_who_is_slower():
    row = {"operator": "forward", "layer": "a", "batch": 1, "dtype": "float32", "layout": "NHWC", "ours_us": 10.0}
    assert not list(_bench._slower([row | {"lax_us": 9.8, "torch_us": None}, row], ["lax_us", "torch_us"]))
    (line,) = _bench._slower([row | {"lax_us": 12.0, "torch_us": 9.0}], ["lax_us", "torch_us"])
    assert "slower than torch: forward a" in line


def test_layers_of_models():
    for layers in _bench.MODELS.values():
        assert len(set(layers)) == len(layers)
    assert set(_bench.LAYERS) <= {layer for layers in _bench.MODELS.values() for layer in layers}


def test_floor():
    floor = _bench.Floor(launch_us=1.3, bytes_per_us=3.0e6, products_per_us=33.4e6)
    case = _bench.Case("forward", _bench.Layer(112, 32, 3, 1), 128, "float32", "NHWC")
    assert floor.of(case) == pytest.approx(137.0, rel=1e-3)  # bytes
    assert floor.of(case._replace(batch=1, dtype="bfloat16")) == 1.3
    large = case._replace(layer=_bench.Layer(28, 256, 29, 1))
    assert floor.of(large) == pytest.approx(646.9, rel=1e-3)  # products
