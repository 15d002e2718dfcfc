// Large blocks of ordinary host memory: address space without a promise of memory, as pinned memory is.
//
// A trainer that offloads asks for more than this machine has, in blocks that Linux refuses when one is larger than its
// memory (vm.overcommit_memory=0). Pages that nobody touches cost nothing, so such a block is mapped here without
// accounting. PyTorch's allocator takes its memory by posix_memalign and gives it back by free; it never resizes it.
// Their bytes are counted: they are what a run needs of the host beside pinned memory.
#define _GNU_SOURCE
#include "phantom.h"
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <sys/mman.h>

// The range lies below the devices' addresses, apart from all that the C library and the kernel hand out.
static const uint64_t LOWEST = 0x040000000000ull, HIGHEST = 0x100000000000ull;
enum { LARGE = 16 << 20 };  // as in phantom_agent/host.py
static uint64_t next = 0x040000000000ull;
static uint64_t used, peak;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
API uint64_t phantom_pageable_peak(void) { return peak; }

static void *next_in_line(const char *name) { return dlsym(RTLD_NEXT, name); }

// A block behind a page that tells its size; NULL if the range has no room.
static void *mapped(size_t bytes) {
    size_t size = (bytes + 2 * PAGE - 1) / PAGE * PAGE;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE;
    if (size > HIGHEST - LOWEST) return NULL;
    pthread_mutex_lock(&lock);
    if (next + size > HIGHEST) next = LOWEST;
    void *start = mmap((void *)next, size, PROT_READ | PROT_WRITE, flags, -1, 0);
    bool done = start == (void *)next;
    next += size;
    if (done) used += size - PAGE;
    if (used > peak) peak = used;
    pthread_mutex_unlock(&lock);
    if (!done) {
        if (start != MAP_FAILED) munmap(start, size);  // a kernel that does not know MAP_FIXED_NOREPLACE
        return NULL;
    }
    *(size_t *)start = size;
    return (char *)start + PAGE;
}

static void unmap(void *block) {
    char *start = (char *)block - PAGE;
    size_t size = *(size_t *)start;
    pthread_mutex_lock(&lock);
    munmap(start, size);
    used -= size - PAGE;
    pthread_mutex_unlock(&lock);
}

API int posix_memalign(void **block, size_t alignment, size_t bytes) {
    static int (*other)(void **, size_t, size_t);
    if (bytes >= LARGE && alignment <= PAGE) {
        void *found = mapped(bytes);
        if (found) { *block = found; return 0; }
    }
    if (!other) other = (int (*)(void **, size_t, size_t))next_in_line("posix_memalign");
    return other(block, alignment, bytes);
}

API void free(void *block) {
    static void (*other)(void *);
    if ((uint64_t)block >= LOWEST && (uint64_t)block < HIGHEST) {
        int kept = errno;
        unmap(block);
        errno = kept;
        return;
    }
    if (!other) other = (void (*)(void *))next_in_line("free");
    other(block);
}
