/* worker.h: what both worker processes share: the thread that talks, so that the other can compute.
 *
 * The control thread runs a libuv loop with the links: registration, beats, epochs, the admin
 * socket. The engine thread owns all policy state and steps; nothing it decides needs a lock.
 * Between them are two queues: mail (to the engine) and posts (to the links).
 *
 *      router ==line== control thread --mail--> engine thread --kv_pair threads (transfers)
 *      peers  ==hub/lines==    ^-----posts---------'
 *
 * When the router's epoch changes, the engine gets MAIL_EPOCH and must drop all work. Posts that it
 * made before it read that mail are discarded, so an old answer never carries a new epoch.
 */
#ifndef BATON_WORKER_H
#define BATON_WORKER_H

#include <jansson.h>
#include <pthread.h>
#include <stdatomic.h>

#include "common/base/config.h"
#include "common/base/wire.h"
#include "common/engine/model_config.h"

enum mail_type {
    MAIL_ROUTER,    /* msg from the router */
    MAIL_PEER,      /* msg from peer */
    MAIL_EPOCH,     /* a new router: drop everything; posts made from now on belong to it */
    MAIL_PEER_LOST, /* the link to peer is gone */
    MAIL_TRANSFER,  /* transfer seq of owner (as given to worker_mail_transfer) ended with err */
    MAIL_DRAIN,     /* take nothing new */
    MAIL_STOP,      /* leave the engine thread */
    MAIL_ADMIN,     /* an admin command: fill in and worker_admin_answer */
};

struct mail {
    struct mail *next;
    enum mail_type type;
    uint64_t peer; /* MAIL_PEER, MAIL_PEER_LOST */
    uint64_t seq;  /* MAIL_TRANSFER */
    uint64_t owner;
    enum err err;
    struct wire_msg msg; /* MAIL_ROUTER, MAIL_PEER: points into frame */
    uint64_t frame[];
};

struct worker;

struct worker_config {
    enum wire_role role; /* WIRE_PREFILL or WIRE_DECODE */
    const struct config *config;
    struct wire_hello hello; /* instance, host, pid, endpoint, zero fields are filled in here */
};

/* Connects to the router and, in a decode worker, binds the endpoint for prefill workers. */
MUST_CHECK enum err worker_create(const struct worker_config *c, struct worker **ret);
uint64_t worker_instance(const struct worker *w);
uint64_t worker_host(const struct worker *w);

/* Starts engine(arg) on a thread of its own and runs the control loop on the calling one until
 * SIGTERM, SIGINT or worker_quit; then MAIL_STOP, join, BYE. Returns the process's exit code. */
int worker_run(struct worker *w, void (*engine)(void *arg), void *arg);
void worker_destroy(struct worker *w);

/* ---- engine thread ---- */

/* The next mail, or NULL: at once if wait_us is 0, else after at most that long. Caller frees. */
struct mail *worker_mail_next(struct worker *w, uint64_t wait_us);
/* The same while a pass is computed: MAIL_EPOCH and MAIL_STOP, which end everything, stay with what
 * came after them until worker_mail_next. */
struct mail *worker_mail_meanwhile(struct worker *w, uint64_t wait_us);

/* From any thread: a transfer ended. */
void worker_mail_transfer(struct worker *w, uint64_t owner, uint64_t seq, enum err err);

/* Takes the message out of buf (which becomes empty) and sends it. A failed build or send is
 * logged; what a lost message means is the epoch's, attempt's and timeout's business. */
void worker_post_router(struct worker *w, struct wire_buf *buf);
void worker_post_peer(struct worker *w, uint64_t peer, struct wire_buf *buf);
/* Prefill: opens or closes a line to a decode worker; its instance is its peer key from then on. In
 * a decode worker peers appear with their first message, and disconnect forgets one. */
void worker_peer_connect(struct worker *w, uint64_t peer, const char *endpoint);
void worker_peer_disconnect(struct worker *w, uint64_t peer);

/* Called once per turn of the engine's loop: the router takes a worker that is busy without a
 * growing count for stuck. */
void worker_progress(struct worker *w, bool busy);
/* The same from inside a long computation: an engine_config's progress. */
void worker_computing(void *worker);
/* Copies the beat's other fields (progress and busy are kept by worker_progress). */
void worker_set_beat(struct worker *w, const struct wire_beat *beat);
/* Answers MAIL_ADMIN; takes over the reference. */
void worker_admin_answer(struct worker *w, json_t *answer);
/* Ends the process in order from the engine thread, with a reason for the router. */
void worker_quit(struct worker *w, int exit_code, const char *reason);

/* ---- helpers for both mains ---- */

struct engine;
struct kv_pool;

/* What the sampler needs of one output position, apart from the per-request penalty arrays. */
struct sample_row;
void worker_sample_row(const struct wire_sampling *s, uint32_t position, uint32_t n_output,
                       const int32_t *banned, int n_banned, struct sample_row *ret);
/* eos and stop ids that may not be drawn before min_tokens; returns their number. */
int worker_stop_ids(const struct wire_sampling *s, const struct model_config *m, int32_t *ret);
/* How a token ends (or does not end) the output that has n_output tokens with it. */
enum wire_finish worker_finish(const struct wire_sampling *s, const struct model_config *m,
                               int32_t token, uint32_t n_output);

#endif
