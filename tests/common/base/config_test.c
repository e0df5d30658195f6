/* config_test.c: sources and their order, and the sentence for everything refused. */
#include "common/base/config.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "common/base/log.h"

#define PARSE(proc, c, ...) parse(proc, c, (char *[]){(char *)"test", __VA_ARGS__, NULL})

static enum err parse(enum config_proc proc, struct config *c, char **argv)
{
    int argc = 0;
    while (argv[argc])
        argc++;
    return config_parse(proc, argc, argv, c);
}

static void defaults_come_from_the_table(void)
{
    struct config c = {0};
    CHECK_OK(config_parse(CONFIG_ROUTER, 1, (char *[]){(char *)"x", NULL}, &c));
    CHECK_INT(c.port, 8088);
    CHECK_STR(c.host, "127.0.0.1");
    CHECK_NEAR(c.request_timeout_s, 600, 0);
    CHECK_STR(c.log_level, "info");
}

static void flags_in_every_spelling(void)
{
    struct config c = {0};
    CHECK_OK(PARSE(CONFIG_ROUTER, &c, "--max_queued", "7", "--max-body-bytes=2048",
                   "--request_timeout-s", "1.5", "--host=", "--port", "1", "--port", "2"));
    CHECK_INT(c.max_queued, 7);
    CHECK_INT(c.max_body_bytes, 2048);
    CHECK_NEAR(c.request_timeout_s, 1.5, 0);
    CHECK_STR(c.host, "");
    CHECK_INT(c.port, 2); // the last one wins
    CHECK_OK(PARSE(CONFIG_PREFILL, &c, "--device", "cuda:3", "--tp", "1", "--load-seed", "-0"));
    CHECK_STR(c.device, "cuda:3");
}

static void refused(enum config_proc proc, const char *flag, const char *value, const char *want)
{
    struct config c = {.port = 4242};
    char *argv[] = {(char *)"x", (char *)(uintptr_t)flag, (char *)(uintptr_t)value, NULL};
    CHECK_INT(parse(proc, &c, argv), ERR_INVALID);
    CHECK_STR(err_text(ERR_INVALID), want);
    CHECK_INT(c.port, 4242); // written only on success
}

static void wrong_flags_are_explained(void)
{
    refused(CONFIG_ROUTER, "--porte", "1", "--porte is not a setting; see --help");
    refused(CONFIG_ROUTER, "--por", "1", "--por is not a setting; see --help");
    refused(CONFIG_ROUTER, "--", "1", "unexpected argument '--': settings are --name value");
    refused(CONFIG_ROUTER, "port", "1", "unexpected argument 'port': settings are --name value");
    refused(CONFIG_ROUTER, "--port", NULL, "--port needs a value");
    refused(CONFIG_ROUTER, "--port", "--host", "--port needs a value");
    refused(CONFIG_ROUTER, "--port", "65536", "--port is 65536, must be in 0 .. 65535");
    refused(CONFIG_ROUTER, "--port", "-1", "--port is -1, must be in 0 .. 65535");
    refused(CONFIG_ROUTER, "--port", "1x", "--port is '1x', must be an integer");
    refused(CONFIG_ROUTER, "--port", " 1", "--port is ' 1', must be an integer");
    refused(CONFIG_ROUTER, "--port", "", "--port is '', must be an integer");
    refused(CONFIG_ROUTER, "--port", "1e3", "--port is '1e3', must be an integer");
    refused(CONFIG_ROUTER, "--max-queued", "99999999999999999999",
            "--max-queued is 99999999999999999999, must be in 1 .. 1000000 requests");
    refused(CONFIG_ROUTER, "--request-timeout-s", "0",
            "--request-timeout-s is 0, must be in 1 .. 86400 s");
    refused(CONFIG_ROUTER, "--request-timeout-s", "nan",
            "--request-timeout-s is nan, must be in 1 .. 86400 s");
    refused(CONFIG_ROUTER, "--request-timeout-s", "soon",
            "--request-timeout-s is 'soon', must be a number");
    refused(
        CONFIG_ROUTER, "--mtp-step", "1",
        "--mtp-step is a setting of baton-prefill, baton-decode, baton serve, not of baton-router");
    refused(CONFIG_DECODE, "--prefix-cache", "on",
            "--prefix-cache is a setting of baton-prefill, baton serve, not of baton-decode");
    refused(CONFIG_DECODE, "--tp", "2",
            "--tp is '2', must be 1: a worker keeps the whole model on one device; scale with more "
            "workers");
}

static void words_are_checked_centrally(void)
{
    refused(CONFIG_ROUTER, "--log-level", "loud",
            "--log-level is 'loud', must be error, warn, info or debug");
    refused(CONFIG_ROUTER, "--default-reasoning", "yes",
            "--default-reasoning is 'yes', must be on or off");
    refused(CONFIG_ROUTER, "--tool-call-parser", "",
            "--tool-call-parser is '', must be glm47 or none");
    refused(CONFIG_ROUTER, "--reasoning-parser", "glm47",
            "--reasoning-parser is 'glm47', must be glm45 or none");
    refused(CONFIG_DECODE, "--load-format", "gguf",
            "--load-format is 'gguf', must be auto or dummy");
    refused(CONFIG_DECODE, "--kv-transport", "pigeon",
            "--kv-transport is 'pigeon', must be auto, ipc, nccl, shm or tcp");
    refused(CONFIG_DECODE, "--kv-checksum", "1", "--kv-checksum is '1', must be on or off");
    refused(CONFIG_DECODE, "--mtp-mode", "eagle",
            "--mtp-mode is 'eagle', must be eagle_with_att or vanilla_with_att");
    refused(CONFIG_PREFILL, "--prefix-cache", "ON", "--prefix-cache is 'ON', must be on or off");
    static const char *const devices[] = {"gpu", "cuda", "cuda:", "cuda:x", "cuda:1000", "cpu "};
    for (size_t i = 0; i < sizeof(devices) / sizeof(devices[0]); i++) {
        char want[96];
        snprintf(want, sizeof(want), "--device is '%s', must be cpu, mock or cuda:N", devices[i]);
        refused(CONFIG_DECODE, "--device", devices[i], want);
    }
    refused(CONFIG_DECODE, "--router-endpoint", "localhost:1",
            "--router-endpoint is 'localhost:1', must start with tcp:// or ipc://");
    struct config c;
    CHECK_OK(PARSE(CONFIG_DECODE, &c, "--peer-endpoint", ""));
}

static const char *write_file(const char *text)
{
    static char path[64];
    snprintf(path, sizeof(path), "/tmp/baton-config-XXXXXX");
    int fd = mkstemp(path);
    REQUIRE(fd >= 0);
    CHECK_INT(write(fd, text, strlen(text)), strlen(text));
    close(fd);
    return path;
}

static void later_sources_win(void)
{
    struct config c;
    const char *path = write_file("{\"port\": 1, \"max_queued\": 2, \"max-attempts\": 3, "
                                  "\"request_timeout_s\": 4, \"queue_timeout_s\": 0.5, "
                                  "\"host\": \"::1\"}");
    setenv("BATON_MAX_QUEUED", "20", 1);
    setenv("BATON_MAX_ATTEMPTS", "13", 1);
    setenv("BATON_MTP_STEP", "no router's business", 1);
    CHECK_OK(PARSE(CONFIG_ROUTER, &c, "--max-attempts", "5", "--config", (char *)(uintptr_t)path));
    CHECK_INT(c.port, 1);         // file
    CHECK_INT(c.max_queued, 20);  // environment over file
    CHECK_INT(c.max_attempts, 5); // flag over environment
    CHECK_NEAR(c.request_timeout_s, 4, 0);
    CHECK_NEAR(c.queue_timeout_s, 0.5, 0);
    CHECK_STR(c.host, "::1");
    setenv("BATON_CONFIG", path, 1);
    setenv("BATON_MAX_QUEUED", "0", 1);
    refused(CONFIG_ROUTER, NULL, NULL, "BATON_MAX_QUEUED is 0, must be in 1 .. 1000000 requests");
    unsetenv("BATON_MAX_QUEUED");
    CHECK_OK(PARSE(CONFIG_ROUTER, &c, "--port", "9"));
    CHECK_INT(c.max_queued, 2);
    CHECK_INT(c.port, 9);
    unsetenv("BATON_CONFIG");
    unsetenv("BATON_MAX_ATTEMPTS");
    unsetenv("BATON_MTP_STEP");
    unlink(path);
}

static void file_refused(const char *text, const char *want)
{
    struct config c;
    const char *path = write_file(text);
    enum err e = PARSE(CONFIG_ROUTER, &c, "--config", (char *)(uintptr_t)path);
    CHECK(e != ERR_OK);
    char whole[256];
    snprintf(whole, sizeof(whole), "%s: %s", path, want);
    CHECK_STR(err_text(e), whole);
    unlink(path);
}

static void wrong_files_are_explained(void)
{
    file_refused("[]", "must be a JSON object");
    file_refused("{\"prot\": 1}", "'prot' is not a setting");
    file_refused("{\"config\": \"x\"}", "'config' is not a setting");
    file_refused("{\"port\": \"1\"}", "port must be an integer");
    file_refused("{\"port\": 1.5}", "port must be an integer");
    file_refused("{\"port\": null}", "port must be an integer");
    file_refused("{\"host\": 1}", "host must be a string");
    file_refused("{\"request_timeout_s\": \"1\"}", "request_timeout_s must be a number");
    file_refused("{\"port\": 70000}", "port is 70000, must be in 0 .. 65535");
    file_refused("{\"log_level\": \"x\"}", "log_level is 'x', must be error, warn, info or debug");
    file_refused("{\"mtp_step\": 1}",
                 "mtp_step is a setting of baton-prefill, baton-decode, baton serve, not of "
                 "baton-router");
    struct config c;
    CHECK_INT(PARSE(CONFIG_ROUTER, &c, "--config", "/nonexistent/x.json"), ERR_NOT_FOUND);
    CHECK(strstr(err_text(ERR_NOT_FOUND), "/nonexistent/x.json"));
}

static void some_numbers_may_be_auto(void)
{
    struct config c;
    CHECK_OK(PARSE(CONFIG_DECODE, &c, "--mtp-step", "auto"));
    CHECK_INT(c.mtp_step, CONFIG_AUTO);
    CHECK_INT(config_mtp_max(&c), MTP_AUTO_MAX);
    CHECK_OK(PARSE(CONFIG_DECODE, &c, "--mtp-step", "3"));
    CHECK_INT(config_mtp_max(&c), 3);
    CHECK_INT(PARSE(CONFIG_DECODE, &c, "--mtp-step", "-1"), ERR_INVALID);
    CHECK_INT(PARSE(CONFIG_DECODE, &c, "--mtp-step", "most"), ERR_INVALID);
    CHECK_STR(err_text(ERR_INVALID), "--mtp-step is 'most', must be an integer or auto");
    CHECK_INT(PARSE(CONFIG_DECODE, &c, "--threads", "auto"), ERR_INVALID);
    const char *path = write_file("{\"mtp_step\": \"auto\"}");
    CHECK_OK(PARSE(CONFIG_DECODE, &c, "--config", (char *)(uintptr_t)path));
    CHECK_INT(c.mtp_step, CONFIG_AUTO);
    unlink(path);
    path = write_file("{\"mtp_step\": \"3\"}");
    CHECK_INT(PARSE(CONFIG_DECODE, &c, "--config", (char *)(uintptr_t)path), ERR_INVALID);
    unlink(path);
}

/* What a child process prints to fd before it exits. */
static const char *printed(enum config_proc proc, const char *flag, int fd, int *status)
{
    static char text[32768];
    int pipes[2];
    REQUIRE(pipe(pipes) == 0);
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        dup2(pipes[1], fd);
        struct config c = {0};
        if (flag) {
            enum err e = PARSE(proc, &c, (char *)(uintptr_t)flag);
            _exit(e == ERR_OK ? 98 : 99);
        }
        CHECK_OK(PARSE(proc, &c, "--port", "7"));
        log_init("test", LOG_INFO);
        config_log(proc, &c);
        _exit(0);
    }
    close(pipes[1]);
    size_t len = 0;
    ssize_t n;
    while (len < sizeof(text) - 1 && (n = read(pipes[0], text + len, sizeof(text) - 1 - len)) > 0)
        len += (size_t)n;
    text[len] = 0;
    close(pipes[0]);
    REQUIRE(waitpid(pid, status, 0) == pid);
    return text;
}

static void help_lists_what_the_process_has(void)
{
    int status = -1;
    const char *text = printed(CONFIG_DECODE, "--help", STDOUT_FILENO, &status);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(strstr(text, "--running-max-req-size N"));
    CHECK(strstr(text, "[256 requests, 1 .. 4096]"));
    CHECK(strstr(text, "Only for this process:"));
    CHECK(!strstr(text, "--max-queued"));
    for (const char *line = text; *line; line += strcspn(line, "\n") + 1)
        CHECK(strcspn(line, "\n") <= 120);
    text = printed(CONFIG_ROUTER, "--version", STDOUT_FILENO, &status);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(!strncmp(text, "baton-router ", 13));
}

static void settings_are_logged_with_their_source(void)
{
    int status = -1;
    setenv("BATON_HOST", "0.0.0.0", 1);
    setenv("BATON_HOTS", "typo", 1);
    const char *text = printed(CONFIG_ROUTER, NULL, STDERR_FILENO, &status);
    CHECK(strstr(text, "port=7 (flag)"));
    CHECK(strstr(text, "host=0.0.0.0 (environment)"));
    CHECK(!strstr(text, "max_queued")); // defaults are for --log-level debug
    CHECK(!strstr(text, "mtp_step"));
    CHECK(strstr(text, "variable=BATON_HOTS is not a setting"));
    unsetenv("BATON_HOST");
    unsetenv("BATON_HOTS");
}

static void the_launcher_can_sort_flags(void)
{
    bool takes = false;
    CHECK_INT(config_flag_procs("--max-queued", &takes), CONFIG_ROUTER);
    CHECK(takes);
    CHECK_INT(config_flag_procs("max_queued", &takes), CONFIG_ROUTER);
    CHECK_INT(config_flag_procs("--prefix-cache=off", &takes), CONFIG_PREFILL | CONFIG_LAUNCHER);
    CHECK(!takes);
    CHECK_INT(config_flag_procs("--tp", &takes), 15);
    CHECK(takes);
    CHECK_INT(config_flag_procs("--nonsense", &takes), 0);
    CHECK(!takes);
    CHECK_INT(config_flag_procs("", &takes), 0);
}

static void the_launcher_can_check_values_of_others(void)
{
    CHECK_OK(config_check("max_queued", "7", "f.json: max_queued"));
    CHECK_INT(config_check("--max-queued", "x", "f.json: max_queued"), ERR_INVALID);
    CHECK_STR(err_text(ERR_INVALID), "f.json: max_queued is 'x', must be an integer");
    CHECK_OK(config_check("nonsense", "x", "nonsense")); // config_flag_procs knows about those
}

int main(void)
{
    RUN(defaults_come_from_the_table);
    RUN(flags_in_every_spelling);
    RUN(wrong_flags_are_explained);
    RUN(words_are_checked_centrally);
    RUN(later_sources_win);
    RUN(wrong_files_are_explained);
    RUN(some_numbers_may_be_auto);
    RUN(help_lists_what_the_process_has);
    RUN(settings_are_logged_with_their_source);
    RUN(the_launcher_can_sort_flags);
    RUN(the_launcher_can_check_values_of_others);
    return check_done();
}
