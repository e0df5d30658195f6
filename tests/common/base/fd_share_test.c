/* fd_share_test.c: who claims, who waits, who inherits; with real processes. */
#include "common/base/fd_share.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "check.h"

static char name[64];

static void name_new(void)
{
    static int n;
    snprintf(name, sizeof(name), "baton-test-share-%d-%d", (int)getpid(), n++);
}

static int thing_new(const char *text)
{
    int fd = memfd_create("thing", MFD_CLOEXEC);
    REQUIRE(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text));
    return fd;
}

static void check_thing(int fd, const char *text)
{
    char got[64] = "";
    CHECK(pread(fd, got, sizeof(got) - 1, 0) > 0);
    CHECK_STR(got, text);
}

static void one_claims_the_others_get_it(void)
{
    name_new();
    OWNED(fd_share) mine = NULL;
    OWNED(fd_share) twice = NULL;
    OWNED_FD thing = thing_new("weights");
    OWNED_FD got = -1;
    int fd = 0;
    uint64_t bytes = 1;
    CHECK_OK(fd_share_open(name, 0, &mine, &fd, &bytes));
    CHECK_INT(fd, -1);
    CHECK_INT(fd_share_claim(name, &twice), ERR_BUSY);
    CHECK_INT(fd_share_fetch(name, 20, &got, &bytes), ERR_TIMEOUT); // claimed, not there yet
    CHECK_OK(fd_share_serve(mine, thing, 7));
    CHECK_OK(fd_share_fetch(name, 5000, &got, &bytes));
    CHECK_INT(bytes, 7);
    check_thing(got, "weights");
}

static void nobody_has_it(void)
{
    name_new();
    int fd = -1;
    uint64_t bytes;
    CHECK_INT(fd_share_fetch(name, 0, &fd, &bytes), ERR_PEER_LOST);
    CHECK_INT(fd_share_fetch("", 0, &fd, &bytes), ERR_INVALID);
}

/* A process that opens the share, says whether it claimed, serves what it claimed, and stays. */
static pid_t process(int said, bool serves)
{
    pid_t pid = fork();
    REQUIRE(pid >= 0);
    if (pid)
        return pid;
    struct fd_share *s;
    int fd = -1;
    uint64_t bytes;
    if (fd_share_open(name, 10000, &s, &fd, &bytes) != ERR_OK)
        _exit(1);
    char word = fd < 0 ? 'c' : 'g';
    if (fd < 0 && serves && fd_share_serve(s, thing_new("mine"), 4) != ERR_OK)
        _exit(1);
    if (write(said, &word, 1) != 1)
        _exit(1);
    for (;;)
        pause();
}

static char next_word(int from)
{
    char word = 0;
    CHECK(read(from, &word, 1) == 1);
    return word;
}

static void end(pid_t pid)
{
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
}

static void an_heir_goes_on_serving(void)
{
    name_new();
    int said[2];
    REQUIRE(!pipe(said));
    pid_t owner = process(said[1], true);
    CHECK_INT(next_word(said[0]), 'c');
    pid_t heir = process(said[1], true), other = process(said[1], true);
    CHECK_INT(next_word(said[0]), 'g');
    CHECK_INT(next_word(said[0]), 'g');
    end(owner);
    enum err err = ERR_PEER_LOST;
    OWNED_FD got = -1;
    uint64_t bytes = 0;
    for (int i = 0; err != ERR_OK && i < 100000; i++) // until one of the heirs has taken over
        err = fd_share_fetch(name, 5000, &got, &bytes);
    CHECK_OK(err);
    CHECK_INT(bytes, 4);
    check_thing(got, "mine");
    end(heir);
    err = ERR_PEER_LOST;
    OWNED_FD again = -1;
    for (int i = 0; err != ERR_OK && i < 100000; i++)
        err = fd_share_fetch(name, 5000, &again, &bytes);
    CHECK_OK(err);
    end(other);
    close(said[0]);
    close(said[1]);
}

static void an_owner_that_dies_before_it_serves_is_replaced(void)
{
    name_new();
    int said[2];
    REQUIRE(!pipe(said));
    pid_t owner = process(said[1], false);
    CHECK_INT(next_word(said[0]), 'c');
    pid_t next = process(said[1], true);
    end(owner);
    CHECK_INT(next_word(said[0]), 'c');
    OWNED_FD got = -1;
    uint64_t bytes = 0;
    CHECK_OK(fd_share_fetch(name, 5000, &got, &bytes));
    check_thing(got, "mine");
    end(next);
    close(said[0]);
    close(said[1]);
}

int main(void)
{
    RUN(one_claims_the_others_get_it);
    RUN(nobody_has_it);
    RUN(an_heir_goes_on_serving);
    RUN(an_owner_that_dies_before_it_serves_is_replaced);
    return check_done();
}
