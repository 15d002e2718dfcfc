// libnvidia-ml: memory and processes of the devices. What a phantom does not have (clocks, power) is not supported.
#include "phantom.h"
#include <stdio.h>
#include <string.h>
enum { NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, BAD_ARGUMENT = 2, NONE = ~0u >> 1 };
static char handles[MAX_DEVICES];
static int physical(void *device) { return (char *)device - handles; }
int nvmlInit(void) { return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int error) {
    switch (error) {
    case 0: return "Success";
    case NOT_SUPPORTED: return "Not Supported (phantom device)";
    case NOT_FOUND: return "Not Found";
    case TOO_SMALL: return "Insufficient Size";
    default: return "Invalid Argument";
    }
}
int nvmlDeviceGetCount_v2(unsigned *count) { *count = phantom_kind()->count; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    if (index >= (unsigned)phantom_kind()->count) return BAD_ARGUMENT;
    *device = handles + index;
    return 0;
}
int nvmlDeviceGetHandleByPciBusId_v2(const char *text, void **device) {
    unsigned domain, bus;
    if (sscanf(text, "%x:%x", &domain, &bus) != 2 || bus < 1) return BAD_ARGUMENT;
    return nvmlDeviceGetHandleByIndex_v2(bus - 1, device);
}
int nvmlDeviceGetUUID(void *device, char *text, unsigned bytes) { snprintf(text, bytes, "GPU-phantom-%d", physical(device)); return 0; }
int nvmlDeviceGetHandleByUUID(const char *text, void **device) {
    unsigned index;
    return sscanf(text, "GPU-phantom-%u", &index) == 1 ? nvmlDeviceGetHandleByIndex_v2(index, device) : NOT_FOUND;
}
int nvmlDeviceGetIndex(void *device, unsigned *index) { *index = physical(device); return 0; }
int nvmlDeviceGetName(void *device, char *text, unsigned bytes) { snprintf(text, bytes, "%s", phantom_kind()->name); return 0; }
int nvmlDeviceGetMemoryInfo(void *device, unsigned long long memory[3]) {
    memory[0] = phantom_kind()->total_bytes;
    memory[2] = phantom_used(physical(device));
    memory[1] = memory[0] - memory[2];
    return 0;
}
int nvmlDeviceGetMemoryInfo_v2(void *device, struct { unsigned version; unsigned long long total, reserved, available, used; } *memory) {
    memory->total = phantom_kind()->total_bytes;
    memory->reserved = 0;
    memory->used = phantom_used(physical(device));
    memory->available = memory->total - memory->used;
    return 0;
}
typedef struct { unsigned pid; unsigned long long bytes; unsigned instance, compute_instance; } process;
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, process *found) {
    enum { MOST = 256 };
    int pids[MOST];
    uint64_t bytes[MOST];
    unsigned room = *count;
    *count = phantom_processes(physical(device), pids, bytes, MOST);
    if (*count > room) return TOO_SMALL;
    for (unsigned i = 0; i < *count; i++) found[i] = (process){pids[i], bytes[i], ~0u, ~0u};
    return 0;
}
typedef struct { unsigned pid; unsigned long long bytes; } process_v1;
int nvmlDeviceGetComputeRunningProcesses(void *device, unsigned *count, process_v1 *found) {
    process all[MAX_DEVICES * 4];
    unsigned room = *count, most = sizeof all / sizeof *all;
    int error = nvmlDeviceGetComputeRunningProcesses_v3(device, &most, all);
    *count = most;
    if (error || most > room) return TOO_SMALL;
    for (unsigned i = 0; i < most; i++) found[i] = (process_v1){all[i].pid, all[i].bytes};
    return 0;
}
int nvmlDeviceGetNvLinkRemoteDeviceType(void *device, unsigned link, int *type) { return NOT_SUPPORTED; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *device, unsigned link, void *info) { return NOT_SUPPORTED; }
// What the caller has cleared stays: state 0 says that there is no fabric.
int nvmlDeviceGetGpuFabricInfoV(void *device, void *info) { return 0; }
int nvmlDeviceGetMigMode(void *device, unsigned *mode, unsigned *pending) { return NOT_SUPPORTED; }
int nvmlDeviceGetClockInfo(void *device, int type, unsigned *megahertz) { return NOT_SUPPORTED; }
int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) { return NOT_SUPPORTED; }
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *celsius) { return NOT_SUPPORTED; }
int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, unsigned long long *reasons) { return NOT_SUPPORTED; }
int nvmlDeviceGetUtilizationRates(void *device, unsigned *rates) { return NOT_SUPPORTED; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = PHANTOM_CUDA * 10; return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned bytes) { snprintf(text, bytes, "phantom"); return 0; }
