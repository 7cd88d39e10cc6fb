// The CUDA runtime, as far as torch and bitsandbytes call it in training. A function of the runtime that is not here stays the
// real library's, which answers that there is no usable driver: what the rehearsal does not know fails, and is not made up.
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>

#include "card.h"

namespace {

const size_t PAGE = 4096;
const size_t DEVICE_UNIT = 2 << 20;  // cudaMalloc takes memory from the card in units of 2 MiB

struct Block {
    size_t bytes;
    cudaMemoryType type;
};
std::mutex lock;
std::map<const char*, Block> blocks;

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t failed(cudaError_t error) {
    last_error = error;
    return error;
}

size_t rounded(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// Address space of its own for each block: pages of pinned and managed memory come when somebody writes them, pages of the
// card's never do.
void* map_block(size_t bytes, cudaMemoryType type) {
    int access = type == cudaMemoryTypeDevice ? PROT_NONE : PROT_READ | PROT_WRITE;
    void* at = mmap(nullptr, bytes, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) return nullptr;
    std::lock_guard<std::mutex> held(lock);
    blocks[static_cast<const char*>(at)] = {bytes, type};
    return at;
}

// Returns the bytes of the block that started here, 0 where there was none.
size_t unmap_block(void* at) {
    std::lock_guard<std::mutex> held(lock);
    auto found = blocks.find(static_cast<const char*>(at));
    if (found == blocks.end()) return 0;
    size_t bytes = found->second.bytes;
    munmap(at, bytes);
    blocks.erase(found);
    return bytes;
}

cudaMemoryType type_of(const void* pointer) {
    std::lock_guard<std::mutex> held(lock);
    auto after = blocks.upper_bound(static_cast<const char*>(pointer));
    if (after == blocks.begin()) return cudaMemoryTypeUnregistered;
    auto [start, block] = *--after;
    return static_cast<const char*>(pointer) < start + block.bytes ? block.type : cudaMemoryTypeUnregistered;
}

cudaError_t copy(void* to, const void* from, size_t bytes) {
    if (!card::begin(card::COPY)) return failed(cudaErrorLaunchFailure);
    // What comes from the card is zeros. Pinned memory is left as it is: offloaded activations would fill the machine's.
    if (type_of(from) == cudaMemoryTypeDevice && type_of(to) == cudaMemoryTypeUnregistered) memset(to, 0, bytes);
    return cudaSuccess;
}

cudaError_t launch(dim3 grid, dim3 block, size_t shared) {
    if (!card::launchable(grid.x, grid.y, grid.z, block.x * block.y * block.z, shared))
        return failed(cudaErrorInvalidConfiguration);
    return card::begin(card::LAUNCH) ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}

struct Event {
    long number;  // what had been submitted when it was recorded
};
long number_of(cudaEvent_t event) { return reinterpret_cast<Event*>(event)->number; }

}  // namespace

// Virtual memory (driver.cpp) reserves addresses of the card as well, which have to be known as the card's.
void* reserve_device_addresses(size_t bytes) { return map_block(bytes, cudaMemoryTypeDevice); }
void release_device_addresses(void* at) { unmap_block(at); }

extern "C" {

// --- The device: what torch.cuda, Inductor's heuristics and bitsandbytes ask of it.

cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
    const card::Model& m = card::model();
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "stand-in sm_%d", m.capability);
    p->totalGlobalMem = card::device_total();
    p->major = m.capability / 10;
    p->minor = m.capability % 10;
    p->multiProcessorCount = m.processors;
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxThreadsPerMultiProcessor = m.threads_per_processor;
    p->maxBlocksPerMultiProcessor = 16;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = m.shared_per_block;
    p->sharedMemPerMultiprocessor = m.shared_per_processor;
    p->reservedSharedMemPerBlock = m.shared_per_processor - m.shared_per_block;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->totalConstMem = 65536;
    p->l2CacheSize = 6 << 20;
    p->memoryBusWidth = 384;
    p->memPitch = 2147483647;
    p->textureAlignment = 512;
    p->unifiedAddressing = p->managedMemory = p->concurrentManagedAccess = 1;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    cudaDeviceProp p;
    cudaGetDeviceProperties(&p, 0);
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
        case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
        case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = int(p.sharedMemPerBlock); break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = int(p.sharedMemPerBlockOptin); break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = int(p.sharedMemPerMultiprocessor); break;
        case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
        case cudaDevAttrMaxRegistersPerBlock: *value = p.regsPerBlock; break;
        case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
        case cudaDevAttrMaxGridDimY:
        case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[1]; break;
        case cudaDevAttrWarpSize: *value = p.warpSize; break;
        case cudaDevAttrManagedMemory:
        case cudaDevAttrConcurrentManagedAccess: *value = 1; break;
        default: *value = 0;  // a feature that this card does not have
    }
    return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}
// torch's out-of-memory message asks NVML about the card with this address.
cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int) {
    snprintf(text, size, "0000:00:00.0");
    return cudaSuccess;
}
// Where the runtime is linked into a library, torch asks whether cards reach one another; there is one.
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
    *can = 0;
    return cudaSuccess;
}

// --- Memory.

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    *free = card::device_free();
    *total = card::device_total();
    return cudaSuccess;
}
cudaError_t cudaMalloc(void** pointer, size_t bytes) {
    size_t taken = rounded(bytes, DEVICE_UNIT);
    *pointer = nullptr;
    if (!card::take_device(taken)) return failed(cudaErrorMemoryAllocation);
    *pointer = map_block(taken, cudaMemoryTypeDevice);
    return *pointer ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}
cudaError_t cudaFree(void* pointer) {
    card::wait_for(card::submitted());  // it waits for the card, which is how the caching allocator's retry gets its blocks
    if (pointer) card::give_device(unmap_block(pointer));
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
    size_t taken = rounded(bytes, PAGE);
    *pointer = nullptr;
    if (!card::take_pinned(taken)) return failed(cudaErrorMemoryAllocation);
    *pointer = map_block(taken, cudaMemoryTypeHost);
    return *pointer ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}
cudaError_t cudaFreeHost(void* pointer) {
    if (pointer) card::give_pinned(unmap_block(pointer));
    return cudaSuccess;
}
// Of paged optimisers: it moves between card and host as they need it, so it belongs to neither capacity.
cudaError_t cudaMallocManaged(void** pointer, size_t bytes, unsigned) {
    *pointer = map_block(rounded(bytes, PAGE), cudaMemoryTypeManaged);
    return *pointer ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}
cudaError_t cudaMemPrefetchAsync(const void*, size_t, cudaMemLocation, unsigned, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* pointer) {
    memset(a, 0, sizeof *a);
    a->type = type_of(pointer);
    a->device = a->type == cudaMemoryTypeUnregistered ? -2 : 0;  // cudaInvalidDeviceId
    if (a->type != cudaMemoryTypeUnregistered) a->devicePointer = const_cast<void*>(pointer);
    if (a->type == cudaMemoryTypeHost || a->type == cudaMemoryTypeManaged) a->hostPointer = const_cast<void*>(pointer);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) { return copy(to, from, bytes); }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    return copy(to, from, bytes);
}
cudaError_t cudaMemset(void*, int, size_t) { return card::begin(card::SET) ? cudaSuccess : failed(cudaErrorLaunchFailure); }
cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) { return cudaMemset(at, value, bytes); }

// --- Streams and events: one queue in the order of submission, whatever the stream.

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
    *stream = reinterpret_cast<cudaStream_t>(new char);  // only its address is looked at
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned flags) { return cudaStreamCreateWithPriority(s, flags, 0); }
cudaError_t cudaStreamCreate(cudaStream_t* s) { return cudaStreamCreateWithPriority(s, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    delete reinterpret_cast<char*>(stream);
    return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
    *priority = 0;
    return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t) {
    return card::is_done(card::submitted()) ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
    card::wait_for(card::submitted());
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaStreamSynchronize(nullptr); }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
// No graph is ever captured: lite-dil makes none, and torch asks before most of its allocations.
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t*, const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
    if (id) *id = 0;
    return cudaStreamIsCapturing(stream, status);
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t run, void* data) {
    run(data);
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    *event = reinterpret_cast<cudaEvent_t>(new Event{0});
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete reinterpret_cast<Event*>(event);
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
    reinterpret_cast<Event*>(event)->number = card::submitted();
    return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) { return cudaEventRecord(e, s); }
cudaError_t cudaEventQuery(cudaEvent_t event) {
    return card::is_done(number_of(event)) ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    card::wait_for(number_of(event));
    return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
    *milliseconds = 1;
    return cudaSuccess;
}

// --- Kernels: torch's own and bitsandbytes', compiled into their libraries.

// nvcc's code calls these where a library is loaded and where a kernel is launched with <<<...>>>.
void** __cudaRegisterFatBinary(void*) {
    static void* handle[1];
    return handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
thread_local struct {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
} configuration;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    configuration = {grid, block, shared, stream};
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared = configuration.shared;
    *static_cast<cudaStream_t*>(stream) = configuration.stream;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(void** kernel, const void* function) {
    *kernel = const_cast<void*>(function);
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(const void*, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t) {
    return launch(grid, block, shared);
}
cudaError_t cudaLaunchKernel(const void*, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t) {
    return launch(grid, block, shared);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void*, void**) {
    return launch(c->gridDim, c->blockDim, c->dynamicSmemBytes);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
    memset(a, 0, sizeof *a);
    a->binaryVersion = a->ptxVersion = card::model().compiled;  // by which CUB finds the settings that it was built with
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 32;
    a->maxDynamicSharedSizeBytes = card::model().shared_per_block;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
    bool much = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && value > card::model().shared_per_block;
    return much ? failed(cudaErrorInvalidValue) : cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
    *blocks = 2;
    return cudaSuccess;
}

// --- Errors.

cudaError_t cudaGetLastError() {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : error == cudaSuccess ? "no error" : "refused by the stand-in card";
}
const char* cudaGetErrorName(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : error == cudaSuccess ? "cudaSuccess" : "cudaError";
}
}
