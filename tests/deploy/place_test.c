/* place_test.c: lists of CPUs, and who runs where on machines described by files. */
#include "deploy/place.h"

#include <ftw.h>
#include <stdarg.h>
#include <sys/stat.h>

#include "check.h"
#include "common/base/own.h"
#include "deploy/cpus.h"

static char sys[64];

static void put(const char *text, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void put(const char *text, const char *fmt, ...)
{
    char path[512];
    int n = snprintf(path, sizeof path, "%s/", sys);
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(path + n, sizeof path - (size_t)n, fmt, ap);
    va_end(ap);
    for (char *slash = path + n; (slash = strchr(slash, '/')); slash++) {
        *slash = '\0';
        mkdir(path, 0700);
        *slash = '/';
    }
    OWNED_FILE f = fopen(path, "w");
    REQUIRE(f);
    fputs(text, f);
}

/* Two sockets of 8 cores, two threads each: 0-7,16-23 and 8-15,24-31; a GPU pair on each. */
static void make_machine(void)
{
    char list[32];
    for (int cpu = 0; cpu < 32; cpu++) {
        snprintf(list, sizeof list, "%d,%d\n", cpu % 16, cpu % 16 + 16);
        put(list, "devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
    }
    for (int gpu = 0; gpu < 4; gpu++)
        put(gpu < 2 ? "0-7,16-23\n" : "8-15,24-31\n", "bus/pci/devices/0001:1%d:00.0/local_cpulist",
            gpu);
}

static cpu_set_t set(const char *list)
{
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    CHECK_OK(cpus_parse(list, &cpus));
    return cpus;
}

static const char *shown(const cpu_set_t *cpus)
{
    static char text[256];
    return cpus_format(cpus, text, sizeof text);
}

static void reads_and_writes_lists(void)
{
    static const char *const good[] = {"0", "0-3", "0-3,8", "1,3,5", "0-7,16-23", "1023", ""};
    for (size_t i = 0; i < ARRAY_LEN(good); i++) {
        cpu_set_t cpus = set(good[i]);
        CHECK_STR(shown(&cpus), good[i]);
    }
    cpu_set_t cpus = set("0-1,2,3\n");
    CHECK_STR(shown(&cpus), "0-3");
    static const char *const bad[] = {
        "x", "1-", "3-1", "1,", ",1", "1024", "1;2", "-1", "1 2", "1,,2", "99999999999999999999"};
    for (size_t i = 0; i < ARRAY_LEN(bad); i++)
        CHECK_INT(cpus_parse(bad[i], &cpus), ERR_INVALID);
    CHECK_STR(shown(&cpus), "0-3"); // written only on success
    char cut[6];
    cpus = set("0,2,4,6,8,10,12");
    CHECK_STR(cpus_format(&cpus, cut, sizeof cut), "0,2,4");
}

static void parts_keep_cores_whole(void)
{
    cpu_set_t all = set("0-7,16-23"), seen, part;
    CPU_ZERO(&seen);
    for (int i = 0; i < 3; i++) {
        cpu_set_t both;
        cpus_part(sys, &all, i, 3, 4, &part);
        CPU_AND(&both, &seen, &part);
        CHECK_INT(CPU_COUNT(&both), 0);
        CPU_OR(&seen, &seen, &part);
        for (int cpu = 0; cpu < 16; cpu++)
            CHECK_INT(CPU_ISSET(cpu, &part), CPU_ISSET(cpu + 16, &part));
        CHECK(CPU_COUNT(&part) >= 4);
    }
    CHECK(CPU_EQUAL(&seen, &all));
    cpus_part(sys, &all, 1, 5, 4, &part); // 3 each: too few
    CHECK(CPU_EQUAL(&part, &all));
    cpu_set_t one = set("3,19");
    cpus_part(sys, &one, 1, 2, 1, &part); // one core cannot be divided
    CHECK(CPU_EQUAL(&part, &one));
}

static struct plan_proc worker(enum config_proc role, const char *device)
{
    struct plan_proc p = {.role = role, .flags = json_object()};
    if (device)
        json_object_set_new(p.flags, "device", json_string(device));
    return p;
}

static void pins_workers_near_their_gpus(void)
{
    static const char *const devices[] = {"cuda:0", "cuda:0", "cuda:0", "cuda:2", "cuda:3", "cpu"};
    static const char *const want[] = {"",           "0-3,16-19",   "4-7,20-23",
                                       "8-11,24-27", "12-15,28-31", ""};
    struct plan_proc procs[6];
    for (int i = 0; i < 6; i++)
        procs[i] = worker(i ? CONFIG_DECODE : CONFIG_ROUTER, devices[i]);
    struct plan plan = {.procs = procs, .n_procs = 6};
    struct gpus gpus = {.n = 4};
    for (int i = 0; i < 4; i++)
        snprintf(gpus.gpu[i].bus_id, sizeof gpus.gpu[i].bus_id, "0001:1%d:00.0", i);
    CHECK(place_wants_gpus(&plan));
    CHECK_INT(place_gpu(&procs[0]), -1);
    CHECK_INT(place_gpu(&procs[4]), 3);
    cpu_set_t all = set("0-31");
    place_pin(&plan, &gpus, sys, &all);
    for (int i = 0; i < 6; i++)
        CHECK_STR(shown(&procs[i].cpus), want[i]);
    CHECK_STR(plan.place_note, "");

    // Where we may use only one socket, the other's workers are left alone.
    for (int i = 0; i < 6; i++)
        CPU_ZERO(&procs[i].cpus);
    cpu_set_t some = set("0-5");
    place_pin(&plan, &gpus, sys, &some);
    CHECK_STR(shown(&procs[1].cpus), "0-5");
    CHECK_STR(shown(&procs[3].cpus), "");

    snprintf(gpus.gpu[2].bus_id, sizeof gpus.gpu[2].bus_id, "0001:99:00.0");
    place_pin(&plan, &gpus, sys, &all);
    CHECK(strstr(plan.place_note, "0001:99:00.0"));
    for (int i = 0; i < 6; i++)
        json_decref(procs[i].flags);
}

static void asks_the_environment_for_the_device(void)
{
    struct plan_proc p = worker(CONFIG_PREFILL, NULL);
    CHECK_INT(place_gpu(&p), -1);
    setenv("BATON_DEVICE", "cuda:7", 1);
    CHECK_INT(place_gpu(&p), 7);
    unsetenv("BATON_DEVICE");
    json_decref(p.flags);
}

static void environment_of_the_caller_wins(void)
{
    setenv("NCCL_NVLS_ENABLE", "1", 1);
    unsetenv("NCCL_RAS_ENABLE");
    setenv("NCCL_COMM_ID", "10.0.0.1:1", 1);
    place_environment();
    CHECK_STR(getenv("NCCL_NVLS_ENABLE"), "1");
    CHECK_STR(getenv("NCCL_RAS_ENABLE"), "0");
    CHECK_STR(getenv("CUDA_DEVICE_ORDER"), "PCI_BUS_ID");
    CHECK(!getenv("NCCL_COMM_ID"));
}

static int drop(const char *path, const struct stat *st, int flag, struct FTW *ftw)
{
    return remove(path);
}

int main(void)
{
    strcpy(sys, "/tmp/place-test-XXXXXX");
    REQUIRE(mkdtemp(sys));
    make_machine();
    RUN(reads_and_writes_lists);
    RUN(parts_keep_cores_whole);
    RUN(pins_workers_near_their_gpus);
    RUN(asks_the_environment_for_the_device);
    RUN(environment_of_the_caller_wins);
    nftw(sys, drop, 16, FTW_DEPTH | FTW_PHYS);
    return check_done();
}
