#include "cuda/launch.h"

#include <atomic>
#include <string>
#include <utility>

namespace dwsconv::cuda {
namespace {

namespace ffi = xla::ffi;

std::atomic<int64_t> captured_calls{0};

}  // namespace

ffi::ErrorOr<Device> DescribeDevice(int ordinal) {
  Device device{};
  int major = 0, minor = 0;
  const std::pair<cudaDeviceAttr, int*> facts[] = {
      {cudaDevAttrMultiProcessorCount, &device.multiprocessors},
      {cudaDevAttrComputeCapabilityMajor, &major},
      {cudaDevAttrComputeCapabilityMinor, &minor},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &device.shared_memory},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &device.most_shared_memory},
  };
  for (const auto& [attribute, value] : facts) {
    if (const cudaError_t status = cudaDeviceGetAttribute(value, attribute, ordinal); status != cudaSuccess) {
      return ffi::Unexpected<ffi::Error>(
          ffi::Error::Internal(std::string("jax_dwsconv: cannot describe the device: ") + cudaGetErrorString(status)));
    }
  }
  device.capability = 10 * major + minor;
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
