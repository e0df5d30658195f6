/* request.h: the bytes of a request. */
#ifndef BATON_BENCH_REQUEST_H
#define BATON_BENCH_REQUEST_H

#include "common/base/json.h"
#include "tests/bench/client.h"
#include "tests/bench/dataset.h"
#include "tests/bench/options.h"

/* What all requests of a run have in common. */
struct request_form {
    const struct options *o;
    const struct client *client;
    char *model; // name to send; NULL: none
    char *extra; // members of --extra-body with a leading comma, or ""
};

MUST_CHECK enum err request_form_init(struct request_form *f, const struct options *o,
                                      const struct client *c);
void request_form_finish(struct request_form *f);

/* Writes head and body of the request for p into out, which is emptied first. out->failed: no
 * memory. */
void request_write(const struct request_form *f, const struct prompt *p, struct json_out *out);

/* Head and body of any request. method: "GET" or "POST"; body NULL: none. */
void request_write_raw(const struct request_form *f, const char *method, const char *path,
                       const struct json_out *body, struct json_out *out);

#endif
