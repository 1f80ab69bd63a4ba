#include "cuda/launch.h"

#include <atomic>
#include <string>
#include <utility>

#include "cuda/ffi_problem.h"

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

ffi::Error PlanAndLaunch(const char* op, int ordinal, const ffi::Dictionary& attrs, const PassCall& call) {
  const auto device = DescribeDevice(ordinal);
  if (!device) return device.error();
  const int64_t alignment = Alignment(call.source, call.filter, call.result, call.epilogue.residual);
  const PassPlan plan = PlanPass(call.problem, call.forward, *device, alignment, ForcedTile(attrs));
  return FinishLaunch(op, LaunchPass(call, plan), call.stream);
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
