/* utf8.h: is it UTF-8? */
#ifndef BATON_UTF8_H
#define BATON_UTF8_H

#include <stddef.h>

/* Checks UTF-8 (no surrogates, no overlong forms). Returns n if valid, else the first bad offset.
 */
size_t utf8_check(const char *text, size_t n);

#endif
