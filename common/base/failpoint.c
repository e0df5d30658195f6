/* failpoint.c: the settings, and what happens when one is passed.
 *
 * Each setting counts its own passes from the moment it was set; one that fires is [at, at +
 * times). Without any setting a pass is one relaxed load, so that points can stand on hot paths.
 */
#include "common/base/failpoint.h"

#ifdef BATON_FAILPOINTS

#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "common/base/own.h"

#define MAX_SETTINGS 64

enum action {
    ACTION_KILL,
    ACTION_STOP,
    ACTION_EXIT,
    ACTION_SLEEP,
    ACTION_ERROR,
    ACTION_DROP,
    ACTION_OFF
};

static const char *const action_words[] = {"kill", "stop", "exit", "sleep", "error", "drop", "off"};

struct setting {
    char name[48];
    uint64_t at, times; // fires on passes at .. at + times - 1
    uint64_t n_passes;
    enum action action;
    uint64_t sleep_ms;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct setting settings[MAX_SETTINGS];
static size_t n_settings;
static atomic_bool any;
static pthread_once_t environment_once = PTHREAD_ONCE_INIT;

static enum err add_list(const char *spec);

static void read_environment(void)
{
    const char *spec = getenv("BATON_FAILPOINTS");
    if (spec && add_list(spec) != ERR_OK) {
        // A test that runs without its fault would pass for the wrong reason.
        fprintf(stderr, "BATON_FAILPOINTS: %s\n", err_text(ERR_INVALID));
        _exit(2);
    }
}

static enum err parse_number(const char *text, const char **end, uint64_t *ret)
{
    char *e;
    if (*text < '0' || *text > '9')
        return ERR_INVALID;
    *ret = strtoull(text, &e, 10);
    *end = e;
    return ERR_OK;
}

/* NAME[@K][*N]=ACTION */
static enum err parse_one(const char *text, struct setting *ret)
{
    struct setting s = {.times = UINT64_MAX};
    size_t n = strcspn(text, "@*=");
    if (!n || n >= sizeof(s.name))
        return ERR_INVALID;
    memcpy(s.name, text, n);
    text += n;
    if (*text == '@') {
        TRY(parse_number(text + 1, &text, &s.at));
        s.times = 1;
    }
    if (*text == '*')
        TRY(parse_number(text + 1, &text, &s.times));
    if (*text++ != '=')
        return ERR_INVALID;
    size_t a = 0;
    for (; a < ARRAY_LEN(action_words); a++) {
        size_t len = strlen(action_words[a]);
        if (strncmp(text, action_words[a], len))
            continue;
        if (a == ACTION_SLEEP) {
            if (text[len] != ':')
                continue;
            TRY(parse_number(text + len + 1, &text, &s.sleep_ms));
            if (*text)
                return ERR_INVALID;
            break;
        }
        if (!text[len])
            break;
    }
    if (a == ARRAY_LEN(action_words))
        return ERR_INVALID;
    s.action = (enum action)a;
    *ret = s;
    return ERR_OK;
}

static void remove_name(const char *name)
{
    size_t n = 0;
    for (size_t i = 0; i < n_settings; i++)
        if (strcmp(settings[i].name, name))
            settings[n++] = settings[i];
    n_settings = n;
}

/* All or nothing. */
static enum err add_list(const char *spec)
{
    struct setting parsed[MAX_SETTINGS];
    size_t n = 0;
    for (const char *p = spec; *p; p += strspn(p, ", ")) {
        char one[128];
        size_t len = strcspn(p, ", ");
        if (len >= sizeof(one) || n == MAX_SETTINGS)
            return err_set(ERR_INVALID, "failpoints: too many or too long at '%.40s'", p);
        memcpy(one, p, len);
        one[len] = 0;
        p += len;
        if (len && parse_one(one, &parsed[n++]) != ERR_OK)
            return err_set(ERR_INVALID,
                           "failpoint '%s' is not NAME[@K][*N]=kill, stop, exit, sleep:MS, error, "
                           "drop or off",
                           one);
        n -= !len; // a leading comma
    }

    enum err e = ERR_OK;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < n; i++) {
        if (parsed[i].action == ACTION_OFF)
            remove_name(parsed[i].name);
        else if (n_settings < MAX_SETTINGS)
            settings[n_settings++] = parsed[i];
        else
            e = err_set(ERR_INVALID, "failpoints: more than %d are set", MAX_SETTINGS);
    }
    atomic_store(&any, n_settings > 0);
    pthread_mutex_unlock(&lock);
    return e;
}

enum err failpoint_set(const char *spec)
{
    pthread_once(&environment_once, read_environment);
    return add_list(spec);
}

enum failpoint_result failpoint_pass(const char *name)
{
    pthread_once(&environment_once, read_environment);
    if (!atomic_load_explicit(&any, memory_order_relaxed))
        return FAILPOINT_NONE;

    struct setting fired = {0};
    bool fires = false;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < n_settings; i++) {
        struct setting *s = &settings[i];
        if (strcmp(s->name, name))
            continue;
        uint64_t pass = s->n_passes++;
        if (!fires && pass >= s->at && pass - s->at < s->times) {
            fired = *s;
            fires = true;
        }
    }
    pthread_mutex_unlock(&lock);
    if (!fires)
        return FAILPOINT_NONE;

    switch (fired.action) {
    case ACTION_KILL:
        kill(getpid(), SIGKILL);
        for (;;)
            pause();
    case ACTION_STOP:
        kill(getpid(), SIGSTOP);
        return FAILPOINT_NONE;
    case ACTION_EXIT:
        _exit(1);
    case ACTION_SLEEP: {
        struct timespec t = {.tv_sec = (time_t)(fired.sleep_ms / 1000),
                             .tv_nsec = (long)(fired.sleep_ms % 1000) * 1000000};
        while (nanosleep(&t, &t))
            ;
        return FAILPOINT_NONE;
    }
    case ACTION_ERROR:
        return FAILPOINT_ERROR;
    case ACTION_DROP:
        return FAILPOINT_DROP;
    case ACTION_OFF:
        break;
    }
    return FAILPOINT_NONE;
}

#else
typedef int failpoints_are_not_compiled_in; // a translation unit must not be empty
#endif
