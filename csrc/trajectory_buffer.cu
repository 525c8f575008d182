// The trajectory buffer on CUDA: each operation is one launch on the current stream, and waits for nothing.
//
// Indices are on the device and are not checked here; the caller checks them on the host's copy of the tables. Slabs and
// scales may be in pinned host memory, which the kernel reads and writes over the host link.
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "copy_rows.cuh"
#include "operations.h"

namespace fastnabla {
namespace {

constexpr int64_t MOST_BLOCKS = 0x7FFFFFFF;  // CUDA's limit

void check_cuda(cudaError_t error, const char* what) {
    if (error != cudaSuccess) {
        fail(what, ": ", cudaGetErrorString(error));
    }
}

// The handle of torch's current stream. The stable ABI's `Stream::id` is torch's own number for it, not the handle,
// and `nativeHandle` is newer than the version that we build for. A function in the library of torch's CUDA builds gives
// the handle. It is looked up at run time, because this library must load without it.
cudaStream_t current_stream(int32_t device) {
    using Get = AOTITorchError (*)(int32_t, void**);
    static const Get get = [] {
        void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        void* function = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
        return reinterpret_cast<Get>(function);
    }();
    void* stream = nullptr;
    if (get == nullptr || get(device, &stream) != AOTI_TORCH_SUCCESS) {
        fail("the current CUDA stream is unknown: this build of torch has no aoti_torch_get_current_cuda_stream");
    }
    return static_cast<cudaStream_t>(stream);
}

char* device_address(const char* name, const Tensor& slab, bool writes, const Tensor& on) {
    void* data = writes ? slab.mutable_data_ptr() : const_cast<void*>(slab.const_data_ptr());
    if (!slab.is_cpu() || data == nullptr) {
        check_device(name, slab, on);
        return static_cast<char*>(data);
    }
    // Where the GPU can read ordinary memory (Grace, HMM), that has a device pointer too, but the host may move it.
    cudaPointerAttributes attributes{};
    check_cuda(cudaPointerGetAttributes(&attributes, data), "cudaPointerGetAttributes");
    const bool pinned = attributes.type == cudaMemoryTypeHost || attributes.type == cudaMemoryTypeManaged;
    if (!pinned || attributes.devicePointer == nullptr) {
        fail(name, ": expected a tensor on ", device_name(on), " or in pinned memory, given one on cpu, not pinned");
    }
    return static_cast<char*>(attributes.devicePointer);
}

// Makes the device current for torch, and for the CUDA runtime that is linked into this library.
class OnDevice {
public:
    OnDevice(const char* name, const Tensor& on) : device(index_of(name, on)), guard(device) {
        check_cuda(cudaSetDevice(device), "cudaSetDevice");
    }
    const int32_t device;

private:
    static int32_t index_of(const char* name, const Tensor& on) {
        if (!on.is_cuda()) {
            fail(name, ": expected a tensor on the CUDA device that others are on, given one on ", device_name(on));
        }
        return on.get_device_index();
    }
    torch::stable::accelerator::DeviceGuard guard;
};

template <typename Arguments>
void launch(const Arguments& arguments, int32_t device) {
    const uint32_t chunk = chunk_of(arguments.element_size(), arguments.element_size());
    const uint32_t chunks = divide_up(arguments.elements, chunk);
    const int64_t blocks = number_blocks(arguments) + arguments.items * chunks;
    if (blocks == 0) {
        return;
    }
    if (blocks > MOST_BLOCKS) {
        fail("expected at most ", MOST_BLOCKS, " chunks of ", chunk, " elements in a call, given ", blocks);
    }
    copy_rows<<<static_cast<uint32_t>(blocks), THREADS, 0, current_stream(device)>>>(arguments, chunks);
    check_cuda(cudaGetLastError(), "launch of copy_rows");
}

void append_cuda(
    const Tensor& states, const Tensor& outputs, const std::optional<Tensor>& scales, const Tensor& state_at,
    const Tensor& output_at, const Tensor& slots, int64_t step, const Tensor& x, const Tensor& output,
    const Tensor& x_next) {
    const OnDevice on("x", x);
    launch(
        append_arguments(states, outputs, scales, state_at, output_at, slots, step, x, output, x_next, device_address),
        on.device);
}

void gather_cuda(
    const Tensor& states, const Tensor& outputs, const std::optional<Tensor>& scales, const Tensor& state_at,
    const Tensor& output_at, const Tensor& steps, const Tensor& prompt, const Tensor& reward, const Tensor& index,
    const std::vector<Tensor>& out) {
    const OnDevice on("index", index);
    launch(
        gather_arguments(
            states, outputs, scales, state_at, output_at, steps, prompt, reward, index, out, device_address),
        on.device);
}

}  // namespace
}  // namespace fastnabla

STABLE_TORCH_LIBRARY_IMPL(fastnabla, CUDA, m) {
    m.impl("append", TORCH_BOX(&fastnabla::append_cuda));
    m.impl("gather", TORCH_BOX(&fastnabla::gather_cuda));
}
