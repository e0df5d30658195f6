/* api.h: the HTTP surface: JSON in, gens started, JSON or SSE out.
 *
 * api.c routes paths and holds what the shapes share (errors, validation, tokenising in the libuv
 * pool, n choices per request, cancel on disconnect); one file per shape: api_chat.c,
 * api_completions.c and api_responses.c (OpenAI), api_messages.c (Anthropic), api_generate.c
 * (LightLLM's /generate), api_info.c (models, health, tokenize, metrics, version), api_page.c (the
 * page at / and what it shows). api_params.c is the table of all parameters, api_output.c feeds
 * output through text/glm_parser.c, api_internal.h holds what these files share.
 */
#ifndef BATON_API_H
#define BATON_API_H

#include <uv.h>

#include "common/base/config.h"
#include "common/base/metrics.h"
#include "router/gen.h"
#include "router/http.h"
#include "router/text/tokenizer.h"

struct api;

/* All pointers are borrowed and outlive the api. handler is filled in for http_server_create
 * (user = the api). Text for /metrics and JSON for /status are written by write_metrics and
 * write_status, called with metrics_user. */
struct api_config {
    uv_loop_t *loop;
    const struct config *config;
    const struct tokenizer *tokenizer;
    struct cluster *cluster;
    void (*write_metrics)(void *user, struct json_out *out);
    void (*write_status)(void *user, struct json_out *out);
    void *metrics_user;
};
MUST_CHECK enum err api_create(const struct api_config *c, struct http_handler *handler,
                               struct api **ret);
/* Reads the key file again; on failure the old keys stay. */
MUST_CHECK enum err api_reload_keys(struct api *a, size_t *ret_n_keys);
/* Requests between arrival and the end of their answer, tokenising included. */
size_t api_n_active(const struct api *a);
/* New requests are answered 503 from now on. */
void api_drain(struct api *a);
/* Cuts running answers with an error event, ends when the pool's work is done. */
void api_destroy(struct api *a);

#endif
