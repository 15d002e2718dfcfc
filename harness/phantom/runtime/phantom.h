// What the stub libraries share: devices, memory, launches, refusals. Memory is real, arithmetic is not.
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define API __attribute__((visibility("default")))

enum { MAX_DEVICES = 64, PAGE = 4096, GRANULE = 2 << 20 };

// One kind of device, from the environment variable PHANTOM_DEVICE; all devices are of this kind.
typedef struct {
    char name[128];
    int count, major, minor, multiprocessors;
    uint64_t total_bytes, shared_block, shared_block_optin, shared_multiprocessor, l2_bytes;
} device_kind;
API const device_kind *phantom_kind(void);

// Devices by this process's numbers (CUDA_VISIBLE_DEVICES); `physical` is the machine's number.
API int phantom_device_count(void);
API int phantom_device(void);
API bool phantom_set_device(int device);
API int phantom_physical(int device);

// Device memory. Addresses have nothing behind them. 0: no memory left.
API uint64_t phantom_alloc(size_t bytes, int device);
API void phantom_free(uint64_t address);
API uint64_t phantom_reserve_addresses(size_t bytes, int device);
API uint64_t phantom_used(int physical);
API uint64_t phantom_peak(int physical);
API bool phantom_is_device(const void *pointer);
API int phantom_device_of(const void *pointer);
typedef struct { int pid; uint64_t used[MAX_DEVICES]; } process_use;
API int phantom_processes(int physical, int *pids, uint64_t *bytes, int most);

// Page-locked host memory.
API void *phantom_host_alloc(size_t bytes);
API bool phantom_host_free(void *pointer);
API bool phantom_host_register(void *pointer, size_t bytes);
API bool phantom_host_unregister(void *pointer);
API bool phantom_is_pinned(const void *pointer);

// Bytes of device memory that are known: they came by copy, memset or fill, and no launch since had a pointer to them.
API void phantom_copy(void *to, const void *from, size_t bytes);
API void phantom_set(void *to, int value, size_t bytes);
API bool phantom_peek(const void *from, void *to, size_t bytes);
API void phantom_poke(void *to, const void *from, size_t bytes);
API void phantom_forget(const void *start, size_t bytes);
API void phantom_forget_from(const void *start);

// Kernels.
typedef struct kernel kernel;
API kernel *phantom_kernel(const void *function, const char *name, const void *images);
API void phantom_launch(kernel *kernel, void **arguments, unsigned blocks);
API kernel *phantom_kernel_of(const void *function);
// Architecture (90 for sm_90) of the image that this device would run, 0 without one. `compiled`: of PTX, when it is loaded.
API int phantom_architecture(const kernel *kernel, bool *compiled);

// Counts of what this process did.
API void phantom_matmul(const void *result, int64_t m, int64_t n, int64_t k, int64_t batch);

// Says once that `function` of `library` is refused, remembers it, and returns `error`.
API long phantom_refuse(const char *library, const char *function, long error);
API const char *phantom_last_refused(void);
API bool phantom_alone(void);
