/* api_page.c: the page at / (page.html, compiled in by embed.py), the JSON that it shows, and
 * openapi.json, which describes the API.
 *
 * Page and description are open to everyone and say nothing of the cluster; /status wants a key
 * where the server has keys. Nothing of it comes from elsewhere, and the policy says so to the
 * browser.
 */
#include "router/api_internal.h"

#include <string.h>

#include "common/base/clock.h"
#include "router/openapi.h"
#include "router/page.h"

/* Is etag in the list of If-None-Match? */
static bool etag_matches(const char *list, const char *etag)
{
    size_t n = strlen(etag);
    while (*list) {
        list += strspn(list, ", \t");
        if (*list == '*')
            return true;
        if (!strncmp(list, "W/", 2))
            list += 2;
        size_t len = strcspn(list, ", \t");
        if (len == n && !memcmp(list, etag, n))
            return true;
        list += len;
    }
    return false;
}

static void answer_file(struct api *a, struct http_exchange *x, const struct http_request *r,
                        const char *type, const unsigned char *file, size_t n, const char *etag)
{
    bool known = etag_matches(r->if_none_match, etag);
    http_add_header(x, "ETag", etag);
    http_add_header(x, "Cache-Control", "no-cache"); /* a new router may have a new one */
    http_add_header(x, "X-Content-Type-Options", "nosniff");
    api_reply(a, x, r->request_id, clock_now_us(), known ? 304 : 200, type, (const char *)file,
              known ? 0 : n);
}

void api_get_page(struct api *a, struct http_exchange *x, const struct http_request *r)
{
    http_add_header(x, "Content-Security-Policy", page_policy);
    http_add_header(x, "Referrer-Policy", "no-referrer");
    answer_file(a, x, r, "text/html; charset=utf-8", page, sizeof(page), page_etag);
}

void api_get_openapi(struct api *a, struct http_exchange *x, const struct http_request *r)
{
    answer_file(a, x, r, NULL, openapi, sizeof(openapi), openapi_etag);
}

void api_get_status(struct api *a, struct http_exchange *x, const struct http_request *r)
{
    struct json_out o = {0};
    if (a->c.write_status)
        a->c.write_status(a->c.metrics_user, &o);
    http_add_header(x, "Cache-Control", "no-store");
    if (o.failed || !o.len) {
        struct api_failure f = {0};
        (void)api_fail_err(&f, err_set(ERR_NOMEM, "no memory for the answer"), "");
        api_reply_failure(a, x, r->request_id, clock_now_us(), NULL, &f);
    } else {
        api_reply(a, x, r->request_id, clock_now_us(), 200, NULL, o.data, o.len);
    }
    json_out_finish(&o);
}
