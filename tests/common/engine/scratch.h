/* scratch.h: throw-away directories with checkpoint files for tests. */
#ifndef BATON_TEST_SCRATCH_H
#define BATON_TEST_SCRATCH_H

#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <sys/stat.h>

#include "check.h"
#include "common/base/json.h"
#include "common/base/own.h"

struct scratch {
    char dir[64];
};

static inline struct scratch scratch_open(void)
{
    struct scratch s = {"/tmp/baton-test-XXXXXX"};
    REQUIRE(mkdtemp(s.dir));
    return s;
}

static inline const char *scratch_path(const struct scratch *s, const char *name)
{
    static char path[4][PATH_MAX];
    static int next;
    char *p = path[next++ % 4];
    snprintf(p, PATH_MAX, "%s/%s", s->dir, name);
    return p;
}

static inline void scratch_write(const struct scratch *s, const char *name, const void *bytes,
                                 size_t n)
{
    OWNED_FILE f = fopen(scratch_path(s, name), "wb");
    REQUIRE(f && fwrite(bytes, 1, n, f) == n);
}

static inline void scratch_text(const struct scratch *s, const char *name, const char *text)
{
    scratch_write(s, name, text, strlen(text));
}

static inline void scratch_json(const struct scratch *s, const char *name, const json_t *v)
{
    OWNED_MEM char *text = json_dumps(v, JSON_INDENT(2));
    REQUIRE(text);
    scratch_text(s, name, text);
}

static inline const char *demo_path(const char *name)
{
    static char path[4][PATH_MAX];
    static int next;
    char *p = path[next++ % 4];
    REQUIRE(getenv("BATON_DEMO_DIR"));
    snprintf(p, PATH_MAX, "%s/%s", getenv("BATON_DEMO_DIR"), name);
    return p;
}

/* The demo model's file under the same name, by reference or as a copy that may be changed. */
static inline void scratch_demo_link(const struct scratch *s, const char *name)
{
    REQUIRE(symlink(demo_path(name), scratch_path(s, name)) == 0);
}

static inline char *demo_read(const char *name, size_t *ret_n)
{
    char *bytes = NULL;
    CHECK_OK(file_read(demo_path(name), 1 << 30, &bytes, ret_n));
    REQUIRE(bytes);
    return bytes;
}

static inline json_t *demo_json(const char *name)
{
    json_t *v = NULL;
    CHECK_OK(json_parse_file(demo_path(name), &json_limits_file, &v));
    REQUIRE(v);
    return v;
}

static inline void scratch_remove(const struct scratch *s, const char *name)
{
    unlink(scratch_path(s, name));
}

static inline void scratch_clear(const struct scratch *s)
{
    DIR *d = opendir(s->dir);
    for (struct dirent *e; d && (e = readdir(d));)
        if (e->d_name[0] != '.')
            scratch_remove(s, e->d_name);
    if (d)
        closedir(d);
}

static inline void scratch_close(struct scratch *s)
{
    scratch_clear(s);
    rmdir(s->dir);
}

/* err, and a sentence that names the culprit. */
#define CHECK_REFUSED(call, want, mentions)                                                        \
    do {                                                                                           \
        enum err got_err_ = (call);                                                                \
        CHECK_INT(got_err_, want);                                                                 \
        if (got_err_ == (want) && !strstr(err_text(got_err_), mentions)) {                         \
            CHECK(!"the sentence names the culprit");                                              \
            fprintf(stderr, "  \"%s\" lacks \"%s\"\n", err_text(got_err_), mentions);              \
        }                                                                                          \
    } while (0)

#endif
