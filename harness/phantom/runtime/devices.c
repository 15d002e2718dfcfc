// Devices, their memory and page-locked host memory. Capacity is shared by the processes of a session through one mapped file.
#define _GNU_SOURCE
#include "phantom.h"
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static const uint64_t FIRST = 0x100000000000ull;  // no host pointer lies here, also of position-independent programs
static const uint64_t SPAN = 1ull << 46;          // addresses of all devices, below what the system gives to programs
static uint64_t slice;                            // of one: each expandable segment reserves more than the device holds
enum { MAX_PROCESSES = 512 };

typedef struct {
    _Atomic uint64_t used[MAX_DEVICES], peak[MAX_DEVICES];
    struct { _Atomic int pid; _Atomic uint64_t used[MAX_DEVICES]; } process[MAX_PROCESSES];
} ledger;

static device_kind kind;
static ledger *book;
static int visible[MAX_DEVICES], num_visible;
static int slot = -1;
static __thread int current;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void stop(const char *message) {
    fprintf(stderr, "phantom: %s\n", message);
    _exit(70);
}

static uint64_t number(const char *text, const char *key) {
    const char *found = strstr(text, key);
    if (!found) stop("PHANTOM_DEVICE lacks a field");
    return strtoull(found + strlen(key), NULL, 10);
}

static void read_kind(void) {
    const char *text = getenv("PHANTOM_DEVICE");
    if (!text) stop("PHANTOM_DEVICE is not set: start the program with `alst phantom -- COMMAND`");
    snprintf(kind.name, sizeof kind.name, "%.*s", (int)strcspn(text, ";"), text);
    kind.count = number(text, ";count=");
    kind.major = number(text, ";major=");
    kind.minor = number(text, ";minor=");
    kind.multiprocessors = number(text, ";multiprocessors=");
    kind.total_bytes = number(text, ";total=");
    kind.shared_block = 49152;
    kind.shared_block_optin = number(text, ";shared=");
    kind.shared_multiprocessor = number(text, ";shared_multiprocessor=");
    kind.l2_bytes = number(text, ";l2=");
    if (kind.count < 1 || kind.count > MAX_DEVICES) stop("PHANTOM_DEVICE: count is out of range");
    slice = SPAN / kind.count / GRANULE * GRANULE;
}

// As in CUDA: an entry that names no device ends the list.
static void read_visible(void) {
    const char *text = getenv("CUDA_VISIBLE_DEVICES");
    if (!text) {
        for (num_visible = 0; num_visible < kind.count; num_visible++) visible[num_visible] = num_visible;
        return;
    }
    while (*text && num_visible < kind.count) {
        char *end;
        long device = strtol(text, &end, 10);
        if (end == text || device < 0 || device >= kind.count) break;
        visible[num_visible++] = device;
        text = *end == ',' ? end + 1 : end;
    }
}

// A process that has used no memory leaves its forks free to be of other devices.
static void forked(void) {
    if (slot < 0) once = (pthread_once_t)PTHREAD_ONCE_INIT;
    slot = -1;
}

static void open_book(void) {
    const char *path = getenv("PHANTOM_LEDGER");
    int flags = MAP_SHARED, file = -1;
    if (path) {
        file = open(path, O_RDWR | O_CREAT, 0600);
        if (file < 0 || ftruncate(file, sizeof(ledger))) stop("cannot write PHANTOM_LEDGER");
    } else {
        flags |= MAP_ANONYMOUS;
    }
    book = mmap(NULL, sizeof(ledger), PROT_READ | PROT_WRITE, flags, file, 0);
    if (book == MAP_FAILED) stop("cannot map PHANTOM_LEDGER");
    if (file >= 0) close(file);
    static bool heard;
    if (!heard) pthread_atfork(NULL, NULL, forked);
    heard = true;
}

static void begin(void) {
    read_kind();
    read_visible();
    open_book();
}

static void ready(void) { pthread_once(&once, begin); }

API const device_kind *phantom_kind(void) { ready(); return &kind; }
API int phantom_device_count(void) { ready(); return num_visible; }
API int phantom_device(void) { return current; }
API int phantom_physical(int device) { ready(); return visible[device]; }
API bool phantom_set_device(int device) {
    ready();
    if (device < 0 || device >= num_visible) return false;
    current = device;
    return true;
}

// -- capacity -----------------------------------------------------------------------------------

static bool dead(int pid) { return pid && kill(pid, 0) && errno == ESRCH; }

// Memory of processes that ended without giving it back is free again, as the driver has it.
static void bury(void) {
    for (int i = 0; i < MAX_PROCESSES; i++) {
        int pid = book->process[i].pid;
        if (!dead(pid)) continue;
        for (int d = 0; d < kind.count; d++)
            book->used[d] -= atomic_exchange(&book->process[i].used[d], 0);
        atomic_compare_exchange_strong(&book->process[i].pid, &pid, 0);
    }
}

static int own_slot(void) {
    for (int i = 0; slot < 0 && i < MAX_PROCESSES; i++) {
        int none = 0;
        if (atomic_compare_exchange_strong(&book->process[i].pid, &none, getpid())) slot = i;
    }
    if (slot < 0) stop("too many processes");
    return slot;
}

static bool charge(int physical, uint64_t bytes) {
    for (int attempt = 0; attempt < 2; attempt++) {
        uint64_t before = book->used[physical];
        while (before + bytes <= kind.total_bytes) {
            if (!atomic_compare_exchange_weak(&book->used[physical], &before, before + bytes)) continue;
            book->process[own_slot()].used[physical] += bytes;
            uint64_t peak = book->peak[physical];
            while (peak < before + bytes && !atomic_compare_exchange_weak(&book->peak[physical], &peak, before + bytes));
            return true;
        }
        bury();
    }
    return false;
}

static void give_back(int physical, uint64_t bytes) {
    book->used[physical] -= bytes;
    book->process[own_slot()].used[physical] -= bytes;
}

API uint64_t phantom_used(int physical) { ready(); bury(); return book->used[physical]; }
API uint64_t phantom_peak(int physical) { ready(); return book->peak[physical]; }

API int phantom_processes(int physical, int *pids, uint64_t *bytes, int most) {
    int found = 0;
    ready();
    bury();
    for (int i = 0; i < MAX_PROCESSES; i++) {
        if (!book->process[i].pid || !book->process[i].used[physical]) continue;
        if (found < most) { pids[found] = book->process[i].pid; bytes[found] = book->process[i].used[physical]; }
        found++;
    }
    return found;
}

// -- addresses ----------------------------------------------------------------------------------

typedef struct block { uint64_t address, bytes; struct block *next; } block;
enum { BUCKETS = 1 << 14 };
static block *allocated[BUCKETS], *released;
static uint64_t next_address[MAX_DEVICES];

static block **bucket(uint64_t address) { return &allocated[(address / GRANULE) % BUCKETS]; }
static uint64_t rounded(uint64_t bytes, uint64_t unit) { return (bytes + unit - 1) / unit * unit; }

static uint64_t fresh(uint64_t bytes, int device) {
    if (!next_address[device]) next_address[device] = FIRST + device * slice;
    if (next_address[device] + bytes > FIRST + (device + 1) * slice) stop("a device has run out of addresses");
    uint64_t address = next_address[device];
    next_address[device] += bytes;
    return address;
}

// An address range given back serves the next allocation of its size on its device.
static block *reused(uint64_t bytes, int device) {
    for (block **at = &released; *at; at = &(*at)->next)
        if ((*at)->bytes == bytes && phantom_device_of((void *)(*at)->address) == device) {
            block *found = *at;
            *at = found->next;
            return found;
        }
    return NULL;
}

API uint64_t phantom_alloc(size_t bytes, int device) {
    ready();
    uint64_t size = rounded(bytes ? bytes : 1, GRANULE);
    if (bytes > kind.total_bytes || !charge(visible[device], size)) return 0;
    pthread_mutex_lock(&lock);
    block *made = reused(size, device);
    if (!made) {
        made = malloc(sizeof *made);
        *made = (block){fresh(size, device), size, NULL};
    }
    block **head = bucket(made->address);
    made->next = *head;
    *head = made;
    pthread_mutex_unlock(&lock);
    return made->address;
}

API void phantom_free(uint64_t address) {
    pthread_mutex_lock(&lock);
    block **at = bucket(address);
    while (*at && (*at)->address != address) at = &(*at)->next;
    block *found = *at;
    if (found) {
        *at = found->next;
        found->next = released;
        released = found;
    }
    pthread_mutex_unlock(&lock);
    if (!found) stop("an address was freed that was not allocated");
    phantom_forget((void *)address, found->bytes);
    give_back(visible[phantom_device_of((void *)address)], found->bytes);
}

API uint64_t phantom_reserve_addresses(size_t bytes, int device) {
    pthread_mutex_lock(&lock);
    uint64_t address = fresh(rounded(bytes, GRANULE) + GRANULE, device);
    pthread_mutex_unlock(&lock);
    return address;
}

API bool phantom_is_device(const void *pointer) {
    return (uint64_t)pointer >= FIRST && (uint64_t)pointer < FIRST + SPAN;
}
API int phantom_device_of(const void *pointer) { return ((uint64_t)pointer - FIRST) / slice; }

// -- page-locked host memory --------------------------------------------------------------------

typedef struct range { char *start; size_t bytes; bool mapped; struct range *next; } range;
static range *pinned;
static uint64_t host_used, host_peak;
static pthread_mutex_t host_lock = PTHREAD_MUTEX_INITIALIZER;
API uint64_t phantom_host_used(void) { return host_used; }
API uint64_t phantom_host_peak(void) { return host_peak; }

static void remember(void *start, size_t bytes, bool mapped) {
    range *made = malloc(sizeof *made);
    pthread_mutex_lock(&host_lock);
    *made = (range){start, bytes, mapped, pinned};
    pinned = made;
    host_used += bytes;
    if (host_used > host_peak) host_peak = host_used;
    pthread_mutex_unlock(&host_lock);
}

static bool drop(void *start, bool mapped) {
    pthread_mutex_lock(&host_lock);
    range **at = &pinned;
    while (*at && !((*at)->start == start && (*at)->mapped == mapped)) at = &(*at)->next;
    range *found = *at;
    if (found) { *at = found->next; host_used -= found->bytes; }
    pthread_mutex_unlock(&host_lock);
    if (!found) return false;
    if (mapped) munmap(found->start, found->bytes);
    free(found);
    return true;
}

// Pages that nobody touches cost no memory of this machine.
API void *phantom_host_alloc(size_t bytes) {
    size_t size = rounded(bytes ? bytes : 1, PAGE);
    void *start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return NULL;
    remember(start, size, true);
    return start;
}
API bool phantom_host_free(void *pointer) { return drop(pointer, true); }
API bool phantom_host_register(void *pointer, size_t bytes) { remember(pointer, bytes, false); return true; }
API bool phantom_host_unregister(void *pointer) { return drop(pointer, false); }

API bool phantom_is_pinned(const void *pointer) {
    bool found = false;
    pthread_mutex_lock(&host_lock);
    for (range *r = pinned; r && !found; r = r->next)
        found = (char *)pointer >= r->start && (char *)pointer < r->start + r->bytes;
    pthread_mutex_unlock(&host_lock);
    return found;
}
