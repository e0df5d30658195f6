/* dataset.h: what is asked, in which order, and how long the answers shall be.
 *
 * A file is JSONL. A first line {"about": {...}} describes the set and is kept for the report.
 * Every other line is an object:
 *
 *   prompt         text, or an array of token ids
 *   messages       instead of prompt: OpenAI messages, for the chat endpoint
 *   token_ids      the prompt as ids, for --prompts ids
 *   prompt_tokens  its length by the tokeniser that made the file
 *   output_tokens  length of the answer
 *   arrival_s      seconds since the first arrival, never less than the line before
 */
#ifndef BATON_BENCH_DATASET_H
#define BATON_BENCH_DATASET_H

#include <jansson.h>
#include <stddef.h>
#include <stdint.h>

#include "common/base/err.h"
#include "common/base/own.h"
#include "tests/bench/options.h"

struct prompt {
    char *text;     // NULL: ids or messages
    char *messages; // JSON text, or NULL
    int32_t *ids;   // NULL: text or messages
    size_t n_ids;
    uint32_t prompt_tokens; // by the file; 0 = unknown
    uint32_t output_tokens;
    double arrival_s;
};

struct dataset {
    struct prompt *prompts;
    size_t len, cap;
    json_t *about;     // of the file, or NULL
    size_t n_lines;    // prompts in the file
    size_t n_left_out; // too long, or without what was asked for
    size_t n_repeated;
};

/* options.num_prompts prompts from the file or drawn from the seed. ERR_INVALID names file, line
 * and what is wrong with it, or says how many prompts there are if they are too few. */
MUST_CHECK enum err dataset_create(const struct options *o, struct dataset **ret);
void dataset_destroy(struct dataset *d);
DEFINE_OWNED(dataset)

/* Identifies what is asked: prompts in order, their form, output lengths. Not arrivals. */
uint64_t dataset_hash(const struct dataset *d);

#endif
