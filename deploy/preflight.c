/* preflight.c: see preflight.h.
 *
 * Nothing here allocates on a GPU or leaves anything behind, so it can run beside a live cluster
 * (which then shows as a taken port and as used memory).
 */
#include "deploy/preflight.h"

#include <dlfcn.h>
#include <errno.h>
#include <inttypes.h>
#include <netdb.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "common/engine/model_config.h"
#include "common/engine/safetensors.h"
#include "common/engine/weights.h"
#include "deploy/cpus.h"
#include "deploy/place.h"

#define GIB                (1ull << 30)
#define GPU_SPARE_BYTES    (3 * GIB) // contexts, cuBLAS, workspaces of one process, at the least
#define SHM_SPARE_BYTES    (64ull << 20)
#define CPU_POOL_TOKENS    32768 // a worker's default, see --max-total-token-num
#define FILES_PER_PROCESS  256   // beside client connections
#define MIN_DRIVER_CUDA    12000 // the first that knows Hopper
#define DESIGN_CONNECTIONS 16384

struct report {
    FILE *out;
    const struct plan *plan;
    int n_ok, n_warnings, n_failures;
    uint64_t weights_bytes; // of the model; 0 = not known
    int n_layers;           // MTP included; 0 = not known
};

static void check_model(struct report *r);
static void check_gpus(struct report *r);
static void check_port(struct report *r);
static void check_limits(struct report *r);
static void check_memory(struct report *r);
static void check_cores(struct report *r);
static void check_run_dir(struct report *r);

static void ok(struct report *r, const char *what, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
static void warn(struct report *r, const char *what, const char *fix, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
static void fail(struct report *r, const char *what, const char *fix, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));

int preflight(const struct plan *p, FILE *out)
{
    struct report r = {.out = out, .plan = p};
    check_model(&r);
    if (place_wants_gpus(p))
        check_gpus(&r);
    check_memory(&r);
    check_cores(&r);
    check_limits(&r);
    check_port(&r);
    check_run_dir(&r);
    fprintf(out, "%d ok, %d warnings, %d failed\n", r.n_ok, r.n_warnings, r.n_failures);
    return r.n_failures;
}

/* ---- lines ---- */

static void line(struct report *r, const char *verdict, const char *what, const char *fix,
                 const char *fmt, va_list ap)
{
    fprintf(r->out, "%-4s  %-12s ", verdict, what);
    vfprintf(r->out, fmt, ap);
    if (fix)
        fprintf(r->out, "; fix: %s", fix);
    fputc('\n', r->out);
}

static void ok(struct report *r, const char *what, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    line(r, "ok", what, NULL, fmt, ap);
    va_end(ap);
    r->n_ok++;
}

static void warn(struct report *r, const char *what, const char *fix, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    line(r, "warn", what, fix, fmt, ap);
    va_end(ap);
    r->n_warnings++;
}

static void fail(struct report *r, const char *what, const char *fix, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    line(r, "FAIL", what, fix, fmt, ap);
    va_end(ap);
    r->n_failures++;
}

static double gib(uint64_t bytes) { return (double)bytes / GIB; }

/* A setting of one process: its flag, else the environment's, else "". */
static const char *setting(const struct plan_proc *p, const char *flag, const char *variable)
{
    const char *value = json_string_value(json_object_get(p->flags, flag));
    if (!value)
        value = getenv(variable);
    return value ? value : "";
}

/* ---- the model ---- */

static void check_weights(struct report *r, const char *dir)
{
    OWNED(safetensors) st = NULL;
    enum err e = safetensors_open(dir, &st);
    if (e) {
        fail(r, "weights", "download the model again, all files of it", "%s", err_text(e));
        return;
    }
    for (size_t i = 0; i < safetensors_n(st); i++)
        r->weights_bytes += safetensors_at(st, i)->n_bytes;
    ok(r, "weights", "%zu tensors, %.2f GiB, every shard is there and whole", safetensors_n(st),
       gib(r->weights_bytes));
}

static void check_dummy(struct report *r, const struct model_config *config)
{
    enum err e = weights_bytes(config, &r->weights_bytes);
    if (e)
        fail(r, "weights", "see config.json", "%s", err_text(e));
    else
        ok(r, "weights", "%.2f GiB, made up (--load-format dummy)", gib(r->weights_bytes));
}

static void check_model(struct report *r)
{
    const struct plan_proc *worker = &r->plan->procs[1];
    const char *dir = setting(worker, "model_dir", "BATON_MODEL_DIR");
    bool dummy = !strcmp(setting(worker, "load_format", "BATON_LOAD_FORMAT"), "dummy");
    struct model_config config;
    enum err e = model_config_load(dir, &config);
    if (e) {
        fail(r, "model",
             "--model-dir must name a GLM-4.7-Flash checkpoint in the Hugging Face layout", "%s",
             err_text(e));
        return;
    }
    r->n_layers = config.n_layers + config.n_mtp_layers;
    char tokenizer[4096];
    snprintf(tokenizer, sizeof tokenizer, "%s/tokenizer.json", dir);
    if (access(tokenizer, R_OK))
        fail(r, "model", "copy tokenizer.json of the model there", "%s: %s", tokenizer,
             strerror(errno));
    else
        ok(r, "model", "%s: %d layers%s", dir, config.n_layers,
           config.n_mtp_layers ? " and an MTP layer" : "");
    const char *mtp_step =
        setting(&r->plan->procs[r->plan->n_procs - 1], "mtp_step", "BATON_MTP_STEP");
    if ((!strcmp(mtp_step, "auto") || atol(mtp_step) > 0) && !config.n_mtp_layers)
        fail(r, "mtp", "leave --mtp-step out", "--mtp-step %s, but the checkpoint has no MTP layer",
             mtp_step);
    if (!strcmp(setting(worker, "device", "BATON_DEVICE"), "mock"))
        ok(r, "weights", "none (--device mock)");
    else if (dummy)
        check_dummy(r, &config);
    else
        check_weights(r, dir);
}

/* ---- GPUs ---- */

/* A module of the GPU workers: beside the programs, or in the build tree (see device.c). What it
 * needs must be found by the loader. Returns NULL if all is well, else what is wrong, for the
 * caller to free. */
static char *module_problem(const struct report *r, const char *name, char path[4096])
{
    const char *exe = r->plan->procs[1].exe, *named = getenv("BATON_MODULE_DIR");
    int n = (int)(strrchr(exe, '/') - exe);
    if (named && named[0])
        snprintf(path, 4096, "%s/%s", named, name);
    else
        snprintf(path, 4096, "%.*s/%s", n, exe, name);
    if (access(path, F_OK))
        snprintf(path, 4096, "%.*s/../common/engine/%s", n, exe, name);
    if (access(path, F_OK))
        return strdup("is not part of this build");
    return dlopen(path, RTLD_NOW | RTLD_LOCAL) ? NULL : strdup(dlerror());
}

static void check_modules(struct report *r)
{
    char path[4096];
    OWNED_MEM char *cuda = module_problem(r, "baton_cuda.so", path);
    if (cuda)
        fail(r, "cuda",
             "build where nvcc is (-Dcuda=enabled); install CUDA's runtime libraries (cuBLAS), or "
             "name their directory in LD_LIBRARY_PATH",
             "baton_cuda.so: %s", cuda);
    else
        ok(r, "cuda", "%s and the libraries it needs", path);

    const char *transport = setting(&r->plan->procs[1], "kv_transport", "BATON_KV_TRANSPORT");
    if (transport[0] && strcmp(transport, "auto") && strcmp(transport, "nccl"))
        return;
    OWNED_MEM char *nccl = module_problem(r, "baton_nccl.so", path);
    if (!nccl)
        ok(r, "nccl", "%s and the libraries it needs", path);
    else if (!strcmp(transport, "nccl"))
        fail(r, "nccl", "build where NCCL is, and install libnccl2", "baton_nccl.so: %s", nccl);
    else
        warn(r, "nccl", "build where NCCL is, and install libnccl2; or --kv-transport ipc",
             "baton_nccl.so: %s: handoffs by ipc, on this host only", nccl);
}

static void check_driver(struct report *r, const struct gpus *g)
{
    int version = g->cuda_version;
    if (version < MAX(MIN_DRIVER_CUDA, BATON_CUDA_MAJOR * 1000))
        fail(r, "driver", "install a newer NVIDIA driver",
             "%s runs CUDA up to %d.%d, this build needs %d", g->driver, version / 1000,
             version % 1000 / 10, MAX(12, BATON_CUDA_MAJOR));
    else
        ok(r, "driver", "%s, CUDA up to %d.%d", g->driver, version / 1000, version % 1000 / 10);
    static const char *const nodes[] = {"/dev/nvidiactl", "/dev/nvidia-uvm"};
    for (size_t i = 0; i < ARRAY_LEN(nodes); i++)
        if (access(nodes[i], R_OK | W_OK))
            fail(r, "driver",
                 errno == ENOENT
                     ? "load the module (nvidia-modprobe -u -c 0), or give the container its GPUs"
                     : "run as a user who may, often one of the group video",
                 "%s: %s", nodes[i], strerror(errno));
}

/* Memory: the weights once for all workers of the GPU, what each asks for its pages, and the rest.
 */
static uint64_t gpu_need(const struct report *r, int idx, int *ret_workers)
{
    uint64_t need = r->weights_bytes;
    *ret_workers = 0;
    for (size_t i = 0; i < r->plan->n_procs; i++) {
        const struct plan_proc *p = &r->plan->procs[i];
        if (place_gpu(p) != idx)
            continue;
        uint64_t tokens =
            (uint64_t)atoll(setting(p, "max_total_token_num", "BATON_MAX_TOTAL_TOKEN_NUM"));
        need += GPU_SPARE_BYTES + tokens * KV_WIDTH * 2 * (uint64_t)r->n_layers;
        ++*ret_workers;
    }
    return need;
}

/* Every worker of a GPU has a pool of a given size, they are for a smaller one, and the model is no
 * toy. */
static bool much_unused(const struct report *r, const struct gpu *u, uint64_t need)
{
    return r->weights_bytes > u->total_bytes / 4 && u->free_bytes - need > u->total_bytes / 4;
}

/* Two workers on one GPU that both take what is left: the second finds nothing. */
static bool pool_unbounded(const struct report *r, int idx)
{
    for (size_t i = 0; i < r->plan->n_procs; i++) {
        const struct plan_proc *p = &r->plan->procs[i];
        if (place_gpu(p) == idx &&
            !atoll(setting(p, "max_total_token_num", "BATON_MAX_TOTAL_TOKEN_NUM")))
            return true;
    }
    return false;
}

static void check_gpu(struct report *r, const struct gpus *g, int idx)
{
    char what[16];
    snprintf(what, sizeof what, "cuda:%d", idx);
    if ((size_t)idx >= g->n) {
        const char *visible = getenv("CUDA_VISIBLE_DEVICES");
        fail(r, what, "choose another topology, or check nvidia-smi and CUDA_VISIBLE_DEVICES",
             "there is no such GPU: %zu found%s%s", g->n, visible ? ", CUDA_VISIBLE_DEVICES=" : "",
             visible ? visible : "");
        return;
    }
    const struct gpu *u = &g->gpu[idx];
    int n_workers;
    uint64_t need = gpu_need(r, idx, &n_workers);
    if (u->cc_major != 9 || u->cc_minor != 0)
        fail(r, what, "use an H100 or H200",
             "%s has compute capability %d.%d, the kernels need 9.0", u->name, u->cc_major,
             u->cc_minor);
    else if (u->is_mig)
        fail(r, what, "nvidia-smi -mig 0", "%s is cut into MIG instances", u->name);
    else if (u->is_prohibited || (u->is_exclusive && n_workers > 1))
        fail(r, what, "nvidia-smi -c DEFAULT", "%s lets %s process use it (compute mode)", u->name,
             u->is_prohibited ? "no" : "one");
    else if (u->free_bytes < need)
        fail(r, what, "stop what uses it (nvidia-smi), or lower --max-total-token-num",
             "%.1f of %.1f GiB are free, %d worker%s of this model need%s at least %.1f",
             gib(u->free_bytes), gib(u->total_bytes), n_workers, n_workers > 1 ? "s" : "",
             n_workers > 1 ? "" : "s", gib(need));
    else if (n_workers > 1 && pool_unbounded(r, idx))
        fail(r, what, "give each --max-total-token-num, as topologies/one-gpu.json does",
             "%d workers share it and one of them takes all memory that is left", n_workers);
    else if (!pool_unbounded(r, idx) && much_unused(r, u, need))
        warn(r, what, "raise --max-total-token-num, as topologies/one-h200.json does",
             "%s, %.1f of %.1f GiB free: the KV pools leave about %.0f unused", u->name,
             gib(u->free_bytes), gib(u->total_bytes), gib(u->free_bytes - need));
    else
        ok(r, what, "%s, %.1f of %.1f GiB free, %d worker%s", u->name, gib(u->free_bytes),
           gib(u->total_bytes), n_workers, n_workers > 1 ? "s" : "");
}

/* Pages go from every prefill worker's GPU to every decode worker's. */
static void check_paths(struct report *r, const struct gpus *g)
{
    int n_paths = 0, n_slow = 0, n_none = 0;
    char slow[64] = "", none[64] = "";
    for (int a = 0; a < (int)g->n; a++) {
        for (int b = 0; b < (int)g->n; b++) {
            bool from = false, to = false;
            for (size_t i = 0; i < r->plan->n_procs; i++) {
                const struct plan_proc *p = &r->plan->procs[i];
                from |= p->role == CONFIG_PREFILL && place_gpu(p) == a;
                to |= p->role == CONFIG_DECODE && place_gpu(p) == b;
            }
            if (a == b || !from || !to)
                continue;
            n_paths++;
            n_slow += g->path[a][b] == GPU_PATH_PCIE;
            n_none += g->path[a][b] == GPU_PATH_NONE;
            if (g->path[a][b] == GPU_PATH_PCIE)
                snprintf(slow, sizeof slow, "cuda:%d and cuda:%d", a, b);
            if (g->path[a][b] == GPU_PATH_NONE)
                snprintf(none, sizeof none, "cuda:%d and cuda:%d", a, b);
        }
    }
    if (n_none)
        warn(r, "nvlink", "see nvidia-smi topo -p2p r; ACS or an IOMMU may forbid it",
             "%d of %d pairs of GPUs cannot read each other, %s: no direct handoff between them",
             n_none, n_paths, none);
    if (n_slow)
        warn(r, "nvlink", "see nvidia-smi nvlink -s, or choose GPUs that are linked",
             "%d of %d pairs of GPUs have no NVLink, %s: handoffs go over PCIe", n_slow, n_paths,
             slow);
    if (n_paths && !n_none && !n_slow)
        ok(r, "nvlink", "between all %d pairs of GPUs that hand pages over", n_paths);
}

static void check_nccl_environment(struct report *r)
{
    const char *off = getenv("NCCL_P2P_DISABLE");
    if (off && atoi(off))
        warn(r, "nccl", "unset it", "NCCL_P2P_DISABLE=%s: handoffs leave NVLink", off);
    if (getenv("NCCL_COMM_ID"))
        warn(r, "nccl", "unset it", "NCCL_COMM_ID is set; it is ignored");
}

static void check_gpus(struct report *r)
{
    struct gpus *g = malloc(sizeof *g);
    if (!g)
        return;
    check_modules(r);
    enum err e = gpus_read(getenv("CUDA_VISIBLE_DEVICES"), g);
    if (e) {
        fail(r, "driver",
             e == ERR_NOT_FOUND ? "install the NVIDIA driver, or start the container with its GPUs"
                                : "nvidia-smi says more; after an update of the driver: reboot",
             "%s", err_text(e));
        free(g);
        return;
    }
    check_driver(r, g);
    for (int idx = 0; idx < 64; idx++)
        for (size_t i = 0; i < r->plan->n_procs; i++)
            if (place_gpu(&r->plan->procs[i]) == idx) {
                check_gpu(r, g, idx);
                break;
            }
    check_paths(r, g);
    check_nccl_environment(r);
    free(g);
}

/* ---- the host ---- */

/* A line "NAME:  N kB" of /proc/meminfo; 0 if there is none. */
static uint64_t meminfo(const char *name)
{
    OWNED_FILE f = fopen("/proc/meminfo", "re");
    char text[256];
    uint64_t kib;
    while (f && fgets(text, sizeof text, f))
        if (!strncmp(text, name, strlen(name)) &&
            sscanf(text + strlen(name), ": %" SCNu64, &kib) == 1)
            return kib << 10;
    return 0;
}

static uint64_t read_number(const char *path)
{
    OWNED_FILE f = fopen(path, "re");
    uint64_t n;
    return f && fscanf(f, "%" SCNu64, &n) == 1 ? n : UINT64_MAX;
}

/* On the CPU a worker holds its weights and pages itself; prefill pools are in /dev/shm. On GPUs
 * shared memory is NCCL's. */
static void check_memory(struct report *r)
{
    uint64_t pools = 0, shm = SHM_SPARE_BYTES, weights = 0;
    for (size_t i = 0; i < r->plan->n_procs; i++) {
        const struct plan_proc *p = &r->plan->procs[i];
        if (p->role == CONFIG_ROUTER || place_gpu(p) >= 0)
            continue;
        uint64_t tokens =
            (uint64_t)atoll(setting(p, "max_total_token_num", "BATON_MAX_TOTAL_TOKEN_NUM"));
        uint64_t bytes = (tokens ? tokens : CPU_POOL_TOKENS) * KV_WIDTH * 4 * (uint64_t)r->n_layers;
        pools += bytes;
        shm += p->role == CONFIG_PREFILL ? bytes : 0;
        weights += r->weights_bytes;
    }
    uint64_t available = meminfo("MemAvailable"), limit = read_number("/sys/fs/cgroup/memory.max");
    uint64_t room = MIN(available, limit);
    if (available && room < pools + weights)
        fail(r, "memory", "fewer workers, a smaller --max-total-token-num, or a larger machine",
             "%.1f GiB are available%s, weights and KV pages of the CPU workers need %.1f",
             gib(room), limit < available ? " to this cgroup" : "", gib(pools + weights));
    else
        ok(r, "memory", "%.1f GiB available, %.1f needed at the least", gib(room),
           gib(pools + weights));

    struct statvfs fs;
    if (statvfs("/dev/shm", &fs)) {
        fail(r, "/dev/shm", "mount a tmpfs there", "%s", strerror(errno));
        return;
    }
    uint64_t free_bytes = (uint64_t)fs.f_bavail * fs.f_frsize;
    if (free_bytes < shm)
        fail(r, "/dev/shm", "mount -o remount,size=N /dev/shm; docker run --shm-size N",
             "%.2f GiB are free, %.2f are needed", gib(free_bytes), gib(shm));
    else
        ok(r, "/dev/shm", "%.2f GiB free, %.2f needed", gib(free_bytes), gib(shm));
}

static void check_cores(struct report *r)
{
    cpu_set_t allowed;
    char list[256];
    if (sched_getaffinity(0, sizeof allowed, &allowed))
        return;
    int n = CPU_COUNT(&allowed), n_workers = (int)r->plan->n_procs - 1;
    bool gpus = place_wants_gpus(r->plan);
    if (gpus && n < 2 * n_workers + 2)
        warn(r, "cores", "allow more (taskset, cgroup, --cpus-per-task)",
             "%d for %d GPU workers and the router; each needs two: CPUs %s", n, n_workers,
             cpus_format(&allowed, list, sizeof list));
    else
        ok(r, "cores", "%d: CPUs %s", n, cpus_format(&allowed, list, sizeof list));
}

static void check_limits(struct report *r)
{
    struct rlimit files, locked, core;
    const char *given = setting(&r->plan->procs[0], "max_connections", "BATON_MAX_CONNECTIONS");
    rlim_t want = (rlim_t)(given[0] ? atoll(given) : DESIGN_CONNECTIONS) + FILES_PER_PROCESS;
    getrlimit(RLIMIT_NOFILE, &files); // the router raises its own up to the hard limit
    if (files.rlim_max < FILES_PER_PROCESS)
        fail(r, "files", "ulimit -Hn 65536; LimitNOFILE=65536 in a unit",
             "%" PRIu64 " descriptors at most, a process needs %d", (uint64_t)files.rlim_max,
             FILES_PER_PROCESS);
    else if (files.rlim_max < want)
        warn(r, "files",
             "ulimit -Hn 65536; LimitNOFILE=65536 in a unit; or lower --max-connections",
             "%" PRIu64 " descriptors at most, --max-connections needs %" PRIu64,
             (uint64_t)files.rlim_max, (uint64_t)want);
    else
        ok(r, "files", "%" PRIu64 " descriptors at most", (uint64_t)files.rlim_max);

    getrlimit(RLIMIT_MEMLOCK, &locked);
    if (!place_wants_gpus(r->plan))
        return;
    if (locked.rlim_cur != RLIM_INFINITY)
        warn(r, "memlock",
             "ulimit -l unlimited; LimitMEMLOCK=infinity; docker run --ulimit memlock=-1",
             "%" PRIu64 " KiB: too little for InfiniBand buffers", (uint64_t)locked.rlim_cur >> 10);
    else
        ok(r, "memlock", "unlimited");
    getrlimit(RLIMIT_CORE, &core);
    if (core.rlim_cur > 0)
        warn(r, "core", "ulimit -c 0", "core dumps are on: they hold prompts, and gigabytes");
}

static void check_port(struct report *r)
{
    const char *host = setting(&r->plan->procs[0], "host", "BATON_HOST");
    const char *port = setting(&r->plan->procs[0], "port", "BATON_PORT");
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE}, *found;
    int rc = getaddrinfo(host, port, &hints, &found), on = 1;
    if (rc) {
        fail(r, "port", "--host must be an address of this machine", "--host %s: %s", host,
             gai_strerror(rc));
        return;
    }
    OWNED_FD fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    rc = bind(fd, found->ai_addr, found->ai_addrlen) || listen(fd, 1) ? errno : 0;
    freeaddrinfo(found);
    if (!rc)
        ok(r, "port", "%s:%s is free", host, port);
    else
        fail(r, "port",
             rc == EADDRINUSE      ? "stop what listens there (ss -ltnp), or choose another --port"
             : rc == EADDRNOTAVAIL ? "--host must be an address of this machine"
                                   : "choose another --port, from 1024 on",
             "%s:%s: %s", host, port, strerror(rc));
}

static void check_run_dir(struct report *r)
{
    if (access(r->plan->run_dir, R_OK | W_OK | X_OK))
        fail(r, "run-dir", "choose another --run-dir", "%s: %s", r->plan->run_dir, strerror(errno));
    else
        ok(r, "run-dir", "%s can be written", r->plan->run_dir);
}
