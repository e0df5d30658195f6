/* baton.c: the command that people type.
 *
 *   baton serve [flags]            a local cluster: router, prefill and decode workers
 *   baton preflight [flags]        would it start here with these flags?
 *   baton keygen ROLE FILE         a key pair for links between hosts
 *   baton admin SOCKET COMMAND...  one question to a running process
 *   baton bench [flags]            a load on a server, measured (tests/bench)
 *   baton trace FILE [OUT]         what the router wrote to --trace-file, for Perfetto
 *   baton version, baton help
 *
 * serve is plan.c (what to run) and supervisor.c (running it). Nothing here is on the request path.
 */
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "common/base/config.h"
#include "common/base/curve.h"
#include "common/base/log.h"
#include "common/base/own.h"
#include "deploy/place.h"
#include "deploy/plan.h"
#include "deploy/preflight.h"
#include "deploy/supervisor.h"
#include "deploy/trace.h"

#define ADMIN_TIMEOUT_S 10

static int serve(int argc, char **argv);
static int check(int argc, char **argv);
static int keygen(int argc, char **argv);
static int admin(int argc, char **argv);
static int bench(char **argv);
static int usage(FILE *f);

int main(int argc, char **argv)
{
    const char *command = argc > 1 ? argv[1] : "";
    if (!strcmp(command, "serve"))
        return serve(argc - 2, argv + 2);
    if (!strcmp(command, "preflight"))
        return check(argc - 2, argv + 2);
    if (!strcmp(command, "keygen"))
        return keygen(argc - 2, argv + 2);
    if (!strcmp(command, "admin"))
        return admin(argc - 2, argv + 2);
    if (!strcmp(command, "trace"))
        return trace_main(argc - 2, argv + 2);
    if (!strcmp(command, "bench"))
        return bench(argv + 1);
    if (!strcmp(command, "version") || !strcmp(command, "--version")) {
        printf("baton %s\n", BATON_VERSION);
        return 0;
    }
    if (!strcmp(command, "help") || !strcmp(command, "--help") || !strcmp(command, "-h")) {
        usage(stdout);
        return 0;
    }
    if (command[0])
        fprintf(stderr, "baton: unknown command '%s'; see baton help\n", command);
    else
        usage(stderr);
    return 2;
}

static int usage(FILE *f)
{
    fputs("usage: baton serve [flags]            start a cluster on this machine\n"
          "       baton preflight [flags]        check this machine for what serve would need\n"
          "       baton keygen ROLE FILE         a key pair for a router, prefill or decode "
          "process: the\n"
          "                                      secret half to FILE, the line for allow files "
          "printed\n"
          "       baton admin SOCKET COMMAND...  ask a process: accounting, drain, failpoint SPEC\n"
          "       baton bench [flags]            put a load on a server and measure it\n"
          "       baton trace FILE [OUT]         a capture of the router's --trace-file as a trace "
          "for "
          "Perfetto\n"
          "       baton version\n"
          "       baton help\n"
          "\n"
          "baton serve takes the flags of every process and passes each to those that know it:\n"
          "  baton serve --help      what concerns the whole cluster\n"
          "  baton-router --help     baton-prefill --help     baton-decode --help\n"
          "Without --model-dir it serves the small demo model that comes with it.\n",
          f);
    return 0;
}

static int serve(int argc, char **argv)
{
    log_init("baton", LOG_DEBUG); // supervisor.c filters by --log-level
    struct plan *plan;
    enum err e = plan_create(argc, argv, &plan);
    if (e) {
        fprintf(stderr, "baton: %s\n", err_text(e));
        return 2;
    }
    place(plan);
    int code = supervise(plan);
    plan_destroy(plan);
    return code;
}

static int check(int argc, char **argv)
{
    struct plan *plan;
    enum err e = plan_create(argc, argv, &plan);
    if (e) {
        fprintf(stderr, "baton: %s\n", err_text(e));
        return 2;
    }
    int n_failures = preflight(plan, stdout);
    plan_destroy(plan);
    return n_failures ? 1 : 0;
}

/* Becomes baton-bench, which is beside this program (installed) or in the build tree. */
static int bench(char **argv)
{
    static const char *const places[] = {"baton-bench", "../tests/bench/baton-bench"};
    const char *dir = getenv("BATON_BIN_DIR");
    char self[PATH_MAX] = "", path[PATH_MAX + 64];
    if (!dir || !dir[0]) {
        if (readlink("/proc/self/exe", self, sizeof(self) - 1) > 0)
            *strrchr(self, '/') = '\0';
        dir = self;
    }
    for (size_t i = 0; i < ARRAY_LEN(places); i++) {
        snprintf(path, sizeof(path), "%s/%s", dir, places[i]);
        execv(path, argv);
        if (errno != ENOENT && errno != ENOTDIR)
            break;
    }
    fprintf(stderr, "baton: %s: %s\n", path, strerror(errno));
    return 2;
}

static int keygen(int argc, char **argv)
{
    const char *role = argc == 2 ? argv[0] : "";
    if (strcmp(role, "router") && strcmp(role, "prefill") && strcmp(role, "decode")) {
        fprintf(stderr, "usage: baton keygen router|prefill|decode FILE\n");
        return 2;
    }
    struct curve_pair pair;
    enum err e = curve_keygen(argv[1], &pair);
    if (e) {
        fprintf(stderr, "baton: %s\n", err_text(e));
        return 1;
    }
    printf("%s %s\n", role, pair.public_key);
    return 0;
}

static int admin(int argc, char **argv)
{
    if (argc < 2) {
        fprintf(stderr, "usage: baton admin SOCKET COMMAND...\n");
        return 2;
    }
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    if (strlen(argv[0]) >= sizeof to.sun_path) {
        fprintf(stderr, "baton: %s: too long for the name of a socket\n", argv[0]);
        return 2;
    }
    strcpy(to.sun_path, argv[0]);
    char line[4096];
    size_t n = 0;
    for (int i = 1; i < argc; i++)
        n += (size_t)snprintf(line + MIN(n, sizeof line), sizeof line - MIN(n, sizeof line), "%s%s",
                              argv[i], i + 1 < argc ? " " : "\n");
    if (n >= sizeof line) {
        fprintf(stderr, "baton: the command is longer than %zu bytes\n", sizeof line - 1);
        return 2;
    }
    OWNED_FD fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct timeval patience = {.tv_sec = ADMIN_TIMEOUT_S};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof to) < 0 ||
        send(fd, line, n, MSG_NOSIGNAL) != (ssize_t)n) {
        fprintf(stderr, "baton: %s: %s\n", argv[0], strerror(errno));
        return 1;
    }
    char answer[65536];
    ssize_t got;
    bool whole = false, first = true, refused = false;
    while (!whole && (got = recv(fd, answer, sizeof answer, 0)) > 0) {
        if (first)
            refused = got >= 8 && !memcmp(answer, "{\"error\"", 8);
        first = false;
        fwrite(answer, 1, (size_t)got, stdout);
        whole = answer[got - 1] == '\n';
    }
    if (!whole) {
        fprintf(stderr, "baton: %s: no answer%s%s\n", argv[0], got < 0 ? ": " : "",
                got < 0 ? strerror(errno) : "");
        return 1;
    }
    return refused;
}
