// The CUDA driver, as far as Triton, Inductor and torch's expandable segments call it. This library is loaded under the name
// libcuda.so.1, and the names are those that cuda.h's macros make of them (cuCtxGetDevice and not cuCtxGetDevice_v2, ...).
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstdio>
#include <map>
#include <mutex>
#include <string>

#include "card.h"

void* reserve_device_addresses(size_t bytes);
void release_device_addresses(void* at);

namespace {

// Handles are looked at by nobody but this file, which does not look at them either.
template <class T>
T handle() {
    static char place;
    return reinterpret_cast<T>(&place);
}

CUresult launch(unsigned x, unsigned y, unsigned z, unsigned threads, size_t shared) {
    if (!card::launchable(x, y, z, threads, shared)) return CUDA_ERROR_INVALID_VALUE;
    return card::begin(card::LAUNCH) ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

// What a driver function does that the rehearsal does not have.
CUresult refused() { return CUDA_ERROR_NOT_SUPPORTED; }

const size_t UNIT = 2 << 20;  // in which expandable segments take memory
std::mutex lock;
struct Physical {
    size_t bytes;
    int holders;  // its handle, and each place where it is mapped
};
std::map<CUmemGenericAllocationHandle, Physical> physical;
std::map<CUdeviceptr, CUmemGenericAllocationHandle> mapped;

// Lets go of physical memory once; with its last holder it is free again.
void drop(CUmemGenericAllocationHandle of) {
    Physical& one = physical.at(of);
    if (--one.holders) return;
    card::give_device(one.bytes);
    physical.erase(of);
}

}  // namespace

extern "C" {

// --- The device and its context, which Triton asks for before it loads a kernel.

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) {
    *version = CUDA_VERSION;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int* count) {
    *count = 1;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int) {
    *device = 0;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetName(char* name, int size, CUdevice) {
    snprintf(name, size, "stand-in sm_%d", card::model().capability);
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    // The two enumerations give the same numbers to the same attributes. Triton divides by these rates.
    if (attribute == CU_DEVICE_ATTRIBUTE_CLOCK_RATE || attribute == CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)
        *value = 1700000;
    else if (attribute == CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)
        *value = 384;
    else
        cudaDeviceGetAttribute(value, static_cast<cudaDeviceAttr>(attribute), device);
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
    *context = handle<CUcontext>();
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
    *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
    *context = handle<CUcontext>();
    return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) {
    *device = 0;
    return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char** text) {
    *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : "refused by the stand-in card";
    return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
    if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_NOT_SUPPORTED;
    *static_cast<CUdeviceptr*>(data) = pointer;  // how Triton finds that an argument lies on the card
    return CUDA_SUCCESS;
}

// --- Kernels that Triton has compiled: ptxas made them for this card, and its limits decide whether they launch.

CUresult cuModuleLoadData(CUmodule* module, const void*) {
    *module = handle<CUmodule>();
    return CUDA_SUCCESS;
}
CUresult cuModuleLoad(CUmodule* module, const char*) { return cuModuleLoadData(module, nullptr); }
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char*) {
    *function = handle<CUfunction>();
    return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : 0;
    return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute attribute, int value) {
    bool much = attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && value > card::model().shared_per_block;
    return much ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
CUresult cuLaunchKernel(CUfunction, unsigned x, unsigned y, unsigned z, unsigned a, unsigned b, unsigned c, unsigned shared,
                        CUstream, void**, void**) {
    return launch(x, y, z, a * b * c, shared);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction, void**, void**) {
    unsigned threads = c->blockDimX * c->blockDimY * c->blockDimZ;
    return launch(c->gridDimX, c->gridDimY, c->gridDimZ, threads, c->sharedMemBytes);
}

// --- Virtual memory: torch's expandable segments reserve addresses once and map memory into them piece by piece.

CUresult cuMemGetAllocationGranularity(size_t* unit, const CUmemAllocationProp*, CUmemAllocationGranularity_flags) {
    *unit = UNIT;
    return CUDA_SUCCESS;
}
CUresult cuMemAddressReserve(CUdeviceptr* at, size_t bytes, size_t, CUdeviceptr, unsigned long long) {
    *at = reinterpret_cast<CUdeviceptr>(reserve_device_addresses(bytes));
    return *at ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult cuMemAddressFree(CUdeviceptr at, size_t) {
    release_device_addresses(reinterpret_cast<void*>(at));
    return CUDA_SUCCESS;
}
CUresult cuMemCreate(CUmemGenericAllocationHandle* made, size_t bytes, const CUmemAllocationProp*, unsigned long long) {
    static CUmemGenericAllocationHandle next = 0;
    if (!card::take_device(bytes)) return CUDA_ERROR_OUT_OF_MEMORY;
    std::lock_guard<std::mutex> held(lock);
    *made = ++next;
    physical[*made] = {bytes, 1};
    return CUDA_SUCCESS;
}
CUresult cuMemRelease(CUmemGenericAllocationHandle of) {
    std::lock_guard<std::mutex> held(lock);
    drop(of);
    return CUDA_SUCCESS;
}
CUresult cuMemMap(CUdeviceptr at, size_t, size_t, CUmemGenericAllocationHandle of, unsigned long long) {
    std::lock_guard<std::mutex> held(lock);
    physical.at(of).holders++;
    mapped[at] = of;
    return CUDA_SUCCESS;
}
CUresult cuMemUnmap(CUdeviceptr at, size_t bytes) {
    std::lock_guard<std::mutex> held(lock);
    for (auto one = mapped.lower_bound(at); one != mapped.end() && one->first < at + bytes; one = mapped.erase(one))
        drop(one->second);
    return CUDA_SUCCESS;
}
CUresult cuMemSetAccess(CUdeviceptr, size_t, const CUmemAccessDesc*, size_t) { return CUDA_SUCCESS; }

// --- How the others find the functions above.

CUresult cuGetProcAddress_v2(const char* name, void** found, int, cuuint64_t, CUdriverProcAddressQueryResult* status) {
    *found = dlsym(RTLD_DEFAULT, name);
    if (!*found) *found = dlsym(RTLD_DEFAULT, (std::string(name) + "_v2").c_str());
    if (!*found) *found = reinterpret_cast<void*>(refused);
    if (status) *status = CU_GET_PROC_ADDRESS_SUCCESS;
    return CUDA_SUCCESS;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
    cuGetProcAddress_v2(name, found, 0, 0, nullptr);
    if (status) *status = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
}
