/* curve.c: see curve.h.
 *
 * libzmq asks a handler inside the process (ZAP, RFC 27) about every handshake; without one it
 * would let in whoever has any key pair. The handler is a thread, because the answer must come
 * while the loop is busy, and it ends with the context. Its answer names the role that the key
 * stands for; libzmq keeps that with every message of the connection as User-Id.
 */
#include "common/base/curve.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zmq.h>

#include "common/base/own.h"

#define KEY_BYTES    32u
#define MAX_KEYS     4096u
#define MAX_FILE     (1u << 20)
#define HANDSHAKE_MS 5000
#define DOMAIN       "baton"

struct allowed {
    enum wire_role role;
    uint8_t key[KEY_BYTES];
    char text[CURVE_KEY_CHARS + 1];
};

struct curve_list {
    size_t n;
    struct allowed keys[MAX_KEYS];
};

static const char *const roles[] = {
    [WIRE_ROUTER] = "router", [WIRE_PREFILL] = "prefill", [WIRE_DECODE] = "decode"};

/* Of this process; written once, before any thread reads them. */
static struct curve_pair pair;
static struct curve_list *list;
static bool insecure;

static pthread_once_t handler_once = PTHREAD_ONCE_INIT;
static void *handler_socket;
static enum err handler_error;

/* ---- files ----------------------------------------------------------------------------------- */

/* Cuts the next line off *at. False at the end. Blank lines and comments are skipped. */
static bool next_line(const char **at, const char *end, int *number, char *ret, size_t n)
{
    while (*at < end) {
        const char *stop = memchr(*at, '\n', (size_t)(end - *at));
        size_t len = (size_t)((stop ? stop : end) - *at);
        size_t kept = MIN(len, n - 1);
        memcpy(ret, *at, kept);
        ret[kept] = '\0';
        *at += len + (stop != NULL);
        ++*number;
        if (ret[strspn(ret, " \t\r")] && ret[0] != '#')
            return true;
    }
    return false;
}

/* "WORD KEY": the word in ret_word, the key checked. */
static enum err parse_line(const char *line, int number, char ret_word[16],
                           char ret_key[CURVE_KEY_CHARS + 1], uint8_t ret_bytes[KEY_BYTES])
{
    char key[64], more[2];
    if (sscanf(line, "%15s %63s %1s", ret_word, key, more) < 2)
        return err_set(ERR_INVALID, "line %d: a word and a key must stand there", number);
    if (strlen(key) != CURVE_KEY_CHARS || !zmq_z85_decode(ret_bytes, key))
        return err_set(ERR_INVALID, "line %d: the key must have %u characters of Z85", number,
                       CURVE_KEY_CHARS);
    strcpy(ret_key, key);
    return ERR_OK;
}

enum err curve_parse_pair(const char *text, size_t n, struct curve_pair *ret)
{
    struct curve_pair p = {0};
    char line[256], word[16], key[CURVE_KEY_CHARS + 1], derived[CURVE_KEY_CHARS + 1];
    uint8_t bytes[KEY_BYTES];
    int number = 0;
    for (const char *at = text; next_line(&at, text + n, &number, line, sizeof line);) {
        TRY(parse_line(line, number, word, key, bytes));
        char *to = !strcmp(word, "public")   ? p.public_key
                   : !strcmp(word, "secret") ? p.secret_key
                                             : NULL;
        if (!to)
            return err_set(ERR_INVALID, "line %d: '%s' is neither public nor secret", number, word);
        if (*to)
            return err_set(ERR_INVALID, "line %d: a second %s key", number, word);
        strcpy(to, key);
    }
    if (!p.public_key[0] || !p.secret_key[0])
        return err_set(ERR_INVALID, "a public and a secret key must stand there");
    if (zmq_curve_public(derived, p.secret_key) || strcmp(derived, p.public_key))
        return err_set(ERR_INVALID, "the public key does not belong to the secret one");
    *ret = p;
    explicit_bzero(line, sizeof line);
    explicit_bzero(key, sizeof key);
    explicit_bzero(bytes, sizeof bytes);
    explicit_bzero(&p, sizeof p);
    return ERR_OK;
}

enum err curve_parse_list(const char *text, size_t n, struct curve_list **ret)
{
    OWNED_MEM struct curve_list *l = calloc(1, sizeof *l);
    if (!l)
        return err_set(ERR_NOMEM, "no memory for keys");
    char line[256], word[16];
    int number = 0;
    for (const char *at = text; next_line(&at, text + n, &number, line, sizeof line);) {
        if (l->n == MAX_KEYS)
            return err_set(ERR_INVALID, "line %d: more than %u keys", number, MAX_KEYS);
        struct allowed *a = &l->keys[l->n];
        TRY(parse_line(line, number, word, a->text, a->key));
        size_t role = 0;
        while (role < ARRAY_LEN(roles) && strcmp(word, roles[role]))
            role++;
        if (role == ARRAY_LEN(roles))
            return err_set(ERR_INVALID, "line %d: '%s' is not router, prefill or decode", number,
                           word);
        for (size_t i = 0; i < l->n; i++)
            if (!memcmp(l->keys[i].key, a->key, KEY_BYTES))
                return err_set(ERR_INVALID, "line %d: the key stands there twice", number);
        a->role = (enum wire_role)role;
        l->n++;
    }
    if (!l->n)
        return err_set(ERR_INVALID, "no key stands there, so nobody could connect");
    *ret = take(&l);
    return ERR_OK;
}

void curve_list_destroy(struct curve_list *l) { free(l); }

/* Who must not have access: everybody but the owner. A file that root gave to our group is fine
 * too: systemd's credentials and Kubernetes' secrets look like that. */
static mode_t forbidden(const struct stat *st)
{
    return st->st_uid == 0 && geteuid() != 0 ? 027 : 077;
}

/* The whole file. secret: refused if others may read or write it. */
static enum err read_file(const char *path, bool secret, char **ret, size_t *ret_n)
{
    OWNED_FD fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat st;
    if (fd < 0 || fstat(fd, &st))
        return err_set(ERR_NOT_FOUND, "%s: %s", path, strerror(errno));
    if (secret && st.st_mode & forbidden(&st))
        return err_set(ERR_INVALID, "%s: others may read it (mode %03o): chmod 600", path,
                       st.st_mode & 0777);
    if (!S_ISREG(st.st_mode) || st.st_size > MAX_FILE)
        return err_set(ERR_INVALID, "%s: not a file of at most %u bytes", path, MAX_FILE);
    OWNED_MEM char *text = malloc((size_t)st.st_size + 1);
    if (!text)
        return err_set(ERR_NOMEM, "no memory for keys");
    ssize_t n = read(fd, text, (size_t)st.st_size);
    if (n < 0)
        return err_set(ERR_IO, "%s: %s", path, strerror(errno));
    *ret_n = (size_t)n;
    *ret = take(&text);
    return ERR_OK;
}

enum err curve_load(const char *key_file, const char *allow_file, bool is_insecure)
{
    insecure = is_insecure;
    if (!key_file[0] && !allow_file[0])
        return ERR_OK;
    if (!key_file[0] || !allow_file[0])
        return err_set(ERR_INVALID, "--curve-key-file and --curve-allow-file go together: a key of "
                                    "one's own and those of the others");
    if (!zmq_has("curve"))
        return err_set(ERR_INVALID, "this libzmq was built without CURVE");
    OWNED_MEM char *key_text = NULL, *allow_text = NULL;
    size_t n;
    TRY(read_file(key_file, true, &key_text, &n));
    enum err e = curve_parse_pair(key_text, n, &pair);
    explicit_bzero(key_text, n);
    if (e)
        return err_prefix(e, "%s", key_file);
    TRY(read_file(allow_file, false, &allow_text, &n));
    struct curve_list *l;
    e = curve_parse_list(allow_text, n, &l);
    if (e)
        return err_prefix(e, "%s", allow_file);
    curve_list_destroy(list);
    list = l;
    return ERR_OK;
}

enum err curve_keygen(const char *path, struct curve_pair *ret)
{
    if (zmq_curve_keypair(ret->public_key, ret->secret_key))
        return err_set(ERR_IO, "no key pair: %s", zmq_strerror(zmq_errno()));
    OWNED_FD fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0)
        return err_set(ERR_IO, "%s: %s", path,
                       errno == EEXIST
                           ? "is there already; a key is never written over: move it away"
                           : strerror(errno));
    if (fchmod(fd, 0600) ||
        dprintf(fd, "public %s\nsecret %s\n", ret->public_key, ret->secret_key) < 0 || fsync(fd)) {
        int why = errno;
        unlink(path);
        return err_set(ERR_IO, "%s: %s", path, strerror(why));
    }
    return ERR_OK;
}

/* ---- handshakes ------------------------------------------------------------------------------ */

/* frame: the client's key as libzmq gives it. NULL if it is not on the list. */
static const struct allowed *find(const uint8_t *key, size_t n)
{
    for (size_t i = 0; n == KEY_BYTES && i < list->n; i++)
        if (!memcmp(list->keys[i].key, key, KEY_BYTES))
            return &list->keys[i];
    return NULL;
}

enum { ZAP_VERSION, ZAP_ID, ZAP_DOMAIN, ZAP_ADDRESS, ZAP_IDENTITY, ZAP_MECHANISM, ZAP_KEY, N_ZAP };

struct zap_frame {
    char bytes[256];
    size_t n;
};

/* One request: all its frames. False when the context ends. */
static bool zap_receive(void *socket, struct zap_frame frames[N_ZAP], int *ret_n)
{
    int more = 1;
    for (*ret_n = 0; more; ++*ret_n) {
        struct zap_frame spare, *f = *ret_n < N_ZAP ? &frames[*ret_n] : &spare;
        int n;
        while ((n = zmq_recv(socket, f->bytes, sizeof f->bytes, 0)) < 0)
            if (zmq_errno() != EINTR)
                return false;
        f->n = MIN((size_t)n, sizeof f->bytes);
        size_t size = sizeof more;
        zmq_getsockopt(socket, ZMQ_RCVMORE, &more, &size);
    }
    return true;
}

static void zap_answer(void *socket, const struct zap_frame *id, const struct allowed *who)
{
    const char *role = who ? roles[who->role] : "";
    zmq_send(socket, "1.0", 3, ZMQ_SNDMORE);
    zmq_send(socket, id->bytes, id->n, ZMQ_SNDMORE);
    zmq_send(socket, who ? "200" : "400", 3, ZMQ_SNDMORE);
    zmq_send(socket, "", 0, ZMQ_SNDMORE);
    zmq_send(socket, role, strlen(role), ZMQ_SNDMORE);
    zmq_send(socket, "", 0, 0);
}

static void *handler_main(void *socket)
{
    struct zap_frame frames[N_ZAP];
    int n;
    while (zap_receive(socket, frames, &n)) {
        bool curve = n == N_ZAP && frames[ZAP_MECHANISM].n == 5 &&
                     !memcmp(frames[ZAP_MECHANISM].bytes, "CURVE", 5);
        const struct zap_frame *key = &frames[ZAP_KEY];
        zap_answer(socket, &frames[ZAP_ID],
                   curve ? find((const uint8_t *)key->bytes, key->n) : NULL);
    }
    zmq_close(socket);
    return NULL;
}

static void handler_start(void)
{
    pthread_t thread;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); // signals are for the loop's thread
    if (zmq_bind(handler_socket, "inproc://zeromq.zap.01") ||
        pthread_create(&thread, NULL, handler_main, handler_socket)) {
        zmq_close(handler_socket);
        handler_error = err_set(ERR_IO, "no handler for keys: %s", zmq_strerror(zmq_errno()));
    } else {
        pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* ---- sockets --------------------------------------------------------------------------------- */

static bool is_loopback(const char *endpoint)
{
    static const char *const hosts[] = {"127.", "localhost:", "[::1]:", "lo:"};
    const char *host = endpoint + strlen("tcp://");
    for (size_t i = 0; i < ARRAY_LEN(hosts); i++)
        if (!strncmp(host, hosts[i], strlen(hosts[i])))
            return true;
    return false;
}

/* *ret: whether the endpoint is to be guarded. */
static enum err wants_keys(const char *endpoint, bool *ret)
{
    *ret = false;
    if (strncmp(endpoint, "tcp://", 6))
        return ERR_OK;
    if (!list && !insecure && !is_loopback(endpoint))
        return err_set(
            ERR_INVALID,
            "%s leaves this host: give --curve-key-file and --curve-allow-file (see baton "
            "keygen), or --insecure-tcp on a network that nobody else can reach",
            endpoint);
    *ret = list != NULL;
    return ERR_OK;
}

enum err curve_check(const char *endpoint)
{
    bool guarded;
    return wants_keys(endpoint, &guarded);
}

static enum err set_keys(void *socket, bool server, const char *server_key)
{
    int on = 1, ms = HANDSHAKE_MS;
    int rc = zmq_setsockopt(socket, ZMQ_HANDSHAKE_IVL, &ms, sizeof ms);
    if (server) {
        rc |= zmq_setsockopt(socket, ZMQ_CURVE_SERVER, &on, sizeof on);
        rc |= zmq_setsockopt(socket, ZMQ_ZAP_DOMAIN, DOMAIN, strlen(DOMAIN));
    } else {
        rc |= zmq_setsockopt(socket, ZMQ_CURVE_SERVERKEY, server_key, CURVE_KEY_CHARS + 1);
        rc |= zmq_setsockopt(socket, ZMQ_CURVE_PUBLICKEY, pair.public_key, CURVE_KEY_CHARS + 1);
    }
    rc |= zmq_setsockopt(socket, ZMQ_CURVE_SECRETKEY, pair.secret_key, CURVE_KEY_CHARS + 1);
    return rc ? err_set(ERR_INVALID, "ZeroMQ refused a key: %s", zmq_strerror(zmq_errno()))
              : ERR_OK;
}

enum err curve_guard_hub(void *context, void *socket, const char *endpoint,
                         char ret_key[CURVE_KEY_CHARS + 1])
{
    bool guarded;
    ret_key[0] = '\0';
    TRY(wants_keys(endpoint, &guarded));
    if (!guarded)
        return ERR_OK;
    if (!handler_socket && !(handler_socket = zmq_socket(context, ZMQ_REP)))
        return err_set(ERR_IO, "no ZeroMQ socket: %s", zmq_strerror(zmq_errno()));
    pthread_once(&handler_once, handler_start);
    TRY(handler_error);
    TRY(set_keys(socket, true, NULL));
    strcpy(ret_key, pair.public_key);
    return ERR_OK;
}

enum err curve_guard_line(void *socket, const char *endpoint, const char *key)
{
    bool guarded;
    TRY(wants_keys(endpoint, &guarded));
    if (!guarded && key[0])
        return err_set(ERR_INVALID, "%s wants keys: give --curve-key-file and --curve-allow-file",
                       endpoint);
    if (!guarded)
        return ERR_OK;
    for (size_t i = 0; i < list->n; i++) {
        const struct allowed *a = &list->keys[i];
        bool is_it =
            key[0] ? a->role != WIRE_PREFILL && !strcmp(a->text, key) : a->role == WIRE_ROUTER;
        if (is_it)
            return set_keys(socket, false, a->text);
    }
    return err_set(ERR_INVALID, "%s: %s is not in --curve-allow-file", endpoint,
                   key[0] ? "its key" : "a key of the router");
}

bool curve_may(void *frame, uint64_t role)
{
    const char *id = zmq_msg_gets(frame, "User-Id");
    return !id || (role < ARRAY_LEN(roles) && !strcmp(id, roles[role]));
}
