// Which bytes of device memory are known, and the reads that ask for those that are not.
#include "phantom.h"
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

// Larger copies leave nothing known: control flow reads few bytes, and every known byte costs memory here.
enum { LARGEST = 1 << 20, MAX_PAGES = 1 << 15, BUCKETS = 1 << 16, SMALL = 64 << 10 };

typedef struct page { uint64_t number; struct page *next; unsigned char value[PAGE], known[PAGE]; } page;
static page *pages[BUCKETS];
static unsigned in_granule[BUCKETS];  // known pages by granule, so that forgetting gigabytes is quick; granules may share a count
static unsigned num_pages;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

// Called for each read of a host that asks for unknown bytes, which may write an answer.
typedef void (*reader)(uint64_t address, size_t bytes, void *to);
static reader on_read;
static uint64_t known_reads, unknown_reads;
API uint64_t phantom_known_reads(void) { return known_reads; }
API uint64_t phantom_unknown_reads(void) { return unknown_reads; }
API void phantom_on_read(reader call) { on_read = call; }

static unsigned hashed(uint64_t number) { return (number * 0x9E3779B97F4A7C15ull) >> 48; }
static unsigned *granule(uint64_t address) { return &in_granule[hashed(address / GRANULE)]; }

static page *find(uint64_t address) {
    page *p = pages[hashed(address / PAGE)];
    while (p && p->number != address / PAGE) p = p->next;
    return p;
}

static page *find_or_make(uint64_t address) {
    page *p = find(address);
    if (p || num_pages >= MAX_PAGES) return p;
    p = calloc(1, sizeof *p);
    p->number = address / PAGE;
    page **head = &pages[hashed(p->number)];
    p->next = *head;
    *head = p;
    num_pages++;
    ++*granule(address);
    return p;
}

static void discard(page *gone) {
    page **at = &pages[hashed(gone->number)];
    while (*at != gone) at = &(*at)->next;
    *at = gone->next;
    num_pages--;
    --*granule(gone->number * PAGE);
    free(gone);
}

static size_t within_page(uint64_t address, size_t bytes) {
    size_t rest = PAGE - address % PAGE;
    return bytes < rest ? bytes : rest;
}

static void forget(uint64_t address, size_t bytes) {
    while (bytes) {
        size_t step = within_page(address, bytes);
        if (!*granule(address)) {
            step = GRANULE - address % GRANULE;
            if (step > bytes) step = bytes;
        } else {
            page *p = find(address);
            if (p && step == PAGE) discard(p);
            else if (p) memset(p->known + address % PAGE, 0, step);
        }
        address += step;
        bytes -= step;
    }
}

static void learn(uint64_t address, const unsigned char *values, size_t bytes) {
    if (bytes > LARGEST) { forget(address, bytes); return; }
    while (bytes) {
        size_t step = within_page(address, bytes);
        page *p = find_or_make(address);
        if (p) {
            memcpy(p->value + address % PAGE, values, step);
            memset(p->known + address % PAGE, 1, step);
        }
        address += step;
        values += step;
        bytes -= step;
    }
}

// Known values and zeros for the rest; whether all were known.
static bool recall(uint64_t address, unsigned char *to, size_t bytes) {
    bool all = true;
    while (bytes) {
        size_t step = within_page(address, bytes);
        page *p = find(address);
        for (size_t i = 0; i < step; i++) {
            bool known = p && p->known[address % PAGE + i];
            to[i] = known ? p->value[address % PAGE + i] : 0;
            all &= known;
        }
        address += step;
        to += step;
        bytes -= step;
    }
    return all;
}

API bool phantom_peek(const void *from, void *to, size_t bytes) {
    if (bytes > LARGEST) return false;
    pthread_mutex_lock(&lock);
    bool known = recall((uint64_t)from, to, bytes);
    pthread_mutex_unlock(&lock);
    return known;
}

API void phantom_poke(void *to, const void *from, size_t bytes) {
    pthread_mutex_lock(&lock);
    learn((uint64_t)to, from, bytes);
    pthread_mutex_unlock(&lock);
}

API void phantom_forget(const void *start, size_t bytes) {
    pthread_mutex_lock(&lock);
    forget((uint64_t)start, bytes);
    pthread_mutex_unlock(&lock);
}

// What a kernel with this pointer may write, whose extent nobody tells: the rest of the 512 bytes that the caching
// allocator gives at least, and what is known without a gap behind it.
API void phantom_forget_from(const void *start) {
    uint64_t address = (uint64_t)start, least = (address / 512 + 1) * 512;
    if (!*granule(address)) return;
    pthread_mutex_lock(&lock);
    for (bool more = true; more;) {
        page *p = find(address);
        if (!p) break;
        size_t at = address % PAGE, begin = at;
        while (at < PAGE && (p->known[at] || p->number * PAGE + at < least)) p->known[at++] = 0;
        more = at == PAGE;
        address += at - begin;
        if (!begin && more) discard(p);
    }
    pthread_mutex_unlock(&lock);
}

static void device_to_device(void *to, const void *from, size_t bytes) {
    unsigned char *values = bytes <= LARGEST ? malloc(bytes) : NULL;
    if (values && phantom_peek(from, values, bytes)) phantom_poke(to, values, bytes);
    else phantom_forget(to, bytes);
    free(values);
}

// Large unknown reads leave the host's pages alone: zeros would cost memory here and say as little.
static void device_to_host(void *to, const void *from, size_t bytes) {
    bool known = false;
    if (bytes <= LARGEST) {
        unsigned char *values = malloc(bytes);
        known = phantom_peek(from, values, bytes);
        if (known || bytes <= SMALL) memcpy(to, values, bytes);
        free(values);
    }
    __atomic_fetch_add(known ? &known_reads : &unknown_reads, 1, __ATOMIC_RELAXED);
    if (!known && on_read) on_read((uint64_t)from, bytes, to);
}

API void phantom_copy(void *to, const void *from, size_t bytes) {
    bool to_device = phantom_is_device(to), from_device = phantom_is_device(from);
    if (!bytes) return;
    if (to_device && from_device) device_to_device(to, from, bytes);
    else if (to_device) phantom_poke(to, from, bytes);
    else if (from_device) device_to_host(to, from, bytes);
    else memmove(to, from, bytes);
}

API void phantom_set(void *to, int value, size_t bytes) {
    if (!phantom_is_device(to)) { memset(to, value, bytes); return; }
    if (bytes > SMALL) { phantom_forget(to, bytes); return; }
    unsigned char values[bytes ? bytes : 1];
    memset(values, value, bytes);
    phantom_poke(to, values, bytes);
}
