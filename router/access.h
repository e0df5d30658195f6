/* access.h: who may use the server, and how much of it.
 *
 * Keys are known by their SHA-256 only. A line of the key file:
 *
 *   LABEL:SHA256HEX [concurrency=N] [tokens_per_minute=N]
 *
 * Lines that are empty or begin with '#' are skipped. The label names the key in logs. Limits that
 * a line does not give are the defaults; 0 is no limit.
 *
 * Tokens are paid afterwards, prompt and output alike: a key may begin a request while its account
 * is above zero, and what the request really took is then subtracted. The account fills up evenly
 * to one minute's worth. Everything here is a function of its arguments and the time that it is
 * given.
 */
#ifndef BATON_ACCESS_H
#define BATON_ACCESS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/base/err.h"

#define ACCESS_MAX_SECRET 512 /* bytes of a key */

struct access;
struct access_key;

struct access_limits {
    uint32_t concurrency;       /* requests at once; 0: any number */
    uint64_t tokens_per_minute; /* 0: any number */
};

/* ERR_INVALID names the line, never its content; no keys at all is refused as well. */
MUST_CHECK enum err access_create(const char *path, const struct access_limits *defaults,
                                  struct access **ret);
/* Keys that hold requests (see access_take) stay until those end. */
void access_destroy(struct access *a);
/* Reads the file again. Keys that are still there keep their accounts. On failure all stays. */
MUST_CHECK enum err access_reload(struct access *a);
size_t access_n_keys(const struct access *a);

/* The key whose secret this is, or NULL. Takes equally long for every key and for none. */
struct access_key *access_find(const struct access *a, const char *secret, size_t n);
const char *access_label(const struct access_key *k);

/* How a key stands. */
struct access_state {
    struct access_limits limits;
    uint32_t n_running;
    uint64_t tokens_left;
    uint32_t full_s;  /* until the account is full again */
    uint32_t retry_s; /* after a refusal: when to come back, 1 or more */
};
/* Begins a request. ERR_BUSY: a limit is reached, the sentence says which; nothing was taken. ret
 * is written in either case. */
MUST_CHECK enum err access_take(struct access_key *k, uint64_t now_us, struct access_state *ret);
void access_spend(struct access_key *k, uint64_t n_tokens, uint64_t now_us);
/* Ends a request; the key may be gone afterwards. */
void access_give(struct access_key *k);

#endif
