#include "cuda/launch.h"

#include <atomic>
#include <string>

namespace dwsconv::cuda {
namespace {

namespace ffi = xla::ffi;

std::atomic<int64_t> captured_calls{0};

}  // namespace

ffi::ErrorOr<Device> DescribeDevice(int ordinal) {
  Device device{};
  const cudaError_t status = cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, ordinal);
  if (status != cudaSuccess) {
    return ffi::Unexpected<ffi::Error>(
        ffi::Error::Internal(std::string("jax_dwsconv: cannot describe the device: ") + cudaGetErrorString(status)));
  }
  return device;
}

ffi::Error FinishLaunch(const char* op, bool has_instance, cudaStream_t stream) {
  const std::string name = std::string("jax_dwsconv.") + op;
  if (!has_instance) return ffi::Error::InvalidArgument(name + ": no CUDA kernel for this combination of dtypes");
  if (const cudaError_t status = cudaGetLastError(); status != cudaSuccess) {
    return ffi::Error::Internal(name + ": " + cudaGetErrorString(status));
  }
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &capture) == cudaSuccess && capture == cudaStreamCaptureStatusActive)
    ++captured_calls;
  return ffi::Error::Success();
}

int64_t CapturedCalls() { return captured_calls; }

}  // namespace dwsconv::cuda
