/* curve.h: keys of the links between hosts.
 *
 * A link over tcp speaks CURVE: both ends prove that they have the secret half of a key pair, and
 * everything is encrypted. Each process has one pair (a file that only its user may read) and a
 * list of the public keys that it accepts, each with the role that it may play. Whoever is not on
 * the list is refused during the handshake; whoever is cannot speak for another role.
 *
 *   key file:    public KEY            allow file:   router  KEY
 *                secret KEY                          prefill KEY
 *                                                    decode  KEY  ... any number of each
 *
 * Lines that begin with # are comments. Sockets within a host (ipc) are guarded by file modes and
 * speak in clear. Over tcp without keys only loopback addresses are accepted, unless told
 * otherwise.
 */
#ifndef BATON_CURVE_H
#define BATON_CURVE_H

#include <stdbool.h>
#include <stddef.h>

#include "common/base/wire.h"

#define CURVE_KEY_CHARS 40u

struct curve_pair {
    char public_key[CURVE_KEY_CHARS + 1], secret_key[CURVE_KEY_CHARS + 1];
};

struct curve_list;

/* Makes a pair and writes it to a new file with mode 0600. ERR_IO names the path. */
MUST_CHECK enum err curve_keygen(const char *path, struct curve_pair *ret);

/* Reads this process's pair and list; once, before the first link. Both empty: no keys; insecure:
 * tcp then works all the same, wherever it leads. ERR_INVALID: one without the other, a file that
 * others can read, a line that is no key (by number). */
MUST_CHECK enum err curve_load(const char *key_file, const char *allow_file, bool insecure);

/* Could a socket of this process be guarded there? What curve_guard_* will say, before anything
 * that takes long. ERR_INVALID: the endpoint needs keys and there are none. */
MUST_CHECK enum err curve_check(const char *endpoint);

/* To be called before bind or connect. ret_key: what lines must know of this hub, "" in clear. key:
 * that of the hub that a line connects to, which must be on the list; "" for the router's.
 * ERR_INVALID: the endpoint needs keys and there are none. context: ZeroMQ's, of this process. */
MUST_CHECK enum err curve_guard_hub(void *context, void *socket, const char *endpoint,
                                    char ret_key[CURVE_KEY_CHARS + 1]);
MUST_CHECK enum err curve_guard_line(void *socket, const char *endpoint, const char *key);
/* Whether the sender of a received frame (a zmq_msg_t) may speak for role. True in clear. */
bool curve_may(void *frame, uint64_t role);

/* Texts of the two files, for tests and the fuzzer. ERR_INVALID names the line. */
MUST_CHECK enum err curve_parse_pair(const char *text, size_t n, struct curve_pair *ret);
MUST_CHECK enum err curve_parse_list(const char *text, size_t n, struct curve_list **ret);
void curve_list_destroy(struct curve_list *list);

#endif
