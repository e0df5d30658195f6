/* log.h: events with keys, one line each, so that the logs of all processes merge by time.
 *
 *   12:03:44.018 W decode/1 kv req=7f3a need=12 free=4 no pages, request queued
 *
 * Error: a person must look. Warn: degraded, going on. Info: lifecycle. Debug: per request.
 * Nothing per token, and never prompt text, keys or header values. Safe from any thread.
 */
#ifndef BATON_LOG_H
#define BATON_LOG_H

enum log_level { LOG_ERROR, LOG_WARN, LOG_INFO, LOG_DEBUG };

/* process: shown in every line, e.g. "decode/1"; kept by copy. */
void log_init(const char *process, enum log_level level);

/* area: a short word such as "kv" or "http". fmt: "key=value ... plain words". */
void log_event(enum log_level level, const char *area, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

#define log_error(area, ...) log_event(LOG_ERROR, area, __VA_ARGS__)
#define log_warn(area, ...)  log_event(LOG_WARN, area, __VA_ARGS__)
#define log_info(area, ...)  log_event(LOG_INFO, area, __VA_ARGS__)
#define log_debug(area, ...) log_event(LOG_DEBUG, area, __VA_ARGS__)

#endif
