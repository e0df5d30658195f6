/* words.h: a small vocabulary for the grammar tests and the fuzzer. */
#ifndef BATON_TESTS_WORDS_H
#define BATON_TESTS_WORDS_H

#include <string.h>

#include "common/grammar/grammar.h"

#define WORDS_EOS   256
#define WORDS_TAG   257 /* and the other tags behind it; then an added token that is none */
#define WORDS_OTHER (WORDS_TAG + GRAMMAR_N_TAGS)

static const char *const words_more[] = {
    "ab",
    "abc",
    "hello",
    " world",
    "\":",
    "\": ",
    "\", \"",
    "\",\"",
    "\"}",
    "\"]",
    "[{",
    "}]",
    "{\"",
    "[\"",
    "],",
    "},",
    "true",
    "null",
    "false",
    "12",
    "0.5",
    "-1",
    "é",
    "\xc3",
    "中文",
    "\\n",
    "\\u00",
    "\n  ",
    "  ",
    "name",
    "value",
    "a\"",
    "}}",
    "red",
    "green",
    "\xa9x",
    "\\\\\\\\",
    "x\\n\\ny",
    "é\\\"z",
    "ab\xe4",
    "北京\"",
    "tail\",\"",
    "a\xe4\xb8",
    "once upon a time, far away",
    "                                ",
    "\\\"}\n",
};

/* Ids 0..255 are the bytes, then eos, tags, another added token, and some longer tokens. */
static inline enum err words_vocab(struct grammar_vocab **ret)
{
    enum { N = WORDS_OTHER + 1 + ARRAY_LEN(words_more) };
    static char bytes[256];
    struct grammar_token tokens[N] = {0};
    int32_t eos = WORDS_EOS;
    for (int i = 0; i < 256; i++) {
        bytes[i] = (char)i;
        tokens[i] = (struct grammar_token){.bytes = &bytes[i], .n = 1};
    }
    tokens[WORDS_EOS] = (struct grammar_token){.bytes = "<eos>", .n = 5, .added = true};
    for (int i = 0; i < GRAMMAR_N_TAGS; i++)
        tokens[WORDS_TAG + i] = (struct grammar_token){
            .bytes = grammar_tag_text[i], .n = strlen(grammar_tag_text[i]), .added = true};
    tokens[WORDS_OTHER] = (struct grammar_token){.bytes = "<other>", .n = 7, .added = true};
    for (size_t i = 0; i < ARRAY_LEN(words_more); i++)
        tokens[WORDS_OTHER + 1 + i] =
            (struct grammar_token){.bytes = words_more[i], .n = strlen(words_more[i])};
    return grammar_vocab_create(tokens, N, N + 40, &eos, 1, ret);
}

#endif
