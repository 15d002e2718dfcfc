// Kernels by name, launches, refusals. A launch runs nothing; it makes unknown what it was handed a pointer to.
#define _GNU_SOURCE
#include "phantom.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct kernel {
    const void *function;
    const char *name;
    const void *images;
    uint64_t launches;
    int fill_bytes;      // element size where this is PyTorch's fill of contiguous memory, else 0
    int copy_bytes;      // element size where this is PyTorch's copy of a list of tensors without a cast, else 0
    size_t argument_bytes;  // largest argument that is looked at
    kernel *next;
};

enum { BUCKETS = 1 << 15, MOST_ARGUMENTS = 64, FILLED = 64 << 10 };

// PyTorch's TensorListMetadata<2> (ATen/native/cuda/MultiTensorApply.cuh): which chunk of which tensor each block takes.
#if PHANTOM_CUDA >= 1300
enum { MOST_TENSORS = 448, MOST_BLOCKS = 2240, CHUNK = 65536 };
typedef uint16_t tensor_index;
#else
enum { MOST_TENSORS = 64, MOST_BLOCKS = 320, CHUNK = 65536 };
typedef unsigned char tensor_index;
#endif
typedef struct {
    char *addresses[2][MOST_TENSORS];  // sources, destinations
    int64_t count[MOST_TENSORS];
    tensor_index tensor_of_block[MOST_BLOCKS];
    int32_t chunk_of_block[MOST_BLOCKS];
} tensor_list;
static kernel *kernels[BUCKETS];
static uint64_t num_launches, matmul_flops, num_matmuls, unseen_arguments;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

API uint64_t phantom_num_launches(void) { return num_launches; }
API uint64_t phantom_num_matmuls(void) { return num_matmuls; }
API uint64_t phantom_matmul_flops(void) { return matmul_flops; }
API uint64_t phantom_unseen_arguments(void) { return unseen_arguments; }

static unsigned hashed(const void *function) { return ((uint64_t)function * 0x9E3779B97F4A7C15ull) >> 49; }

// Element size of `vectorized_elementwise_kernel<N, FillFunctor<T>, array<char*, 1>>`, by the mangled T.
static int fill_bytes(const char *name) {
    const char *functor = strstr(name, "vectorized_elementwise_kernel") ? strstr(name, "FillFunctorI") : NULL;
    if (!functor) return 0;
    const char *type = functor + strlen("FillFunctorI");
    static const struct { const char *mangled; int bytes; } TYPES[] = {
        {"lE", 8}, {"xE", 8}, {"dE", 8}, {"iE", 4}, {"fE", 4}, {"sE", 2}, {"bE", 1}, {"hE", 1}, {"aE", 1},
        {"N3c108BFloat16E", 2}, {"N3c104HalfE", 2},
    };
    for (size_t i = 0; i < sizeof TYPES / sizeof *TYPES; i++)
        if (!strncmp(type, TYPES[i].mangled, strlen(TYPES[i].mangled))) return TYPES[i].bytes;
    return 0;
}

// Element size of `multi_tensor_apply_kernel<TensorListMetadata<2>, UnaryOpFunctor<T, 2, 1, 1>, Copy<T, T>>`, by the
// mangled T; only types of one letter, which are their own type of arithmetic.
static int copy_bytes(const char *name) {
    static const struct { char mangled; int bytes; } TYPES[] = {
        {'l', 8}, {'x', 8}, {'d', 8}, {'i', 4}, {'f', 4}, {'s', 2}, {'b', 1}, {'h', 1}, {'a', 1},
    };
    const char *functor = strstr(name, "TensorListMetadataILi2E") ? strstr(name, "UnaryOpFunctorI") : NULL;
    const char *copy = functor ? strstr(functor, "4CopyI") : NULL;
    if (!copy) return 0;
    char type = functor[strlen("UnaryOpFunctorI")];
    const char *casts = copy + strlen("4CopyI");
    if (casts[0] != type || casts[1] != type || casts[2] != 'E') return 0;
    if (strncmp(functor + strlen("UnaryOpFunctorI") + 1, "Li2ELi1ELi1EE", strlen("Li2ELi1ELi1EE"))) return 0;
    for (size_t i = 0; i < sizeof TYPES / sizeof *TYPES; i++)
        if (TYPES[i].mangled == type) return TYPES[i].bytes;
    return 0;
}

API kernel *phantom_kernel_of(const void *function) {
    kernel *k = kernels[hashed(function)];
    while (k && k->function != function) k = k->next;
    return k;
}

// What nvcc packs into a program: code for several architectures, and PTX (the layout is that of cuobjdump's tables).
enum { PTX = 1, CODE = 2 };
typedef struct { uint32_t magic, version; const char *data; } images;
typedef struct { uint32_t magic; uint16_t version, header_bytes; uint64_t bytes; } table;
typedef struct {
    uint16_t kind, version;
    uint32_t header_bytes;
    uint64_t bytes;
    uint32_t compressed_bytes, unused;
    uint16_t minor, major;
    uint32_t architecture;
} entry;

API int phantom_architecture(const kernel *k, bool *compiled) {
    const device_kind *kind = phantom_kind();
    int own = kind->major * 10 + kind->minor, code = 0, ptx = 0;
    *compiled = false;
    if (!k->images) return own;  // a module, compiled for this device
    const char *at = ((const images *)k->images)->data;
    const table *all = (const table *)at;
    const char *end = at + all->header_bytes + all->bytes;
    for (at += all->header_bytes; at < end;) {
        const entry *each = (const entry *)at;
        int its = (int)each->architecture;
        // Code runs on devices of its generation that are as new or newer; PTX on all of those.
        if (each->kind == CODE && its / 10 == kind->major && its <= own && its > code) code = its;
        if (each->kind == PTX && its <= own && its > ptx) ptx = its;
        at += each->header_bytes + each->bytes;
    }
    *compiled = code == 0;
    return code ? code : ptx;
}

API kernel *phantom_kernel(const void *function, const char *name, const void *images) {
    pthread_mutex_lock(&lock);
    kernel *k = phantom_kernel_of(function);
    if (!k) {
        k = calloc(1, sizeof *k);
        k->function = function ? function : k;
        k->name = strdup(name);
        k->images = images;
        k->fill_bytes = fill_bytes(name);
        k->copy_bytes = copy_bytes(name);
        // Foreach kernels carry tables of pointers.
        k->argument_bytes = strstr(name, "multi_tensor_apply") ? 32 << 10 : 1024;
        kernel **head = &kernels[hashed(k->function)];
        k->next = *head;
        *head = k;
    }
    pthread_mutex_unlock(&lock);
    return k;
}

// Arguments are (int count, T value, char *to).
static bool filled(kernel *k, void **arguments) {
    if (!k || !k->fill_bytes) return false;
    size_t count = *(int *)arguments[0], bytes = count * k->fill_bytes;
    char *to = *(char **)arguments[2];
    if (!phantom_is_device(to)) return false;
    if (bytes > FILLED) { phantom_forget(to, bytes); return true; }
    char *values = malloc(bytes + 1);
    for (size_t i = 0; i < count; i++) memcpy(values + i * k->fill_bytes, arguments[1], k->fill_bytes);
    phantom_poke(to, values, bytes);
    free(values);
    return true;
}

static bool copied(kernel *k, void **arguments, unsigned blocks) {
    if (!k || !k->copy_bytes || blocks > MOST_BLOCKS) return false;
    const tensor_list *list = arguments[0];
    for (unsigned i = 0; i < blocks; i++) {
        int tensor = list->tensor_of_block[i];
        int64_t first = (int64_t)list->chunk_of_block[i] * CHUNK, left = list->count[tensor] - first;
        size_t at = first * k->copy_bytes, bytes = (left < CHUNK ? left : CHUNK) * k->copy_bytes;
        char *from = list->addresses[0][tensor] + at, *to = list->addresses[1][tensor] + at;
        if (list->count[tensor] * k->copy_bytes > FILLED) phantom_forget(to, bytes);
        else phantom_copy(to, from, bytes);
    }
    return true;
}

static __thread uint64_t stack_end;
static uint64_t end_of_stack(void) {
    if (!stack_end) {
        pthread_attr_t attributes;
        void *start;
        size_t bytes;
        pthread_getattr_np(pthread_self(), &attributes);
        pthread_attr_getstack(&attributes, &start, &bytes);
        pthread_attr_destroy(&attributes);
        stack_end = (uint64_t)start + bytes;
    }
    return stack_end;
}

// Neither the number nor the size of a kernel's arguments is told. Both lie on the caller's stack, where the words from
// one argument to the next are searched for device pointers.
static void forget_written(kernel *k, void **arguments) {
    uint64_t here = (uint64_t)__builtin_frame_address(0), end = end_of_stack();
    uint64_t start[MOST_ARGUMENTS], most = k ? k->argument_bytes : 1024;
    int count = 0;
    if ((uint64_t)arguments < here || (uint64_t)arguments >= end) { unseen_arguments++; return; }
    for (; count < MOST_ARGUMENTS && (uint64_t)(arguments + count + 1) <= end; count++) {
        uint64_t at = (uint64_t)arguments[count];
        if (at < here || at >= end || at > (uint64_t)arguments + (64 << 10)) break;
        start[count] = at;
    }
    for (int i = 0; i < count; i++) {
        uint64_t stop = start[i] + most < end ? start[i] + most : end;
        if ((uint64_t)arguments > start[i] && (uint64_t)arguments < stop) stop = (uint64_t)arguments;
        for (int j = 0; j < count; j++)
            if (start[j] > start[i] && start[j] < stop) stop = start[j];
        for (uint64_t at = (start[i] + 7) / 8 * 8; at + 8 <= stop; at += 8) {
            const void *value = *(void **)at;
            if (phantom_is_device(value)) phantom_forget_from(value);
        }
    }
}

API void phantom_launch(kernel *k, void **arguments, unsigned blocks) {
    __atomic_fetch_add(&num_launches, 1, __ATOMIC_RELAXED);
    if (k) __atomic_fetch_add(&k->launches, 1, __ATOMIC_RELAXED);
    if (arguments && !filled(k, arguments) && !copied(k, arguments, blocks)) forget_written(k, arguments);
}

API void phantom_matmul(const void *result, int64_t m, int64_t n, int64_t k, int64_t batch) {
    __atomic_fetch_add(&num_matmuls, 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(&matmul_flops, 2ull * m * n * k * batch, __ATOMIC_RELAXED);
    phantom_forget_from(result);
}

API void phantom_each_kernel(void (*call)(const char *name, uint64_t launches)) {
    for (int i = 0; i < BUCKETS; i++)
        for (kernel *k = kernels[i]; k; k = k->next)
            if (k->launches) call(k->name, k->launches);
}

// -- refusals -----------------------------------------------------------------------------------

typedef struct refusal { const char *library, *function; struct refusal *next; } refusal;
static refusal *refusals;
static __thread const char *last_refused;

API const char *phantom_last_refused(void) { return last_refused; }

API long phantom_refuse(const char *library, const char *function, long error) {
    last_refused = function;
    pthread_mutex_lock(&lock);
    refusal *r = refusals;
    while (r && strcmp(r->function, function)) r = r->next;
    if (!r) {
        r = malloc(sizeof *r);
        *r = (refusal){library, function, refusals};
        refusals = r;
        fprintf(stderr, "phantom: %s (%s) has no answer here: refused with error %ld\n", function, library, error);
    }
    pthread_mutex_unlock(&lock);
    return error;
}

API void phantom_each_refusal(void (*call)(const char *library, const char *function)) {
    for (refusal *r = refusals; r; r = r->next) call(r->library, r->function);
}

// One process stands for all ranks: what it holds, the others hold.
API bool phantom_alone(void) {
    static int alone = -1;
    if (alone < 0) alone = getenv("PHANTOM_WORLD") != NULL;
    return alone;
}
