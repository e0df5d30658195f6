/* http_parse.c: decides what one request says, or that nobody may say it.
 *
 * Two readers look at every byte. The first is the guard below: it admits bytes one by one (line
 * ends, names, sizes, limits) and finds where the message ends. The second is llhttp, which sees
 * only what was admitted, unpacks the body, and must agree with the guard on method, framing and
 * the last byte. A request that the two read differently is what smuggling is made of, so any
 * disagreement is a 400. This also makes the version of llhttp unimportant: an old one that takes
 * folded lines, empty names or framing fields in trailers is never shown any, a newer one may only
 * be stricter.
 *
 * The guard judges prefixes: its verdict falls at the first byte that decides it. On refusal,
 * llhttp is first shown all bytes before that one. So the verdict is the same however the bytes
 * were cut.
 *
 *   START -line-> LINE_START <-> NAME -> VALUE      CHUNK_SIZE -> [CHUNK_EXT] -> CHUNK_DATA
 *                     | empty line                      ^ |0             |
 *                     v                                 | v              |
 *                 (semantics) -> DECLARED | CHUNK_SIZE  +-)--------------+
 *                                   |                     TRAILER_START <-> trailer lines
 *                                   v                     v
 *                                 SPENT <-----------------+
 */
#include "router/http_parse.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "common/base/own.h"

enum parse_state {
    START,
    START_LF, /* in the one empty line allowed before a request */
    REQUEST_LINE,
    REQUEST_LF,
    LINE_START,
    NAME,
    VALUE,
    LINE_LF,
    HEAD_LF,
    NO_BODY, /* headers were reported, nothing more to read */
    DECLARED,
    CHUNK_SIZE,
    CHUNK_EXT,
    CHUNK_SIZE_LF,
    CHUNK_DATA,
    CHUNK_DATA_CR,
    CHUNK_DATA_LF,
    TRAILER_START,
    TRAILER_NAME,
    TRAILER_VALUE,
    TRAILER_LF,
    BODY_END_LF,
    SPENT,
};

struct span {
    char *at;
    size_t n;
};

static enum http_parse_event head_feed(struct http_parse *p, const char *data, size_t n,
                                       size_t *ret_used);
static enum http_parse_event head_complete(struct http_parse *p);
static enum http_parse_event declared_feed(struct http_parse *p, const char *data, size_t n,
                                           size_t *ret_used);
static enum http_parse_event chunked_feed(struct http_parse *p, const char *data, size_t n,
                                          size_t *ret_used);
static bool llhttp_show(struct http_parse *p, const char *data, size_t n);

static enum http_parse_event refuse(struct http_parse *p, int status, const char *why)
{
    p->status = status;
    p->why = why;
    p->state = SPENT;
    return HTTP_PARSE_BAD;
}

enum http_parse_event http_parse_feed(struct http_parse *p, const char *data, size_t n,
                                      size_t *ret_used)
{
    assert(p->state != SPENT);
    *ret_used = 0;
    if (p->state == NO_BODY) {
        p->state = SPENT;
        return HTTP_PARSE_DONE;
    }
    if (n == 0)
        return HTTP_PARSE_MORE;
    enum http_parse_event event = p->state < NO_BODY     ? head_feed(p, data, n, ret_used)
                                  : p->state == DECLARED ? declared_feed(p, data, n, ret_used)
                                                         : chunked_feed(p, data, n, ret_used);
    if (event == HTTP_PARSE_DONE) {
        p->state = SPENT;
        p->request.body = p->body ? p->body : "";
        p->request.n_body = p->n_body;
    }
    return event;
}

/* ---- characters ---- */

static bool is_token_char(unsigned char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
           (c && strchr("!#$%&'*+-.^_`|~", c));
}

static bool is_value_char(unsigned char c) { return c == '\t' || (c >= 0x20 && c != 0x7f); }

static int hex_value(unsigned char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    c |= 0x20;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

static bool span_is(struct span s, const char *word)
{
    return s.n == strlen(word) && !strncasecmp(s.at, word, s.n);
}

static struct span span_trim(struct span s)
{
    while (s.n && (s.at[0] == ' ' || s.at[0] == '\t'))
        s.at++, s.n--;
    while (s.n && (s.at[s.n - 1] == ' ' || s.at[s.n - 1] == '\t'))
        s.n--;
    return s;
}

/* Cuts the next element off a comma-separated list. False at the end. */
static bool list_take(struct span *list, struct span *ret)
{
    if (!list->at)
        return false;
    char *comma = memchr(list->at, ',', list->n);
    size_t n = comma ? (size_t)(comma - list->at) : list->n;
    *ret = span_trim((struct span){list->at, n});
    *list = comma ? (struct span){comma + 1, list->n - n - 1} : (struct span){NULL, 0};
    return true;
}

/* ---- the header block ---- */

static bool head_append(struct http_parse *p, const char *data, size_t n)
{
    if (p->n_head + n + 1 > p->head_cap) {
        size_t cap = p->head_cap ? p->head_cap : 512;
        while (cap < p->n_head + n + 1)
            cap *= 2;
        char *grown = realloc(p->head, cap);
        if (!grown)
            return false;
        p->head = grown;
        p->head_cap = cap;
    }
    memcpy(p->head + p->n_head, data, n);
    p->n_head += n;
    return true;
}

static struct span target_of(struct http_parse *p)
{
    char *first = memchr(p->head, ' ', p->n_line);
    char *second = memchr(first + 1, ' ', p->n_line - (size_t)(first + 1 - p->head));
    return (struct span){first + 1, (size_t)(second - first - 1)};
}

/* host[:port], host being a name, an IPv4 address or an IPv6 address in brackets. */
static bool host_is_valid(struct span s)
{
    size_t i = 0;
    if (s.n && s.at[0] == '[') {
        for (i = 1; i < s.n &&
                    (hex_value((unsigned char)s.at[i]) >= 0 || s.at[i] == ':' || s.at[i] == '.');)
            i++;
        if (i < 3 || i == s.n || s.at[i++] != ']')
            return false;
    } else {
        while (i < s.n && s.at[i] != ':') {
            unsigned char c = (unsigned char)s.at[i++];
            if (!is_token_char(c) || strchr("!#$&'*+^`|", c))
                return false;
        }
        if (i == 0)
            return false;
    }
    if (i == s.n)
        return true;
    if (s.at[i++] != ':' || s.n - i > 5)
        return false;
    for (; i < s.n; i++)
        if (s.at[i] < '0' || s.at[i] > '9')
            return false;
    return true;
}

/* Splits "/v1/x?y" or "http://host/v1/x?y". An absent path is an empty span at the right place. */
static bool target_split(struct span target, struct span *ret_path, struct span *ret_query)
{
    struct span rest = target;
    if (rest.at[0] != '/') {
        size_t scheme = rest.n > 7 && !strncasecmp(rest.at, "http://", 7)    ? 7
                        : rest.n > 8 && !strncasecmp(rest.at, "https://", 8) ? 8
                                                                             : 0;
        if (!scheme)
            return false;
        rest = (struct span){rest.at + scheme, rest.n - scheme};
        size_t n = 0;
        while (n < rest.n && rest.at[n] != '/' && rest.at[n] != '?')
            n++;
        if (!host_is_valid((struct span){rest.at, n}))
            return false;
        rest = (struct span){rest.at + n, rest.n - n};
    }
    char *mark = memchr(rest.at, '?', rest.n);
    size_t n = mark ? (size_t)(mark - rest.at) : rest.n;
    *ret_path = (struct span){rest.at, n};
    *ret_query = mark ? (struct span){mark + 1, rest.n - n - 1} : (struct span){rest.at + n, 0};
    return true;
}

/* No empty segments, no "..", not even percent-encoded: nothing behind us needs to normalise. */
static bool path_is_plain(struct span path)
{
    size_t n_dots = 0, n_others = 0;
    for (size_t i = 0; i <= path.n; i++) {
        unsigned char c = i < path.n ? (unsigned char)path.at[i] : '/';
        if (c == '/' && i + 1 < path.n && path.at[i + 1] == '/')
            return false;
        if (c == '%' && i + 2 < path.n) {
            int hi = hex_value((unsigned char)path.at[i + 1]);
            int lo = hex_value((unsigned char)path.at[i + 2]);
            if (hi >= 0 && lo >= 0) {
                c = (unsigned char)(hi * 16 + lo);
                i += 2;
            }
        }
        if (c == '/' || c == '\\') {
            if (n_dots == 2 && n_others == 0)
                return false;
            n_dots = n_others = 0;
        } else if (c == '.') {
            n_dots++;
        } else {
            n_others++;
        }
    }
    return true;
}

/* The request line stands in head[0..n_line). */
static enum http_parse_event request_line_check(struct http_parse *p)
{
    static const char *const methods[] = {"GET",    "HEAD",    "POST", "PUT",
                                          "DELETE", "OPTIONS", "PATCH"};
    const char *line = p->head, *end = line + p->n_line;
    const char *first = memchr(line, ' ', p->n_line);
    const char *second = first ? memchr(first + 1, ' ', (size_t)(end - first - 1)) : NULL;
    if (!second || first == line || second == first + 1 ||
        memchr(second + 1, ' ', (size_t)(end - second - 1)))
        return refuse(p, 400, "The request line is malformed.");
    struct span method = {p->head, (size_t)(first - line)};
    for (size_t i = 0; i < method.n; i++)
        if (!is_token_char((unsigned char)method.at[i]))
            return refuse(p, 400, "The request method is malformed.");
    const char *version = second + 1;
    if (end - version != 8 || memcmp(version, "HTTP/", 5) != 0 || version[6] != '.' ||
        version[5] < '0' || version[5] > '9' || version[7] < '0' || version[7] > '9')
        return refuse(p, 400, "The HTTP version is malformed.");
    if (method.n == 3 && !memcmp(line, "PRI", 3))
        return refuse(p, 400, "HTTP/2 is not spoken here.");
    if (version[5] != '1' && version[5] != '0')
        return refuse(p, 505, "Only HTTP/1.0 and HTTP/1.1 are supported.");
    if (version[5] == '0' || version[7] > '1')
        return refuse(p, 400, "Only HTTP/1.0 and HTTP/1.1 are supported.");
    p->http10 = version[7] == '0';
    bool known = false;
    for (size_t i = 0; i < ARRAY_LEN(methods) && !known; i++)
        known = method.n == strlen(methods[i]) && !memcmp(line, methods[i], method.n);
    if (!known)
        return refuse(p, 405, "This method is not allowed.");
    p->is_head = method.n == 4 && line[0] == 'H';

    struct span target = target_of(p), path, query;
    if (target.n == 1 && target.at[0] == '*') {
        p->for_server = method.n == 7; /* OPTIONS, the only one of this length */
        if (!p->for_server)
            return refuse(p, 400, "The request target is malformed.");
        return HTTP_PARSE_MORE;
    }
    if (memchr(target.at, '#', target.n) || memmem(target.at, target.n, "%00", 3) ||
        !target_split(target, &path, &query) || !path_is_plain(path))
        return refuse(p, 400, "The request target is malformed.");
    return HTTP_PARSE_MORE;
}

static enum http_parse_event head_feed(struct http_parse *p, const char *data, size_t n,
                                       size_t *ret_used)
{
    size_t from = 0; /* data[from..i) is admitted and not yet in head */
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)data[i];
        switch ((enum parse_state)p->state) {
        case START:
            if (c == '\r' && !p->skipped_crlf) {
                p->state = START_LF;
                from = i + 1;
                break;
            }
            p->state = REQUEST_LINE;
            /* fall through */
        case REQUEST_LINE:
            if (c == '\r') {
                p->state = REQUEST_LF;
            } else if (c < 0x20 || c >= 0x7f) {
                return refuse(p, 400,
                              "The request line contains a control or non-ASCII character.");
            } else if (++p->n_line > HTTP_MAX_REQUEST_LINE) {
                return refuse(p, 414, "The request line is too long.");
            }
            break;
        case START_LF:
            if (c != '\n')
                return refuse(p, 400, "A bare CR is not a line end.");
            p->skipped_crlf = true;
            p->state = START;
            from = i + 1;
            break;
        case REQUEST_LF:
            if (c != '\n')
                return refuse(p, 400, "A bare CR is not a line end.");
            if (!head_append(p, data + from, i + 1 - from))
                return refuse(p, 503, "Out of memory.");
            from = i + 1;
            if (request_line_check(p) == HTTP_PARSE_BAD)
                return HTTP_PARSE_BAD;
            p->state = LINE_START;
            break;
        case LINE_START:
            if (c == '\r') {
                p->state = HEAD_LF;
                break;
            }
            if (c == ' ' || c == '\t')
                return refuse(p, 400, "A header line starts with white space.");
            if (++p->n_fields > HTTP_MAX_FIELDS)
                return refuse(p, 431, "There are too many header fields.");
            p->state = NAME;
            if (c == ':')
                return refuse(p, 400, "A header field has no name.");
            /* fall through */
        case NAME:
            if (c == ':')
                p->state = VALUE;
            else if (!is_token_char(c))
                return refuse(p, 400, "A header field name is malformed.");
            break;
        case VALUE:
            if (c == '\r')
                p->state = LINE_LF;
            else if (!is_value_char(c))
                return refuse(p, 400, "A header field contains a control character.");
            break;
        case LINE_LF:
            if (c != '\n')
                return refuse(p, 400, "A bare CR is not a line end.");
            p->state = LINE_START;
            break;
        case HEAD_LF:
            if (c != '\n')
                return refuse(p, 400, "A bare CR is not a line end.");
            if (!head_append(p, data + from, i + 1 - from))
                return refuse(p, 503, "Out of memory.");
            *ret_used = i + 1;
            return head_complete(p);
        default:
            assert(!"not in the header block");
        }
        if (p->state > REQUEST_LF &&
            p->n_head + (i + 1 - from) - p->n_line - 2 > HTTP_MAX_HEADER_BYTES)
            return refuse(p, 431, "The header fields are too large.");
    }
    *ret_used = n;
    return head_append(p, data + from, n - from) ? HTTP_PARSE_MORE
                                                 : refuse(p, 503, "Out of memory.");
}

/* ---- what the header block means ---- */

/* Fields that are handed on as text. once: a repetition is refused, as two readers could pick
 * different ones; for the others the first counts. */
enum { REQUEST_ID };
static const struct {
    const char *name;
    size_t offset;
    bool once;
} text_fields[] = {
    [REQUEST_ID] = {"x-request-id", offsetof(struct http_request, request_id), false},
    {"content-type", offsetof(struct http_request, content_type), true},
    {"authorization", offsetof(struct http_request, authorization), true},
    {"x-api-key", offsetof(struct http_request, api_key), true},
    {"traceparent", offsetof(struct http_request, traceparent), false},
    {"origin", offsetof(struct http_request, origin), false},
    {"if-none-match", offsetof(struct http_request, if_none_match), false},
    {"access-control-request-headers", offsetof(struct http_request, cors_headers), false},
};

/* What one pass over the fields finds; judged afterwards, so that order does not matter. */
struct findings {
    int n_host, n_length, n_coding;
    struct span host, length, coding;
    bool not_only_chunked, encoded, odd_expect, repeated;
    bool says_close, says_keep_alive;
    struct span text[ARRAY_LEN(text_fields)];
};

static void field_note(struct http_parse *p, struct findings *f, struct span name,
                       struct span value)
{
    struct span item;
    if (span_is(name, "host")) {
        f->n_host++;
        f->host = value;
    } else if (span_is(name, "content-length")) {
        f->n_length++;
        f->length = value;
    } else if (span_is(name, "transfer-encoding")) {
        f->n_coding++;
        f->coding = value;
        while (list_take(&value, &item))
            f->not_only_chunked |= !span_is(item, "chunked");
    } else if (span_is(name, "connection")) {
        while (list_take(&value, &item)) {
            f->says_close |= span_is(item, "close");
            f->says_keep_alive |= span_is(item, "keep-alive");
        }
    } else if (span_is(name, "expect")) {
        p->expects_100 = true;
        f->odd_expect |= !span_is(value, "100-continue");
    } else if (span_is(name, "content-encoding")) {
        f->encoded |= value.n && !span_is(value, "identity");
    } else {
        for (size_t i = 0; i < ARRAY_LEN(text_fields); i++) {
            if (!span_is(name, text_fields[i].name))
                continue;
            if (!f->text[i].at)
                f->text[i] = value;
            else
                f->repeated |= text_fields[i].once;
        }
    }
}

/* Decimal digits only; 19 of them always fit. */
static bool length_read(struct span s, uint64_t *ret)
{
    uint64_t v = 0;
    if (s.n == 0 || s.n > 19)
        return false;
    for (size_t i = 0; i < s.n; i++) {
        if (s.at[i] < '0' || s.at[i] > '9')
            return false;
        v = v * 10 + (uint64_t)(s.at[i] - '0');
    }
    *ret = v;
    return true;
}

static enum http_parse_event findings_judge(struct http_parse *p, const struct findings *f)
{
    /* RFC 9112 3.2: 1.0 clients may leave Host out, or empty. */
    if (f->n_host > 1 || (f->n_host == 0 && !p->http10))
        return refuse(p, 400, "Exactly one Host header is required.");
    if (f->n_host && !(p->http10 && f->host.n == 0) && !host_is_valid(f->host))
        return refuse(p, 400, "The Host header is malformed.");
    /* RFC 9112 6.1-6.3, without any of the repairs that it permits. */
    if (f->n_coding && p->http10)
        return refuse(p, 400, "Transfer-Encoding needs HTTP/1.1.");
    if (f->n_coding && f->n_length)
        return refuse(p, 400, "Content-Length and Transfer-Encoding exclude each other.");
    if (f->n_length > 1 || (f->n_length && !length_read(f->length, &p->declared)))
        return refuse(p, 400, "The Content-Length header is malformed.");
    if (f->n_coding && f->coding.n == 0)
        return refuse(p, 400, "The Transfer-Encoding header is empty.");
    if (f->not_only_chunked)
        return refuse(p, 501, "Only the transfer coding 'chunked' is implemented.");
    if (f->n_coding && (f->n_coding > 1 || !span_is(f->coding, "chunked")))
        return refuse(p, 400, "The transfer coding 'chunked' may be applied only once.");
    if (f->repeated)
        return refuse(p, 400, "A header field that must be unique is repeated.");
    if (p->declared > p->max_body)
        return refuse(p, 413, "The request body is too large.");
    if (f->encoded)
        return refuse(p, 415, "Content-Encoding is not supported in requests.");
    if (f->odd_expect)
        return refuse(p, 417, "The only supported expectation is 100-continue.");
    return HTTP_PARSE_MORE;
}

/* Points into head, made a string in place: llhttp has already seen these bytes. */
static const char *string_in_place(struct span s)
{
    if (!s.at || !s.n)
        return "";
    s.at[s.n] = '\0';
    return s.at;
}

/* Of 1..128 printable characters, or "". */
static const char *plain_request_id(struct span s)
{
    for (size_t i = 0; i < s.n; i++)
        if (s.at[i] <= 0x20 || s.at[i] >= 0x7f)
            return "";
    return s.n <= 128 ? string_in_place(s) : "";
}

static enum http_parse_event head_complete(struct http_parse *p)
{
    struct findings f = {0};
    for (size_t at = p->n_line + 2; p->head[at] != '\r';) {
        char *line = p->head + at;
        char *colon = memchr(line, ':', p->n_head - at);
        char *end = memchr(line, '\r', p->n_head - at); /* the guard let no CR into a value */
        field_note(p, &f, (struct span){line, (size_t)(colon - line)},
                   span_trim((struct span){colon + 1, (size_t)(end - colon - 1)}));
        at += (size_t)(end - line) + 2;
    }
    if (findings_judge(p, &f) == HTTP_PARSE_BAD) {
        p->request.request_id = plain_request_id(f.text[REQUEST_ID]);
        return HTTP_PARSE_BAD;
    }
    p->chunked = f.n_coding != 0;
    p->left = p->declared;
    p->has_body = p->chunked || p->declared;
    p->keep_alive = !f.says_close && (!p->http10 || f.says_keep_alive);
    p->expects_100 &= !p->http10 && p->has_body;

    /* The second reader. llhttp_agrees compares method, version and framing. */
    if (!llhttp_show(p, p->head, p->n_head))
        return HTTP_PARSE_BAD;
    if (!p->ll_headers || p->ll_complete != !p->has_body)
        return refuse(p, 400, "The request is malformed.");

    struct http_request *r = &p->request;
    struct span target = target_of(p), path = target, query = {0};
    if (!p->for_server)
        (void)target_split(target, &path, &query);
    r->method = string_in_place((struct span){p->head, (size_t)(target.at - 1 - p->head)});
    r->path = path.n ? string_in_place(path) : "/";
    r->query = string_in_place(query);
    r->body = "";
    r->n_body = 0;
    for (size_t i = 0; i < ARRAY_LEN(text_fields); i++) {
        const char *text =
            i == REQUEST_ID ? plain_request_id(f.text[i]) : string_in_place(f.text[i]);
        memcpy((char *)r + text_fields[i].offset, &text, sizeof(text));
    }
    p->state = p->chunked ? CHUNK_SIZE : p->declared ? DECLARED : NO_BODY;
    return HTTP_PARSE_HEADERS;
}

/* ---- bodies ---- */

static enum http_parse_event body_complete(struct http_parse *p)
{
    if (!p->ll_complete || p->n_body != p->n_framed)
        return refuse(p, 400, "The request body is malformed.");
    return HTTP_PARSE_DONE;
}

static enum http_parse_event declared_feed(struct http_parse *p, const char *data, size_t n,
                                           size_t *ret_used)
{
    size_t k = (size_t)MIN((uint64_t)n, p->left);
    p->left -= k;
    p->n_framed += k;
    *ret_used = k;
    if (!llhttp_show(p, data, k))
        return HTTP_PARSE_BAD;
    return p->left ? HTTP_PARSE_MORE : body_complete(p);
}

/* Returns 0, or the status that data[i] earns. Only CHUNK_DATA looks at more than one byte. */
static int chunked_admit(struct http_parse *p, const char *data, size_t n, size_t *i)
{
    unsigned char c = (unsigned char)data[*i];
    int digit;
    switch ((enum parse_state)p->state) {
    case CHUNK_SIZE:
        digit = hex_value(c);
        if (digit >= 0) {
            p->left = p->left << 4 | (uint64_t)digit;
            return ++p->n_size_digits > 16 ? 400 : 0;
        }
        if (p->n_size_digits == 0 || (c != ';' && c != '\r'))
            return 400;
        if (p->left > p->max_body - p->n_framed)
            return 413;
        p->state = c == ';' ? CHUNK_EXT : CHUNK_SIZE_LF;
        return c == ';' && ++p->n_ext > HTTP_MAX_CHUNK_EXT_BYTES ? 400 : 0;
    case CHUNK_EXT:
        if (c == '\r')
            p->state = CHUNK_SIZE_LF;
        else if (!is_value_char(c) || ++p->n_ext > HTTP_MAX_CHUNK_EXT_BYTES)
            return 400;
        return 0;
    case CHUNK_SIZE_LF:
        p->n_size_digits = 0;
        p->state = p->left ? CHUNK_DATA : TRAILER_START;
        return c == '\n' ? 0 : 400;
    case CHUNK_DATA: {
        size_t k = (size_t)MIN((uint64_t)(n - *i), p->left);
        p->left -= k;
        p->n_framed += k;
        *i += k - 1;
        if (!p->left)
            p->state = CHUNK_DATA_CR;
        return 0;
    }
    case CHUNK_DATA_CR:
        p->state = CHUNK_DATA_LF;
        return c == '\r' ? 0 : 400;
    case CHUNK_DATA_LF:
        p->state = CHUNK_SIZE;
        return c == '\n' ? 0 : 400;
    case TRAILER_START:
        if (c == '\r') {
            p->state = BODY_END_LF;
            return 0;
        }
        p->state = TRAILER_NAME;
        if (c == ':')
            return 400;
        /* fall through */
    case TRAILER_NAME:
        if (c == ':')
            p->state = TRAILER_VALUE;
        else if (!is_token_char(c))
            return 400;
        return ++p->n_trailer > HTTP_MAX_TRAILER_BYTES ? 400 : 0;
    case TRAILER_VALUE:
        if (c == '\r')
            p->state = TRAILER_LF;
        else if (!is_value_char(c))
            return 400;
        return ++p->n_trailer > HTTP_MAX_TRAILER_BYTES ? 400 : 0;
    case TRAILER_LF:
        p->state = TRAILER_START;
        return c == '\n' ? 0 : 400;
    case BODY_END_LF:
        p->state = SPENT;
        return c == '\n' ? 0 : 400;
    default:
        assert(!"not in a chunked body");
        return 400;
    }
}

static bool in_trailer(int state)
{
    return state == TRAILER_NAME || state == TRAILER_VALUE || state == TRAILER_LF;
}

static enum http_parse_event chunked_feed(struct http_parse *p, const char *data, size_t n,
                                          size_t *ret_used)
{
    size_t from = 0; /* data[from..i) is admitted and not yet shown to llhttp */
    for (size_t i = 0; i < n; i++) {
        size_t at = i;
        bool was_in_trailer = in_trailer(p->state);
        int status = chunked_admit(p, data, n, &i);
        if (status) {
            if (!was_in_trailer && !llhttp_show(p, data + from, at - from))
                return HTTP_PARSE_BAD;
            return refuse(p, status,
                          status == 413 ? "The request body is too large."
                                        : "The chunked request body is malformed.");
        }
        if (was_in_trailer || in_trailer(p->state)) { /* trailers are checked, then ignored */
            if (!was_in_trailer && !llhttp_show(p, data + from, at - from))
                return HTTP_PARSE_BAD;
            from = i + 1;
        }
        if (p->state == SPENT) {
            *ret_used = i + 1;
            if (!llhttp_show(p, data + from, i + 1 - from))
                return HTTP_PARSE_BAD;
            return body_complete(p);
        }
    }
    *ret_used = n;
    return llhttp_show(p, data + from, n - from) ? HTTP_PARSE_MORE : HTTP_PARSE_BAD;
}

/* ---- llhttp ---- */

static int llhttp_agrees(llhttp_t *ll)
{
    struct http_parse *p = ll->data;
    const char *name = llhttp_method_name((llhttp_method_t)ll->method);
    bool chunked = (ll->flags & F_CHUNKED) != 0;
    if (strncmp(p->head, name, strlen(name)) != 0 || p->head[strlen(name)] != ' ' ||
        ll->http_major != 1 || ll->http_minor != (p->http10 ? 0 : 1) || chunked != p->chunked ||
        (!chunked && ll->content_length != p->declared))
        return -1;
    ll->upgrade = 0; /* Upgrade is not honoured: the body, and the next request, follow as usual */
    p->ll_headers = true;
    return 0;
}

static int llhttp_body(llhttp_t *ll, const char *at, size_t n)
{
    struct http_parse *p = ll->data;
    if (p->n_body + n + 1 > p->body_cap) { /* a declared length is not trusted with memory */
        size_t cap = p->body_cap ? p->body_cap : 1024;
        while (cap < p->n_body + n + 1)
            cap *= 2;
        char *grown = realloc(p->body, cap);
        if (!grown) {
            p->ll_nomem = true;
            return HPE_USER;
        }
        p->body = grown;
        p->body_cap = cap;
    }
    memcpy(p->body + p->n_body, at, n);
    p->n_body += n;
    p->body[p->n_body] = '\0';
    return 0;
}

static int llhttp_ended(llhttp_t *ll)
{
    struct http_parse *p = ll->data;
    p->ll_complete = true;
    return 0;
}

/* False: refused. */
static bool llhttp_show(struct http_parse *p, const char *data, size_t n)
{
    if (n == 0 || llhttp_execute(&p->ll, data, n) == HPE_OK)
        return true;
    if (p->ll_nomem)
        refuse(p, 503, "Out of memory.");
    else
        refuse(p, 400, "The request is malformed.");
    return false;
}

struct http_parse *http_parse_create(size_t max_body_bytes)
{
    static const llhttp_settings_t settings = {
        .on_headers_complete = llhttp_agrees,
        .on_body = llhttp_body,
        .on_message_complete = llhttp_ended,
    };
    struct http_parse *p = calloc(1, sizeof(*p));
    if (!p)
        return NULL;
    llhttp_init(&p->ll, HTTP_REQUEST, &settings);
    p->ll.data = p;
    p->max_body = max_body_bytes;
    return p;
}

void http_parse_destroy(struct http_parse *p)
{
    if (!p)
        return;
    free(p->head);
    free(p->body);
    free(p);
}
