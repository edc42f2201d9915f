/* A driver library for tests: the NVML functions that Arriero calls, answering from a text file.
 *
 * The file named by STUB_NVML is read again on every call, so that a test changes the machine by rewriting it:
 *     driver STATUS
 *     gpu UUID STATUS TOTAL RESERVED USED UTILISATION TEMPERATURE MIG NAME...
 *     process GPU_INDEX KIND PID BYTES         (KIND c or g; BYTES -1: the driver does not say)
 *     processes_status STATUS
 * STATUS is an nvmlReturn_t, 0 for success. A negative UTILISATION, TEMPERATURE or MIG is minus an error to return.
 * Built with -DOLD_DRIVER it lacks what a driver of the 470 series lacks. Layouts and codes follow the public nvml.h.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, MAX = 16 };

typedef struct {
    char uuid[96], name[96];
    int status, utilisation, temperature, mig;
    unsigned long long total, reserved, used;
} card;
typedef struct { int gpu; char kind; unsigned pid; long long bytes; } process;

static struct { int driver, processes_status, cards, processes; card card[MAX]; process process[MAX]; } now;

static void look(void) {
    char line[512];
    FILE *file = fopen(getenv("STUB_NVML"), "r");
    memset(&now, 0, sizeof now);
    while (file && fgets(line, sizeof line, file)) {
        card *c = &now.card[now.cards];
        process *p = &now.process[now.processes];
        if (sscanf(line, "gpu %95s %d %llu %llu %llu %d %d %d %95[^\n]", c->uuid, &c->status, &c->total, &c->reserved,
                   &c->used, &c->utilisation, &c->temperature, &c->mig, c->name) == 9) now.cards++;
        else if (sscanf(line, "process %d %c %u %lld", &p->gpu, &p->kind, &p->pid, &p->bytes) == 4) now.processes++;
        else if (!sscanf(line, "driver %d", &now.driver)) sscanf(line, "processes_status %d", &now.processes_status);
    }
    if (file) fclose(file);
}

/* A handle is the card's index plus one, as a pointer. */
static card *of(void *handle) { look(); return &now.card[(long)handle - 1]; }

int nvmlInitWithFlags(unsigned flags) { (void)flags; look(); return now.driver; }
int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int status) {
    return status == 9 ? "Driver Not Loaded" : status == 15 ? "GPU is lost" : "stub error";
}

int nvmlDeviceGetCount_v2(unsigned *count) { look(); *count = now.cards; return now.driver; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    look();
    if ((int)index >= now.cards) return INVALID_ARGUMENT;
    *handle = (void *)(long)(index + 1);
    return now.card[index].status;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    look();
    for (int i = 0; i < now.cards; i++)
        if (!strcmp(uuid, now.card[i].uuid)) { *handle = (void *)(long)(i + 1); return SUCCESS; }
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(void *handle, char *text, unsigned size) {
    snprintf(text, size, "%s", of(handle)->uuid);
    return SUCCESS;
}

int nvmlDeviceGetName(void *handle, char *text, unsigned size) {
    snprintf(text, size, "%s", of(handle)->name);
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long *memory) { /* total, free, used */
    card *c = of(handle);
    memory[0] = c->total;
    memory[1] = c->total - c->reserved - c->used;
    memory[2] = c->reserved + c->used;
    return c->status;
}

int nvmlDeviceGetUtilizationRates(void *handle, unsigned *rates) {
    card *c = of(handle);
    rates[0] = c->utilisation;
    rates[1] = 0;
    return c->utilisation < 0 ? -c->utilisation : SUCCESS;
}

int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *celsius) {
    card *c = of(handle);
    *celsius = c->temperature;
    return sensor ? INVALID_ARGUMENT : c->temperature < 0 ? -c->temperature : SUCCESS;
}

int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending) {
    card *c = of(handle);
    *current = *pending = c->mig;
    return c->mig < 0 ? -c->mig : SUCCESS;
}

typedef struct { unsigned pid; unsigned long long bytes; unsigned gpu_instance, compute_instance; } process_info;

static int running(void *handle, char kind, unsigned *count, process_info *list) {
    unsigned room = *count, found = 0;
    of(handle);
    if (now.processes_status) return now.processes_status;
    for (int i = 0; i < now.processes; i++) {
        process *p = &now.process[i];
        if (p->gpu != (int)((long)handle - 1) || p->kind != kind) continue;
        if (found < room) list[found] = (process_info){p->pid, (unsigned long long)p->bytes, 0, 0};
        found++;
    }
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : SUCCESS;
}

#ifdef OLD_DRIVER
#define RUNNING(kind) nvmlDeviceGet##kind##RunningProcesses_v2
#else
#define RUNNING(kind) nvmlDeviceGet##kind##RunningProcesses_v3

typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2;

int nvmlDeviceGetMemoryInfo_v2(void *handle, memory_v2 *memory) {
    card *c = of(handle);
    if (memory->version != (sizeof(memory_v2) | 2u << 24)) return 25;
    memory->total = c->total;
    memory->reserved = c->reserved;
    memory->free = c->total - c->reserved - c->used;
    memory->used = c->used;
    return c->status;
}
#endif

int RUNNING(Compute)(void *handle, unsigned *count, process_info *list) { return running(handle, 'c', count, list); }
int RUNNING(Graphics)(void *handle, unsigned *count, process_info *list) { return running(handle, 'g', count, list); }
