/* failpoint_test.c: what fires when, from several threads, and in a process that must die. */
#include "common/base/failpoint.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "common/base/clock.h"

#ifdef BATON_FAILPOINTS

static void environment_is_read(void)
{
    CHECK_INT(failpoint_pass("from.env"), FAILPOINT_NONE);
    CHECK_INT(failpoint_pass("from.env"), FAILPOINT_ERROR);
    CHECK_INT(failpoint_pass("from.env"), FAILPOINT_NONE);
    CHECK_INT(failpoint_pass("never.set"), FAILPOINT_NONE);
}

static void every_pass_fires_until_off(void)
{
    CHECK_OK(failpoint_set("a=drop"));
    for (int i = 0; i < 3; i++)
        CHECK_INT(failpoint_pass("a"), FAILPOINT_DROP);
    CHECK_INT(failpoint_pass("ab"), FAILPOINT_NONE);
    CHECK_OK(failpoint_set("a=off"));
    CHECK_INT(failpoint_pass("a"), FAILPOINT_NONE);
}

static void the_kth_pass_and_at_most_n_times(void)
{
    CHECK_OK(failpoint_set("b@2=error, c*2=drop,d@1*2=error"));
    int b = 0, c = 0, d = 0;
    for (int i = 0; i < 5; i++) {
        b = b * 10 + (int)failpoint_pass("b");
        c = c * 10 + (int)failpoint_pass("c");
        d = d * 10 + (int)failpoint_pass("d");
    }
    CHECK_INT(b, 100);
    CHECK_INT(c, 22000);
    CHECK_INT(d, 1100);
    CHECK_OK(failpoint_set("e@0=error,e@2=drop")); // several settings of one name
    CHECK_INT(failpoint_pass("e"), FAILPOINT_ERROR);
    CHECK_INT(failpoint_pass("e"), FAILPOINT_NONE);
    CHECK_INT(failpoint_pass("e"), FAILPOINT_DROP);
}

static void bad_settings_are_named_and_change_nothing(void)
{
    static const char *const bad[] = {
        "x",        "x=",      "=kill",    "x=kil",      "x=killer",    "x@=error",   "x@-1=error",
        "x*=error", "x=sleep", "x=sleep:", "x=sleep:5s", "x@1@2=error", "x=error=no", "x*1@2=drop"};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        char list[64];
        snprintf(list, sizeof(list), "good=error,%s", bad[i]);
        CHECK_INT(failpoint_set(list), ERR_INVALID);
        CHECK(strstr(err_text(ERR_INVALID), bad[i]));
    }
    CHECK_INT(failpoint_pass("good"), FAILPOINT_NONE);
    CHECK_OK(failpoint_set(""));
}

static void sleeping_takes_its_time(void)
{
    CHECK_OK(failpoint_set("nap*1=sleep:30"));
    uint64_t began = clock_now_us();
    CHECK_INT(failpoint_pass("nap"), FAILPOINT_NONE);
    CHECK(clock_now_us() - began >= 30000);
}

static int status_of(const char *spec)
{
    pid_t pid = fork();
    if (pid == 0) {
        if (failpoint_set(spec) != ERR_OK)
            _exit(99);
        failpoint_pass("end");
        _exit(0);
    }
    int status = 0;
    REQUIRE(waitpid(pid, &status, WUNTRACED) == pid);
    if (WIFSTOPPED(status)) {
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
    }
    return status;
}

static void processes_die_as_told(void)
{
    int s = status_of("end=kill");
    CHECK(WIFSIGNALED(s) && WTERMSIG(s) == SIGKILL);
    s = status_of("end=exit");
    CHECK(WIFEXITED(s) && WEXITSTATUS(s) == 1);
    s = status_of("end=stop");
    CHECK(WIFSTOPPED(s));
    s = status_of("end@1=kill");
    CHECK(WIFEXITED(s) && WEXITSTATUS(s) == 0);
}

static atomic_int n_fired;

static void *pass_often(void *arg)
{
    for (int i = 0; i < 5000; i++)
        if (failpoint_pass("shared") == FAILPOINT_ERROR)
            n_fired++;
    return NULL;
}

static void threads_share_one_count(void)
{
    CHECK_OK(failpoint_set("shared@100*1000=error"));
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        REQUIRE(!pthread_create(&threads[i], NULL, pass_often, NULL));
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    CHECK_INT(n_fired, 1000);
}

int main(void)
{
    setenv("BATON_FAILPOINTS", "from.env@1=error", 1);
    RUN(environment_is_read);
    RUN(every_pass_fires_until_off);
    RUN(the_kth_pass_and_at_most_n_times);
    RUN(bad_settings_are_named_and_change_nothing);
    RUN(sleeping_takes_its_time);
    RUN(processes_die_as_told);
    RUN(threads_share_one_count);
    return check_done();
}

#else

static void they_are_absent(void)
{
    CHECK_INT(failpoint_set("a=error"), ERR_INVALID);
    CHECK_INT(failpoint_pass("a"), FAILPOINT_NONE);
}

int main(void)
{
    RUN(they_are_absent);
    return check_done();
}

#endif
