/* tokenizer_fuzz.c: any bytes as tokenizer.json. It loads or is refused; what loads must encode and
 * decode. */
#include <string.h>
#include <sys/mman.h>

#include "router/text/detokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static void use(const struct tokenizer *t)
{
    static const char text[] =
        "Hello,  world\n\n123 <|user|>\xe5\x8c\x97\xe4\xba\xac don't \xf0\x9f\x98\x80";
    struct ids ids = {0};
    struct json_out out = {0};
    struct detokenizer d;
    detokenizer_init(&d, t, false);
    for (int added = 0; added < 2; added++) {
        ids.len = out.len = 0;
        if (tokenizer_encode(t, text, sizeof(text) - 1, added, &ids) != ERR_OK)
            continue; /* a regex may be legal and hopeless */
        for (size_t i = 0; i < ids.len; i++)
            detokenizer_push(&d, ids.data[i], &out);
        detokenizer_flush(&d, &out);
        if (out.len != sizeof(text) - 1 || memcmp(out.data, text, out.len) != 0)
            abort();
    }
    ids_finish(&ids);
    json_out_finish(&out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    OWNED_FD fd = memfd_create("tokenizer.json", MFD_CLOEXEC);
    if (fd < 0 || write(fd, data, n) != (ssize_t)n)
        return 0;
    char path[64];
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    OWNED(tokenizer) t = NULL;
    if (tokenizer_load(path, &t) == ERR_OK)
        use(t);
    else if (t)
        abort();
    return 0;
}
