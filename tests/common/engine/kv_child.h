/* kv_child.h: this program once more, as another process: CUDA does not survive a fork, so it is
 * run anew as "PROGRAM child ARGUMENT", with a socket to its parent as descriptor 3. */
#ifndef BATON_KV_CHILD_H
#define BATON_KV_CHILD_H

#include <cuda_runtime_api.h>
#include <execinfo.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "common/base/own.h"

#define CONTROL_FD 3

struct child {
    pid_t pid;
    int control;
};

static inline void bytes_write(int fd, const void *bytes, size_t n)
{
    REQUIRE(send(fd, bytes, n, MSG_NOSIGNAL) == (ssize_t)n);
}

static inline void bytes_read(int fd, void *ret, size_t n)
{
    REQUIRE(recv(fd, ret, n, MSG_WAITALL) == (ssize_t)n);
}

static inline struct child child_start(const char *argument)
{
    int ends[2];
    REQUIRE(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends));
    fflush(NULL);
    pid_t pid = fork();
    REQUIRE(pid >= 0);
    if (pid == 0) {
        int fd = fcntl(ends[1], F_DUPFD_CLOEXEC, CONTROL_FD + 1); // dup2 to itself keeps CLOEXEC
        dup2(fd, CONTROL_FD);
        execl("/proc/self/exe", "baton-test", "child", argument, (char *)NULL);
        _exit(127);
    }
    close(ends[1]);
    return (struct child){pid, ends[0]};
}

static inline int child_wait(struct child *c)
{
    int status = -1;
    REQUIRE(waitpid(c->pid, &status, 0) == c->pid);
    close(c->control);
    return status;
}

static void crash_tell(int signal)
{
    void *frames[64];
    static const char text[] = "crashed, on the way back from:\n";
    (void)!write(2, text, sizeof(text) - 1);
    backtrace_symbols_fd(frames, backtrace(frames, ARRAY_LEN(frames)), 2);
    raise(signal); // now for real: the handler was for once
}

/* A crash within a library that has no debugger around: tells where. addr2line reads it. */
static inline void crash_report(void)
{
    void *frame[1];
    backtrace(frame, 1); // loads what it needs, outside of the handler
    static const int signals[] = {SIGSEGV, SIGBUS, SIGABRT, SIGFPE};
    struct sigaction a = {.sa_handler = crash_tell, .sa_flags = (int)SA_RESETHAND};
    for (size_t i = 0; i < ARRAY_LEN(signals); i++)
        sigaction(signals[i], &a, NULL);
}

/* Asked of another process, so that this one can still fork. */
static inline int count_gpus(void)
{
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        int n = 0;
        _exit(cudaGetDeviceCount(&n) == cudaSuccess ? n & 0x7f : 0);
    }
    int status = 0;
    REQUIRE(pid > 0 && waitpid(pid, &status, 0) == pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 0;
}

#endif
