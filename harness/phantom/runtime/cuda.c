// libcuda: the driver, as PyTorch's expandable segments and Triton use it.
#define _GNU_SOURCE
#include "phantom.h"
#include <cuda.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char context;
#undef cuDeviceGetUuid
#undef cuDeviceTotalMem
#undef cuMemGetInfo
#undef cuCtxPushCurrent
#undef cuCtxPopCurrent
#undef cuDevicePrimaryCtxRelease

CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDriverGetVersion(int *version) { *version = CUDA_VERSION; return 0; }
CUresult cuDeviceGetCount(int *count) { *count = phantom_device_count(); return 0; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return 0; }
CUresult cuDeviceGetName(char *text, int bytes, CUdevice device) { snprintf(text, bytes, "%s", phantom_kind()->name); return 0; }
CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) { *bytes = phantom_kind()->total_bytes; return 0; }
CUresult cuMemGetInfo_v2(size_t *available, size_t *total) {
    *total = phantom_kind()->total_bytes;
    *available = *total - phantom_used(phantom_physical(phantom_device()));
    return 0;
}
CUresult cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)&context; return 0; }
CUresult cuCtxSetCurrent(CUcontext c) { return 0; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = phantom_device(); return 0; }
CUresult cuCtxSynchronize(void) { return 0; }
// The driver would tell of its errors in words; here every function returns its own.
CUresult cuLogsRegisterCallback(CUlogsCallback call, void *data, CUlogsCallbackHandle *handle) { *handle = NULL; return 0; }
CUresult cuLogsUnregisterCallback(CUlogsCallbackHandle handle) { return 0; }
// PyTorch does not ask for these, so that no stub is made of them; Triton's module is linked with them.
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return phantom_refuse("libcuda.so.1", "cuCtxGetLimit", CUDA_ERROR_NOT_SUPPORTED); }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return phantom_refuse("libcuda.so.1", "cuCtxSetLimit", CUDA_ERROR_NOT_SUPPORTED); }
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice device) { *c = (CUcontext)&context; return 0; }
CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : "phantom device: refused";
    return 0;
}
CUresult cuGetErrorName(CUresult error, const char **text) { return cuGetErrorString(error, text); }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED: *value = 1; return 0;
    case CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED: *value = 0; return 0;
    default: break;
    }
    int (*runtime)(int *, int, int) = (int (*)(int *, int, int))dlsym(RTLD_DEFAULT, "cudaDeviceGetAttribute");
    return runtime ? runtime(value, attribute, device) : CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    bool device = phantom_is_device((void *)pointer);
    if (attribute == CU_POINTER_ATTRIBUTE_MEMORY_TYPE && device) { *(int *)value = CU_MEMORYTYPE_DEVICE; return 0; }
    if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER && device) { *(CUdeviceptr *)value = pointer; return 0; }
    if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL && device) { *(int *)value = phantom_device_of((void *)pointer); return 0; }
    return CUDA_ERROR_INVALID_VALUE;
}

// -- virtual memory -----------------------------------------------------------------------------

CUresult cuMemGetAllocationGranularity(size_t *bytes, const CUmemAllocationProp *p, CUmemAllocationGranularity_flags flags) { *bytes = GRANULE; return 0; }
CUresult cuMemAddressReserve(CUdeviceptr *pointer, size_t bytes, size_t alignment, CUdeviceptr wish, unsigned long long flags) {
    *pointer = phantom_reserve_addresses(bytes, phantom_device());
    return 0;
}
CUresult cuMemAddressFree(CUdeviceptr pointer, size_t bytes) { return 0; }
CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t bytes, const CUmemAllocationProp *p, unsigned long long flags) {
    *handle = phantom_alloc(bytes, p->location.id);
    return *handle ? 0 : CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult cuMemRelease(CUmemGenericAllocationHandle handle) { phantom_free(handle); return 0; }
CUresult cuMemMap(CUdeviceptr pointer, size_t bytes, size_t offset, CUmemGenericAllocationHandle handle, unsigned long long flags) { return 0; }
CUresult cuMemUnmap(CUdeviceptr pointer, size_t bytes) { phantom_forget((void *)pointer, bytes); return 0; }
CUresult cuMemSetAccess(CUdeviceptr pointer, size_t bytes, const CUmemAccessDesc *access, size_t count) { return 0; }

// -- modules and kernels ------------------------------------------------------------------------

CUresult cuModuleLoad(CUmodule *module, const char *path) { *module = (CUmodule)&context; return 0; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = (CUmodule)&context; return 0; }
CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned n, CUjit_option *options, void **values) { *module = (CUmodule)&context; return 0; }
CUresult cuModuleUnload(CUmodule module) { return 0; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) { *function = (CUfunction)phantom_kernel(NULL, name, NULL); return 0; }
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : 0;
    return 0;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return 0; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return 0; }
CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, CUstream stream, void **arguments, void **extra) {
    phantom_launch((kernel *)function, arguments, gx);
    return 0;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
    phantom_launch((kernel *)function, arguments, config->gridDimX);
    return 0;
}
CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, CUstream stream, void **arguments) {
    phantom_launch((kernel *)function, arguments, gx);
    return 0;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function, int threads, size_t shared) { *blocks = 2; return 0; }

// -- entry points by name -----------------------------------------------------------------------

// A refusing function for a name that is only known when it is asked for.
enum { UNKNOWN = 96 };
static char *unknown[UNKNOWN];
static CUresult refused(int i) { return phantom_refuse("libcuda.so.1", unknown[i], CUDA_ERROR_NOT_SUPPORTED); }
#define ONE(i) static CUresult refused##i(void) { return refused(1##i - 100); }
#define TEN(t) ONE(t##0) ONE(t##1) ONE(t##2) ONE(t##3) ONE(t##4) ONE(t##5) ONE(t##6) ONE(t##7) ONE(t##8) ONE(t##9)
TEN(0) TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8)
#define NAMES(t) refused##t##0, refused##t##1, refused##t##2, refused##t##3, refused##t##4, refused##t##5, refused##t##6, refused##t##7, refused##t##8, refused##t##9,
static CUresult (*refusing[])(void) = {NAMES(0) NAMES(1) NAMES(2) NAMES(3) NAMES(4) NAMES(5) NAMES(6) NAMES(7) NAMES(8)};

static void *refuser(const char *name) {
    for (size_t i = 0; i < sizeof refusing / sizeof *refusing; i++) {
        if (!unknown[i]) unknown[i] = strdup(name);
        if (!strcmp(unknown[i], name)) return (void *)refusing[i];
    }
    return NULL;
}

API void *phantom_driver_entry(const char *name) {
    static void *own;
    char versioned[256];
    Dl_info here;
    if (!own && dladdr((void *)phantom_driver_entry, &here)) own = dlopen(here.dli_fname, RTLD_NOW);
    snprintf(versioned, sizeof versioned, "%s_v2", name);
    void *found = dlsym(own, versioned);
    if (!found) found = dlsym(own, name);
    return found ? found : refuser(name);
}
CUresult cuGetProcAddress_v2(const char *name, void **function, int version, cuuint64_t flags, CUdriverProcAddressQueryResult *result) {
    *function = phantom_driver_entry(name);
    if (result) *result = CU_GET_PROC_ADDRESS_SUCCESS;
    return 0;
}
