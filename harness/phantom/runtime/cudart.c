// libcudart: what PyTorch asks of the CUDA runtime.
#include "phantom.h"
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Layouts must be those of the CUDA that PyTorch was built with.
_Static_assert(CUDART_VERSION / 10 == PHANTOM_CUDA, "the CUDA headers are not of PyTorch's CUDA version");
#define OK cudaSuccess

// -- devices ------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int *count) {
    *count = phantom_device_count();
    return *count ? OK : cudaErrorNoDevice;
}
cudaError_t cudaGetDevice(int *device) { *device = phantom_device(); return OK; }
cudaError_t cudaSetDevice(int device) { return phantom_set_device(device) ? OK : cudaErrorInvalidDevice; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return OK; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return OK; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    const device_kind *kind = phantom_kind();
    if (device < 0 || device >= phantom_device_count()) return cudaErrorInvalidDevice;
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "%s", kind->name);
    snprintf(p->uuid.bytes, sizeof p->uuid.bytes, "phantom-%d", phantom_physical(device));
    p->major = kind->major;
    p->minor = kind->minor;
    p->multiProcessorCount = kind->multiprocessors;
    p->totalGlobalMem = kind->total_bytes;
    p->sharedMemPerBlock = kind->shared_block;
    p->sharedMemPerBlockOptin = kind->shared_block_optin;
    p->sharedMemPerMultiprocessor = kind->shared_multiprocessor;
    p->reservedSharedMemPerBlock = 1024;
    p->l2CacheSize = kind->l2_bytes;
    p->persistingL2CacheMaxSize = kind->l2_bytes * 5 / 8;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->warpSize = 32;
    p->memPitch = 2147483647;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->totalConstMem = 65536;
    p->textureAlignment = 512;
    p->asyncEngineCount = 3;
    p->concurrentKernels = p->unifiedAddressing = p->canMapHostMemory = p->cooperativeLaunch = 1;
    p->streamPrioritiesSupported = p->ECCEnabled = 1;
    p->pciBusID = phantom_physical(device) + 1;
    return OK;
}

// An attribute that is not here is refused, not guessed.
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    struct cudaDeviceProp p;
    cudaError_t error = cudaGetDeviceProperties(&p, device);
    if (error) return error;
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = p.reservedSharedMemPerBlock; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = p.maxBlocksPerMultiProcessor; break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = p.regsPerBlock; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: *value = 1024; break;
    case cudaDevAttrMaxBlockDimZ: *value = 64; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[1]; break;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrCanMapHostMemory:
    case cudaDevAttrConcurrentKernels: *value = 1; break;
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrMemoryPoolSupportedHandleTypes:
    case cudaDevAttrIntegrated:
    case cudaDevAttrPageableMemoryAccess:
    case cudaDevAttrGPUDirectRDMASupported:
    case cudaDevAttrHostNumaId: *value = 0; break;
    case cudaDevAttrClockRate:
    case cudaDevAttrMemoryClockRate:
    case cudaDevAttrGlobalMemoryBusWidth: *value = 1; break;  // rates, which nothing here has
    default: {
        static char names[256][40];
        char *name = names[attribute & 255];
        snprintf(name, sizeof names[0], "cudaDeviceGetAttribute(%d)", attribute);
        return phantom_refuse("libcudart", name, cudaErrorNotSupported);
    }
    }
    return OK;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return OK;
}
cudaError_t cudaDeviceGetPCIBusId(char *text, int bytes, int device) {
    snprintf(text, bytes, "0000:%02X:00.0", phantom_physical(device) + 1);
    return OK;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; return OK; }
const char *cudaGetErrorName(cudaError_t error) { return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaError"; }
const char *cudaGetErrorString(cudaError_t error) {
    static __thread char text[160];
    if (error == cudaErrorMemoryAllocation) return "out of memory";
    const char *function = phantom_last_refused();
    snprintf(text, sizeof text, "phantom device: %s", function ? function : "error");
    return function ? strcat(text, " is refused") : text;
}

// -- memory -------------------------------------------------------------------------------------

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *total = phantom_kind()->total_bytes;
    *available = *total - phantom_used(phantom_physical(phantom_device()));
    return OK;
}
cudaError_t cudaMalloc(void **pointer, size_t bytes) {
    *pointer = (void *)phantom_alloc(bytes, phantom_device());
    return *pointer ? OK : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void *pointer) {
    if (pointer) phantom_free((uint64_t)pointer);
    return OK;
}
cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) {
    *pointer = phantom_host_alloc(bytes);
    return *pointer ? OK : cudaErrorMemoryAllocation;
}
cudaError_t cudaFreeHost(void *pointer) { return phantom_host_free(pointer) ? OK : cudaErrorInvalidValue; }
cudaError_t cudaHostRegister(void *pointer, size_t bytes, unsigned flags) { phantom_host_register(pointer, bytes); return OK; }
cudaError_t cudaHostUnregister(void *pointer) { return phantom_host_unregister(pointer) ? OK : cudaErrorHostMemoryNotRegistered; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *pointer) {
    memset(a, 0, sizeof *a);
    if (phantom_is_device(pointer)) {
        a->type = cudaMemoryTypeDevice;
        a->device = phantom_device_of(pointer);
        a->devicePointer = (void *)pointer;
    } else if (phantom_is_pinned(pointer)) {
        a->type = cudaMemoryTypeHost;
        a->device = phantom_device();
        a->hostPointer = a->devicePointer = (void *)pointer;
    } else {
        a->type = cudaMemoryTypeUnregistered;
        a->device = -2;
        a->hostPointer = (void *)pointer;
    }
    return OK;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) { phantom_copy(to, from, bytes); return OK; }
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) { phantom_copy(to, from, bytes); return OK; }
cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes, cudaStream_t stream) { phantom_copy(to, from, bytes); return OK; }
cudaError_t cudaMemset(void *to, int value, size_t bytes) { phantom_set(to, value, bytes); return OK; }
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) { phantom_set(to, value, bytes); return OK; }

// -- streams and events: all is done when it is asked for ------------------------------------------

static cudaError_t handle(void **made) { *made = calloc(1, 64); return OK; }
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return handle((void **)stream); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return handle((void **)stream); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    handle((void **)stream);
    *(int *)*stream = priority;
    return OK;
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = stream ? *(int *)stream : 0; return OK; }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { free(stream); return OK; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) { *status = cudaStreamCaptureStatusNone; return OK; }
#if CUDART_VERSION >= 13000
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *count) {
    *status = cudaStreamCaptureStatusNone;
    if (id) *id = 0;
    return OK;
}
#endif
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { return OK; }
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void *data) { call(data); return OK; }
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void *data, unsigned flags) { call(stream, OK, data); return OK; }
cudaError_t cudaEventCreate(cudaEvent_t *event) { return handle((void **)event); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return handle((void **)event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); return OK; }
// Nothing takes time here. Not a number cannot be taken for a time.
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t begin, cudaEvent_t end) { *milliseconds = NAN; return OK; }

// -- kernels ------------------------------------------------------------------------------------

typedef struct { dim3 grid, block; size_t shared; void *stream; } configuration;
static __thread configuration pushed[16];
static __thread unsigned depth;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
    pushed[depth++ % 16] = (configuration){grid, block, shared, stream};
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    configuration c = pushed[--depth % 16];
    *grid = c.grid;
    *block = c.block;
    *shared = c.shared;
    *(void **)stream = c.stream;
    return OK;
}
void **__cudaRegisterFatBinary(void *images) {
    void **handle = calloc(2, sizeof *handle);
    handle[0] = images;
    return handle;
}
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) { free(handle); }
char __cudaInitModule(void **handle) { return 1; }
void __cudaRegisterVar(void **handle, char *variable, char *address, const char *name, int external, size_t bytes, int constant, int global) {}
void __cudaRegisterFunction(void **handle, const char *function, char *device_function, const char *name, int threads, uint3 *tid, uint3 *bid, dim3 *block, dim3 *grid, int *warp) {
    phantom_kernel(function, name, handle[0]);
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) { *kernel = (cudaKernel_t)function; return OK; }
cudaError_t __cudaLaunchKernel(cudaKernel_t function, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    phantom_launch(phantom_kernel_of(function), arguments, grid.x);
    return OK;
}
cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    phantom_launch(phantom_kernel_of(function), arguments, grid.x);
    return OK;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments) {
    phantom_launch(phantom_kernel_of(function), arguments, config->gridDim.x);
    return OK;
}
cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    phantom_launch(phantom_kernel_of(function), arguments, grid.x);
    return OK;
}
// Ordinary numbers: kernels' registers and occupancy are in code that nothing here reads.
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *function) {
    const device_kind *kind = phantom_kind();
    const kernel *k = phantom_kernel_of(function);
    bool compiled;
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 32;
    a->ptxVersion = k ? phantom_architecture(k, &compiled) : 0;
    if (!a->ptxVersion) return cudaErrorNoKernelImageForDevice;
    a->binaryVersion = compiled ? kind->major * 10 + kind->minor : a->ptxVersion;
    a->maxDynamicSharedSizeBytes = kind->shared_block_optin;
    return OK;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int threads, size_t shared) { *blocks = 2; return OK; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads, size_t shared, unsigned flags) { *blocks = 2; return OK; }

// The driver's functions, from the library that stands for it; what it lacks is a stub that refuses by name.
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags, enum cudaDriverEntryPointQueryResult *result) {
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    void *(*entry)(const char *) = driver ? (void *(*)(const char *))dlsym(driver, "phantom_driver_entry") : NULL;
    *function = entry ? entry(name) : NULL;
    if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return OK;
}
