/* fd_share.h: a file descriptor of one process, mapped by others of the same user on this host.
 *
 * A share has a name (an abstract unix socket). Who claims the name first makes the thing and
 * serves it; everybody else waits for it. When the one who serves dies, one of those who have the
 * thing goes on serving it, so a thing stays to be had as long as anybody has it.
 *
 *   claimed by us:      open -> fd -1 -> make it -> fd_share_serve
 *   claimed by another: open waits -> fd       (its death before it served: we claim)
 */
#ifndef BATON_FD_SHARE_H
#define BATON_FD_SHARE_H

#include <stdint.h>

#include "common/base/err.h"
#include "common/base/own.h"

struct fd_share;

/* Claims name (1..100 characters), or waits up to timeout_ms for the one who did. *ret_fd is -1
 * after a claim, else the descriptor (the caller's to close) with the number that it was served
 * with. ERR_TIMEOUT, ERR_PEER_LOST names whom we waited for. */
MUST_CHECK enum err fd_share_open(const char *name, int timeout_ms, struct fd_share **ret,
                                  int *ret_fd, uint64_t *ret_bytes);
/* Claims name or fails with ERR_BUSY. */
MUST_CHECK enum err fd_share_claim(const char *name, struct fd_share **ret);
/* From now on everybody who asks gets fd (copied) and bytes. Once. */
MUST_CHECK enum err fd_share_serve(struct fd_share *s, int fd, uint64_t bytes);
/* Asks for it without taking any part in serving it. */
MUST_CHECK enum err fd_share_fetch(const char *name, int timeout_ms, int *ret_fd,
                                   uint64_t *ret_bytes);
void fd_share_destroy(struct fd_share *s);
DEFINE_OWNED(fd_share)

#endif
