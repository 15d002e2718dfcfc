// libnccl: communicators without a network. Values that a collective makes are unknown, save where one process stands
// for all ranks: there, what it holds the others hold, and a small known value gives a known result.
#include "phantom.h"
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
typedef struct { char bytes[128]; } identity;
typedef struct { int size, rank, device; } communicator;  // size 0: of a split, which only communication would tell
enum { SUM, PROD, MAX, MIN, AVG, LARGEST = 1 << 20 };
enum { INVALID_USAGE = 5 };
static size_t width(int type) {
    static const size_t BYTES[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
    return BYTES[type % 12];
}
int ncclGetVersion(int *version) { *version = 22907; return 0; }
const char *ncclGetErrorString(int error) { return error ? "phantom: refused" : "no error"; }
const char *ncclGetLastError(communicator *c) { return phantom_last_refused() ? phantom_last_refused() : "none"; }
int ncclGetUniqueId(identity *id) {
    static int count;
    memset(id, 0, sizeof *id);
    int parts[2] = {getpid(), ++count};
    memcpy(id->bytes, parts, sizeof parts);
    return 0;
}
static communicator *made(int size, int rank) {
    communicator *c = malloc(sizeof *c);
    *c = (communicator){size, rank, phantom_device()};
    return c;
}
int ncclCommInitRank(communicator **c, int size, identity id, int rank) { *c = made(size, rank); return 0; }
int ncclCommInitRankConfig(communicator **c, int size, identity id, int rank, void *config) { *c = made(size, rank); return 0; }
int ncclCommInitRankScalable(communicator **c, int size, int rank, int ids, identity *id, void *config) { *c = made(size, rank); return 0; }
int ncclCommSplit(communicator *c, int color, int key, communicator **part, void *config) { *part = color < 0 ? NULL : made(0, key); return 0; }
int ncclCommCount(const communicator *c, int *size) {
    if (!c->size) return phantom_refuse("libnccl", "ncclCommCount of a split communicator", INVALID_USAGE);
    *size = c->size;
    return 0;
}
int ncclCommUserRank(const communicator *c, int *rank) { *rank = c->rank; return 0; }
int ncclCommCuDevice(const communicator *c, int *device) { *device = c->device; return 0; }
int ncclCommGetAsyncError(communicator *c, int *error) { *error = 0; return 0; }
int ncclCommDestroy(communicator *c) { free(c); return 0; }
int ncclCommAbort(communicator *c) { free(c); return 0; }
int ncclCommFinalize(communicator *c) { return 0; }
int ncclCommRegister(communicator *c, void *buffer, size_t bytes, void **handle) { *handle = buffer; return 0; }
int ncclCommDeregister(communicator *c, void *handle) { return 0; }
int ncclRedOpCreatePreMulSum(int *operation, void *scalar, int type, int residence, communicator *c) { static int next = AVG; *operation = ++next; return 0; }
int ncclRedOpDestroy(int operation, communicator *c) { return 0; }

// The sum of `size` equal values; false for types and operations that are not worked out.
static bool reduced(unsigned char *values, size_t count, int type, int operation, int size) {
    if (operation == MAX || operation == MIN || operation == AVG || size == 1) return operation <= AVG;
    if (operation != SUM) return false;
    for (size_t i = 0; i < count; i++) switch (type) {
    case 0: case 1: values[i] *= size; break;
    case 2: case 3: ((uint32_t *)values)[i] *= size; break;
    case 4: case 5: ((uint64_t *)values)[i] *= size; break;
    case 7: ((float *)values)[i] *= size; break;
    case 8: ((double *)values)[i] *= size; break;
    default: return false;
    }
    return true;
}

// `copies` of the `bytes` at `from`, reduced by `operation` where it is not negative; unknown where any doubt is left.
static int result(const void *from, void *to, size_t count, int type, int operation, communicator *c, int copies) {
    size_t bytes = count * width(type);
    unsigned char *values = NULL;
    bool known = (phantom_alone() || c->size == 1) && c->size && bytes * copies <= LARGEST;
    if (known) {
        values = malloc(bytes * copies + 1);
        known = phantom_peek(from, values, bytes) && (operation < 0 || reduced(values, count, type, operation, c->size));
    }
    for (int i = 1; known && i < copies; i++) memcpy(values + i * bytes, values, bytes);
    if (known) phantom_poke(to, values, bytes * copies);
    else phantom_forget(to, bytes * (copies ? copies : 1));
    if (!copies) phantom_forget_from(to);
    free(values);
    return 0;
}
int ncclAllReduce(const void *from, void *to, size_t count, int type, int operation, communicator *c, void *stream) { return result(from, to, count, type, operation, c, 1); }
int ncclReduce(const void *from, void *to, size_t count, int type, int operation, int root, communicator *c, void *stream) { return c->rank == root ? result(from, to, count, type, operation, c, 1) : 0; }

// A broadcast by every rank of a communicator within one group is a gather of equal parts. PyTorch gathers so from 2.15 on.
typedef struct { void *to; size_t count; int type, root; communicator *c; } broadcast;
static __thread broadcast *held;
static __thread int depth, num_held;
static bool equal_parts(const broadcast *a, const broadcast *b) { return a->c == b->c && a->count == b->count && a->type == b->type; }
static void gather(const broadcast *own) {
    for (int root = 0; root < own->c->size; root++) {
        int parts = 0;
        for (int i = 0; i < num_held; i++) parts += equal_parts(own, held + i) && held[i].root == root;
        if (parts != 1) return;
    }
    for (int i = 0; i < num_held; i++)
        if (equal_parts(own, held + i)) result(own->to, held[i].to, own->count, own->type, -1, own->c, 1);
}
int ncclGroupStart(void) { depth++; return 0; }
int ncclGroupEnd(void) {
    if (--depth) return 0;
    for (int i = 0; i < num_held; i++)
        if (held[i].root == held[i].c->rank) gather(held + i);
    free(held);
    held = NULL;
    num_held = 0;
    return 0;
}
// What another rank sends is not here.
static int sent(const void *from, void *to, size_t count, int type, int root, communicator *c) {
    if (depth && phantom_alone()) {
        held = realloc(held, (num_held + 1) * sizeof *held);
        held[num_held++] = (broadcast){to, count, type, root, c};
    }
    if (c->rank == root) return result(from, to, count, type, -1, c, 1);
    phantom_forget(to, count * width(type));
    return 0;
}
int ncclBroadcast(const void *from, void *to, size_t count, int type, int root, communicator *c, void *stream) { return sent(from ? from : to, to, count, type, root, c); }
int ncclBcast(void *buffer, size_t count, int type, int root, communicator *c, void *stream) { return sent(buffer, buffer, count, type, root, c); }
int ncclAllGather(const void *from, void *to, size_t count, int type, communicator *c, void *stream) { return result(from, to, count, type, -1, c, c->size); }
int ncclReduceScatter(const void *from, void *to, size_t count, int type, int operation, communicator *c, void *stream) {
    return result((const char *)from + count * width(type) * c->rank, to, count, type, operation, c, 1);
}
int ncclAlltoAll(const void *from, void *to, size_t count, int type, communicator *c, void *stream) {
    phantom_forget(to, count * width(type) * (c->size ? c->size : 1));
    if (!c->size) phantom_forget_from(to);
    return 0;
}
int ncclSend(const void *from, size_t count, int type, int peer, communicator *c, void *stream) { return 0; }
int ncclRecv(void *to, size_t count, int type, int peer, communicator *c, void *stream) { phantom_forget(to, count * width(type)); return 0; }
