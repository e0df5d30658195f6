/* log.c: formats one line and writes it to stderr with a single write. */
#include "common/base/log.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "common/base/clock.h"

static char process_name[32] = "baton";
static atomic_int level_now = LOG_INFO;

void log_init(const char *process, enum log_level level)
{
    snprintf(process_name, sizeof(process_name), "%s", process);
    level_now = (int)level;
}

void log_event(enum log_level level, const char *area, const char *fmt, ...)
{
    if ((int)level > level_now)
        return;

    char line[1024];
    uint64_t now_us = clock_wall_us();
    time_t sec = (time_t)(now_us / 1000000u);
    struct tm tm;
    localtime_r(&sec, &tm);
    int n = snprintf(line, sizeof(line), "%02d:%02d:%02d.%03d %c %s %s ", tm.tm_hour, tm.tm_min,
                     tm.tm_sec, (int)(now_us / 1000u % 1000u), "EWID"[level], process_name, area);
    va_list ap;
    va_start(ap, fmt);
    int m = vsnprintf(line + n, sizeof(line) - (size_t)n - 1, fmt, ap);
    va_end(ap);
    size_t len = (size_t)n + (size_t)(m < 0 ? 0 : m);
    if (len > sizeof(line) - 2)
        len = sizeof(line) - 2;
    for (size_t i = (size_t)n; i < len; i++) // a value from outside cannot forge a line
        if ((unsigned char)line[i] < 0x20 || line[i] == 0x7f)
            line[i] = '?';
    line[len++] = '\n';
    ssize_t ignored = write(STDERR_FILENO, line, len);
    (void)ignored;
}
