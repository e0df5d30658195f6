/* grammar.h: what an output may be, as masks over the vocabulary.
 *
 *   text (JSON) --grammar_compile--> struct grammar: a pushdown automaton over bytes and tags
 *   grammar + vocabulary --matcher_create--> struct matcher: its states, made as they are reached
 *   state --matcher_mask--> a bit per id that may come next;  state + id --matcher_accept--> state
 *
 * The router compiles to validate, the workers to draw. Everything that a grammar lets through to
 * its end is valid JSON for its schema (a subset: properties come in the schema's order, objects
 * with `properties` are closed unless additionalProperties says otherwise, whitespace and numbers
 * have bounded length, oneOf needs branches that exclude each other). What cannot be enforced is
 * refused by name.
 *
 * The text, at most GRAMMAR_MAX_BYTES:
 *   {"reasoning": false,     true: output begins inside reasoning, ended by </think> (or
 * <tool_call>) "schema": S,            an answer in JSON, whitespace allowed in front "free":
 * false,          true: an answer in any text "tools": [{"name": N, "parameters": S}],   calls in
 * the model's own tags; "parameters" absent: any arguments "one_call": false}      true: at most
 * one call At least one of schema, free, tools. Calls may follow reasoning and free text, not JSON.
 */
#ifndef BATON_GRAMMAR_H
#define BATON_GRAMMAR_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/base/err.h"
#include "common/base/own.h"

#define GRAMMAR_MAX_BYTES (256u << 10)

/* Added tokens that a grammar knows; all others are just "other". */
enum grammar_tag {
    TAG_THINK_END,
    TAG_CALL,
    TAG_CALL_END,
    TAG_KEY,
    TAG_KEY_END,
    TAG_VALUE,
    TAG_VALUE_END,
    GRAMMAR_N_TAGS
};
extern const char *const grammar_tag_text[GRAMMAR_N_TAGS];

struct grammar; /* immutable */

/* ERR_INVALID: a sentence that names the keyword and where it is ("properties.a: \"not\" is not
 * supported"), or says that nothing can match. ERR_TOO_LARGE: over GRAMMAR_MAX_BYTES, nested too
 * deep, or too many automaton nodes. */
MUST_CHECK enum err grammar_compile(const char *text, size_t n, struct grammar **ret);
void grammar_destroy(struct grammar *g);
DEFINE_OWNED(grammar)

/* ---- vocabulary ---- */

struct grammar_vocab;

struct grammar_token {
    const char *bytes; /* what the id stands for; NULL: no such token, never allowed */
    size_t n;
    bool added; /* matched whole, as a tag or "other" */
};

/* tokens[n_ids] are copied. eos ids end the output and mean nothing else. n_logits >= n_ids: width
 * of masks, the ids from n_ids on are never allowed. ERR_BAD_MODEL: a byte has no token of its own,
 * so that a grammar could come to a state that no token leaves. */
MUST_CHECK enum err grammar_vocab_create(const struct grammar_token *tokens, int32_t n_ids,
                                         int32_t n_logits, const int32_t *eos, int n_eos,
                                         struct grammar_vocab **ret);
/* The same from a tokenizer.json. ERR_BAD_MODEL names file and field. */
MUST_CHECK enum err grammar_vocab_load(const char *path, int32_t n_logits, const int32_t *eos,
                                       int n_eos, struct grammar_vocab **ret);
void grammar_vocab_destroy(struct grammar_vocab *v);
DEFINE_OWNED(grammar_vocab)

/* ---- matching: one thread per matcher ---- */

struct matcher;

/* A point in the output. A plain value: copy it to try ids out. */
struct grammar_state {
    uint32_t at;
};

/* Both must outlive the matcher. */
MUST_CHECK enum err matcher_create(const struct grammar *g, const struct grammar_vocab *v,
                                   struct matcher **ret);
void matcher_destroy(struct matcher *m);
DEFINE_OWNED(matcher)

struct grammar_state matcher_start(const struct matcher *m);

/* The ids that may come next: [ceil(n_logits / 32)] words, bit id % 32 of word id / 32. Valid until
 * matcher_trim; computed once per state. Never empty for a state that accept returned. eos is
 * allowed only where the output is complete. ERR_TOO_LARGE, ERR_NOMEM: more states than a step may
 * make. */
MUST_CHECK enum err matcher_mask(struct matcher *m, struct grammar_state s, const uint32_t **ret);

/* Moves on by one id. *ret_fits false: the mask forbids it, *s is unchanged. */
MUST_CHECK enum err matcher_accept(struct matcher *m, struct grammar_state *s, int32_t id,
                                   bool *ret_fits);

/* Bytes in use. When they exceed limit, drops everything but live[n] (rewritten in place). Call it
 * between steps. */
size_t matcher_bytes(const struct matcher *m);
MUST_CHECK enum err matcher_trim(struct matcher *m, size_t limit, struct grammar_state *const *live,
                                 size_t n);

#endif
