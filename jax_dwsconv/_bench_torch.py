"""PyTorch's side of `python -m jax_dwsconv bench`: a case as a line of JSON comes in, its microseconds go out."""

import json
import os
import statistics
import sys
import time

import torch
from torch.autograd import DeviceType


def _kernel_microseconds(function, warmups: int = 3, runs: int = 5) -> float:
    for _ in range(warmups):
        function()
    torch.cuda.synchronize()
    times = []
    for _ in range(runs):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            function()
            torch.cuda.synchronize()
        events = [e for e in profile.events() if e.device_type == DeviceType.CUDA]
        times.append(sum(e.self_device_time_total for e in events))
    return statistics.median(times)


def _call_microseconds(function, seconds: float) -> float:
    function()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        function()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def _function(case: dict, device: str):
    layer = case["layer"]
    height, width = layer["size"], layer["width"] or layer["size"]
    window = layer["kernel_size"], layer["kernel_width"] or layer["kernel_size"]
    channels, stride, dilation = layer["channels"], layer["stride"], layer["dilation"]
    pads = [(taps - 1) * dilation // 2 for taps in window]  # an even kernel would need one more on one side
    layout = torch.channels_last if case["layout"] == "NHWC" else torch.contiguous_format
    options = {"device": device, "dtype": getattr(torch, case["dtype"])}
    x = torch.randn(case["batch"], channels, height, width, **options).to(memory_format=layout)
    kernel = torch.randn(channels * layer["multiplier"], 1, *window, **options).to(memory_format=layout)

    def forward():
        return torch.nn.functional.conv2d(x, kernel, None, stride, pads, dilation, channels)

    if case["operator"] == "forward":
        return forward
    g = torch.randn_like(forward())
    mask = [case["operator"] == "grad_input", case["operator"] == "grad_filter", False]
    arguments = ([stride] * 2, pads, [dilation] * 2, False, [0, 0], channels, mask)
    return lambda: torch.ops.aten.convolution_backward(g, x, kernel, None, *arguments)


def main(device: str, seconds: float) -> None:
    """Answers every line with the microseconds of its case."""
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False
    else:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    with torch.no_grad():
        for line in sys.stdin:
            function = _function(json.loads(line), device)
            microseconds = _kernel_microseconds(function) if device == "cuda" else _call_microseconds(function, seconds)
            print(json.dumps(microseconds), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
