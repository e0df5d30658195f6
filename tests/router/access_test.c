/* access_test.c: the key file's grammar, the accounts over time, reloading under running requests.
 */
#include "router/access.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "check.h"

/* SHA-256 of "alpha-secret" and "beta-secret" */
#define ALPHA "3f8ad42d6dc52445378196cb2e49281f812253eaea7830fe46f4756f2ca0a3d4"
#define BETA  "d40ab4efae8afe82f0fda0f0fc785ff61bec7b5f329c6070c453594397e03568"
#define S     1000000u

static char path[] = "/tmp/baton-access-test-XXXXXX";

static void put(const char *text)
{
    FILE *f = fopen(path, "w");
    REQUIRE(f != NULL);
    REQUIRE(fputs(text, f) >= 0 && fclose(f) == 0);
}

static struct access *created(const char *text)
{
    static const struct access_limits none;
    struct access *a = NULL;
    put(text);
    CHECK_OK(access_create(path, &none, &a));
    REQUIRE(a != NULL);
    return a;
}

static struct access_key *find(const struct access *a, const char *secret)
{
    return access_find(a, secret, strlen(secret));
}

static void files(void)
{
    static const struct {
        const char *text, *why; /* why NULL: fine */
    } rows[] = {
        {"a:" ALPHA "\n", NULL},
        {"a:" ALPHA, NULL},
        {"\n  # keys\r\na.b_c-d@e:" ALPHA " concurrency=3\ttokens_per_minute=600 \r\n\nb:" BETA
         "\n",
         NULL},
        {"", "no key"},
        {"# nothing\n\n", "no key"},
        {"a\n", "line 1: must begin with a label"},
        {":" ALPHA "\n", "line 1: must begin with a label"},
        {"a b:" ALPHA "\n", "line 1: must begin with a label"},
        {"\na:" ALPHA "\na:" BETA "\n", "line 3: the label is there"},
        {"a:" ALPHA "\nb:" ALPHA "\n", "line 2: the key is there"},
        {"a:abc\n", "line 1: after the label"},
        {"a:" ALPHA "0\n", "line 1: after the label"},
        {"a:" ALPHA " concurrency=\n", "line 1: only"},
        {"a:" ALPHA " concurrency=-1\n", "line 1: only"},
        {"a:" ALPHA " concurrency=1x\n", "line 1: only"},
        {"a:" ALPHA " concurrency=4294967296\n", "line 1: only"},
        {"a:" ALPHA " speed=1\n", "line 1: only"},
    };
    static const struct access_limits none;
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        struct access *a = NULL;
        put(rows[i].text);
        enum err e = access_create(path, &none, &a);
        CHECK_INT(e, rows[i].why ? ERR_INVALID : ERR_OK);
        if (rows[i].why && !strstr(err_text(e), rows[i].why))
            fprintf(stderr, "row %zu: %s\n", i, err_text(e));
        CHECK(!rows[i].why || strstr(err_text(e), rows[i].why));
        CHECK(!rows[i].why || !strstr(err_text(e), ALPHA));
        access_destroy(a);
    }
    struct access *a = NULL;
    CHECK_INT(access_create("/nowhere/keys", &none, &a), ERR_NOT_FOUND);
}

static void who(void)
{
    struct access *a = created("one:" ALPHA "\ntwo:" BETA "\n");
    char large[ACCESS_MAX_SECRET + 1];
    CHECK_INT(access_n_keys(a), 2);
    CHECK_STR(access_label(find(a, "alpha-secret")), "one");
    CHECK_STR(access_label(find(a, "beta-secret")), "two");
    CHECK(!find(a, "") && !find(a, "alpha-secre") && !find(a, "alpha-secret ") && !find(a, ALPHA));
    memset(large, 'x', sizeof(large));
    CHECK(!access_find(a, large, sizeof(large)));
    access_destroy(a);
}

static void crowds(void)
{
    struct access *a = created("one:" ALPHA " concurrency=2\ntwo:" BETA "\n");
    struct access_key *k = find(a, "alpha-secret"), *free_key = find(a, "beta-secret");
    struct access_state s;
    CHECK_OK(access_take(k, S, &s));
    CHECK_OK(access_take(k, S, &s));
    CHECK_INT(s.n_running, 2);
    CHECK_INT(access_take(k, S, &s), ERR_BUSY);
    CHECK(strstr(err_text(ERR_BUSY), "2 requests at once"));
    CHECK_INT(s.retry_s, 1);
    for (int i = 0; i < 100; i++)
        CHECK_OK(access_take(free_key, S, &s));
    access_give(k);
    CHECK_OK(access_take(k, S, &s));
    access_give(k);
    access_give(k);
    for (int i = 0; i < 100; i++)
        access_give(free_key);
    access_destroy(a);
}

/* 600 tokens a minute are 10 a second. */
static void accounts(void)
{
    struct access *a = created("one:" ALPHA " tokens_per_minute=600\n");
    struct access_key *k = find(a, "alpha-secret");
    struct access_state s;
    uint64_t now = 1000 * S;
    CHECK_OK(access_take(k, now, &s));
    CHECK_INT(s.tokens_left, 600);
    CHECK_INT(s.full_s, 0);
    access_spend(k, 500, now);
    CHECK_OK(access_take(k, now, &s));
    CHECK_INT(s.tokens_left, 100);
    CHECK_INT(s.full_s, 50);
    access_spend(k, 400, now); /* a request may end below zero */
    CHECK_INT(access_take(k, now, &s), ERR_BUSY);
    CHECK(strstr(err_text(ERR_BUSY), "600 tokens per minute"));
    CHECK_INT(s.tokens_left, 0);
    CHECK_INT(s.retry_s, 30);
    CHECK_INT(access_take(k, now + 29 * S, &s), ERR_BUSY);
    CHECK_OK(access_take(k, now + 31 * S, &s));
    CHECK_INT(s.tokens_left, 10);
    CHECK_OK(access_take(k, now + 500 * S, &s)); /* never more than a minute's worth */
    CHECK_INT(s.tokens_left, 600);
    CHECK_OK(access_take(k, now, &s)); /* time that stands still or goes back gives nothing */
    CHECK_INT(s.tokens_left, 600);
    for (int i = 0; i < 5; i++)
        access_give(k);
    access_destroy(a);
}

static void defaults_apply(void)
{
    struct access_limits limits = {.concurrency = 1, .tokens_per_minute = 60};
    struct access *a = NULL;
    struct access_state s;
    put("one:" ALPHA "\ntwo:" BETA " concurrency=0 tokens_per_minute=0\n");
    CHECK_OK(access_create(path, &limits, &a));
    CHECK_OK(access_take(find(a, "alpha-secret"), S, &s));
    CHECK_INT(s.limits.concurrency, 1);
    CHECK_INT(s.limits.tokens_per_minute, 60);
    access_give(find(a, "alpha-secret"));
    CHECK_OK(access_take(find(a, "beta-secret"), S, &s));
    CHECK_INT(s.limits.concurrency, 0);
    CHECK_INT(s.limits.tokens_per_minute, 0);
    access_give(find(a, "beta-secret"));
    access_destroy(a);
}

static void reloads(void)
{
    struct access *a = created("one:" ALPHA " tokens_per_minute=600\ntwo:" BETA "\n");
    struct access_key *one = find(a, "alpha-secret"), *two = find(a, "beta-secret");
    struct access_state s;
    CHECK_OK(access_take(one, S, &s));
    CHECK_OK(access_take(two, S, &s));
    access_spend(one, 100, S);

    put("broken\n");
    CHECK_INT(access_reload(a), ERR_INVALID);
    CHECK(find(a, "alpha-secret") == one && find(a, "beta-secret") == two);

    put("new:" ALPHA " tokens_per_minute=600 concurrency=5\n"); /* two is gone */
    CHECK_OK(access_reload(a));
    CHECK_INT(access_n_keys(a), 1);
    CHECK(find(a, "alpha-secret") == one && !find(a, "beta-secret"));
    CHECK_STR(access_label(one), "new");
    CHECK_STR(access_label(two), "two"); /* its request still runs */
    CHECK_OK(access_take(one, S, &s));
    CHECK_INT(s.n_running, 2);
    CHECK_INT(s.tokens_left, 500);
    CHECK_INT(s.limits.concurrency, 5);
    access_give(two);
    access_destroy(a); /* before the requests of one have ended */
    access_give(one);
    access_give(one);
}

int main(void)
{
    int fd = mkstemp(path);
    REQUIRE(fd >= 0);
    close(fd);
    RUN(files);
    RUN(who);
    RUN(crowds);
    RUN(accounts);
    RUN(defaults_apply);
    RUN(reloads);
    unlink(path);
    return check_done();
}
