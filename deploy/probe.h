/* probe.h: asks a router over HTTP whether it can answer, until it says yes.
 *
 * The router writes its port to a file once it has bound it (that is how `--port 0` becomes a
 * number) and answers GET /ready with 200 once workers of both roles are there.
 */
#ifndef BATON_PROBE_H
#define BATON_PROBE_H

#include <uv.h>

#include "common/base/err.h"

struct probe;

/* host: the router's --host. on_ready is called once per probe_start, with the port. */
MUST_CHECK enum err probe_create(uv_loop_t *loop, const char *host, const char *port_file,
                                 void (*on_ready)(void *user, int port), void *user,
                                 struct probe **ret);
void probe_start(struct probe *p); // from the beginning, also while one is under way
void probe_stop(struct probe *p);
int probe_port(const struct probe *p); // as last read from the file; 0 = not yet
/* Where a client of this machine reaches it: "127.0.0.1", "[::1]". */
const char *probe_url_host(const struct probe *p);
void probe_destroy(struct probe *p); // memory goes when the loop has run once more

#endif
