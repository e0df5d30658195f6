/* admin_test.c: a real socket in a real loop, with clients that behave and clients that do not. */
#include "common/base/admin.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "common/base/failpoint.h"
#include "common/base/own.h"

static uv_loop_t loop;
static char dir[64], path[96];
static struct admin *to_destroy;

static json_t *on_command(void *user, const char *command, const char *argument)
{
    ++*(int *)user;
    if (to_destroy)
        admin_destroy(take(&to_destroy));
    if (!strcmp(command, "echo"))
        return json_pack("{s:s}", "argument", argument);
    return NULL;
}

/* ---- a client -------------------------------------------------------------------------------- */

struct reader {
    uv_pipe_t pipe;
    uv_connect_t connect;
    bool connected, ended, closed;
    size_t len;
    char text[65536];
};

static void on_reader_alloc(uv_handle_t *h, size_t hint, uv_buf_t *buf)
{
    struct reader *r = h->data;
    *buf = uv_buf_init(r->text + r->len, (unsigned)(sizeof(r->text) - 1 - r->len));
}

static void on_reader_read(uv_stream_t *s, ssize_t n, const uv_buf_t *buf)
{
    struct reader *r = s->data;
    if (n < 0) {
        r->ended = true;
        uv_read_stop(s);
    } else {
        r->len += (size_t)n;
    }
}

static void on_reader_connect(uv_connect_t *c, int status)
{
    struct reader *r = c->data;
    r->connected = status == 0;
    r->ended = status != 0;
    if (r->connected)
        uv_read_start((uv_stream_t *)&r->pipe, on_reader_alloc, on_reader_read);
}

static void on_reader_close(uv_handle_t *h) { ((struct reader *)h->data)->closed = true; }

static void reader_open(struct reader *r)
{
    memset(r, 0, sizeof(*r));
    uv_pipe_init(&loop, &r->pipe, 0);
    r->pipe.data = r->connect.data = r;
    uv_pipe_connect(&r->connect, &r->pipe, path, on_reader_connect);
    while (!r->connected && !r->ended)
        uv_run(&loop, UV_RUN_ONCE);
    REQUIRE(r->connected);
}

static void reader_close(struct reader *r)
{
    uv_close((uv_handle_t *)&r->pipe, on_reader_close);
    while (!r->closed)
        uv_run(&loop, UV_RUN_ONCE);
}

static void write_bytes(struct reader *r, const char *bytes, size_t n)
{
    while (n) {
        uv_buf_t buf = uv_buf_init((char *)(uintptr_t)bytes, (unsigned)n);
        int done = uv_try_write((uv_stream_t *)&r->pipe, &buf, 1);
        if (done == UV_EAGAIN) {
            uv_run(&loop, UV_RUN_ONCE);
            continue;
        }
        if (done < 0)
            return; // the other side hung up
        bytes += done;
        n -= (size_t)done;
    }
}

/* Sends text and waits for n_lines of answers in all, or the end. */
static void ask(struct reader *r, const char *text, int n_lines)
{
    write_bytes(r, text, strlen(text));
    for (;;) {
        int have = 0;
        for (size_t i = 0; i < r->len; i++)
            have += r->text[i] == '\n';
        if (have >= n_lines || r->ended)
            return;
        uv_run(&loop, UV_RUN_ONCE);
    }
}

static struct admin *open_admin(int *n_commands)
{
    struct admin *a = NULL;
    CHECK_OK(admin_create(&loop, path, on_command, n_commands, &a));
    REQUIRE(a);
    return a;
}

static void finish(struct admin *a)
{
    admin_destroy(a);
    while (uv_loop_alive(&loop))
        uv_run(&loop, UV_RUN_ONCE);
    CHECK(access(path, F_OK) != 0);
}

/* ---- tests ----------------------------------------------------------------------------------- */

static struct reader one, two;

static void commands_are_answered_in_order(void)
{
    int n = 0;
    struct admin *a = open_admin(&n);
    struct stat st;
    REQUIRE(stat(path, &st) == 0);
    CHECK_INT(st.st_mode & 0777, 0600);
    reader_open(&one);
    reader_open(&two);
    ask(&one, "echo  some text \r\n\n  \nnonsense\nec", 2);
    CHECK_STR(one.text, "{\"argument\":\"some text\"}\n{\"error\":\"unknown command\"}\n");
    ask(&two, "echo\n", 1);
    CHECK_STR(two.text, "{\"argument\":\"\"}\n");
    ask(&one, "ho x\n", 3); // the line began in an earlier write
    CHECK(strstr(one.text, "{\"argument\":\"x\"}\n"));
    CHECK_INT(n, 4);
    reader_close(&one);
    ask(&two, "echo still here\n", 2);
    CHECK(strstr(two.text, "still here"));
    reader_close(&two);
    finish(a);
}

static void failpoints_are_set_here(void)
{
    int n = 0;
    struct admin *a = open_admin(&n);
    reader_open(&one);
    ask(&one, "failpoint admin.test=error\n", 1);
#ifdef BATON_FAILPOINTS
    CHECK_STR(one.text, "{\"ok\":true}\n");
    CHECK_INT(failpoint_pass("admin.test"), FAILPOINT_ERROR);
#else
    CHECK(strstr(one.text, "\"error\""));
#endif
    ask(&one, "failpoint admin.test=\n", 2);
    CHECK(strstr(one.text, "{\"error\":"));
    CHECK_INT(n, 0);
    reader_close(&one);
    finish(a);
}

static void lines_are_bounded(void)
{
    int n = 0;
    struct admin *a = open_admin(&n);
    reader_open(&one);
    static char line[10000];
    memset(line, 'x', sizeof(line) - 1);
    ask(&one, line, 1);
    CHECK(one.ended);
    CHECK_INT(one.len, 0);
    CHECK_INT(n, 0);
    reader_close(&one);
    finish(a);
}

static void live_sockets_are_refused_and_stale_ones_replaced(void)
{
    int n = 0;
    struct admin *a = open_admin(&n), *second = NULL;
    CHECK_INT(admin_create(&loop, path, on_command, &n, &second), ERR_IO);
    CHECK(strstr(err_text(ERR_IO), path));
    finish(a);

    uv_pipe_t stale; // bound, never listening: as after a kill
    uv_pipe_init(&loop, &stale, 0);
    REQUIRE(uv_pipe_bind(&stale, path) == 0);
    a = open_admin(&n);
    reader_open(&one);
    ask(&one, "echo x\n", 1);
    CHECK_STR(one.text, "{\"argument\":\"x\"}\n");
    reader_close(&one);
    uv_close((uv_handle_t *)&stale, NULL);
    finish(a);

    close(open(path, O_CREAT | O_WRONLY, 0600)); // somebody's file
    CHECK_INT(admin_create(&loop, path, on_command, &n, &a), ERR_IO);
    CHECK(access(path, F_OK) == 0);
    unlink(path);
    char long_path[200];
    memset(long_path, 'x', sizeof(long_path) - 1);
    long_path[sizeof(long_path) - 1] = 0;
    CHECK_INT(admin_create(&loop, long_path, on_command, &n, &a), ERR_IO);
    CHECK_INT(admin_create(&loop, "", on_command, &n, &a), ERR_IO);
    CHECK_INT(admin_create(&loop, "/nonexistent/dir/socket", on_command, &n, &a), ERR_IO);
    while (uv_loop_alive(&loop))
        uv_run(&loop, UV_RUN_ONCE);
}

static void too_many_clients_are_turned_away(void)
{
    int n = 0;
    struct admin *a = open_admin(&n);
    static struct reader many[17];
    for (int i = 0; i < 17; i++)
        reader_open(&many[i]);
    while (!many[16].ended)
        uv_run(&loop, UV_RUN_ONCE);
    ask(&many[0], "echo x\n", 1);
    CHECK_STR(many[0].text, "{\"argument\":\"x\"}\n");
    for (int i = 0; i < 17; i++)
        reader_close(&many[i]);
    finish(a);
}

static void a_command_may_destroy_the_server(void)
{
    int n = 0;
    to_destroy = open_admin(&n);
    reader_open(&one);
    ask(&one, "echo a\necho b\n", 1);
    CHECK(one.ended);
    CHECK_INT(n, 1);
    reader_close(&one);
    admin_destroy(NULL);
    while (uv_loop_alive(&loop))
        uv_run(&loop, UV_RUN_ONCE);
}

int main(void)
{
    snprintf(dir, sizeof(dir), "/tmp/baton-admin-XXXXXX");
    REQUIRE(mkdtemp(dir));
    snprintf(path, sizeof(path), "%s/socket", dir);
    REQUIRE(uv_loop_init(&loop) == 0);
    RUN(commands_are_answered_in_order);
    RUN(failpoints_are_set_here);
    RUN(lines_are_bounded);
    RUN(live_sockets_are_refused_and_stale_ones_replaced);
    RUN(too_many_clients_are_turned_away);
    RUN(a_command_may_destroy_the_server);
    CHECK_INT(uv_loop_close(&loop), 0);
    CHECK_INT(rmdir(dir), 0);
    return check_done();
}
