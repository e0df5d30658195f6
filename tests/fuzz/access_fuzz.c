/* access_fuzz.c: a key file. What is accepted has keys, each found by nobody who does not know it;
 * what is refused names a line and nothing of it.
 */
#include "router/access.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static const struct access_limits defaults = {.concurrency = 1, .tokens_per_minute = 60};
    struct access *a = NULL;
    char path[64];
    int fd = memfd_create("keys", 0);
    if (fd < 0)
        return 0;
    if (n && write(fd, data, n) != (ssize_t)n)
        abort();
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    if (access_create(path, &defaults, &a) == ERR_OK) {
        if (access_n_keys(a) == 0 || access_find(a, (const char *)data, n < 64 ? n : 64))
            abort();
        if (access_reload(a) != ERR_OK)
            abort();
    }
    access_destroy(a);
    close(fd);
    return 0;
}
